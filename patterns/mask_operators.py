"""Operations that compute: what each ATen operator means for one element of its result.

Enters: a node and the index of one of its elements.  Leaves: ``node[index]`` as an expression, its operands evaluated
by the :class:`~lz_compile.patterns.mask_evaluation.Evaluator`, or None when it is not known.  The tables at the end
say who answers for which operator: :data:`OPERATIONS` for results, :data:`IN_PLACE` for writes to a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from lz_compile.patterns.mask_views import argument, is_one
from lz_compile.patterns.symbolic import Boolean, Expr, Linear, Position, Space
from lz_compile.patterns.symbolic_numbers import (
    absolute_number,
    add_numbers,
    at_least,
    at_most,
    equal,
    floor_divide_numbers,
    greater,
    less,
    maximum_number,
    minimum_number,
    multiply_numbers,
    negate_number,
    not_equal,
    remainder_numbers,
    subtract_numbers,
)
from lz_compile.patterns.walk import aten

if TYPE_CHECKING:
    from lz_compile.patterns.mask_evaluation import Evaluator

Handler = Callable[["Evaluator", fx.Node, Position], "Expr | None"]
Numeric = Callable[..., "Expr | None"]


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


def comparison(function: Numeric) -> Handler:
    def handler(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
        values: list[Expr] = []
        for operand in node.args[:2]:
            value = e.number(e.operand(operand, node, index))
            # Torch compares in one dtype that all operands must reach unchanged.
            if value is None or any(e.fit(value, dtype) is not value for dtype in compared_dtypes(node)):
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
    yes, no = e.fit(e.number(yes), dtype), e.fit(e.number(no), dtype)
    return None if yes is None or no is None else e.space.choose(holds, yes, no)


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


def new_full(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return filled(e, node, argument(node, 2, "fill_value"))


def scalar_tensor(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    return filled(e, node, node.args[0])


def python_tensor(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    """``torch.tensor(0.0)``, which torch 2.11 keeps as a call of its own; of nested lists nothing is known."""
    return filled(e, node, node.args[0]) if isinstance(node.args[0], (bool, int, float)) else None


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
        found = natural(e.space, e.operand(indices[dim], node, index[first : first + rank]))
        if found is None:
            return None
        base.append(found)
    return e.value(source, tuple(base), node)


def natural(space: Space, value: Expr | None) -> Linear | None:
    """The value, if it is an integer that is known not to be negative."""
    if not isinstance(value, Linear):
        return None
    low, _ = space.bounds(value)
    return value if low is not None and low >= 0 else None


def gather(e: Evaluator, node: fx.Node, index: Position) -> Expr | None:
    """``gather`` reads its index tensor at the whole index, ``index_select`` a vector at one dimension of it."""
    source, dim, chosen = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    if not isinstance(chosen, fx.Node) or not chosen.meta["val"].dim():
        return None
    dim %= len(index)
    found = natural(e.space, e.value(chosen, index if node.target == aten.gather.default else (index[dim],), node))
    return None if found is None else e.value(source, (*index[:dim], found, *index[dim + 1 :]), node)


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
    "clamp_min": (("default", "Tensor"), arithmetic(maximum_number)),
    "clamp_max": (("default", "Tensor"), arithmetic(minimum_number)),
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
    aten.full_like.default: full,
    aten.new_full.default: new_full,
    aten.scalar_tensor.default: scalar_tensor,
    torch.tensor: python_tensor,
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
    aten.fill_.Scalar: full,
    aten.fill_.Tensor: copy_from,
    aten.copy_.default: copy_from,
}
