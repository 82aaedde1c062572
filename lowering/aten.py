"""PyTorch's scaled_dot_product_attention with the arguments that a proof allows: no mask, ``is_causal``, grouped heads.

Which backend runs it (flash, cuDNN, efficient, math) is PyTorch's choice inside AOTAutograd.
"""

from __future__ import annotations

import math

import torch
import torch.fx as fx

from lz_compile.lowering.emit import Emitter
from lz_compile.region import Attention, Kernel, Region, Verdict

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


def _grouped(attention: Attention) -> bool:
    return attention.query_heads != attention.kv_heads


def takes_groups(device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Whether a fused backend of SDPA reads grouped heads itself.

    On CUDA flash does without a mask and, on Hopper, cuDNN with one, both in half precision; the memory-efficient
    backend does not, and for ``enable_gqa`` PyTorch would fall back to the unfused math.
    """
    if device.type != "cuda":
        return True
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    return not masked or torch.cuda.get_device_capability(device) >= (9, 0)


def _call(emitter: Emitter, region: Region, mask: fx.Node | None, is_causal: bool) -> fx.Node:
    a = region.attention
    assert a is not None
    query, key, value = emitter.inputs(region)
    tensor = query.meta["val"]
    extra = {}
    if _grouped(a):
        if takes_groups(tensor.device, tensor.dtype, mask is not None):
            extra["enable_gqa"] = True
        else:
            key, value = (_repeated(emitter, region, node) for node in (key, value))
    return emitter.call(region.output, _SDPA, query, key, value, mask, 0.0, is_causal, scale=float(a.scale), **extra)


def _repeated(emitter: Emitter, region: Region, node: fx.Node) -> fx.Node:
    """Keys or values with each head repeated for the query heads of its group."""
    a = region.attention
    assert a is not None
    group = a.query_heads // a.kv_heads
    wide = emitter.call(region.output, aten.unsqueeze.default, node, 2)
    wide = emitter.call(region.output, aten.expand.default, wide, [-1, -1, group, -1, -1])
    return emitter.call(region.output, aten.flatten.using_ints, wide, 1, 2)


def _supports_flags(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.softcap:
        return "has no softcap"
    if a.mask.is_causal and not a.scale > 0:
        return "the CPU's causal SDPA scales the -inf of its mask, too: NaN without a positive scale"
    if a.mask.is_trivial or a.mask.is_causal:
        return None
    if not a.mask.proved:
        return f"the mask is not proved: {a.mask.unproved}"
    return "takes no mask but causal from key 0"


def _emit_flags(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    return emitter.result(region, _call(emitter, region, None, a.mask.is_causal))


def _supports_mask(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.softcap:
        return "has no softcap"
    if a.mask_node is None:
        return "the mask is not a tensor of its own"
    mask = a.mask_node.meta["val"]
    if mask.dtype != torch.bool and mask.dtype != a.query.meta["val"].dtype:
        return f"the mask's dtype {mask.dtype} is not the query's"
    if region.pattern != "sdpa" and mask.is_cuda:
        return "on CUDA it gives zeros, not the softmax over the fill value, for a row without visible keys"
    return None


def _emit_mask(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None and a.mask_node is not None
    out = _call(emitter, region, a.mask_node, False)
    if region.pattern != "sdpa" and _may_be_infinite(a):
        out = _nan_where_empty(emitter, region, a.mask_node, out)
    return emitter.result(region, out)


def _may_be_infinite(a: Attention) -> bool:
    """Whether a row of the additive mask may be -inf throughout: the softmax then gives NaN where SDPA gives zeros."""
    return not a.mask.proved or a.mask.empty_row == "nan"


def _nan_where_empty(emitter: Emitter, region: Region, mask: fx.Node, out: fx.Node) -> fx.Node:
    def build() -> fx.Node:
        infinite = emitter.call(region.output, aten.eq.Scalar, mask, -math.inf)
        return emitter.call(region.output, aten.all.dim, infinite, -1, True)

    empty = emitter.shared(("empty rows", mask), build)
    return emitter.call(region.output, aten.masked_fill.Scalar, out, empty, math.nan)


SDPA = Kernel(
    name="aten.sdpa",
    kind="attention",
    version=torch.__version__,
    supports=_supports_flags,
    emit=_emit_flags,
    backward=True,
    cuda_graphs="reads no lengths",
    summary="the proof drops the mask; PyTorch's SDPA reads keys once per head group",
)

SDPA_MASKED = Kernel(
    name="aten.sdpa_masked",
    kind="attention",
    version=torch.__version__,
    supports=_supports_mask,
    emit=_emit_mask,
    backward=True,
    cuda_graphs="reads no lengths",
    summary="the mask is honoured as it is, by PyTorch's SDPA",
)
