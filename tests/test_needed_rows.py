"""Rows that nobody reads: slices move up, answers stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lz_compile.aliasing import Aliases
from lz_compile.lowering.emit import Emitter
from lz_compile.needed_rows import trim
from lz_compile.normalize import normalize
from road import compile_road, median_error
from tiny import DECODERS, Architecture, padding, tokens

aten = torch.ops.aten


def trimmed(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> tuple[torch.Tensor, str, torch.fx.GraphModule]:
    """The result after trimming, what was said about it, and the graph."""
    seen = []

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        normal = normalize(module)
        note = trim(normal.graph, Aliases(normal.graph), Emitter)
        normal.graph.lint()
        normal.recompile()
        seen.append((note, normal))
        return normal.forward

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, dynamic=False)(*inputs)
    return result, *seen[0]


def rows_of(module: torch.fx.GraphModule, target: object) -> list[int]:
    """The second to last size of each result of an operator."""
    return [node.meta["val"].shape[-2] for node in module.graph.nodes if node.target is target]


WEIGHT = torch.randn(8, 8)


def test_a_chain_of_row_wise_operations_runs_on_the_rows_that_are_read() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        h = F.silu(x @ WEIGHT.to(x.dtype)) + x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.linear(h, WEIGHT)[:, -1:] * 2

    x = torch.randn(2, 16, 8)
    result, note, module = trimmed(lambda x, w: chain(x) + w.sum(), x, WEIGHT)
    torch.testing.assert_close(result, chain(x) + WEIGHT.sum())
    assert "2 matrix products" in note and "1 of 16 rows" in note
    assert rows_of(module, aten.linear.default) == [1]
    assert rows_of(module, aten.matmul.default) == [1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", DECODERS, ids=lambda a: a.name)
def test_the_last_layer_of_a_prefill_runs_on_the_token_that_is_asked_for(
    architecture: Architecture, attention: str
) -> None:
    model = architecture.build(attention)
    run, road = compile_road(model)
    mask = padding(2, 12, "left")

    def logits(forward: Callable[..., object], seed: int) -> torch.Tensor:
        with torch.no_grad():
            return forward(tokens(2, 12, seed), attention_mask=mask, use_cache=False, logits_to_keep=1).logits  # type: ignore[attr-defined]

    assert median_error(lambda seed: logits(run, seed), lambda seed: logits(model, seed)) < 2e-6
    assert "1 of 12 rows" in road.graphs[0].trimmed
    assert [", 1 queries" in region.shape for region in road.regions] == [False, True]
    linears = [node for node in road.modules[0].graph.nodes if node.target is aten.linear.default]
    # Queries, output projection, the MLP, logits; a fused projection of q, k and v is needed for all tokens.
    fused = {"phi3": 4, "gpt-neox": 4}
    assert sum(node.meta["val"].shape[1] == 1 for node in linears) == fused.get(architecture.name, 6)


def test_the_option_turns_it_off() -> None:
    model = DECODERS[0].build("sdpa")
    run, road = compile_road(model, trim_rows=False)
    with torch.no_grad():
        run(tokens(2, 12, 0), use_cache=False, logits_to_keep=1)
    assert road.graphs[0].trimmed == ""


def test_a_value_that_someone_reads_whole_stays_whole() -> None:
    def both(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.linear(x, w)
        return h[:, -1:] * 2, h.sum()

    x = torch.randn(2, 16, 8)
    (last, total), note, module = trimmed(both, x, WEIGHT)  # type: ignore[misc]
    assert note == "" and rows_of(module, aten.linear.default) == [16]
    torch.testing.assert_close((last, total), both(x, WEIGHT))


def test_a_slice_whose_memory_the_caller_gets_stays_a_view() -> None:
    def view(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w)[:, -1:]

    x = torch.randn(2, 16, 8)
    result, note, _ = trimmed(view, x, WEIGHT)
    assert note == "" and result.stride() == view(x, WEIGHT).stride()


def test_a_value_that_is_written_in_place_stays_whole() -> None:
    def written(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, w)
        h[:, 0] += 1.0
        return F.linear(h, w)[:, :1] * 2

    x = torch.randn(2, 16, 8)
    result, _, module = trimmed(written, x, WEIGHT)
    torch.testing.assert_close(result, written(x, WEIGHT))
    assert rows_of(module, aten.linear.default) == [16, 1]


def test_a_softmax_over_the_rows_needs_all_of_them() -> None:
    def over_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.softmax(F.linear(x, w), 1)[:, -1:] * 2

    x = torch.randn(2, 16, 8)
    result, note, module = trimmed(over_rows, x, WEIGHT)
    assert note == "" and rows_of(module, aten.linear.default) == [16]
    torch.testing.assert_close(result, over_rows(x, WEIGHT))


def test_a_causal_flag_holds_a_query_that_is_not_the_last() -> None:
    def second_to_last(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True)
        return F.linear(out.transpose(1, 2).flatten(2), w)[:, -2:-1] * 2

    q, k = torch.randn(2, 2, 16, 4), torch.randn(2, 2, 16, 4)
    result, note, module = trimmed(second_to_last, q, k, WEIGHT)
    torch.testing.assert_close(result, second_to_last(q, k, WEIGHT))
    assert "1 matrix products" in note
    assert rows_of(module, aten.scaled_dot_product_attention.default) == [16]


def test_active_dropout_draws_the_numbers_that_it_drew_before() -> None:
    def noisy(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.linear(x, w), 0.5, training=True)[:, -1:] * 2

    x = torch.randn(2, 16, 8)
    torch.manual_seed(0)
    result, note, _ = trimmed(noisy, x, WEIGHT)
    torch.manual_seed(0)
    assert note == "" and torch.equal(result, noisy(x, WEIGHT))


def test_a_gradient_keeps_everything_whole() -> None:
    weight = torch.randn(8, 8, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (F.linear(x, weight)[:, -1:] * 2).sum()

    run, road = compile_road(loss)
    run(torch.randn(2, 16, 8))
    assert road.graphs[0].trimmed == ""


OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": F.linear,
    "silu": lambda x, w: F.silu(x),
    "residual": lambda x, w: x + F.linear(x, w),
    "bias": lambda x, w: x + w[0],
    "norm": lambda x, w: F.layer_norm(x, (8,)),
    "mean": lambda x, w: x - x.mean(-1, keepdim=True),
    "heads": lambda x, w: x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "halves": lambda x, w: torch.cat([-x[..., 4:], x[..., :4]], -1),
    "chunks": lambda x, w: torch.cat(x.chunk(2, -1)[::-1], -1),
    "permute": lambda x, w: x.permute(1, 0, 2).permute(1, 0, 2) * 2,
    "softmax": lambda x, w: torch.softmax(x, -1),
    "mix rows": lambda x, w: torch.softmax(x @ x.transpose(1, 2), -1) @ x,
    "shift rows": lambda x, w: x + x.roll(1, 1),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0],
    "double": lambda x, w: x.to(torch.float64).mul(1.5).to(torch.float32),
    "square rows": lambda x, w: x * (x.sum((1, 2), keepdim=True) > 0),
}


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=6),
    cut=st.sampled_from(["last", "first", "middle", "few", "select", "most"]),
    batch=st.integers(1, 2),
)
def test_random_chains_give_what_they_gave(names: list[str], cut: str, batch: int) -> None:
    def chain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = OPERATIONS[name](x, w)
        x = F.linear(x, w)
        if cut == "select":
            return x[:, 5] * 2
        first, last = {"last": (-1, None), "first": (0, 1), "middle": (4, 7), "few": (-3, None), "most": (2, None)}[cut]
        return x[:, first:last] * 2

    torch.manual_seed(0)
    x = torch.randn(batch, 12, 8)
    result, _, _ = trimmed(chain, x, WEIGHT)
    torch.testing.assert_close(result, chain(x, WEIGHT), atol=1e-5, rtol=1e-5)
