"""xFormers' attention operators: ``cutlass`` (memory-efficient), ``flash`` (FlashAttention-2, PyTorch's own copy where
the package ``flash_attn`` is missing) and ``split_k`` (Triton, for few queries).

xFormers takes ``[B, M, H, D]``, or ``[B, M, G, H, D]`` for grouped heads with the keys expanded over the heads of a
group: all of it views, so nothing is copied on the way in.  Its masks are objects; those without lengths hold no
tensor.  Masks with lengths keep them on the device for the kernels, beside numbers on the host that only checks and
grids read: these are given as the most that may be, so a captured graph follows the lengths.  But such masks want the
batch packed into one sequence of keys, which a cache ``[B, H, N, D]`` is not: ``split_k`` takes lengths for one query
only and where all rows have the same, by making the batch rows head groups of one row.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.fit import capability, layout_verdict, readable
from lz_compile.lowering.lengths import Prefix, accepted_prefix, emit_prefix, find_prefix
from lz_compile.lowering.semantic import attend_output
from lz_compile.lowering.work import attention_work
from lz_compile.region import Kernel, Provider, Region, Verdict, Work

aten = torch.ops.aten

VERSION = "1"
_HALF = (torch.float16, torch.bfloat16)
_SPLIT_K_HEAD_SIZES = (16, 32, 64, 128, 256)
_SPLIT_K_QUERIES = 16

_library = torch.library.Library("lz_compile", "FRAGMENT")
_MASKED = (
    "(Tensor query, Tensor key, Tensor value, float scale, bool causal, int window_left, int window_right) -> Tensor"
)
_library.define(f"xformers_cutlass_v1{_MASKED}")
_library.define(f"xformers_flash_v1{_MASKED}")
_library.define("xformers_split_k_v1(Tensor query, Tensor key, Tensor value, Tensor? lengths, float scale) -> Tensor")


@functools.cache
def installed() -> bool:
    """Whether xFormers can be found; it is not imported."""
    return importlib.util.find_spec("xformers") is not None


@functools.cache
def _fmha() -> Any:
    return importlib.import_module("xformers.ops.fmha")


# -- the ops


def _mask(causal: bool, window_left: int, window_right: int, everything: int) -> Any:
    """The mask object of a bottom-right aligned mask; -1 is no limit, which a window spells as ``everything``."""
    masks = _fmha().attn_bias
    if causal and window_left >= 0:
        return masks.LowerTriangularFromBottomRightLocalAttentionMask(_window_size=window_left + 1)
    if causal:
        return masks.LowerTriangularFromBottomRightMask()
    if window_left >= 0 or window_right >= 0:
        left, right = (everything if limit < 0 else limit for limit in (window_left, window_right))
        return masks.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)
    return None


def _grouped(x: torch.Tensor, kv_heads: int, heads: int) -> torch.Tensor:
    """``[B, H, M, D]`` as ``[B, M, G, heads / G, D]`` with ``G = kv_heads``; keys are expanded within their group."""
    group = heads // kv_heads
    x = x.transpose(1, 2)
    if x.shape[2] == heads:
        return x.unflatten(2, (kv_heads, group))
    return x.unsqueeze(3).expand(-1, -1, -1, group, -1)


def _run(operator: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    operators = importlib.import_module(f"xformers.ops.fmha.{operator}")
    with torch.no_grad():
        return _fmha().memory_efficient_attention_forward(q, k, v, mask, scale=scale, op=operators.FwOp)


def cutlass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
) -> torch.Tensor:
    """Memory-efficient attention for as many key/value heads as query heads, or one.

    Args:
        query, key, value: ``[B, Hq, M, Dk]``, ``[B, Hkv, N, Dk]``, ``[B, Hkv, N, Dv]``; float16 or bfloat16.
        causal: aligned to the last query and the last key.
        window_left: keys to the left of that diagonal, -1 for all; only with ``causal``.
        window_right: -1.

    Returns:
        ``[B, Hq, M, Dv]`` over contiguous ``[B, M, Hq, Dv]`` memory.
    """
    query, key, value = readable(query), readable(key), readable(value)
    heads = query.shape[1]
    key, value = (x.expand(-1, heads, -1, -1) if x.shape[1] == 1 else x for x in (key, value))
    mask = _mask(causal, window_left, window_right, query.shape[2] + key.shape[2])
    out = _run("cutlass", query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, scale)
    return out.contiguous().transpose(1, 2)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
) -> torch.Tensor:
    """FlashAttention-2 through xFormers: as :func:`cutlass`, with any groups of heads and any window."""
    heads, kv_heads = query.shape[1], key.shape[1]
    q, k, v = (_grouped(readable(x), kv_heads, heads) for x in (query, key, value))
    mask = _mask(causal, window_left, window_right, query.shape[2] + key.shape[2])
    out = _run("flash", q, k, v, mask, scale)
    return out.flatten(2, 3).contiguous().transpose(1, 2)


def split_k(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Triton split-K for few queries that see all keys, or one query that sees the first ``lengths[0]``.

    Args:
        query, key, value: ``[B, Hq, M, D]``, ``[B, Hkv, N, D]`` twice; float16 or bfloat16.
        lengths: int32 ``[B]``, equal and at least one; then ``M`` is 1 and batch and heads of keys and values merge in
            memory.

    Returns:
        ``[B, Hq, M, D]`` over contiguous ``[B, M, Hq, D]`` memory.
    """
    batch, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    query, key, value = readable(query), readable(key), readable(value)
    if lengths is None:
        q, k, v = (_grouped(x, kv_heads, heads) for x in (query, key, value))
        return _run("triton_splitk", q, k, v, None, scale).flatten(2, 3).contiguous().transpose(1, 2)
    group = heads // kv_heads
    packed_query = query.reshape(1, 1, batch * kv_heads, group, size)
    packed_key, packed_value = (
        x.reshape(1, batch * kv_heads, keys, size).transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, group, -1)
        for x in (key, value)
    )
    mask = _one_length(lengths, keys)
    out = _run("triton_splitk", packed_query, packed_key, packed_value, mask, scale)
    return out.reshape(batch, queries, heads, size).transpose(1, 2)


