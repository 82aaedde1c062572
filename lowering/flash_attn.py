"""FlashAttention of every generation: 2 (``flash_attn``), 3 (``flash_attn_interface`` or ``fa3_fwd_interface``) and 4
(``flash_attn.cute``).

Each generation is one op with real strides: query, key and value ``[B, H, M, D]`` with any strides that are whole 16
bytes (the library takes ``[B, M, H, D]``, which is a view), the result the transposed view of what the library
allocates.  Generations 2 and 3 run through ``flash_attn_with_kvcache`` with or without lengths: a ``lengths`` tensor is
read on the device while the grid is sized by the cache, so that a captured CUDA graph follows it.
Beside the output the library allocates a float32 logsumexp ``[B, Hq, M]`` and, where it splits the keys, the partial
results.

Whether a generation is installed is answered without importing it; what FlashAttention-3 was built with (fp16, local
windows, softcap) is read from the constants that its build leaves beside it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.fit import capability, layout_verdict, readable
from lz_compile.lowering.lengths import Prefix, accepted_prefix, emit_prefix, find_prefix
from lz_compile.lowering.semantic import attend_output
from lz_compile.lowering.work import attention_work
from lz_compile.region import Kernel, Provider, Region, Verdict, Work

VERSION = "1"
# Up to so many queries the library may split the keys even if no row has a length of its own.
_FEW_QUERIES = 64

_FA3_MODULES = {"flash_attn_interface": "flash_attn_config", "fa3_fwd_interface": "fa3_fwd_config"}
# A build that says nothing about itself is taken to lack what a build may lack.
_UNKNOWN_BUILD = dict.fromkeys(
    (
        "FLASHATTENTION_DISABLE_FP16",
        "FLASHATTENTION_DISABLE_LOCAL",
        "FLASHATTENTION_DISABLE_SOFTCAP",
        "FLASHATTENTION_DISABLE_VARLEN",
        "FLASHATTENTION_DISABLE_SPLIT",
        "FLASH_ATTENTION_DISABLE_HDIMDIFF192",
    ),
    True,
)

_ARGUMENTS = (
    "(Tensor query, Tensor key, Tensor value, Tensor? lengths, float scale, bool causal, int window_left, "
    "int window_right, float softcap, int num_splits) -> Tensor"
)
_library = torch.library.Library("lz_compile", "FRAGMENT")
_library.define(f"fa2_v1{_ARGUMENTS}")
_library.define(f"fa3_v1{_ARGUMENTS}")
_library.define("fa4_v1(Tensor query, Tensor key, Tensor value, float scale, bool causal) -> Tensor")


@functools.cache
def fa3_module() -> str | None:
    """The importable FlashAttention-3 interface, None when there is none."""
    return next((module for module in _FA3_MODULES if importlib.util.find_spec(module)), None)


@functools.cache
def _fa3_build() -> dict[str, bool]:
    """The build flags that FlashAttention-3's setup writes into its ``*_config.py``, read without running it."""
    module = fa3_module()
    spec = importlib.util.find_spec(_FA3_MODULES[module]) if module else None
    if spec is None or spec.origin is None:
        return _UNKNOWN_BUILD
    try:
        for statement in ast.parse(Path(spec.origin).read_text()).body:
            if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "CONFIG":
                return dict(ast.literal_eval(statement.value)["build_flags"])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        pass
    return _UNKNOWN_BUILD


def _lacks(*flags: str) -> bool:
    return any(_fa3_build().get(f"FLASHATTENTION_DISABLE_{flag}", False) for flag in flags)


@functools.cache
def has_fa2() -> bool:
    """FlashAttention-2 shares its package's name with FlashAttention-4: its extension tells them apart."""
    return _package_file("flash_attn_interface.py") and importlib.util.find_spec("flash_attn_2_cuda") is not None


@functools.cache
def has_fa4() -> bool:
    return _package_file("cute/interface.py")


def _package_file(name: str) -> bool:
    spec = importlib.util.find_spec("flash_attn")
    places = spec.submodule_search_locations if spec is not None else None
    return any((Path(place) / name).exists() for place in places or ())


def forget_installed() -> None:
    """Looks again for installed packages the next time."""
    for cached in (fa3_module, _fa3_build, has_fa2, has_fa4):
        cached.cache_clear()


