"""FlashInfer's attention kernels as candidates: prefill of fixed sizes, and decode whose lengths live on the device.

Enters: attention regions on CUDA in half precision.  Leaves: calls of two ops, each with the memory of contiguous
``[B, M, Hq, Dv]`` as its result.  Read in FlashInfer 0.6.6; the ops follow its calling conventions.

``flashinfer.prefill`` runs ``single_prefill`` (FlashAttention-3 on compute capability 9.0, FlashAttention-2 elsewhere)
once a batch row, each row writing its part of one output.  Keys and values are read through their strides (multiples
of 16 bytes, which TMA and 128-bit loads ask for), so nothing is copied, allocated or kept beside the output.  The
batched wrappers were not taken: the ragged one needs ``[B * N, H, D]`` views, which the ``[B, H, N, D]`` memory of a
cache does not give, keeps 8 MiB on the device and 8 MiB of pinned memory for each shape, and plans with synchronising
copies; the paged one gathers keys without TMA.  The Hopper kernel reads the key length from the wrong dimension when it
is told the ``HND`` layout, therefore it is given ``NHD`` views.

``flashinfer.decode`` runs XQA (``flashinfer.xqa``) for one query a row.  Of the decode entry points it is the one that
works under CUDA graphs on Hopper: lengths, page table and semaphores are device tensors and the grid depends on shapes
alone.  ``BatchDecodeWithPagedKVCacheWrapper`` plans on the host from the lengths; ``single_decode`` takes no length;
``cudnn_batch_decode`` caches its graph without regard to strides and scale and takes bfloat16 alone;
``trtllm_batch_decode`` ends in XQA on Hopper.  A static cache is a paged one: rows and pages lie at multiples of one
distance, so a constant page table addresses the cache where it lies.  Page table and semaphores are values of the
graph, computed once for all layers; the kernel leaves the semaphores as it found them, zero.

FlashInfer compiles a module for each combination of dtype, head sizes, group size and features on its first use
(:data:`~lz_compile.lowering.flashinfer_jit.JIT_SECONDS`) and keeps it on disk.  ``emit`` does that, so that it counts
as compile time and that a failure leaves the region to another kernel; :func:`flashinfer_needs_jit` says beforehand
whether it will.

The provider's norms and gated units are in :mod:`lz_compile.lowering.flashinfer_pointwise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.fit import ALIGNMENT, capability, layout_verdict, readable
from lz_compile.lowering.flashinfer_jit import JIT_SECONDS, kernel_version, on_device
from lz_compile.lowering.flashinfer_pointwise import GLU, RMS_NORM
from lz_compile.lowering.lengths import Prefix, accepted_prefix, emit_prefix, find_prefix
from lz_compile.lowering.semantic import attend_output
from lz_compile.lowering.work import attention_work
from lz_compile.region import Attention, Kernel, Provider, Region, Verdict, Work

aten = torch.ops.aten

_HEAD_SIZES = {"fa3": {(64, 64), (128, 128), (256, 256), (192, 128)}, "fa2": {(64, 64), (128, 128), (256, 256)}}
_XQA_CAPABILITIES = (9, 10, 12)
# Query heads that share a key head; they fill the 16 rows of one tensor-core tile.
_XQA_GROUP = 16
# Tokens a page.  XQA takes 128, too, but a warp reads 64 tokens at a time.
_PAGE_SIZES = (64, 32, 16)
# XQA keeps one partial result a block, at most one block an SM: below 1.4 MiB for groups of 16 heads of size 256.
_SCRATCH_BYTES = 8 << 20
# FlashInfer hides a score by setting it to -5e4 before the scale; from here on exp(-5e4 * scale) is nothing.
_LEAST_SCALE = 1e-3


def _backend(device: torch.device) -> str:
    return "fa3" if capability(device) == (9, 0) else "fa2"


# -- the ops

_library = torch.library.Library("lz_compile", "FRAGMENT")
# The kernels read memory through strides that were checked on fake tensors.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_library.define(
    "flashinfer_prefill_v1(Tensor query, Tensor key, Tensor value, float scale, float softcap, bool causal, "
    "int window_left) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "flashinfer_decode_v1(Tensor query, Tensor key, Tensor value, Tensor lengths, Tensor pages, Tensor semaphores, "
    "float scale, int page_size, int window_left) -> Tensor",
    tags=_TAGS,
)


def flashinfer_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float,
    causal: bool,
    window_left: int,
) -> torch.Tensor:
    """Attention over all keys, causal from the bottom right corner or not, one launch a batch row.

    Args:
        query: [B, Hq, M, Dk], float16 or bfloat16; last stride 1, the others and the address multiples of 16 bytes.
        key: [B, Hkv, N, Dk], value: [B, Hkv, N, Dv], likewise; ``Hq % Hkv == 0`` and, if causal, ``N >= M``.
        scale, softcap: as in :func:`lz_compile.lowering.semantic.attend`; the scale at least 1e-3 without softcap.
        causal: query q sees key k when ``k <= q + N - M``.
        window_left: and when ``k >= q + N - M - window_left``; -1 for no window.

    Returns:
        [B, Hq, M, Dv] over contiguous [B, M, Hq, Dv] memory.
    """
    from flashinfer.utils import MaskMode, TensorLayout

    out = attend_output(query, value)
    if not out.numel():
        return out
    backend = _backend(query.device)
    module = _prefill_module(backend, query.dtype, query.shape[-1], value.shape[-1], window_left >= 0, softcap > 0)
    # Without workspace FlashAttention-2 does not split the keys, which many queries do not need; -3 takes none.
    workspace = query if backend == "fa3" else query.new_empty(0)
    mode = (MaskMode.CAUSAL if causal else MaskMode.NON_CAUSAL).value
    rows = (x.transpose(1, 2) for x in (readable(query), readable(key), readable(value), out))
    for q, k, v, o in zip(*rows):
        module.run(
            *(q, k, v, workspace, o, None, mode, TensorLayout.NHD.value, window_left),
            *(None, None, softcap, scale, None, None, None, 1.0, 1e4),
        )
    return out


def flashinfer_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    pages: torch.Tensor,
    semaphores: torch.Tensor,
    scale: float,
    page_size: int,
    window_left: int,
) -> torch.Tensor:
    """One query a row over the first ``lengths[b]`` keys of a cache that is addressed as pages.

    Args:
        query: [B, Hq, 1, D], float16 or bfloat16, with the memory of contiguous [B, Hq, D].
        key, value: [B, Hkv, N, D] with equal strides, all multiples of D and the last one 1; N a multiple of
            ``page_size``, and the batch stride one of ``page_size`` times the stride of N.
        lengths: int32 [B], contiguous, each in [1, N]; without a key the result is undefined.
        pages: int32 [B, N / page_size], contiguous: where each page begins, in strides of a page.
        semaphores: int32 [B * Hkv], zero before and after.
        scale: positive.
        page_size: 16, 32, 64 or 128.
        window_left: the last ``window_left + 1`` of the keys are visible; -1 for no window.

    Returns:
        [B, Hq, 1, D] over contiguous [B, 1, Hq, D] memory.
    """
    from flashinfer.xqa import xqa

    out = attend_output(query, value)
    if not out.numel():
        return out
    # XQA launches on the current device.  It may not start before its predecessor ends: that one knows nothing of it.
    with on_device(query.device):
        xqa(
            query.transpose(1, 2).contiguous(),
            _as_pages(key, page_size),
            _as_pages(value, page_size),
            pages,
            lengths.view(torch.uint32).unsqueeze(1),
            out.transpose(1, 2),
            query.new_empty(_SCRATCH_BYTES, dtype=torch.uint8),
            semaphores.view(torch.uint32),
            num_kv_heads=key.shape[1],
            page_size=page_size,
            q_scale=scale * math.sqrt(query.shape[-1]),
            sliding_win_size=window_left + 1,
            kv_layout="NHD",
            enable_pdl=False,
        )
    return out


def _as_pages(cache: torch.Tensor, page_size: int) -> torch.Tensor:
    """[B, H, N, D] as overlapping pages [P, page_size, H, D] that begin at every ``page_size``-th token's distance."""
    batch, heads, keys, size = cache.shape
    row, head, token, _ = cache.stride()
    if cache.data_ptr() % ALIGNMENT:  # not where it lay when the graph was compiled; the page table keeps its strides
        cache = cache.new_empty_strided(cache.shape, cache.stride()).copy_(cache)
    last = (batch - 1) * row // (page_size * token) + keys // page_size
    return cache.as_strided((last, page_size, heads, size), (page_size * token, token, head, 1))


