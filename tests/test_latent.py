"""Few queries attend to latents instead of expanding them: when, when not, and always with eager's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from road import Road, cast_parameters, compile_road
from tiny import DECODERS

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def deepseek(version: str, attention: str) -> Any:
    torch.manual_seed(0)
    sizes = {**_SIZES, "mlp_layer_types": ["dense"] * 3} if version == "V2" else _SIZES
    config = getattr(transformers, f"Deepseek{version}Config")(**sizes)
    config._attn_implementation = attention
    return getattr(transformers, f"Deepseek{version}ForCausalLM")(config).eval()


def absorbed(road: Road) -> list[int]:
    """How many attentions of each graph read latents."""
    notes = [receipt.note for graph in road.graphs for receipt in graph.receipts if receipt.step == "latents"]
    return [int(note.split()[0]) for note in notes]


@torch.no_grad()
def decode_step(model: Any, run: Any, cache_length: int | None, seed: int = 0) -> torch.Tensor:
    """Logits of one token behind a prompt of nine; with SDPA the second row's prompt is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 96, (2, 10), generator=generator)
    mask = torch.ones_like(ids)
    if model.config._attn_implementation == "sdpa":  # spelled out, a row without keys is NaN
        mask[1, :3] = 0
    dynamic = cache_length is None
    cache = (
        transformers.DynamicCache(config=model.config)
        if dynamic
        else transformers.StaticCache(config=model.config, max_cache_len=cache_length)
    )
    model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache, use_cache=True)
    positions = (mask.cumsum(1) - 1)[:, 9:]
    return run(ids[:, 9:], attention_mask=mask, past_key_values=cache, position_ids=positions, use_cache=True).logits


