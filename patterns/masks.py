"""Brings the mask of an attention into :class:`~lz_compile.mask.MaskForm`, or says where the proof stopped.

Enters: a pre-dispatch ATen graph and its :class:`~lz_compile.aliasing.Aliases`.  Leaves: :class:`MaskProver`, asked
once per attention.  A mask entry is evaluated at symbolic indices ``(b, h, q, k)`` by descending through the operations
that made it; whatever is not understood becomes an opaque read of the graph value itself, so evaluation never fails.

Time matters because the graph holds in-place operations: every value is evaluated *as its reader finds it*.  A view
passes the time of reading on to its base, a copy reads its source where it stands, and a value that was written
between its definition and its reader is either derived from that write (when it covers the whole tensor) or opaque.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases, written_arguments
from lz_compile.mask import (
    EMPTY_ROWS_OF_SOFTMAX,
    Bound,
    Chunk,
    Documents,
    EmptyRow,
    EmptyRows,
    Index,
    MaskForm,
    Read,
    readable_name,
)
from lz_compile.patterns.symbolic import (
    Atom,
    Axis,
    Boolean,
    Choice,
    Element,
    Expr,
    FloorDiv,
    Holds,
    Linear,
    Max,
    NonNegative,
    Real,
    Size,
    Space,
    Truth,
    Unknown,
    Zero,
    conjuncts,
    const_value,
)

aten = torch.ops.aten

Position = tuple[Linear, ...]
Shape = tuple[Any, ...]

# Masks of real models are 20 to 40 operations deep; Dynamo leaves about half of Python's recursion limit.
MAX_DEPTH = 120

# Integers up to this magnitude are exact in the dtype.
EXACT_UP_TO = {torch.float64: 1 << 53, torch.float32: 1 << 24, torch.float16: 1 << 11, torch.bfloat16: 1 << 8}


class MaskProver:
    """Proves the masks of one graph; each distinct mask is proved once for all layers.

    ``shape`` is ``(B, H, M, N)`` of the scores, as ints or SymInts; a mask of any rank up to four broadcasts to it.
    ``at`` is the node that reads the mask.
    """

    def __init__(self, graph: fx.Graph, aliases: Aliases) -> None:
        self.aliases = aliases
        self.sizes = SymInts(graph)
        self.writes: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            written = written_arguments(node)
            if written:
                self.writes[node] = written
        self._evaluators: dict[tuple[str, ...], Evaluator] = {}
        self._proved: dict[tuple[Any, ...], MaskForm] = {}

    def keep(self, mask: fx.Node, shape: Shape, at: fx.Node, empty_row: EmptyRow = "zero") -> MaskForm:
        """The form of a boolean mask that is True where a key is visible."""
        return self._prove("keep", mask, shape, at, empty_row)

    def hide(self, mask: fx.Node, shape: Shape, at: fx.Node, empty_row: EmptyRow) -> MaskForm:
        """The form of a boolean mask that is True where a key is hidden."""
        return self._prove("hide", mask, shape, at, empty_row)

    def add(self, mask: fx.Node, shape: Shape, at: fx.Node, empty_rows: EmptyRows = EMPTY_ROWS_OF_SOFTMAX) -> MaskForm:
        """The form of a float mask that is added to the scores.

        It is proved when its entries are 0 or one value that hides a key: -inf, or the least finite number of its
        dtype.  ``empty_rows`` says what a row without visible keys gives in each case.
        """
        return self._prove("add", mask, shape, at, empty_rows)

    def _prove(self, kind: str, mask: fx.Node, shape: Shape, at: fx.Node, empty_row: Any) -> MaskForm:
        sizes = tuple(map(str, shape))
        key = (kind, mask, self.aliases.version(mask, at), sizes, empty_row)
        if key not in self._proved:
            evaluator = self._evaluators.get(sizes)
            if evaluator is None:
                evaluator = self._evaluators[sizes] = Evaluator(self, shape)
            try:
                self._proved[key] = _PROOFS[kind](evaluator, mask, at, empty_row)
            except RecursionError:
                self._proved[key] = _unproved(kind, mask, empty_row, "the mask is built too deep in the graph")
        return self._proved[key]


def _unproved(kind: str, mask: fx.Node, empty_row: Any, why: str) -> MaskForm:
    if kind == "add":
        return MaskForm(bias=mask, empty_row=empty_row.bias, unproved=why)
    return MaskForm(dense=mask, dense_hides=kind == "hide", empty_row=empty_row, unproved=why)


def _prove_boolean(e: Evaluator, mask: fx.Node, at: fx.Node, empty_row: EmptyRow, hides: bool) -> MaskForm:
    kind = "hide" if hides else "keep"
    dtype = mask.meta["val"].dtype
    if dtype != torch.bool:
        return _unproved(kind, mask, empty_row, f"{readable_name(mask)} is a mask of {dtype}")
    value = e.entry(mask, at)
    if not isinstance(value, Boolean):
        return _unproved(kind, mask, empty_row, f"{readable_name(mask)} does not broadcast to the scores")
    form, why = FormBuilder(e, at).build(e.space.invert(value) if hides else value)
    dense = mask if why else None
    return MaskForm(**form, dense=dense, dense_hides=hides and bool(why), empty_row=empty_row, unproved=why)


def _prove_keep(e: Evaluator, mask: fx.Node, at: fx.Node, empty_row: EmptyRow) -> MaskForm:
    return _prove_boolean(e, mask, at, empty_row, hides=False)


def _prove_hide(e: Evaluator, mask: fx.Node, at: fx.Node, empty_row: EmptyRow) -> MaskForm:
    return _prove_boolean(e, mask, at, empty_row, hides=True)


def _prove_additive(e: Evaluator, mask: fx.Node, at: fx.Node, empty_rows: EmptyRows) -> MaskForm:
    dtype = mask.meta["val"].dtype
    value = e.entry(mask, at) if dtype in EXACT_UP_TO else None
    if value is None:
        return _unproved("add", mask, empty_rows, f"{readable_name(mask)} is an additive mask of {dtype}")
    leaves: dict[str, str] = {}
    shown = _shown(e.space, value, torch.finfo(dtype).min, leaves)
    form, why = FormBuilder(e, at).build(shown)
    if "other" in leaves:
        why = f"it adds {leaves['other']}"
    elif "least" in leaves and "infinite" in leaves:
        why = "it adds both -inf and the least finite number"
    if why:
        # What hides a key for good may still narrow the range of a kernel that adds the rest.
        return MaskForm(**form, bias=mask, empty_row=empty_rows.bias, unproved=why)
    if not leaves.keys() & {"infinite", "least"}:
        return MaskForm(**form)
    return MaskForm(**form, empty_row=empty_rows.infinite if "infinite" in leaves else empty_rows.finite)


def _shown(space: Space, value: Expr, least: float, leaves: dict[str, str]) -> Boolean:
    """Where an additive mask does not hide the key; ``leaves`` collects which kinds of values it holds."""
    if isinstance(value, Choice):
        yes, no = (_shown(space, v, least, leaves) for v in (value.yes, value.no))
        return space.if_then_else(value.condition, yes, no)
    const = const_value(value)
    if const is not None and const <= least:
        leaves["infinite" if const == -math.inf else "least"] = str(value)
        return space.false
    if const != 0:
        leaves["other"] = str(value)
    return space.true


_PROOFS: dict[str, Callable[[Evaluator, fx.Node, fx.Node, EmptyRow], MaskForm]] = {
    "keep": _prove_keep,
    "hide": _prove_hide,
    "add": _prove_additive,
}


class SymInts:
    """SymInts as linear forms over the symbols of the graph, and the graph values that hold these symbols."""

    def __init__(self, graph: fx.Graph) -> None:
        self._holders: dict[str, tuple[int, fx.Node, int]] = {}
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._note(node, value.node.expr)

    def _note(self, node: fx.Node, expr: Any) -> None:
        """Remember that ``symbol = sign * (node - const)``; a node that is the symbol itself comes first."""
        parts: dict[str, int] = {}
        const = _decompose(expr, 1, parts)
        if len(parts) == 1 and abs(next(iter(parts.values()))) == 1:
            ((name, sign),) = parts.items()
            known = self._holders.get(name)
            if known is None or ((known[0], known[2]) != (1, 0) and (sign, const) == (1, 0)):
                self._holders[name] = (sign, node, const)
        self._holders.setdefault(str(expr), (1, node, 0))

    def linear(self, space: Space, value: Any) -> Linear | None:
        """The linear form of an int, a SymInt or a node that holds a SymInt; None for anything else."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, int):  # bool too: True counts as 1
            return space.number(int(value))
        if not isinstance(value, torch.SymInt):
            return None
        parts: dict[str, int] = {}
        atoms: dict[str, Any] = {}
        total = space.number(_decompose(value.node.expr, 1, parts, atoms))
        for name, coefficient in parts.items():
            low, high = _symbol_range(value.node.shape_env, atoms[name])
            total = space.add(total, space.size(name, low, high), coefficient)
        return total

    def holder(self, name: str) -> tuple[int, fx.Node, int] | None:
        """``(sign, node, const)`` such that the symbol is ``sign * (node - const)``."""
        return self._holders.get(name)


