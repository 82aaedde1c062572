"""What the operators of :mod:`lz_compile.pointwise` compute: one plain function each, and what their kernels share.

A function is the meaning (bit for bit what eager gives for the spelling that was recognised), the shape of the result,
and the test oracle: in float64 it is the reference that kernels are judged by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile.lowering.activations import ACTIVATIONS
from lz_compile.lowering.moe import moe_meaning
from lz_compile.lowering.projections import projections_meaning
from lz_compile.lowering.sampling import sampling_meaning
from lz_compile.moe import Moe
from lz_compile.pointwise import Activation, Cast, Glu, RmsNorm, Rope
from lz_compile.projections import Projections
from lz_compile.region import Region, Work
from lz_compile.sampling import Sampling


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cast: Cast = "before weight", offset: float = 0.0
) -> torch.Tensor:
    """:class:`~lz_compile.pointwise.RmsNorm` of ``x`` ``[..., D]`` and ``weight`` ``[D]``; ``[..., D]`` like ``x``."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if cast == "before weight":
        y = y.to(x.dtype)
    else:
        weight = weight.to(compute)
    return (y * (weight + offset if offset else weight)).to(x.dtype)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """:class:`~lz_compile.pointwise.Glu`: ``activation(gate) * up``, all of one shape and dtype."""
    return ACTIVATIONS[activation](gate) * up


def glu_packed(packed: torch.Tensor, activation: Activation) -> torch.Tensor:
    """:func:`glu` of the halves of ``packed`` ``[..., 2 * F]``, gate first."""
    gate, up = packed.chunk(2, -1)
    return glu(gate, up, activation)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """:class:`~lz_compile.pointwise.Rope` of ``x`` ``[B, H, S, D]``; the tables broadcast to it."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def meaning(region: Region) -> Callable[..., torch.Tensor]:
    """What a region computes, as a function of the values of ``region.inputs`` in their order."""
    op = region.op
    if isinstance(op, RmsNorm):
        return lambda x, weight=None: rms_norm(x, weight, op.eps, op.cast, op.offset)
    if isinstance(op, Glu):
        if op.packed is not None:
            return lambda packed: glu_packed(packed, op.activation)
        return lambda gate, up: glu(gate, up, op.activation)
    if isinstance(op, Moe):
        return moe_meaning(region)
    if isinstance(op, Sampling):
        return sampling_meaning(region)
    if isinstance(op, Projections):
        return projections_meaning(region)
    assert isinstance(op, Rope)
    return rope


def pointwise_work(region: Region, efficiency: float) -> Work:
    """Every input read once and the output written once; ``efficiency`` is the share of the memory's bandwidth.

    It also stands for Inductor's own kernel, which moves the same bytes.  Symbolic sizes count as their hints.
    """
    values = [node.meta["val"] for node in (*region.inputs, region.output)]
    moved = sum(_elements(value) * value.dtype.itemsize for value in values)
    # Some ten operations an element, far below what a device does while it moves the bytes.
    return Work(10.0 * _elements(values[-1]), float(moved), efficiency)


def _elements(value: torch.Tensor) -> int:
    """Elements in memory: an expanded dimension counts once."""
    count = 1
    for size, stride in zip(value.shape, value.stride()):
        count *= 1 if statically_known_true(stride == 0) else _hint(size)
    return count


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 1


def has_rows(x: torch.Tensor) -> bool:
    """True when ``x`` ``[..., D]`` is known to be a matrix ``[rows, D]`` as it lies: last stride 1, one row stride."""
    if not statically_known_true(x.stride(-1) == 1):
        return False
    dims = [d for d in range(x.dim() - 1) if not statically_known_true(x.shape[d] == 1)]
    return all(statically_known_true(x.stride(a) == x.stride(b) * x.shape[b]) for a, b in itertools.pairwise(dims))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``[rows, D]`` with last stride 1; a copy only where :func:`has_rows` is not true."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
