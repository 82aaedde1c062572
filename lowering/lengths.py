"""Masks that are a length: "row b sees its first L_b keys, causal from the bottom right, within a window".

Enters: an attention region with its proved :class:`~lz_compile.mask.MaskForm`.  Leaves: a :class:`Prefix`, which says
the same in the terms of FlashAttention and xFormers, or the reason why the mask is none; and the graph nodes that such
a kernel takes (keys cut to a static length, or lengths that stay on the device).

The kernels count from the end: of ``M`` queries and ``L`` keys, query ``i`` sees key ``k < L`` when
``i + (L - M) - window_left <= k <= i + (L - M) + window_right``, and causal means ``window_right == 0``.  A mask
``k <= q + u`` is that with ``L = M + u``, provided that ``M + u`` keys exist.  For one query too long a length may be
cut to the number of keys; for more it may not, because the first queries would then lose keys.  Where ``u`` is known
only at run time, the proof is an ``index_copy_`` in the same graph: PyTorch refuses positions outside the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile.aliasing import Aliases
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.semantic import STOP, UPPER
from lz_compile.mask import Bound, MaskForm, Read
from lz_compile.region import Attention, Region

aten = torch.ops.aten

_CASTS = {
    aten.to.dtype_layout,
    aten.to.dtype,
    aten.to.device,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
}
_ARANGES = {aten.arange.default: 0, aten.arange.start: 1, aten.arange.start_step: 1}


@dataclass(frozen=True)
class Prefix:
    """A mask as a length kernel takes it.

    ``keys`` cuts all rows to that many keys before the call; None leaves them.  ``has_lengths``: the number of visible
    keys differs by row or is known at run time only.  ``window_left`` and ``window_right`` are None where there is no
    such limit; ``causal`` implies no key to the right.  ``may_be_empty``: a query may see no key, for which the program
    gives zeros.  ``same_for_all_rows``: the lengths do not depend on the batch row.
    """

    keys: int | None = None
    has_lengths: bool = False
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    may_be_empty: bool = False
    same_for_all_rows: bool = True

    @property
    def has_window(self) -> bool:
        return self.window_left is not None or self.window_right is not None


@dataclass(frozen=True)
class PrefixInputs:
    """Nodes for a call: ``query`` [B, Hq, M, Dk], ``key`` and ``value`` with the visible keys only where that number is
    static, ``lengths`` int32 [B], between 0 and the number of keys, or None."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    lengths: fx.Node | None


def find_prefix(region: Region) -> Prefix | str:
    """How a length kernel runs the region's mask, or why it cannot give exactly the program's answer."""
    a = region.attention
    assert a is not None
    why_not = _not_a_range(a.mask)
    if why_not:
        return why_not
    if any(statically_known_true(size == 0) for size in (a.batch, a.queries, a.keys)):
        return "a dimension is empty"
    if a.mask.is_trivial:
        return Prefix()
    if a.mask.is_causal and statically_known_true(a.queries == a.keys):
        return Prefix(causal=True)
    if not isinstance(a.queries, int) or not isinstance(a.keys, int):
        return _bottom_right(a)
    return _read(a, region.output.graph, taken_on_trust=False)


def _bottom_right(attention: Attention) -> Prefix | str:
    """A causal limit, with a window or without, that ends at the last key for the last query, at every length.

    So it is for new tokens behind a cache that grows: ``keys - queries`` tokens stand in front of the first query.
    """
    form, past = attention.mask, attention.keys - attention.queries
    uppers, lowers = ([_number(bound) for bound in bounds] for bounds in (form.upper, form.lower))
    if (
        form.start
        or form.stop
        or not all(upper is not None and statically_known_true(upper == past) for upper in uppers)
    ):
        return "the mask depends on a symbolic number of queries or keys"
    if not statically_known_true(past >= 0):
        return "no proof that as many keys exist as queries"
    windows = [None if lower is None else _static(past - lower) for lower in lowers]
    if not uppers or any(window is None for window in windows):
        return "the window's size is not static"
    window = min(windows) if windows else None  # type: ignore[type-var]
    return "the window is empty" if window is not None and window < 0 else Prefix(causal=True, window_left=window)