def _decompose(expr: Any, factor: int, parts: dict[str, int], atoms: dict[str, Any] | None = None) -> int:
    """Collect ``factor * expr`` (sympy) as coefficients by symbol; returns the constant."""
    if expr.is_Integer:
        return factor * int(expr)
    if expr.is_Add:
        return sum(_decompose(term, factor, parts, atoms) for term in expr.args)
    if expr.is_Mul and expr.args[0].is_Integer and len(expr.args) == 2:
        return _decompose(expr.args[1], factor * int(expr.args[0]), parts, atoms)
    parts[str(expr)] = parts.get(str(expr), 0) + factor
    if atoms is not None:
        atoms[str(expr)] = expr
    return 0


def _symbol_range(shape_env: Any, expr: Any) -> tuple[int | None, int | None]:
    try:
        found = shape_env.bound_sympy(expr)
        ends = (found.lower, found.upper)
    except Exception:  # a range only sharpens the proof
        return None, None
    return tuple(int(end) if end.is_Integer else None for end in ends)  # type: ignore[return-value]


class Evaluator:
    """Entries of graph values as expressions over ``(b, h, q, k)`` of one shape of scores."""

    def __init__(self, prover: MaskProver, shape: Shape) -> None:
        self.aliases = prover.aliases
        self.sizes = prover.sizes
        self.writes = prover.writes
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
            return None if self.aliases.is_written(node) else constant_tensor(self, node)
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
        return None if value is None else self.space.map(lambda v: fit_leaf(self.space, v, dtype, strict), value)


def fit_leaf(space: Space, value: Expr, dtype: torch.dtype, strict: bool) -> Expr | None:
    const = const_value(value)
    if dtype.is_floating_point and const is not None:
        rounded = round_to(dtype, float(const))
        return None if rounded is None else space.real(rounded)
    if isinstance(value, Unknown):
        return value if dtype == value.element.dtype else None
    if not isinstance(value, Linear) or dtype.is_complex:
        return None
    if dtype == torch.int64:
        return value
    low, high = space.bounds(value)
    if dtype.is_floating_point:
        least, greatest = -EXACT_UP_TO.get(dtype, 0), EXACT_UP_TO.get(dtype, 0)
    else:
        least, greatest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if low is None or high is None:
        return value if dtype == torch.int32 and not strict else None
    return value if least <= low and high <= greatest else None


