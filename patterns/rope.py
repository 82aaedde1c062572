"""Rotary position embedding of one tensor, spelled ``x * cos + rotate_half(x) * sin``.

Enters: a normalised graph.  Leaves: one :class:`~lz_compile.region.Region` a rotated tensor with a
:class:`~lz_compile.pointwise.Rope`, in graph order; a site that may not be replaced carries the reason.

A site is anchored at the sum.  ``rotate_half`` is ``cat([-second half, first half])`` of the very value that the cosine
multiplies.  Rotations of a part of the head dimension are seen by what their result is joined with, and declined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.columns import half
from lz_compile.patterns.replaceable import Declined, only_user, own
from lz_compile.patterns.walk import CASTS, arguments, aten, fake, same, same_shape, target
from lz_compile.pointwise import Rope
from lz_compile.region import Region


def find_ropes(graph: fx.Graph, aliases: Aliases, module_of: Callable[[fx.Node], str]) -> list[Region]:
    """All rotations of a graph.  ``module_of(node)`` gives the module path of a node."""
    regions: list[Region] = []
    for node in graph.nodes:
        if target(node) is not aten.add.Tensor or arguments(node)["alpha"] != 1:
            continue
        read = _read(*node.args) or _read(*reversed(node.args))
        if read is None:
            continue
        op, core, views = read
        region = Region("rope", "rotate_half", _rounded(node, op.x), module_of(node), op=op)
        region.inputs = (op.x, op.cos, op.sin)
        try:
            _require_whole_heads(region.output, op)
            own(region, list(dict.fromkeys([*core, node, region.output])), views, aliases)
        except Declined as reason:
            region.declined = str(reason)
        regions.append(region)
    return regions


def _read(straight: Any, turned: Any) -> tuple[Rope, list[fx.Node], list[fx.Node]] | None:
    """The operator of ``straight + turned`` with the nodes that compute it and the views of ``x``; else None."""
    if target(straight) is not aten.mul.Tensor or target(turned) is not aten.mul.Tensor:
        return None
    for rotated, sin in (turned.args, reversed(turned.args)):
        found = _rotated(rotated)
        if found is None or not isinstance(sin, fx.Node):
            continue
        x, inner, views = found
        for same_x, cos in (straight.args, reversed(straight.args)):
            if same_x is x and isinstance(cos, fx.Node) and fake(cos) is not None and fake(sin) is not None:
                return Rope(x, cos, sin), [*inner, straight, turned], views
    return None


def _rotated(node: Any) -> tuple[fx.Node, list[fx.Node], list[fx.Node]] | None:
    """``(x, nodes, views of x)`` of ``cat([-second half of x, first half of x])`` over the last dimension."""
    if target(node) is not aten.cat.default:
        return None
    known = arguments(node)
    value = fake(node)
    if value is None or len(known["tensors"]) != 2 or known["dim"] not in (-1, value.dim() - 1):
        return None
    negated, first = known["tensors"]
    if target(negated) is not aten.neg.default:
        return None
    left, right = half(negated.args[0]), half(first)
    if left is None or right is None or left[0] is not right[0] or (left[1], right[1]) != (1, 0):
        return None
    return left[0], [negated, node], list(dict.fromkeys([*left[2], *right[2]]))


def _rounded(total: fx.Node, x: fx.Node) -> fx.Node:
    """The sum, or its cast back to the dtype of ``x``."""
    dtype = fake(x).dtype  # type: ignore[union-attr]
    user = only_user(total)
    if fake(total).dtype == dtype or user is None or target(user) not in CASTS:  # type: ignore[union-attr]
        return total
    value = fake(user)
    return user if value is not None and value.dtype == dtype and value.device == fake(x).device else total  # type: ignore[union-attr]


def _require_whole_heads(output: fx.Node, op: Rope) -> None:
    x, cos, sin, out = fake(op.x), fake(op.cos), fake(op.sin), fake(output)
    assert x is not None and cos is not None and sin is not None and out is not None
    if x.dim() != 4:
        raise Declined("is not [B, H, S, D]")
    if not same_shape(cos.shape, sin.shape) or cos.dtype != sin.dtype:
        raise Declined("cosines and sines differ in shape or dtype")
    if not cos.dim() or not same(cos.shape[-1], x.shape[-1]) or not same_shape(out.shape, x.shape):
        raise Declined("the tables do not broadcast to the rotated value")
    if not x.is_floating_point() or out.dtype != x.dtype:
        raise Declined(f"takes {x.dtype} and gives {out.dtype}")
    if not x.device == cos.device == sin.device:
        raise Declined("the tables are on another device")
    for user in output.users:
        if target(user) is aten.cat.default and _adds_columns(user, output):
            raise Declined("rotates a part of the head dimension only")


def _adds_columns(cat: fx.Node, part: fx.Node) -> bool:
    whole, value = fake(cat), fake(part)
    assert whole is not None and value is not None
    return whole.dim() == value.dim() and not same(whole.shape[-1], value.shape[-1])
