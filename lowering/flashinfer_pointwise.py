"""FlashInfer's RMSNorm and gated linear units as candidates; read in FlashInfer 0.6.6.

Enters: ``rms_norm`` and ``glu`` regions on CUDA in half precision.  Leaves: calls of two ops with contiguous results,
the only memory that is allocated.

**Roundings.**  Both kernels compute in float32 and round once, at the end.  Llama's norm rounds before the weight, too,
and every gated unit rounds the activation before the product: there the kernels give fewer roundings than the model
has, so other bits, closer to the exact result.  The exception is the tanh approximation of GELU, which the library
takes from an approximate ``tanh`` (relative error ``2^-11``): for gates far below zero, where ``1 + tanh`` cancels, the
small result is off by up to ``|gate * up| / 4096``.

**RMSNorm.**  ``rmsnorm`` takes rows at one stride (a block a row) or, for heads, ``[N, H, D]`` at two strides (a warp a
row); ``gemma_rmsnorm``, which adds one to the weight in float32, takes rows only.  Rows that one warp reads at once go
to the kernel for heads.  The library reads the weight as if it had the dtype of ``x`` without looking, loads vectors of
``gcd(16 bytes, D)`` without a check of addresses, and counts elements in 32 bits: the first two are checked here, at
the third larger tensors are cut.

**Gated units.**  The packed projection is taken as contiguous, whatever its strides say.  Gate and up apart are not
taken: the kernels would need a copy of both.  Elements past the last multiple of 8192 are computed a second time, one
by one, where there are more than 8192 (14336, the width of Llama 3 8B, is such a case).  The library makes the tensor's
device the current one and leaves it so, which is undone here.

Both launch without programmatic dependent launch, since their neighbours know nothing of it.  The norms are one module,
each activation has one of its own; ``emit`` compiles and loads it, as in :mod:`lz_compile.lowering.flashinfer`.

Not offered: rotary embeddings (these kernels take positions and one float32 cache of both tables, or compute the
angles, where a graph has tables in the model's dtype), and sampling, which no region means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.fit import ALIGNMENT, capability
from lz_compile.lowering.flashinfer_jit import JIT_SECONDS, kernel_version, on_device
from lz_compile.lowering.pointwise import as_rows, has_rows, pointwise_work
from lz_compile.pointwise import Glu, RmsNorm
from lz_compile.region import Kernel, Region, Verdict, Work

aten = torch.ops.aten

_REVISION = "1"
# A row that a warp reads with one vector a thread.
_WARP_ROW = 32 * 8
# The library's norms count elements in 32 bits.
_MOST_ELEMENTS = 1 << 32
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


# -- the ops

_library = torch.library.Library("lz_compile", "FRAGMENT")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_library.define("flashinfer_rms_norm_v1(Tensor x, Tensor weight, float eps, bool gemma) -> Tensor", tags=_TAGS)
_library.define("flashinfer_glu_v1(Tensor packed, str activation) -> Tensor", tags=_TAGS)


def flashinfer_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, rounded once.

    Args:
        x: [..., D], float16 or bfloat16; copied unless its rows lie as :func:`_fits` says.
        weight: [D], of the dtype of ``x``.
        gemma: the factor is ``1 + weight``, added in float32.

    Returns:
        Contiguous, shape and dtype of ``x``.
    """
    from flashinfer.norm import gemma_rmsnorm, rmsnorm

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    x, weight = _aligned(x), _aligned(weight)
    run = gemma_rmsnorm if gemma else rmsnorm
    for source, target in _cut(*_blocks(x, out, gemma)):
        run(source, weight, eps, out=target, enable_pdl=False)
    return out


