"""Our own Triton kernel of mixtures of experts as a candidate: decode, on CUDA."""

from __future__ import annotations

import torch
import torch.fx as fx

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.work import moe_work
from lz_compile.moe import Moe
from lz_compile.region import Kernel, Region, Verdict, Work

aten = torch.ops.aten

VERSION = "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements of one expert's weight are counted in 32 bits.
_MOST_ELEMENTS = 1 << 31


def _supports(region: Region) -> Verdict:
    op: Moe = region.op
    hidden, weights, indices, gate_up, down = (
        node.meta["val"] for node in (op.hidden, op.weights, op.indices, op.gate_up, op.down)
    )
    if hidden.device.type != "cuda":
        return "runs on CUDA"
    from lz_compile.lowering import moe_ops

    missing = moe_ops.available()
    if missing:
        return missing
    if hidden.dtype not in _DTYPES or gate_up.dtype not in _DTYPES:
        return f"does not take {hidden.dtype} and {gate_up.dtype}"
    biases = [node.meta["val"] for node in (op.gate_up_bias, op.down_bias) if node is not None]
    if any(value.dtype != gate_up.dtype for value in (down, *biases)):
        return "the experts' parameters have several dtypes"
    values = (hidden, weights, indices, gate_up, down, *biases)
    if not all(isinstance(number, int) for value in values for number in (*value.shape, *value.stride())):
        return "takes static shapes"
    if hidden.shape[0] > moe_ops.MAX_TOKENS:
        return f"is for up to {moe_ops.MAX_TOKENS} tokens"
    for value in (gate_up, down):
        if sum((n - 1) * s for n, s in zip(value.shape[1:], value.stride()[1:])) >= _MOST_ELEMENTS:
            return "an expert's weight spans 2^31 elements"
    return None


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    op: Moe = region.op
    tensors = (op.hidden, op.weights, op.indices, op.gate_up, op.down, op.gate_up_bias, op.down_bias)
    terms = emitter.call(
        region.output,
        torch.ops.lz_compile.moe_v1.default,
        *tensors,
        op.gate_up_layout == "out, in",
        op.down_layout == "out, in",
        op.activation,
        op.gated,
        op.interleaved,
        float(op.alpha),
        None if op.limit is None else float(op.limit),
        float(op.up_offset),
    )
    total = emitter.call(region.output, aten.sum.dim_IntList, terms, [1])
    wanted = region.output.meta["val"].dtype
    return total if wanted == torch.float32 else emitter.call(region.output, aten._to_copy.default, total, dtype=wanted)


def _work(region: Region) -> Work:
    return moe_work(region, efficiency=0.8, launches=3)


def _first_call(region: Region) -> float:
    """Two kernels to compile, at one to two seconds each."""
    return 4.0


MOE = Kernel(
    name="triton.moe",
    kind="moe",
    version=VERSION,
    supports=_supports,
    emit=_emit,
    cuda_graphs="the choice stays on the device, the grid depends on shapes only",
    summary="few tokens: each chosen expert's weights are read once, where they lie; nothing is sorted or gathered",
    work=_work,
    first_call=_first_call,
    devices=("cuda",),
)