def is_runtime_case(value: Expr, dtype: torch.dtype) -> bool:
    """True for an integer by cases that only the batch row decides: reading it is simpler than restating it."""
    if dtype.is_floating_point or not value.reads or value.axes - {"b"}:
        return False
    return isinstance(value, Choice) or (isinstance(value, Linear) and any(isinstance(a, Max) for a, _ in value.terms))


def round_to(dtype: torch.dtype, value: float) -> float | None:
    """The nearest number of a floating dtype, None for a dtype that is not supported."""
    if dtype == torch.float64 or math.isinf(value) or math.isnan(value):
        return value if dtype in EXACT_UP_TO else None
    try:
        if dtype == torch.float16:
            return float(struct.unpack("e", struct.pack("e", value))[0])
        if dtype in (torch.float32, torch.bfloat16):
            bits = struct.unpack("I", struct.pack("f", value))[0]
            if dtype == torch.bfloat16:
                bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return float(struct.unpack("f", struct.pack("I", bits))[0])
    except OverflowError:
        return math.copysign(math.inf, value)
    return None


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """True when two values of one storage are the same elements in the same order."""
    x, y = a.meta["val"], b.meta["val"]
    layouts = [(v.dtype, str(tuple(v.shape)), str(v.stride()), str(v.storage_offset())) for v in (x, y)]
    return layouts[0] == layouts[1]


def constant_tensor(e: Evaluator, node: fx.Node) -> Expr | None:
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
        return e.space.truth(bool(value))
    return e.space.real(value) if tensor.dtype.is_floating_point else e.space.number(int(value))


# Index maps: for an operation that only moves elements, the index into its first argument.

IndexMap = Callable[[Evaluator, fx.Node, Position], "Position | None"]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def base_shape(node: fx.Node) -> Sequence[Any]:
    return node.args[0].meta["val"].shape  # type: ignore[union-attr]


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
    base: list[Linear | None] = [e.space.zero_number] * len(base_shape(node))
    inner = [(i, size) for i, size in enumerate(base_shape(node)) if not is_one(size)]
    outer = [(i, size) for i, size in zip(index, node.meta["val"].shape) if not is_one(size)]
    while inner and outer:
        (dim, size), (i, out_size) = inner.pop(), outer.pop()
        if str(size) == str(out_size):
            base[dim] = i
            continue
        dims, flat, stride, total = [(dim, size)], i, out_size, size
        while str(total) != str(stride):
            if not isinstance(total, int) or not isinstance(stride, int) or not total or not stride:
                return None  # comparing SymInts would add guards
            source = inner if total < stride else outer
            if not source:
                return None
            if source is inner:
                dims.append(inner.pop())
                total = total * dims[-1][1]
            else:
                i, out_size = outer.pop()
                flat = e.space.add(flat, i, stride)
                stride = stride * out_size
        for dim, size in dims:
            base[dim] = e.space.remainder(flat, size)
            flat = e.space.floor_div(flat, size)
    return None if inner or outer else tuple(base)  # type: ignore[arg-type]


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


# Operations that compute.  A handler gives ``node[index]``, or None when it does not know.

Handler = Callable[[Evaluator, fx.Node, Position], "Expr | None"]
Numeric = Callable[..., "Expr | None"]


def nonzero(space: Space, value: Expr) -> Boolean | None:
    if isinstance(value, Linear):
        return space.invert(space.equals_zero(value))
    return space.true if isinstance(value, Real) else None


def add_numbers(space: Space, x: Expr, y: Expr) -> Expr | None:
    if isinstance(x, Linear) and isinstance(y, Linear):
        return space.add(x, y)
    a, b = const_value(x), const_value(y)
    return None if a is None or b is None else space.real(a + b)


def multiply_numbers(space: Space, x: Expr, y: Expr) -> Expr | None:
    a, b = const_value(x), const_value(y)
    if a is not None and b is not None:
        return space.real(float(a) * b) if isinstance(a, float) or isinstance(b, float) else space.number(a * b)
    if isinstance(x, Linear) and isinstance(b, int):
        return space.scale(x, b)
    return space.scale(y, a) if isinstance(y, Linear) and isinstance(a, int) else None


def negate_number(space: Space, x: Expr) -> Expr | None:
    return multiply_numbers(space, x, space.number(-1))


def subtract_numbers(space: Space, x: Expr, y: Expr) -> Expr | None:
    negative = negate_number(space, y)
    return None if negative is None else add_numbers(space, x, negative)


def maximum_number(space: Space, x: Expr, y: Expr) -> Expr | None:
    if isinstance(x, Linear) and isinstance(y, Linear):
        return space.maximum(x, y)
    a, b = const_value(x), const_value(y)
    if a is None or b is None or math.isnan(a) or math.isnan(b):
        return None
    return x if a >= b else y


def minimum_number(space: Space, x: Expr, y: Expr) -> Expr | None:
    if isinstance(x, Linear) and isinstance(y, Linear):
        return space.minimum(x, y)
    larger = maximum_number(space, x, y)
    return None if larger is None else y if larger is x else x


def absolute_number(space: Space, x: Expr) -> Expr | None:
    negative = negate_number(space, x)
    return None if negative is None else maximum_number(space, x, negative)


def is_divisible(x: Expr, size: int | float | None) -> bool:
    return isinstance(x, Linear) and isinstance(size, int) and size > 0


def floor_divide_numbers(space: Space, x: Expr, y: Expr) -> Expr | None:
    size = const_value(y)
    return space.floor_div(x, size, fold=False) if is_divisible(x, size) else None


def remainder_numbers(space: Space, x: Expr, y: Expr) -> Expr | None:
    size = const_value(y)
    return space.remainder(x, size, fold=False) if is_divisible(x, size) else None


