"""Arithmetic and comparison of symbolic numbers as torch does them, one plain number at a time.

Enters: plain numbers of a :class:`~lz_compile.patterns.symbolic.Space` (linear forms, floating constants, unknown
floats; cases are split by :meth:`Space.map` before).  Leaves: the exact result, or None when it is not known: a float
that is not a constant, an integer that a dtype may not hold, a NaN.
"""

from __future__ import annotations

import math
import struct

import torch

from lz_compile.patterns.symbolic import Boolean, Expr, Linear, Real, Space, Unknown, const_value

# Integers up to this magnitude are exact in the dtype.
EXACT_UP_TO = {torch.float64: 1 << 53, torch.float32: 1 << 24, torch.float16: 1 << 11, torch.bfloat16: 1 << 8}


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


def fit_number(space: Space, value: Expr, dtype: torch.dtype, strict: bool) -> Expr | None:
    """A number as ``dtype`` holds it (see :meth:`Evaluator.fit`)."""
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


def floor_divide_numbers(space: Space, x: Expr, y: Expr) -> Expr | None:
    size = positive_integer(y)
    return space.floor_div(x, size, fold=False) if isinstance(x, Linear) and size else None


def remainder_numbers(space: Space, x: Expr, y: Expr) -> Expr | None:
    size = positive_integer(y)
    return space.remainder(x, size, fold=False) if isinstance(x, Linear) and size else None


def positive_integer(value: Expr) -> int | None:
    const = const_value(value)
    return const if isinstance(const, int) and const > 0 else None


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
    above, below = at_least(space, x, y), at_least(space, y, x)
    return None if above is None or below is None else space.all_of([above, below])


def not_equal(space: Space, x: Expr, y: Expr) -> Boolean | None:
    found = equal(space, x, y)
    return None if found is None else space.invert(found)
