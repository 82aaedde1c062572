"""Graphs that almost are an attention, one for each condition that a pattern asks: the region says why it was left, and
the answer is eager's.  `make mutate` takes the conditions away one by one; these tests then fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from road import Road, compile_road

B, H, M, N, D = 2, 4, 6, 10, 8
LEAST = torch.finfo(torch.float32).min

Function = Callable[..., Any]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(heads: tuple[int, int, int] = (H, H, H), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    lengths = (M, N, N)
    return tuple(values(B, h, n, D, seed=i, dtype=dtype) for i, (h, n) in enumerate(zip(heads, lengths)))


def stacked() -> tuple[torch.Tensor, ...]:
    return tuple(x.flatten(0, 1) for x in qkv())


def attend(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, -1) @ v


def road_of(fn: Function, *inputs: Any, dynamic: bool = False, tolerance: float = 2e-6) -> Road:
    """What the road did with ``fn``, after its results, and what it wrote into its inputs, were compared to eager's."""
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    compiled, road = compile_road(fn, dynamic=dynamic)
    torch.manual_seed(0)
    expected = fn(*inputs)
    torch.manual_seed(0)
    got = compiled(*copies)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(copies, list(inputs))
    return road


def reasons(road: Road) -> list[str]:
    return [region.reason for region in road.regions if region.kernel == "inductor"]


# -- attention sites that are declined, with the reason -------------------------------------------------------------


def dropout_in_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def softmax_of_integers(q, k, v):
    return attend((q @ k.mT * 4).to(torch.int64).float(), v)


def rounded_weights(q, k, v):
    return torch.softmax(q @ k.mT * 9, -1).to(torch.int64).float() @ v


def values_of_another_dtype(q, k, v):
    return torch.softmax(q @ k.mT, -1).double() @ v.double()


def keys_for_all_batches(q, k, v):
    return attend(q @ k[:1].mT, v)


def values_for_all_batches(q, k, v):
    return attend(q @ k.mT, v[:1])


def keys_of_two_dimensions(q, k, v):
    return attend(q @ k[0, 0].mT, v)


def everything_of_five_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q[None], k[None], v[None])


def everything_of_two_dimensions(q, k, v):
    return attend(q[0, 0] @ k[0, 0].mT, v[0, 0])


def transposed_values_in_an_einsum(q, k, v):
    return torch.einsum("bhqk,bhdk->bhqd", torch.softmax(q @ k.mT, -1), v.mT.contiguous())


def one_key_head_and_many_value_heads_spelled_out(q, k, v):
    return attend(q @ k[:, :1].mT, v)


def mask_and_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(M, N).tril(2) > 0, is_causal=True)


def scaled_by_a_number_that_was_written(q, k, v):
    scale = torch.full((), 0.5)
    scale.mul_(2)
    return attend(q @ k.mT * scale, v)


def keys_that_are_not_transposed(q, k, v):
    return attend(q @ k[:, :, :D], v[:, :, :D])


def keys_of_permuted_batch(q, k, v):
    return attend(q[:, :2] @ k[:, :2].permute(1, 0, 3, 2), v[:, :2])


def keys_written_behind_the_product(q, k, v):
    k = k.clone()
    scores = q @ k.mT
    k.zero_()
    return attend(scores, v)


def mask_written_behind_the_scores(q, k, v):
    bias = v.new_ones(M, N).tril()
    scores = q @ k.mT + bias
    bias.zero_()
    return attend(scores, v)


def heads_and_batch_swapped_in_an_einsum(q, k, v):
    scores = torch.einsum("bhqd,bhkd->hbqk", q[:, :2], k[:, :2])
    return attend(scores, v[:, :2])


def keys_of_swapped_heads_in_an_einsum(q, k, v):
    return attend(torch.einsum("bhqd,hbkd->bhqk", q[:, :2], k[:, :2]), v[:, :2])


def diagonal_of_the_queries_in_an_einsum(q, k, v):
    return attend(torch.einsum("bhqq,bhkq->bhqk", q[:, :, :, :M], k[:, :, :, :M]), v)


def scores_without_heads_in_an_einsum(q, k, v):
    return attend(torch.einsum("bqd,bkd->bqk", q[:, 0], k[:, 0]), v[:, 0])


