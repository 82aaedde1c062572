"""Symbolic values of mask entries: integers, booleans and numbers as functions of (b, h, q, k).

An expression belongs to one :class:`Space`, which knows how far each axis runs, keeps one object per distinct
expression (so that identity is equality) and simplifies by what the extents imply: with ``0 <= k < N``, the
expression ``N - 1 - k >= 0`` is :data:`Space.true`.

Integers are linear forms over atoms: axes, SymInts, elements of graph values, floor divisions and maxima.  Booleans
are kept in negation normal form.  Numbers that depend on a condition are :class:`Choice` trees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx

from lz_compile.mask import readable_name

# Where an element stands in a tensor: one index for each dimension.
Position = tuple["Linear", ...]

# A value that picks between more cases than this is left unproved: such masks are not worth the time.
MAX_LEAVES = 16
# Larger integers are kept as floats: they are fill values, not positions.
MAX_EXACT = 1 << 53


class Expr:
    """An interned expression; ``axes`` are the axes it depends on, ``reads`` says whether it reads graph values."""

    __slots__ = ("axes", "reads", "serial")
    axes: frozenset[str]
    reads: bool
    serial: int

    def parts(self) -> Iterable[Expr]:
        return ()


class Atom(Expr):
    """An integer that is not a linear form of others (an :class:`Element` may also be a boolean or a float)."""

    __slots__ = ()


class Axis(Atom):
    """An index that runs over ``0 <= name < extent``."""

    __slots__ = ("extent", "name")

    def __init__(self, name: str, extent: Linear) -> None:
        self.name, self.extent = name, extent

    def __str__(self) -> str:
        return self.name


class Size(Atom):
    """A SymInt that linear arithmetic does not take apart, by its text; ``low`` and ``high`` bound it."""

    __slots__ = ("high", "low", "name")

    def __init__(self, name: str, low: int | None, high: int | None) -> None:
        self.name, self.low, self.high = name, low, high

    def __str__(self) -> str:
        return self.name


class Element(Atom):
    """``node[index]`` after ``version`` writes to the node's storage, as ``reader`` finds it."""

    __slots__ = ("dtype", "index", "node", "reader", "version")

    def __init__(
        self, node: fx.Node, index: tuple[Linear, ...], version: int, reader: fx.Node, dtype: torch.dtype
    ) -> None:
        self.node, self.index, self.version, self.reader, self.dtype = node, index, version, reader, dtype

    def parts(self) -> Iterable[Expr]:
        return self.index

    def __str__(self) -> str:
        return f"{readable_name(self.node)}[{', '.join(map(str, self.index))}]"


class FloorDiv(Atom):
    """``floor(value / size)`` with a positive constant size."""

    __slots__ = ("size", "value")

    def __init__(self, value: Linear, size: int) -> None:
        self.value, self.size = value, size

    def parts(self) -> Iterable[Expr]:
        return (self.value,)

    def __str__(self) -> str:
        return f"({self.value}) // {self.size}"


class Max(Atom):
    """The largest of several linear forms."""

    __slots__ = ("values",)

    def __init__(self, values: tuple[Linear, ...]) -> None:
        self.values = values

    def parts(self) -> Iterable[Expr]:
        return self.values

    def __str__(self) -> str:
        return f"max({', '.join(map(str, self.values))})"


class Linear(Expr):
    """The integer ``const + sum(coefficient * atom)``, terms sorted by the age of their atoms."""

    __slots__ = ("const", "terms")

    def __init__(self, const: int, terms: tuple[tuple[Atom, int], ...]) -> None:
        self.const, self.terms = const, terms

    def parts(self) -> Iterable[Expr]:
        return (atom for atom, _ in self.terms)

    @property
    def is_const(self) -> bool:
        return not self.terms

    def coefficient(self, atom: Atom) -> int:
        return next((c for a, c in self.terms if a is atom), 0)

    def __str__(self) -> str:
        text = " + ".join(str(a) if c == 1 else f"{c}*{a}" for a, c in self.terms)
        if self.const or not text:
            text = f"{text} + {self.const}" if text else str(self.const)
        return text.replace("+ -1*", "- ").replace("+ -", "- ")