_library.impl("flashinfer_prefill_v1", flashinfer_prefill, "CompositeExplicitAutograd")
_library.impl("flashinfer_decode_v1", flashinfer_decode, "CompositeExplicitAutograd")


@torch.library.register_fake("lz_compile::flashinfer_prefill_v1")
@torch.library.register_fake("lz_compile::flashinfer_decode_v1")
def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return attend_output(query, value)


# -- compiled modules


def _prefill_name(
    backend: str, dtype: torch.dtype, key_size: int, value_size: int, window: bool, softcap: bool
) -> tuple[Any, ...]:
    """What names a prefill module: backend, dtypes of q, kv and o, head sizes, RoPE, window, softcap, fp16 sums."""
    return backend, dtype, dtype, dtype, key_size, value_size, 0, window, softcap, False


def _decode_name(dtype: torch.dtype, page_size: int, size: int, group: int, window: bool) -> tuple[Any, ...]:
    """What names a decode module: dtypes of q and kv, page size, head size, group size, window, dtype of o, queries."""
    return dtype, dtype, page_size, size, group, window, dtype, 1


def _prefill_module(*arguments: Any) -> Any:
    from flashinfer.prefill import get_single_prefill_module

    return get_single_prefill_module(*_prefill_name(*arguments))


# A decode module asks for its shared memory when it is loaded, on the device that is current then and on no other.
_device_of_module: dict[tuple[Any, ...], torch.device] = {}


