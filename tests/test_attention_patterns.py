"""Attention spelled in every way that programs spell it, and near misses that must not match."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from road import Road, compile_road

B, H, KV, M, D = 2, 4, 2, 10, 16
MIN = torch.finfo(torch.float32).min


def inputs(kv_heads: int = H, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = [(B, H, M, D), (B, kv_heads, M, D), (B, kv_heads, M, D)]
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shape)


def tril(length: int = M) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def sdpa_default(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_scale_and_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def sdpa_bool_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=tril())


def sdpa_float_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(M, M).masked_fill(~tril(), -math.inf))


def sdpa_three_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view_as(q)


def scale_after_the_product(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), -1) @ v


def scale_on_the_query(q, k, v):
    return torch.softmax((q * D**-0.5) @ k.transpose(2, 3), -1) @ v


def scale_on_query_and_key(q, k, v):
    return torch.softmax((q * D**-0.25) @ (k * D**-0.25).transpose(2, 3), -1) @ v


def scale_twice(q, k, v):
    return torch.softmax((q @ k.mT) * 0.5 / 2.0, -1) @ v


def additive_min_mask(q, k, v):
    mask = torch.where(tril(), 0.0, MIN)
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25 + mask, -1) @ v


def additive_mask_in_place(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.25
    scores += torch.full((M, M), MIN).triu(1)
    return torch.softmax(scores, -1) @ v


def masked_fill(q, k, v):
    return torch.softmax((q @ k.transpose(-1, -2) * 0.25).masked_fill(~tril(), -math.inf), -1) @ v


def where_keeps(q, k, v):
    scores = q @ k.transpose(-1, -2) * 0.25
    return torch.softmax(torch.where(tril(), scores, torch.full([], MIN)), -1) @ v


def softmax_in_float32(q, k, v):
    weights = F.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def inactive_dropout(q, k, v):
    return F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.1, training=False) @ v


def einsum(q, k, v):
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.25, -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def bmm(q, k, v):
    q, k, v = (x.reshape(B * H, M, D) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, -1), v).view(B, H, M, D)


def bmm_with_scores_in_four_dimensions(q, k, v):
    q, k, v = (x.reshape(B * H, M, D) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, M, M) * 0.25 + torch.where(tril(), 0.0, MIN)
    weights = torch.softmax(scores, -1).view(B * H, M, M)
    return torch.bmm(weights, v).view(B, H, M, D)


def baddbmm_without_input(q, k, v):
    q, k, v = (x.reshape(B * H, M, D) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(B * H, M, M), q, k.transpose(1, 2), beta=0, alpha=0.25)
    return torch.bmm(torch.softmax(scores, -1), v).view(B, H, M, D)


def baddbmm_with_mask(q, k, v):
    q, k, v = (x.reshape(B * H, M, D) for x in (q, k, v))
    mask = torch.where(tril(), 0.0, -math.inf).expand(B * H, M, M)
    return torch.bmm(torch.softmax(torch.baddbmm(mask, q * 0.25, k.transpose(1, 2)), -1), v).view(B, H, M, D)


def transposes_and_reshape_around_it(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.permute(0, 1, 3, 2), -1) @ v).transpose(1, 2).reshape(B, M, H * D)


SPELLINGS = [
    sdpa_default,
    sdpa_scale_and_causal,
    sdpa_bool_mask,
    sdpa_float_mask,
    sdpa_three_dimensions,
    scale_after_the_product,
    scale_on_the_query,
    scale_on_query_and_key,
    scale_twice,
    additive_min_mask,
    additive_mask_in_place,
    masked_fill,
    where_keeps,
    softmax_in_float32,
    inactive_dropout,
    einsum,
    bmm,
    bmm_with_scores_in_four_dimensions,
    baddbmm_without_input,
    baddbmm_with_mask,
    transposes_and_reshape_around_it,
]

Function = Callable[..., torch.Tensor]


@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda f: f.__name__)
def test_a_spelling_matches_once_a_layer_and_gives_eagers_answer(fn: Function) -> None:
    def two_layers(q, k, v):
        return fn(q, k, v), fn(q * 2, k, v)

    compiled, road = compile_road(two_layers)
    for seed in range(3):
        qkv = inputs(seed=seed)
        for got, expected in zip(compiled(*qkv), two_layers(*qkv)):
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert len(road.regions) == 2
    assert "inductor" not in road.kernels, [region.reason for region in road.regions]


@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda f: f.__name__)
def test_gradients_still_flow_through_a_spelling(fn: Function) -> None:
    qkv = [x.requires_grad_() for x in inputs()]
    compiled, road = compile_road(fn)
    compiled(*qkv).square().sum().backward()
    got = [x.grad.clone() for x in qkv]
    for x in qkv:
        x.grad = None
    fn(*qkv).square().sum().backward()
    for x, gradient in zip(qkv, got):
        torch.testing.assert_close(gradient, x.grad)
    assert [region.reason for region in road.regions] == ["needs gradient"]


def repeat_kv(x):
    return x[:, :, None].expand(B, KV, H // KV, M, D).reshape(B, H, M, D)


def grouped_by_repeat_kv(q, k, v):
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v))


def grouped_by_repeat_kv_spelled_out(q, k, v):
    return torch.softmax(q @ repeat_kv(k).transpose(2, 3) * 0.25, -1) @ repeat_kv(v)


def grouped_by_repeat_interleave(q, k, v):
    g = H // KV
    return F.scaled_dot_product_attention(q, k.repeat_interleave(g, 1), v.repeat_interleave(g, dim=1))


def grouped_by_enable_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


GROUPED = [grouped_by_repeat_kv, grouped_by_repeat_kv_spelled_out, grouped_by_repeat_interleave, grouped_by_enable_gqa]


@pytest.mark.parametrize("fn", GROUPED, ids=lambda f: f.__name__)
def test_grouped_heads_are_read_once(fn: Function) -> None:
    compiled, road = compile_road(fn)
    qkv = inputs(KV)
    torch.testing.assert_close(compiled(*qkv), fn(*qkv), atol=2e-6, rtol=1e-5)
    (region,) = road.regions
    assert region.shape.startswith(f"batch {B}, {H} heads over {KV}")
    assert region.kernel == "aten.sdpa"
    assert torch.ops.aten.expand.default not in road.targets()


def test_heads_are_repeated_where_no_fused_backend_takes_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from lz_compile.lowering import aten

    monkeypatch.setattr(aten, "takes_groups", lambda device, dtype, masked: False)
    compiled, road = compile_road(grouped_by_repeat_kv_spelled_out)
    qkv = inputs(KV)
    torch.testing.assert_close(compiled(*qkv), grouped_by_repeat_kv_spelled_out(*qkv), atol=2e-6, rtol=1e-5)
    (call,) = [n for m in road.modules for n in m.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert "enable_gqa" not in call.kwargs
    assert call.args[1].meta["val"].shape[1] == H


def test_grouped_heads_stay_grouped_only_where_a_fused_backend_takes_them() -> None:
    from lz_compile.lowering.aten import takes_groups

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert takes_groups(cpu, torch.float32, masked=True)
    assert not takes_groups(cuda, torch.float32, masked=False)
    assert takes_groups(cuda, torch.bfloat16, masked=False)


@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "eager"])
def test_one_head_that_is_broadcast_is_multi_query_attention(spelled: bool) -> None:
    def multi_query(q, k, v):
        if spelled:
            return torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v
        return F.scaled_dot_product_attention(q, k.expand(B, H, M, D), v.expand(B, H, M, D))

    compiled, road = compile_road(multi_query)
    qkv = inputs(1)
    torch.testing.assert_close(compiled(*qkv), multi_query(*qkv), atol=2e-6, rtol=1e-5)
    assert road.regions[0].shape.startswith(f"batch {B}, {H} heads over 1")


def near_miss(fn: Function, qkv: tuple[torch.Tensor, ...] | None = None) -> Road:
    compiled, road = compile_road(fn)
    qkv = qkv or inputs()
    got, expected = compiled(*qkv), fn(*qkv)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    return road


def test_heads_repeated_in_the_other_order_are_not_taken_for_groups() -> None:
    def tiled(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat(1, H // KV, 1, 1), v.repeat(1, H // KV, 1, 1))

    road = near_miss(tiled, inputs(KV))
    assert road.regions[0].shape.startswith(f"batch {B}, {H} heads over {H}")


def test_a_softmax_over_the_queries_is_declined() -> None:
    road = near_miss(lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -2) @ v)
    assert road.kernels == ["inductor"]


def test_weights_that_are_returned_are_declined() -> None:
    def with_weights(q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v, weights

    compiled, road = compile_road(with_weights)
    qkv = inputs()
    for got, expected in zip(compiled(*qkv), with_weights(*qkv)):
        torch.testing.assert_close(got, expected)
    assert [region.reason for region in road.regions] == ["attention weights are used elsewhere"]


def test_scores_that_are_used_elsewhere_are_declined() -> None:
    def with_scores(q, k, v):
        scores = q @ k.transpose(-1, -2)
        return (torch.softmax(scores, -1) @ v) + scores.mean()

    assert near_miss(with_scores).kernels == ["inductor"]


def test_a_scale_after_a_bias_scales_the_bias() -> None:
    road = near_miss(lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2) + torch.ones(M, M).triu()) * 0.25, -1) @ v)
    assert "additive mask" in road.regions[0].mask


def test_a_product_without_transpose_is_declined() -> None:
    def square(q, k, v):
        k = F.pad(k, (0, 0, 0, D - M))
        return torch.softmax(q @ k, -1) @ F.pad(v, (0, 0, 0, D - M))

    assert near_miss(square).kernels == ["inductor"]


def test_active_dropout_is_declined() -> None:
    def dropped(q, k, v):
        return F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.5, training=True) @ v

    compiled, road = compile_road(dropped)
    compiled(*inputs())
    assert [region.reason for region in road.regions] == ["dropout is active"]


def test_a_fill_value_that_the_softmax_still_sees_is_declined() -> None:
    road = near_miss(lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~tril(), -5.0), -1) @ v)
    assert road.kernels == ["inductor"]


def test_a_softmax_narrower_than_its_mask_is_declined() -> None:
    def narrow(q, k, v):
        mask = torch.full((M, M), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
        return torch.softmax(q @ k.transpose(-1, -2) + mask, -1, dtype=torch.float32).double() @ v

    assert near_miss(narrow, inputs(dtype=torch.float64)).kernels == ["inductor"]


def test_a_softmax_that_routes_tokens_is_no_attention() -> None:
    def router(q, k, v):
        return torch.softmax(q @ q.new_ones(D, 4), -1).sum() + v

    assert near_miss(router).regions == []


def test_a_key_that_is_written_between_its_copy_and_its_use_is_declined() -> None:
    def overwritten(q, k, v):
        k, v = k.clone(), v.clone()
        wide = repeat_kv(k)
        k.zero_()
        return F.scaled_dot_product_attention(q, wide, repeat_kv(v))

    road = near_miss(overwritten, inputs(KV))
    assert road.kernels == ["inductor"]
    assert "written" in road.regions[0].reason


def test_a_mask_that_is_written_after_it_was_built_keeps_its_last_value() -> None:
    def modified(q, k, v):
        mask = tril().clone()
        mask[:, 0] = False
        mask[5] = True
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    near_miss(modified)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "eager"])
def test_a_random_four_dimensional_mask_gives_eagers_answer(spelled: bool, dtype: torch.dtype) -> None:
    def attend(q, k, v, mask):
        if not spelled:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) * 0.25
        scores = scores.masked_fill(~mask, MIN) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, -1) @ v

    compiled, _ = compile_road(attend)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(B, H, M, M, generator=generator) < 0.6
        mask[0, 0, 3] = False
        if dtype == torch.float32:
            mask = torch.where(mask, torch.randn(B, H, M, M, generator=generator), -math.inf)
        qkv = inputs(seed=seed)
        torch.testing.assert_close(compiled(*qkv, mask), attend(*qkv, mask), atol=2e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("fill", [-math.inf, MIN], ids=["-inf", "min"])
def test_a_row_without_visible_keys_gives_what_eager_gives(fill: float) -> None:
    def left_padded(q, k, v, valid):
        mask = tril() & valid[:, None, None, :]
        spelled = torch.softmax(q @ k.transpose(-1, -2) * 0.25 + torch.where(mask, 0.0, fill), -1) @ v
        return spelled, F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    compiled, road = compile_road(left_padded)
    valid = torch.ones(B, M, dtype=torch.bool)
    valid[0, :4] = False
    qkv = inputs()
    for got, expected in zip(compiled(*qkv, valid), left_padded(*qkv, valid)):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5, equal_nan=True)
    assert road.kernels == ["cpu.ranges", "cpu.ranges"]


def write_with_index_copy(cache, position, new):
    return cache.index_copy_(2, position, new)


def write_with_index_put(cache, position, new):
    cache[:, :, position] = new
    return cache


def write_with_slice_assignment(cache, position, new):
    cache[:, :, 3:4] = new
    return cache


def write_with_cat(cache, position, new):
    return torch.cat([cache, new], 2)


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_with_index_copy, "index_copy_"),
        (write_with_index_put, "index_put_"),
        (write_with_slice_assignment, "slice assignment"),
        (write_with_cat, "cat"),
    ],
)
def test_the_cache_behind_a_write_is_known(write: Function, kind: str) -> None:
    def step(q, k, v, key_cache, value_cache, position):
        key, value = write(key_cache, position, k), write(value_cache, position, v)
        return F.scaled_dot_product_attention(q, key, value)

    compiled, road = compile_road(step)
    q, k, v = (x[:, :, :1] for x in inputs())
    caches = [torch.randn(B, H, 8, D) for _ in range(2)]
    expected_caches = [cache.clone() for cache in caches]
    position = torch.tensor([3])
    got = compiled(q, k, v, *caches, position)
    torch.testing.assert_close(got, step(q, k, v, *expected_caches, position), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(caches, expected_caches)
    assert road.regions[0].cache == f"{kind} into key_cache"