@pytest.mark.slow_but("32-eager-V2", "None-sdpa-V3")
@pytest.mark.parametrize("version", ["V2", "V3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache_length", [32, None])
def test_every_layer_of_a_decode_step_reads_latents(version: str, attention: str, cache_length: int | None) -> None:
    model = deepseek(version, attention)
    wide = cast_parameters(model, torch.float64)
    compiled, road = compile_road(model)
    for seed in range(2):
        expected = decode_step(wide, wide, cache_length, seed)
        eager = (decode_step(model, model, cache_length, seed) - expected).abs().max()
        got = (decode_step(model, compiled, cache_length, seed) - expected).abs().max()
        assert got <= 1.5 * eager + 1e-6
    assert absorbed(road) == [3]
    assert len([r for r in road.regions if r.kind == "attention"]) == 3
    expansions = [
        node
        for module in road.modules
        for node in module.graph.nodes
        if node.target is torch.ops.aten.copy_.default or node.target is torch.ops.aten.new_empty.default
    ]
    assert not [node for node in expansions if "self_attn" in str(node.meta.get("nn_module_stack"))]


def test_a_prefill_expands_its_own_few_tokens() -> None:
    model = deepseek("V3", "sdpa")
    compiled, road = compile_road(model)
    with torch.no_grad():
        ids = torch.randint(1, 96, (2, 24))
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert absorbed(road) == [0]


def test_a_model_without_latents_is_not_matched_twice() -> None:
    model = DECODERS[0].build("sdpa")
    compiled, road = compile_road(model)
    with torch.no_grad():
        compiled(torch.randint(1, 96, (2, 9)))
    assert road.regions and absorbed(road) == []


def test_it_can_be_switched_off() -> None:
    model = deepseek("V3", "sdpa")
    compiled, road = compile_road(model, absorb_latents=False)
    torch.testing.assert_close(decode_step(model, compiled, 32), decode_step(model, model, 32), atol=1e-5, rtol=1e-4)
    assert absorbed(road) == []


# -- the spelling, piece by piece

HEADS, PLAIN, TURNED, VALUES, RANK, BATCH, KEYS = 3, 5, 4, 7, 6, 2, 17


class Written(nn.Module):
    """A latent attention written by hand; each test changes one thing."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.expand = nn.Linear(RANK, HEADS * (PLAIN + VALUES), bias=bias)
        self.other = nn.Linear(RANK, HEADS * (PLAIN + VALUES), bias=False)

    def parts(self, latents: torch.Tensor, linear: nn.Linear | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        kv = (linear or self.expand)(latents).view(latents.shape[0], latents.shape[-2], HEADS, -1).transpose(1, 2)
        plain, values = kv.split([PLAIN, VALUES], -1)
        return plain, values

    def forward(self, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
        plain, values = self.parts(latents)
        key = torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1)
        return F.scaled_dot_product_attention(query, key, values, mask)


def inputs(queries: int = 1, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(BATCH, 1, queries, KEYS, generator=generator) < 0.7
    mask[..., 0] = True
    return [
        random(BATCH, HEADS, queries, PLAIN + TURNED),
        random(BATCH, 1, KEYS, RANK),
        random(BATCH, 1, KEYS, TURNED),
        mask,
    ]


@torch.no_grad()
def check(module: nn.Module, arguments: list[torch.Tensor], expected_sites: int) -> None:
    """In float64 the two orders of multiplication agree to its roundoff."""
    module = module.double()
    compiled, road = compile_road(module)
    expected = module(*[x.clone() for x in arguments])
    torch.testing.assert_close(compiled(*[x.clone() for x in arguments]), expected, atol=1e-12, rtol=1e-10)
    assert sum(absorbed(road)) == expected_sites


def written(change: Callable[..., Any], **options: Any) -> nn.Module:
    """:class:`Written` with another ``forward``."""
    module = Written(**options)
    module.forward = change.__get__(module)  # type: ignore[method-assign]
    return module


def test_a_concatenated_key_is_read_as_a_copied_one_is() -> None:
    check(Written(), inputs(), 1)


def test_latents_without_a_head_dimension_are_read() -> None:
    query, latents, rotated, mask = inputs()
    check(Written(), [query, latents.squeeze(1), rotated, mask], 1)


def test_no_mask_is_fine() -> None:
    def forward(self: Written, query: Any, latents: Any, rotated: Any) -> Any:
        return Written.forward(self, query, latents, rotated, None)

    check(written(forward), inputs()[:3], 1)


def test_values_may_stand_in_front_of_keys() -> None:
    def forward(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
        kv = self.expand(latents).view(BATCH, KEYS, HEADS, -1).transpose(1, 2)
        values, plain = kv[..., :VALUES], kv[..., VALUES:]
        return F.scaled_dot_product_attention(
            query, torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1), values, mask
        )

    check(written(forward), inputs(), 1)


def test_a_start_in_front_of_the_first_column_is_the_first_column() -> None:
    def forward(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
        kv = self.expand(latents).view(BATCH, KEYS, HEADS, -1).transpose(1, 2)
        plain, values = kv[..., -(PLAIN + VALUES + 3) : PLAIN], kv[..., PLAIN:]
        return F.scaled_dot_product_attention(
            query, torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1), values, mask
        )

    check(written(forward), inputs(), 1)


def test_a_result_may_be_the_query_of_the_next() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first = nn.Linear(RANK, HEADS * (PLAIN + PLAIN + TURNED), bias=False)

        def forward(self, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
            for _ in range(2):
                kv = self.first(latents).view(BATCH, KEYS, HEADS, -1).transpose(1, 2)
                plain, values = kv.split([PLAIN, PLAIN + TURNED], -1)
                key = torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1)
                query = F.scaled_dot_product_attention(query, key, values, mask)
            return query

    check(Twice(), inputs(), 2)


def _bias(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    return Written.forward(self, query, latents, rotated, mask)


def _expanded_is_read(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    key = torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1)
    return F.scaled_dot_product_attention(query, key, values, mask) + values.sum() + key[0, 0, 0, 0]


def _values_of_another_map(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, _ = self.parts(latents)
    _, values = self.parts(latents, self.other)
    key = torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1)
    return F.scaled_dot_product_attention(query, key, values, mask)


def _heads_are_rotated_apart(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    apart = rotated.expand(-1, HEADS, -1, -1) * torch.arange(1, HEADS + 1).view(1, -1, 1, 1)
    return F.scaled_dot_product_attention(query, torch.cat([plain, apart], -1), values, mask)


def _latents_are_written_in_between(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    key = torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1)
    latents.mul_(2)
    return F.scaled_dot_product_attention(query, key, values, mask)


def _the_rotated_part_is_written_in_between(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    key = torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1)
    rotated.add_(1)
    return F.scaled_dot_product_attention(query, key, values, mask)


def _keys_are_changed(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    return F.scaled_dot_product_attention(
        query, torch.cat([plain * 2, rotated.expand(-1, HEADS, -1, -1)], -1), values, mask
    )


def _a_third_write(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    key = plain.new_empty(BATCH, HEADS, KEYS, PLAIN + TURNED)
    key[..., :PLAIN].copy_(plain)
    key[..., PLAIN:].copy_(rotated.expand(-1, HEADS, -1, -1))
    key[..., :1].add_(1)
    return F.scaled_dot_product_attention(query, key, values, mask)


def _parts_overlap(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    key = plain.new_zeros(BATCH, HEADS, KEYS, PLAIN + TURNED)
    key[..., :PLAIN].copy_(plain)
    key[..., PLAIN - 1 : -1].copy_(rotated.expand(-1, HEADS, -1, -1))
    return F.scaled_dot_product_attention(query, key, values, mask)


def _a_key_is_written_after_it_was_joined(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    key = torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1)
    key[..., 1:3].mul_(3)
    return F.scaled_dot_product_attention(query, key, values, mask)


def _the_expansion_is_written(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    kv = self.expand(latents)
    heads = kv.view(BATCH, KEYS, HEADS, -1).transpose(1, 2)
    kv.mul_(2)
    plain, values = heads.split([PLAIN, VALUES], -1)
    return F.scaled_dot_product_attention(
        query, torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1), values, mask
    )


def _a_part_is_written_afterwards(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    key = plain.new_zeros(BATCH, HEADS, KEYS, PLAIN + TURNED)
    key[..., :PLAIN].copy_(plain)
    result = F.scaled_dot_product_attention(query, key, values, mask)
    key[..., PLAIN:].copy_(rotated.expand(-1, HEADS, -1, -1))
    return result


def _hidden_by_a_finite_number(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
    plain, values = self.parts(latents)
    key = torch.cat([plain, rotated.expand(-1, HEADS, -1, -1)], -1)
    scores = (query @ key.transpose(2, 3) / 3).masked_fill(~mask & (mask.sum(-1, keepdim=True) > 20), -1e30)
    return scores.softmax(-1) @ values


@pytest.mark.parametrize(
    "near_miss",
    [
        _expanded_is_read,
        _values_of_another_map,
        _heads_are_rotated_apart,
        _latents_are_written_in_between,
        _the_rotated_part_is_written_in_between,
        _keys_are_changed,
        _a_third_write,
        _parts_overlap,
        _a_key_is_written_after_it_was_joined,
        _the_expansion_is_written,
        _a_part_is_written_afterwards,
        _hidden_by_a_finite_number,
    ],
)
def test_a_near_miss_is_left_alone(near_miss: Callable[..., Any]) -> None:
    check(written(near_miss), inputs(), 0)


def test_a_bias_is_left_alone() -> None:
    check(written(_bias, bias=True), inputs(), 0)


def test_two_copies_side_by_side_are_a_key() -> None:
    def forward(self: Written, query: Any, latents: Any, rotated: Any, mask: Any) -> Any:
        plain, values = self.parts(latents)
        key = plain.new_empty(BATCH, HEADS, KEYS, PLAIN + TURNED)
        key[..., PLAIN:].copy_(rotated.expand(-1, HEADS, -1, -1))
        key[..., :PLAIN].copy_(plain)
        return F.scaled_dot_product_attention(query, key, values, mask)

    check(written(forward), inputs(), 1)


def test_many_queries_expand() -> None:
    check(Written(), inputs(queries=5), 0)


def test_gradients_flow_through_what_was_left_alone() -> None:
    module = Written().double()
    compiled, road = compile_road(module)
    arguments = inputs()
    arguments[1].requires_grad_()
    compiled(*arguments).sum().backward()
    got, arguments[1].grad = arguments[1].grad, None
    module(*arguments).sum().backward()
    torch.testing.assert_close(got, arguments[1].grad)
    assert sum(absorbed(road)) == 0


def test_a_failure_leaves_the_graph_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    import lz_compile.lowering.latent as lowering

    def fails(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(lowering, "attend_to_latents", fails)
    compiled, road = compile_road(Written().double(), strict=False)
    arguments = inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), Written().double()(*arguments))
    assert "failed" in road.graphs[0].reason


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    heads=st.integers(1, 5),
    plain=st.integers(1, 9),
    turned=st.integers(1, 6),
    values=st.integers(1, 9),
    rank=st.integers(1, 12),
    batch=st.integers(1, 3),
    keys=st.integers(2, 20),
    queries=st.integers(1, 2),
    copied=st.booleans(),
    spelled=st.booleans(),
)
def test_any_sizes_give_eagers_answer(
    heads: int,
    plain: int,
    turned: int,
    values: int,
    rank: int,
    batch: int,
    keys: int,
    queries: int,
    copied: bool,
    spelled: bool,
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(heads * (plain + values), rank, dtype=torch.float64)

    def attention(query: torch.Tensor, latents: torch.Tensor, rotated: torch.Tensor, bias: torch.Tensor) -> Any:
        kv = F.linear(latents, weight).view(batch, keys, heads, plain + values).transpose(1, 2)
        first, value = kv.split([plain, values], -1)
        shared = rotated.expand(-1, heads, -1, -1)
        if copied:
            key = first.new_empty(batch, heads, keys, plain + turned)
            key[..., :plain].copy_(first)
            key[..., plain:].copy_(shared)
        else:
            key = torch.cat([first, shared], -1)
        if spelled:
            return (query @ key.mT * 0.3 + bias).softmax(-1) @ value
        return F.scaled_dot_product_attention(query, key, value, bias, scale=0.3)

    shapes = [
        (batch, heads, queries, plain + turned),
        (batch, 1, keys, rank),
        (batch, 1, keys, turned),
        (batch, 1, queries, keys),
    ]
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    compiled, road = compile_road(attention)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), attention(*arguments), atol=1e-11, rtol=1e-9)
    pays = 4 * queries <= plain + turned + values and keys >= 2 * queries
    assert sum(absorbed(road)) == int(pays and heads > 1) or heads == 1


# -- on CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_latents_as_wide_as_deepseeks_are_read_by_our_kernel(
    version: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lz_compile

    monkeypatch.setitem(_SIZES, "kv_lora_rank", 512)
    monkeypatch.setitem(_SIZES, "qk_rope_head_dim", 64)
    model = deepseek(version, "sdpa").cuda()
    half = cast_parameters(model, torch.bfloat16)
    exact = cast_parameters(model, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(half, backend="layerzero", mode=mode)
    with torch.device("cuda"):
        ids = torch.randint(1, 96, (2, 130), device="cpu").cuda()

        def step(prefill: Any, run: Any) -> torch.Tensor:
            cache = transformers.StaticCache(config=model.config, max_cache_len=256)
            with torch.no_grad():
                prefill(ids[:, :129], past_key_values=cache, use_cache=True)
                return run(ids[:, 129:], past_key_values=cache, use_cache=True).logits.double()

        expected = step(exact, exact)
        eager, got = (step(half, run) for run in (half, compiled))
    assert (got - expected).abs().max() <= 1.5 * (eager - expected).abs().max() + 1e-3
    kernels = {region.kernel for region in lz_compile.reports()[-1].regions if region.kind == "attention"}
    assert kernels == {"triton.split_kv"}