class Real(Expr):
    """A floating constant that is not a small integer."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def __str__(self) -> str:
        return f"{self.value:g}"


class Unknown(Expr):
    """A floating element of a graph value."""

    __slots__ = ("element",)

    def __init__(self, element: Element) -> None:
        self.element = element

    def parts(self) -> Iterable[Expr]:
        return (self.element,)

    def __str__(self) -> str:
        return str(self.element)


class Choice(Expr):
    """``yes`` where ``condition`` holds, else ``no``; both numbers."""

    __slots__ = ("condition", "no", "yes")

    def __init__(self, condition: Boolean, yes: Expr, no: Expr) -> None:
        self.condition, self.yes, self.no = condition, yes, no

    def parts(self) -> Iterable[Expr]:
        return (self.condition, self.yes, self.no)

    def __str__(self) -> str:
        return f"where({self.condition}, {self.yes}, {self.no})"


class Boolean(Expr):
    """A predicate."""

    __slots__ = ()


class Truth(Boolean):
    __slots__ = ("value",)

    def __init__(self, value: bool) -> None:
        self.value = value

    def __str__(self) -> str:
        return str(self.value)


class NonNegative(Boolean):
    """``value >= 0``."""

    __slots__ = ("value",)

    def __init__(self, value: Linear) -> None:
        self.value = value

    def parts(self) -> Iterable[Expr]:
        return (self.value,)

    def __str__(self) -> str:
        return f"{self.value} >= 0"


class Zero(Boolean):
    """``value == 0``."""

    __slots__ = ("value",)

    def __init__(self, value: Linear) -> None:
        self.value = value

    def parts(self) -> Iterable[Expr]:
        return (self.value,)

    def __str__(self) -> str:
        return f"{self.value} == 0"


class Holds(Boolean):
    """A boolean element of a graph value."""

    __slots__ = ("element",)

    def __init__(self, element: Element) -> None:
        self.element = element

    def parts(self) -> Iterable[Expr]:
        return (self.element,)

    def __str__(self) -> str:
        return str(self.element)


class Not(Boolean):
    """The negation of a :class:`Zero` or a :class:`Holds`."""

    __slots__ = ("term",)

    def __init__(self, term: Zero | Holds) -> None:
        self.term = term

    def parts(self) -> Iterable[Expr]:
        return (self.term,)

    def __str__(self) -> str:
        return f"not ({self.term})"


class AllOf(Boolean):
    __slots__ = ("terms",)

    def __init__(self, terms: tuple[Boolean, ...]) -> None:
        self.terms = terms

    def parts(self) -> Iterable[Expr]:
        return self.terms

    def __str__(self) -> str:
        return "(" + " and ".join(map(str, self.terms)) + ")"


class AnyOf(Boolean):
    __slots__ = ("terms",)

    def __init__(self, terms: tuple[Boolean, ...]) -> None:
        self.terms = terms

    def parts(self) -> Iterable[Expr]:
        return self.terms

    def __str__(self) -> str:
        return "(" + " or ".join(map(str, self.terms)) + ")"


Leaf = Callable[..., "Expr | None"]


class Space:
    """Makes and simplifies the expressions of one proof."""

    def __init__(self) -> None:
        self._interned: dict[tuple[Any, ...], Any] = {}
        self._dummies = 0
        self.true: Boolean = self._make(Truth, True)
        self.false: Boolean = self._make(Truth, False)
        self.zero_number = self.number(0)

    def _make(self, kind: type[Any], *fields: Any) -> Any:
        key = (kind, *fields)
        found = self._interned.get(key)
        if found is None:
            found = kind(*fields)
            self._register(found, frozenset(), False)
            self._interned[key] = found
        return found

    def _register(self, made: Expr, axes: frozenset[str], reads: bool) -> None:
        for part in made.parts():
            axes |= part.axes
            reads |= part.reads
        made.serial = len(self._interned)
        made.axes = axes | {made.name} if isinstance(made, Axis) else axes
        made.reads = reads or isinstance(made, Element)

    # Numbers.

    def number(self, value: int) -> Linear:
        return self._linear(int(value), {})

    def real(self, value: float) -> Expr:
        """A floating constant; small integers are integers (and -0.0 is 0)."""
        if math.isfinite(value) and abs(value) <= MAX_EXACT and value == int(value):
            return self.number(int(value))
        key = (Real, repr(value))  # NaN is not equal to itself
        if key not in self._interned:
            made = Real(value)
            self._register(made, frozenset(), False)
            self._interned[key] = made
        return self._interned[key]

    def axis(self, name: str, extent: Linear) -> Linear:
        """The index along an axis; an axis of length one has the index zero."""
        if extent.is_const and extent.const == 1:
            return self.zero_number
        return self.of(self._make(Axis, name, extent))

    def dummy(self, extent: Linear) -> Linear:
        """A fresh index: what holds for it holds for every index below ``extent``."""
        self._dummies += 1
        return self.axis(f"i{self._dummies}", extent)

    def size(self, name: str, low: int | None, high: int | None) -> Linear:
        return self.of(self._make(Size, name, low, high))

    def element(
        self, node: fx.Node, index: tuple[Linear, ...], version: int, reader: fx.Node, dtype: torch.dtype
    ) -> Element:
        # ``reader`` is no part of the identity: all readers that see one version see one value.
        key = (Element, node, index, version)
        if key not in self._interned:
            made = Element(node, index, version, reader, dtype)
            self._register(made, frozenset(), True)
            self._interned[key] = made
        return self._interned[key]

    def unknown(self, element: Element) -> Unknown:
        return self._make(Unknown, element)

    def of(self, atom: Atom) -> Linear:
        return self._linear(0, {atom: 1})

    def _linear(self, const: int, terms: dict[Atom, int]) -> Linear:
        kept = sorted(((a, c) for a, c in terms.items() if c), key=lambda term: term[0].serial)
        return self._make(Linear, const, tuple(kept))

    def add(self, x: Linear, y: Linear, times: int = 1) -> Linear:
        """``x + times * y``."""
        terms = dict(x.terms)
        for atom, coefficient in y.terms:
            terms[atom] = terms.get(atom, 0) + times * coefficient
        return self._linear(x.const + times * y.const, terms)

    def sub(self, x: Linear, y: Linear) -> Linear:
        return self.add(x, y, -1)

    def scale(self, x: Linear, factor: int) -> Linear:
        return self._linear(x.const * factor, {a: c * factor for a, c in x.terms})

    def shift(self, x: Linear, const: int) -> Linear:
        return self._make(Linear, x.const + const, x.terms)

    def floor_div(self, x: Linear, size: int, fold: bool = True) -> Linear:
        """``floor(x / size)``, with the multiples of ``size`` taken out.

        Without ``fold`` a division that is constant by its bounds stays a division: a chunk that holds all keys is
        still recognised as a chunk.
        """
        whole = self._linear(x.const // size, {a: c // size for a, c in x.terms if c % size == 0})
        rest = self._linear(x.const % size, {a: c for a, c in x.terms if c % size})
        low, high = self.bounds(rest)
        fold = fold or rest.is_const
        if fold and low is not None and high is not None and low // size == high // size:
            return self.shift(whole, low // size)
        return self.add(whole, self.of(self._make(FloorDiv, rest, size)))

    def remainder(self, x: Linear, size: int, fold: bool = True) -> Linear:
        return self.add(x, self.floor_div(x, size, fold), -size)

    def maximum(self, x: Linear, y: Linear) -> Linear:
        low, high = self.bounds(self.sub(x, y))
        if low is not None and low >= 0:
            return x
        if high is not None and high <= 0:
            return y
        return self.of(self._make(Max, tuple(sorted((x, y), key=lambda v: v.serial))))

    def minimum(self, x: Linear, y: Linear) -> Linear:
        return self.scale(self.maximum(self.scale(x, -1), self.scale(y, -1)), -1)

    def bounds(self, x: Linear) -> tuple[int | None, int | None]:
        """The least and the greatest value of ``x``, None where unknown."""
        high = self._low(self.scale(x, -1))
        return self._low(x), None if high is None else -high

    def _low(self, x: Linear) -> int | None:
        # Put each axis at the end that makes x least; extents may then cancel against other SymInts.
        while any(isinstance(a, Axis) for a, _ in x.terms):
            rest = self._linear(x.const, {a: c for a, c in x.terms if not isinstance(a, Axis)})
            for atom, c in x.terms:
                if isinstance(atom, Axis) and c < 0:
                    rest = self.add(rest, self.shift(atom.extent, -1), c)
            x = rest
        total = x.const
        for atom, c in x.terms:
            low, high = self._atom_bounds(atom)
            end = low if c > 0 else high
            if end is None:
                return None
            total += c * end
        return total

    def _atom_bounds(self, atom: Atom) -> tuple[int | None, int | None]:
        if isinstance(atom, Size):
            return atom.low, atom.high
        if isinstance(atom, Element):
            return (0, 1) if atom.dtype == torch.bool else dtype_range(atom.dtype)
        if isinstance(atom, FloorDiv):
            low, high = self.bounds(atom.value)
            return None if low is None else low // atom.size, None if high is None else high // atom.size
        if isinstance(atom, Max):
            lows, highs = zip(*(self.bounds(v) for v in atom.values))
            known = [low for low in lows if low is not None]
            return max(known, default=None), None if None in highs else max(highs)
        return None, None

    # Booleans.

    def truth(self, value: bool) -> Boolean:
        return self.true if value else self.false

    def holds(self, element: Element) -> Boolean:
        return self._make(Holds, element)

    def at_least_zero(self, x: Linear) -> Boolean:
        """``x >= 0``."""
        for atom, c in x.terms:
            if isinstance(atom, FloorDiv):
                low, high = self._atom_bounds(atom)
                if low is not None and low == high:
                    x = self.shift(self.add(x, self.of(atom), -c), c * low)
        divisor = math.gcd(*(c for _, c in x.terms))
        if divisor > 1:
            x = self._linear(x.const // divisor, {a: c // divisor for a, c in x.terms})
        low, high = self.bounds(x)
        if low is not None and low >= 0:
            return self.true
        if high is not None and high < 0:
            return self.false
        for atom, c in x.terms:
            if isinstance(atom, Max) and abs(c) == 1:
                rest = self.add(x, self.of(atom), -c)
                cases = [self.at_least_zero(self.add(rest, value, c)) for value in atom.values]
                return self.all_of(cases) if c < 0 else self.any_of(cases)
        divisions = [(a, c) for a, c in x.terms if isinstance(a, FloorDiv)]
        if len(divisions) == 1 and abs(divisions[0][1]) == 1:
            (atom, c), size = divisions[0], divisions[0][0].size
            rest = self.scale(self.add(x, self.of(atom), -c), size)
            # floor(v / s) >= -d  <=>  v + s * d >= 0;   floor(v / s) <= d  <=>  s * d + s - 1 - v >= 0
            return self.at_least_zero(self.add(rest if c > 0 else self.shift(rest, size - 1), atom.value, c))
        return self._make(NonNegative, x)

    def equals_zero(self, x: Linear) -> Boolean:
        """``x == 0``."""
        if x.is_const:
            return self.truth(x.const == 0)
        divisor = math.gcd(*(c for _, c in x.terms))
        if x.const % divisor:
            return self.false
        if x.terms[0][1] < 0:
            divisor = -divisor
        x = self._linear(x.const // divisor, {a: c // divisor for a, c in x.terms})
        low, high = self.bounds(x)
        if (low is not None and low > 0) or (high is not None and high < 0):
            return self.false
        if low == high == 0:
            return self.true
        divisions = [(a, c) for a, c in x.terms if isinstance(a, FloorDiv)]
        # An equality of two divisions is a chunk, which an inequality would hide.
        if low == 0 and len(divisions) < 2:
            return self.at_least_zero(self.scale(x, -1))
        if high == 0 and len(divisions) < 2:
            return self.at_least_zero(x)
        splits = len(divisions) == 1 and abs(divisions[0][1]) == 1
        if splits or any(isinstance(a, Max) and abs(c) == 1 for a, c in x.terms):
            return self.all_of([self.at_least_zero(x), self.at_least_zero(self.scale(x, -1))])
        return self._make(Zero, x)

    def invert(self, e: Boolean) -> Boolean:
        if isinstance(e, Truth):
            return self.truth(not e.value)
        if isinstance(e, NonNegative):
            return self.at_least_zero(self.shift(self.scale(e.value, -1), -1))
        if isinstance(e, Not):
            return e.term
        if isinstance(e, AllOf):
            return self.any_of([self.invert(t) for t in e.terms])
        if isinstance(e, AnyOf):
            return self.all_of([self.invert(t) for t in e.terms])
        return self._make(Not, e)

    def all_of(self, terms: Iterable[Boolean]) -> Boolean:
        kept = self._merge(terms, AllOf, self.true, self.false, min)
        if kept is None:
            return self.false
        return self.true if not kept else kept[0] if len(kept) == 1 else self._make(AllOf, kept)

    def any_of(self, terms: Iterable[Boolean]) -> Boolean:
        kept = self._merge(terms, AnyOf, self.false, self.true, max)
        if kept is None:
            return self.true
        return self.false if not kept else kept[0] if len(kept) == 1 else self._make(AnyOf, kept)

    def _merge(
        self,
        terms: Iterable[Boolean],
        kind: type[AllOf] | type[AnyOf],
        neutral: Boolean,
        absorbing: Boolean,
        tighter: Callable[[int, int], int],
    ) -> tuple[Boolean, ...] | None:
        """Flattened distinct terms, the tightest of parallel bounds; None when the absorbing value results."""
        flat: dict[Boolean, None] = {}
        for term in terms:
            flat.update(dict.fromkeys(term.terms) if isinstance(term, kind) else {term: None})
        flat.pop(neutral, None)
        if absorbing in flat:
            return None
        bounds: dict[tuple[tuple[Atom, int], ...], int] = {}
        for term in flat:
            if isinstance(term, NonNegative):
                const = term.value.const
                bounds[term.value.terms] = tighter(const, bounds.get(term.value.terms, const))
        kept = tuple(t for t in flat if not isinstance(t, NonNegative) or bounds[t.value.terms] == t.value.const)
        if any(isinstance(t, Not) and t.term in flat for t in kept):
            return None
        for terms_, const in bounds.items():
            # x + c >= 0 beside -x + d >= 0: disjoint when c + d < 0, and they cover everything when c + d >= -1
            other = bounds.get(tuple((a, -c) for a, c in terms_))
            if other is not None and (const + other < 0 if kind is AllOf else const + other >= -1):
                return None
        return kept

    def if_then_else(self, condition: Boolean, yes: Boolean, no: Boolean) -> Boolean:
        if yes is no:
            return yes
        return self.any_of([self.all_of([condition, yes]), self.all_of([self.invert(condition), no])])

    # Numbers by cases.

    def choose(self, condition: Boolean, yes: Expr, no: Expr) -> Expr:
        if isinstance(condition, Truth):
            return yes if condition.value else no
        opposite = self.invert(condition)
        yes = self._assume(condition, opposite, yes)
        no = self._assume(opposite, condition, no)
        return yes if yes is no else self._make(Choice, condition, yes, no)

    def _assume(self, true: Boolean, false: Boolean, value: Expr) -> Expr:
        while isinstance(value, Choice) and value.condition in (true, false):
            value = value.yes if value.condition is true else value.no
        return value

    def map(self, function: Leaf, *values: Expr) -> Expr | None:
        """Apply a function of plain numbers to numbers by cases; None when it declines a case or there are many."""
        if math.prod(count_leaves(v) for v in values) > MAX_LEAVES:
            return None
        return self._map(function, values)

    def _map(self, function: Leaf, values: tuple[Expr, ...]) -> Expr | None:
        for i, value in enumerate(values):
            if isinstance(value, Choice):
                yes, no = (self._map(function, (*values[:i], v, *values[i + 1 :])) for v in (value.yes, value.no))
                if yes is None or no is None:
                    return None
                if isinstance(yes, Boolean) and isinstance(no, Boolean):
                    return self.if_then_else(value.condition, yes, no)
                return self.choose(value.condition, yes, no)
        return function(*values)


def count_leaves(value: Expr) -> int:
    return count_leaves(value.yes) + count_leaves(value.no) if isinstance(value, Choice) else 1


def const_value(value: Expr) -> int | float | None:
    """The value of a constant number, else None."""
    if isinstance(value, Real):
        return value.value
    return value.const if isinstance(value, Linear) and value.is_const else None


def dtype_range(dtype: torch.dtype) -> tuple[int | None, int | None]:
    """The values of an integer dtype; int64 counts as unbounded."""
    if dtype == torch.int64 or dtype.is_floating_point or dtype.is_complex:
        return None, None
    info = torch.iinfo(dtype)
    return int(info.min), int(info.max)


def conjuncts(e: Boolean) -> Sequence[Boolean]:
    return e.terms if isinstance(e, AllOf) else () if isinstance(e, Truth) and e.value else (e,)
