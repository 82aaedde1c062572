"""What is read of an attention, condition by condition, on graphs without a model around them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lz_compile.aliasing import Aliases
from lz_compile.gradients import mark_gradients
from lz_compile.patterns.attention import find_attention
from lz_compile.region import Region
from perturbation import trace, wrong_attentions

SIZE = 6
Attention = Callable[..., torch.Tensor]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = (randn(SIZE, SIZE, SIZE, SIZE, seed=seed) for seed in range(3))
BIAS = randn(SIZE, SIZE, seed=3)
MIN = torch.finfo(torch.float32).min


def regions(fn: Attention, *inputs: torch.Tensor, gradient: int | None = None) -> list[Region]:
    """The regions of a graph whose input at ``gradient`` requires one."""
    graph = trace(lambda *given: fn(*given), *inputs).module.graph
    placeholders = graph.find_nodes(op="placeholder")
    with torch.enable_grad():
        mark_gradients(graph, {node: i == gradient for i, node in enumerate(placeholders)})
    return find_attention(graph, Aliases(graph), lambda node: "")


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(2, 3) * 0.4


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (scores(q, k) + bias).softmax(-1) @ v


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias)


def with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    column = sink.reshape(1, -1, 1, 1).expand(SIZE, -1, SIZE, -1)
    return torch.cat([scores(q, k), column], -1).softmax(-1)[..., :-1] @ v


SINK = randn(SIZE, seed=4)
GRADIENTS: dict[str, tuple[Attention, torch.Tensor, int, str]] = {
    "query": (eager, BIAS, 0, "needs gradient"),
    "key": (fused, BIAS, 1, "needs gradient"),
    "value": (fused, BIAS, 2, "needs gradient"),
    "mask": (eager, BIAS, 3, "needs gradient (of the mask)"),
    "mask of SDPA": (fused, BIAS, 3, "needs gradient (of the mask)"),
    "sink": (with_sink, SINK, 3, "needs gradient (of the sinks)"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_what_carries_gradients_is_left_alone(name: str) -> None:
    fn, last, position, reason = GRADIENTS[name]
    (region,) = regions(fn, Q, K, V, last)
    assert not region.declined
    (region,) = regions(fn, Q, K, V, last, gradient=position)
    assert region.declined == reason


READ: dict[str, Attention] = {
    "scaled after the bias": lambda q, k, v, b: ((scores(q, k) + b) * 0.5).softmax(-1) @ v,
    "a bias in front": lambda q, k, v, b: (b + scores(q, k)).softmax(-1) @ v,
    "a bias subtracted": lambda q, k, v, b: (scores(q, k) - b).softmax(-1) @ v,
    "two biases": lambda q, k, v, b: (scores(q, k) + b + b.T).softmax(-1) @ v,
    "a bias, then hidden": lambda q, k, v, b: (scores(q, k) + b).masked_fill(b > 1, MIN).softmax(-1) @ v,
    "hidden twice": lambda q, k, v, b: (
        scores(q, k).masked_fill(b > 1, -math.inf).masked_fill(b < -2, -math.inf).softmax(-1) @ v
    ),
    "kept where": lambda q, k, v, b: torch.where(b < 1, scores(q, k), MIN).softmax(-1) @ v,
    "weights cast": lambda q, k, v, b: (scores(q, k) + b).softmax(-1, dtype=torch.float64).to(q.dtype) @ v,
    "scores in float64": lambda q, k, v, b: (scores(q, k).double() + b).softmax(-1).float() @ v,
    "one bias a head": lambda q, k, v, b: (scores(q, k) + b[None, :, None, :]).softmax(-1) @ v,
    "a softcap, then a bias": lambda q, k, v, b: (torch.tanh(scores(q, k) / 3) * 3 + b).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", READ)
def test_a_spelling_is_read_and_means_what_it_computes(name: str) -> None:
    fn = READ[name]
    assert [region.declined for region in regions(fn, Q, K, V, BIAS)] == [""]
    assert not wrong_attentions(trace(lambda *given: fn(*given), Q, K, V, BIAS), find_attention)


ANOTHER: dict[str, Attention] = {
    "a softcap over the bias": lambda q, k, v, b: (torch.tanh((scores(q, k) + b) / 3) * 3).softmax(-1) @ v,
    "a fill that may show": lambda q, k, v, b: scores(q, k).masked_fill(b > 1, -5.0).softmax(-1) @ v,
    "scaled after a fill": lambda q, k, v, b: (scores(q, k).masked_fill(b > 1, -1e30) * 0.5).softmax(-1) @ v,
    "dropout": lambda q, k, v, b: F.dropout((scores(q, k) + b).softmax(-1), 0.5, True) @ v,
    "a number added": lambda q, k, v, b: (scores(q, k) + 1.5).softmax(-1) @ v,
    "keys not transposed": lambda q, k, v, b: (q @ k * 0.4 + b).softmax(-1) @ v,
    "keys transposed otherwise": lambda q, k, v, b: (q @ k.transpose(1, 3) + b).softmax(-1) @ v,
    "weights over queries": lambda q, k, v, b: (scores(q, k) + b).softmax(-2) @ v,
    "weights transposed": lambda q, k, v, b: (scores(q, k) + b).softmax(-1).transpose(2, 3) @ v,
    "weights as integers": lambda q, k, v, b: (9 * scores(q, k)).long().softmax(-1, dtype=torch.float32) @ v,
    "a sink that meets the values": lambda q, k, v, b: (
        torch.cat([scores(q, k)[..., :-1], b[:1, :1].expand(SIZE, SIZE, SIZE, 1)], -1).softmax(-1) @ v
    ),
    "an equation over other letters": lambda q, k, v, b: torch.einsum(
        "bhij,bhdj->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v
    ),
    "an equation that sums heads": lambda q, k, v, b: torch.einsum("bhid,bgjd->bhij", q, k).softmax(-1) @ v,
    "a factor of each key": lambda q, k, v, b: (scores(q, k) * b).softmax(-1) @ v,
    "a batch that broadcasts": lambda q, k, v, b: (q @ k[:1].transpose(2, 3)).softmax(-1) @ v,
    "values that broadcast": lambda q, k, v, b: (scores(q, k) + b).softmax(-1) @ v[:, :1],
}


@pytest.mark.parametrize("name", ANOTHER)
def test_what_only_looks_like_attention_is_left_alone(name: str) -> None:
    fn = ANOTHER[name]
    found = [region for region in regions(fn, Q, K, V, BIAS) if not region.declined]
    assert not found


def stacked(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, SIZE, SIZE)


def added(q: torch.Tensor, k: torch.Tensor, b: torch.Tensor, beta: float = 1.0, alpha: float = 0.4) -> torch.Tensor:
    bias = b.expand(SIZE * SIZE, SIZE, SIZE)
    return torch.baddbmm(bias, stacked(q), stacked(k).transpose(1, 2), beta=beta, alpha=alpha)


def einsum(first: str, second: str) -> Attention:
    return lambda q, k, v, b: torch.einsum(second, torch.einsum(first, q, k).softmax(-1), v)


EITHER: dict[str, Attention] = {
    "baddbmm": lambda q, k, v, b: added(q, k, b).softmax(-1) @ stacked(v),
    "baddbmm, half of the bias": lambda q, k, v, b: added(q, k, b, beta=0.5).softmax(-1) @ stacked(v),
    "baddbmm, no bias": lambda q, k, v, b: added(q, k, b, beta=0.0).softmax(-1) @ stacked(v),
    "baddbmm, scaled after": lambda q, k, v, b: (added(q, k, b) * 0.5).softmax(-1) @ stacked(v),
    "baddbmm, a second bias": lambda q, k, v, b: (added(q, k, b) + b.T).softmax(-1) @ stacked(v),
    "baddbmm, hidden after": lambda q, k, v, b: added(q, k, b).masked_fill(b > 1, -math.inf).softmax(-1) @ stacked(v),
    "baddbmm, a softcap after": lambda q, k, v, b: (torch.tanh(added(q, k, b) / 3) * 3).softmax(-1) @ stacked(v),
    "baddbmm, apart for the mask": lambda q, k, v, b: (
        stacked((added(q, k, b).view(q.shape) + b[:, None]).softmax(-1)) @ stacked(v)
    ),
    "baddbmm, apart for the softmax": lambda q, k, v, b: stacked(added(q, k, b).view(q.shape).softmax(-1)) @ stacked(v),
    "letters": einsum("bhid,bhjd->bhij", "bhij,bhjd->bhid"),
    "letters: scores transposed": einsum("bhid,bhjd->bhji", "bhij,bhjd->bhid"),
    "letters: heads of another batch": einsum("bhid,hbjd->bhij", "bhij,bhjd->bhid"),
    "letters: batch and heads change places": einsum("bhid,bhjd->hbij", "bhij,bhjd->bhid"),
    "letters: heads in the middle": einsum("bihd,bjhd->bhij", "bhij,bjhd->bihd"),
    "letters: weights transposed": einsum("bhid,bhjd->bhij", "bhji,bhjd->bhid"),
    "letters: values by column": einsum("bhid,bhjd->bhij", "bhij,bhdj->bhid"),
    "letters: values of another batch": einsum("bhid,bhjd->bhij", "bhij,hbjd->bhid"),
    "letters: a sum over everything": einsum("bhid,bhjc->bhij", "bhij,bhjd->bhid"),
    "letters: the same key twice": einsum("bhid,bhid->bhi", "bhi,bhid->bhid"),
    "values that broadcast": lambda q, k, v, b: (scores(q, k) + b).softmax(-1) @ v[:, :1],
    "queries that broadcast": lambda q, k, v, b: (scores(q[:1], k) + b).softmax(-1) @ v,
    "a mask that broadcasts the scores": lambda q, k, v, b: (
        (scores(q[:1], k[:1]) + b[:, None, None, :]).softmax(-1) @ v
    ),
    "other head sizes": lambda q, k, v, b: (scores(q[..., :4], k[..., :4]) + b).softmax(-1) @ v[..., :3],
    "one head of keys": lambda q, k, v, b: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], b),
    "no queries": lambda q, k, v, b: (scores(q[:, :, :0], k) + b[:0]).softmax(-1) @ v,
    "a negative scale": lambda q, k, v, b: (q @ k.transpose(2, 3) * -0.4 + b).softmax(-1) @ v,
    "a scale of nothing": lambda q, k, v, b: (q @ k.transpose(2, 3) * 0.0 + b).softmax(-1) @ v,
    "a sum in place": lambda q, k, v, b: scores(q, k).add_(b).softmax(-1) @ v,
    "scores added to something else": lambda q, k, v, b: (
        b.expand(SIZE, SIZE, SIZE, SIZE).clone().add_(scores(q, k)).softmax(-1) @ v
    ),
}


@pytest.mark.parametrize("name", EITHER)
def test_what_is_read_means_what_it_computes(name: str) -> None:
    fn = EITHER[name]
    assert not wrong_attentions(trace(lambda *given: fn(*given), Q, K, V, BIAS), find_attention)


def test_most_of_these_are_read() -> None:
    read = [name for name, fn in EITHER.items() if any(not region.declined for region in regions(fn, Q, K, V, BIAS))]
    assert len(read) > len(EITHER) / 2, read
