"""``lz_compile::attend_cpu`` against the oracle in float64, over everything that its arguments may say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lz_compile.lowering.cpu import attend_cpu
from lz_compile.lowering.semantic import BOUND_COLUMNS, NO_LOWER, NO_UPPER, attend, attend_output

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float64: 1e-10}
FAST = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
SWEEP = settings(FAST, max_examples=4000)


@dataclass
class Call:
    """Arguments of one attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bounds: torch.Tensor | None
    key_mask: torch.Tensor | None
    query_documents: torch.Tensor | None
    key_documents: torch.Tensor | None
    mask: torch.Tensor | None
    scale: float
    chunk: int
    empty_row: int
    sink: torch.Tensor | None = None
    softcap: float = 0.0

    def check(self) -> None:
        """Calls the kernel and the oracle."""
        shared = (self.bounds, self.key_mask, self.query_documents, self.key_documents)
        rest = (self.scale, self.softcap, self.chunk, self.empty_row, self.sink)
        got = attend_cpu(self.query, self.key, self.value, *shared, self.mask, *rest)
        exact = [x.double() for x in (self.query, self.key, self.value)]
        expected = attend(*exact, *shared, self.mask, *rest)
        assert got.dtype == self.query.dtype
        assert got.stride() == attend_output(self.query, self.value).stride()
        tolerance = TOLERANCE[self.query.dtype]
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def randn(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Random values in one of the layouts that programs have."""
    b, h, n, d = shape
    if layout == "heads inside":
        return torch.randn(b, n, h, d, generator=generator).to(dtype).transpose(1, 2)
    if layout == "part of a cache":
        return torch.randn(b, h, n + 3, d + 2, generator=generator).to(dtype)[:, :, 1 : n + 1, :d]
    if layout == "last dimension strided":
        return torch.randn(b, h, d, n, generator=generator).to(dtype).transpose(2, 3)
    return torch.randn(shape, generator=generator).to(dtype)


LAYOUTS = st.sampled_from(["contiguous", "heads inside", "part of a cache", "last dimension strided"])
LENGTHS = st.one_of(st.integers(1, 20), st.integers(1, 20), st.sampled_from([64, 255, 256, 257, 300]))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any call that keeps to the calling convention."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(LENGTHS), draw(LENGTHS)
    size, value_size = draw(st.sampled_from([8, 16])), draw(st.sampled_from([8, 16, 24]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    heads = kv_heads * group
    near = st.integers(-8, 8)
    same_rows = draw(st.booleans())

    key_mask = None
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["random", "prefix", "suffix", "none"]))
        key_mask = torch.rand(batch, keys, generator=generator) < 0.7
        length = torch.randint(0, keys + 1, (batch, 1), generator=generator)
        if kind == "prefix":
            key_mask = torch.arange(keys) < length
        elif kind == "suffix":
            key_mask = torch.arange(keys) >= length
        elif kind == "none":
            key_mask[0] = False
    mask = draw(st.sampled_from(["", "", "bool", "float"])) or None
    dense = None
    if mask is not None:
        full = (batch, heads, queries, keys)
        shape = [n if draw(st.booleans()) else 1 for n in full][draw(st.integers(0, 3)) :]
        visible = torch.rand(shape, generator=generator) < 0.7
        if draw(st.booleans()):
            visible[..., : visible.shape[-1] // 2] = False
        dense = visible
        if mask == "float":
            bias_dtype = draw(st.sampled_from([dtype, torch.float32]))
            hidden = draw(st.sampled_from([-math.inf, torch.finfo(bias_dtype).min]))
            bias = torch.randn(shape, generator=generator).to(bias_dtype)
            dense = torch.where(visible, bias, torch.tensor(hidden, dtype=bias_dtype))

    def row() -> list[int]:
        upper = NO_UPPER if draw(st.booleans()) else keys - queries + draw(near)
        lower = NO_LOWER if draw(st.booleans()) else keys - queries - draw(st.integers(-2, 20))
        start = 0 if draw(st.booleans()) else draw(st.integers(0, keys))
        stop = keys if draw(st.booleans()) else draw(st.integers(0, keys))
        return [upper, lower, start, stop, draw(st.integers(-9, 40)), draw(st.integers(-9, 9)), 0, 0]

    bounds, chunk = None, 0
    if key_mask is not None or draw(st.integers(0, 4)):
        chunk = draw(st.sampled_from([0, 0, 1, 3, 8, 70]))
        first = row()
        bounds = torch.tensor([first if same_rows or not b else row() for b in range(batch)], dtype=torch.int32)
        assert bounds.shape == (batch, BOUND_COLUMNS)
        _tell_holes(bounds, key_mask, dense, batch, keys, draw(st.booleans()))
    documents = [None, None]
    if draw(st.integers(0, 3)) == 0:
        documents = [torch.randint(0, 3, (batch, n), generator=generator).sort(-1).values for n in (queries, keys)]
    return Call(
        randn(generator, (batch, heads, queries, size), dtype, draw(LAYOUTS)),
        randn(generator, (batch, kv_heads, keys, size), dtype, draw(LAYOUTS)),
        randn(generator, (batch, kv_heads, keys, value_size), dtype, draw(LAYOUTS)),
        bounds,
        key_mask,
        *documents,
        dense,
        draw(st.sampled_from([0.25, 1.0, -0.5, 0.0])),
        chunk,
        draw(st.integers(0, 4)),
        2 * torch.randn(heads, generator=generator).to(dtype) if draw(st.integers(0, 3)) == 0 else None,
        draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
    )


def _tell_holes(
    bounds: torch.Tensor,
    key_mask: torch.Tensor | None,
    mask: torch.Tensor | None,
    batch: int,
    keys: int,
    narrows: bool,
) -> None:
    """Sets HOLES truthfully, and, as the emitter does, narrows START and STOP by what is visible."""
    rows = torch.ones(batch, keys, dtype=torch.bool) if key_mask is None else key_mask.clone()
    if mask is not None and narrows:
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        shown = shown[(None,) * (4 - shown.dim())]
        rows &= shown.any(2).any(1)
    for b in range(batch):
        seen = rows[b].nonzero().flatten().tolist()
        if narrows:
            bounds[b, 2] = max(int(bounds[b, 2]), seen[0] if seen else NO_UPPER)
            bounds[b, 3] = min(int(bounds[b, 3]), seen[-1] + 1 if seen else 0)
        start, stop = int(bounds[b, 2]), int(bounds[b, 3])
        bounds[b, 6] = int(start < stop and not bool(rows[b, start:stop].all()))


@FAST
@given(calls())
def test_any_call_gives_the_oracles_answer(call: Call) -> None:
    call.check()


@pytest.mark.slow
@SWEEP
@given(calls())
def test_many_calls_give_the_oracles_answer(call: Call) -> None:
    call.check()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("empty_row", range(5))
@pytest.mark.parametrize("mask", ["none", "bool", "-inf", "min"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing_give_what_is_asked_for(
    dtype: torch.dtype, mask: str, empty_row: int, softcap: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (randn(generator, (2, h, n, 16), dtype, "heads inside") for h, n in ((4, 9), (2, 7), (2, 7)))
    bounds = torch.tensor([[-3, NO_LOWER, 0, 7, 0, 0, 0, 0], [NO_UPPER, NO_LOWER, 7, 7, 0, 0, 0, 0]], dtype=torch.int32)
    dense = None
    if mask != "none":
        dense = torch.rand(2, 1, 9, 7, generator=generator) < 0.5
    if dense is not None and mask != "bool":
        hidden = -math.inf if mask == "-inf" else torch.finfo(dtype).min
        dense = torch.zeros(dense.shape, dtype=dtype).masked_fill(~dense, hidden)
    Call(q, k, v, bounds, None, None, None, dense, 0.5, 0, empty_row, softcap=softcap).check()


@pytest.mark.parametrize("window", [1, 5, 40, 256, 299])
def test_long_queries_with_a_window_run_in_blocks(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (randn(generator, (2, h, 600, 8), torch.float32, "heads inside") for h in (2, 1, 1))
    bounds = torch.tensor([[0, 1 - window, 0, 600, 0, 0, 0, 0], [3, -window, 11, 500, 0, 0, 0, 0]], dtype=torch.int32)
    Call(q, k, v, bounds, None, None, None, None, 0.5, 0, 1).check()


def test_a_bias_of_higher_precision_than_the_query_keeps_it() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (randn(generator, (2, 2, n, 16), torch.bfloat16, "contiguous") for n in (1, 9, 9))
    bias = 200 * torch.rand(2, 1, 1, 9, generator=generator)
    Call(q, k, v, None, None, None, None, bias, 0.25, 0, 0).check()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)])
def test_an_empty_query_gives_an_empty_result(shape: tuple[int, ...]) -> None:
    q = torch.empty(shape)
    k = torch.randn(shape[0], 2, 5, 8)
    bounds = torch.zeros(shape[0], BOUND_COLUMNS, dtype=torch.int32)
    assert attend_cpu(q, k, k, bounds, None, None, None, None, 1.0, 0.0, 0, 0).shape == shape