def _number(bound: Bound) -> int | torch.SymInt | None:
    """The value of a bound as far as sizes and scalars of the graph tell; None when it is read from a tensor."""
    total: int | torch.SymInt = bound.const
    for coefficient, read in bound.reads:
        value = read.node.meta["val"]
        if not isinstance(value, (int, torch.SymInt)):
            return None
        total = total + coefficient * value
    return total


def _static(value: int | torch.SymInt) -> int | None:
    return value if isinstance(value, int) else value.node.maybe_as_int()


def accepted_prefix(region: Region) -> Prefix:
    """The prefix of a region that :func:`find_prefix` took, also where the region was moved to a graph of its own.

    There the cache write that carried the proof is missing, so positions are taken to be inside the cache.

    Raises:
        ValueError: the region was not taken.
    """
    prefix = find_prefix(region)
    if isinstance(prefix, str) and region.attention is not None:
        prefix = _read(region.attention, region.output.graph, taken_on_trust=True)
    if isinstance(prefix, str):
        raise ValueError(prefix)
    return prefix


def _read(attention: Attention, graph: fx.Graph, taken_on_trust: bool) -> Prefix | str:
    prefix = _Reading(attention, graph, taken_on_trust).prefix()
    empty_row = attention.mask.empty_row
    if isinstance(prefix, Prefix) and prefix.may_be_empty and empty_row != "zero":
        return f"a row may see no key: these kernels give zeros, the program {empty_row!r}"
    return prefix


def _not_a_range(form: MaskForm) -> str | None:
    if not form.proved:
        return f"the mask is not proved: {form.unproved}" if form.unproved else "the mask is not proved"
    if form.chunk:
        return "takes no chunked mask"
    if form.documents:
        return "takes no packed documents"
    if form.key_padding or form.key_hidden:
        return "takes no key padding: whether it is a prefix is known at run time only"
    return None


