"""The elementwise steps between the product of queries and keys and its softmax, read one at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.einsum import is_matrix_of_scores
from lz_compile.patterns.walk import CASTS, COPIES, RESHAPES, arguments, aten, fake, same, same_shape, scalar, target

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
WHERE = {aten.where.self, aten.where.ScalarOther}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor} | WHERE
FLOORS = {aten.max.other, aten.maximum.default, aten.clamp.default, aten.clamp_min.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}


def is_product(node: Any) -> bool:
    """Whether a call multiplies two matrices into what may be scores."""
    return target(node) in PRODUCTS and is_matrix_of_scores(node)


def leads_to_product(node: Any, depth: int = 12) -> bool:
    """Whether a value is scores: a product of two matrices behind such steps."""
    for _ in range(depth):
        kind = target(node)
        if is_product(node):
            return True
        if kind in CASTS | COPIES | RESHAPES or kind in SCALES | FILLS | FLOORS or kind is aten.tanh.default:
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


def adds_nothing(node: fx.Node, aliases: Aliases) -> bool:
    """True for ``scores + 0``, which models write whose relative positions are switched off."""
    if target(node) not in _SUMS or not isinstance(node.args[0], fx.Node):
        return False
    return scalar(node.args[1], aliases) == 0 and _keeps_shape_and_dtype(node, node.args[0])


def floor_of(node: fx.Node, aliases: Aliases) -> tuple[float, fx.Node] | None:
    """``(least, x)`` of ``max(x, least)`` where ``least`` is the least finite number of the dtype, or -inf: finite
    scores keep their values.  None for any other bound."""
    if target(node) not in FLOORS or not isinstance(node.args[0], fx.Node):
        return None
    known = arguments(node)
    bound = known["min"] if "min" in known else known["other"]
    value, least = fake(node), scalar(bound, aliases)
    if known.get("max") is not None or value is None or least is None or not value.dtype.is_floating_point:
        return None
    if least > torch.finfo(value.dtype).min or not _keeps_shape_and_dtype(node, node.args[0]):
        return None
    return least, node.args[0]


def row_factor(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(factor, scores)`` of scores times (or over) a tensor that is the same for all keys of a query, such as a
    learned temperature of each head; None when it may differ from key to key, or broadcasts the scores."""
    scores, factor = node.args[:2]
    if leads_to_product(factor) and not leads_to_product(scores):
        if target(node) is not aten.mul.Tensor:
            return None
        scores, factor = factor, scores
    value, product = fake(factor), fake(scores)
    if value is None or product is None or not isinstance(scores, fx.Node) or not isinstance(factor, fx.Node):
        return None
    one_per_query = not value.dim() or same(value.shape[-1], 1)
    if value.dtype != product.dtype or not one_per_query or not _keeps_shape_and_dtype(node, scores):
        return None
    return factor, scores


def _keeps_shape_and_dtype(node: fx.Node, before: fx.Node) -> bool:
    value, old = fake(node), fake(before)
    return value is not None and old is not None and value.dtype == old.dtype and same_shape(value.shape, old.shape)


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
