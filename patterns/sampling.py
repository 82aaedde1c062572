"""Filters over next-token scores, as the logits warpers of Hugging Face's Transformers spell them.

Enters: a normalised graph.  Leaves: one :class:`~lz_compile.region.Region` a chain of filters with a
:class:`~lz_compile.sampling.Sampling`, in graph order; a chain that may not be replaced carries the reason.

Each filter is read backwards from its last node.  Filters of which one reads nothing but the result of the other are
one chain; a value between them that someone else reads ends it.  A division by a number counts as a temperature only
next to another filter, or in front of a draw.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.replaceable import Declined, own
from lz_compile.patterns.walk import arguments, aten, fake, same, same_shape, scalar
from lz_compile.region import Region
from lz_compile.sampling import Filter, Sampling

_TO_THE_END = 1 << 62
# One of these is in every filter but temperature: a graph without them holds no chain.
_TELLING = {aten.topk.default, aten.sort.default, aten.scatter.src, aten.multinomial.default}


class _Other(Exception):
    """It is no filter."""


@dataclass
class _Step:
    """A filter with the scores that it reads, the node that gives its result, and all its nodes."""

    scores: fx.Node
    output: fx.Node
    filter: Filter
    nodes: set[fx.Node]


@dataclass
class _Reader:
    """Reads a filter from its end; ``nodes`` are those read so far."""

    aliases: Aliases
    nodes: set[fx.Node] = field(default_factory=set)

    def take(self, node: Any, *targets: Any) -> dict[str, Any]:
        """The arguments of a call of one of ``targets``."""
        if getattr(node, "target", None) not in targets:
            raise _Other
        self.nodes.add(node)
        return arguments(node)

    def item(self, node: Any, index: int, target: Any) -> tuple[fx.Node, dict[str, Any]]:
        """The call of which ``node`` is one result, and its arguments."""
        if getattr(node, "target", None) is not operator.getitem or node.args[1] != index:
            raise _Other
        self.nodes.add(node)
        return node.args[0], self.take(node.args[0], target)  # type: ignore[return-value]

    def last(self, node: Any, index: int, dim: int = -1) -> None:
        """Whether ``index`` or ``dim`` counts as the last of the tensor ``node``."""
        if not (index == dim or same(index, node.meta["val"].dim() + dim)):
            raise _Other

    def number(self, value: Any) -> float | fx.Node:
        """A number, or a graph value that holds one."""
        known = scalar(value, self.aliases)
        if known is not None:
            return known
        assert isinstance(value, fx.Node)  # nothing else is left
        held = fake(value)
        if held is not None and held.dim() != 0:
            raise _Other
        return value

    def written(self, mask: fx.Node, reader: fx.Node, value: bool) -> tuple[int, int]:
        """The columns ``[start, stop)`` of ``mask``, a fresh value, that become ``value`` before ``reader`` runs."""
        views = [user for user in mask.users if user.target is aten.slice.Tensor]
        if len(views) != 1:
            raise _Other
        known = self.take(views[0], aten.slice.Tensor)
        self.last(mask, known["dim"])
        if known["step"] != 1:
            raise _Other
        write = next(iter(views[0].users))
        written = self.take(write, aten.fill_.Tensor, aten.fill_.Scalar, aten.copy_.default)
        filled = written["value"] if "value" in written else written["src"]
        if scalar(filled, self.aliases) != float(value):
            raise _Other
        self._constant(filled)
        position = self.aliases.position
        if not position(write) < position(reader) or self.aliases.version(mask, reader) != 1:
            raise _Other
        return known["start"] or 0, _TO_THE_END if known["end"] is None else known["end"]

    def _constant(self, value: Any) -> None:
        """The nodes that make a constant, where nobody else reads them."""
        while isinstance(value, fx.Node) and len(value.users) == 1:
            if value.op == "call_function":
                self.nodes.add(value)
            value = value.args[0] if value.args else None


def find_samplings(graph: fx.Graph, aliases: Aliases, module_of: Callable[[fx.Node], Any]) -> list[Region]:
    """All chains of filters of a graph.  ``module_of(node)`` gives the module path of a node."""
    if not any(graph.find_nodes(op="call_function", target=target, sort=False) for target in _TELLING):
        return []
    steps = {node: step for node in graph.nodes if (step := _read(node, aliases)) is not None}
    regions = []
    taken: set[fx.Node] = set()
    for output in reversed(steps):
        if output in taken:
            continue
        chain = _chain(steps, output)
        taken.update(*(step.nodes for step in chain))
        if any(step.filter.kind != "temperature" for step in chain) or _is_drawn_from(output):
            regions.append(_region(chain, aliases, module_of))
    return regions[::-1]


def _chain(steps: dict[fx.Node, _Step], output: fx.Node) -> list[_Step]:
    """The filters that end in ``output``, first to last."""
    chain = [steps[output]]
    while True:
        before = steps.get(chain[0].scores)
        if before is None or any(user not in chain[0].nodes for user in before.output.users):
            return chain
        chain.insert(0, before)


def _is_drawn_from(scores: fx.Node) -> bool:
    """``multinomial(softmax(scores))``."""
    drawn = [user for user in scores.users if user.target is aten.softmax.int]
    return any(user.target is aten.multinomial.default for weights in drawn for user in weights.users)


def _region(chain: list[_Step], aliases: Aliases, module_of: Callable[[fx.Node], Any]) -> Region:
    output = chain[-1].output
    filters = tuple(step.filter for step in chain)
    form = ", ".join(map(str, filters))
    op = Sampling(chain[0].scores, filters, form)
    region = Region("sampling", form, output, module_of(output), op=op, inputs=op.nodes())
    try:
        own(region, list(set().union(*(step.nodes for step in chain))), [], aliases)
    except Declined as reason:
        region.declined = str(reason)
    return region


def _read(node: fx.Node, aliases: Aliases) -> _Step | None:
    """The filter that ends in ``node``."""
    if node.target not in _READERS:
        return None
    value = node.meta["val"]
    if value.dim() != 2 or not value.is_floating_point():
        return None
    for read in _READERS[node.target]:
        reader = _Reader(aliases)
        try:
            scores, found = read(reader, node)
        except _Other:
            continue
        before = scores.meta["val"]
        if before.dtype != value.dtype or not same_shape(before.shape, value.shape):
            continue
        return _Step(scores, node, found, reader.nodes)
    return None


def _masked(r: _Reader, node: fx.Node) -> tuple[fx.Node, fx.Node, float]:
    """Scores, mask and number of ``scores.masked_fill(mask, number)``."""
    known = r.take(node, aten.masked_fill.Scalar)
    if not isinstance(known["value"], (int, float)):
        raise _Other
    return known["self"], known["mask"], float(known["value"])


def _kth(r: _Reader, node: Any, scores: fx.Node) -> int:
    """``k`` of ``scores.topk(k)[0][..., -1, None]``."""
    known = r.take(node, aten.unsqueeze.default)
    r.last(node, known["dim"])
    column = r.take(known["self"], aten.select.int)
    r.last(column["self"], column["dim"])
    _, top = r.item(column["self"], 0, aten.topk.default)
    k = top["k"]
    if not isinstance(k, int) or top["self"] is not scores or not top["largest"]:
        raise _Other
    if not top["sorted"] or column["index"] not in (-1, k - 1):
        raise _Other
    r.last(scores, top["dim"])
    return k


def _probabilities(r: _Reader, node: Any, scores: fx.Node) -> None:
    """``scores.softmax(-1)`` in the dtype of the scores."""
    known = r.take(node, aten.softmax.int)
    if known["self"] is not scores or known["dtype"] not in (None, fake(scores).dtype):  # type: ignore[union-attr]
        raise _Other
    r.last(node, known["dim"])


def _summed(r: _Reader, node: Any, scores: fx.Node) -> None:
    """``scores.softmax(-1).cumsum(-1)``."""
    known = r.take(node, aten.cumsum.default)
    if known["dtype"] not in (None, fake(scores).dtype):  # type: ignore[union-attr]
        raise _Other
    r.last(node, known["dim"])
    _probabilities(r, known["self"], scores)


def _sorted(r: _Reader, node: Any, index: int) -> tuple[fx.Node, fx.Node]:
    """``values.sort()[index]``: the call of sort, and the values."""
    call, known = r.item(node, index, aten.sort.default)
    r.last(known["self"], known["dim"])
    if known["descending"]:
        raise _Other
    return call, known["self"]


def _scattered(r: _Reader, mask: fx.Node) -> fx.Node:
    """``m`` of ``m.scatter(1, order, m)``."""
    known = r.take(mask, aten.scatter.src)
    r.last(mask, known["dim"])
    if known["self"] is not known["src"]:
        raise _Other
    return known["self"]


def _temperature(r: _Reader, node: fx.Node) -> tuple[fx.Node, Filter]:
    known = r.take(node, aten.div.Tensor)
    return known["self"], Filter("temperature", r.number(known["other"]))


def _top_k(r: _Reader, node: fx.Node) -> tuple[fx.Node, Filter]:
    scores, mask, fill = _masked(r, node)
    less = r.take(mask, aten.lt.Tensor)
    if less["self"] is not scores:
        raise _Other
    return scores, Filter("top_k", float(_kth(r, less["other"], scores)), fill=fill)


def _epsilon(r: _Reader, node: fx.Node) -> tuple[fx.Node, Filter]:
    scores, mask, fill = _masked(r, node)
    both = r.take(mask, aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
    unlikely, low = both["self"], both["other"]
    less = r.take(low, aten.lt.Tensor)
    if less["self"] is not scores:
        raise _Other
    keep = _kth(r, less["other"], scores)
    rare = r.take(unlikely, aten.lt.Scalar)
    _probabilities(r, rare["self"], scores)
    return scores, Filter("epsilon", r.number(rare["other"]), keep, fill)


def _min_p(r: _Reader, node: fx.Node) -> tuple[fx.Node, Filter]:
    scores, mask, fill = _masked(r, node)
    kept = r.take(mask, aten.scatter_.value)
    less = kept["self"]
    rare = r.take(less, aten.lt.Tensor)
    weights = rare["self"]
    _probabilities(r, weights, scores)
    product = r.take(rare["other"], aten.mul.Tensor)
    largest = r.take(product["self"], aten.amax.default)
    if largest["self"] is not weights or not largest["keepdim"] or len(largest["dim"]) != 1:
        raise _Other
    r.last(weights, largest["dim"][0])
    _, top = r.item(kept["index"], 1, aten.topk.default)
    if top["self"] is not weights or not top["largest"] or not isinstance(top["k"], int) or kept["value"] != 0:
        raise _Other
    r.last(weights, top["dim"])
    r.last(less, kept["dim"])
    if r.aliases.version(less, node) != 1:  # by the scatter alone
        raise _Other
    return scores, Filter("min_p", r.number(product["other"]), top["k"], fill)


def _top_p(r: _Reader, node: fx.Node) -> tuple[fx.Node, Filter]:
    scores, mask, fill = _masked(r, node)
    order = r.take(mask, aten.scatter.src)["index"]
    call, values = _sorted(r, order, 1)
    if values is not scores:
        raise _Other
    removed = _scattered(r, mask)
    low = r.take(removed, aten.le.Scalar)
    ascending = r.take(low["self"], aten.cumsum.default)["self"]
    first = r.take(ascending, aten.softmax.int)["self"]
    if _sorted(r, first, 0)[0] is not call:
        raise _Other
    _summed(r, low["self"], first)
    start, stop = r.written(removed, mask, False)
    size = fake(scores).shape[-1]  # type: ignore[union-attr]
    if not isinstance(start, int) or start >= 0 or not (stop >= _TO_THE_END or same(stop, size)):
        raise _Other
    return scores, Filter("top_p", r.number(low["other"]), -start, fill)


def _typical(r: _Reader, node: fx.Node) -> tuple[fx.Node, Filter]:
    scores, mask, fill = _masked(r, node)
    order = r.take(mask, aten.scatter.src)["index"]
    call, distance = _sorted(r, order, 1)
    removed = _scattered(r, mask)
    far = r.take(removed, aten.gt.Tensor)
    nearest = far["self"]
    if _sorted(r, nearest, 0)[0] is not call:
        raise _Other
    limit = r.take(far["other"], aten.gather.default)
    if limit["self"] is not nearest:
        raise _Other
    r.last(nearest, limit["dim"])
    mass = _last_index(r, limit["index"], scores, call)
    _distance(r, distance, scores)
    start, stop = r.written(removed, mask, False)
    if start != 0 or not isinstance(stop, int) or not 0 < stop < _TO_THE_END:
        raise _Other
    return scores, Filter("typical", mass, stop, fill)


def _last_index(r: _Reader, node: Any, scores: fx.Node, call: fx.Node) -> float | fx.Node:
    """``mass`` of the number of cumulative probabilities below it, in the order of the sort ``call``, as a column."""
    shaped = r.take(node, aten.view.default)
    if shaped["size"][1] != 1:
        raise _Other
    limited = r.take(shaped["self"], aten.clamp_.default)
    size = fake(scores).shape[-1]  # type: ignore[union-attr]
    if limited["min"] is not None or not same(limited["max"], size - 1):
        raise _Other
    count = r.take(limited["self"], aten.sum.dim_IntList)
    if count["dim"] not in ([1], [-1]):
        raise _Other
    if r.aliases.version(limited["self"], node) != 1:
        raise _Other
    less = r.take(count["self"], aten.lt.Scalar)
    weights = r.take(less["self"], aten.cumsum.default)["self"]
    gathered = r.take(weights, aten.softmax.int)["self"]
    picked = r.take(gathered, aten.gather.default)
    r.last(scores, picked["dim"])
    if picked["self"] is not scores or _sorted(r, picked["index"], 1)[0] is not call:
        raise _Other
    _summed(r, less["self"], gathered)
    return r.number(less["other"])


def _distance(r: _Reader, node: fx.Node, scores: fx.Node) -> None:
    """``abs(-log_p - entropy)`` with the entropy ``-nansum(log_p * exp(log_p))`` of each row."""
    difference = r.take(r.take(node, aten.abs.default)["self"], aten.sub.Tensor)
    logs = r.take(difference["self"], aten.neg.default)["self"]
    known = r.take(logs, aten.log_softmax.int)
    if known["self"] is not scores or known["dtype"] not in (None, fake(scores).dtype) or difference["alpha"] != 1:  # type: ignore[union-attr]
        raise _Other
    r.last(logs, known["dim"])
    total = r.take(r.take(difference["other"], aten.neg.default)["self"], aten.nansum.default)
    if not total["keepdim"] or total["dim"] not in ([-1], [1]) or total["dtype"] not in (None, fake(scores).dtype):  # type: ignore[union-attr]
        raise _Other
    product = r.take(total["self"], aten.mul.Tensor)
    if product["self"] is not logs or r.take(product["other"], aten.exp.default)["self"] is not logs:
        raise _Other


def _repetition_penalty(r: _Reader, node: fx.Node) -> tuple[fx.Node, Filter]:
    """``scores.scatter(1, ids, penalised)``, where all ids must be tokens of the scores."""
    known = r.take(node, aten.scatter.src)
    return known["self"], Filter("repetition_penalty", _penalty(r, node), ids=known["index"])


def _padded_repetition_penalty(r: _Reader, node: fx.Node) -> tuple[fx.Node, Filter]:
    """The same of scores with one column more, which takes what ids beyond the scores write and is cut off."""
    known = r.take(node, aten.slice.Tensor)
    written = r.take(known["self"], aten.scatter.src)
    padded = r.take(written["self"], aten.pad.default)
    scores = padded["self"]
    size = scores.meta["val"].shape[-1]
    r.last(node, known["dim"])
    # Of the slice nothing else counts: as many columns as the scores have end here only from the first on.
    if padded["pad"] != [0, 1] or not same(known["end"], size):
        raise _Other
    limited = r.take(written["index"], aten.clamp.default)
    ids = limited["self"]
    if limited["min"] is not None or not same(limited["max"], size):
        raise _Other
    return scores, Filter("repetition_penalty", _penalty(r, known["self"]), ids=ids)


def _penalty(r: _Reader, node: fx.Node) -> Any:
    """What the scores of the tokens that a scatter writes are multiplied with where negative, else divided by."""
    written = r.take(node, aten.scatter.src)
    r.last(node, written["dim"])
    chosen = r.take(written["src"], aten.where.self)
    negative = r.take(chosen["condition"], aten.lt.Scalar)
    seen = negative["self"]
    gathered = r.take(seen, aten.gather.default)
    if gathered["self"] is not written["self"] or gathered["index"] is not written["index"] or negative["other"] != 0:
        raise _Other
    r.last(node, gathered["dim"])
    times, over = r.take(chosen["self"], aten.mul.Tensor), r.take(chosen["other"], aten.div.Tensor)
    if times["self"] is not seen or over["self"] is not seen:
        raise _Other
    penalty, same_penalty = r.number(times["other"]), r.number(over["other"])
    if penalty is not same_penalty and penalty != same_penalty:
        raise _Other
    return penalty


_READERS: dict[Any, tuple[Callable[[_Reader, fx.Node], tuple[fx.Node, Filter]], ...]] = {
    aten.masked_fill.Scalar: (_top_k, _top_p, _min_p, _epsilon, _typical),
    aten.div.Tensor: (_temperature,),
    aten.scatter.src: (_repetition_penalty,),
    aten.slice.Tensor: (_padded_repetition_penalty,),
}
