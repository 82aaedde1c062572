"""The elementwise steps between the product of queries and keys and its softmax, read one at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.walk import CASTS, COPIES, RESHAPES, aten, scalar, target

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
WHERE = {aten.where.self, aten.where.ScalarOther}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor} | WHERE
_SUMS = {aten.add.Tensor, aten.sub.Tensor}


def leads_to_product(node: Any, depth: int = 12) -> bool:
    """Whether a value is scores: a product of two matrices behind such steps."""
    for _ in range(depth):
        kind = target(node)
        if kind in PRODUCTS:
            return True
        if kind in CASTS | COPIES | RESHAPES or kind in SCALES | FILLS or kind is aten.tanh.default:
            node = node.args[0] if kind not in WHERE else node.args[1]
        elif kind in _SUMS:
            return any(leads_to_product(a, depth - 1) for a in node.args[:2])
        else:
            return False
    return False


def scale_factor(node: fx.Node, aliases: Aliases) -> tuple[float, fx.Node] | None:
    """``(factor, x)`` of ``x * factor`` or ``x / divisor``; None when it is known only at run time, or zero divides."""
    divides = target(node) in (aten.div.Tensor, aten.div.Scalar)
    left, right = node.args[:2]
    other = scalar(right, aliases)
    if other is None and not divides:
        left, other = right, scalar(left, aliases)
    if other is None or (divides and not other) or not isinstance(left, fx.Node):
        return None
    return (1.0 / other if divides else other), left


@dataclass(frozen=True)
class Softcap:
    """``tanh(scores / cap) * cap``; ``inside`` are the nodes between."""

    cap: float
    scores: fx.Node
    inside: list[fx.Node]


def softcap_of(node: fx.Node, aliases: Aliases) -> Softcap | None:
    """The softcap that a product with a number ends, None when it is something else."""
    inner = node.args[0]
    if target(node) not in (aten.mul.Tensor, aten.mul.Scalar) or target(inner) is not aten.tanh.default:
        return None
    divided = inner.args[0]  # type: ignore[union-attr]
    cap = scalar(node.args[1], aliases)
    if cap is None or target(divided) not in SCALES:
        return None
    found = scale_factor(divided, aliases)  # type: ignore[arg-type]
    if found is None or not math.isclose(found[0] * cap, 1.0, rel_tol=1e-6):
        return None
    return Softcap(cap, found[1], [inner, divided])  # type: ignore[list-item]