def _one_length(lengths: torch.Tensor, keys: int) -> Any:
    """One query over one padded row of ``keys`` keys whose length is read on the device.

    The operator reads the starts of the rows only where queries differ in number or keys have gaps, so that any tensor
    on the device serves for them; nothing is copied from the host.
    """
    masks = _fmha().attn_bias
    length = lengths[:1]
    row = masks._SeqLenInfo(seqstart=length, max_seqlen=1, min_seqlen=1, seqstart_py=[0, 1])
    padded = masks._PaddedSeqLenInfo(
        seqstart=length,
        max_seqlen=keys,
        min_seqlen=keys,
        seqstart_py=[0, keys],
        seqlen=length,
        seqlen_py=[keys],
        padding=keys,
    )
    return masks.BlockDiagonalPaddedKeysMask(q_seqinfo=row, k_seqinfo=padded)


for _name, _call in {"cutlass": cutlass, "flash": flash, "split_k": split_k}.items():
    _library.impl(f"xformers_{_name}_v1", _call, "CUDA")


@torch.library.register_fake("lz_compile::xformers_cutlass_v1")
@torch.library.register_fake("lz_compile::xformers_flash_v1")
@torch.library.register_fake("lz_compile::xformers_split_k_v1")
def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return attend_output(query, value)


# -- what fits


def _common(region: Region, least: tuple[int, int], most: tuple[int, int] | None = None) -> Verdict:
    a = region.attention
    assert a is not None
    q, k, v = a.fake()
    device = capability(q.device)
    if device is None:
        return "runs on CUDA"
    if not installed():
        return "xFormers is not installed"
    if device < least or (most is not None and device > most):
        return f"does not run on compute capability {device[0]}.{device[1]}"
    if q.dtype not in _HALF:
        return f"does not take {q.dtype}"
    if q.dtype == torch.bfloat16 and device < (8, 0):
        return "bfloat16 needs compute capability 8.0"
    if any(not isinstance(x.shape[3], int) or x.shape[3] % 8 for x in (k, v)):
        return "head sizes are multiples of 8"
    if not a.scale > 0:
        return "takes positive scales only"
    if a.softcap:
        return "has no softcap"
    return layout_verdict(q, k, v)


def _static_mask(region: Region) -> Prefix | str:
    prefix = find_prefix(region)
    if isinstance(prefix, str):
        return prefix
    if prefix.has_lengths:
        return "takes lengths only for keys packed into one sequence"
    if prefix.may_be_empty:
        return "a row may see no key"
    return prefix


def _supports_cutlass(region: Region) -> Verdict:
    why_not = _common(region, (6, 0), (9, 0))
    if why_not:
        return why_not
    a = region.attention
    assert a is not None
    if a.kv_heads not in (1, a.query_heads):
        return "grouped heads would be copied"
    prefix = _static_mask(region)
    if isinstance(prefix, str):
        return prefix
    return "takes a window only below the diagonal" if prefix.has_window and not prefix.causal else None


def _supports_flash(region: Region) -> Verdict:
    why_not = _common(region, (8, 0))
    if why_not:
        return why_not
    assert region.attention is not None
    _, k, v = region.attention.fake()
    if k.shape[3] != v.shape[3] or k.shape[3] > 256:
        return f"does not take head sizes {k.shape[3]} and {v.shape[3]}"
    prefix = _static_mask(region)
    return prefix if isinstance(prefix, str) else None


