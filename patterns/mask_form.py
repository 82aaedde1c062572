"""Sorts the conjuncts of a proved predicate into the terms of a mask's normal form.

Enters: a predicate over ``(b, h, q, k)`` from the :class:`~lz_compile.patterns.mask_evaluation.Evaluator`, and the
node that reads the mask.  Leaves: the fields of :class:`~lz_compile.mask.MaskForm`, whose reads can all be made before
that node, and the first conjunct that fits no term.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from lz_compile.mask import Bound, Chunk, Documents, Read
from lz_compile.patterns.mask_evaluation import Evaluator, to_read
from lz_compile.patterns.mask_views import argument
from lz_compile.patterns.symbolic import (
    Atom,
    Boolean,
    Element,
    Expr,
    FloorDiv,
    Holds,
    Linear,
    NonNegative,
    Size,
    Zero,
    conjuncts,
)
from lz_compile.patterns.walk import aten


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
        steps = self._steps_of_runs(query)
        if steps is None:
            return None
        positions = steps.args[0]
        assert isinstance(positions, fx.Node)
        of_query, of_key = (_only_element(self.e.value(positions, side.index, steps)) for side in (query, key))
        return None if of_query is None or of_key is None else (of_query, of_key)

    def _steps_of_runs(self, ids: Element) -> fx.Node | None:
        """The node ``diff(positions)`` behind ``cumsum(diff(positions) != 1)``, all along the last dimension."""
        chain, reader = [ids.node], ids.reader
        for target in (aten.cumsum.default, aten.ne.Scalar, aten.diff.default):
            node = chain[-1]
            source = node.args[0] if node.target == target else None
            if not isinstance(source, fx.Node) or self.e.aliases.written_between(node, node, reader):
                return None
            chain.append(source)
            reader = node
        total, changed, steps, positions = chain
        last = ids.node.meta["val"].dim() - 1
        dims = [argument(total, 1, "dim"), argument(steps, 2, "dim", -1)]
        prepended = argument(steps, 3, "prepend") is not None and argument(steps, 4, "append") is None
        same_length = str(steps.meta["val"].shape) == str(positions.meta["val"].shape)
        single_step = changed.args[1] == 1 and argument(steps, 1, "n", 1) == 1
        along_last = all(dim % (last + 1) == last for dim in dims)
        return steps if along_last and prepended and same_length and single_step else None

    def _usable(self, read: Read | None) -> Read | None:
        """The read, if it can be made before ``at``: sites may be proved in any order and share what they read."""
        aliases = self.e.aliases
        if read is None or aliases.position(read.node) >= aliases.position(self.at):
            return None
        assert read.reader is not None
        if aliases.position(read.reader) <= aliases.position(self.at):
            return read
        return replace(read, reader=self.at) if aliases.version(read.node, self.at) == read.version else None


def _only_element(value: Expr) -> Element | None:
    """The element that an integer is, without a factor or an offset."""
    if not isinstance(value, Linear) or value.const or len(value.terms) != 1:
        return None
    atom, coefficient = value.terms[0]
    return atom if isinstance(atom, Element) and coefficient == 1 else None
