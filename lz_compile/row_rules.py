"""Which rows of its arguments an operation needs for some rows of its result.

Enters: a node of a pre-dispatch ATen graph with fake values in ``meta["val"]``, and :class:`Rows` of its result.
Leaves: a :class:`Recipe` that computes exactly those rows, each as the whole operation would; or None where the
operation mixes rows, where a size is symbolic, or where nothing is known about it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten

# A slice of more than this share of the rows saves too little.
_LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class Rows:
    """Rows [first, first + count) of the ``size`` rows of dimension ``dim``."""

    dim: int
    first: int
    count: int
    size: int

    def along(self, dim: int) -> Rows:
        return Rows(dim, self.first, self.count, self.size)


@dataclass(frozen=True)
class Recipe:
    """How an operation runs on some rows: which arguments (by position or name) are sliced, which get another value.

    With a ``shape`` the operation becomes a reshape of its first argument to that shape.
    """

    sliced: dict[int | str, Rows] = field(default_factory=dict)
    changed: dict[int | str, Any] = field(default_factory=dict)
    shape: list[int] | None = None


def recipe(node: fx.Node, rows: Rows) -> Recipe | None:
    """How a call gives just these rows of its result, None when it cannot."""
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, rows) if _is_positional(node) else None
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(node, rows)
    return None


def read_rows(node: fx.Node) -> Rows | None:
    """The rows that ``x[..., a:b]`` or ``x[..., i]`` reads of ``x``, when they are few and known."""
    if node.target not in (aten.slice.Tensor, aten.select.int) or not _is_positional(node):
        return None
    source = fake(node.args[0])
    if source is None:
        return None
    dim = int(_argument(node, 1)) % source.dim()
    size = source.shape[dim]
    if not isinstance(size, int) or size < 2:
        return None
    if node.target is aten.select.int:
        index = node.args[2]
        return Rows(dim, index % size, 1, size) if isinstance(index, int) else None
    first, last, step = (_argument(node, position) for position in (2, 3, 4))
    if not _is_number(step) or step != 1 or not all(b is None or _is_number(b) for b in (first, last)):
        return None
    start, stop, _ = slice(first, last).indices(size)
    return Rows(dim, start, stop - start, size) if 0 < stop - start <= _LARGEST_SHARE * size else None


def fake(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, None when it is not a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes of one argument, those in lists included."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int)


def _is_positional(node: fx.Node) -> bool:
    """Whether arguments stand where tracing puts them: in front, but for those that have to be named."""
    if not node.args:
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is None or not any(a.name in node.kwargs and not a.kwarg_only for a in schema.arguments)


def _argument(node: fx.Node, position: int) -> Any:
    """A positional argument, or its default."""
    if position < len(node.args):
        return node.args[position]
    argument = node.target._schema.arguments[position]  # type: ignore[union-attr]
    return argument.default_value if argument.has_default_value() else None


def _sizes(value: torch.Tensor | None) -> list[int] | None:
    """The shape, when all of it is known."""
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return list(value.shape)


def _dims(node: fx.Node) -> int:
    """The number of dimensions of the result."""
    out = fake(node)
    assert out is not None
    return out.dim()


# -- operations that compute every element, or every row, apart


def _first(node: fx.Node, rows: Rows) -> Recipe | None:
    """Casts and copies."""
    return Recipe({0: rows})


def _like(node: fx.Node, rows: Rows) -> Recipe | None:
    """Casts to the dtype and device of another tensor, which stays whole unless it has the same rows."""
    source, other = fake(node.args[0]), fake(node.args[1])
    if source is None or other is None:
        return None
    sliced: dict[int | str, Rows] = {0: rows}
    if rows.dim < other.dim() and _is_number(other.shape[rows.dim]) and other.shape[rows.dim] == rows.size:
        sliced[1] = rows
    return Recipe(sliced)


def _dropout(node: fx.Node, rows: Rows) -> Recipe | None:
    return None if _argument(node, 2) else Recipe({0: rows})


def _pointwise(node: fx.Node, rows: Rows) -> Recipe | None:
    dims = _dims(node)
    sliced: dict[int | str, Rows] = {}
    for where, argument in (*enumerate(node.args), *node.kwargs.items()):
        if not isinstance(argument, fx.Node):
            if nodes_in(argument):
                return None
            continue
        own = _broadcast(argument, rows, dims)
        if own == "no":
            return None
        if isinstance(own, Rows):
            sliced[where] = own
    return Recipe(sliced)


def _broadcast(argument: fx.Node, rows: Rows, dims: int) -> Rows | str:
    """The rows of an argument that is broadcast to ``dims`` dimensions; "all" when it has one for all, or "no"."""
    value = argument.meta.get("val")
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return "all"
    if not isinstance(value, torch.Tensor):
        return "no"
    dim = rows.dim - (dims - value.dim())
    if dim < 0:
        return "all"
    size = value.shape[dim]
    if not isinstance(size, int):
        return "no"
    if size == 1:
        return "all"
    return rows.along(dim) if size == rows.size else "no"


def _linear(node: fx.Node, rows: Rows) -> Recipe | None:
    """``x @ weight.T + bias``, where a weight that is a vector leaves no dimension of features."""
    source = fake(node.args[0])
    return Recipe({0: rows}) if source is not None and rows.dim < source.dim() - 1 else None


def _product(node: fx.Node, rows: Rows) -> Recipe | None:
    """Rows of ``a @ b`` are rows of ``a``, whether or not ``a`` or ``b`` is broadcast over batches."""
    first, second = fake(node.args[0]), fake(node.args[1])
    if first is None or second is None or first.dim() < 2 or second.dim() < 2 or rows.dim != _dims(node) - 2:
        return None
    return Recipe({0: rows.along(first.dim() - 2)})


def _added_product(node: fx.Node, rows: Rows) -> Recipe | None:
    """``addmm`` and ``baddbmm``: rows of ``input + a @ b``."""
    first, dims = node.args[0], _dims(node)
    if rows.dim != dims - 2 or not isinstance(first, fx.Node):
        return None
    own = _broadcast(first, rows, dims)
    if own == "no":
        return None
    sliced: dict[int | str, Rows] = {1: rows}
    if isinstance(own, Rows):
        sliced[0] = own
    return Recipe(sliced)


def _softmax(node: fx.Node, rows: Rows) -> Recipe | None:
    return None if int(_argument(node, 1)) % _dims(node) == rows.dim else Recipe({0: rows})


def _reduction(node: fx.Node, rows: Rows) -> Recipe | None:
    source, given, keeps = fake(node.args[0]), _argument(node, 1), _argument(node, 2)
    if source is None or given is None or given in ([], ()):  # which stand for all dimensions
        return None
    reduced = {int(dim) % source.dim() for dim in (given if isinstance(given, (list, tuple)) else [given])}
    kept = [dim for dim in range(source.dim()) if keeps or dim not in reduced]
    dim = kept[rows.dim]
    return None if dim in reduced else Recipe({0: rows.along(dim)})


def _norm(node: fx.Node, rows: Rows) -> Recipe | None:
    shape = node.args[1]
    assert isinstance(shape, (list, tuple))
    return Recipe({0: rows}) if rows.dim < _dims(node) - len(shape) else None


def _sdpa(node: fx.Node, rows: Rows) -> Recipe | None:
    """Queries are rows.  A causal flag counts from the first query: only the last of as many queries as keys is free of
    it, and sees all."""
    query, key, dims = fake(node.args[0]), fake(node.args[1]), _dims(node)
    mask, dropout, causal = (_argument(node, position) for position in (3, 4, 5))
    if query is None or key is None or dropout or rows.dim != dims - 2 or query.shape[-2] != rows.size:
        return None
    sliced: dict[int | str, Rows] = {0: rows.along(query.dim() - 2)}
    if causal:
        last = rows.count == 1 and rows.first == rows.size - 1
        if mask is not None or not last or not _is_number(key.shape[-2]) or key.shape[-2] != rows.size:
            return None
        return Recipe(sliced, {5: False})
    if mask is not None:
        # The backend that PyTorch picks for fewer queries may treat a row without keys otherwise.
        if query.device.type != "cpu" or not isinstance(mask, fx.Node):
            return None
        own = _broadcast(mask, rows, dims)
        if own == "no":
            return None
        if isinstance(own, Rows):
            sliced[3] = own
    return Recipe(sliced)


# -- views


def _view(node: fx.Node, rows: Rows) -> Recipe | None:
    """Anything that keeps the elements in order, and the dimension of rows: what is in front of it has the same number
    of elements before and after."""
    source, out = _sizes(fake(node.args[0])), _sizes(fake(node))
    if source is None or out is None:
        return None
    before = math.prod(out[: rows.dim])
    for dim in range(len(source)):
        if math.prod(source[:dim]) == before and source[dim] == rows.size:
            out[rows.dim] = rows.count
            return Recipe({0: rows.along(dim)}, shape=out)
    return None


def _expand(node: fx.Node, rows: Rows) -> Recipe | None:
    source, sizes = node.args[0], _sizes(fake(node))
    if sizes is None or not isinstance(source, fx.Node):
        return None
    own = _broadcast(source, rows, len(sizes))
    if own == "no":
        return None
    sizes[rows.dim] = rows.count
    return Recipe({0: own} if isinstance(own, Rows) else {}, {1: sizes})


def _transpose(node: fx.Node, rows: Rows) -> Recipe | None:
    a, b = (int(dim) % _dims(node) for dim in node.args[1:3])  # type: ignore[arg-type]
    return Recipe({0: rows.along({a: b, b: a}.get(rows.dim, rows.dim))})


def _permute(node: fx.Node, rows: Rows) -> Recipe | None:
    order = node.args[1]
    assert isinstance(order, (list, tuple))
    return Recipe({0: rows.along(int(order[rows.dim]) % len(order))})  # type: ignore[arg-type]


def _unsqueeze(node: fx.Node, rows: Rows) -> Recipe | None:
    """``unsqueeze`` and ``stack``, which make a dimension."""
    dim = int(_argument(node, 1)) % _dims(node)
    return None if dim == rows.dim else Recipe({0: rows.along(rows.dim - (rows.dim > dim))})


def _slice(node: fx.Node, rows: Rows) -> Recipe | None:
    """A slice of another dimension, or of all rows."""
    dim = int(_argument(node, 1)) % _dims(node)
    if dim != rows.dim:
        return Recipe({0: rows})
    source, bounds = fake(node.args[0]), [_argument(node, position) for position in (2, 3, 4)]
    if source is None or source.shape[dim] != rows.size or not all(b is None or _is_number(b) for b in bounds):
        return None
    return Recipe({0: rows}) if slice(*bounds).indices(rows.size) == (0, rows.size, 1) else None


def _select(node: fx.Node, rows: Rows) -> Recipe | None:
    dim = int(node.args[1]) % (_dims(node) + 1)  # type: ignore[arg-type]
    return Recipe({0: rows.along(rows.dim + (rows.dim >= dim))})


def _cat(node: fx.Node, rows: Rows) -> Recipe | None:
    """``cat`` along another dimension.  It skips empty tensors of shape ``[0]``, which have no such rows."""
    parts, dims = node.args[0], _dims(node)
    assert isinstance(parts, (list, tuple))
    values = [fake(part) for part in parts]
    alike = all(value is not None and value.dim() == dims for value in values)
    return Recipe({0: rows}) if alike and int(_argument(node, 1)) % dims != rows.dim else None


def _parts(node: fx.Node, rows: Rows) -> Recipe | None:
    """``split`` and ``chunk`` of another dimension, which give lists."""
    source = fake(node.args[0])
    return None if source is None or int(_argument(node, 2)) % source.dim() == rows.dim else Recipe({0: rows})


SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


def _item(node: fx.Node, rows: Rows) -> Recipe | None:
    source = node.args[0]
    return Recipe({0: rows}) if isinstance(source, fx.Node) and source.target in SPLITS else None


HEAVY = {
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
}

_RULES: dict[Any, Callable[[fx.Node, Rows], Recipe | None]] = {
    aten.to.dtype: _first,
    aten.to.device: _first,
    aten.to.dtype_layout: _first,
    aten._to_copy.default: _first,
    aten.contiguous.default: _first,
    aten.clone.default: _first,
    aten.detach.default: _first,
    aten.alias.default: _first,
    aten.to.other: _like,
    aten.type_as.default: _like,
    aten.dropout.default: _dropout,
    aten.masked_fill.Tensor: _pointwise,
    aten.linear.default: _linear,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
    aten.mm.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.log_softmax.int: _softmax,
    aten.mean.dim: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.amax.default: _reduction,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.scaled_dot_product_attention.default: _sdpa,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.squeeze.dim: _view,
    aten.expand.default: _expand,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.stack.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.chunk.default: _parts,
    operator.getitem: _item,
}