# -- the ops


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)


def _with_cache(
    module: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
) -> torch.Tensor:
    """``flash_attn_with_kvcache``, which generations 2 and 3 call alike; nothing is written to the cache."""
    out = _function(module, "flash_attn_with_kvcache")(
        *(readable(x).transpose(1, 2) for x in (query, key, value)),
        cache_seqlens=lengths,
        softmax_scale=scale,
        causal=causal,
        window_size=(window_left, window_right),
        softcap=softcap,
        num_splits=num_splits,
    )
    return out.contiguous().transpose(1, 2)


def fa2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
) -> torch.Tensor:
    """FlashAttention-2; see :func:`fa3`."""
    numbers = (scale, causal, window_left, window_right, softcap, num_splits)
    return _with_cache("flash_attn", query, key, value, lengths, *numbers)


def fa3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
) -> torch.Tensor:
    """FlashAttention-3 on ``[B, H, M, D]``.

    Args:
        query, key, value: ``[B, Hq, M, Dk]``, ``[B, Hkv, N, Dk]``, ``[B, Hkv, N, Dv]``; bfloat16 or float16.
        lengths: int32 ``[B]``, contiguous: row b sees keys below ``lengths[b]`` only; None for all of them.
        scale: positive.
        causal: the last query sees the last key (of the row's length), the one before it one key less, and so on.
        window_left, window_right: keys that a query sees to the left and right of that diagonal, -1 for all.
        softcap: 0.0 for none.
        num_splits: into how many parts the keys are split; 0 leaves it to the library.

    Returns:
        ``[B, Hq, M, Dv]`` over contiguous ``[B, M, Hq, Dv]`` memory; zeros where a query sees no key.
    """
    module = fa3_module()
    if module is None:
        raise RuntimeError("FlashAttention-3 is not installed")
    numbers = (scale, causal, window_left, window_right, softcap, num_splits)
    return _with_cache(module, query, key, value, lengths, *numbers)


def fa4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """FlashAttention-4 without lengths; arguments and result as for :func:`fa3`."""
    parts = (readable(x.detach()).transpose(1, 2) for x in (query, key, value))
    with torch.no_grad():
        result = _function("flash_attn.cute.interface", "flash_attn_func")(*parts, softmax_scale=scale, causal=causal)
    out = result[0] if isinstance(result, tuple) else result
    return out.contiguous().transpose(1, 2)


for _name, _run in {"fa2_v1": fa2, "fa3_v1": fa3, "fa4_v1": fa4}.items():
    _library.impl(_name, _run, "CUDA")


@torch.library.register_fake("lz_compile::fa2_v1")
@torch.library.register_fake("lz_compile::fa3_v1")
@torch.library.register_fake("lz_compile::fa4_v1")
def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return attend_output(query, value)


# -- what fits


@dataclass(frozen=True)
class _Limits:
    """What one generation takes."""

    dtypes: tuple[torch.dtype, ...]
    head_sizes: range | tuple[int, ...]
    softcap: bool = True
    window: bool = True
    lengths: bool = True
    empty_rows: bool = True
    unequal_head_sizes: bool = False


_HALF = (torch.float16, torch.bfloat16)
_EIGHTS = range(8, 257, 8)


def _verdict(region: Region, limits: _Limits) -> Verdict:
    a = region.attention
    assert a is not None
    q, k, v = a.fake()
    if q.dtype not in limits.dtypes:
        return f"does not take {q.dtype}"
    key_size, value_size = k.shape[3], v.shape[3]
    if not isinstance(key_size, int) or key_size not in limits.head_sizes:
        return f"does not take head size {key_size}"
    if value_size != key_size and not (limits.unequal_head_sizes and 128 < key_size <= 192 and 96 < value_size <= 128):
        return f"does not take head sizes {key_size} and {value_size}"
    why_not = layout_verdict(q, k, v)
    if why_not:
        return why_not
    if not a.scale > 0:
        return "takes positive scales only"
    if a.softcap and not limits.softcap:
        return "has no softcap"
    prefix = find_prefix(region)
    if isinstance(prefix, str):
        return prefix
    if prefix.has_lengths and not limits.lengths:
        return "takes no lengths"
    if prefix.has_window and not limits.window:
        return "has no window"
    if prefix.may_be_empty and not limits.empty_rows:
        return "a row may see no key"
    return None