def at_least(space: Space, x: Expr, y: Expr) -> Boolean | None:
    """``x >= y``."""
    if isinstance(x, Linear) and isinstance(y, Linear):
        return space.at_least_zero(space.sub(x, y))
    a, b = const_value(x), const_value(y)
    if (a is not None and math.isnan(a)) or (b is not None and math.isnan(b)):
        return None
    if a is not None and b is not None:
        return space.truth(a >= b)
    if isinstance(x, Linear) and b is not None:
        return space.truth(b < 0) if math.isinf(b) else space.at_least_zero(space.shift(x, -math.ceil(b)))
    if isinstance(y, Linear) and a is not None:
        floor = None if math.isinf(a) else space.number(math.floor(a))
        return space.truth(a > 0) if floor is None else space.at_least_zero(space.sub(floor, y))
    return None


def at_most(space: Space, x: Expr, y: Expr) -> Boolean | None:
    return at_least(space, y, x)


def greater(space: Space, x: Expr, y: Expr) -> Boolean | None:
    found = at_least(space, y, x)
    return None if found is None else space.invert(found)


def less(space: Space, x: Expr, y: Expr) -> Boolean | None:
    return greater(space, y, x)


def equal(space: Space, x: Expr, y: Expr) -> Boolean | None:
    if isinstance(x, Linear) and isinstance(y, Linear):
        return space.equals_zero(space.sub(x, y))
    found = [at_least(space, x, y), at_least(space, y, x)]
    return None if found[0] is None or found[1] is None else space.all_of(found)  # type: ignore[arg-type]


def not_equal(space: Space, x: Expr, y: Expr) -> Boolean | None:
    found = equal(space, x, y)
    return None if found is None else space.invert(found)


