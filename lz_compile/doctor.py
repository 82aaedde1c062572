"""What is installed, whether it works on this machine, and what to do where it does not: ``lz-compile doctor``.

Leaves: a list of :class:`Check`.  Third-party libraries are tried in child processes (:mod:`lz_compile.discovery`).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lz_compile.lowering.kernels import ProviderStatus

State = Literal["ok", "absent", "broken"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.  ``absent`` is fine: lz-compile does without."""

    name: str
    state: State
    value: str
    advice: str = ""


def examine(again: bool = False) -> list[Check]:
    """Everything that lz-compile depends on; ``again`` tries libraries anew whose findings are remembered."""
    from lz_compile import discovery
    from lz_compile.lowering import kernels

    if again:
        discovery.forget()
    checks = [
        Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *_guarded(_check_torch, "torch"),
        *_guarded(_check_triton, "triton"),
        *_guarded(_check_backend, "backend"),
        *_guarded(_check_cache, "cache"),
        *_guarded(_check_policy, "policy"),
        *_check_settings(),
    ]
    return checks + [_check_provider(entry) for entry in kernels.status()]


def _guarded(check: Callable[[], list[Check]], name: str) -> list[Check]:
    """What a check finds; one that fails says that its subject is broken."""
    try:
        return check()
    except Exception as error:
        return [Check(name, "broken", f"{type(error).__name__}: {error}".splitlines()[0])]


def _check_torch() -> list[Check]:
    import torch

    from lz_compile.machine import Machine

    checks = [Check("torch", "ok", torch.__version__)]
    cpu = Machine.of(torch.device("cpu"))
    checks.append(Check("cpu", "ok", f"{cpu.device}, {cpu.capability}"))
    runtime = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = Machine.of(torch.device("cuda", index))
            value = f"{gpu.device}, capability {gpu.capability}, driver {gpu.driver or 'unknown'}, CUDA {gpu.cuda}"
            checks += _guarded(lambda i=index, v=value: [_try_gpu(i, v)], f"gpu {index}")  # type: ignore[misc]
    elif Path("/proc/driver/nvidia/version").exists():
        why = f"has CUDA {runtime} and finds no usable GPU" if runtime else "is built without CUDA"
        advice = "install a PyTorch build for this driver, and look at CUDA_VISIBLE_DEVICES"
        checks.append(Check("gpu", "broken", f"an NVIDIA driver is loaded, but this PyTorch {why}", advice))
    else:
        checks.append(Check("gpu", "absent", "none: kernels for the CPU only"))
    return checks


def _try_gpu(index: int, value: str) -> Check:
    import torch

    total = int(torch.ones(8, device=f"cuda:{index}").sum())
    if total != 8:
        return Check(f"gpu {index}", "broken", f"{value}: eight ones add up to {total}")
    return Check(f"gpu {index}", "ok", value)


def _check_triton() -> list[Check]:
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from torch.utils._triton import has_triton, has_triton_package

    try:
        found = version("triton")
    except PackageNotFoundError:
        return [Check("triton", "absent", "not installed", "pip install triton: our own kernels need it on a GPU")]
    if not has_triton_package():
        return [Check("triton", "broken", f"{found} is installed and does not import", "python -c 'import triton'")]
    if torch.cuda.is_available() and not has_triton():
        return [Check("triton", "broken", f"{found} does not drive this GPU", "install the one that PyTorch asks for")]
    return [Check("triton", "ok", found)]


def _check_backend() -> list[Check]:
    import torch._dynamo

    from lz_compile.backend import layerzero

    if "layerzero" not in torch._dynamo.list_backends(exclude_tags=()):
        advice = "install lz-compile with pip: its entry point tells PyTorch"
        return [Check("backend", "broken", "PyTorch does not know backend 'layerzero'", advice)]
    found: Any = torch._dynamo.lookup_backend("layerzero")
    if found is not layerzero:
        other = getattr(found, "__module__", repr(found))
        return [
            Check("backend", "broken", f"backend 'layerzero' is that of {other}, not ours", "uninstall one of them")
        ]
    return [Check("backend", "ok", "'layerzero', found by its entry point")]


def _check_cache() -> list[Check]:
    import tempfile

    from lz_compile.machine import cache_directory

    advice = "LZ_COMPILE_CACHE_DIR names another place"
    try:
        folder = cache_directory()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        return [Check("cache", "broken", f"cannot be written: {error}", advice)]
    return [Check("cache", "ok", str(folder)), *_guarded(_check_database, "database")]


def _check_database() -> list[Check]:
    import torch

    from lz_compile.database import default
    from lz_compile.machine import Machine

    database = default()
    database.run(lambda connection: None, otherwise=None, write=True)
    if database.problem:
        return [Check("database", "broken", f"{database.path}: {database.problem}", "move the file away")]
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    machines = {Machine.of(device) for device in devices}
    records = database.records()
    here = sum(record.key.machine in machines for record in records)
    return [Check("database", "ok", f"{here} records for this machine, {len(records) - here} for others")]


def _check_policy() -> list[Check]:
    from lz_compile.policy import VARIABLE, Policy, PolicyError

    source = os.environ.get(VARIABLE)
    if not source:
        return []
    try:
        policy = Policy.load(source)
    except PolicyError as error:
        return [Check("policy", "broken", f"{VARIABLE}: {error.problems[0]}", "lz-compile policy check FILE")]
    return [Check("policy", "ok", f"{VARIABLE}: {len(policy.rules)} rules")]


def _check_settings() -> list[Check]:
    names = ("LZ_COMPILE_MEASURE", "LZ_COMPILE_PROVIDERS")
    return [Check(name, "ok", os.environ[name]) for name in names if os.environ.get(name)]


def _check_provider(entry: ProviderStatus) -> Check:
    found = entry.finding
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    name = f"provider {entry.name}"
    if found.usable:
        count = f"{len(entry.kernels)} kernel{'s' * (len(entry.kernels) != 1)}"
        value = ", ".join(filter(None, [found.state, versions, count, found.detail]))
        return Check(name, "ok", value)
    if found.state == "not installed":
        return Check(name, "absent", "not installed", found.detail)
    value = ", ".join(filter(None, [found.state, versions])) + (f": {found.detail}" if found.detail else "")
    advice = f"repair it and run `lz-compile doctor --again`, or leave it out: LZ_COMPILE_PROVIDERS=-{entry.name}"
    return Check(name, "broken", value, advice)