def _supports_fa2(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    device = capability(a.query.meta["val"].device)
    if device is None:
        return "runs on CUDA"
    if not has_fa2():
        return "FlashAttention-2 is not installed"
    if device < (8, 0):
        return "needs compute capability 8.0"
    return _verdict(region, _Limits(_HALF, _EIGHTS))


def _supports_fa3(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    device = capability(a.query.meta["val"].device)
    if device is None:
        return "runs on CUDA"
    if fa3_module() is None:
        return "FlashAttention-3 is not installed"
    if device[0] != 9:
        return "needs compute capability 9.0"
    limits = _Limits(
        dtypes=(torch.bfloat16,) if _lacks("FP16") else _HALF,
        head_sizes=tuple(size for size in _EIGHTS if not _lacks(f"HDIM{_compiled_head_size(size)}")),
        softcap=not _lacks("SOFTCAP"),
        window=not _lacks("LOCAL"),
        lengths=not _lacks("VARLEN"),
        unequal_head_sizes=not _fa3_build().get("FLASH_ATTENTION_DISABLE_HDIMDIFF192", False),
    )
    return _verdict(region, limits)


def _compiled_head_size(size: int) -> int:
    """FlashAttention-3 is compiled for a few head sizes, of which the next larger one serves the others."""
    return next(compiled for compiled in (64, 96, 128, 192, 256) if size <= compiled)


def _supports_fa4(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    device = capability(a.query.meta["val"].device)
    if device is None:
        return "runs on CUDA"
    if not has_fa4():
        return "FlashAttention-4 is not installed"
    if device[0] not in (9, 10):
        return "needs compute capability 9.0 or 10.0"
    return _verdict(region, _Limits(_HALF, (64, 96, 128), softcap=False, window=False, lengths=False, empty_rows=False))


# -- emission


def _emit_cached(op: Any) -> Callable[[Emitter, Region], fx.Node]:
    def emit(emitter: Emitter, region: Region) -> fx.Node:
        a = region.attention
        assert a is not None
        prefix = accepted_prefix(region)
        inputs = emit_prefix(emitter, region, prefix)
        out = emitter.call(
            region.output,
            op,
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.lengths,
            float(a.scale),
            prefix.causal,
            -1 if prefix.window_left is None else prefix.window_left,
            _window_right(prefix),
            float(a.softcap),
            _num_splits(region, prefix, op),
        )
        return emitter.result(region, out)

    return emit


def _window_right(prefix: Prefix) -> int:
    if prefix.window_right is not None:
        return prefix.window_right
    return 0 if prefix.causal and prefix.window_left is not None else -1


def _num_splits(region: Region, prefix: Prefix, op: Any) -> int:
    """0 (the library decides) where keys are many and queries few, as the library's own decode call; else 1."""
    a = region.attention
    assert a is not None
    if op is torch.ops.lz_compile.fa3_v1.default and _lacks("SPLIT"):
        return 1
    few = isinstance(a.queries, int) and a.queries <= _FEW_QUERIES
    return 0 if few or prefix.has_lengths else 1


def _emit_fa4(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    prefix = accepted_prefix(region)
    inputs = emit_prefix(emitter, region, prefix)
    parts = (inputs.query, inputs.key, inputs.value)
    op = torch.ops.lz_compile.fa4_v1.default
    return emitter.result(region, emitter.call(region.output, op, *parts, float(a.scale), prefix.causal))


# -- what is installed


def _installed_version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0"


_FA2_DISTRIBUTIONS = ("flash-attn",)
_FA3_DISTRIBUTIONS = ("flash-attn-3", "fa3-fwd")
_FA4_DISTRIBUTIONS = ("flash-attn-4",)


def _work_fa2(region: Region) -> Work:
    return attention_work(region, efficiency=0.4)


def _work_fa3(region: Region) -> Work:
    """641 of an H200's 989 bfloat16 TFLOP/s in a causal prefill of 16384 (torch 2.11, fa3-fwd 0.0.3)."""
    return attention_work(region, efficiency=0.65)


FA3 = Kernel(
    name="flash_attn.fa3",
    kind="attention",
    version=f"{VERSION}+{_installed_version(*_FA3_DISTRIBUTIONS)}",
    supports=_supports_fa3,
    emit=_emit_cached(torch.ops.lz_compile.fa3_v1.default),
    cuda_graphs="lengths stay on the device, the grid depends on shapes only",
    summary="FlashAttention-3: the proof turns the mask into causal, window and lengths",
    work=_work_fa3,
)

FA2 = Kernel(
    name="flash_attn.fa2",
    kind="attention",
    version=f"{VERSION}+{_installed_version(*_FA2_DISTRIBUTIONS)}",
    supports=_supports_fa2,
    emit=_emit_cached(torch.ops.lz_compile.fa2_v1.default),
    cuda_graphs="lengths stay on the device, the grid depends on shapes only",
    summary="FlashAttention-2: the proof turns the mask into causal, window and lengths",
    work=_work_fa2,
)

FA4 = Kernel(
    name="flash_attn.fa4",
    kind="attention",
    version=f"{VERSION}+{_installed_version(*_FA4_DISTRIBUTIONS)}",
    supports=_supports_fa4,
    emit=_emit_fa4,
    cuda_graphs="reads no lengths; the first call, which compiles the kernel, comes before the capture",
    summary="FlashAttention-4: the proof turns the mask into causal or none",
    work=_work_fa3,
)


# -- the probe


def _fits_here(generation: str) -> bool:
    least = {"fa2": (8, 0), "fa3": (9, 0), "fa4": (9, 0)}[generation]
    installed = {"fa2": has_fa2(), "fa3": fa3_module() is not None, "fa4": has_fa4()}[generation]
    here = capability(torch.device("cuda")) if torch.cuda.is_available() else None
    return installed and here is not None and here >= least and (generation != "fa3" or here[0] == 9)


def probe_generation(generation: str) -> None:
    """One small causal call of ``"fa2"``, ``"fa3"`` or ``"fa4"``, and one with lengths, against SDPA.

    Raises:
        RuntimeError: it gives something else; or what the library raises.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 80, 4, 64)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2) for _ in range(3)
    )
    op = getattr(torch.ops.lz_compile, f"{generation}_v1")
    calls = [(op(q, k, v, 0.125, True) if generation == "fa4" else op(q, k, v, None, 0.125, True, -1, -1, 0.0, 1), 80)]
    if generation != "fa4":
        lengths = torch.full((2,), 50, dtype=torch.int32, device="cuda")
        calls.append((op(q[:, :, -1:], k, v, lengths, 0.125, False, -1, -1, 0.0, 0), 50))
    for got, keys in calls:
        causal = got.shape[2] > 1
        parts = (q[:, :, -got.shape[2] :], k[:, :, :keys], v[:, :, :keys])
        expected = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=causal, scale=0.125)
        error = (got.float() - expected.float()).abs().max().item()
        if not error < 3e-2:
            raise RuntimeError(f"{generation} is off by {error}")


def probe() -> dict[str, str]:
    """Which generations work here, with their versions.

    Where several are installed, each is called in a process of its own: one that crashes leaves the others.

    Raises:
        RuntimeError: none works.
    """
    candidates = [generation for generation in ("fa3", "fa2", "fa4") if _fits_here(generation)]
    works: dict[str, str] = {}
    failed: list[str] = []
    kernels = {"fa2": FA2, "fa3": FA3, "fa4": FA4}
    for generation in candidates:
        try:
            if len(candidates) > 1:
                _in_a_child(generation)
            else:
                probe_generation(generation)
            works[generation] = kernels[generation].version.partition("+")[2]
        except Exception as error:
            failed.append(f"{generation}: {error}")
    if not works:
        raise RuntimeError("; ".join(failed) or "no generation of FlashAttention fits this device")
    return works


def _in_a_child(generation: str) -> None:
    code = f"from {__name__} import probe_generation; probe_generation({generation!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"the process ended with {done.returncode}")


PROVIDER = Provider(
    name="flash_attn",
    kernels=(FA3, FA2, FA4),
    distributions=(*_FA3_DISTRIBUTIONS, *_FA2_DISTRIBUTIONS, *_FA4_DISTRIBUTIONS),
    probe="lz_compile.lowering.flash_attn:probe",
)
