"""Rotary embedding: what is recognised in models and functions, what it means to the bit, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lz_compile.lowering.pointwise import meaning, rope
from swap import assert_same_bits, run, swap


def test_queries_and_keys_of_each_layer_are_rotated() -> None:
    backend, _, _ = run("llama", torch.bfloat16)
    modules = [region.module for region in backend.of("rope")]
    assert modules == [f"model.layers.{layer}.self_attn" for layer in (0, 0, 1, 1)]


def test_gpt_neox_rotates_a_part_of_each_head_which_is_declined() -> None:
    backend, _, _ = run("gpt-neox", torch.bfloat16)
    assert [region.declined for region in backend.of("rope")] == ["rotates a part of the head dimension only"] * 4


def test_tables_in_float32_belong_to_the_rotation_up_to_the_cast() -> None:
    backend, _, _ = run("olmo2", torch.bfloat16)
    for region in backend.of("rope"):
        assert region.op.cos.meta["val"].dtype == torch.float32
        assert region.output.meta["val"].dtype == torch.bfloat16


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def hf(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (x * cos) + (rotate_half(x) * sin)


def _other_order(x, cos, sin):
    return sin * rotate_half(x) + cos * x


def _chunks(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([b.neg(), a], 3) * sin


def _tables_are_unsqueezed(x, cos, sin):
    return hf(x, cos.squeeze(1).unsqueeze(1), sin.squeeze(1).unsqueeze(1))


def _sum_in_place(x, cos, sin):
    return (x * cos).add_(rotate_half(x) * sin)


def inputs(
    dtype: torch.dtype = torch.bfloat16, batch: int = 2, length: int = 5, tables: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, 3, 16, generator=generator).to(dtype).transpose(1, 2)
    angle = torch.rand(1, 1, length, 16, generator=generator) * 6
    return x, angle.cos().to(tables or dtype), angle.sin().to(tables or dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "fn", [hf, _other_order, _chunks, _tables_are_unsqueezed, _sum_in_place], ids=lambda fn: fn.__name__
)
def test_every_spelling_keeps_its_bits(fn: Callable[..., Any], dtype: torch.dtype) -> None:
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs(dtype)), fn(*inputs(dtype)))
    assert backend.replaced == 1
    assert torch.ops.aten.neg.default not in backend.targets()


def test_a_regions_meaning_is_a_function_of_its_inputs() -> None:
    compiled, backend = swap(hf)
    compiled(*inputs())
    assert_same_bits(meaning(backend.regions[0])(*inputs()), hf(*inputs()))


def _sign_swapped(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([b, -a], -1) * sin


def _halves_swapped(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-a, b], -1) * sin


def _no_sign(x, cos, sin):
    return x * cos + x.roll(8, -1) * sin


def _difference(x, cos, sin):
    return x * cos - rotate_half(x) * sin


def _weighted_sum(x, cos, sin):
    return torch.add(x * cos, rotate_half(x) * sin, alpha=2)


def _another_value_is_straight(x, cos, sin):
    return (x + 1) * cos + rotate_half(x) * sin


def _another_position_is_straight(x, cos, sin):
    return x.roll(1, 2) * cos + rotate_half(x) * sin


def _unequal_parts(x, cos, sin):
    return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin


def _halves_of_two_values(x, cos, sin):
    return x * cos + torch.cat((-x[..., 8:], x.sin()[..., :8]), -1) * sin


def _interleaved(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def _over_the_sequence(x, cos, sin):
    x = x[:, :, :4]
    return x * cos[:, :, :4] + torch.cat((-x[:, :, 2:], x[:, :, :2]), 2) * sin[:, :, :4]


NEAR_MISSES = [
    _sign_swapped,
    _halves_swapped,
    _no_sign,
    _difference,
    _weighted_sum,
    _another_value_is_straight,
    _another_position_is_straight,
    _unequal_parts,
    _halves_of_two_values,
    _interleaved,
    _over_the_sequence,
]


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda fn: fn.__name__)
def test_what_only_looks_like_a_rotation_is_none(fn: Callable[..., Any]) -> None:
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs()), fn(*inputs()))
    assert not backend.regions


def _part_of_the_head(x, cos, sin):
    y = torch.cat([x, x], -1)
    return torch.cat([hf(y[..., :16], cos, sin), y[..., 16:]], -1)


def _tables_of_different_lengths(x, cos, sin):
    return x * cos[:, :, :1] + rotate_half(x) * sin


def _three_dimensions(x, cos, sin):
    return hf(x[0], cos[0], sin[0])


def _the_tables_add_rows(x, cos, sin):
    return hf(x[:, :, :1], cos, sin)


def _rotated_half_is_used_elsewhere(x, cos, sin):
    y = rotate_half(x)
    return x * cos + y * sin + y


def _written_meanwhile(x, cos, sin):
    x = x.clone()
    y = rotate_half(x) * sin
    x[:1].add_(1)
    return x * cos + y


@pytest.mark.parametrize(
    "fn, reason",
    [
        (_part_of_the_head, "rotates a part of the head dimension only"),
        (_tables_of_different_lengths, "cosines and sines differ"),
        (_three_dimensions, "is not [B, H, S, D]"),
        (_the_tables_add_rows, "the tables do not broadcast to the rotated value"),
        (_rotated_half_is_used_elsewhere, "an inner value is used elsewhere"),
        (_written_meanwhile, "is written"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_rotation_that_may_not_be_replaced_says_why(fn: Callable[..., Any], reason: str) -> None:
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs()), fn(*inputs()))
    assert backend.replaced == 0 and len(backend.regions) == 1
    assert reason in backend.regions[0].declined


def test_a_result_in_a_wider_dtype_is_declined() -> None:
    compiled, backend = swap(lambda x, cos, sin: hf(x, cos, sin) * 2)
    compiled(*inputs(tables=torch.float32))
    assert backend.declined() == ["takes torch.bfloat16 and gives torch.float32"]


def test_a_rotation_that_carries_gradients_is_left_to_autograd() -> None:
    x, cos, sin = inputs(torch.float32)
    x.requires_grad_()
    compiled, backend = swap(hf)
    compiled(x, cos, sin).sum().backward()
    assert backend.declined() == ["needs gradient"] and x.grad is not None


def test_dynamic_lengths_keep_the_bits() -> None:
    compiled, backend = swap(hf, dynamic=None)
    for length in (5, 9, 30):
        values = inputs(length=length)
        for value in values:
            torch._dynamo.mark_dynamic(value, 2)
        assert_same_bits(compiled(*values), hf(*values))
    assert backend.replaced == 1


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    tables=st.sampled_from([None, torch.float32]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 20)),
    batched=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_semantic_function_is_a_rotation_within_rounding_of_float64(
    dtype: torch.dtype, tables: torch.dtype | None, sizes: tuple[int, int, int, int], batched: bool, seed: int
) -> None:
    batch, heads, length, pairs = sizes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, length, 2 * pairs, generator=generator).to(dtype)
    angle = 6 * torch.rand(batch if batched else 1, 1, length, pairs, generator=generator)
    cos, sin = (torch.cat([t, t], -1).to(tables or dtype) for t in (angle.cos(), angle.sin()))
    got = rope(x, cos, sin)
    # The rotation of the complex number a + ib by each table entry.
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.complex(cos.double(), sin.double())[..., :pairs]
    exact = torch.cat([turned.real, turned.imag], -1)
    size = torch.cat([turned.abs(), turned.abs()], -1)
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size + 4 * torch.finfo(dtype).tiny).all()