def _supports_split_k(region: Region) -> Verdict:
    why_not = _common(region, (8, 0))
    if why_not:
        return why_not
    a = region.attention
    assert a is not None
    _, k, v = a.fake()
    if k.shape[3] != v.shape[3] or k.shape[3] not in _SPLIT_K_HEAD_SIZES:
        return f"does not take head sizes {k.shape[3]} and {v.shape[3]}"
    if not isinstance(a.queries, int) or a.queries > _SPLIT_K_QUERIES:
        return f"is for up to {_SPLIT_K_QUERIES} queries"
    prefix = find_prefix(region)
    if isinstance(prefix, str):
        return prefix
    if prefix.may_be_empty:
        return "a row may see no key"
    if prefix.has_window or (prefix.causal and a.queries > 1):
        return "takes no causal mask and no window"
    if prefix.has_lengths and not prefix.same_for_all_rows:
        return "takes one length for all rows"
    if prefix.has_lengths and not all(_rows_merge(x) for x in (k, v)):
        return "the batch rows of the cache don't merge with its heads in memory"
    return None


def _rows_merge(x: torch.Tensor) -> bool:
    """Whether batch and heads are one dimension in memory."""
    if statically_known_true(x.shape[0] == 1) or statically_known_true(x.shape[1] == 1):
        return True
    return bool(statically_known_true(x.stride(0) == x.shape[1] * x.stride(1)))


# -- emission


def _emit_masked(op: Any) -> Callable[[Emitter, Region], fx.Node]:
    def emit(emitter: Emitter, region: Region) -> fx.Node:
        a = region.attention
        assert a is not None
        prefix = accepted_prefix(region)
        inputs = emit_prefix(emitter, region, prefix)
        left = -1 if prefix.window_left is None else prefix.window_left
        right = -1 if prefix.window_right is None else prefix.window_right
        parts = (inputs.query, inputs.key, inputs.value)
        out = emitter.call(region.output, op, *parts, float(a.scale), prefix.causal, left, right)
        return emitter.result(region, out)

    return emit


def _emit_split_k(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    inputs = emit_prefix(emitter, region, accepted_prefix(region))
    parts = (inputs.query, inputs.key, inputs.value, inputs.lengths)
    op = torch.ops.lz_compile.xformers_split_k_v1.default
    return emitter.result(region, emitter.call(region.output, op, *parts, float(a.scale)))


def _installed_version() -> str:
    try:
        return version("xformers")
    except PackageNotFoundError:
        return "0"


def _work_prefill(region: Region) -> Work:
    return attention_work(region, efficiency=0.3)


def _work_split_k(region: Region) -> Work:
    return attention_work(region, efficiency=0.3, launches=2)


CUTLASS = Kernel(
    name="xformers.cutlass",
    kind="attention",
    version=f"{VERSION}+{_installed_version()}",
    supports=_supports_cutlass,
    emit=_emit_masked(torch.ops.lz_compile.xformers_cutlass_v1.default),
    cuda_graphs="reads no lengths",
    summary="xFormers' memory-efficient attention: the proof turns the mask into causal and window",
    work=_work_prefill,
)

FLASH = Kernel(
    name="xformers.flash",
    kind="attention",
    version=f"{VERSION}+{_installed_version()}",
    supports=_supports_flash,
    emit=_emit_masked(torch.ops.lz_compile.xformers_flash_v1.default),
    cuda_graphs="reads no lengths",
    summary="FlashAttention-2 through xFormers: the proof turns the mask into causal and window",
    work=_work_prefill,
)

SPLIT_K = Kernel(
    name="xformers.split_k",
    kind="attention",
    version=f"{VERSION}+{_installed_version()}",
    supports=_supports_split_k,
    emit=_emit_split_k,
    cuda_graphs="the length stays on the device, the grid depends on shapes only",
    summary="xFormers' Triton split-K decode: keys are read up to the length, once per head group",
    work=_work_split_k,
)


def probe() -> dict[str, str]:
    """Calls each operator once against SDPA.

    Returns:
        Which operators work, with xFormers' version.

    Raises:
        RuntimeError: none does.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, 80, 4, 64, device="cuda", dtype=torch.float16, generator=generator).transpose(1, 2)
        for _ in range(3)
    )
    works: dict[str, str] = {}
    failed: list[str] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    causal = sdpa(q, k, v, is_causal=True)
    runs: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {
        "cutlass": (lambda: cutlass(q, k, v, 0.125, True, -1, -1), causal),
        "flash": (lambda: flash(q, k, v, 0.125, True, -1, -1), causal),
        "split_k": (lambda: split_k(q[:, :, -1:], k, v, None, 0.125), sdpa(q[:, :, -1:], k, v)),
    }
    for name, (run, expected) in runs.items():
        try:
            error = (run().float() - expected.float()).abs().max().item()
            if not error < 1e-2:
                raise RuntimeError(f"is off by {error}")
            works[name] = _installed_version()
        except Exception as error_raised:
            failed.append(f"{name}: {error_raised}")
    if not works:
        raise RuntimeError("; ".join(failed))
    return works


PROVIDER = Provider(
    name="xformers",
    kernels=(FLASH, CUTLASS, SPLIT_K),
    distributions=("xformers",),
    probe="lz_compile.lowering.xformers:probe",
)
