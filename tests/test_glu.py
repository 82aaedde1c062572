"""Gated linear units: what is recognised in models and functions, what it means to the bit, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lz_compile.lowering.pointwise import glu, meaning
from swap import assert_same_bits, run, swap


@pytest.mark.parametrize(
    "name, patterns",
    [
        ("llama", ["SwiGLU"] * 2),
        ("phi3", ["SwiGLU, packed"] * 2),
        ("gemma2", ["GEGLU (tanh)"] * 2),
        ("llama4", ["SwiGLU, packed", "SwiGLU"] * 2),  # routed experts, and the shared one
    ],
)
def test_each_layer_of_a_model_has_its_units(name: str, patterns: list[str]) -> None:
    backend, _, _ = run(name, torch.bfloat16)
    assert sorted(region.pattern for region in backend.of("glu")) == sorted(patterns)


def inputs(dtype: torch.dtype = torch.bfloat16, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(2, rows, 32, generator=generator).to(dtype)
    return a, b


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_both_orders_of_every_activation_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    activation = FUNCTIONS[name]
    for fn in (lambda a, b: activation(a) * b, lambda a, b: b * activation(a)):
        compiled, backend = swap(fn)
        assert_same_bits(compiled(*inputs(dtype)), fn(*inputs(dtype)))
        assert backend.replaced == 1
        assert backend.regions[0].op.activation == name and backend.regions[0].op.packed is None
        assert [node.name for node in backend.regions[0].inputs] == ["arg0_1", "arg1_1"]


def _chunk(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _split(x):
    gate, up = x.split(x.shape[-1] // 2, dim=1)
    return up * F.silu(gate)


def _split_sizes(x):
    gate, up = torch.split(x, [16, 16], -1)
    return F.silu(gate) * up


def _slices(x):
    return F.silu(x[..., :16]) * x[..., 16:]


def _slice_from_the_end(x):
    return F.silu(x[..., :-16]) * x[..., -16:]


def _narrow(x):
    return F.silu(x.narrow(1, 0, 16)) * x.narrow(1, 16, 16)


@pytest.mark.parametrize(
    "fn", [_chunk, _split, _split_sizes, _slices, _slice_from_the_end, _narrow], ids=lambda fn: fn.__name__
)
def test_halves_of_one_projection_are_packed(fn: Callable[..., Any]) -> None:
    x, _ = inputs()
    compiled, backend = swap(fn)
    assert_same_bits(compiled(x), fn(x))
    (region,) = backend.regions
    assert backend.replaced == 1 and region.pattern == "SwiGLU, packed"
    assert region.inputs == (region.op.packed,) and region.op.packed.op == "placeholder"
    assert_same_bits(meaning(region)(x), fn(x))


def _up_comes_first(x):
    up, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _overlapping(x):
    return F.silu(x[..., :16]) * x[..., 8:24]


def _interleaved(x):
    return F.silu(x[..., ::2]) * x[..., 1::2]


def _middle_of_three(x):
    _, up, _ = torch.split(x, [8, 16, 8], -1)
    return F.silu(x[..., :16]) * up


def _rows(x):
    gate, up = x.chunk(2, dim=0)
    return F.silu(gate) * up


def _every_second(x):
    return F.silu(x[..., ::2]) * x[..., 16:]


def _quarters(x):
    return F.silu(x[..., :8]) * x[..., 8:16]


def _largest(x):
    return F.silu(x.topk(16, -1)[0]) * x[..., 16:]


def _of_two_tensors(x):
    return F.silu(x[..., :16]) * (x + 1)[..., 16:]


@pytest.mark.parametrize(
    "fn",
    [
        _up_comes_first,
        _overlapping,
        _interleaved,
        _middle_of_three,
        _rows,
        _every_second,
        _quarters,
        _largest,
        _of_two_tensors,
    ],
    ids=lambda fn: fn.__name__,
)
def test_other_parts_of_a_tensor_are_not_packed(fn: Callable[..., Any]) -> None:
    x, _ = inputs()
    compiled, backend = swap(fn)
    assert_same_bits(compiled(x), fn(x))
    assert backend.replaced == 1 and backend.regions[0].op.packed is None


NEAR_MISSES = {
    "squared ReLU": lambda a, b: (lambda y: y * y)(F.relu(a)) + b,
    "sigmoid": lambda a, b: torch.sigmoid(a) * b,
    "a factor is broadcast": lambda a, b: F.silu(a[:1]) * b,
    "a scaled activation": lambda a, b: F.silu(a) * 2.0 + b,
    "a sum": lambda a, b: F.silu(a) + b,
    "another activation": lambda a, b: F.leaky_relu(a) * b,
    "integers": lambda a, b: F.relu((a * 9).to(torch.int64)) * (b * 9).to(torch.int64),
    "the product is wider": lambda a, b: F.silu(a) * b.float(),
    "the activation is cast": lambda a, b: F.silu(a.float()).to(a.dtype) * b,
}


@pytest.mark.parametrize("name", list(NEAR_MISSES))
def test_what_only_looks_like_a_unit_is_none(name: str) -> None:
    fn = NEAR_MISSES[name]
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs()), fn(*inputs()))
    assert not backend.regions


def _written_meanwhile(a, b):
    a = a.clone()
    y = F.silu(a)
    a[:2].add_(1)
    return y * b + a


def _half_is_written(a, b):
    a = a.clone()
    gate, up = a.chunk(2, -1)
    y = F.silu(gate)
    a[:2].mul_(2)
    return y * up


def _up_is_written_in_place(a, b):
    b = b.clone()
    return b.mul_(F.silu(a))


def _activation_is_used_elsewhere(a, b):
    y = F.silu(a)
    return y * b + y


@pytest.mark.parametrize(
    "fn, reason",
    [
        (_activation_is_used_elsewhere, "an inner value is used elsewhere"),
        (_written_meanwhile, "is written between its use and the result"),
        (_half_is_written, "is written"),
        (_up_is_written_in_place, "its input is written in place"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_unit_that_may_not_be_replaced_says_why(fn: Callable[..., Any], reason: str) -> None:
    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs()), fn(*inputs()))
    assert backend.replaced == 0 and len(backend.regions) == 1
    assert reason in backend.regions[0].declined


def test_a_product_in_the_activations_own_memory_is_replaced() -> None:
    def fn(a, b):
        return F.silu(a).mul_(b)

    compiled, backend = swap(fn)
    assert_same_bits(compiled(*inputs()), fn(*inputs()))
    assert backend.replaced == 1


def test_a_unit_that_carries_gradients_is_left_to_autograd() -> None:
    a, b = inputs(torch.float32)
    a.requires_grad_()
    compiled, backend = swap(lambda a, b: F.silu(a) * b)
    compiled(a, b).sum().backward()
    assert backend.declined() == ["needs gradient"] and a.grad is not None


@pytest.mark.parametrize("fn", [_chunk, _slices], ids=lambda fn: fn.__name__)
def test_dynamic_rows_keep_the_bits(fn: Callable[..., Any]) -> None:
    compiled, backend = swap(fn, dynamic=True)
    for rows in (5, 9, 30):
        x, _ = inputs(rows=rows)
        assert_same_bits(compiled(x), fn(x))
    assert backend.regions[0].pattern.startswith("SwiGLU") and backend.replaced == 1


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    name=st.sampled_from(list(FUNCTIONS)),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_semantic_function_is_within_rounding_of_float64(
    dtype: torch.dtype, name: Any, shape: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    got = glu(gate, up, name)
    g = gate.double()
    exact = {
        "silu": lambda: g / (1 + torch.exp(-g)),
        "gelu": lambda: 0.5 * g * (1 + torch.erf(g / 2**0.5)),
        "gelu_tanh": lambda: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
        "relu": lambda: g.clamp(min=0),
    }[name]() * up.double()
    assert got.dtype == dtype
    tail = 1e-5 + 2 * torch.finfo(dtype).tiny  # 1 + erf cancels in float32 where the gate is far below zero
    assert ((got.double() - exact).abs() <= 3 * torch.finfo(dtype).eps * exact.abs() + tail).all()