def _decode_module(name: tuple[Any, ...], device: torch.device) -> None:
    """Compiles and loads a decode module, before a CUDA graph is captured: loading copies from the device."""
    from flashinfer.xqa import get_xqa_module

    with on_device(device):
        get_xqa_module(*name)
    _device_of_module.setdefault(name, device)


def _prefill_arguments(a: Attention, prefix: Prefix) -> tuple[Any, ...]:
    q, _, v = a.fake()
    return _backend(q.device), q.dtype, q.shape[-1], v.shape[-1], prefix.has_window, a.softcap > 0


def _decode_arguments(a: Attention, prefix: Prefix, paging: _Paging) -> tuple[Any, ...]:
    q, k, _ = a.fake()
    return q.dtype, paging.size, q.shape[-1], q.shape[1] // k.shape[1], prefix.has_window


def flashinfer_needs_jit(region: Region) -> bool:
    """Whether the kernel of this file that takes the region has yet to be compiled, which takes :data:`JIT_SECONDS`."""
    a = region.attention
    assert a is not None
    if _supports_prefill(region) is None:
        from flashinfer.jit.attention import gen_single_prefill_module

        spec = gen_single_prefill_module(*_prefill_name(*_prefill_arguments(a, accepted_prefix(region))))
    elif _supports_decode(region) is None:
        from flashinfer.jit.xqa import gen_xqa_module

        spec = gen_xqa_module(*_decode_name(*_decode_arguments(a, accepted_prefix(region), _pages_of(region))))
    else:
        return False
    return not spec.is_compiled


def _first_call(region: Region) -> float:
    return JIT_SECONDS if flashinfer_needs_jit(region) else 0.0


# -- what the kernels take


