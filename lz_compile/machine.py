"""Which machine this is, for records that hold on one machine only, and where such records are kept."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import device as Device


@dataclass(frozen=True)
class Machine:
    """What a measurement depends on beside the kernel and the shapes.

    ``device`` is the product name (``NVIDIA H200``, or the processor's with its thread count), ``capability`` such as
    ``9.0`` (the instruction set for a CPU); ``driver`` and ``cuda`` are empty without a GPU.
    """

    device: str
    capability: str
    driver: str
    cuda: str
    torch: str

    @classmethod
    def of(cls, device: Device) -> Machine:
        """The machine behind a device; costs nothing after the first call."""
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            return _gpu(index)
        return _cpu(torch.get_num_threads())


@functools.cache
def _gpu(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    return Machine(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        driver=_driver_version(),
        cuda=torch.version.cuda or torch.version.hip or "",
        torch=torch.__version__,
    )


@functools.cache
def _cpu(threads: int) -> Machine:
    return Machine(
        device=f"{_processor()}, {threads} threads",
        capability=torch.backends.cpu.get_cpu_capability(),
        driver="",
        cuda="",
        torch=torch.__version__,
    )


def _driver_version() -> str:
    """The version of the NVIDIA kernel module; empty when it does not say (another vendor, a hiding container)."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        pass
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        return str(torch._C._cuda_getDriverVersion()) if hasattr(torch._C, "_cuda_getDriverVersion") else ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_directory() -> Path:
    """Where measurements and probes are kept: ``LZ_COMPILE_CACHE_DIR``, else the user's cache directory.

    The directory may not exist, and may not be writable.
    """
    chosen = os.environ.get("LZ_COMPILE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("lz-compile", appauthor=False))
