"""Our own Triton kernels of attention as candidates: split-KV decode and tiled prefill, on CUDA."""

from __future__ import annotations

import torch
import torch.fx as fx

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.work import attention_work, sdpa_planning
from lz_compile.region import Attention, Kernel, Region, Verdict, Work

VERSION = "3"
_DECODE_QUERIES = 16
_LEAST_HEAD_SIZE = 16
_HEAD_SIZE = 256
# Of split_kv: a head of latents with 64 rotated columns (DeepSeek-V3), whose tiles fit into an SM's shared memory.
SPLIT_KEY_SIZE = 576
SPLIT_VALUE_SIZE = 512


def _common(region: Region, key_size: int, value_size: int) -> Verdict:
    """What both kernels ask for; the sizes are the largest that they take."""
    a = region.attention
    assert a is not None
    q, k, v = a.fake()
    if q.device.type != "cuda":
        return "runs on CUDA"
    from lz_compile.lowering import triton_ops

    missing = triton_ops.available()
    if missing:
        return missing
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"does not take {q.dtype}"
    for tensor, most in ((k, key_size), (v, value_size)):
        size = tensor.shape[3]
        if not isinstance(size, int) or not _LEAST_HEAD_SIZE <= size <= most:
            return f"head size {size} is not in {_LEAST_HEAD_SIZE} to {most}"
    if any(not _last_is_one(x) for x in (q, k, v)):
        return "the head dimension is strided"
    if len(a.mask.documents) > 1:
        return "takes one document term"
    return None


def _last_is_one(value: torch.Tensor) -> bool:
    stride = value.stride(-1)
    return isinstance(stride, int) and stride == 1


def _few_queries(a: Attention) -> bool:
    return isinstance(a.queries, int) and a.queries <= _DECODE_QUERIES


def _supports_split_kv(region: Region) -> Verdict:
    why_not = _common(region, SPLIT_KEY_SIZE, SPLIT_VALUE_SIZE)
    if why_not:
        return why_not
    a = region.attention
    assert a is not None
    if not _few_queries(a):
        return f"is for up to {_DECODE_QUERIES} queries"
    if a.mask.documents:
        return "does not take packed documents"
    rows = a.query_heads // a.kv_heads * a.queries
    if rows > 128 and a.fake()[1].shape[3] <= _HEAD_SIZE:
        return "more than 128 query rows for one key/value head"  # tiles are for these, up to their head size
    return None


def _skips_tiles(a: Attention) -> bool:
    """Whether what was proved beside a bias hides tiles."""
    form = a.mask
    return bool(form.upper or form.lower or form.start or form.stop or form.chunk)


def _supports_tiled(region: Region) -> Verdict:
    why_not = _common(region, _HEAD_SIZE, _HEAD_SIZE)
    if why_not:
        return why_not
    a = region.attention
    assert a is not None
    if a.sink is not None:
        return None  # there is no other kernel
    if not a.mask.proved and not _skips_tiles(a) and not sdpa_planning(region):
        return f"the mask is not proved, so that no tile can be skipped: {a.mask.unproved}"
    if a.query.meta["val"].dtype == torch.float32:
        return "float32 prefill is faster in PyTorch's SDPA"
    return None


def _emit_split_kv(emitter: Emitter, region: Region) -> fx.Node:
    return emitter.attend(region, torch.ops.lz_compile.split_kv_v2.default)


def _emit_tiled(emitter: Emitter, region: Region) -> fx.Node:
    return emitter.attend(region, torch.ops.lz_compile.tiled_v3.default)


def _split_kv_work(region: Region) -> Work:
    return attention_work(region, efficiency=0.8, launches=2)


def _tiled_work(region: Region) -> Work:
    a = region.attention
    assert a is not None
    return attention_work(
        region, efficiency=0.45, launches=2 if a.mask.empty_row in ("mean", "safe mean", "unmasked") else 1
    )


def _first_call(region: Region) -> float:
    """Two kernels to compile, at one to two seconds each."""
    return 4.0


SPLIT_KV = Kernel(
    name="triton.split_kv",
    kind="attention",
    version=VERSION,
    supports=_supports_split_kv,
    emit=_emit_split_kv,
    cuda_graphs="lengths stay on the device, the grid depends on shapes only",
    summary="split-KV decode: each key is read once per head group, and only keys that some query may see",
    work=_split_kv_work,
    first_call=_first_call,
    sinks=True,
)

TILED = Kernel(
    name="triton.tiled",
    kind="attention",
    version=VERSION,
    supports=_supports_tiled,
    emit=_emit_tiled,
    cuda_graphs="lengths stay on the device, the grid depends on shapes only",
    summary="tiled prefill: tiles that the mask hides are skipped, tiles that it shows run without it",
    work=_tiled_work,
    first_call=_first_call,
    sinks=True,
)
