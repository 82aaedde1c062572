"""Spelled-out scores in one shape: ``softcap(scale * product) + mask``, with a single mask.

Models write a bias and a mask one after the other (T5's relative positions, ALiBi), let ``baddbmm`` add the bias, scale
after the bias, add in a view of other dimensions (decomposed relative positions), fill where a bias was added, or lift
masked scores from -inf to the least finite number.  Sums do not care for their order, so here all that is added becomes
one mask: ``(s + bias) + mask = s + (bias + mask)``, and ``bias + mask`` is computed once for all layers that share it;
``max(s + mask, least) = s + max(mask, least)`` for every score that is no astronomical number.  A factor that is known
only at run time, but the same for all keys of a query (a learned temperature), goes to the queries.

Enters: a normalised graph.  Leaves: the same graph, in which the scores of such a site are rebuilt in front of whatever
read them; a site that needs no change, or of which any step is not understood, stays as it was.  Gradients stay as they
were, too: a site that needs them is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.compat import fake_mode_of
from lz_compile.gradients import needs_gradient
from lz_compile.insert import insert_call
from lz_compile.patterns.einsum import is_plain, spell_scores, spell_weights
from lz_compile.patterns.steps import (
    FILLS,
    FLOORS,
    PRODUCTS,
    SCALES,
    WHERE,
    adds_nothing,
    floor_of,
    leads_to_product,
    row_factor,
    scale_factor,
    softcap_of,
)
from lz_compile.patterns.walk import (
    CASTS,
    COPIES,
    FUNCTIONAL,
    RESHAPES,
    arguments,
    aten,
    fake,
    same,
    same_shape,
    scalar,
    target,
)

_SUMS = {aten.add.Tensor, aten.sub.Tensor}

_LIKE = {
    aten.reshape_as.default: aten.reshape.default,
    aten.view_as.default: aten.view.default,
    aten.expand_as.default: aten.expand.default,
}


class _Left(Exception):
    """The site is left as it is; the message, where there is one, says what no kernel can take."""


@dataclass
class _Step:
    """One step on the way from the product to the softmax.

    ``kind`` is ``add`` (of ``factor`` times ``value``), ``hide`` or ``keep`` (``value`` is the condition, ``factor``
    the number that is filled in), ``floor`` (``max`` with ``factor``), ``scale`` or ``softcap`` (by ``factor``), or
    ``temper`` (times ``value`` where ``factor`` is 1, over it where that is -1).  ``shape`` is the scores' shape there.
    """

    kind: str
    node: fx.Node
    shape: torch.Size
    value: fx.Node | None = None
    factor: float = 1.0


@dataclass
class _Chain:
    """The scores of one site: ``first`` is the product, ``last`` the node that the softmax reads."""

    first: fx.Node
    last: fx.Node
    steps: list[_Step] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    levels: list[torch.Size] = field(default_factory=list)
    reshaped: bool = False


class ScoreWriter:
    """Rebuilds scores in one graph; sums that several layers share are computed once.

    ``reasons`` says why scores were left as they are, by their last node, where that is worth saying.
    """

    def __init__(self, graph: fx.Graph, aliases: Aliases) -> None:
        self._graph = graph
        self._aliases = aliases
        self._shared: dict[Any, fx.Node] = {}
        self.reasons: dict[fx.Node, str] = {}
        self._fake_mode = fake_mode_of([node.meta.get("val") for node in graph.nodes])

    def unify(self, last: fx.Node) -> fx.Node | None:
        """The scores of ``last`` in one shape, read by whoever read ``last``; None when nothing was changed."""
        try:
            chain = self._read(last)
            if _is_canonical(chain):
                return None
            self._require_unwritten(chain)
            return self._write(chain)
        except _Left as left:
            self.reasons[last] = str(left)
            return None

    def spell_products(self, products: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> bool:
        """Writes queries times keys, and weights times values, as ``matmul`` where a permuted ``einsum`` was, or where
        one ``permute`` both moved and transposed the keys; False when nothing was changed.  No node may come twice."""
        spelled = [self._spell_keys(product) for product in products]
        spelled += [spell_scores(product, self._fake_mode) for product in products if not is_plain(product)]
        spelled += [spell_weights(output, self._fake_mode) for output in outputs if not is_plain(output)]
        return any(spelled)

    def _spell_keys(self, product: fx.Node) -> bool:
        if target(product) not in (aten.matmul.default, aten.bmm.default) or needs_gradient(product):
            return False
        permuted: Any = product.args[1]
        value = fake(permuted)
        if target(permuted) is not aten.permute.default or value is None or value.dim() < 3:
            return False
        source, order = permuted.args[0], [dim % value.dim() for dim in permuted.args[1]]
        if order == [*range(value.dim() - 2), value.dim() - 1, value.dim() - 2]:
            return False
        if order[-1] == value.dim() - 1:  # nothing was transposed
            return False
        keys = self._call(product, aten.permute.default, source, [*order[:-2], order[-1], order[-2]])
        product.replace_input_with(permuted, self._call(product, aten.transpose.int, keys, -1, -2))
        return True

    def spell_shapes(self) -> bool:
        """Says the sizes where a view takes its shape from scores, so that it no longer reads them."""
        changed = False
        for node in [node for node in self._graph.nodes if target(node) in _LIKE]:
            shape = fake(node).shape  # type: ignore[union-attr]
            if leads_to_product(node.args[1]) and all(isinstance(size, int) for size in shape):
                node.replace_all_uses_with(self._call(node, _LIKE[target(node)], node.args[0], list(shape)))
                self._graph.erase_node(node)
                changed = True
        return changed

    # -- reading

    def _read(self, last: fx.Node) -> _Chain:
        chain = _Chain(last, last)
        node: Any = last
        while target(node) not in PRODUCTS:
            before = self._step(chain, node)
            if node is not last and len(node.users) != 1:
                raise _Left
            if node.target in FUNCTIONAL and node.args[0] is not before:  # written into a tensor of someone else's
                raise _Left
            chain.nodes.append(node)
            node = before
        if len(node.users) != 1 or needs_gradient(last):
            raise _Left
        chain.first = node
        chain.nodes.append(node)
        shape = fake(node).shape  # type: ignore[union-attr]
        chain.levels.append(shape)
        if target(node) is aten.baddbmm.default:
            known = arguments(node)
            if known["beta"]:
                chain.steps.append(_Step("add", node, shape, known["self"], float(known["beta"])))
            if known["alpha"] != 1:
                chain.steps.append(_Step("scale", node, shape, None, float(known["alpha"])))
        chain.steps.reverse()
        return chain

    def _step(self, chain: _Chain, node: Any) -> fx.Node:
        """Notes what one node does to the scores; returns the scores in front of it."""
        kind, value = target(node), fake(node)
        if value is None or not value.dtype.is_floating_point:
            raise _Left
        shape = value.shape
        if kind in CASTS | COPIES | RESHAPES:
            before = node.args[0]
            if kind in RESHAPES and not same_shape(fake(before).shape, shape):  # type: ignore[union-attr]
                chain.levels.append(shape)
                chain.reshaped = chain.reshaped or not _is_stacking(fake(before).shape, shape)  # type: ignore[union-attr]
            return before
        if adds_nothing(node, self._aliases):
            return node.args[0]
        if kind in FLOORS:
            floor = floor_of(node, self._aliases)
            if floor is None:
                raise _Left
            chain.steps.append(_Step("floor", node, shape, None, floor[0]))
            return floor[1]
        if kind in _SUMS:
            left, right = node.args[:2]
            sign = arguments(node)["alpha"] * (1 if kind is aten.add.Tensor else -1)
            if leads_to_product(right) and not leads_to_product(left) and sign == 1:
                left, right = right, left
            term = fake(right)
            if term is None or not term.dtype.is_floating_point or not leads_to_product(left):
                raise _Left
            chain.steps.append(_Step("add", node, shape, right, float(sign)))
            return left
        if kind in FILLS:
            keeps = kind in WHERE
            before, condition = (node.args[1], node.args[0]) if keeps else node.args[:2]
            fill = scalar(node.args[2], self._aliases)
            if fill is None or not fill <= torch.finfo(value.dtype).min:
                raise _Left
            chain.steps.append(_Step("keep" if keeps else "hide", node, shape, condition, fill))
            return before
        if kind in SCALES:
            cap = softcap_of(node, self._aliases)
            if cap is not None:
                if any(len(inner.users) != 1 for inner in cap.inside):
                    raise _Left
                chain.nodes += cap.inside
                chain.steps.append(_Step("softcap", node, shape, None, cap.cap))
                return cap.scores
            found = scale_factor(node, self._aliases)
            if found is None:
                tempered = row_factor(node)
                if tempered is None:
                    raise _Left("the scores are multiplied by a tensor that may differ from key to key")
                divides = kind in (aten.div.Tensor, aten.div.Scalar)
                chain.steps.append(_Step("temper", node, shape, tempered[0], -1.0 if divides else 1.0))
                return tempered[1]
            chain.steps.append(_Step("scale", node, shape, None, found[0]))
            return found[1]
        raise _Left

    def _require_unwritten(self, chain: _Chain) -> None:
        """Everything is read later than it was: it has to hold the same values there."""
        reads = [(step.value, step.node) for step in chain.steps if step.value is not None]
        reads += [(value, chain.first) for value in chain.first.all_input_nodes]
        for value, reader in reads:
            if needs_gradient(value) or self._aliases.written_between(value, reader, chain.last):
                raise _Left

    # -- writing

    def _write(self, chain: _Chain) -> fx.Node:
        anchor = chain.last.next
        final = _level_of_mask(chain)
        before, softcap, mask = self._sorted(chain, final)
        tempers = [step for step in chain.steps if step.kind == "temper"]
        for step in tempers:
            _require_fit(step, chain.first)
        dtype = fake(chain.last).dtype  # type: ignore[union-attr]
        masks = self._mask(mask, anchor, chain.last, dtype, final) if mask else None
        scores = self._product(chain.first, tempers, anchor)
        if fake(scores).dtype != dtype:  # type: ignore[union-attr]
            scores = self._call(anchor, aten.to.dtype, scores, dtype)
        if before != 1.0:
            scores = self._call(anchor, aten.mul.Tensor, scores, before)
        if softcap:
            scores = self._call(anchor, aten.div.Tensor, scores, softcap)
            scores = self._call(anchor, aten.mul.Tensor, self._call(anchor, aten.tanh.default, scores), softcap)
        scores = self._reshaped(scores, final, anchor)
        if masks is not None:
            scores = self._call(anchor, aten.add.Tensor, scores, masks)
        if fake(scores).dtype != dtype:  # type: ignore[union-attr]
            scores = self._call(anchor, aten.to.dtype, scores, dtype)
        scores = self._reshaped(scores, fake(chain.last).shape, anchor)  # type: ignore[union-attr]
        chain.last.replace_all_uses_with(scores)
        for node in sorted(chain.nodes, key=self._aliases.position, reverse=True):
            node.graph.erase_node(node)
        return scores

    def _sorted(self, chain: _Chain, final: torch.Size) -> tuple[float, float, list[_Step]]:
        """The factor of the product, the softcap, and what is added or filled; a factor that comes after a bias is the
        bias's, too."""
        before, softcap = 1.0, 0.0
        mask: list[_Step] = []
        for step in chain.steps:
            if step.kind == "scale":
                if softcap or any(other.kind != "add" for other in mask):
                    raise _Left
                before *= step.factor
                for other in mask:
                    other.factor *= step.factor
            elif step.kind == "softcap":
                if softcap or mask:
                    raise _Left
                softcap = step.factor
            elif step.kind == "temper":
                if softcap or mask:
                    raise _Left
            elif step.kind != "floor" or mask:
                mask.append(step)
        if len(final) > 4:
            raise _Left
        return before, softcap, mask

    def _mask(self, steps: list[_Step], anchor: fx.Node, at: fx.Node, dtype: torch.dtype, final: torch.Size) -> fx.Node:
        """What ``steps`` add to the scores, as one additive mask."""
        key: list[Any] = [dtype, str(final)]
        result: fx.Node | None = None
        for step in steps:
            if step.value is None:
                assert step.kind == "floor" and result is not None
                result = self._floored(result, step.factor, key, anchor)
                continue
            value = step.value
            key += [step.kind, value, self._aliases.version(value, at), step.factor, str(step.shape)]
            earlier = result

            def build(step: _Step = step, value: fx.Node = value, earlier: fx.Node | None = earlier) -> fx.Node:
                term = self._at_level(value, step.shape, final, anchor)
                if step.kind == "add":
                    if fake(term).dtype != dtype:  # type: ignore[union-attr]
                        term = self._call(anchor, aten.to.dtype, term, dtype)
                    if step.factor != 1.0:
                        term = self._call(anchor, aten.mul.Tensor, term, step.factor)
                    return term if earlier is None else self._call(anchor, aten.add.Tensor, earlier, term)
                if earlier is None:
                    device = fake(value).device  # type: ignore[union-attr]
                    earlier = self._call(anchor, aten.full.default, [], 0.0, dtype=dtype, device=device)
                if step.kind == "keep":
                    term = self._call(anchor, aten.logical_not.default, term)
                return self._call(anchor, aten.masked_fill.Scalar, earlier, term, step.factor)

            text = tuple(key)
            if text not in self._shared:
                self._shared[text] = build()
            result = self._shared[text]
        assert result is not None
        return result

    def _floored(self, mask: fx.Node, least: float, key: list[Any], anchor: fx.Node) -> fx.Node:
        key += ["floor", least]
        text = tuple(key)
        if text not in self._shared:
            self._shared[text] = self._call(anchor, aten.clamp.default, mask, least)
        return self._shared[text]

    def _at_level(self, value: fx.Node, level: torch.Size, final: torch.Size, anchor: fx.Node) -> fx.Node:
        """What is added to scores of shape ``level`` as what is added to the same scores in the shape ``final``."""
        if same_shape(level, final):
            return value
        shape = fake(value).shape  # type: ignore[union-attr]
        if _is_stacking(level, final) and len(final) == 4:
            if len(shape) < 3:
                return value
            if same(shape[0], 1):
                return self._call(anchor, aten.unsqueeze.default, value, 0)
            return self._call(anchor, aten.unflatten.int, value, 0, [-1, final[1]])
        if not all(isinstance(size, int) for size in (*level, *final)):
            raise _Left
        wide = self._call(anchor, aten.expand.default, value, list(level))
        return self._call(anchor, aten.reshape.default, wide, list(final))

    def _reshaped(self, scores: fx.Node, shape: torch.Size, anchor: fx.Node) -> fx.Node:
        have = fake(scores).shape  # type: ignore[union-attr]
        if same_shape(have, shape):
            return scores
        if _is_stacking(have, shape) and len(shape) == 4:
            return self._call(anchor, aten.unflatten.int, scores, 0, [-1, shape[1]])
        if _is_stacking(shape, have) and len(have) == 4:
            return self._call(anchor, aten.flatten.using_ints, scores, 0, 1)
        raise _Left

    def _product(self, first: fx.Node, tempers: list[_Step], anchor: fx.Node) -> fx.Node:
        query = _query_of(first)
        for step in tempers:
            operator = aten.mul.Tensor if step.factor == 1.0 else aten.div.Tensor
            query = self._call(anchor, operator, query, step.value)
        if target(first) is aten.baddbmm.default:
            return self._call(anchor, aten.bmm.default, query, arguments(first)["batch2"])
        if target(first) is aten.einsum.default:
            return self._call(anchor, first.target, first.args[0], [query, first.args[1][1]])  # type: ignore[index]
        return self._call(anchor, first.target, query, first.args[1])

    def _call(self, anchor: fx.Node, operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(self._fake_mode, anchor, operator, *args, **kwargs)


def _query_of(product: fx.Node) -> fx.Node:
    if target(product) is aten.baddbmm.default:
        return arguments(product)["batch1"]
    if target(product) is aten.einsum.default:
        return product.args[1][0]  # type: ignore[index, return-value]
    return product.args[0]  # type: ignore[return-value]


def _require_fit(step: _Step, product: fx.Node) -> None:
    """The tensor of a ``temper`` multiplies the queries as it did the scores, in a dtype that does not overflow."""
    factor, query = fake(step.value), fake(_query_of(product))
    if factor is None or query is None or factor.dtype != query.dtype or query.dtype == torch.float16:
        raise _Left
    if target(product) is aten.einsum.default or (factor.dim() and len(step.shape) != query.dim()):
        raise _Left
    for size, wide in zip(reversed(factor.shape), reversed(query.shape)):
        if not same(size, 1) and not same(size, wide):
            raise _Left


def _is_stacking(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether one shape is ``[B, H, M, N]`` and the other ``[B * H, M, N]``."""
    three, four = sorted((a, b), key=len)
    if len(three) != 3 or len(four) != 4 or not isinstance(four[1], int):
        return False
    return same_shape(three[1:], four[2:]) and same(three[0], four[0] * four[1])


def _level_of_mask(chain: _Chain) -> torch.Size:
    """The shape in which the mask is added: with heads apart where the site knows them."""
    last, first = fake(chain.last).shape, fake(chain.first).shape  # type: ignore[union-attr]
    for level in chain.levels:
        if _is_stacking(first, level) and len(level) == 4:
            return level
    return last


def _is_canonical(chain: _Chain) -> bool:
    """Scores that need no change: scaled, capped, then at most one mask, added with all dimensions apart."""
    if any(step.kind in ("floor", "temper") for step in chain.steps):
        return False
    masks = [i for i, step in enumerate(chain.steps) if step.kind in ("add", "hide", "keep")]
    if not masks:
        return True
    if len(masks) > 1 or masks[0] != len(chain.steps) - 1 or chain.reshaped:
        return False
    step = chain.steps[masks[0]]
    return same_shape(step.shape, _level_of_mask(chain)) and (step.kind != "add" or step.factor == 1.0)
