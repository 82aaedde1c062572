"""Brings the mask of an attention into :class:`~lz_compile.mask.MaskForm`, or says where the proof stopped.

Enters: a pre-dispatch ATen graph and its :class:`~lz_compile.aliasing.Aliases`.  Leaves: :class:`MaskProver`, asked
once per attention.  A proof evaluates one entry of the mask (``mask_evaluation``, with the meaning of each operator in
``mask_views`` and ``mask_operators``) and sorts the predicate that results into terms (``mask_form``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases, written_arguments
from lz_compile.mask import EMPTY_ROWS_OF_SOFTMAX, EmptyRow, EmptyRows, MaskForm, readable_name
from lz_compile.patterns.mask_evaluation import Evaluator
from lz_compile.patterns.mask_form import FormBuilder
from lz_compile.patterns.symbolic import Boolean, Choice, Expr, Space, const_value
from lz_compile.patterns.symbolic_numbers import EXACT_UP_TO
from lz_compile.patterns.symints import SymInts

Shape = tuple[Any, ...]


class MaskProver:
    """Proves the masks of one graph; each distinct mask is proved once for all layers.

    ``shape`` is ``(B, H, M, N)`` of the scores, as ints or SymInts; a mask of any rank up to four broadcasts to it.
    ``at`` is the node that reads the mask.
    """

    def __init__(self, graph: fx.Graph, aliases: Aliases) -> None:
        self._aliases = aliases
        self._sizes = SymInts(graph)
        self._writes = {node: written for node in graph.nodes if (written := written_arguments(node))}
        self._evaluators: dict[tuple[str, ...], Evaluator] = {}
        self._proved: dict[tuple[Any, ...], MaskForm] = {}

    def keep(self, mask: fx.Node, shape: Shape, at: fx.Node, empty_row: EmptyRow = "zero") -> MaskForm:
        """The form of a boolean mask that is True where a key is visible."""
        return self._prove(_BooleanMask(mask, empty_row, hides=False), shape, at)

    def hide(self, mask: fx.Node, shape: Shape, at: fx.Node, empty_row: EmptyRow) -> MaskForm:
        """The form of a boolean mask that is True where a key is hidden."""
        return self._prove(_BooleanMask(mask, empty_row, hides=True), shape, at)

    def add(self, mask: fx.Node, shape: Shape, at: fx.Node, empty_rows: EmptyRows = EMPTY_ROWS_OF_SOFTMAX) -> MaskForm:
        """The form of a float mask that is added to the scores.

        It is proved when its entries are 0 or one value that hides a key: -inf, or the least finite number of its
        dtype.  ``empty_rows`` says what a row without visible keys gives in each case.
        """
        return self._prove(_AdditiveMask(mask, empty_rows), shape, at)

    def _prove(self, mask: _BooleanMask | _AdditiveMask, shape: Shape, at: fx.Node) -> MaskForm:
        sizes = tuple(map(str, shape))
        key = (mask, self._aliases.version(mask.node, at), sizes)
        if key not in self._proved:
            if sizes not in self._evaluators:
                self._evaluators[sizes] = Evaluator(self._aliases, self._sizes, self._writes, shape)
            try:
                self._proved[key] = mask.prove(self._evaluators[sizes], at)
            except RecursionError:
                self._proved[key] = mask.unproved("the mask is built too deep in the graph")
        return self._proved[key]


@dataclass(frozen=True)
class _BooleanMask:
    """A mask that keeps, or with ``hides`` hides, the keys where it is True."""

    node: fx.Node
    empty_row: EmptyRow
    hides: bool

    def prove(self, e: Evaluator, at: fx.Node) -> MaskForm:
        name, dtype = readable_name(self.node), self.node.meta["val"].dtype
        if dtype != torch.bool:
            return self.unproved(f"{name} is a mask of {dtype}")
        value = e.entry(self.node, at)
        if not isinstance(value, Boolean):
            return self.unproved(f"{name} does not broadcast to the scores")
        terms, why = FormBuilder(e, at).build(e.space.invert(value) if self.hides else value)
        return self.unproved(why, **terms) if why else MaskForm(**terms, empty_row=self.empty_row)

    def unproved(self, why: str, **terms: Any) -> MaskForm:
        return MaskForm(**terms, dense=self.node, dense_hides=self.hides, empty_row=self.empty_row, unproved=why)


@dataclass(frozen=True)
class _AdditiveMask:
    """A float mask that is added to the scores."""

    node: fx.Node
    empty_rows: EmptyRows

    def prove(self, e: Evaluator, at: fx.Node) -> MaskForm:
        dtype = self.node.meta["val"].dtype
        value = e.entry(self.node, at) if dtype in EXACT_UP_TO else None
        if value is None:
            return self.unproved(f"{readable_name(self.node)} is an additive mask of {dtype}")
        leaves: dict[str, str] = {}
        terms, why = FormBuilder(e, at).build(_shown(e.space, value, torch.finfo(dtype).min, leaves))
        if "other" in leaves:
            why = f"it adds {leaves['other']}"
        elif "least" in leaves and "infinite" in leaves:
            why = "it adds both -inf and the least finite number"
        if why:
            # What hides a key for good may still narrow the range of a kernel that adds the rest.
            return self.unproved(why, **terms)
        if "infinite" in leaves:
            return MaskForm(**terms, empty_row=self.empty_rows.infinite)
        return MaskForm(**terms, empty_row=self.empty_rows.finite) if "least" in leaves else MaskForm(**terms)

    def unproved(self, why: str, **terms: Any) -> MaskForm:
        return MaskForm(**terms, bias=self.node, empty_row=self.empty_rows.bias, unproved=why)


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
