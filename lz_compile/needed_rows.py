"""Rows that nobody reads are not computed.

Enters: a normalised graph.  Leaves: the same graph in which a slice such as ``hidden_states[:, -1:]`` stands as early
as it can.  A language model's prefill asks for the logits of the last token only; then the last layer's MLP, its output
projection and its queries are needed for that token alone, while its keys and values are needed for all.

Backwards, every value collects which rows its readers need; where all need the same few, and the operation treats rows
apart, the operation runs on slices of its inputs.  The arithmetic of each row stays the same.  Values that are written
in place, that gradients flow through, or whose memory the caller gets stay whole, and so do sizes that are symbolic.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases, storage_key
from lz_compile.gradients import needs_gradient

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
    """How an operation runs on some rows: which arguments (by position or name) are sliced, which get another value."""

    sliced: dict[int | str, Rows] = field(default_factory=dict)
    changed: dict[int | str, Any] = field(default_factory=dict)


def trim(graph: fx.Graph, aliases: Aliases, make_emitter: Callable[[fx.Graph, Aliases], Any]) -> str:
    """Moves slices up; returns what was done, for the report (empty when there was nothing to do)."""
    recipes = _collect(graph, aliases)
    heavy = sum(node.target in _HEAVY for node in recipes)
    if not heavy:
        return ""
    emitter = make_emitter(graph, aliases)
    small: dict[fx.Node, tuple[Rows, fx.Node]] = {}
    for node, (rows, recipe) in recipes.items():
        small[node] = rows, _on_rows(emitter, node, recipe, small)
    for node in list(graph.nodes):
        root = _root(node)
        if root is None or node in recipes:
            continue
        origin = node.args[0]
        if isinstance(origin, fx.Node) and origin in small and small[origin][0] == root:
            value = small[origin][1]
            if node.target is aten.select.int:
                value = emitter.call(node, aten.select.int, value, root.dim, 0)
            node.replace_all_uses_with(value)
    graph.eliminate_dead_code()
    rows = next(iter(recipes.values()))[0]
    others = len(recipes) - heavy
    return f"{heavy} matrix products and {others} other operations run on {rows.count} of {rows.size} rows"


def _on_rows(emitter: Any, node: fx.Node, recipe: Recipe, small: dict[fx.Node, tuple[Rows, fx.Node]]) -> fx.Node:
    def cut(value: Any, rows: Rows) -> Any:
        if isinstance(value, (list, tuple)):
            return [cut(item, rows) for item in value]
        if value in small and small[value][0] == rows:
            return small[value][1]
        key = ("rows", value, rows)
        last = rows.first + rows.count
        return emitter.shared(key, lambda: emitter.call(node, aten.slice.Tensor, value, rows.dim, rows.first, last))

    if node.target is operator.getitem and node.args[0] not in small:  # other parts of the split are read whole
        rows = recipe.sliced[0]
        return emitter.call(node.next, aten.slice.Tensor, node, rows.dim, rows.first, rows.first + rows.count)
    args, kwargs = list(node.args), dict(node.kwargs)
    for where, rows in recipe.sliced.items():
        if isinstance(where, int):
            args[where] = cut(args[where], rows)
        else:
            kwargs[where] = cut(kwargs[where], rows)
    for where, value in recipe.changed.items():
        if isinstance(where, int):
            args[where] = value
        else:
            kwargs[where] = value
    return emitter.call(node, node.target, *args, **kwargs)


# -- which rows are needed


def _collect(graph: fx.Graph, aliases: Aliases) -> dict[fx.Node, tuple[Rows, Recipe]]:
    """The operations that can run on fewer rows, in graph order."""
    kept = _memory_of_outputs(graph)
    demands: dict[fx.Node, Rows | None] = {}
    found: dict[fx.Node, tuple[Rows, Recipe]] = {}

    def ask(node: fx.Node, rows: Rows | None) -> None:
        demands[node] = rows if node not in demands or demands[node] == rows else None

    for node in reversed(graph.nodes):
        wanted = demands.get(node)
        free = _free(node, aliases, kept)
        recipe = _recipe(node, wanted) if wanted is not None and free else None
        root = _root(node) if recipe is None and free else None
        if root is not None:
            assert isinstance(node.args[0], fx.Node)
            ask(node.args[0], root)
            continue
        if recipe is None:
            for argument in node.all_input_nodes:
                ask(argument, None)
            continue
        assert wanted is not None
        found[node] = wanted, recipe
        for where, value in (*enumerate(node.args), *node.kwargs.items()):
            for argument in _nodes(value):
                ask(argument, recipe.sliced.get(where))
    return dict(reversed(found.items()))


# Their rules look at the dropout.
_RANDOM_BY_ARGUMENT = {aten.dropout.default, aten.scaled_dot_product_attention.default}


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _memory_of_outputs(graph: fx.Graph) -> set[int]:
    values = [node.meta.get("val") for node in graph.output_node().all_input_nodes]
    return {storage_key(value) for value in values if isinstance(value, torch.Tensor)}


def _free(node: fx.Node, aliases: Aliases, kept: set[int]) -> bool:
    """Whether nobody could tell that the operation ran on fewer rows."""
    if node.op != "call_function" or needs_gradient(node):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if random and node.target not in _RANDOM_BY_ARGUMENT:
        return False
    value = node.meta.get("val")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return False
    return not aliases.is_written(node) and not any(storage_key(tensor) in kept for tensor in tensors)


def _root(node: fx.Node) -> Rows | None:
    """The rows that ``x[..., a:b]`` or ``x[..., i]`` reads of ``x``, when they are few and known."""
    if node.op != "call_function" or node.target not in (aten.slice.Tensor, aten.select.int):
        return None
    source = _fake(node.args[0])
    if source is None:
        return None
    dim = int(node.args[1] if len(node.args) > 1 else 0) % source.dim()  # type: ignore[arg-type]
    size = source.shape[dim]
    if not isinstance(size, int) or size < 2:
        return None
    if node.target is aten.select.int:
        first = node.args[2]
        if not isinstance(first, int):
            return None
        return Rows(dim, first % size, 1, size)
    first, last, step = (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])
    if step != 1 or not all(bound is None or isinstance(bound, int) for bound in (first, last)):
        return None
    start, stop, _ = slice(first, last).indices(size)
    return Rows(dim, start, stop - start, size) if 0 < stop - start <= _LARGEST_SHARE * size else None


def _fake(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


# -- operations that treat rows apart

_PASS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.dropout.default,
}


def _recipe(node: fx.Node, rows: Rows) -> Recipe | None:
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, rows)
    if node.target in _PASS:
        if node.target is aten.dropout.default and node.args[2]:
            return None
        return Recipe({0: rows})
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(node, rows)
    return None


def _pointwise(node: fx.Node, rows: Rows) -> Recipe | None:
    out = _fake(node)
    assert out is not None
    sliced: dict[int | str, Rows] = {}
    for where, argument in (*enumerate(node.args), *node.kwargs.items()):
        if not isinstance(argument, fx.Node):
            if _nodes(argument):
                return None
            continue
        own = _broadcast(argument, rows, out.dim())
        if own == "no":
            return None
        if isinstance(own, Rows):
            sliced[where] = own
    return Recipe(sliced)


def _broadcast(argument: fx.Node, rows: Rows, dims: int) -> Rows | str:
    """The rows of an argument that is broadcast to ``dims`` dimensions; "all" when it has one for all, or "no"."""
    value = _fake(argument)
    if value is None:
        return "all" if not isinstance(argument.meta.get("val"), (list, tuple)) else "no"
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
    out = _fake(node)
    assert out is not None
    return Recipe({0: rows}) if rows.dim < out.dim() - 1 else None


def _product(node: fx.Node, rows: Rows) -> Recipe | None:
    """Rows of ``a @ b`` are rows of ``a``."""
    out, first = _fake(node), _fake(node.args[0])
    assert out is not None
    if first is None or first.dim() < 2 or rows.dim != out.dim() - 2:
        return None
    return Recipe({0: rows.along(first.dim() - 2)})


def _added_product(node: fx.Node, rows: Rows) -> Recipe | None:
    """``addmm`` and ``baddbmm``: rows of ``input + a @ b``."""
    out, first = _fake(node), node.args[0]
    assert out is not None
    if rows.dim != out.dim() - 2 or not isinstance(first, fx.Node):
        return None
    own = _broadcast(first, rows, out.dim())
    if own == "no":
        return None
    sliced: dict[int | str, Rows] = {1: rows}
    if isinstance(own, Rows):
        sliced[0] = own
    return Recipe(sliced)


def _softmax(node: fx.Node, rows: Rows) -> Recipe | None:
    out = _fake(node)
    assert out is not None
    return None if int(node.args[1]) % out.dim() == rows.dim else Recipe({0: rows})  # type: ignore[arg-type]


def _reduction(node: fx.Node, rows: Rows) -> Recipe | None:
    source = _fake(node.args[0])
    given = node.args[1] if len(node.args) > 1 else None
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if source is None or not given:
        return None
    reduced = {int(dim) % source.dim() for dim in (given if isinstance(given, (list, tuple)) else [given])}  # type: ignore[arg-type]
    kept = [dim for dim in range(source.dim()) if keeps or dim not in reduced]
    dim = kept[rows.dim]
    return None if dim in reduced else Recipe({0: rows.along(dim)})


def _norm(node: fx.Node, rows: Rows) -> Recipe | None:
    source = _fake(node.args[0])
    shape = node.args[1]
    if source is None or not isinstance(shape, (list, tuple)):
        return None
    return Recipe({0: rows}) if rows.dim < source.dim() - len(shape) else None


def _view(node: fx.Node, rows: Rows) -> Recipe | None:
    """A view that keeps the dimension of rows: everything in front of it has the same number of elements."""
    source, out = _fake(node.args[0]), _fake(node)
    sizes = node.args[1]
    if source is None or out is None or not isinstance(sizes, (list, tuple)):
        return None
    if not all(isinstance(size, int) for size in (*source.shape, *out.shape)):
        return None
    before = math.prod(out.shape[: rows.dim])
    for dim in range(source.dim()):
        if math.prod(source.shape[:dim]) == before and source.shape[dim] == rows.size:
            changed = list(out.shape)
            changed[rows.dim] = rows.count
            return Recipe({0: rows.along(dim)}, {1: changed})
    return None


def _expand(node: fx.Node, rows: Rows) -> Recipe | None:
    out = _fake(node)
    source = node.args[0]
    if out is None or not isinstance(source, fx.Node) or not all(isinstance(size, int) for size in out.shape):
        return None
    own = _broadcast(source, rows, out.dim())
    if own == "no":
        return None
    changed = list(out.shape)
    changed[rows.dim] = rows.count
    return Recipe({0: own} if isinstance(own, Rows) else {}, {1: changed})


def _transpose(node: fx.Node, rows: Rows) -> Recipe | None:
    out = _fake(node)
    assert out is not None
    a, b = (int(dim) % out.dim() for dim in node.args[1:3])  # type: ignore[arg-type]
    return Recipe({0: rows.along({a: b, b: a}.get(rows.dim, rows.dim))})


def _permute(node: fx.Node, rows: Rows) -> Recipe | None:
    order = node.args[1]
    assert isinstance(order, (list, tuple))
    return Recipe({0: rows.along(int(order[rows.dim]) % len(order))})  # type: ignore[arg-type]


def _unsqueeze(node: fx.Node, rows: Rows) -> Recipe | None:
    out = _fake(node)
    assert out is not None
    dim = int(node.args[1]) % out.dim()  # type: ignore[arg-type]
    return None if dim == rows.dim else Recipe({0: rows.along(rows.dim - (rows.dim > dim))})


def _other_slice(node: fx.Node, rows: Rows) -> Recipe | None:
    """A slice of another dimension."""
    source = _fake(node.args[0])
    assert source is not None
    dim = int(node.args[1] if len(node.args) > 1 else 0) % source.dim()  # type: ignore[arg-type]
    if node.target is aten.select.int:
        return Recipe({0: rows.along(rows.dim + (rows.dim >= dim))})
    return None if dim == rows.dim else Recipe({0: rows})


def _parts(node: fx.Node, rows: Rows) -> Recipe | None:
    """``split`` and ``chunk`` of another dimension, which give lists."""
    source = _fake(node.args[0])
    assert source is not None
    dim = int(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % source.dim()  # type: ignore[arg-type]
    return None if dim == rows.dim else Recipe({0: rows})


def _cat(node: fx.Node, rows: Rows) -> Recipe | None:
    out = _fake(node)
    assert out is not None
    dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % out.dim()  # type: ignore[arg-type]
    alike = all(isinstance(value, fx.Node) and _fake(value) is not None for value in node.args[0])  # type: ignore[union-attr]
    alike = alike and all(value.meta["val"].dim() == out.dim() for value in node.args[0])  # type: ignore[union-attr]
    return None if dim == rows.dim or not alike else Recipe({0: rows})


def _sdpa(node: fx.Node, rows: Rows) -> Recipe | None:
    """Queries are rows.  A causal flag counts from the first query: only the last of as many queries as keys is free of
    it, and sees all."""
    query, key = _fake(node.args[0]), _fake(node.args[1])
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    where: dict[str, int | str] = {name: name for name in node.kwargs}
    where |= {names[position]: position for position in range(len(node.args))}

    def value(name: str) -> Any:
        place = where.get(name)
        return None if place is None else node.args[place] if isinstance(place, int) else node.kwargs[place]

    if query is None or key is None or rows.dim != query.dim() - 2 or value("dropout_p"):
        return None
    sliced: dict[int | str, Rows] = {0: rows}
    mask = value("attn_mask")
    if value("is_causal"):
        last = rows.count == 1 and rows.first == rows.size - 1
        if mask is not None or not last or not isinstance(key.shape[-2], int) or key.shape[-2] != rows.size:
            return None
        return Recipe(sliced, {where["is_causal"]: False})
    if mask is not None:
        if query.is_cuda:  # the backend that PyTorch picks for fewer queries may treat a row without keys otherwise
            return None
        own = _broadcast(mask, rows, query.dim())
        if own == "no":
            return None
        if isinstance(own, Rows):
            sliced[where["attn_mask"]] = own
    return Recipe(sliced)


def _item(node: fx.Node, rows: Rows) -> Recipe | None:
    source = node.args[0]
    split = isinstance(source, fx.Node) and source.target in (
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
    )
    return Recipe({0: rows}) if split else None


_RULES: dict[Any, Callable[[fx.Node, Rows], Recipe | None]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
    aten.mm.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.mean.dim: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.amax.default: _reduction,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.expand.default: _expand,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _other_slice,
    aten.select.int: _other_slice,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.chunk.default: _parts,
    aten.cat.default: _cat,
    aten.scaled_dot_product_attention.default: _sdpa,
    operator.getitem: _item,
}
_HEAVY = {
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
}
