"""Evaluates entries of graph values at symbolic indices, by descending through the operations that made them.

Enters: the facts of one graph (aliases, SymInts, writes) and the shape ``(B, H, M, N)`` of the scores.  Leaves:
:class:`Evaluator`, which gives ``node[index]`` as an expression over ``(b, h, q, k)``.  Whatever is not understood
becomes an opaque read of the graph value itself, so evaluation never fails.

Time matters because the graph holds in-place operations: every value is evaluated *as its reader finds it*.  A view
passes the time of reading on to its base, a copy reads its source where it stands, and a value that was written
between its definition and its reader is either derived from that write (when it covers the whole tensor) or opaque.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.mask import Index, Read
from lz_compile.patterns.mask_operators import IN_PLACE, OPERATIONS
from lz_compile.patterns.mask_views import INDEX_MAPS, IndexMap, is_one
from lz_compile.patterns.symbolic import (
    Axis,
    Boolean,
    Choice,
    Element,
    Expr,
    Holds,
    Linear,
    Max,
    Position,
    Space,
    Truth,
)
from lz_compile.patterns.symbolic_numbers import fit_number, nonzero
from lz_compile.patterns.symints import SymInts

# Masks of real models are 20 to 40 operations deep; Dynamo leaves about half of Python's recursion limit.
MAX_DEPTH = 120


class Evaluator:
    """Entries of graph values as expressions over ``(b, h, q, k)`` of one shape of scores."""

    def __init__(
        self, aliases: Aliases, sizes: SymInts, writes: dict[fx.Node, list[fx.Node]], shape: Sequence[Any]
    ) -> None:
        self.aliases, self.sizes, self.writes = aliases, sizes, writes
        self.space = Space()
        extents = [self.extent(size) for size in shape]
        self.axes: Position = tuple(self.space.axis(name, extent) for name, extent in zip("bhqk", extents))
        self.one_query = extents[2].is_const and extents[2].const == 1
        self.one_key = extents[3].is_const and extents[3].const == 1
        # Which graph value holds an expression: lets a term that is no bound be read from memory.
        self.sources: dict[Expr, Read] = {}
        self._memo: dict[tuple[fx.Node, Position, int], Expr] = {}
        self._depth = 0

    def extent(self, size: Any) -> Linear:
        found = self.sizes.linear(self.space, size)
        assert found is not None, f"a size must be an int or a SymInt, not {size!r}"
        return found

    def entry(self, mask: fx.Node, at: fx.Node) -> Expr | None:
        """The mask's entry at (b, h, q, k) as ``at`` reads it; None when it does not broadcast to the scores."""
        rank = mask.meta["val"].dim()
        return self.value(mask, self.axes[4 - rank :], at) if rank <= 4 else None

    def value(self, node: fx.Node, index: Position, reader: fx.Node) -> Expr:
        """``node[index]`` when ``reader`` runs."""
        shape = node.meta["val"].shape
        index = tuple(self.space.zero_number if is_one(size) else i for size, i in zip(shape, index))
        key = (node, index, self.aliases.version(node, reader))
        found = self._memo.get(key)
        if found is None:
            self._depth += 1
            try:
                found = self._evaluate(node, index, reader) if self._depth < MAX_DEPTH else None
            finally:
                self._depth -= 1
            if found is None or is_runtime_case(found, node.meta["val"].dtype):
                found = self.opaque(node, index, reader)
            self._note_source(found, node, index, reader)
            self._memo[key] = found
        return found

    def _evaluate(self, node: fx.Node, index: Position, reader: fx.Node) -> Expr | None:
        if node.op != "call_function":
            return None if self.aliases.is_written(node) else constant_tensor(self.space, node)
        base = node.args[0] if node.args else None
        if isinstance(base, fx.Node) and self.aliases.same_storage(node, base):
            view = INDEX_MAPS.get(node.target)
            if view is not None:
                return self.through(view, node, index, reader)
            return self.value(base, index, reader) if node in self.writes else None
        if self.aliases.written_between(node, node, reader):
            return self._after_write(node, index, reader)
        return self.result(node, index)

    def result(self, node: fx.Node, index: Position) -> Expr | None:
        """What the operation of ``node`` computes."""
        view = INDEX_MAPS.get(node.target)
        if view is not None:
            return self.through(view, node, index, node)
        handler = OPERATIONS.get(node.target)
        return None if handler is None else handler(self, node, index)

    def through(self, view: IndexMap, node: fx.Node, index: Position, reader: fx.Node) -> Expr | None:
        base = node.args[0]
        assert isinstance(base, fx.Node)
        base_index = view(self, node, index)
        if base_index is None:
            return None
        value = self.value(base, base_index, reader)
        return self.cast(value, base.meta["val"].dtype, node.meta["val"].dtype)

    def _after_write(self, node: fx.Node, index: Position, reader: fx.Node) -> Expr | None:
        """The value of a tensor that was written before ``reader``, if the last write covers all of it."""
        first, last = self.aliases.position(node), self.aliases.position(reader)
        for write, written in reversed(self.writes.items()):
            touched = [w for w in written if self.aliases.same_storage(w, node)]
            if touched and first < self.aliases.position(write) < last:
                handler = IN_PLACE.get(write.target)
                covers = len(touched) == 1 and same_layout(touched[0], node)
                return handler(self, write, index) if handler and covers else None
        return None

    def opaque(self, node: fx.Node, index: Position, reader: fx.Node) -> Expr:
        dtype = node.meta["val"].dtype
        element = self.space.element(node, index, self.aliases.version(node, reader), reader, dtype)
        if dtype == torch.bool:
            return self.space.holds(element)
        if dtype.is_floating_point or dtype.is_complex:
            return self.space.unknown(element)
        return self.space.of(element)

    def _note_source(self, value: Expr, node: fx.Node, index: Position, reader: fx.Node) -> None:
        if isinstance(value, (Holds, Truth)) or value in self.sources:
            return
        if isinstance(value, Boolean):
            useful = value.axes <= {"b", "k"} and ("k" in value.axes or self.one_key)
        else:
            useful = isinstance(value, Linear) and not value.is_const and value.axes <= {"b"}
        if useful:
            version = self.aliases.version(node, reader)
            read = to_read(self.space.element(node, index, version, reader, node.meta["val"].dtype))
            if read is not None:
                self.sources[value] = read

    # Operands.

    def operand(self, argument: Any, node: fx.Node, index: Position) -> Expr | None:
        """An argument of ``node`` broadcast to its ``index``, as ``node`` reads it."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor):
            rank = argument.meta["val"].dim()
            return self.value(argument, index[len(index) - rank :], node)
        if isinstance(argument, float):
            return self.space.real(argument)
        return self.sizes.linear(self.space, argument)

    def number(self, value: Expr | None) -> Expr | None:
        """A boolean as 0 or 1."""
        if isinstance(value, Boolean):
            return self.space.choose(value, self.space.number(1), self.space.zero_number)
        return value

    def boolean(self, value: Expr | None) -> Boolean | None:
        """``value != 0``."""
        if value is None or isinstance(value, Boolean):
            return value
        found = self.space.map(lambda v: nonzero(self.space, v), value)
        return found if isinstance(found, Boolean) else None

    def cast(self, value: Expr, source: torch.dtype, target: torch.dtype) -> Expr | None:
        """A conversion between dtypes, None when it is not known to be exact."""
        if source == target:
            return value
        if target == torch.bool:
            return self.boolean(value)
        number = self.number(value)
        assert number is not None
        return self.fit(number, target, strict=True)

    def fit(self, value: Expr | None, dtype: torch.dtype, strict: bool = False) -> Expr | None:
        """A number as ``dtype`` holds it: constants are rounded, other integers must be exact.

        int32 and int64 arithmetic is taken not to overflow, but a conversion to int32 (``strict``) may.
        """
        return None if value is None else self.space.map(lambda v: fit_number(self.space, v, dtype, strict), value)


def is_runtime_case(value: Expr, dtype: torch.dtype) -> bool:
    """True for an integer by cases that only the batch row decides: reading it is simpler than restating it."""
    if dtype.is_floating_point or not value.reads or value.axes - {"b"}:
        return False
    return isinstance(value, Choice) or (isinstance(value, Linear) and any(isinstance(a, Max) for a, _ in value.terms))


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """True when two values of one storage are the same elements in the same order."""
    x, y = a.meta["val"], b.meta["val"]
    layouts = [(v.dtype, str(tuple(v.shape)), str(v.stride()), str(v.storage_offset())) for v in (x, y)]
    return layouts[0] == layouts[1]


def constant_tensor(space: Space, node: fx.Node) -> Expr | None:
    """The value of a one-element constant that tracing stored in the module."""
    if node.op != "get_attr" or not str(node.target).startswith(("_tensor_constant", "lifted_tensor")):
        return None
    tensor = getattr(node.graph.owning_module, str(node.target), None)
    if (
        not isinstance(tensor, torch.Tensor)
        or type(tensor) is not torch.Tensor
        or tensor.numel() != 1
        or tensor.dtype.is_complex
    ):
        return None
    value = tensor.item()
    if tensor.dtype == torch.bool:
        return space.truth(bool(value))
    return space.real(value) if tensor.dtype.is_floating_point else space.number(int(value))


def to_read(element: Element) -> Read | None:
    """The read of an element whose indices are all constants or one axis plus a constant."""
    index: list[Index] = []
    for i in element.index:
        if i.is_const:
            index.append(Index(None, i.const))
            continue
        ((atom, coefficient), *rest) = i.terms
        if rest or coefficient != 1 or not isinstance(atom, Axis) or atom.name not in "bhqk":
            return None
        index.append(Index(atom.name, i.const))  # type: ignore[arg-type]
    return Read(element.node, tuple(index), element.version, element.reader)
