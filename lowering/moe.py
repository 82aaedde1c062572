"""What :class:`lz_compile.moe.Moe` computes, as one plain function: meaning and test oracle.

In float64 it is the reference that kernels are judged by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lz_compile.lowering.activations import ACTIVATIONS
from lz_compile.moe import Moe
from lz_compile.region import Region


def moe(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    op: Moe,
) -> torch.Tensor:
    """:class:`~lz_compile.moe.Moe` of tensors, ``[T, H]`` contiguous in the dtype of ``hidden``.

    ``op`` gives the facts; its graph values are not read.  Tokens in float64 make everything run in it, of the weights
    one expert's at a time.  A loop over experts, each on the tokens that chose it, which asks the device for their
    number: it is for checking, not for speed.
    """
    tokens = hidden if hidden.dtype == torch.float64 else hidden.to(gate_up.dtype)
    pairs = tokens.new_zeros((*indices.shape, hidden.shape[-1]))
    for expert in range(op.experts):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        y = _linear(tokens[token], gate_up[expert], gate_up_bias, expert, op.gate_up_layout)
        pairs[token, slot] = _linear(activated(y, op), down[expert], down_bias, expert, op.down_layout)
    return (pairs * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def moe_output(hidden: torch.Tensor, *_: object) -> torch.Tensor:
    """Memory for the result of :func:`moe`, which a kernel's fake function gives: ``[T, H]``, contiguous."""
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def activated(y: torch.Tensor, op: Moe) -> torch.Tensor:
    """The activation of an expert: ``y`` ``[N, 2F]``, without a gate ``[N, F]``, gives ``[N, F]`` in its dtype."""
    if not op.gated:
        return ACTIVATIONS[op.activation](y)
    gate, up = (y[:, ::2], y[:, 1::2]) if op.interleaved else y.chunk(2, -1)
    if op.limit is not None:
        gate, up = gate.clamp(max=op.limit), up.clamp(-op.limit, op.limit)
    if op.alpha == 1.0:
        gate = ACTIVATIONS[op.activation](gate)
    else:
        gate = gate * torch.sigmoid(gate * op.alpha)
    return gate * (up + op.up_offset if op.up_offset else up)


def moe_meaning(region: Region) -> Callable[..., torch.Tensor]:
    """What a region of kind ``moe`` computes, as a function of the values of ``region.inputs`` in their order."""
    op: Moe = region.op

    def run(*values: torch.Tensor) -> torch.Tensor:
        hidden, weights, indices, gate_up, down, *biases = values
        gate_up_bias = biases.pop(0) if op.gate_up_bias is not None else None
        down_bias = biases.pop(0) if op.down_bias is not None else None
        return moe(hidden, weights, indices, gate_up, down, gate_up_bias, down_bias, op)

    return run


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert: int, layout: str) -> torch.Tensor:
    weight = weight.to(x.dtype)
    y = x @ (weight.mT if layout == "out, in" else weight)
    return y if bias is None else y + bias[expert].to(x.dtype)
