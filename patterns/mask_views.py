"""Operations that only move elements: views, copies and casts, as maps of indices.

Enters: such a node and the index of one of its elements.  Leaves: the index of the same element in the node's first
argument, or None when it is not known (see :data:`INDEX_MAPS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.fx as fx

from lz_compile.patterns.symbolic import Linear, Position
from lz_compile.patterns.walk import aten

if TYPE_CHECKING:
    from lz_compile.patterns.mask_evaluation import Evaluator

IndexMap = Callable[["Evaluator", fx.Node, Position], "Position | None"]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def base_shape(node: fx.Node) -> Sequence[Any]:
    base = node.args[0]
    assert isinstance(base, fx.Node)
    return base.meta["val"].shape


def same_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    return index


def unsqueeze_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    dim = argument(node, 1, "dim") % len(index)
    return index[:dim] + index[dim + 1 :]


def expand_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    return index[len(index) - len(base_shape(node)) :]


def repeat_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    shape, out = base_shape(node), node.meta["val"].shape
    base: list[Linear] = []
    for size, out_size, i in zip(shape, out[len(out) - len(shape) :], expand_index(e, node, index) or ()):
        if is_one(size) or str(size) == str(out_size):
            base.append(i)
        elif isinstance(size, int) and size:
            base.append(e.space.remainder(i, size))
        else:
            return None
    return tuple(base)


def permute_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    base = list(index)
    for i, dim in zip(index, argument(node, 1, "dims")):
        base[dim % len(index)] = i
    return tuple(base)


def transpose_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    if len(index) < 2:
        return index
    first, second = (argument(node, p, name, p - 1) % len(index) for p, name in ((1, "dim0"), (2, "dim1")))
    base = list(index)
    base[first], base[second] = base[second], base[first]
    return tuple(base)


def from_start(e: Evaluator, start: Any, size: Any) -> Linear | None:
    """A possibly negative start as an index, None when its sign is not known."""
    found = e.sizes.linear(e.space, start)
    if found is None:
        return None
    low, high = e.space.bounds(found)
    if high is not None and high < 0:
        found = e.space.add(found, e.extent(size))
        low, high = e.space.bounds(found)
        if high is not None and high < 0:
            return e.space.zero_number
    return found if low is not None and low >= 0 else None


def slice_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    dim = argument(node, 1, "dim", 0) % len(index)
    # A start beyond the end needs no care: the slice is then empty.
    start = from_start(e, argument(node, 2, "start") or 0, base_shape(node)[dim])
    step = argument(node, 4, "step", 1)
    if start is None or not isinstance(step, int):
        return None
    return (*index[:dim], e.space.add(start, index[dim], step), *index[dim + 1 :])


def narrow_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    dim = argument(node, 1, "dim") % len(index)
    start = from_start(e, argument(node, 2, "start"), base_shape(node)[dim])
    return None if start is None else (*index[:dim], e.space.add(start, index[dim]), *index[dim + 1 :])


def select_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    dim = argument(node, 1, "dim") % (len(index) + 1)
    chosen = from_start(e, argument(node, 2, "index"), base_shape(node)[dim])
    return None if chosen is None else (*index[:dim], chosen, *index[dim:])


def reshape_index(e: Evaluator, node: fx.Node, index: Position) -> Position | None:
    """Regroup an index: dimensions of size 1 come and go, others may merge or split at constant sizes."""
    base: list[Linear] = [e.space.zero_number] * len(base_shape(node))
    inner = [(dim, size) for dim, size in enumerate(base_shape(node)) if not is_one(size)]
    outer = [(i, size) for i, size in zip(index, node.meta["val"].shape) if not is_one(size)]
    while inner and outer:
        if str(inner[-1][1]) == str(outer[-1][1]):
            base[inner.pop()[0]] = outer.pop()[0]
            continue
        group = _equal_products(e, inner, outer)
        if group is None:
            return None
        dims, flat = group
        for dim, size in dims:
            base[dim] = e.space.remainder(flat, size)
            flat = e.space.floor_div(flat, size)
    return None if inner or outer else tuple(base)


def _equal_products(
    e: Evaluator, inner: list[tuple[int, Any]], outer: list[tuple[Linear, Any]]
) -> tuple[list[tuple[int, int]], Linear] | None:
    """Take the last dimensions off both sides until they hold equally many elements.

    Returns the inner dimensions with their sizes, last one first, and the index into them as if they were one.
    """
    dims = [inner.pop()]
    total = dims[0][1]
    flat, stride = outer.pop()
    while str(total) != str(stride):
        if not isinstance(total, int) or not isinstance(stride, int) or not total or not stride:
            return None  # comparing SymInts would add guards
        if not (inner if total < stride else outer):
            return None
        if total < stride:
            dims.append(inner.pop())
            total = total * dims[-1][1]
        else:
            i, size = outer.pop()
            flat = e.space.add(flat, i, stride)
            stride = stride * size
    return dims, flat


INDEX_MAPS: dict[Any, IndexMap] = {
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.device,
            aten.to.dtype_layout,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
            aten.detach.default,
            aten.detach_.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.lift_fresh.default,
            aten.lift_fresh_copy.default,
            aten.positive.default,
        ),
        same_index,
    ),
    aten.unsqueeze.default: unsqueeze_index,
    aten.expand.default: expand_index,
    aten.expand_as.default: expand_index,
    aten.broadcast_to.default: expand_index,
    aten.repeat.default: repeat_index,
    aten.tile.default: repeat_index,
    aten.permute.default: permute_index,
    aten.transpose.int: transpose_index,
    aten.swapaxes.default: transpose_index,
    aten.swapdims.default: transpose_index,
    aten.t.default: transpose_index,
    aten.slice.Tensor: slice_index,
    aten.narrow.default: narrow_index,
    aten.select.int: select_index,
    **dict.fromkeys(
        (
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.view.default,
            aten.view_as.default,
            aten.reshape.default,
            aten.reshape_as.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
        ),
        reshape_index,
    ),
}
