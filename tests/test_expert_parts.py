"""The parts of a mixture of experts one by one: products per expert, activations, choices, biases, weights, sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lz_compile.aliasing import Aliases
from lz_compile.moe import Router
from lz_compile.patterns.expert_activation import Act, activation_of
from lz_compile.patterns.expert_products import first_of, product_of
from lz_compile.patterns.moe import find_moes
from lz_compile.patterns.router import router_of
from lz_compile.region import Region

aten = torch.ops.aten
T, K, E, H, N = 8, 4, 5, 32, 16  # as many pairs as columns: shapes alone do not tell them apart
P = T * K


def trace(fn: Callable[..., Any], *inputs: torch.Tensor, symbolic: bool = False) -> tuple[Any, fx.Graph]:
    """The nodes that a function gives, and its graph."""
    graph = make_fx(fn, pre_dispatch=True, tracing_mode="symbolic" if symbolic else "fake")(*inputs).graph
    graph.eliminate_dead_code()
    return graph.output_node().args[0], graph


# -- products


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def _grouped(weight: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w, ends: torch._grouped_mm(x, weight(w), offs=ends)


@pytest.mark.parametrize(
    ("weight", "layout", "turns"),
    [
        (lambda w: w, "in, out", True),
        (lambda w: w.mT, "out, in", True),
        (lambda w: w.transpose(1, 2), "out, in", True),
        (lambda w: w.transpose(-1, -2).transpose(2, 1), "in, out", True),
        (lambda w: w.permute(0, 2, 1), "out, in", True),
        (lambda w: w.transpose(0, 1), "in, out", False),
        (lambda w: w.permute(1, 0, 2), "in, out", False),
    ],
)
def test_a_grouped_product_is_read_with_its_layout(weight: Callable[..., Any], layout: str, turns: bool) -> None:
    ends = torch.full((16,), 16, dtype=torch.int32)
    node, graph = trace(_grouped(weight), _bf16(16, 16), _bf16(16, 16, 16), ends)
    rows, source, by = list(graph.nodes)[:3]
    product = product_of(node)
    assert product is not None and product.layout == layout and (product.weight is source) == turns
    assert (product.rows, product.by) == (rows, by)


def _grouped_node(**options: Any) -> fx.Node:
    node, _ = trace(_grouped(lambda w: w), _bf16(16, 16), _bf16(2, 16, 16), torch.full((2,), 16).int())
    node.kwargs = {**node.kwargs, **options}
    return node


def test_a_grouped_product_with_a_bias_or_in_another_dtype_is_left_alone() -> None:
    assert product_of(_grouped_node()) is not None
    assert product_of(_grouped_node(bias=_grouped_node().args[0])) is None
    assert product_of(_grouped_node(out_dtype=torch.float32)) is None


NO_PRODUCTS: dict[str, tuple[Callable[..., Any], list[torch.Tensor]]] = {
    "groups of columns": (
        lambda a, b, ends: torch._grouped_mm(a, b, offs=ends),
        [_bf16(16, 32), _bf16(32, 16), torch.tensor([16, 32]).int()],
    ),
    "one batch each": (lambda a, b: torch._grouped_mm(a, b), [_bf16(2, 16, 16), _bf16(2, 16, 16)]),
    "groups of weights": (
        lambda a, b, ends: torch._grouped_mm(a, b, offs=ends),
        [_bf16(2, 16, 16), _bf16(16, 32), torch.tensor([16, 32]).int()],
    ),
    "weights that nobody gathered": (lambda x, w: torch.bmm(x, w), [torch.randn(3, 1, H), torch.randn(3, H, N)]),
    "several rows an expert": (lambda x, w, e: torch.bmm(x, w[e]), [torch.randn(3, 2, H), torch.randn(E, H, N)]),
    "several columns an expert": (lambda x, w, e: torch.bmm(w[e], x), [torch.randn(3, H, 2), torch.randn(E, N, H)]),
    "all rows by each expert": (
        lambda x, w, e: torch.matmul(x, w[e]),
        [torch.randn(4, 1, 1, H), torch.randn(E, H, N)],
    ),
    "rows of one number": (lambda x, w, e: torch.matmul(x, w[e]), [torch.randn(4, 1), torch.randn(E, 1, N)]),
    "a row": (lambda x, w, e: torch.matmul(x, w[e]), [torch.randn(H), torch.randn(E, H, N)]),
    "rows of a table": (lambda x, w, e: torch.bmm(x, w[e.view(3, 1)]), [torch.randn(3, 1, 1), torch.randn(E, N)]),
    "another operator": (lambda x, w, e: torch.add(x, w[e]), [torch.randn(3, 1, H), torch.randn(E, H, H)]),
}


@pytest.mark.parametrize("name", list(NO_PRODUCTS))
def test_other_products_are_left_alone(name: str) -> None:
    fn, values = NO_PRODUCTS[name]
    experts = [torch.tensor([0, 1, 2])] if fn.__code__.co_argcount == 3 and len(values) == 2 else []
    node, _ = trace(fn, *values, *experts)
    assert product_of(node) is None


def test_a_product_that_rows_reach_twice_is_the_first() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        y = torch.bmm(x, w[e])
        y = y.sin() + y.cos() * y
        return torch.bmm(y, v[e])

    last, graph = trace(fn, torch.randn(3, 1, H), torch.randn(E, H, N), torch.randn(E, N, H), torch.tensor([0, 1, 2]))
    products = {node: product for node in graph.nodes if (product := product_of(node)) is not None}
    assert len(products) == 2 and first_of(products[last], products) is next(iter(products.values()))


# -- activations


def _halves(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return y.chunk(2, -1)


def _columns(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return y[:, ::2], y[:, 1::2]


def _scaled_sigmoid(y: torch.Tensor) -> torch.Tensor:
    gate, up = _columns(y)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.5))


def _spelled(act: Callable[..., Any], parts: Callable[..., Any] = _halves) -> Callable[..., torch.Tensor]:
    return lambda y: act(*parts(y))


ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "halves": (lambda y: F.silu(_halves(y)[0]) * _halves(y)[1], {}),
    "columns": (lambda y: _columns(y)[1] * F.gelu(_columns(y)[0]), {"activation": "gelu", "interleaved": True}),
    "alone": (lambda y: F.relu(y), {"activation": "relu", "gated": False}),
    "a spelled silu": (_spelled(lambda gate, up: gate.sigmoid() * gate * up), {}),
    "everything": (_scaled_sigmoid, {"interleaved": True, "alpha": 1.5, "limit": 7.0, "up_offset": 1.0}),
}


def _act(fn: Callable[..., torch.Tensor], width: int = 2 * N, symbolic: bool = False) -> tuple[Act | None, fx.Graph]:
    def whole(x: torch.Tensor) -> torch.Tensor:
        return fn(x * 2)

    node, graph = trace(whole, torch.randn(P, width), symbolic=symbolic)
    return activation_of(node, Aliases(graph)), graph


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_an_activation_is_read(name: str) -> None:
    fn, facts = ACTIVATIONS[name]
    act, graph = _act(fn)
    y = next(node for node in graph.nodes if node.target is aten.mul.Tensor)
    assert act == Act(y, **{"activation": "silu", "gated": True, **facts})


def _two(change: Callable[..., Any], parts: Callable[..., Any] = _halves) -> Callable[..., torch.Tensor]:
    def act(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = change(gate, up)
        return F.silu(gate) * up

    return _spelled(act, parts)


def _third_columns(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return y[:, : 3 * N // 2 : 3], y[:, 1 : 3 * N // 2 : 3]


NO_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "another factor than sigmoid": _spelled(lambda gate, up: gate * torch.tanh(gate) * up),
    "a sigmoid of something else": _spelled(lambda gate, up: gate * torch.sigmoid(up) * up),
    "a sigmoid times a number": _spelled(lambda gate, up: torch.sigmoid(gate) * 2 * up),
    "a sigmoid of a product of two": _spelled(lambda gate, up: gate * torch.sigmoid(gate * up) * up),
    "no activation": _spelled(lambda gate, up: gate * up),
    "up twice more one": _two(lambda gate, up: (gate, torch.add(up, 1.0, alpha=2))),
    "a gate with a floor": _two(lambda gate, up: (gate.clamp(-1, 1), up.clamp(-1, 1))),
    "a gate with only a floor": _two(lambda gate, up: (gate.clamp(min=-1), up)),
    "limits that differ": _two(lambda gate, up: (gate.clamp(max=2), up.clamp(-2, 1))),
    "a limit of the gate alone": _two(lambda gate, up: (gate.clamp(max=2), up)),
    "a limit of up alone": _two(lambda gate, up: (gate, up.clamp(-2, 2))),
    "up on one side": _two(lambda gate, up: (gate.clamp(max=2), up.clamp(max=2))),
    "halves of two tensors": lambda y: F.silu(_halves(y)[0]) * _halves(y.sin())[1],
    "columns of two tensors": lambda y: F.silu(_columns(y)[0]) * _columns(y.sin())[1],
    "halves in the other order": _two(lambda gate, up: (up, gate)),
    "columns in the other order": _two(lambda gate, up: (up, gate), _columns),
    "the same half": _two(lambda gate, up: (gate, gate)),
    "the same columns": _two(lambda gate, up: (gate, gate), _columns),
    "columns and a half": lambda y: F.silu(_columns(y)[0]) * _halves(y)[1],
    "the whole": lambda y: F.silu(y) * y,
    "every third column": _two(lambda gate, up: (gate, up), _third_columns),
    "columns up to an end": lambda y: F.silu(y[:, :N:2]) * y[:, 1:N:2],
    "every second row": lambda y: F.silu(y[::2]) * y[1::2],
    "wholes of other tensors": lambda y: F.silu(y.sin()) * y.cos(),
}


@pytest.mark.parametrize("name", list(NO_ACTIVATIONS))
def test_other_activations_are_not_known(name: str) -> None:
    assert _act(NO_ACTIVATIONS[name])[0] is None


def test_columns_of_an_odd_number_are_no_pairs() -> None:
    assert _act(lambda y: F.silu(y[:, ::2]) * y[:, 1::2], width=3)[0] is None


def test_a_limit_that_is_known_at_run_time_only_is_no_limit() -> None:
    def limited(y: torch.Tensor) -> torch.Tensor:
        gate, up = _halves(y)
        return F.silu(gate.clamp(max=y.shape[0])) * up

    assert _act(limited, symbolic=True)[0] is None


def test_columns_of_a_number_that_is_not_known_are_no_pairs() -> None:
    act, graph = _act(lambda y: F.silu(y[..., ::2]) * y[..., 1::2], symbolic=True)
    assert act is None and not isinstance(graph.find_nodes(op="placeholder")[0].meta["val"].shape[1], int)


# -- the router


@pytest.mark.parametrize(
    ("weights", "router"),
    [
        (lambda x, w: F.linear(x, w).topk(K)[0], Router("logits")),
        (lambda x, w: F.linear(x, w).softmax(-1).topk(K)[0], Router("softmax")),
        (lambda x, w: F.linear(x, w).topk(K)[0].softmax(-1) * 2, Router("softmax over the top-k", scale=2.0)),
        (lambda x, w: (x @ w.mT).topk(K)[0], Router("unknown")),
    ],
)
def test_what_made_the_weights_is_read(weights: Callable[..., torch.Tensor], router: Router) -> None:
    node, graph = trace(weights, torch.randn(T, H), torch.randn(E, H))
    assert router_of(node, Aliases(graph)) == router


# -- blocks

Values = dict[str, torch.Tensor]
SIZES = {
    "x": (T, H),
    "logits": (T, E),
    "gate_up": (E, H, N),
    "second": (E, N, H),
    "up_bias": (E, N),
    "down_bias": (E, H),
}


def _column(weights: torch.Tensor, order: Any, chosen: torch.Tensor) -> torch.Tensor:
    return (weights.reshape(-1) if order is None else weights.reshape(-1)[order]).unsqueeze(-1)


def block(
    *,
    choose: Callable[..., Any] = lambda v: v["logits"].topk(K, -1),
    sort: bool = False,
    repeat: Callable[..., Any] = lambda x, k: x.repeat_interleave(k, 0),
    first: Callable[..., Any] = lambda rows, w, experts: torch.bmm(rows.unsqueeze(1), w[experts]).squeeze(1),
    up: Callable[..., Any] = lambda y, v, experts: y,
    down: Callable[..., Any] = lambda y, v, experts: y,
    factor: Callable[..., Any] = _column,
    finish: Callable[..., Any] = lambda y, k: y.view(-1, k, H).sum(1),
    unknown: tuple[str, ...] = (),
    **others: Any,
) -> Region:
    """What is read of experts with gathered weights, in the order of pairs or sorted by expert; ``others`` are
    parameters in place of those that it has, and of the ``unknown`` ones the first size is a symbol."""

    def fn(v: Values) -> Any:
        weights, chosen = choose(v)
        k, order = chosen.shape[-1], None
        experts, rows = chosen.reshape(-1), repeat(v["x"], k)
        if sort:
            experts, order = experts.sort()
            rows = rows[order]
        y = up(first(rows, v["gate_up"], experts), v, experts)
        y = F.silu(y)
        y = down(torch.bmm(y.unsqueeze(1), v["second"][experts]).squeeze(1), v, experts)
        y = y * factor(weights, order, chosen)
        return finish(y if order is None else y[order.argsort()], k)

    values = {name: torch.randn(shape) for name, shape in SIZES.items()}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = {}
    for name, value in {**values, **others}.items():
        sizes = [DimDynamic.DUCK if name in unknown and i == 0 else DimDynamic.STATIC for i in range(value.dim())]
        inputs[name] = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    with mode:
        graph = make_fx(fn, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(inputs).graph
    graph.eliminate_dead_code()
    (region,) = find_moes(graph, Aliases(graph), lambda node: "")
    return region


def _expanded(x: torch.Tensor, k: int) -> torch.Tensor:
    return x.unsqueeze(1).expand(-1, k, -1).reshape(-1, H)


BLOCKS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "sorted": {"sort": True},
    "sorted weights of a column": {"sort": True, "factor": lambda w, order, c: w.reshape(-1, 1)[order]},
    "expanded tokens": {"repeat": _expanded},
    "numbered tokens": {"repeat": lambda x, k: x[torch.arange(T * k) // k]},
    "numbered tokens, sorted": {"sort": True, "repeat": lambda x, k: x[torch.arange(T * k) // k]},
    "biases": {"up": lambda y, v, e: y + v["up_bias"][e], "down": lambda y, v, e: v["down_bias"][e] + y},
    "weights of each token's rows": {
        "down": lambda y, v, e: y.view(T, K, H),
        "factor": lambda w, order, c: w.unsqueeze(-1),
        "finish": lambda y, k: y.sum(1),
    },
    "one expert a token": {"choose": lambda v: v["logits"].topk(1, -1)},
    "all experts": {"choose": lambda v: v["logits"].topk(E, -1)},
    "any number of tokens": {"unknown": ("x", "logits")},
    "added up by token": {
        "finish": lambda y, k: torch.zeros(T, H).index_add(0, torch.arange(T).repeat_interleave(k), y),
    },
    "cast to the tokens' dtype": {
        **{name: torch.zeros(shape).bfloat16() for name, shape in SIZES.items() if name != "logits"},
        "finish": lambda y, k: y.view(-1, k, H).sum(1).bfloat16(),
    },
}


@pytest.mark.parametrize("name", list(BLOCKS))
def test_a_block_is_read(name: str) -> None:
    region = block(**BLOCKS[name])
    assert not region.declined and (region.op.up_offset, region.op.experts) == (0.0, E)
    assert (region.op.gate_up_bias is not None) == (name == "biases")
    assert (region.output.target is aten.to.dtype) == name.startswith("cast")


def _sorted_product(rows: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    ends = torch.histc(experts.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
    return torch._grouped_mm(rows.bfloat16(), weight.bfloat16(), offs=ends).float()


def _weights(v: Values, count: int = K) -> torch.Tensor:
    return v["logits"].topk(count, -1)[0]


NO_BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "other experts in the second product": ({"second": torch.randn(E + 1, N, H)}, "different numbers of experts"),
    "an unknown number of experts": ({"unknown": ("gate_up", "second")}, "different numbers of experts"),
    "a sorted and a gathered product": ({"sort": True, "first": _sorted_product}, "made in different ways"),
    "an unknown number of experts a token": (
        {"choose": lambda v: v["logits"].topk(v["k"].shape[0], -1), "unknown": ("k",), "k": torch.zeros(K)},
        "not a number",
    ),
    "experts that somebody chose": (
        {"choose": lambda v: (_weights(v), v["chosen"]), "chosen": torch.zeros(T, K).long()},
        "not the choice of a top-k",
    ),
    "the numbers of a top-k": (
        {"choose": lambda v: (_weights(v), v["bids"].topk(K, -1)[0]), "bids": torch.zeros(T, E).long()},
        "not the choice of a top-k",
    ),
    "where each greatest so far stands": (
        {"choose": lambda v: (v["logits"], v["logits"].cummax(-1)[1])},
        "not the choice of a top-k",
    ),
    "a top-k of other things": (
        {"choose": lambda v: (_weights(v), v["bids"].topk(K, 0)[1].view(T, K)), "bids": torch.randn(E, T)},
        "not the choice of a top-k",
    ),
    "numbers that count up": (
        {"choose": lambda v: (_weights(v), torch.arange(P).view(T, K) % E)},
        "not the choice of a top-k",
    ),
    "a product of rows and biases": ({"up": lambda y, v, e: y * v["up_bias"][e]}, "between the products"),
    "a difference of rows and biases": ({"up": lambda y, v, e: y - v["up_bias"][e]}, "between the products"),
    "two biases": (
        {"up": lambda y, v, e: y + v["up_bias"][e] + v["more"][e], "more": torch.randn(E, N)},
        "between the products",
    ),
    "twice the bias": ({"up": lambda y, v, e: torch.add(y, v["up_bias"][e], alpha=2)}, "between the products"),
    "twice the rows": ({"up": lambda y, v, e: torch.add(v["up_bias"][e], y, alpha=2)}, "between the products"),
    "twice the bias of the result": (
        {"down": lambda y, v, e: torch.add(y, v["down_bias"][e], alpha=2)},
        "not the bias",
    ),
    "biases of rows in a dimension of their own": (
        {"up": lambda y, v, e: (y.unsqueeze(1) + v["up_bias"][e]).squeeze(1), "up_bias": torch.randn(E, 1, N)},
        "between the products",
    ),
    "one bias for all columns": (
        {"down": lambda y, v, e: y + v["down_bias"][e], "down_bias": torch.randn(E, 1)},
        "not the bias",
    ),
    "a bias that widens rows": (
        {"up": lambda y, v, e: y + v["up_bias"][e], "gate_up": torch.randn(E, H, 1)},
        "between the products",
    ),
    "a bias that widens the result": (
        {"down": lambda y, v, e: y + v["down_bias"][e], "second": torch.randn(E, N, 1)},
        "not the bias",
    ),
    "a bias in another dtype": (
        {"down": lambda y, v, e: y + v["down_bias"][e], "down_bias": torch.randn(E, H).bfloat16()},
        "not the bias",
    ),
    "biases of the next expert": (
        {"down": lambda y, v, e: y + v["down_bias"][e + 1], "down_bias": torch.randn(E + 1, H)},
        "not the bias",
    ),
    "biases of more experts": (
        {"down": lambda y, v, e: y + v["down_bias"][e], "down_bias": torch.randn(E + 1, H)},
        "not the bias",
    ),
    "weights of columns": ({"factor": lambda w, order, c: w.reshape(1, -1)}, "the factor is not the weight"),
    "weights of columns by slot": (
        {
            "choose": lambda v: v["logits"].topk(H, -1),
            "logits": torch.randn(T, H),
            "gate_up": torch.randn(H, H, N),
            "second": torch.randn(H, N, H),
            "down": lambda y, v, e: y.view(T, H, H),
            "factor": lambda w, order, c: w.unsqueeze(1),
            "finish": lambda y, k: y.sum(1),
        },
        "the factor is not the weight",
    ),
    "a number as weight": ({"factor": lambda w, order, c: 0.5}, "the factor is not the weight"),
    "whole numbers as weights": (
        {"choose": lambda v: (_weights(v).long(), v["logits"].topk(K, -1)[1])},
        "the factor is not the weight",
    ),
    "sorted weights of rows that are not": (
        {"factor": lambda w, order, c: _column(w, c.reshape(-1).sort()[1], c)},
        "the factor is not the weight",
    ),
    "weights by another sort": (
        {"sort": True, "factor": lambda w, order, c: _column(w, c.reshape(-1).sort()[1], c)},
        "the factor is not the weight",
    ),
    "weights of rows as they were": (
        {"sort": True, "factor": lambda w, order, c: _column(w, None, c)},
        "the factor is not the weight",
    ),
}


@pytest.mark.parametrize("name", list(NO_BLOCKS))
def test_what_is_no_block_says_why(name: str) -> None:
    twist, reason = NO_BLOCKS[name]
    region = block(**twist)
    assert reason in region.declined and region.op is None