def scaled_at_run_time(q, k, v, scale):
    return attend(q @ k.mT * scale, v)


def a_number_added(q, k, v):
    return attend(q @ k.mT + 1.0, v)


def scores_added_twice(q, k, v, bias):
    return attend(torch.add(bias, q @ k.mT, alpha=2), v)


def scores_subtracted(q, k, v, bias):
    return attend(bias - q @ k.mT, v)


def scores_written_into_the_bias(q, k, v, bias):
    return attend(bias.expand(B, H, M, N).clone().add_(q @ k.mT), v)


def scores_written_into_an_input(q, k, v, bias):
    bias += (q @ k.mT).sum((0, 1))
    return attend((q @ k.mT).mul_(0.5) + bias, v)


def an_integer_bias(q, k, v):
    return attend(q @ k.mT + torch.arange(N), v)


def a_bias_of_five_dimensions(q, k, v, bias):
    return attend(q @ k.mT + bias.expand(2, 1, 1, M, N), v)


def a_mask_with_more_queries(q, k, v, bias):
    return attend(q[:, :, :1] @ k.mT + bias, v)


def one_query_head_for_many_key_heads(q, k, v):
    return attend(q[:, :1] @ k.mT, v)


def one_key_head_and_many_value_heads(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :1], v)


def keys_for_all_batches_of_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k[:1], v[:1])


def no_query(q, k, v):
    return F.scaled_dot_product_attention(q[:, :, :0], k, v)


