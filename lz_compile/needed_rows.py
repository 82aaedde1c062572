"""Rows that nobody reads are not computed.

Enters: a normalised graph.  Leaves: the same graph in which a slice such as ``hidden_states[:, -1:]`` stands as early
as it can.  A language model's prefill asks for the logits of the last token only; then the last layer's MLP, its output
projection and its queries are needed for that token alone, while its keys and values are needed for all.

Backwards, every value collects which rows its readers need; where all need the same few, and the operation treats rows
apart (:mod:`lz_compile.row_rules`), the operation runs on slices of its inputs.  The arithmetic of each row stays the
same.  Values that are written in place, that gradients flow through, or whose memory the caller gets stay whole, and so
do sizes that are symbolic.

Forwards, the graph is rebuilt in its own order.  A few rows may lie in memory otherwise than the slice of all of them:
fake values are kept right for the readers, and what was a copy does not become a view where a write could tell.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases, storage_key, written_arguments
from lz_compile.gradients import needs_gradient
from lz_compile.row_rules import HEAVY, Recipe, Rows, fake, nodes_in, read_rows, recipe

aten = torch.ops.aten

# Their rules look at the dropout.
_RANDOM_BY_ARGUMENT = {aten.dropout.default, aten.scaled_dot_product_attention.default}

# What they give depends on where in memory their argument lies, not only on its elements.
_READS_MEMORY = {aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default}

# A view that a new layout does not allow; the readers of a copy cannot tell.
_RESHAPES = {aten.view.default, aten._unsafe_view.default}


def trim(graph: fx.Graph, aliases: Aliases, make_emitter: Callable[[fx.Graph, Aliases], Any]) -> str:
    """Moves slices up; returns what was done, for the report (empty when there was nothing to do)."""
    recipes = _collect(graph, aliases)
    heavy = [rows for node, (rows, _) in recipes.items() if node.target in HEAVY]
    if not heavy:
        return ""
    _Rebuild(graph, make_emitter(graph, aliases), recipes).run()
    shares = dict.fromkeys(f"{rows.count} of {rows.size}" for rows in heavy)
    others = len(recipes) - len(heavy)
    return f"{len(heavy)} matrix products and {others} other operations run on {' or '.join(shares)} rows"


def relay(
    graph: fx.Graph, aliases: Aliases, make_emitter: Callable[[fx.Graph, Aliases], Any], moved: set[fx.Node]
) -> None:
    """Brings the readers of ``moved`` up to date: values that took the place of others and lie in memory otherwise.

    Raises:
        RuntimeError: a reader writes to such a value in place.
    """
    rebuild = _Rebuild(graph, make_emitter(graph, aliases), {})
    rebuild.moved |= moved
    rebuild.run()


# -- which rows are needed


def _collect(graph: fx.Graph, aliases: Aliases) -> dict[fx.Node, tuple[Rows, Recipe]]:
    """The operations that can run on fewer rows, in graph order."""
    if any(node.target in _READS_MEMORY for node in graph.nodes):
        return {}
    roots = {node: rows for node in graph.nodes if (rows := read_rows(node)) is not None}
    if not roots:
        return {}
    kept = _memory_of(graph.output_node().all_input_nodes)
    demands: dict[fx.Node, Rows | None] = {}  # None: all rows
    found: dict[fx.Node, tuple[Rows, Recipe]] = {}

    def ask(node: fx.Node, rows: Rows | None) -> None:
        demands[node] = rows if node not in demands or demands[node] == rows else None

    for node in reversed(graph.nodes):
        wanted = demands.get(node)
        if (wanted is not None or node in roots) and _is_free(node, aliases, kept):
            how = recipe(node, wanted) if wanted is not None else None
            if wanted is not None and how is not None:
                found[node] = wanted, how
                for where, value in (*enumerate(node.args), *node.kwargs.items()):
                    for argument in nodes_in(value):
                        ask(argument, how.sliced.get(where))
                continue
            if node in roots:
                ask(node.args[0], roots[node])  # type: ignore[arg-type]
                continue
        for argument in node.all_input_nodes:
            ask(argument, None)
    return dict(reversed(found.items()))


def _memory_of(nodes: list[fx.Node]) -> set[int]:
    values = [fake(node) for node in nodes]
    return {storage_key(value) for value in values if value is not None}


def _is_free(node: fx.Node, aliases: Aliases, kept: set[int]) -> bool:
    """Whether nobody could tell that the operation ran on fewer rows."""
    if node.op != "call_function" or needs_gradient(node) or _writes(node):
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if random and node.target not in _RANDOM_BY_ARGUMENT:
        return False
    value = node.meta.get("val")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return False
    return not aliases.is_written(node) and not any(storage_key(tensor) in kept for tensor in tensors)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


# -- the graph on these rows


class _Rebuild:
    """One walk through the graph in which recipes become calls."""

    def __init__(self, graph: fx.Graph, emitter: Any, recipes: dict[fx.Node, tuple[Rows, Recipe]]) -> None:
        self.graph = graph
        self.emitter = emitter
        self.recipes = recipes
        self.small: dict[fx.Node, fx.Node] = {}
        # Values that take the place of others and lie in memory otherwise, or share it with something else.
        self.moved: set[fx.Node] = set()
        self.written: set[int] = set()
        self.fresh: set[fx.Node] = set()
        seen: set[int] = set()
        for node in graph.nodes:
            value = fake(node)
            if value is not None and storage_key(value) not in seen:
                seen.add(storage_key(value))
                self.fresh.add(node)
            self.written |= _memory_of(written_arguments(node))
        self.guarded = self.written | _memory_of(graph.output_node().all_input_nodes)

    def run(self) -> None:
        nodes = list(self.graph.nodes)
        for node in nodes:
            if node in self.recipes:
                rows, how = self.recipes[node]
                self.small[node] = self._unshared(node, self._on_rows(node, rows, how))
            elif (rows_read := self._read_of_small(node)) is not None:
                value = self.small[node.args[0]]  # type: ignore[index]
                if node.target is aten.select.int:
                    value = self.emitter.call(node, aten.select.int, value, rows_read.dim, 0)
                self._replace(node, value)
            elif any(argument in self.moved for argument in node.all_input_nodes):
                self._again(node)
        for node in reversed(nodes):  # the whole versions, which may be random and so survive dead-code elimination
            if not node.users and (node in self.recipes or self._read_of_small(node) is not None):
                self.graph.erase_node(node)

    def _read_of_small(self, node: fx.Node) -> Rows | None:
        """The rows that a slice reads, where its source was computed on these only."""
        rows = read_rows(node) if node not in self.recipes else None
        source = node.args[0] if rows is not None else None
        known = self.recipes.get(source) if isinstance(source, fx.Node) else None
        return rows if known is not None and known[0] == rows else None

    def _on_rows(self, node: fx.Node, rows: Rows, how: Recipe) -> fx.Node:
        if (
            node.target is operator.getitem and node.args[0] not in self.small
        ):  # other parts of the split are read whole
            part = self.emitter.call(node.next, aten.slice.Tensor, node, rows.dim, rows.first, rows.first + rows.count)
            part.meta = {**node.meta, "val": part.meta["val"]}
            return part
        args, kwargs = list(node.args), dict(node.kwargs)
        for where, part_rows in how.sliced.items():
            if isinstance(where, int):
                args[where] = self._cut(node, args[where], part_rows)
            else:
                kwargs[where] = self._cut(node, kwargs[where], part_rows)
        if how.shape is not None:
            return self.emitter.call(node, aten.reshape.default, args[0], how.shape)
        for where, value in how.changed.items():
            if isinstance(where, int):
                args[where] = value
            else:
                kwargs[where] = value
        return self.emitter.call(node, node.target, *args, **kwargs)

    def _cut(self, anchor: fx.Node, value: Any, rows: Rows) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._cut(anchor, item, rows) for item in value]
        if value in self.small:
            assert self.recipes[value][0] == rows
            return self.small[value]
        bounds = (rows.dim, rows.first, rows.first + rows.count)
        key = ("rows", value, rows)
        return self.emitter.shared(key, lambda: self.emitter.call(anchor, aten.slice.Tensor, value, *bounds))

    def _again(self, node: fx.Node) -> None:
        """A reader of a value that moved: its fake value may be another, a view may have to become a copy."""
        value = node.meta.get("val")
        if node.op != "call_function":
            return
        if _writes(node):
            if any(argument in self.moved for argument in written_arguments(node)):
                raise RuntimeError(f"{node.name} writes to a value whose memory layout changed")
            return
        tensors = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors) or _depends_on_data(node):
            return
        target = aten.reshape.default if node.target in _RESHAPES else node.target
        new = self._unshared(node, self.emitter.call(node, target, *node.args, **node.kwargs))
        if node in self.fresh and not self._shares(new) and _same_layout(value, new.meta["val"]):
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
        else:
            new.meta = {**node.meta, "val": new.meta["val"]}
            self._replace(node, new)
        self.graph.erase_node(node)

    def _replace(self, node: fx.Node, value: fx.Node) -> None:
        self.moved.add(value)
        node.replace_all_uses_with(value)

    def _unshared(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """``new``, which does what ``node`` did: copied where ``node`` was a copy and a write could tell."""
        before = fake(node)
        if before is None or node not in self.fresh or not self._shares(new):
            return new
        if storage_key(before) not in self.guarded and storage_key(new.meta["val"]) not in self.written:
            return new
        return self.emitter.call(node, aten.clone.default, new, memory_format=torch.contiguous_format)

    def _shares(self, node: fx.Node) -> bool:
        """Whether a value shares memory with an argument of its call."""
        value = fake(node)
        inputs = [fake(argument) for argument in node.all_input_nodes]
        return value is not None and any(i is not None and storage_key(i) == storage_key(value) for i in inputs)


def _depends_on_data(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Sizes of one element have any stride."""
    return all(size == 1 or s == t for size, s, t in zip(a.shape, a.stride(), b.stride()))