class _Reading:
    """One mask read as a length; drops the terms that hide nothing."""

    def __init__(self, attention: Attention, graph: fx.Graph, taken_on_trust: bool) -> None:
        form = attention.mask
        self.queries, self.keys = int(attention.queries), int(attention.keys)
        self.graph = graph
        self.unknown = (0, self.keys - self.queries) if taken_on_trust else None
        self.uppers = [u for u in form.upper if not _at_least(self._low(u), self.keys - 1)]
        self.stops = [s for s in form.stop if not _at_least(self._low(s), self.keys)]
        self.lowers = [b for b in form.lower if not _at_most(self._high(b), 1 - self.queries)]
        self.starts = [s for s in form.start if not _at_most(self._high(s), 0)]
        if self.queries == 1:
            self.uppers += [_shifted(stop, -1) for stop in self.stops]
            self.lowers += self.starts
            self.stops, self.starts = [], []

    def prefix(self) -> Prefix | str:
        if self.starts:
            return "keys in front are hidden from several queries"
        if self.uppers:
            self.stops = [stop for stop in self.stops if not self._stop_hides_nothing(stop)]
            return "both a causal limit and a number of keys" if self.stops else self._causal()
        if self.stops:
            return "both a window and a number of keys" if self.lowers else self._full()
        return self._window_to_the_left() if self.lowers else Prefix()

    def _full(self) -> Prefix | str:
        """Every query sees the same keys."""
        return self._with_length(self.stops, causal=False, may_be_empty=not self._all_at_least(self.stops, 1))

    def _causal(self) -> Prefix | str:
        """``k <= q + u`` for the smallest ``u``, and ``k >= q + l`` for the greatest ``l``."""
        several = self.queries > 1
        past_the_end = self.keys - self.queries
        fits = any(_at_most(self._high(upper), past_the_end) for upper in self.uppers)
        static = all(upper.is_static for upper in self.uppers)
        may_be_empty = not self._all_at_least(self.uppers, 0)
        if several and not fits:
            return self._window(may_be_empty) if static else "no proof that as many keys exist as the mask may show"
        window: int | None = None
        if self.lowers:
            if not fits:
                return "no proof that the window ends inside the keys"
            differences = self._static_differences(self.uppers, self.lowers)
            if differences is None:
                return "the window's size is not static"
            window = min(differences)
            if window < 0:
                return "the window is empty"
        lengths = [_shifted(upper, self.queries) for upper in self.uppers]
        return self._with_length(lengths, several or window is not None, may_be_empty, window)

    def _window(self, may_be_empty: bool) -> Prefix | str:
        """Static limits of which the right one lies past the last key of the last query."""
        right = min(upper.const for upper in self.uppers) - (self.keys - self.queries)
        left = self._window_to_the_left() if self.lowers else Prefix()
        if isinstance(left, str):
            return left
        return Prefix(window_left=left.window_left, window_right=right, may_be_empty=may_be_empty)

    def _window_to_the_left(self) -> Prefix | str:
        """``k >= q + l`` alone: counted from the last of all keys."""
        if not all(lower.is_static for lower in self.lowers):
            return "the window's start is not static"
        left = self.keys - self.queries - max(lower.const for lower in self.lowers)
        return Prefix(window_left=left) if left >= 0 else "the window is empty"

    def _with_length(
        self, lengths: list[Bound], causal: bool, may_be_empty: bool, window_left: int | None = None
    ) -> Prefix | str:
        if not all(length.is_static for length in lengths):
            by_row = any("b" in read.axes for length in lengths for _, read in length.reads)
            return Prefix(None, True, causal, window_left, None, may_be_empty, same_for_all_rows=not by_row)
        keys = min(length.const for length in lengths)
        if keys <= 0:
            return "no key is visible"
        return Prefix(keys if keys < self.keys else None, False, causal, window_left, None, may_be_empty)

    def _stop_hides_nothing(self, stop: Bound) -> bool:
        """Whether some causal limit hides all that ``stop`` hides: the last query sees keys below ``M + u`` only."""
        for upper in self.uppers:
            difference = _difference(stop, upper)
            if difference is not None and difference >= self.queries:
                return True
            high = self._high(upper)
            if high is not None and _at_least(self._low(stop), self.queries + high):
                return True
        return False

    @staticmethod
    def _static_differences(uppers: list[Bound], lowers: list[Bound]) -> list[int] | None:
        if len(uppers) > 1 and not all(upper.is_static for upper in uppers):
            return None
        upper = min(uppers, key=lambda bound: bound.const)
        differences = [_difference(upper, lower) for lower in lowers]
        return None if None in differences else differences  # type: ignore[return-value]

    def _all_at_least(self, bounds: list[Bound], least: int) -> bool:
        return all(_at_least(self._low(bound), least) for bound in bounds)

    def _low(self, bound: Bound) -> int | None:
        return _extreme(bound, self.graph, False, self.unknown)

    def _high(self, bound: Bound) -> int | None:
        return _extreme(bound, self.graph, True, self.unknown)


def _at_least(value: int | None, least: int) -> bool:
    return value is not None and value >= least


def _at_most(value: int | None, most: int) -> bool:
    return value is not None and value <= most


def _shifted(bound: Bound, by: int) -> Bound:
    return Bound(bound.const + by, bound.reads)


def _difference(a: Bound, b: Bound) -> int | None:
    """``a - b`` where it is static."""
    return a.const - b.const if sorted(a.reads, key=str) == sorted(b.reads, key=str) else None


# -- what cache writes prove about values that are known at run time only


@dataclass(frozen=True)
class _Positions:
    """A write that PyTorch refuses unless ``low <= node <= high`` held for the tensor's elements when it was read."""

    node: fx.Node
    version: int
    low: int
    high: int


def _extreme(bound: Bound, graph: fx.Graph, highest: bool, unknown: tuple[int, int] | None) -> int | None:
    """The greatest (or smallest) value that ``bound`` can have, None when nothing is known.

    ``unknown`` are the limits of a read of which nothing is proved."""
    total = bound.const
    for coefficient, read in bound.reads:
        upwards = highest == (coefficient > 0)
        limit = _read_limit(read, graph, upwards)
        if limit is None and unknown is not None and not read.axes:
            limit = unknown[upwards]
        if limit is None:
            return None
        total += coefficient * limit
    return total


def _read_limit(read: Read, graph: fx.Graph, highest: bool) -> int | None:
    if read.axes:
        return None
    known = [p for p in _proofs(graph) if p.node is read.node and p.version == read.version]
    if not known:
        return None
    return min(p.high for p in known) if highest else max(p.low for p in known)