def repeated_heads_that_are_overwritten(q, k, v):
    wide = k[:, :2, None].expand(B, 2, H // 2, N, D).reshape(B, H, N, D)
    wide[:, 0] = 1.0
    return F.scaled_dot_product_attention(q, wide, v[:, :2].repeat_interleave(H // 2, 1))


def scores_in_two_dimensions(q, k, v):
    return torch.softmax((q @ k.mT).view(-1, N), -1).view(B, H, M, N) @ v


def rows_softened_over_heads(q, k, v):
    return torch.softmax((q @ k.mT).view(B, M, H * N), -1).view(B, H, M, N) @ v


def split_into_heads_twice(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(B, H, M, N).view(B * H, M, N).view(H, B, M, N)
    return torch.bmm(torch.softmax(scores, -1).view(B * H, M, N), v)


def finite_rows_in_float16(q, k, v, keep):
    q, k, v = (x.half() for x in (q, k, v))
    return attend(q @ k.mT + torch.where(keep, 0.0, torch.finfo(torch.float16).min).half(), v)


def filled_with_a_mask_of_run_time(q, k, v, keep):
    return attend((q @ k.mT).masked_fill(keep, keep.sum() * -1e9), v)


DECLINED = [
    (one_key_head_and_many_value_heads_spelled_out, "shapes of query, key and value do not fit"),
    (mask_and_causal, "both a mask and is_causal"),
    (keys_that_are_not_transposed, "the keys are not transposed by a view of two dimensions"),
    (keys_written_behind_the_product, "is written between its use and the result"),
    (mask_written_behind_the_scores, "is written between its use and the result"),
    (dropout_in_sdpa, "dropout is active"),
    (softmax_of_integers, "scores or weights are rounded to integers"),
    (rounded_weights, "scores or weights are rounded to integers"),
    (values_of_another_dtype, "query, key and value differ in dtype"),
    (keys_for_all_batches, "the product broadcasts over the batch"),
    (values_for_all_batches, "the product broadcasts over the batch"),
    (keys_of_two_dimensions, "query, key and value are not all 4-d"),
    (everything_of_five_dimensions, "query, key and value are not all 4-d"),
    (everything_of_two_dimensions, "query, key and value are not all 4-d"),
    (transposed_values_in_an_einsum, "einsum 'bhqk,bhdk->bhqd' is not weights times values"),
    (diagonal_of_the_queries_in_an_einsum, "einsum 'bhqq,bhkq->bhqk' is not queries times keys"),
    (scores_without_heads_in_an_einsum, "einsum 'bqd,bkd->bqk' is not queries times keys"),
    (a_number_added, "a number is added to the scores"),
    (an_integer_bias, "the mask has dtype torch.int64"),
    (one_query_head_for_many_key_heads, "query heads are not a multiple of key/value heads"),
    (one_key_head_and_many_value_heads, "heads of query and key differ"),
    (keys_for_all_batches_of_sdpa, "query, key and value broadcast over the batch"),
    (no_query, "there is nothing to compute"),
    (repeated_heads_that_are_overwritten, "is written before it is used"),
    (scores_in_two_dimensions, "the scores are reshaped"),
    (rows_softened_over_heads, "the scores are reshaped"),
    (split_into_heads_twice, "the scores are reshaped"),
]


@pytest.mark.parametrize(("fn", "reason"), DECLINED, ids=lambda x: getattr(x, "__name__", ""))
def test_a_near_miss_is_declined_with_its_reason_and_gives_eagers_answer(fn: Function, reason: str) -> None:
    (found,) = reasons(road_of(fn, *qkv()))
    assert reason in found


READ = [
    scaled_by_a_number_that_was_written,
    keys_of_permuted_batch,
    heads_and_batch_swapped_in_an_einsum,
    keys_of_swapped_heads_in_an_einsum,
]


@pytest.mark.parametrize("fn", READ)
def test_what_only_looks_like_a_near_miss_is_read_and_gives_eagers_answer(fn: Function) -> None:
    assert reasons(road_of(fn, *qkv())) == []


MASKED = [
    (scores_added_twice, "a number is added to the scores"),
    (scores_subtracted, "before the softmax comes aten.sub.Tensor"),
    (scores_written_into_the_bias, "the scores are written into another tensor"),
    (a_bias_of_five_dimensions, "the mask has more than four dimensions"),
    (a_mask_with_more_queries, "the mask broadcasts the scores"),
]


@pytest.mark.parametrize(("fn", "reason"), MASKED, ids=lambda x: getattr(x, "__name__", ""))
def test_a_mask_that_is_almost_one_is_declined_with_its_reason(fn: Function, reason: str) -> None:
    assert reasons(road_of(fn, *qkv(), values(M, N, seed=7))) == [reason]


def test_scores_beside_a_tensor_that_is_written_with_them_give_eagers_answer() -> None:
    road_of(scores_written_into_an_input, *qkv(), values(M, N, seed=7))


def test_a_scale_known_only_at_run_time_goes_to_the_queries() -> None:
    assert reasons(road_of(scaled_at_run_time, *qkv(), torch.tensor(0.5))) == []


def test_a_fill_known_only_at_run_time_is_declined() -> None:
    keep = values(M, N) > 0
    road = road_of(filled_with_a_mask_of_run_time, *qkv(), keep)
    assert reasons(road) == ["masked scores are filled with a number that the softmax may still see"]


def test_rows_of_float16_that_may_see_no_key_are_declined() -> None:
    keep = values(M, N) > 0
    keep[2] = False
    road = road_of(finite_rows_in_float16, *qkv(), keep, tolerance=2e-3)
    assert reasons(road) == ["rows without visible keys depend on the rounding of float16"]


def test_a_length_added_to_the_scores_is_no_mask() -> None:
    road = road_of(lambda q, k, v: attend(q @ k.mT + k.shape[2], v), *qkv(), dynamic=True)
    assert reasons(road) == ["the mask is not a tensor"]


@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "eager"])
def test_a_mask_with_a_gradient_is_declined(spelled: bool) -> None:
    def biased(q, k, v, bias):
        if spelled:
            return attend(q @ k.mT + bias, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    assert reasons(road_of(biased, *qkv(), values(M, N).requires_grad_())) == ["needs gradient (of the mask)"]


def stacked_and_masked_in_three_dimensions(q, k, v, bias):
    scores = torch.bmm(q, k.mT) + bias
    return torch.bmm(torch.softmax(scores.view(B, H, M, N), -1).view(B * H, M, N), v)


def stacked_baddbmm(q, k, v, bias):
    scores = torch.baddbmm(bias, q, k.mT)
    return torch.bmm(torch.softmax(scores.view(B, H, M, N), -1).view(B * H, M, N), v)


def baddbmm_with_half_the_bias(q, k, v, bias):
    return torch.bmm(torch.softmax(torch.baddbmm(bias, q, k.mT, beta=0.5), -1), v)


def baddbmm_then_a_mask(q, k, v, bias):
    return torch.bmm(torch.softmax(torch.baddbmm(bias, q, k.mT) + torch.ones(M, N).tril(), -1), v)


def baddbmm_then_a_scale(q, k, v, bias):
    return torch.bmm(torch.softmax(torch.baddbmm(bias, q, k.mT) * 0.5, -1), v)


def baddbmm_then_a_softcap(q, k, v, bias):
    return torch.bmm(torch.softmax(torch.tanh(torch.baddbmm(bias, q, k.mT) / 5.0) * 5.0, -1), v)


STACKED = [
    (stacked_and_masked_in_three_dimensions, "the mask is applied to stacked heads"),
    (stacked_baddbmm, "the mask is applied to stacked heads"),
    (baddbmm_with_half_the_bias, "baddbmm adds to scores that are scaled or masked afterwards"),
    (baddbmm_then_a_mask, "baddbmm adds to scores that are scaled or masked afterwards"),
    (baddbmm_then_a_scale, "baddbmm adds to scores that are scaled or masked afterwards"),
    (baddbmm_then_a_softcap, "baddbmm adds to scores that are scaled or masked afterwards"),
]


@pytest.mark.parametrize(("fn", "reason"), STACKED, ids=lambda x: getattr(x, "__name__", ""))
def test_scores_that_keep_their_bias_for_its_gradient_are_declined(fn: Function, reason: str) -> None:
    bias = values(B * H, M, N, seed=7).requires_grad_()
    assert reasons(road_of(fn, *stacked(), bias)) == [reason]


def test_a_softcap_over_the_bias_of_baddbmm_is_declined() -> None:
    road = road_of(baddbmm_then_a_softcap, *stacked(), values(B * H, M, N, seed=7))
    assert reasons(road) == ["baddbmm adds to scores that are scaled or masked afterwards"]


def read_product(mask: Function) -> Function:
    """Scores whose product is read by somebody else, so that several steps stay as they are."""

    def attention(q, k, v):
        product = q @ k.mT
        return attend(mask(product), v) + product.mean()

    return attention


LEFT: dict[str, tuple[str, Function]] = {
    "two masks": ("more than one mask", lambda s: s + torch.ones(M, N).tril() + torch.ones(M, N).triu()),
    "a softcap over a mask": (
        "the scores are scaled after the mask",
        lambda s: torch.tanh((s + torch.ones(M, N).tril()) / 5.0) * 5.0,
    ),
    "a scale over a mask": ("the scores are scaled after the mask", lambda s: (s + torch.ones(M, N).tril()) * 2.0),
    "a mask": ("attention weights are used elsewhere", lambda s: s + torch.ones(M, N).tril()),
}


@pytest.mark.parametrize("name", LEFT)
def test_scores_whose_product_is_read_are_declined_for_the_first_step_that_does_not_fit(name: str) -> None:
    reason, mask = LEFT[name]
    assert reasons(road_of(read_product(mask), *qkv())) == [reason]


def test_a_softcap_over_a_bias_of_a_product_is_declined() -> None:
    def capped(q, k, v):
        return attend(torch.tanh((q @ k.mT + torch.ones(M, N).triu()) / 5.0) * 5.0, v)

    assert reasons(road_of(capped, *qkv())) == ["the scores are scaled after the mask"]


def test_the_write_behind_an_attention_is_not_the_one_in_front_of_it() -> None:
    def two_steps(q, k, v, index):
        k[:, :, 3:4] = v[:, :, :1]
        first = F.scaled_dot_product_attention(q, k, v)
        k.index_copy_(2, index, v[:, :, :1])
        return first, F.scaled_dot_product_attention(q, k, v)

    road = road_of(two_steps, *qkv(), torch.tensor([2]))
    assert [region.cache.partition(" into")[0] for region in road.regions] == ["slice assignment", "index_copy_"]


def test_stacked_heads_of_which_keys_have_fewer_are_declined() -> None:
    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q[0], k[0, :2], v[0, :2], enable_gqa=True)

    assert reasons(road_of(grouped, *qkv())) == ["stacked heads of query and key differ"]


def sinks(q, k, v, sink):
    column = sink.reshape(1, -1, 1, 1).expand(B, -1, M, -1)
    return torch.softmax(torch.cat([q @ k.mT, column], -1), -1)[..., :-1] @ v


def sinks_of_stacked_heads(q, k, v, sink):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, H, M, N)
    column = sink.reshape(1, -1, 1, 1).expand(B, -1, M, -1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    return torch.bmm(weights.reshape(B * H, M, N), v.flatten(0, 1))


def test_sinks_of_stacked_heads_are_declined() -> None:
    assert reasons(road_of(sinks_of_stacked_heads, *qkv(), values(H))) == ["attention sinks of stacked heads"]


def test_sinks_with_a_gradient_are_declined() -> None:
    assert reasons(road_of(sinks, *qkv(), values(H).requires_grad_())) == ["needs gradient (of the sinks)"]


# -- what is no attention at all, and what is one all the same ------------------------------------------------------


def test_a_softmax_with_one_product_is_no_attention() -> None:
    assert not road_of(lambda q, k, v: attend(q[..., :1] * k[:, :, :M, 0][:, :, None], v[:, :, :M]), *qkv()).regions
    assert not road_of(lambda q, k, v: torch.softmax(q @ k.mT, -1) * v.sum(), *qkv()).regions


MATCHED = {
    "a cast before the softmax": lambda q, k, v: torch.softmax((q @ k.mT).double(), -1).float() @ v,
    "keys copied after their transposition": lambda q, k, v: attend(q @ k.mT.contiguous(), v),
    "a scale on the transposed keys": lambda q, k, v: attend(q @ (k.mT * 0.5), v),
}


@pytest.mark.parametrize("name", MATCHED)
def test_a_spelling_with_one_more_step_is_attention(name: str) -> None:
    road = road_of(MATCHED[name], *qkv())
    assert [region.reason for region in road.regions if region.kernel == "inductor"] == []
    assert len(road.regions) == 1


# -- repeated heads ---------------------------------------------------------------------------------------------------


def groups(road: Road) -> list[str]:
    """How many key/value heads each site reads."""
    return [region.shape.partition(" over ")[2].partition(",")[0].split()[0] for region in road.regions]


G = 2


def scaled_groups(x: torch.Tensor) -> torch.Tensor:
    return (x[:, :, None] * torch.tensor([1.0, 2.0])[:, None, None]).reshape(B, H, N, D)


REPEATS: dict[str, Function] = {
    "repeated in front of the heads": lambda x: x[:, None].expand(B, G, H // G, N, D).reshape(B, H, N, D),
    "repeated along the keys": lambda x: torch.cat([x, x], 1)[:, :, :5].repeat_interleave(2, 2),
    "repeated over the heads and the keys": lambda x: (
        x[:, :, None, :5].expand(B, H // G, G, 5, D).reshape(B, H // G * G, 5, D).repeat(1, 1, 2, 1)
    ),
    "repeated by several counts": lambda x: x.repeat_interleave(torch.tensor([1, 3]), 1, output_size=4),
    "repeated of three dimensions": lambda x: (
        x[0, :, None].expand(H // G, G, N, D).reshape(1, H, N, D).expand(B, H, N, D)
    ),
    "broadcast over the batch": lambda x: x[:1, :1].expand(B, H, N, D),
    "broadcast of three dimensions": lambda x: x[0, 0].expand(B, H, N, D),
    "three dimensions behind the keys": lambda x: x[0].unsqueeze(2).expand(B, 2, N, G, D).reshape(B, H, N, D),
    "each repetition scaled": scaled_groups,
    "expanded behind a view": lambda x: x.reshape(B, 2, 1, N, D).expand(B, 2, G, N, D).reshape(B, H, N, D),
    "a stack of three": lambda x: x[:, :, None].expand(B, 2, G, N, D).reshape(B, N, H, D).transpose(1, 2),
    "flattened with the wrong dimensions": lambda x: (
        x[:, :, None].expand(B, 2, G, N, D).flatten(2, 3)[:, :, :N].repeat(1, 2, 1, 1)
    ),
    "repeated behind a dimension of one": lambda x: x.unsqueeze(3).expand(B, 2, N, G, D).reshape(B, H, N, D),
}


@pytest.mark.parametrize("name", REPEATS)
def test_heads_that_are_repeated_another_way_give_eagers_answer(name: str) -> None:
    repeat = REPEATS[name]

    def attention(q, k, v, mask):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask)

    # Without a mask, keys that are there twice change nothing.
    inputs, keep = qkv((H, 2, 2)), values(B, H, M, N, seed=9) > 0
    assert groups(road_of(attention, *inputs, keep)) == [str(H)]


def test_a_whole_slice_between_is_no_repetition_of_its_own() -> None:
    def grouped(q, k, v):
        k, v = (x[:, :, None][:, :, :, :N].expand(B, 2, G, N, D).reshape(B, H, N, D) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    assert groups(road_of(grouped, *qkv((H, 2, 2)))) == ["2"]


def test_keys_that_are_repeated_one_head_behind_the_other_are_more_keys() -> None:
    def longer(q, k, v, mask):
        k, v = (x[:, :, None].expand(B, 2, G, N, D).reshape(B, 2, G * N, D) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert groups(road_of(longer, *qkv((2, 2, 2)), values(M, G * N) > 0)) == ["2"]


def test_repeated_heads_that_are_stacked_with_the_batch_give_eagers_answer() -> None:
    def grouped(q, k, v):
        k, v = (x[:, :, None].expand(B, 2, G, N, D).reshape(B * H, N, D) for x in (k, v))
        return F.scaled_dot_product_attention(q.flatten(0, 1), k, v)

    assert len(road_of(grouped, *qkv((H, 2, 2))).regions) == 1


def test_a_slice_of_the_keys_between_is_kept() -> None:
    def grouped(q, k, v):
        k, v = (x[:, :, None][:, :, :, 1:].expand(B, 2, G, N - 1, D).reshape(B, H, N - 1, D) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    road_of(grouped, *qkv((H, 2, 2)))


# -- sinks and shifts -------------------------------------------------------------------------------------------------


def sunk(column_of: Function, dim: int = -1, cut: Function = lambda w: w[..., :-1]) -> Function:
    def attention(q, k, v, sink):
        return cut(torch.softmax(torch.cat([q @ k.mT, column_of(sink)], dim), -1)) @ v

    return attention


def column(sink: torch.Tensor) -> torch.Tensor:
    return sink.reshape(1, -1, 1, 1).expand(B, -1, M, -1)


SUNK: dict[str, Function] = {
    "two columns": sunk(lambda s: torch.cat([column(s), column(s)], -1), cut=lambda w: w[..., :-2]),
    "a column of integers": sunk(lambda s: column((s * 9).to(torch.int64)).float()),
    "sinks of other heads": sunk(lambda s: column(torch.cat([s[1:], s[:1]]))),
    "sinks that are scaled": sunk(lambda s: column(s * 2)),
    "a column that is scaled": sunk(lambda s: column(s) * 2),
    "a column of queries": sunk(lambda s: s[:1].reshape(1, 1, 1, 1).expand(B, H, M, 1)),
    "a matrix of sinks": sunk(lambda s: (s[:, None] * torch.ones(M)).reshape(1, H, M, 1).expand(B, H, M, 1)),
    "sinks of queries among those of heads": sunk(
        lambda s: s[None].expand(M, H).reshape(1, H, M, 1).expand(B, H, M, 1)
    ),
    "weights that are scaled": sunk(column, cut=lambda w: (w * 2.0)[..., :-1]),
    "the first column dropped": sunk(column, cut=lambda w: w[..., 1:]),
    "the last query dropped": sunk(lambda s: column(s), cut=lambda w: F.pad(w[:, :, :-1], (0, 0, 0, 1))[..., :-1]),
    "every second column dropped": sunk(lambda s: column(s), cut=lambda w: F.pad(w[..., ::2], (0, N - 6))),
    "two columns dropped": sunk(column, cut=lambda w: F.pad(w[..., :-2], (0, 1))),
    "a column of one batch only": sunk(lambda s: torch.stack([column(s)[0], column(s * 0)[0]])),
}


@pytest.mark.parametrize("name", SUNK)
def test_columns_beside_the_scores_give_eagers_answer(name: str) -> None:
    road_of(SUNK[name], *qkv(), values(H, seed=3))


def test_sinks_of_one_number_are_no_sinks_of_heads() -> None:
    road_of(sunk(lambda s: s.reshape(1, 1, 1, 1).expand(B, H, M, 1)), *qkv(), values(1, seed=3))


def test_sinks_above_the_scores_are_other_queries() -> None:
    def above(q, k, v, row):
        scores = torch.cat([q @ k.mT, row.expand(B, H, 1, N)], 2)
        return attend(scores, v)

    road_of(above, *qkv(), values(N, seed=3))


def three_pieces(q, k, v, sink):
    return torch.softmax(torch.cat([q @ k.mT, column(sink), column(sink)], -1), -1)[..., :-1] @ F.pad(v, (0, 0, 0, 1))


def sinks_that_meet_the_values(q, k, v, sink):
    return torch.softmax(torch.cat([q @ k.mT, column(sink)], -1), -1) @ F.pad(v, (0, 0, 0, 1))


def sinks_that_fall_twice(q, k, v, sink):
    return torch.softmax(torch.cat([q @ k.mT, column(sink)], -1), -1)[..., :-1][..., :-1] @ v[:, :, :-1]


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (three_pieces, []),
        (sinks_that_meet_the_values, ["the sinks' column meets the values"]),
        (sinks_that_fall_twice, ["after the softmax comes aten.slice.Tensor"]),
    ],
)
def test_sinks_with_other_values_are_left(fn: Function, reason: list[str]) -> None:
    road = road_of(fn, *qkv(), values(H, seed=3))
    assert len(road.regions) == len(reason) and reasons(road) == reason


def shifted_by_a_sum(q, k, v):
    scores = q @ k.mT
    return attend(scores - scores.sum(-1, keepdim=True), v)


def shifted_by_the_largest_of_all(q, k, v):
    scores = q @ k.mT
    return attend(torch.sub(scores, scores.amax(-1, keepdim=True), alpha=2), v)


def shifted_by_the_largest_of_others(q, k, v):
    scores = q @ k.mT
    return attend(scores - (scores * 2).amax(-1, keepdim=True), v)


def shifted_by_the_largest_of_two_dimensions(q, k, v):
    scores = q @ k.mT
    return attend(scores - scores.amax((-1, -2), keepdim=True), v)


def shifted_by_a_row_of_maxima(q, k, v):
    scores = q @ k[:, :, :M].mT
    return (
        attend(scores - scores.amax(-1), v[:, :, :M])
        if M == H
        else attend(scores - scores.amax((0, 1, 2)), v[:, :, :M])
    )


def shifted_by_a_median(q, k, v):
    scores = q @ k.mT
    return attend(scores - scores.median(-1, keepdim=True).values, v)


def shifted_by_where_the_largest_is(q, k, v):
    scores = q @ k.mT
    return attend(scores - scores.max(-1, keepdim=True).indices, v)


@pytest.mark.parametrize(
    "fn",
    [
        shifted_by_a_sum,
        shifted_by_the_largest_of_all,
        shifted_by_the_largest_of_others,
        shifted_by_the_largest_of_two_dimensions,
        shifted_by_a_row_of_maxima,
        shifted_by_a_median,
        shifted_by_where_the_largest_is,
    ],
)
def test_scores_shifted_by_something_else_give_eagers_answer(fn: Function) -> None:
    road_of(fn, *qkv())


# -- scales, softcaps and several masks -------------------------------------------------------------------------------


def divided_by_zero(q, k, v):
    return attend((q @ k.mT).masked_fill(q @ k.mT > 0, 0.0) / 0.0, v)


def divides_a_number(q, k, v):
    return attend(2.0 / (q @ k.mT), v)


def scaled_by_numbers_alone(q, k, v):
    return attend(q @ k.mT * torch.tensor(0.5) * 2.0, v)


def capped_by_two_numbers(q, k, v):
    return attend(torch.tanh(q @ k.mT / 5.0) * 4.0, v)


def capped_without_a_division(q, k, v):
    return attend(torch.tanh(q @ k.mT) * 1.0, v)


def capped_by_a_sum(q, k, v):
    return attend(torch.tanh(q @ k.mT + 5.0) * 5.0, v)


def capped_at_run_time(q, k, v):
    cap = v.sum().abs() + 1
    return attend(torch.tanh(q @ k.mT / cap) * cap, v)


def capped_by_a_number_of_run_time(q, k, v):
    cap = v.sum().abs() + 1
    return attend(torch.tanh(q @ k.mT / cap) * 5.0, v)


def capped_and_read(q, k, v):
    inner = torch.tanh((q @ k.mT) / 5.0)
    return attend(inner * 5.0 + torch.ones(M, N).tril() + torch.ones(M, N).triu(), v) + inner.mean()


def scaled_then_capped_then_scaled(q, k, v):
    return attend(torch.tanh(q @ k.mT * 0.5 / 5.0) * 5.0 * 2.0, v)


def capped_twice(q, k, v):
    return attend(torch.tanh(torch.tanh(q @ k.mT / 5.0) * 5.0 / 3.0) * 3.0, v)


def capped_twice_and_masked(q, k, v):
    once = torch.tanh(q @ k.mT / 5.0) * 5.0
    return attend(torch.tanh(once / 3.0) * 3.0 + torch.ones(M, N).tril() + torch.ones(M, N).triu(), v)


def integers_between_masks(q, k, v):
    return attend((q @ k.mT + torch.ones(M, N).tril()).to(torch.int64).float() + torch.ones(M, N).triu(), v)


def an_integer_mask_beside_another(q, k, v):
    return attend(q @ k.mT + torch.ones(M, N).tril() + torch.arange(N), v)


def a_sum_of_two_products(q, k, v):
    return attend(q @ k.mT + (q * 2) @ k.mT + torch.ones(M, N).tril() + torch.ones(M, N).triu(), v)


def a_scale_of_run_time_between_masks(q, k, v):
    return attend((q @ k.mT + torch.ones(M, N).tril()) * v.sum() + torch.ones(M, N).triu(), v)


def masks_of_five_dimensions(q, k, v):
    bias = torch.ones(1, 1, 1, M, N)
    return attend(q @ k.mT + bias.tril() + bias.triu(), v)


def written_into_another_mask(q, k, v):
    bias = torch.ones(B, H, M, N).tril()
    bias += q @ k.mT + torch.ones(M, N).triu()
    return attend(bias + 0.0 * v.sum(), v)


def a_number_between_masks(q, k, v):
    return attend(q @ k.mT + torch.ones(M, N).tril() + 1.0 + torch.ones(M, N).triu(), v)


def filled_by_a_small_number_between_masks(q, k, v):
    return attend((q @ k.mT + torch.ones(M, N).tril()).masked_fill(torch.ones(M, N).triu(1) > 0, -3.0), v)


STEPS = [
    divided_by_zero,
    divides_a_number,
    scaled_by_numbers_alone,
    capped_by_two_numbers,
    capped_without_a_division,
    capped_by_a_sum,
    capped_at_run_time,
    capped_by_a_number_of_run_time,
    capped_and_read,
    scaled_then_capped_then_scaled,
    capped_twice,
    capped_twice_and_masked,
    integers_between_masks,
    an_integer_mask_beside_another,
    a_sum_of_two_products,
    a_scale_of_run_time_between_masks,
    masks_of_five_dimensions,
    written_into_another_mask,
    a_number_between_masks,
    filled_by_a_small_number_between_masks,
]


@pytest.mark.parametrize("fn", STEPS, ids=lambda f: f.__name__)
def test_steps_that_almost_are_scales_caps_or_masks_give_eagers_answer(fn: Function) -> None:
    road_of(fn, *qkv())


def test_masks_of_stacked_heads_in_several_shapes_become_one() -> None:
    def stacked_masks(q, k, v, bias):
        scores = torch.bmm(q, k.mT) + bias[0, 0]
        scores = scores.view(B, H, M, N) + bias
        scores = scores.view(B * H, M, N) + bias[0, :1] + bias.expand(B, H, M, N).reshape(B * H, M, N)
        return torch.bmm(torch.softmax(scores, -1), v)

    road = road_of(stacked_masks, *stacked(), values(1, H, M, N, seed=5))
    assert "additive mask" in road.regions[0].mask
