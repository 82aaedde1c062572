"""What regions beside attention mean: the operators of ``Region.op``, over graph values.

Each has one function in :mod:`lz_compile.lowering.pointwise` that says what it computes, roundings included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.fx as fx

Cast = Literal["before weight", "after weight"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class RmsNorm:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` over the last dimension (Zhang and Sennrich, 2019).

    ``x`` is ``[..., D]``, ``weight`` ``[D]`` or None; the result has the shape and dtype of ``x``.  Everything runs in
    float32 (float64 for float64), and ``cast`` says where it becomes the dtype of ``x``: ``"before weight"`` as in
    Llama, or ``"after weight"`` as in OLMo 2 and Gemma.  Without a weight, or where ``x`` has the precision of the
    computation already, both are the same.  ``offset`` is 0.0, or 1.0 as in Gemma, where it is added in float32.
    """

    x: fx.Node
    weight: fx.Node | None
    eps: float
    cast: Cast
    offset: float = 0.0


@dataclass(frozen=True)
class Glu:
    """``activation(gate) * up``, a gated linear unit without its projections (Shazeer, 2020).

    ``gate``, ``up`` and the result have one shape ``[..., F]`` and dtype; the activation is rounded to it before the
    product.  ``"gelu"`` is the exact one (erf), ``"gelu_tanh"`` its approximation.

    ``packed`` is ``[..., 2 * F]`` where the graph reads gate (first) and up (second) as the halves of one projection;
    it is then the only input of the region, and ``gate`` and ``up`` are views of it.
    """

    gate: fx.Node
    up: fx.Node
    activation: Activation
    packed: fx.Node | None = None


@dataclass(frozen=True)
class Rope:
    """``x * cos + rotate_half(x) * sin``, rotary position embedding of the whole head dimension (Su et al., 2021).

    ``x`` is ``[B, H, S, D]``; ``cos`` and ``sin`` have one shape, which broadcasts to it and ends in ``D``.
    ``rotate_half`` of halves ``a, b`` is ``-b, a``.  The dtype of products and sum is the wider one of ``x`` and the
    tables, each rounded; the result has the dtype of ``x``.  That both halves of a table are equal is not known.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    style: Literal["half"] = "half"