def _proofs(graph: fx.Graph) -> list[_Positions]:
    """What the writes in the graph prove, looked for once.

    The graph itself carries it: a proof names nodes and these name their graph, so that a table beside it, even one
    with weak keys, would keep every graph alive.
    """
    carried = vars(graph)
    if "_lz_compile_positions" not in carried:
        carried["_lz_compile_positions"] = _find_positions(graph)
    return carried["_lz_compile_positions"]


def _find_positions(graph: fx.Graph) -> list[_Positions]:
    writes = [n for n in graph.nodes if n.target in (aten.index_copy_.default, aten.index_copy.default)]
    if not writes:
        return []
    aliases = Aliases(graph)
    found = [_positions(write, aliases) for write in writes]
    return [positions for positions in found if positions is not None]


def _positions(write: fx.Node, aliases: Aliases) -> _Positions | None:
    """What ``cache.index_copy_(dim, index, ...)`` proves: ``0 <= x <= size - n`` of an index ``arange(n) + x``; of any
    other, that it is inside."""
    cache, dim, index = write.args[:3]
    assert isinstance(cache, fx.Node) and isinstance(dim, int) and isinstance(index, fx.Node)
    size = cache.meta["val"].shape[dim]
    count = index.meta["val"].numel()
    if not isinstance(size, int) or not isinstance(count, int) or count == 0:
        return None
    if not statically_known_true(cache.meta["val"].numel() > 0):  # a write of nothing is not checked
        return None
    base = _without_casts(index, write, aliases)
    if base is None:
        return None
    if aliases.written_between(base, base, write):
        return None
    if base.target is not aten.add.Tensor or base.kwargs:
        return _Positions(base, aliases.version(base, write), 0, size - 1)
    for counting, start in (base.args[:2], base.args[1::-1]):
        if not (isinstance(counting, fx.Node) and isinstance(start, fx.Node) and _counts_from_zero(counting, count)):
            continue
        if aliases.written_between(counting, counting, base):
            continue
        node = _without_casts(start, base, aliases)
        if node is not None and node.meta["val"].numel() == 1:
            return _Positions(node, aliases.version(node, base), 0, size - count)
    return None


def _without_casts(node: fx.Node, user: fx.Node, aliases: Aliases) -> fx.Node | None:
    """The integer tensor whose values ``user`` reads through casts that keep them; None when it was written between."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    reader = user
    while node.target in _CASTS and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        narrow, wide = node.meta["val"].dtype, source.meta["val"].dtype
        if narrow.is_floating_point or wide.is_floating_point or narrow.itemsize < wide.itemsize:
            break
        if aliases.written_between(node, node, user):
            return None
        node, reader = source, node
    if aliases.version(node, reader) != aliases.version(node, user):
        return None
    return node


def _counts_from_zero(node: fx.Node, count: int) -> bool:
    position = _ARANGES.get(node.target)  # type: ignore[arg-type]
    if position is None or node.meta["val"].dtype.is_floating_point:
        return False
    start = node.args[0] if position else 0
    step = node.args[2] if len(node.args) > 2 else 1
    return start == 0 and step == 1 and node.args[position] == count


# -- emission


def emit_prefix(emitter: Emitter, region: Region, prefix: Prefix) -> PrefixInputs:
    """Query, key, value and lengths for a kernel that takes ``prefix``."""
    query, key, value = emitter.inputs(region)
    if prefix.keys is not None:
        key, value = (emitter.call(region.output, aten.slice.Tensor, x, 2, 0, prefix.keys) for x in (key, value))
    return PrefixInputs(query, key, value, _lengths(emitter, region) if prefix.has_lengths else None)


def _lengths(emitter: Emitter, region: Region) -> fx.Node:
    """int32 [B]: how many keys the last query of each batch row sees."""
    a = region.attention
    assert a is not None
    bounds = emitter.mask_arguments(region).bounds
    assert bounds is not None

    def build() -> fx.Node:
        upper = emitter.call(region.output, aten.select.int, bounds, 1, UPPER)
        stop = emitter.call(region.output, aten.select.int, bounds, 1, STOP)
        length = emitter.call(region.output, aten.add.Tensor, upper, a.queries)
        length = emitter.call(region.output, aten.minimum.default, length, stop)
        return emitter.call(region.output, aten.clamp.default, length, 0, a.keys)

    return emitter.shared(("lengths", bounds, a.queries, a.keys), build)
