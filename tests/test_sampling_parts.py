"""What is read of each filter, condition by condition, on graphs without a warper around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.sampling import find_samplings
from perturbation import Program, trace, wrong_meanings

INF = torch.inf
Filtering = Callable[[torch.Tensor], Any]


def found(graph: fx.Graph) -> list[str]:
    return [region.pattern for region in find_samplings(graph, Aliases(graph), lambda node: "")]


def traced(fn: Filtering) -> Program:
    return trace(lambda x: fn(x), torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))


def patterns(fn: Filtering) -> list[str]:
    return found(traced(fn).module.graph)


def top_k(x: torch.Tensor, fill: float = -INF) -> torch.Tensor:
    return x.masked_fill(x < x.topk(5)[0][..., -1, None], fill)


def _removed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, order = x.sort()
    return ordered.softmax(-1).cumsum(-1) <= 0.3, order


def top_p(
    x: torch.Tensor,
    keep: Callable[[torch.Tensor], object] = lambda removed: removed[..., -1:].fill_(False),
    afterwards: Callable[[torch.Tensor], object] = lambda removed: None,
) -> torch.Tensor:
    removed, order = _removed(x)
    keep(removed)
    mask = removed.scatter(1, order, removed)
    afterwards(removed)
    return x.masked_fill(mask, -INF)


def _twice(removed: torch.Tensor) -> None:
    last = removed[..., -1:]
    last.fill_(False)
    last.logical_not_()


def _turn_over_a_column(removed: torch.Tensor) -> None:
    removed.select(1, 0).logical_not_()


def _and_a_column(removed: torch.Tensor) -> None:
    removed[..., -1:].fill_(False)
    _turn_over_a_column(removed)


def _other_sums(x: torch.Tensor) -> torch.Tensor:
    order = x.sort()[1]
    removed = (2 * x).sort()[0].softmax(-1).cumsum(-1) <= 0.3
    removed[..., -1:] = False
    return x.masked_fill(removed.scatter(1, order, removed), -INF)


def _another_sorts_order(x: torch.Tensor) -> torch.Tensor:
    removed, _ = _removed(x)
    removed[..., -1:] = False
    return x.masked_fill(removed.scatter(1, (-x).sort()[1], removed), -INF)


def min_p(
    x: torch.Tensor,
    among: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda x, weights: weights,
    afterwards: Callable[[torch.Tensor], object] = lambda removed: None,
) -> torch.Tensor:
    weights = x.softmax(-1)
    removed = weights < weights.amax(-1, keepdim=True) * 0.1
    removed.scatter_(1, among(x, weights).topk(1)[1], False)
    afterwards(removed)
    return x.masked_fill(removed, -INF)


def typical(
    x: torch.Tensor,
    keep: Callable[[torch.Tensor], object] = lambda removed: removed[..., :2].fill_(False),
    dtype: torch.dtype | None = None,
    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda nearest, distance: nearest,
    below: Callable[[torch.Tensor], object] = lambda count: None,
) -> torch.Tensor:
    logs = x.log_softmax(-1, dtype=dtype)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    distance = (-logs - entropy).abs()
    ordered, order = distance.sort()
    ordered = nearest(ordered, distance)
    count = (x.gather(-1, order).softmax(-1).cumsum(-1) < 0.6).sum(dim=1)
    count.clamp_(max=x.shape[-1] - 1)
    below(count)
    removed = ordered > ordered.gather(1, count.view(-1, 1))
    keep(removed)
    return x.masked_fill(removed.scatter(1, order, removed), -INF)


def padded_penalty(x: torch.Tensor, start: int = 0) -> torch.Tensor:
    ids = torch.zeros(6, 3, dtype=torch.int64)
    size = x.shape[1]
    index = ids.clamp(max=size)
    padded = torch.nn.functional.pad(x, (0, 1))
    seen = padded.gather(1, index)
    seen = torch.where(seen < 0, seen * 1.5, seen / 1.5)
    return padded.scatter(1, index, seen)[:, start : size + start]


SPELLED: dict[str, tuple[Filtering, str]] = {
    "top-k": (top_k, "top_k 5"),
    "top-p": (top_p, "top_p 0.3"),
    "min-p": (min_p, "min_p 0.1"),
    "typical": (typical, "typical 0.6 keep 2"),
    "penalty": (padded_penalty, "repetition_penalty"),
}


@pytest.mark.parametrize("name", SPELLED)
def test_a_spelling_is_read(name: str) -> None:
    fn, pattern = SPELLED[name]
    assert patterns(fn) == [pattern]


def test_a_result_that_someone_else_reads_ends_a_chain() -> None:
    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = top_k(x)
        return top_k(kept - 1), kept

    def chained(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = top_k(x)
        return min_p(kept), kept

    assert patterns(both) == ["top_k 5", "top_k 5"]
    assert patterns(chained) == ["top_k 5", "min_p 0.1"]
    program = traced(chained)
    assert not any(r.declined for r in find_samplings(program.module.graph, Aliases(program.module.graph), str))


NONE: dict[str, Filtering] = {
    "top-k of three dimensions": lambda x: top_k(x[None]),
    "top-k of integers": lambda x: top_k((4 * x).to(torch.int64), -9),
    "top-p: what is kept is written twice": lambda x: top_p(x, _twice),
    "top-p: and a column is turned over": lambda x: top_p(x, _and_a_column),
    "top-p: another write stands in front, its own behind": lambda x: top_p(
        x, _turn_over_a_column, lambda removed: removed[..., -1:].fill_(False)
    ),
    "top-p: the first are kept": lambda x: top_p(x, lambda removed: removed[..., 2:].fill_(False)),
    "top-p: all are kept": lambda x: top_p(x, lambda removed: removed[..., 0:].fill_(False)),
    "top-p: sums of other scores": _other_sums,
    "top-p: an order of other scores": _another_sorts_order,
    "min-p: the largest of other scores are kept": lambda x: min_p(x, lambda x, weights: -x),
    "min-p: and a column is turned over": lambda x: min_p(x, afterwards=_turn_over_a_column),
    "typical: none is kept": lambda x: typical(x, lambda removed: removed[..., :0].fill_(False)),
    "typical: all are kept": lambda x: typical(x, lambda removed: removed[..., 0:].fill_(False)),
    "typical: the logarithm in another dtype": lambda x: typical(x, dtype=torch.float64),
    "typical: the nearest of other scores": lambda x: typical(x, nearest=lambda a, distance: (2 * distance).sort()[0]),
    "typical: a number of tokens that changes": lambda x: typical(x, below=lambda count: count.select(0, 0).zero_()),
}


@pytest.mark.parametrize("name", NONE)
def test_what_only_looks_like_a_filter_is_none(name: str) -> None:
    assert patterns(NONE[name]) == []


def test_padding_that_is_not_what_is_cut_off_is_no_part_of_a_penalty() -> None:
    program = traced(lambda x: padded_penalty(x, 1))
    assert found(program.module.graph) == ["repetition_penalty"]  # of the padded scores
    assert not wrong_meanings(program, find_samplings)


TOP_K_ALONE: dict[str, Filtering] = {
    "a temperature of each row": lambda x: top_k(x / (x[:, :1].abs() + 1)),
    "a temperature of integers": lambda x: top_k((4 * x).to(torch.int64) / 0.8),
}


@pytest.mark.parametrize("name", TOP_K_ALONE)
def test_what_only_looks_like_a_temperature_is_none(name: str) -> None:
    assert patterns(TOP_K_ALONE[name]) == ["top_k 5"]


@pytest.mark.parametrize(
    ("fn", "target", "position"),
    [
        (top_k, "masked_fill", 2),
        (top_k, "topk", 1),
        (min_p, "topk", 1),
        (top_p, "slice", 2),
        (typical, "slice", 3),
    ],
)
def test_a_number_that_the_run_decides_is_left_alone(fn: Filtering, target: str, position: int) -> None:
    """The graph need not run: it is read only."""
    graph = traced(fn).module.graph
    (node,) = [n for n in graph.nodes if str(n.target).startswith(f"aten.{target}.") and len(n.args) > position]
    node.args = (*node.args[:position], next(iter(graph.nodes)), *node.args[position + 1 :])
    assert found(graph) == []
