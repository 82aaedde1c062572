"""RMSNorm: what is recognised in models and functions, what it means to the bit, and what must be left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lz_compile.lowering.pointwise import meaning, rms_norm
from swap import CASES, assert_same_bits, run, swap

MEANINGS = {
    "llama": ("before weight", 0.0),
    "qwen3": ("before weight", 0.0),
    "mistral": ("before weight", 0.0),
    "phi3": ("before weight", 0.0),
    "t5": ("before weight", 0.0),
    "deepseek": ("before weight", 0.0),
    "llama4": ("before weight", 0.0),
    "olmo2": ("after weight", 0.0),
    "gpt-oss": ("after weight", 0.0),
    "gemma2": ("after weight", 1.0),
    "gemma3": ("after weight", 1.0),
}


@pytest.mark.slow_but("gemma2", "gpt-oss", "llama", "phi3", "t5", "gpt-neox")
@pytest.mark.parametrize("name", list(CASES))
def test_a_model_has_its_regions_and_keeps_its_bits_when_they_are_replaced(name: str) -> None:
    """Of all three kinds: what the other files say of models rests on this."""
    backend, got, expected = run(name, torch.bfloat16)
    case, norms = CASES[name], backend.of("rms_norm")
    ready = [region.kind for region in backend.regions if not region.declined]
    counts = [ready.count(kind) for kind in ("rms_norm", "glu", "rope")]
    assert counts == [case.norms, case.glus, case.ropes] and backend.replaced == sum(counts)
    assert not any(region.declined for region in norms)
    assert {(region.op.cast, region.op.offset) for region in norms} == ({MEANINGS[name]} if norms else set())
    assert all("norm" in region.module for region in norms)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_in_float32_the_norms_are_the_same_though_their_casts_do_nothing(name: str) -> None:
    backend, got, expected = run(name, torch.float32)
    assert len(backend.of("rms_norm")) == CASES[name].norms and not backend.declined()
    assert_same_bits(got, expected)


def test_weightless_norms_of_llama4_have_one_input() -> None:
    backend, _, _ = run("llama4", torch.bfloat16)
    assert [len(region.inputs) for region in backend.of("rms_norm")].count(1) == 4


def llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def inputs(dtype: torch.dtype = torch.bfloat16, rows: int = 6, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, size, generator=generator).to(dtype), torch.randn(size, generator=generator).to(dtype)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_norm_of_pytorch_rounds_after_the_weight(dtype: torch.dtype, weighted: bool, eps: float | None) -> None:
    x, w = inputs(dtype)
    x = 1e-3 * x  # so small that eps shows
    compiled, backend = swap(lambda x, w: torch.nn.functional.rms_norm(x, x.shape[-1:], w if weighted else None, eps))
    got = compiled(x, w)
    assert_same_bits(got, torch.nn.functional.rms_norm(x, x.shape[-1:], w if weighted else None, eps))
    assert backend.replaced == 1 and backend.regions[0].op.cast == "after weight"


def _square_spelled_as_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt((y * y).mean(dim=(x.dim() - 1,), keepdim=True) + 1e-5)).type_as(x) * w


def _square_and_in_place_eps(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return w * torch.rsqrt(y.square().mean(-1, True).add_(1e-5)).mul(y).to(x.dtype)


def _two_upcasts(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x.to(torch.float32) * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def _one_plus_weight_rounded(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + w)).to(x.dtype)


def _one_plus_weight_in_float32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return ((1 + w.float()) * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


def _twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return llama(llama(x, w), w + 1)


def _a_vector_follows_that_is_no_weight_alone(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.float()
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    return y * w + y  # the normalised value has another reader: the norm ends there


SPELLINGS = [
    (llama, 1),
    (_square_spelled_as_product, 1),
    (_square_and_in_place_eps, 1),
    (_two_upcasts, 1),
    (_one_plus_weight_rounded, 1),
    (_one_plus_weight_in_float32, 1),
    (_twice, 2),
    (_a_vector_follows_that_is_no_weight_alone, 1),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fn, count", SPELLINGS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_spelling_keeps_its_bits(fn: Callable[..., Any], count: int, dtype: torch.dtype) -> None:
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs(dtype)), fn(*inputs(dtype)))
    assert backend.replaced == count and not backend.declined()
    assert torch.ops.aten.rsqrt.default not in backend.targets()


def test_a_bfloat16_sum_of_one_and_the_weight_is_a_weight_of_its_own() -> None:
    compiled, backend = swap(_one_plus_weight_rounded)
    compiled(*inputs())
    assert backend.regions[0].op.offset == 0.0
    assert backend.regions[0].op.weight.target is torch.ops.aten.add.Tensor


def test_a_float32_weight_before_a_last_cast_keeps_the_bits() -> None:
    def mixed(x, w):
        y = x.float()
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        return (w * y).to(x.dtype)

    x, w = inputs()[0], inputs(torch.float32)[1]
    compiled, backend = swap(mixed)
    assert_same_bits(compiled(x, w), mixed(x, w))
    assert backend.replaced == 1


def test_a_cast_that_others_read_stays_in_the_graph() -> None:
    def shared(x, w):
        y = x.float()
        return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype), y + 1

    compiled, backend = swap(shared)
    for got, expected in zip(compiled(*inputs()), shared(*inputs())):
        assert_same_bits(got, expected)
    assert backend.replaced == 1 and backend.regions[0].inputs[0].op == "placeholder"


def _of_integers(x, w):
    y = (x * 9).to(torch.int64).float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(torch.int64)


def _times_a_matrix(x, w):
    y = x.float()
    return y.sin() * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))


def _times_a_number(x, w):
    y = x.float()
    return 2.0 * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("fn", [_of_integers, _times_a_matrix, _times_a_number], ids=lambda fn: fn.__name__)
def test_a_norm_ends_where_something_else_follows(fn: Callable[..., Any]) -> None:
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs()), fn(*inputs()))
    assert backend.replaced == 1 and backend.regions[0].op.weight is None


# Not a norm at all: no region is made of it.
def _mean_over_rows(x, w):
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(2).mean(0, keepdim=True) + 1e-5)).to(x.dtype)


def _mean_over_all(x, w):
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(2).mean((-2, -1), keepdim=True) + 1e-5)).to(x.dtype)


def _eps_outside_the_root(x, w):
    y = x.float()
    return w * (y / (y.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5)).to(x.dtype)


def _eps_before_the_mean(x, w):
    y = x.float()
    return w * (y * torch.rsqrt((y.pow(2) + 1e-5).mean(-1, keepdim=True))).to(x.dtype)


def _cube(x, w):
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(3).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _another_value_is_scaled(x, w):
    y = x.float()
    return w * ((y + 1) * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _rounded_value_is_squared(x, w):
    y = x.float() * 1.7
    return w * (y * torch.rsqrt(y.to(x.dtype).float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _product_of_two_values(x, w):
    y = x.float()
    return w * (y * torch.rsqrt((y * y.roll(1)).mean(-1, keepdim=True).abs() + 1e-5)).to(x.dtype)


def _two_statistics_are_added(x, w):
    y = x.float()
    total = y.pow(2).mean(-1, keepdim=True) + y.abs().mean(-1, keepdim=True)
    return w * (y * torch.rsqrt(total)).to(x.dtype)


def _eps_is_counted_twice(x, w):
    y = x.float()
    mean = y.pow(2).mean(-1, keepdim=True)
    return w * (y * torch.rsqrt(torch.add(mean, 1e-3, alpha=2))).to(x.dtype)


def _sum_instead_of_mean(x, w):
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(2).sum(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _layer_norm(x, w):
    y = x.float()
    y = y - y.mean(-1, keepdim=True)
    return w * (y * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _root_is_added(x, w):
    y = x.float()
    return w * (y + torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _mean_in_float64(x, w):
    y = x.float()
    root = torch.rsqrt(y.pow(2).mean(-1, keepdim=True, dtype=torch.float64) + 1e-5)
    return w * (y * root).to(x.dtype)


NEAR_MISSES = [
    _root_is_added,
    _mean_in_float64,
    _mean_over_rows,
    _mean_over_all,
    _eps_outside_the_root,
    _eps_before_the_mean,
    _cube,
    _another_value_is_scaled,
    _rounded_value_is_squared,
    _product_of_two_values,
    _two_statistics_are_added,
    _eps_is_counted_twice,
    _sum_instead_of_mean,
    _layer_norm,
]


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda fn: fn.__name__)
def test_what_only_looks_like_a_norm_is_none(fn: Callable[..., Any]) -> None:
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs()), fn(*inputs()))
    assert not backend.regions


# A norm that may not be replaced: the region says why.
def _in_bfloat16(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def _stays_in_float32(x, w):
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return w.float() * (x * root)


def _statistic_is_returned(x, w):
    y = x.float()
    root = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    return w * (y * root).to(x.dtype) + root.to(x.dtype)


def _input_is_written_meanwhile(x, w):
    x = x.clone()
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    x[:2].add_(1)
    return w * (x * root).to(x.dtype)


def _cast_is_written_meanwhile(x, w):
    y = x.float()
    y[:2].add_(1)
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _eps_from_a_tensor(x, w):
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + w[0].float().abs())).to(x.dtype)


def _of_nothing(x, w):
    return torch.nn.functional.rms_norm(x[:0], x.shape[-1:], w)


DECLINED = [
    (lambda x, w: torch.nn.functional.rms_norm(torch.complex(x.float(), x.float()), w.shape), "dtype torch.complex64"),
    (lambda x, w: torch.nn.functional.rms_norm(x.float(), w.shape, w.double()), "a wider dtype than the computation"),
    (_of_nothing, "there is nothing to compute"),
    (_in_bfloat16, "computes in torch.bfloat16"),
    (_stays_in_float32, "takes torch.bfloat16 and gives torch.float32"),
    (_statistic_is_returned, "an inner value is used elsewhere"),
    (_input_is_written_meanwhile, "is written between its use and the result"),
    (_cast_is_written_meanwhile, "is written before it is used"),
    (_eps_from_a_tensor, "eps is known only at run time"),
    (lambda x, w: torch.nn.functional.rms_norm(x, x.shape), "normalises over several dimensions"),
]


@pytest.mark.parametrize("fn, reason", DECLINED, ids=[reason for _, reason in DECLINED])
def test_a_norm_that_may_not_be_replaced_says_why(fn: Callable[..., Any], reason: str) -> None:
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs()), fn(*inputs()))
    assert backend.replaced == 0 and len(backend.regions) == 1
    assert reason in backend.regions[0].declined


@pytest.mark.parametrize("of_weight", [True, False])
def test_a_norm_that_carries_gradients_is_left_to_autograd(of_weight: bool) -> None:
    x, w = inputs(torch.float32)
    (w if of_weight else x).requires_grad_()
    compiled, backend = swap(llama)
    compiled(x, w).sum().backward()
    assert backend.declined() == ["needs gradient"] and backend.replaced == 0
    assert (w if of_weight else x).grad is not None


def test_without_gradients_a_parameter_does_not_hinder() -> None:
    x, w = inputs(torch.float32)
    compiled, backend = swap(llama)
    with torch.no_grad():
        compiled(x, w.requires_grad_())
    assert backend.replaced == 1


@pytest.mark.parametrize("fn", [llama, _one_plus_weight_in_float32], ids=lambda fn: fn.__name__)
def test_dynamic_sizes_keep_the_bits(fn: Callable[..., Any]) -> None:
    compiled, backend = swap(fn, dynamic=True)
    for rows in (5, 9, 30):
        assert_same_bits(compiled(*inputs(rows=rows)), fn(*inputs(rows=rows)))
    assert backend.replaced == 1


DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@settings(max_examples=60, deadline=None)
@given(
    dtype=DTYPES,
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    size=st.integers(1, 70),
    cast=st.sampled_from(["before weight", "after weight"]),
    offset=st.sampled_from([0.0, 1.0]),
    weighted=st.booleans(),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_semantic_function_is_within_rounding_of_float64(
    dtype: torch.dtype,
    shape: list[int],
    size: int,
    cast: Any,
    offset: float,
    weighted: bool,
    scale: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(*shape, size, generator=generator)).to(dtype)
    w = torch.randn(size, generator=generator).to(dtype) if weighted else None
    got = rms_norm(x, w, 1e-6, cast, offset)
    a = x.double()
    exact = a / torch.sqrt(a.square().sum(-1, keepdim=True) / size + 1e-6) * (1.0 if w is None else offset + w.double())
    assert got.dtype == dtype and got.shape == x.shape
    # Three roundings to the dtype at most (of the normalised value, of 1 + weight, of the product), and those of a sum.
    step = 1.6 * torch.finfo(dtype).eps + (1e-14 if dtype == torch.float64 else 4e-6)
    assert ((got.double() - exact).abs() <= step * exact.abs() + 2 * torch.finfo(dtype).tiny).all()


def test_a_regions_meaning_is_a_function_of_its_inputs() -> None:
    compiled, backend = swap(llama)
    x, w = inputs()
    expected = compiled(x, w)
    assert_same_bits(meaning(backend.regions[0])(x, w), expected)
