"""Index vectors of routed experts: what a proof says of a vector is what the vector holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.routing import Routing, Rows, taken

T, K, E = 5, 2, 4
P = T * K
aten = torch.ops.aten
Vector = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _logits() -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0))


def _table() -> torch.Tensor:
    return torch.randperm(P, generator=torch.Generator().manual_seed(1))


def read(vector: Vector, choose: Callable[..., Any] = lambda logits: logits.topk(K, -1)[1]) -> tuple[Any, Routing]:
    """The node of ``vector(chosen, table)`` and the routing by that choice."""

    def both(logits: torch.Tensor, table: torch.Tensor) -> Any:
        chosen = choose(logits)
        return chosen, vector(chosen, table)

    module = make_fx(both, pre_dispatch=True, tracing_mode="fake")(_logits(), _table())
    chosen, node = module.graph.output_node().args[0]  # type: ignore[misc]
    return node, Routing(chosen, E, Aliases(module.graph))


class _Values(fx.Interpreter):
    """Runs a graph and keeps what each node gave, before anything is written over it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.of[n] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, result)
        return result


def holds(rows: Rows, chosen: torch.Tensor, order: Callable[[fx.Node], torch.Tensor]) -> torch.Tensor:
    """The vector that ``rows`` describes; ``order`` gives the pairs in the order of a sort."""
    if rows.what == "place":
        assert rows.of is not None
        return order(rows.of).argsort()
    pairs = torch.arange(P)
    whole = {"expert": chosen.reshape(-1), "token": pairs // K, "pair": pairs}[rows.what]
    return whole if rows.order is None else whole[order(rows.order)]


def agrees(node: fx.Node, routing: Routing) -> Rows | None:
    """What is said of a vector, once it was seen to be so."""
    rows = routing.rows(node)
    if rows is not None:
        module = fx.GraphModule({}, node.graph)
        values = _Values(module)
        values.run(_logits(), _table())

        def order(sort: fx.Node) -> torch.Tensor:
            value = values.of[sort]
            return value[1] if isinstance(value, (tuple, list)) else value

        expected = holds(rows, values.of[routing.chosen], order)
        assert torch.equal(values.of[node].long(), expected.long())
    return rows


def _order(chosen: torch.Tensor) -> torch.Tensor:
    return chosen.reshape(-1).sort()[1]


def _put(
    into: torch.Tensor, chosen: torch.Tensor, values: Any = None, where: Any = None, **options: Any
) -> torch.Tensor:
    values = torch.arange(P, dtype=into.dtype) if values is None else values
    return torch.index_put(into, where or (_order(chosen),), values, **options)


def _there_and_back(chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    order = _order(chosen)
    return (order // K)[order.argsort()]


# What a vector holds, of the rows in which order: "" of all pairs, "sorted" by expert.
READ: dict[str, tuple[Vector, str, str]] = {
    "the choice": (lambda c, t: c.reshape(-1), "expert", ""),
    "the choice in other integers": (lambda c, t: c.reshape(-1).int().clone().long(), "expert", ""),
    "a clamp that changes no expert": (lambda c, t: c.reshape(-1).clamp(0, E - 1), "expert", ""),
    "sorted experts": (lambda c, t: c.reshape(-1).sort()[0], "expert", "sorted"),
    "the order": (lambda c, t: _order(c), "pair", "sorted"),
    "the order, stable": (lambda c, t: torch.argsort(c.reshape(-1), stable=True), "pair", "sorted"),
    "experts in the order": (lambda c, t: c.reshape(-1)[_order(c)], "expert", "sorted"),
    "experts selected by the order": (lambda c, t: c.reshape(-1).index_select(0, _order(c)), "expert", "sorted"),
    "all pairs": (lambda c, t: torch.arange(P), "pair", ""),
    "tokens by division": (lambda c, t: torch.arange(P) // K, "token", ""),
    "tokens by division of another kind": (
        lambda c, t: torch.div(_order(c), K, rounding_mode="trunc"),
        "token",
        "sorted",
    ),
    "tokens, each repeated": (lambda c, t: torch.arange(T).repeat_interleave(K), "token", ""),
    "tokens, each repeated along a dimension": (lambda c, t: torch.arange(T).repeat_interleave(K, 0), "token", ""),
    "tokens, expanded": (lambda c, t: torch.arange(T).unsqueeze(1).expand(T, K).reshape(-1), "token", ""),
    "tokens in the order": (lambda c, t: torch.arange(T).repeat_interleave(K)[_order(c)], "token", "sorted"),
    "tokens there and back": (_there_and_back, "token", ""),
    "the way back": (lambda c, t: _order(c).argsort(), "place", ""),
    "the way back, written": (lambda c, t: _put(torch.zeros(P, dtype=torch.int64), c), "place", ""),
    "the way back, sorted": (lambda c, t: _order(_order(c)), "place", ""),
}


@pytest.mark.parametrize("name", list(READ))
def test_a_vector_holds_what_is_read(name: str) -> None:
    vector, what, order = READ[name]
    rows = agrees(*read(vector))
    assert rows is not None and rows.what == what
    assert (rows.order is not None, rows.of is not None) == (order == "sorted", what == "place")


def _of_another_sort(chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sorts that are not stable may differ."""
    return (_order(chosen) // K)[torch.argsort(_order(chosen))]


NOT_READ: dict[str, Vector] = {
    "the choice as a column": lambda c, t: c.reshape(-1, 1),
    "a choice in floats": lambda c, t: c.reshape(-1).double(),
    "a choice that went through floats": lambda c, t: c.reshape(-1).half().long(),
    "a choice that went through bytes": lambda c, t: c.reshape(-1).to(torch.int8).long(),
    "a sort of a choice in bytes": lambda c, t: c.reshape(-1).to(torch.int8).sort()[1],
    "the way back, of bytes": lambda c, t: torch.arange(P, dtype=torch.int8)[_order(c)].argsort(),
    "a clamp that changes experts": lambda c, t: c.reshape(-1).clamp(max=E - 2),
    "a clamp of pairs": lambda c, t: _order(c).clamp(0, E - 1),
    "a table": lambda c, t: t,
    "a sort of a table": lambda c, t: t.sort()[1],
    "sorted from the last": lambda c, t: c.reshape(-1).sort(descending=True)[1],
    "sorted along the tokens": lambda c, t: c.sort(0)[1].reshape(-1),
    "a sort of the sorted": lambda c, t: c.reshape(-1).sort()[0].sort()[1],
    "pairs from one on": lambda c, t: torch.arange(1, P + 1),
    "every second pair": lambda c, t: torch.arange(0, 2 * P, 2),
    "pairs and one more": lambda c, t: torch.arange(P + 1),
    "an unknown token each": lambda c, t: t[:T].unsqueeze(1).expand(T, K).reshape(-1),
    "each slot of all tokens": lambda c, t: torch.arange(T).unsqueeze(0).expand(K, T).reshape(-1),
    "tokens, each repeated more often": lambda c, t: torch.arange(T).repeat_interleave(K + 1)[:P],
    "fewer tokens, each repeated as often": lambda c, t: torch.arange(K).repeat_interleave(T),
    "divided by something else": lambda c, t: torch.arange(P) // (K + 1),
    "divided by what is not known": lambda c, t: torch.arange(P) // t[0],
    "divided to floats": lambda c, t: torch.div(torch.arange(P), K, rounding_mode=None),
    "divided experts": lambda c, t: c.reshape(-1) // K,
    "a divided table": lambda c, t: t // K,
    "a table in the order": lambda c, t: t[_order(c)],
    "experts by a table": lambda c, t: c.reshape(-1)[t],
    "experts by their experts": lambda c, t: c.reshape(-1)[c.reshape(-1)],
    "the order by the order": lambda c, t: _order(c)[_order(c)],
    "places by the order": lambda c, t: _order(c).argsort()[_order(c)],
    "back by another sort": _of_another_sort,
    "written by the choice": lambda c, t: _put(torch.zeros(P, dtype=torch.int64), c, where=(c.reshape(-1),)),
    "written by the sorted experts": lambda c, t: _put(
        torch.zeros(P, dtype=torch.int64), c, where=(c.reshape(-1).sort()[0],)
    ),
    "written by a table": lambda c, t: _put(torch.zeros(P, dtype=torch.int64), c, where=(t,)),
    "written in place": lambda c, t: _put(torch.zeros(P, dtype=torch.int64), c, where=(torch.arange(P),)),
    "written from a table": lambda c, t: _put(torch.zeros(P, dtype=torch.int64), c, values=t),
    "written from the order": lambda c, t: _put(torch.zeros(P, dtype=torch.int64), c, values=_order(c)),
    "added up": lambda c, t: _put(torch.ones(P, dtype=torch.int64), c, accumulate=True),
    "written into a longer vector": lambda c, t: _put(torch.zeros(P + 1, dtype=torch.int64), c),
    "written along columns": lambda c, t: torch.ops.aten.index_put(
        torch.zeros(1, P, dtype=torch.int64), [None, _order(c)], torch.arange(P)
    ).reshape(-1),
}


@pytest.mark.parametrize("name", list(NOT_READ))
def test_what_is_not_known_of_a_vector_is_not_said(name: str) -> None:
    assert agrees(*read(NOT_READ[name])) is None


def test_what_is_no_tensor_holds_nothing() -> None:
    node, routing = read(lambda c, t: c.reshape(-1).sort()[0])
    assert routing.rows(node.args[0]) is None and routing.rows(3) is None


def test_a_choice_that_is_a_copy_of_the_top_k_is_the_choice() -> None:
    node, routing = read(lambda c, t: c.reshape(-1), choose=lambda logits: logits.topk(K, -1)[1].clone().view(T, K))
    assert agrees(node, routing) == Rows("expert")


STEPS: dict[str, Callable[..., torch.Tensor]] = {
    "take": lambda a, b: a[b],
    "select": lambda a, b: a.index_select(0, b),
    "argsort": lambda a, b: a.argsort(),
    "sorted": lambda a, b: a.sort()[0],
    "divide": lambda a, b: a // K,
    "divide more": lambda a, b: a // (K + 1),
    "put": lambda a, b: torch.zeros_like(a).index_put((a,), b),
    "add": lambda a, b: torch.zeros_like(a).index_put((a,), b, accumulate=True),
    "narrow": lambda a, b: a.int().long(),
    "bytes": lambda a, b: a.to(torch.int8).long(),
    "turn": lambda a, b: a.view(T, K).t().reshape(-1),
    "clamp": lambda a, b: a.clamp(max=E - 1),
    "flip": lambda a, b: a.flip(0),
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_whatever_is_made_of_index_vectors_holds_what_is_read(steps: list[tuple[str, int, int]]) -> None:
    made: list[Any] = []

    def vector(chosen: torch.Tensor, table: torch.Tensor) -> Any:
        made[:] = [chosen.reshape(-1), chosen.reshape(-1).sort()[1], torch.arange(P)]
        for step, a, b in steps:
            made.append(STEPS[step](made[-1 - a % len(made)], made[-1 - b % len(made)]))
        return made

    with contextlib.suppress(IndexError):  # sums that are no rows
        vector(_logits().topk(K, -1)[1], _table())
        nodes, routing = read(vector)
        for node in nodes:
            agrees(node, routing)


# -- the shares of the experts


def _shares(ids: torch.Tensor, low: float = 0, high: float = E - 1, bins: int = E) -> torch.Tensor:
    return torch.histc(ids.float(), bins=bins, min=low, max=high)


COUNTED: dict[str, Vector] = {
    "counts": lambda c, t: _shares(c.reshape(-1)).cumsum(0, dtype=torch.int32),
    "counts of the sorted": lambda c, t: _shares(c.reshape(-1).sort()[0]).cumsum(0, dtype=torch.int64),
    "counts in integers": lambda c, t: _shares(c.reshape(-1)).int().cumsum(0, dtype=torch.int32),
}
NOT_COUNTED: dict[str, Vector] = {
    "no sums": lambda c, t: _shares(c.reshape(-1)).int(),
    "products": lambda c, t: _shares(c.reshape(-1)).cumprod(0, dtype=torch.int32),
    "sums in floats": lambda c, t: _shares(c.reshape(-1)).cumsum(0),
    "sums in bytes": lambda c, t: _shares(c.reshape(-1)).cumsum(0, dtype=torch.int8),
    "counts in bytes": lambda c, t: _shares(c.reshape(-1)).to(torch.int8).cumsum(0, dtype=torch.int32),
    "other numbers": lambda c, t: t[:E].cumsum(0, dtype=torch.int32),
    "other bins": lambda c, t: _shares(c.reshape(-1), bins=E + 1).cumsum(0, dtype=torch.int32),
    "bins between": lambda c, t: _shares(c.reshape(-1), high=E).cumsum(0, dtype=torch.int32),
    "other vectors": lambda c, t: _shares(t).cumsum(0, dtype=torch.int32),
    "tokens": lambda c, t: _shares(torch.arange(P) // K).cumsum(0, dtype=torch.int32),
    "experts in halves": lambda c, t: torch.histc(c.reshape(-1).half().float(), E, 0, E - 1).cumsum(0).int(),
}


@pytest.mark.parametrize("name", [*COUNTED, *NOT_COUNTED])
def test_the_ends_of_the_experts_shares_are_sums_of_their_counts(name: str) -> None:
    node, routing = read(COUNTED.get(name) or NOT_COUNTED[name])
    assert routing.counts_experts(node, E) == (name in COUNTED)


# -- rows that nobody's expert has


def _filled(mask: Callable[..., torch.Tensor], rows: int = P) -> Vector:
    return lambda c, t: torch.ones(rows).masked_fill(mask(c.reshape(-1), t), 0.0)


FILLS: dict[str, tuple[Vector, bool]] = {
    "no expert": (_filled(lambda e, t: e >= E), True),
    "no expert, sorted": (_filled(lambda e, t: e.sort()[0] >= E + 1), True),
    "the last expert": (_filled(lambda e, t: e >= E - 1), False),
    "all but the last": (_filled(lambda e, t: e < E), False),
    "every expert": (_filled(lambda e, t: e <= E), False),
    "by a table": (_filled(lambda e, t: t >= E), False),
    "by pairs": (_filled(lambda e, t: torch.arange(P) >= E), False),
    "by a limit that is not known": (_filled(lambda e, t: e >= t[0]), False),
    "by a fraction": (_filled(lambda e, t: e >= E - 0.5), False),
    "of a row that is repeated": (_filled(lambda e, t: e >= E, rows=1), False),
}


@pytest.mark.parametrize("name", list(FILLS))
def test_a_fill_of_rows_without_an_expert_fills_nothing(name: str) -> None:
    vector, nothing = FILLS[name]
    node, routing = read(vector)
    assert routing.fills_nothing(node) == nothing


def test_rows_are_taken_along_the_first_dimension() -> None:
    for take, expected in (
        (lambda c, t: t.view(K, T)[c.reshape(-1)], True),
        (lambda c, t: t.view(K, T).index_select(0, c.reshape(-1)), True),
        (lambda c, t: t.view(K, T).index_select(1, c.reshape(-1)), False),
        (lambda c, t: t.view(K, T)[:, c.reshape(-1)], False),
        (lambda c, t: t.view(K, T)[c.reshape(-1), c.reshape(-1)], False),
        (lambda c, t: t.view(K, T) + 1, False),
    ):
        node, _ = read(take)
        assert (taken(node) is not None) == expected
    assert taken(None) is None
