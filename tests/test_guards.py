"""Graphs that almost are an attention, one for each condition that a pattern asks: the region says why it was left, and
the answer is eager's.  `make mutate` takes the conditions away one by one; these tests then fail."""

from __future__ import annotations

import math
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
    (heads_and_batch_swapped_in_an_einsum, "einsum 'bhqd,bhkd->hbqk' is not queries times keys"),
    (keys_of_swapped_heads_in_an_einsum, "einsum 'bhqd,hbkd->bhqk' is not queries times keys"),
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


def test_a_scale_known_only_at_run_time_is_declined() -> None:
    road = road_of(scaled_at_run_time, *qkv(), torch.tensor(0.5))
    assert reasons(road) == ["the scale is known only at run time, or zero"]


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
