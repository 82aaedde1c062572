"""What a kernel should take where it was not measured: the roofline (Williams, Waterman and Patterson 2009).

Enters: the :class:`~lz_compile.region.Work` of a kernel on a region, and a device.  Leaves: seconds.  The device's
peaks come from two short probes (a copy and a matrix product) whose results are kept like any measurement, or from what
the driver says of the device when nothing may be measured.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from lz_compile.region import Work

VERSION = "1"
# Between two kernels on a GPU's stream; a call of an operator on a CPU.
_LAUNCH = {"cuda": 3e-6, "cpu": 5e-6}


def launch_seconds(device_type: str) -> float:
    """What each further kernel of a graph costs beside its own work."""
    return _LAUNCH.get(device_type, 5e-6)


@dataclass(frozen=True)
class Roof:
    """Peaks of a device: bytes a second (read plus written), floating-point operations a second by dtype."""

    bandwidth: float
    flops: dict[torch.dtype, float]
    fitted: bool

    def seconds(self, work: Work, dtype: torch.dtype, device_type: str) -> float:
        """The greater of the two limits of ``work``, over its efficiency, with launches and planning."""
        peak = self.flops.get(dtype) or min(self.flops.values())
        limit = max(work.flops / peak, work.bytes / self.bandwidth)
        return limit / work.efficiency + work.launches * launch_seconds(device_type) + work.planning

    def transfer(self, moved: float) -> float:
        """Seconds to move that many bytes (read plus written)."""
        return moved / self.bandwidth


def fit(device: torch.device) -> Roof:
    """Measures a copy and matrix products on the device; takes about 50 ms."""
    if device.type == "cuda":
        copied, side = 256 << 20, 4096
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
    else:
        copied, side = 32 << 20, 384
        dtypes = [torch.bfloat16, torch.float32]
    with torch.no_grad():
        source = torch.zeros(copied, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * copied / _seconds(lambda: target.copy_(source), device)
        flops = {}
        for dtype in dtypes:
            a = torch.randn(side, side, device=device).to(dtype)
            flops[dtype] = 2 * side**3 / _seconds(lambda a=a: a @ a, device)  # type: ignore[misc]
    return Roof(bandwidth, flops, fitted=True)


def _seconds(call: object, device: torch.device) -> float:
    assert callable(call)
    call()
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return max(best, 1e-9)


@functools.cache
def nominal(device: torch.device) -> Roof:
    """Peaks by what the driver says: memory clock and bus width, multiprocessors and clock.

    Half precision counts 4096 operations a clock and multiprocessor from compute capability 9.0 on, 2048 for 8.x and
    1024 below (NVIDIA's architecture papers).  A CPU counts 32 (float32) operations a clock and core at 2.5 GHz, and 25
    GB/s.
    """
    if device.type != "cuda":
        peak = 32 * 2.5e9 * torch.get_num_threads()
        return Roof(25e9, {torch.float32: peak, torch.bfloat16: peak, torch.float64: peak / 2}, fitted=False)
    properties = torch.cuda.get_device_properties(device)
    clock = float(getattr(properties, "clock_rate", 1.7e6)) * 1e3
    bus, memory = getattr(properties, "memory_bus_width", 5120), getattr(properties, "memory_clock_rate", 2.6e6)
    per_clock = 4096 if properties.major >= 9 else 2048 if properties.major == 8 else 1024
    half = properties.multi_processor_count * clock * per_clock
    flops = {torch.bfloat16: half, torch.float16: half, torch.float32: half / 16}
    return Roof(2 * memory * 1e3 * bus / 8, flops, fitted=False)