def arithmetic(function: Numeric, arguments: int = 2) -> Handler:
    """An elementwise operation on numbers whose result has the dtype it computes in."""

    def handler(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            return None
        values: list[Expr] = []
        for position in range(arguments):
            value = e.fit(e.number(e.operand(node.args[position], node, index)), dtype)
            if value is None:
                return None
            values.append(value)
        alpha = argument(node, arguments, "alpha", 1)
        if alpha != 1:
            scale = e.operand(alpha, node, ())
            scaled = None if scale is None else e.space.map(lambda v: multiply_numbers(e.space, v, scale), values[-1])
            if scaled is None:
                return None
            values[-1] = scaled
        return e.fit(e.space.map(lambda *v: function(e.space, *v), *values), dtype)

    return handler


def reversed_subtraction(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    if argument(node, 2, "alpha", 1) != 1:
        return None
    return arithmetic(lambda space, x, y: subtract_numbers(space, y, x))(e, node, index)


def multiply(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    if node.meta["val"].dtype == torch.bool:
        return logical(conjunction)(e, node, index)
    return arithmetic(multiply_numbers)(e, node, index)


def add(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    if node.meta["val"].dtype == torch.bool:
        return logical(disjunction)(e, node, index)
    return arithmetic(add_numbers)(e, node, index)


def divide(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    rounds_down = node.kwargs.get("rounding_mode") == "floor" and not node.meta["val"].dtype.is_floating_point
    return arithmetic(floor_divide_numbers)(e, node, index) if rounds_down else None


def integers_only(handler: Handler) -> Handler:
    """Division of floats rounds in its own way."""
    return lambda e, node, index: None if node.meta["val"].dtype.is_floating_point else handler(e, node, index)


def clamp(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    dtype = node.meta["val"].dtype
    value = e.fit(e.number(e.operand(node.args[0], node, index)), dtype)
    ends: tuple[tuple[int, str, Numeric], ...] = ((1, "min", maximum_number), (2, "max", minimum_number))
    for position, name, function in ends:
        limit = argument(node, position, name)
        if limit is None:
            continue
        end = e.fit(e.operand(limit, node, index), dtype)
        if value is None or end is None:
            return None
        value = e.space.map(lambda x, y, f=function: f(e.space, x, y), value, end)
    return value


def clamp_min(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return arithmetic(maximum_number)(e, node, index)


def clamp_max(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return arithmetic(minimum_number)(e, node, index)


def comparison(function: Numeric) -> Handler:
    def handler(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
        operands = [e.operand(a, node, index) for a in node.args[:2]]
        values: list[Expr] = []
        for operand in operands:
            value = e.number(operand)
            # Torch compares in one dtype that all operands must reach unchanged.
            for dtype in compared_dtypes(node):
                if value is None or e.fit(value, dtype) is not value:
                    return None
            if value is None:
                return None
            values.append(value)
        return e.space.map(lambda x, y: function(e.space, x, y), *values)

    return handler


def compared_dtypes(node: fx.Node) -> list[torch.dtype]:
    """The dtypes that the operands of a comparison may be converted to."""
    tensors = [a.meta["val"] for a in node.args[:2] if isinstance(a, fx.Node)]
    dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor)} - {torch.bool}
    floating = {d for d in dtypes if d.is_floating_point}
    if not floating and any(isinstance(a, float) for a in node.args[:2]):
        floating = {torch.float32}
    return list(floating or dtypes)


def logical(function: Callable[[Space, Boolean, Boolean], Boolean]) -> Handler:
    def handler(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
        if node.meta["val"].dtype != torch.bool:
            return None
        x, y = (e.boolean(e.operand(a, node, index)) for a in node.args[:2])
        return None if x is None or y is None else function(e.space, x, y)

    return handler


def conjunction(space: Space, x: Boolean, y: Boolean) -> Boolean:
    return space.all_of([x, y])


def disjunction(space: Space, x: Boolean, y: Boolean) -> Boolean:
    return space.any_of([x, y])


def difference(space: Space, x: Boolean, y: Boolean) -> Boolean:
    return space.if_then_else(x, space.invert(y), y)


def negation(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    if node.meta["val"].dtype != torch.bool:
        return None
    value = e.boolean(e.operand(node.args[0], node, index))
    return None if value is None else e.space.invert(value)


def pick(e: Evaluator, node: fx.Node, condition: Expr | None, yes: Expr | None, no: Expr | None) -> Expr | None:
    """``where(condition, yes, no)`` in the dtype of ``node``."""
    holds = e.boolean(condition)
    dtype = node.meta["val"].dtype
    if holds is None or yes is None or no is None:
        return None
    if dtype == torch.bool:
        yes_holds, no_holds = e.boolean(yes), e.boolean(no)
        if yes_holds is None or no_holds is None:
            return None
        return e.space.if_then_else(holds, yes_holds, no_holds)
    fitted = [e.fit(e.number(v), dtype) for v in (yes, no)]
    return None if fitted[0] is None or fitted[1] is None else e.space.choose(holds, fitted[0], fitted[1])


def where(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return pick(e, node, *(e.operand(a, node, index) for a in node.args[:3]))


def masked_fill(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    value, condition, fill = (e.operand(a, node, index) for a in node.args[:3])
    return pick(e, node, condition, fill, value)


def triangle(sign: int) -> Handler:
    """``tril`` (sign 1) keeps ``column <= row + diagonal``, ``triu`` (sign -1) ``column >= row + diagonal``."""

    def handler(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
        diagonal = e.sizes.linear(e.space, argument(node, 1, "diagonal", 0))
        if diagonal is None:
            return None
        distance = e.space.sub(e.space.add(index[-2], diagonal), index[-1])
        inside = e.space.at_least_zero(e.space.scale(distance, sign))
        value = e.operand(node.args[0], node, index)
        return pick(e, node, inside, value, e.space.zero_number)

    return handler


def arange(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    start, step = (node.args[0], argument(node, 2, "step", 1)) if len(node.args) > 1 else (0, 1)
    whole = [int(v) if isinstance(v, float) and v == int(v) else v for v in (start, step)]
    first = e.sizes.linear(e.space, whole[0])
    if first is None or not isinstance(whole[1], int):
        return None
    return e.fit(e.space.add(first, index[0], whole[1]), node.meta["val"].dtype)


def filled(e: Evaluator, node: fx.Node, fill: Any) -> Expr | None:
    value = e.operand(fill, node, ())
    if node.meta["val"].dtype == torch.bool:
        return e.boolean(value)
    return e.fit(e.number(value), node.meta["val"].dtype)


def zeros(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return filled(e, node, 0)


def ones(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return filled(e, node, 1)


def full(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return filled(e, node, argument(node, 1, "fill_value"))


def full_like(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return filled(e, node, argument(node, 1, "fill_value"))


def new_full(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return filled(e, node, argument(node, 2, "fill_value"))


def scalar_tensor(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return filled(e, node, node.args[0])


def take(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    """``x[i, None, j]`` with integer index tensors that are known not to be negative."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    used = [dim for dim, i in enumerate(indices) if i is not None]
    values = [i.meta["val"] for i in indices if isinstance(i, fx.Node)]
    if any(v.dtype not in (torch.int64, torch.int32) for v in values) or len(values) != len(used) or not used:
        return None
    rank = max(v.dim() for v in values)
    # The indexed dimensions go where they stood when they are neighbours, else to the front.
    first = used[0] if used[-1] - used[0] == len(used) - 1 else 0
    rest = list(index[:first] + index[first + rank :])
    base: list[Linear] = []
    for dim in range(source.meta["val"].dim()):
        if dim not in used:
            base.append(rest.pop(0))
            continue
        found = e.operand(indices[dim], node, index[first : first + rank])
        if not is_natural(e.space, found):
            return None
        base.append(found)  # type: ignore[arg-type]
    return e.value(source, tuple(base), node)


def is_natural(space: Space, value: Expr | None) -> bool:
    low = space.bounds(value)[0] if isinstance(value, Linear) else None
    return low is not None and low >= 0


def gather(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    source, dim = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    chosen = node.args[2]
    position = index if node.target == aten.gather.default else (index[dim % len(index)],)
    found = e.value(chosen, position, node) if isinstance(chosen, fx.Node) and chosen.meta["val"].dim() else None
    if not isinstance(found, Linear) or not is_natural(e.space, found):
        return None
    dim %= len(index)
    return e.value(source, (*index[:dim], found, *index[dim + 1 :]), node)


def concatenate(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    tensors, dim = node.args[0], argument(node, 1, "dim", 0) % len(index)
    assert isinstance(tensors, (list, tuple))
    pieces: list[tuple[Linear, Expr]] = []
    offset = e.space.zero_number
    for tensor in tensors:
        if not isinstance(tensor, fx.Node) or tensor.meta["val"].dim() != len(index):
            return None
        local = e.space.sub(index[dim], offset)
        offset = e.space.add(offset, e.extent(tensor.meta["val"].shape[dim]))
        value = e.value(tensor, (*index[:dim], local, *index[dim + 1 :]), node)
        pieces.append((offset, value))
    found: Expr | None = pieces[-1][1]
    for end, value in reversed(pieces[:-1]):
        before_end = e.space.at_least_zero(e.space.shift(e.space.sub(end, index[dim]), -1))
        found = pick(e, node, before_end, value, found)
    # Where another piece is chosen, a read of this one would lie outside its tensor.
    return None if found is None or found.reads else found


def pad(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    amounts = node.args[1]
    mode, fill = "constant", argument(node, 2, "value", 0)
    if node.target == aten.pad.default:
        mode, fill = argument(node, 2, "mode", "constant"), argument(node, 3, "value") or 0
    source = node.args[0]
    assert isinstance(source, fx.Node) and isinstance(amounts, (list, tuple))
    position, inside = list(index), []
    for i in range(len(amounts) // 2):
        dim = len(index) - 1 - i
        before = e.sizes.linear(e.space, amounts[2 * i])
        if before is None or mode != "constant":
            return None
        local = position[dim] = e.space.sub(index[dim], before)
        last = e.space.shift(e.extent(source.meta["val"].shape[dim]), -1)
        inside += [e.space.at_least_zero(local), e.space.at_least_zero(e.space.sub(last, local))]
    condition = e.space.all_of(inside)
    value = e.value(source, tuple(position), node)
    if condition is not e.space.true and value.reads:
        return None  # outside the source there is nothing to read
    return pick(e, node, condition, value, e.operand(fill, node, ()))


def adjacent_difference(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    """``diff``: ``y[i + 1] - y[i]`` of ``y = cat([prepend, x])``."""
    source, prepend = node.args[0], argument(node, 3, "prepend")
    dim = argument(node, 2, "dim", -1) % len(index)
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None or not isinstance(source, fx.Node):
        return None
    if node.meta["val"].dtype == torch.bool:
        return None

    def at(tensor: fx.Node, i: Linear) -> Expr:
        return e.value(tensor, (*index[:dim], i, *index[dim + 1 :]), node)

    i = index[dim]
    if prepend is None:
        after, before = at(source, e.space.shift(i, 1)), at(source, i)
    else:
        if not is_one(prepend.meta["val"].shape[dim]):
            return None
        is_first = e.space.at_least_zero(e.space.scale(i, -1))
        after = at(source, i)
        before = e.space.choose(is_first, at(prepend, e.space.zero_number), at(source, e.space.shift(i, -1)))
    found = e.space.map(lambda x, y: subtract_numbers(e.space, x, y), after, before)
    return None if found is None or found.reads else e.fit(found, node.meta["val"].dtype)


def running_sum(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    """``cumsum`` of a constant."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = argument(node, 1, "dim") % len(index)
    any_index = e.space.dummy(e.extent(source.meta["val"].shape[dim]))
    value = e.number(e.value(source, (*index[:dim], any_index, *index[dim + 1 :]), node))
    if not isinstance(value, Linear) or not value.is_const or node.meta["val"].dtype.is_floating_point:
        return None
    return e.fit(e.space.scale(e.space.shift(index[dim], 1), value.const), node.meta["val"].dtype)


def copy_from(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    source, dtype = node.args[1], node.meta["val"].dtype
    value = e.operand(source, node, index)
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor) or value is None:
        return None
    return e.cast(value, source.meta["val"].dtype, dtype)


_ELEMENTWISE: dict[str, tuple[tuple[str, ...], Handler]] = {
    "add": (("Tensor", "Scalar"), add),
    "sub": (("Tensor", "Scalar"), arithmetic(subtract_numbers)),
    "subtract": (("Tensor", "Scalar"), arithmetic(subtract_numbers)),
    "rsub": (("Tensor", "Scalar"), reversed_subtraction),
    "mul": (("Tensor", "Scalar"), multiply),
    "multiply": (("Tensor", "Scalar"), multiply),
    "neg": (("default",), arithmetic(negate_number, 1)),
    "negative": (("default",), arithmetic(negate_number, 1)),
    "abs": (("default",), arithmetic(absolute_number, 1)),
    "absolute": (("default",), arithmetic(absolute_number, 1)),
    "maximum": (("default",), arithmetic(maximum_number)),
    "minimum": (("default",), arithmetic(minimum_number)),
    "max": (("other",), arithmetic(maximum_number)),
    "min": (("other",), arithmetic(minimum_number)),
    "clamp": (("default", "Tensor"), clamp),
    "clip": (("default", "Tensor"), clamp),
    "clamp_min": (("default", "Tensor"), clamp_min),
    "clamp_max": (("default", "Tensor"), clamp_max),
    "floor_divide": (("default", "Scalar"), integers_only(arithmetic(floor_divide_numbers))),
    "div": (("Tensor_mode", "Scalar_mode"), divide),
    "remainder": (("Tensor", "Scalar"), integers_only(arithmetic(remainder_numbers))),
    "ge": (("Tensor", "Scalar"), comparison(at_least)),
    "greater_equal": (("Tensor", "Scalar"), comparison(at_least)),
    "le": (("Tensor", "Scalar"), comparison(at_most)),
    "less_equal": (("Tensor", "Scalar"), comparison(at_most)),
    "gt": (("Tensor", "Scalar"), comparison(greater)),
    "greater": (("Tensor", "Scalar"), comparison(greater)),
    "lt": (("Tensor", "Scalar"), comparison(less)),
    "less": (("Tensor", "Scalar"), comparison(less)),
    "eq": (("Tensor", "Scalar"), comparison(equal)),
    "ne": (("Tensor", "Scalar"), comparison(not_equal)),
    "not_equal": (("Tensor", "Scalar"), comparison(not_equal)),
    "logical_and": (("default",), logical(conjunction)),
    "logical_or": (("default",), logical(disjunction)),
    "logical_xor": (("default",), logical(difference)),
    "bitwise_and": (("Tensor", "Scalar"), logical(conjunction)),
    "bitwise_or": (("Tensor", "Scalar"), logical(disjunction)),
    "bitwise_xor": (("Tensor", "Scalar"), logical(difference)),
    "logical_not": (("default",), negation),
    "bitwise_not": (("default",), negation),
    "masked_fill": (("Scalar", "Tensor"), masked_fill),
    "tril": (("default",), triangle(1)),
    "triu": (("default",), triangle(-1)),
}


def _overloads(table: dict[str, tuple[tuple[str, ...], Handler]], suffix: str = "") -> dict[Any, Handler]:
    found: dict[Any, Handler] = {}
    for name, (overloads, handler) in table.items():
        packet = getattr(aten, name + suffix, None)
        found |= {getattr(packet, o): handler for o in overloads if packet is not None and o in packet.overloads()}
    return found


OPERATIONS: dict[Any, Handler] = {
    **_overloads(_ELEMENTWISE),
    aten.__and__.Tensor: logical(conjunction),
    aten.__and__.Scalar: logical(conjunction),
    aten.__or__.Tensor: logical(disjunction),
    aten.__or__.Scalar: logical(disjunction),
    aten.__xor__.Tensor: logical(difference),
    aten.where.self: where,
    aten.where.ScalarOther: where,
    aten.where.ScalarSelf: where,
    aten.where.Scalar: where,
    aten.arange.default: arange,
    aten.arange.start: arange,
    aten.arange.start_step: arange,
    aten.full.default: full,
    aten.full_like.default: full_like,
    aten.new_full.default: new_full,
    aten.scalar_tensor.default: scalar_tensor,
    **dict.fromkeys((aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default), zeros),
    **dict.fromkeys((aten.ones.default, aten.new_ones.default, aten.ones_like.default), ones),
    aten.index.Tensor: take,
    aten.gather.default: gather,
    aten.index_select.default: gather,
    **dict.fromkeys((aten.cat.default, aten.concat.default, aten.concatenate.default), concatenate),
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
    aten.diff.default: adjacent_difference,
    aten.cumsum.default: running_sum,
}

# Writes to a whole tensor, by what they leave in it.
IN_PLACE: dict[Any, Handler] = {
    **_overloads(_ELEMENTWISE, "_"),
    aten.__iand__.Tensor: logical(conjunction),
    aten.__ior__.Tensor: logical(disjunction),
    aten.zero_.default: zeros,
    aten.fill_.Scalar: full_like,
    aten.fill_.Tensor: copy_from,
    aten.copy_.default: copy_from,
}


class FormBuilder:
    """Sorts the conjuncts of a predicate into the terms of a :class:`MaskForm`."""

    def __init__(self, evaluator: Evaluator, at: fx.Node) -> None:
        self.e = evaluator
        self.space = evaluator.space
        self.at = at
        self.b, self.h, self.q, self.k = evaluator.axes
        self.terms: dict[str, list[Any]] = defaultdict(list)

    def build(self, visible: Boolean) -> tuple[dict[str, Any], str]:
        """The fields of the form, and the first term that is not in the normal form ("" when all are)."""
        if visible is self.space.false:
            return {}, "no key is visible"
        why = ""
        for term in self._unpacked(conjuncts(visible)):
            if not self._place(term) and not self._place_read(term):
                why = why or f"not in normal form: {term}"
        chunks = self.terms.pop("chunk", [None])
        return {name: tuple(dict.fromkeys(found)) for name, found in self.terms.items()} | {"chunk": chunks[0]}, why

    def _place(self, term: Boolean) -> bool:
        if isinstance(term, NonNegative):
            return self._place_bound(term.value)
        if isinstance(term, Zero):
            return self._place_documents(term.value) or self._place_chunk(term.value) or self._place_equal(term.value)
        return False

    def _place_bound(self, x: Linear) -> bool:
        """``x >= 0``, a bound on k that may move with q."""
        key, query = self._coefficient(x, self.k), self._coefficient(x, self.q)
        if abs(key) != 1 or query not in (0, -key):
            return False
        rest = self.space.add(self.space.add(x, self.k, -key), self.q, -query)
        moves = query != 0 or (self.e.one_query and not rest.is_const)
        if key < 0:  # k <= q + rest
            bound = self._bound(rest if moves else self.space.shift(rest, 1))
            name = "upper" if moves else "stop"
        else:  # k >= q - rest
            bound = self._bound(self.space.scale(rest, -1))
            name = "lower" if moves else "start"
        if bound is None:
            return False
        self.terms[name].append(bound)
        return True

    def _place_equal(self, x: Linear) -> bool:
        """``x == 0`` as two bounds."""
        saved = {name: list(found) for name, found in self.terms.items()}
        if self._place_bound(x) and self._place_bound(self.space.scale(x, -1)):
            return True
        self.terms = defaultdict(list, saved)
        return False

    def _place_chunk(self, x: Linear) -> bool:
        """``(q + c) // size - (k + a) // size + d == 0``."""
        keys = [(a, c) for a, c in x.terms if isinstance(a, FloorDiv) and "k" in a.axes]
        if len(keys) != 1 or abs(keys[0][1]) != 1:
            return False
        (key, sign), size = keys[0], keys[0][0].size
        rest = self.space.scale(self.space.add(x, self.space.of(key), -sign), -sign)
        queries = [(a, c) for a, c in rest.terms if isinstance(a, FloorDiv) and a.size == size and c == 1]
        if len(queries) != 1 or self._coefficient(key.value, self.k) != 1:
            return False
        query = queries[0][0]
        if not self.e.one_query and self._coefficient(query.value, self.q) != 1:
            return False
        shift = self.space.scale(self.space.add(rest, self.space.of(query), -1), size)
        start = self.space.add(key.value, self.k, -1)
        origin = self._bound(self.space.scale(start, -1))
        # q + offset - origin == query.value + shift
        offset = self._bound(self.space.sub(self.space.sub(self.space.add(query.value, shift), self.q), start))
        if origin is None or offset is None:
            return False
        chunk = Chunk(size, offset, origin)
        if self.terms["chunk"] and self.terms["chunk"] != [chunk]:
            return False
        self.terms["chunk"] = [chunk]
        return True

    def _place_documents(self, x: Linear) -> bool:
        pair = self._equal_elements(x)
        if pair is None:
            return False
        query, key = (self._usable(to_read(side)) for side in pair)
        if query is None or key is None:
            return False
        self.terms["documents"].append(Documents(query, key))
        return True

    def _equal_elements(self, x: Linear) -> tuple[Element, Element] | None:
        """The query side and the key side of ``x == 0`` when it says ``ids[b, q] == ids[b, k]``."""
        elements = [a for a, c in x.terms if isinstance(a, Element)]
        if x.const or len(x.terms) != 2 or len(elements) != 2 or x.terms[0][1] + x.terms[1][1]:
            return None
        for query, key in (elements, elements[::-1]):
            of_query = query.axes <= {"b", "q"} and ("q" in query.axes or self.e.one_query)
            if of_query and key.axes <= {"b", "k"} and "k" in key.axes:
                return query, key
        return None

    def _place_read(self, term: Boolean) -> bool:
        """A condition on (b, k) that some graph value holds."""
        for name, wanted in (("key_padding", term), ("key_hidden", self.space.invert(term))):
            read = self._usable(to_read(wanted.element) if isinstance(wanted, Holds) else self.e.sources.get(wanted))
            if read is not None and read.axes <= {"b", "k"} and ("k" in read.axes or self.e.one_key):
                self.terms[name].append(read)
                return True
        return False

    def _coefficient(self, x: Linear, axis: Linear) -> int:
        return x.coefficient(axis.terms[0][0]) if axis.terms else 0

    def _bound(self, x: Linear) -> Bound | None:
        """A linear form over SymInts and reads that depend on the batch row at most."""
        whole = self._usable(self.e.sources.get(x))
        const, reads = x.const, []
        for atom, coefficient in x.terms:
            found = self._atom_read(atom)
            if found is None:
                return None if whole is None else Bound(0, ((1, whole),))
            sign, read, offset = found
            const -= coefficient * sign * offset
            reads.append((coefficient * sign, read))
        return Bound(const, tuple(reads))

    def _atom_read(self, atom: Atom) -> tuple[int, Read, int] | None:
        """``(sign, read, const)`` such that the atom is ``sign * (read - const)``."""
        if isinstance(atom, Size):
            holder = self.e.sizes.holder(atom.name)
            if holder is None or self.e.aliases.position(holder[1]) >= self.e.aliases.position(self.at):
                return None
            return holder[0], Read(holder[1], reader=self.at), holder[2]
        read = self._usable(to_read(atom) if isinstance(atom, Element) else self.e.sources.get(self.space.of(atom)))
        return (1, read, 0) if read is not None and read.axes <= {"b"} else None

    def _unpacked(self, terms: Sequence[Boolean]) -> list[Boolean]:
        """Replace positions that restart with each packed sequence by plain indices.

        With ``ids = cumsum(diff(positions) != 1)``, two tokens of one id have ``positions[q] - positions[k] == q - k``,
        so beside ``ids[q] == ids[k]`` a bound on that difference is a bound on ``q - k``.
        """
        pairs = [self._equal_elements(t.value) for t in terms if isinstance(t, Zero)]
        for pair in pairs:
            positions = None if pair is None else self._positions_of_runs(*pair)
            if pair is None or positions is None:
                continue
            query, key = positions
            plain = self.space.sub(pair[0].index[-1], pair[1].index[-1])
            terms = [self._replaced(term, query, key, plain) for term in terms]
        return list(terms)

    def _replaced(self, term: Boolean, query: Element, key: Element, plain: Linear) -> Boolean:
        if not isinstance(term, NonNegative):
            return term
        x = term.value
        times = x.coefficient(query)
        if not times or x.coefficient(key) != -times:
            return term
        x = self.space.add(self.space.add(x, self.space.of(query), -times), self.space.of(key), times)
        return self.space.at_least_zero(self.space.add(x, plain, times))

    def _positions_of_runs(self, query: Element, key: Element) -> tuple[Element, Element] | None:
        """The positions that both elements of one ``cumsum(diff(positions) != 1)`` were made from."""
        if query.node is not key.node or query.version != key.version or query.index[:-1] != key.index[:-1]:
            return None
        chain, reader = [query.node], query.reader
        for target in (aten.cumsum.default, aten.ne.Scalar, aten.diff.default):
            node = chain[-1]
            if node.target != target or self.e.aliases.written_between(node, node, reader):
                return None
            source = node.args[0]
            if not isinstance(source, fx.Node):
                return None
            chain.append(source)
            reader = node
        total, changed, steps, positions = chain
        last = query.node.meta["val"].dim() - 1
        dims = [argument(total, 1, "dim"), argument(steps, 2, "dim", -1)]
        prepended = argument(steps, 3, "prepend") is not None and argument(steps, 4, "append") is None
        same_length = str(steps.meta["val"].shape) == str(positions.meta["val"].shape)
        single_step = changed.args[1] == 1 and argument(steps, 1, "n", 1) == 1
        if any(d % (last + 1) != last for d in dims) or not (prepended and same_length and single_step):
            return None
        found = [self.e.value(positions, side.index, steps) for side in (query, key)]
        elements = [v.terms[0][0] for v in found if isinstance(v, Linear) and len(v.terms) == 1 and not v.const]
        if len(elements) != 2 or not all(isinstance(a, Element) for a in elements):
            return None
        return elements[0], elements[1]  # type: ignore[return-value]

    def _usable(self, read: Read | None) -> Read | None:
        """The read, if it can be made before ``at``: sites may be proved in any order and share what they read."""
        aliases = self.e.aliases
        if read is None or aliases.position(read.node) >= aliases.position(self.at):
            return None
        assert read.reader is not None
        if aliases.position(read.reader) <= aliases.position(self.at):
            return read
        return replace(read, reader=self.at) if aliases.version(read.node, self.at) == read.version else None


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