def _blocks(x: torch.Tensor, out: torch.Tensor, gemma: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as [rows, D] for the kernel of a block a row, or as [N, H, D] for that of a warp a row."""
    size = x.shape[-1]
    if gemma or size > _WARP_ROW:
        return as_rows(x), out.view(-1, size)
    if has_rows(x):
        return as_rows(x).unsqueeze(1), out.view(-1, 1, size)
    return x.reshape(-1, *x.shape[-2:]), out.view(-1, *x.shape[-2:])


def _cut(x: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of both in which every element is less than :data:`_MOST_ELEMENTS` away from the first."""
    reaches = [(n - 1) * max(s, t) for n, s, t in zip(x.shape[:-1], x.stride(), out.stride())]
    if sum(reaches) + x.shape[-1] <= _MOST_ELEMENTS:
        yield x, out
        return
    longest = reaches.index(max(reaches))
    for parts in zip(x.chunk(2, longest), out.chunk(2, longest)):
        yield from _cut(*parts)


def flashinfer_glu(packed: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` of ``packed`` [..., 2 * F], gate first, rounded once.

    ``packed`` is float16 or bfloat16, contiguous (else it is copied), and F a multiple of 8; ``activation`` is
    ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.  The result is contiguous [..., F].
    """
    from flashinfer import activation as library

    out = _glu_output(packed)
    if not out.numel():
        return out
    packed = _aligned(packed.contiguous())
    with on_device(packed.device):
        getattr(library, f"{activation}_and_mul")(packed, out=out, enable_pdl=False)
    return out


def _glu_output(packed: torch.Tensor) -> torch.Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


def _vector(x: torch.Tensor) -> int:
    """Elements that the library loads at once from a row of ``x``."""
    return math.gcd(ALIGNMENT // x.dtype.itemsize, x.shape[-1])


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself; a copy only where it does not lie as was promised when the graph was compiled."""
    unit = _vector(x)
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size > 1]
    if x.stride(-1) == 1 and x.data_ptr() % (unit * x.itemsize) == 0 and not any(s % unit for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


_library.impl("flashinfer_rms_norm_v1", flashinfer_rms_norm, "CompositeExplicitAutograd")
_library.impl("flashinfer_glu_v1", flashinfer_glu, "CompositeExplicitAutograd")


@torch.library.register_fake("lz_compile::flashinfer_rms_norm_v1")
def _fake_rms_norm(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("lz_compile::flashinfer_glu_v1")
def _fake_glu(packed: torch.Tensor, activation: str) -> torch.Tensor:
    return _glu_output(packed)


# -- compiled modules


def _first_call(region: Region) -> float:
    if isinstance(region.op, RmsNorm):
        from flashinfer.jit.norm import gen_norm_module

        spec = gen_norm_module()
    else:
        from flashinfer.jit.activation import gen_act_and_mul_module

        spec = gen_act_and_mul_module(region.op.activation)
    return 0.0 if spec.is_compiled else JIT_SECONDS


# -- what the kernels take


def _known(condition: Any) -> bool:
    return bool(statically_known_true(condition))


def _common(x: torch.Tensor) -> Verdict:
    device = capability(x.device)
    if device is None:
        return "runs on CUDA"
    if device < (8, 0):
        return "needs compute capability 8.0"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"does not take {x.dtype}"
    if not isinstance(x.shape[-1], int):
        return "takes rows whose size is known when it is compiled"
    return None


def _alignment_verdict(x: torch.Tensor) -> Verdict:
    unit = _vector(x)
    if not _known(x.stride(-1) == 1):
        return "the last dimension is strided"
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if not _known(size == 1) and not _known(stride % unit == 0):
            return f"a stride is not a multiple of {unit * x.itemsize} bytes"
    if not _known(x.storage_offset() % unit == 0):
        return f"the first element is not aligned to {unit * x.itemsize} bytes"
    return None


def _swapped(x: torch.Tensor) -> bool:
    """Whether ``x`` is a transposed view, as heads [B, H, S, D] of a projection are; the result is to be one, too."""
    return x.dim() == 4 and _known(x.stride(1) < x.stride(2))


def _fits(x: torch.Tensor, gemma: bool) -> bool:
    """Whether :func:`_blocks` of ``x`` is a view: rows at one stride, or narrow ones at two."""
    if has_rows(x):
        return True
    return not gemma and x.shape[-1] <= _WARP_ROW and x.dim() > 2 and has_rows(x.select(-2, 0))


def _supports_rms_norm(region: Region) -> Verdict:
    op = region.op
    assert isinstance(op, RmsNorm)
    x = op.x.meta["val"]
    why_not = _common(x)
    if why_not:
        return why_not
    if op.weight is None:
        return "takes no norm without a weight"
    weight = op.weight.meta["val"]
    if weight.dtype != x.dtype:
        return f"takes no weight of {weight.dtype} beside {x.dtype}"
    if op.offset not in (0.0, 1.0):
        return f"does not add {op.offset} to the weight"
    why_not = _alignment_verdict(x) or _alignment_verdict(weight)
    if why_not:
        return why_not
    x = x.transpose(1, 2) if _swapped(x) else x
    return None if _fits(x, op.offset == 1.0) else "rows do not lie at one stride"


def _is_contiguous(x: torch.Tensor) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride())):
        if _known(size == 1):
            continue
        if not _known(stride == expected):
            return False
        expected = expected * size
    return True


def _supports_glu(region: Region) -> Verdict:
    op = region.op
    assert isinstance(op, Glu)
    value = op.gate.meta["val"] if op.packed is None else op.packed.meta["val"]
    why_not = _common(value)
    if why_not:
        return why_not
    if op.activation not in _ACTIVATIONS:
        return f"has no kernel for {op.activation}"
    if op.packed is None:
        return "takes gate and up as halves of one tensor only"
    size = value.shape[-1] // 2
    unit = ALIGNMENT // value.dtype.itemsize
    if size % unit:
        return f"a half of {size} is no multiple of {unit}"
    return _alignment_verdict(value) or (None if _is_contiguous(value) else "the packed tensor is not contiguous")


# -- inserting the calls


def _emit_rms_norm(emitter: Emitter, region: Region) -> fx.Node:
    from flashinfer.norm import get_norm_module

    op, anchor = region.op, region.output
    assert isinstance(op, RmsNorm)
    get_norm_module()
    swapped = _swapped(op.x.meta["val"])
    x = emitter.call(anchor, aten.transpose.int, op.x, 1, 2) if swapped else op.x
    kernel = torch.ops.lz_compile.flashinfer_rms_norm_v1.default
    out = emitter.call(anchor, kernel, x, op.weight, float(op.eps), op.offset == 1.0)
    return emitter.call(anchor, aten.transpose.int, out, 1, 2) if swapped else out


def _emit_glu(emitter: Emitter, region: Region) -> fx.Node:
    from flashinfer.activation import get_act_and_mul_module

    op = region.op
    assert isinstance(op, Glu)
    get_act_and_mul_module(op.activation)
    return emitter.call(region.output, torch.ops.lz_compile.flashinfer_glu_v1.default, op.packed, op.activation)


def _work(region: Region) -> Work:
    return pointwise_work(region, efficiency=0.7)


RMS_NORM = Kernel(
    name="flashinfer.rms_norm",
    kind="rms_norm",
    version=kernel_version(_REVISION),
    supports=_supports_rms_norm,
    emit=_emit_rms_norm,
    cuda_graphs="reads tensors on the device only, the grid depends on shapes",
    summary="FlashInfer's RMSNorm: rounded once, heads of a packed projection read where they lie",
    work=_work,
    first_call=_first_call,
)

GLU = Kernel(
    name="flashinfer.glu",
    kind="glu",
    version=kernel_version(_REVISION),
    supports=_supports_glu,
    emit=_emit_glu,
    cuda_graphs="reads tensors on the device only, the grid depends on shapes",
    summary="FlashInfer's gated units of a packed projection: SiLU, GELU and its tanh approximation",
    work=_work,
    first_call=_first_call,
)
