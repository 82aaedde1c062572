"""The parts of a mixture of experts one by one: products per expert, activations, choices, biases, weights, sums."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from lz_compile.aliasing import Aliases
from lz_compile.moe import Router
from lz_compile.patterns.expert_activation import Act, activation_of
from lz_compile.patterns.expert_products import first_of, product_of
from lz_compile.patterns.moe import find_moes
from lz_compile.patterns.router import router_of
from lz_compile.region import Region

aten = torch.ops.aten
T, K, E, H, N = 8, 4, 5, 32, 6  # as many pairs as columns: shapes alone do not tell them apart
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
        (lambda w: w.permute(2, 0, 1).mT, "out, in", False),
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
    node, graph = trace(_grouped(lambda w: w), _bf16(16, 16), _bf16(2, 16, 16), torch.full((2,), 16).int())
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
    "weights that nobody gathered": (torch.bmm, [torch.randn(3, 1, H), torch.randn(3, H, N)]),
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


ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "halves": (lambda y: F.silu(_halves(y)[0]) * _halves(y)[1], {}),
    "columns": (lambda y: _columns(y)[1] * F.gelu(_columns(y)[0]), {"activation": "gelu", "interleaved": True}),
    "alone": (lambda y: F.relu(y), {"activation": "relu", "gated": False}),
    "a spelled silu": (lambda y: _halves(y)[0].sigmoid() * _halves(y)[0] * _halves(y)[1], {}),
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
    def act(y: torch.Tensor) -> torch.Tensor:
        gate, up = change(*parts(y))
        return F.silu(gate) * up

    return act


def _third_columns(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return y[:, : 3 * N // 2 : 3], y[:, 1 : 3 * N // 2 : 3]


NO_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "another factor than sigmoid": lambda y: _halves(y)[0] * torch.tanh(_halves(y)[0]) * _halves(y)[1],
    "a sigmoid of something else": lambda y: _halves(y)[0] * torch.sigmoid(_halves(y)[1]) * _halves(y)[1],
    "a sigmoid times a number": lambda y: torch.sigmoid(_halves(y)[0]) * 2 * _halves(y)[1],
    "no activation": lambda y: _halves(y)[0] * _halves(y)[1],
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
    act, graph = _act(lambda y: F.silu(y[:, ::2]) * y[:, 1::2].view(y.shape[0], -1), symbolic=True)
    assert act is None


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


def block(
    *,
    choose: Callable[..., Any] = lambda logits: logits.topk(K, -1),
    sort: bool = False,
    up: Callable[..., Any] = lambda y, v, experts: y,
    down: Callable[..., Any] = lambda y, v, experts: y,
    factor: Callable[..., Any] = lambda w, v, experts: w.reshape(-1, 1),
    finish: Callable[..., Any] = lambda y, w: y.view(T, K, H).sum(1),
    shapes: dict[str, tuple[int, ...]] | None = None,
    dtypes: dict[str, torch.dtype] | None = None,
    symbolic: bool = False,
) -> Region:
    """What is read of experts with gathered weights, in the order of pairs or sorted by expert."""

    def fn(v: Values) -> torch.Tensor:
        weights, chosen = choose(v["logits"])
        experts, rows = chosen.reshape(-1), v["x"].repeat_interleave(chosen.shape[-1], 0)
        if sort:
            experts, order = experts.sort()
            rows = rows[order]
        y = up(torch.bmm(rows.unsqueeze(1), v["gate_up"][experts]).squeeze(1), v, experts)
        y = F.silu(y)
        y = down(torch.bmm(y.unsqueeze(1), v["down"][experts]).squeeze(1), v, experts)
        y = y * factor(weights, v, experts)
        return finish(y[order.argsort()] if sort else y, weights)

    sizes = {
        "x": (T, H),
        "logits": (T, E),
        "gate_up": (E, H, N),
        "down": (E, N, H),
        "up_bias": (E, N),
        "down_bias": (E, H),
        **(shapes or {}),
    }
    values = {name: torch.randn(shape).to((dtypes or {}).get(name, torch.float32)) for name, shape in sizes.items()}
    _, graph = trace(fn, values, symbolic=symbolic)  # type: ignore[arg-type]
    (region,) = find_moes(graph, Aliases(graph), lambda node: "")
    return region


BLOCKS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "sorted, weights alike": {
        "sort": True,
        "factor": lambda w, v, e: w.reshape(-1)[_order(e)].unsqueeze(-1),
    },
    "biases": {"up": lambda y, v, e: y + v["up_bias"][e], "down": lambda y, v, e: v["down_bias"][e] + y},
    "weights of each token's rows": {
        "down": lambda y, v, e: y.view(T, K, H),
        "factor": lambda w, v, e: w.unsqueeze(-1),
        "finish": lambda y, w: y.sum(1),
    },
    "tokens of one expert": {
        "choose": lambda logits: logits.topk(1, -1),
        "finish": lambda y, w: y.view(T, 1, H).sum(1),
    },
    "an unknown number of tokens": {"symbolic": True, "finish": lambda y, w: y.view(*w.shape, H).sum(1)},
}


def _order(sorted_experts: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError
