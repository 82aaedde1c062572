"""Which token, expert or pair each row of a tensor belongs to: index vectors of routed experts, read by what they hold.

A token that chose K experts is K *pairs*, numbered ``token * K + slot``.  Models work on the rows of all pairs, in that
order or sorted by expert, and an index vector says what each row holds.  :class:`Routing` proves it from the vector's
making, so that any spelling made of these steps is read alike.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.walk import (
    CASTS,
    COPIES,
    RESHAPES,
    arguments,
    aten,
    fake,
    same,
    same_shape,
    scalar,
    target,
    tensor,
)

# All of these keep the order of elements, so that shapes alone say what they do.
KEEPS_ORDER = RESHAPES | {
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
}
_SORTS = {aten.sort.default, aten.sort.stable}
_ARGSORTS = {aten.argsort.default, aten.argsort.stable}
_PUTS = {aten.index_put.default, aten.index_put_.default}
ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_FILLS = {aten.masked_fill.Scalar, aten.masked_fill_.Scalar}
_CLAMPS = {aten.clamp.default, aten.clamp_.default}
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Rows:
    """What row ``i`` of an index vector holds, for rows in an order: of pairs (None), or of the sort by expert.

    ``"expert"``, ``"token"`` and ``"pair"`` are those of the row; a ``"place"``, only for rows in the order of pairs,
    is where the sort ``of`` has put the pair.
    """

    what: Literal["expert", "token", "pair", "place"]
    order: fx.Node | None = None
    of: fx.Node | None = None


def taken(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """``(source, index)`` of ``source[index]`` along the first dimension; None for anything else."""
    kind = target(node)
    if kind is aten.index.Tensor and len(node.args[1]) == 1 and isinstance(node.args[1][0], fx.Node):
        return node.args[0], node.args[1][0]
    if kind is aten.index_select.default and node.args[1] == 0:
        return node.args[0], node.args[2]
    return None


def behind_order(node: Any) -> list[fx.Node]:
    """A value and those it was made of by steps that change neither elements nor their order, the last one first."""
    found = []
    while isinstance(node, fx.Node):
        found.append(node)
        value, source = fake(node), fake(node.args[0]) if node.args else None
        keeps = target(node) in KEEPS_ORDER
        if target(node) in CASTS:
            keeps = value is not None and source is not None and value.dtype == source.dtype
        node = node.args[0] if keeps else None  # type: ignore[assignment]
    return found


class Routing:
    """Index vectors over the choice ``chosen``, integer ``[T, K]``, of which each is in ``[0, experts)``."""

    def __init__(self, chosen: fx.Node, experts: int, aliases: Aliases) -> None:
        self.chosen = chosen
        self.experts = experts
        self.aliases = aliases
        self.tokens, self.top_k = tensor(chosen).shape
        self.pairs = self.tokens * self.top_k

    def rows(self, node: Any) -> Rows | None:
        """What an integer vector ``[T * K]`` holds, None where that is not known."""
        value = fake(node)
        if value is None or value.dtype not in _INTEGERS or value.dim() != 1 or not same(value.shape[0], self.pairs):
            return None
        base = self._base(node)
        kind = target(base)
        if base is self.chosen:
            return Rows("expert")
        if kind is operator.getitem and target(base.args[0]) in _SORTS:
            return self._sorted(base.args[0], values=base.args[1] == 0)  # type: ignore[arg-type]
        if kind in _ARGSORTS:
            return self._sorted(base, values=False)
        if kind in ARANGES:
            return Rows("pair") if self._counts(base, self.pairs) else None
        if kind in (aten.floor_divide.default, aten.div.Tensor_mode):
            return self._divided(base)
        if kind in (aten.expand.default, aten.repeat_interleave.self_int):
            return Rows("token") if self.repeats(base) and self._counts(self._base(base.args[0]), self.tokens) else None
        if kind in _PUTS:
            return self._inverse(base)
        found = taken(base)
        return self._taken(*found) if found is not None else None

    def behind(self, node: Any) -> fx.Node:
        """Behind steps that keep values and their order, and fills of the rows whose expert does not exist.

        Expert parallelism marks pairs that another device serves by a number of ``experts`` or more.
        """
        while True:
            node = behind_order(node)[-1]
            if target(node) not in _FILLS or not self._never(node.args[1]):
                return node
            if fake(node.args[0]) is None or not same_shape(tensor(node).shape, tensor(node.args[0]).shape):
                return node
            node = node.args[0]

    def fills_nothing(self, node: Any) -> bool:
        """Whether ``node`` is a fill of rows of which there are none."""
        return target(node) in _FILLS and self.behind(node) is not node

    def repeats(self, node: fx.Node) -> bool:
        """Whether ``node`` repeats each row of its input, one a token, for every pair of the token."""
        value, source = fake(node), fake(node.args[0])
        if value is None or source is None:
            return False
        if target(node) is aten.repeat_interleave.self_int:
            known = arguments(node)
            along = known["dim"] == 0 or (known["dim"] is None and source.dim() == 1)
            return along and same(source.shape[0], self.tokens) and same(known["repeats"], self.top_k)
        rest = value.shape[2:]
        return (
            target(node) is aten.expand.default
            and same_shape(source.shape, (self.tokens, 1, *rest))
            and same_shape(value.shape, (self.tokens, self.top_k, *rest))
        )

    def counts_experts(self, node: Any, experts: int) -> bool:
        """Whether ``node`` is ``[experts]``, how many pairs come before the end of each expert's share."""
        value = fake(node)
        if target(node) is not aten.cumsum.default or value is None or value.dtype not in _INTEGERS:
            return False
        counts = behind_order(node.args[0])[-1]
        if target(counts) in CASTS and fake(counts) is not None and tensor(counts).dtype in _INTEGERS:
            counts = behind_order(counts.args[0])[-1]
        if target(counts) is not aten.histc.default:
            return False
        known = arguments(counts)
        if (known["bins"], known["min"], known["max"]) != (experts, 0, experts - 1):
            return False
        ids = known["self"]
        # Numbers of experts are exact in float32.
        if target(ids) in CASTS and tensor(ids).dtype in (torch.float32, torch.float64):
            ids = ids.args[0]
        rows = self.rows(ids)
        return rows is not None and rows.what == "expert"

    def _base(self, node: Any) -> fx.Node:
        """Behind steps that keep values and their order; casts between integers keep them."""
        while True:
            chain = behind_order(node)
            if self.chosen in chain:
                return self.chosen
            node = chain[-1]
            value = fake(node)
            if self.clamps_nothing(node):
                node = node.args[0]
                continue
            if target(node) not in CASTS | COPIES or value is None or value.dtype not in _INTEGERS:
                return node
            if fake(node.args[0]) is None or tensor(node.args[0]).dtype not in _INTEGERS:
                return node
            node = node.args[0]

    def _never(self, mask: Any) -> bool:
        """Whether a mask is True only for experts that do not exist."""
        compared = behind_order(mask)[-1]
        if target(compared) is not aten.ge.Scalar:
            return False
        rows, least = self.rows(compared.args[0]), compared.args[1]
        return rows is not None and rows.what == "expert" and isinstance(least, int) and least >= self.experts

    def clamps_nothing(self, node: fx.Node) -> bool:
        """Whether ``node`` is a clamp that leaves the number of every expert as it is."""
        if target(node) not in _CLAMPS:
            return False
        known = arguments(node)
        low, high = known["min"], known["max"]
        keeps = (low is None or (isinstance(low, int) and low <= 0)) and (
            high is None or (isinstance(high, int) and high >= self.experts - 1)
        )
        rows = self.rows(node.args[0]) if keeps else None
        return rows is not None and rows.what == "expert"

    def _sorted(self, node: fx.Node, values: bool) -> Rows | None:
        known = arguments(node)
        rows = self.rows(known["self"])
        if rows is None or known["descending"] or known["dim"] not in (0, -1):
            return None
        if rows == Rows("expert"):
            return Rows("expert" if values else "pair", node)
        if rows.what == "pair" and rows.order is not None and not values:
            return Rows("place", of=rows.order)
        return None

    def _divided(self, node: fx.Node) -> Rows | None:
        known = arguments(node)
        if known.get("rounding_mode", "floor") not in ("floor", "trunc"):
            return None
        rows, divisor = self.rows(known["self"]), scalar(known["other"], self.aliases)
        if rows is None or rows.what != "pair" or divisor is None or not same(divisor, self.top_k):
            return None
        return Rows("token", rows.order)

    def _taken(self, source: fx.Node, index: fx.Node) -> Rows | None:
        held, by = self.rows(source), self.rows(index)
        if held is None or by is None:
            return None
        if held.order is None and held.of is None and by.what == "pair":
            return Rows(held.what, by.order)
        if held.order is not None and by.what == "place" and by.of is held.order:
            return Rows(held.what)
        return None

    def _inverse(self, node: fx.Node) -> Rows | None:
        """``into[permutation] = arange``: every element is written, whatever ``into`` held."""
        known = arguments(node)
        indices, into = known["indices"], fake(known["self"])
        if known["accumulate"] or len(indices) != 1 or into is None or into.dim() != 1:
            return None
        rows, values = self.rows(indices[0]), self.rows(known["values"])
        if rows is None or rows.what != "pair" or rows.order is None or values != Rows("pair"):
            return None
        return Rows("place", of=rows.order)

    def _counts(self, node: fx.Node, end: Any) -> bool:
        """Whether a node is 0, 1, ... up to ``end``."""
        if target(node) not in ARANGES:
            return False
        known = arguments(node)
        return known.get("start", 0) == 0 and known.get("step", 1) == 1 and same(tensor(node).shape[0], end)