def _common(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    q, k, v = a.fake()
    device = capability(q.device)
    if device is None:
        return "runs on CUDA"
    if device < (8, 0):
        return "needs compute capability 8.0"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"does not take {q.dtype}"
    return layout_verdict(q, k, v)


def _known(condition: Any) -> bool:
    return bool(statically_known_true(condition))


def _supports_prefill(region: Region) -> Verdict:
    why_not = _common(region)
    if why_not:
        return why_not
    a = region.attention
    assert a is not None
    q, _, v = a.fake()
    if _known(a.queries == 1):
        return "is for two queries or more"
    sizes = (q.shape[-1], v.shape[-1])
    if not all(isinstance(size, int) for size in sizes):
        return "takes head sizes that are known when it is compiled"
    if sizes not in _HEAD_SIZES[_backend(q.device)]:
        return f"does not take head sizes {sizes[0]} and {sizes[1]}"
    if not a.softcap and not a.scale >= _LEAST_SCALE:
        return f"a scale below {_LEAST_SCALE} would let masked keys through"
    if not a.scale > 0:
        return "takes a positive scale"
    prefix = find_prefix(region)
    if isinstance(prefix, str):
        return prefix
    if prefix.has_lengths:
        return "the number of visible keys is known only when the graph runs"
    if prefix.may_be_empty:
        return "a query without visible keys would get a mean of values"
    if prefix.has_window and not prefix.causal:
        return "takes no window without a causal limit"
    return None


@dataclass(frozen=True)
class _Paging:
    """``size`` tokens a page, ``count`` pages a row; rows lie ``distance`` pages apart."""

    size: int
    count: int
    distance: int


def _paging(cache: torch.Tensor) -> _Paging | str:
    """How [B, H, N, D] is seen as pages that begin at multiples of one distance."""
    batch, heads, keys, size = cache.shape
    row, head, token, _ = cache.stride()
    if token % size or (heads > 1 and head % size):
        return "the cache's strides are no multiples of the head size"
    for page in _PAGE_SIZES:
        if keys % page == 0 and (batch == 1 or row % (page * token) == 0):
            return _Paging(page, keys // page, 0 if batch == 1 else row // (page * token))
    return "the cache does not divide into pages of 16 tokens"


def _window_left(prefix: Prefix) -> int:
    return -1 if prefix.window_left is None else prefix.window_left


def _supports_decode(region: Region) -> Verdict:
    why_not = _common(region)
    if why_not:
        return why_not
    a = region.attention
    assert a is not None
    q, k, v = a.fake()
    device = capability(q.device)
    assert device is not None
    if device[0] not in _XQA_CAPABILITIES:
        return "needs compute capability 9, 10 or 12"
    if not _known(a.queries == 1):
        return "is for one query"
    if any(not isinstance(size, int) for x in (q, k, v) for size in (*x.shape, *x.stride())):
        return "takes sizes that are known when it is compiled"
    if a.softcap:
        return "has no softcap"
    if not a.scale > 0:
        return "takes a positive scale"
    size = q.shape[-1]
    if v.shape[-1] != size:
        return "takes keys and values of one head size"
    if size % 16 or not 16 <= size <= 256:
        return f"head size {size} is no multiple of 16 up to 256"
    if q.shape[1] // k.shape[1] > _XQA_GROUP:
        return f"more than {_XQA_GROUP} query heads for one key/value head"
    if not q.transpose(1, 2).is_contiguous():
        return "the query's rows are not contiguous"
    if any(n > 1 and s != t for n, s, t in zip(k.shape, k.stride(), v.stride())):
        return "takes keys and values of equal strides"
    prefix = find_prefix(region)
    if isinstance(prefix, str):
        return prefix
    if prefix.window_right is not None:
        return "takes no window to the right"
    paging = _paging(k)
    if isinstance(paging, str):
        return paging
    if _device_of_module.get(_decode_name(*_decode_arguments(a, prefix, paging)), q.device) != q.device:
        return "this process has set the kernel up for another device"
    return None


# -- inserting the calls


def _pages_of(region: Region) -> _Paging:
    """The pages of a region that is supported."""
    assert region.attention is not None
    paging = _paging(region.attention.fake()[1])
    assert isinstance(paging, _Paging), paging
    return paging


def _emit_prefill(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    prefix = accepted_prefix(region)
    _prefill_module(*_prefill_arguments(a, prefix))
    inputs = emit_prefix(emitter, region, prefix)
    tensors = (inputs.query, inputs.key, inputs.value)
    numbers = (float(a.scale), float(a.softcap), prefix.causal, _window_left(prefix))
    op = torch.ops.lz_compile.flashinfer_prefill_v1.default
    return emitter.result(region, emitter.call(region.output, op, *tensors, *numbers))


def _emit_decode(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    prefix, paging = accepted_prefix(region), _pages_of(region)
    _decode_module(_decode_name(*_decode_arguments(a, prefix, paging)), a.query.meta["val"].device)
    lengths, empty = _lengths(emitter, region, prefix)
    tensors = (*emitter.inputs(region), lengths, _page_table(emitter, region, paging), _semaphores(emitter, region))
    numbers = (float(a.scale), paging.size, _window_left(prefix))
    out = emitter.call(region.output, torch.ops.lz_compile.flashinfer_decode_v1.default, *tensors, *numbers)
    if empty is not None:
        out = emitter.call(region.output, aten.masked_fill.Scalar, out, empty, 0.0)
    return emitter.result(region, out)


def _page_table(emitter: Emitter, region: Region, paging: _Paging) -> fx.Node:
    a = region.attention
    assert a is not None
    device = a.query.meta["val"].device

    def build() -> fx.Node:
        def count(n: int) -> fx.Node:
            return emitter.call(region.output, aten.arange.default, n, dtype=torch.int32, device=device)

        rows = emitter.call(region.output, aten.mul.Tensor, count(a.batch), paging.distance)
        rows = emitter.call(region.output, aten.unsqueeze.default, rows, 1)
        return emitter.call(region.output, aten.add.Tensor, rows, count(paging.count))

    return emitter.shared(("flashinfer pages", a.batch, paging, device), build)


def _semaphores(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    number, device = a.batch * a.kv_heads, a.query.meta["val"].device
    return emitter.shared(
        ("flashinfer semaphores", number, device),
        lambda: emitter.call(region.output, aten.full.default, [number], 0, dtype=torch.int32, device=device),
    )


def _lengths(emitter: Emitter, region: Region, prefix: Prefix) -> tuple[fx.Node, fx.Node | None]:
    """Visible keys a row, int32 [B] in [1, N], and, where there may be none, bool [B, 1, 1, 1]: there are none."""
    a = region.attention
    assert a is not None
    device = a.query.meta["val"].device

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emitter.call(region.output, target, *args, **kwargs)

    if not prefix.has_lengths:
        keys = a.keys if prefix.keys is None else prefix.keys
        key = ("flashinfer keys", keys, a.batch, device)
        build = lambda: call(aten.full.default, [a.batch], keys, dtype=torch.int32, device=device)  # noqa: E731
        return emitter.shared(key, build), None
    lengths = emit_prefix(emitter, region, prefix).lengths
    assert lengths is not None
    if not prefix.may_be_empty:
        return lengths, None
    some = emitter.shared(("flashinfer lengths", lengths), lambda: call(aten.clamp.default, lengths, 1))

    def build_empty() -> fx.Node:
        return call(aten.reshape.default, call(aten.lt.Scalar, lengths, 1), [a.batch, 1, 1, 1])

    return some, emitter.shared(("flashinfer empty rows", lengths), build_empty)


def _prefill_work(region: Region) -> Work:
    a = region.attention
    assert a is not None
    launches = a.batch if isinstance(a.batch, int) else 1
    return attention_work(region, 0.6, launches)


def _decode_work(region: Region) -> Work:
    return attention_work(region, 0.8)


PREFILL = Kernel(
    name="flashinfer.prefill",
    kind="attention",
    version=kernel_version("1"),
    supports=_supports_prefill,
    emit=_emit_prefill,
    cuda_graphs="reads no lengths; nothing but the output is allocated",
    summary="FlashInfer's prefill (FlashAttention-3 on Hopper), keys read where they lie, one launch a batch row",
    work=_prefill_work,
    first_call=_first_call,
)

DECODE = Kernel(
    name="flashinfer.decode",
    kind="attention",
    version=kernel_version("1"),
    supports=_supports_decode,
    emit=_emit_decode,
    cuda_graphs="lengths, page table and semaphores are device tensors, the grid depends on shapes only",
    summary="FlashInfer's XQA decode: the cache is read as pages, up to each row's length",
    work=_decode_work,
    first_call=_first_call,
)

PROVIDER = Provider(
    name="flashinfer",
    kernels=(PREFILL, DECODE, RMS_NORM, GLU),
    distributions=("flashinfer-python",),
    probe="lz_compile.lowering.flashinfer:probe",
)


def probe() -> None:
    """Imports FlashInfer, looks for its compiler, and runs the kernel of its smallest module, ``packbits``.

    That module is compiled by the first probe on a machine (some 20 s: one short kernel) and loaded from disk by later
    ones; it tells whether nvcc, ninja, the FFI and the driver go together.  Attention modules take longer and are
    compiled when a region asks for one.

    Raises:
        RuntimeError: no usable GPU or compiler, a wrong result; ImportError and others: whatever FlashInfer raises.
    """
    import shutil

    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    from flashinfer.jit import env
    from flashinfer.jit.cpp_ext import get_cuda_path
    from flashinfer.quantization import packbits

    device = torch.cuda.get_device_capability()
    if device < (8, 0):
        raise RuntimeError(f"needs compute capability 8.0, this is {device[0]}.{device[1]}")
    if not env.has_flashinfer_jit_cache():
        if shutil.which("ninja") is None:
            raise RuntimeError("FlashInfer compiles its kernels with ninja, which is not on the PATH")
        if shutil.which(f"{get_cuda_path()}/bin/nvcc") is None:
            raise RuntimeError(f"FlashInfer compiles its kernels with nvcc, which is not in {get_cuda_path()}/bin")
    bits = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool, device="cuda")
    packed = packbits(bits).tolist()
    if packed != [0b10110011, 0b10000000]:
        raise RuntimeError(f"packbits gives {packed}")
