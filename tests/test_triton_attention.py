"""The Triton kernels against ``attend`` in float64: in Triton's interpreter on a CPU, and compiled on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from lz_compile.lowering import triton_ops
from lz_compile.lowering.semantic import (
    BOUND_COLUMNS,
    EMPTY_ROW,
    HOLES,
    LOWER,
    NO_LOWER,
    NO_UPPER,
    START,
    STOP,
    UPPER,
    attend,
    attend_output,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter multiplies bfloat16 tiles as integers (triton 3.6), so there bfloat16 is for the GPU alone.
HALF = torch.bfloat16 if CUDA else torch.float16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

pytestmark = pytest.mark.usefixtures("interpreter_reads_loop_bounds")
Arguments = dict[str, Any]
Kernel = Callable[..., torch.Tensor]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


def split_kv(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Three splits of small tiles, so that a few dozen keys already fill several."""
    kwargs.setdefault("config", triton_ops.SplitConfig(16, 3, 4, 2))
    return triton_ops.split_kv(*args, **kwargs)


def tiled(*args: Any, **kwargs: Any) -> torch.Tensor:
    kwargs.setdefault("config", triton_ops.TileConfig(16, 16, 4, 2))
    return triton_ops.tiled(*args, **kwargs)


def qkv(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 5,
    keys: int = 75,
    key_size: int = 64,
    value_size: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return {
        "query": random(batch, heads, queries, key_size),
        "key": random(batch, kv_heads, keys, key_size),
        "value": random(batch, kv_heads, keys, value_size),
        "scale": key_size**-0.5,
    }


def bounds_of(batch: int, keys: int, **columns: int | list[int]) -> torch.Tensor:
    """Bounds that hide nothing but what ``columns`` say."""
    bounds = torch.zeros(batch, BOUND_COLUMNS, dtype=torch.int32)
    bounds[:, UPPER], bounds[:, LOWER], bounds[:, STOP] = NO_UPPER, NO_LOWER, keys
    index = {"upper": UPPER, "lower": LOWER, "start": START, "stop": STOP, "shift": 4, "origin": 5, "holes": HOLES}
    for name, column in columns.items():
        bounds[:, index[name]] = torch.tensor(column, dtype=torch.int32)
    return bounds.to(DEVICE)


def random_mask(*shape: int, seed: int = 1) -> torch.Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., 0] = True
    return mask.to(DEVICE)


def additive(mask: torch.Tensor, dtype: torch.dtype = torch.float32, hidden: float | None = None) -> torch.Tensor:
    """A bias with many values, and the dtype's most negative number (or ``hidden``) where ``mask`` is False."""
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(mask.shape, generator=generator).to(mask.device, dtype)
    return bias.masked_fill(~mask, torch.finfo(dtype).min if hidden is None else hidden)


def assert_is_attend(kernel: Kernel, arguments: Arguments) -> None:
    """The kernel gives what ``attend`` gives in float64, and its strides are those of the fake result."""
    exact = {name: value.double() if name in ("query", "key", "value") else value for name, value in arguments.items()}
    expected = attend(**exact)
    actual = kernel(**arguments)
    query = arguments["query"]
    assert actual.dtype == query.dtype
    assert actual.stride() == attend_output(query, arguments["value"]).stride()
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def mask_cases() -> dict[str, Callable[[int, int, int, int], Arguments]]:
    """What a mask may hold: name -> arguments for (batch 2, heads, queries, keys)."""

    def with_bounds(**columns: Any) -> Callable[[int, int, int, int], Arguments]:
        return lambda b, h, m, n: {"bounds": bounds_of(b, n, **columns)}

    return {
        "no mask": lambda b, h, m, n: {},
        "causal": with_bounds(upper=0),
        "causal with an offset a row": lambda b, h, m, n: {"bounds": bounds_of(b, n, upper=[n - m, 20])},
        "window": with_bounds(upper=[30, 50], lower=[11, 18]),
        "window on both sides": with_bounds(upper=9, lower=-9),
        "start and stop": with_bounds(start=[3, 40], stop=[70, 55]),
        "chunk": lambda b, h, m, n: {
            "bounds": bounds_of(b, n, upper=40, shift=[40, 30], origin=[-5, 7]),
            "chunk": 12,
        },
        "key padding": lambda b, h, m, n: {"bounds": bounds_of(b, n, holes=1), "key_mask": random_mask(b, n)},
        "key padding without bounds": lambda b, h, m, n: {"key_mask": random_mask(b, n).t().contiguous().t()},
        "boolean mask": lambda b, h, m, n: {"mask": random_mask(b, h, m, n)},
        "boolean mask for all heads and queries": lambda b, h, m, n: {"mask": random_mask(b, 1, 1, n)},
        "boolean mask for all rows": lambda b, h, m, n: {"mask": random_mask(1, h, m, n), "bounds": bounds_of(b, n)},
        "expanded boolean mask": lambda b, h, m, n: {"mask": random_mask(b, 1, m, n).expand(b, h, m, n)},
        "additive mask": lambda b, h, m, n: {"mask": additive(random_mask(b, h, m, n))},
        "additive half mask and causal": lambda b, h, m, n: {
            "mask": additive(random_mask(b, 1, m, n), HALF),
            "bounds": bounds_of(b, n, upper=[30, 60]),
        },
        "additive mask with -inf": lambda b, h, m, n: {"mask": additive(random_mask(1, h, m, n), hidden=-torch.inf)},
        "additive mask of large finite numbers": lambda b, h, m, n: {
            "mask": additive(random_mask(b, h, m, n), hidden=-1e9) - 3e38
        },
        "all terms": lambda b, h, m, n: {
            "bounds": bounds_of(b, n, upper=[45, 60], lower=[-40, 10], start=2, stop=[66, 74], holes=1),
            "key_mask": random_mask(b, n),
            "mask": random_mask(b, h, m, n, seed=3),
        },
    }


CASES = mask_cases()


@pytest.mark.parametrize("kernel", [split_kv, tiled])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_mask_gives_the_answer_of_attend(kernel: Kernel, case: str) -> None:
    assert_is_attend(kernel, {**qkv(), **CASES[case](2, 4, 5, 75)})


@pytest.mark.parametrize("case", ["causal", "window", "key padding", "additive mask", "chunk"])
def test_tiles_with_and_without_masking_join_over_many_query_blocks(case: str) -> None:
    assert_is_attend(
        tiled, {**qkv(heads=2, queries=52, keys=70, key_size=16, value_size=16), **CASES[case](2, 2, 52, 70)}
    )


@pytest.mark.parametrize("kernel", [split_kv, tiled])
@pytest.mark.parametrize("sizes", [(64, 64), (80, 80), (128, 128), (96, 64), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_head_sizes_need_not_be_powers_of_two_or_equal(
    kernel: Kernel, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    arguments = qkv(batch=1, keys=40, key_size=sizes[0], value_size=sizes[1], dtype=dtype)
    assert_is_attend(kernel, {**arguments, "bounds": bounds_of(1, 40, upper=30)})


@pytest.mark.slow_but(
    "dtype0-no mask-sizes1",
    "dtype1-window-sizes0",
    "dtype0-additive mask-sizes3",
    "dtype1-no mask-sizes2",
    "dtype0-window-sizes2",
)
@pytest.mark.parametrize("sizes", [(288, 256), (576, 512), (512, 512), (320, 64)])
@pytest.mark.parametrize("case", ["no mask", "window", "additive mask"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_wide_keys_are_read_in_two_blocks(sizes: tuple[int, int], case: str, dtype: torch.dtype) -> None:
    arguments = qkv(heads=6, kv_heads=1, queries=2, keys=40, key_size=sizes[0], value_size=sizes[1], dtype=dtype)
    arguments |= CASES[case](2, 6, 2, 40)
    if case == "additive mask":
        arguments["mask"] = arguments["mask"].to(dtype)
    assert_is_attend(split_kv, arguments)
    assert_is_attend(triton_ops.split_kv, arguments)  # with its own tiles


@pytest.mark.parametrize("empty_row", [1, 4])
def test_an_empty_row_of_wide_keys_attends_to_all_of_them(empty_row: int) -> None:
    arguments = qkv(heads=2, kv_heads=1, queries=2, keys=20, key_size=288, value_size=256)
    assert_is_attend(split_kv, {**arguments, "bounds": bounds_of(2, 20, stop=[0, 20]), "empty_row": empty_row})


@pytest.mark.parametrize("heads, kv_heads, queries", [(1, 1, 1), (8, 1, 1), (8, 2, 3), (3, 3, 16), (16, 1, 9)])
@pytest.mark.parametrize("kernel", [split_kv, tiled])
def test_query_heads_share_their_key_value_head(kernel: Kernel, heads: int, kv_heads: int, queries: int) -> None:
    arguments = qkv(1, heads, kv_heads, queries, 50, 16, 16)
    assert_is_attend(kernel, {**arguments, "bounds": bounds_of(1, 50, upper=33)})


@pytest.mark.parametrize("kernel", [split_kv, tiled])
def test_transposed_inputs_are_read_where_they_are(kernel: Kernel) -> None:
    arguments = qkv(keys=40)
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_is_attend(kernel, {**arguments, "bounds": bounds_of(2, 40, upper=20)})


@pytest.mark.parametrize("kernel", [split_kv, tiled])
def test_a_key_value_head_may_be_broadcast_over_the_batch(kernel: Kernel) -> None:
    arguments = qkv(keys=40)
    for name in ("key", "value"):
        arguments[name] = arguments[name][:1].expand(2, -1, -1, -1)
    assert_is_attend(kernel, arguments)


@pytest.mark.slow_but(
    "additive with -inf-0-tiled",
    "additive with -inf-1-split_kv",
    "additive with -inf-2-tiled",
    "additive-0-split_kv",
    "additive-1-tiled",
    "additive-2-split_kv",
    "boolean-0-tiled",
    "boolean-1-split_kv",
    "boolean-2-tiled",
    "none-0-split_kv",
    "none-1-tiled",
    "none-2-split_kv",
)
@pytest.mark.parametrize("kernel", [split_kv, tiled])
@pytest.mark.parametrize("empty_row", [0, 1, 2])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "additive with -inf"])
def test_a_row_without_visible_keys_gives_what_its_mode_says(kernel: Kernel, empty_row: int, mask: str) -> None:
    arguments = {**qkv(), "empty_row": empty_row}
    if mask == "none":
        arguments["bounds"] = bounds_of(2, 75, upper=[-3, 60], start=[0, 62])
    else:
        visible = random_mask(2, 4, 5, 75)
        visible[0, :, 2] = False
        visible[1, 1] = False
        hidden = -torch.inf if mask == "additive with -inf" else None
        arguments["mask"] = visible if mask == "boolean" else additive(visible, hidden=hidden)
    assert_is_attend(kernel, arguments)


@pytest.mark.parametrize("kernel", [split_kv, tiled])
def test_a_range_that_ends_before_it_starts_holds_no_key(kernel: Kernel) -> None:
    for columns in ({"start": 60, "stop": 20}, {"start": 500}, {"stop": -4}):
        assert_is_attend(kernel, {**qkv(batch=1), "bounds": bounds_of(1, 75, **columns), "empty_row": 2})


@pytest.mark.parametrize("kernel", [split_kv, tiled])
@pytest.mark.parametrize("case", ["causal", "additive mask"])
def test_softcap_bounds_the_scores(kernel: Kernel, case: str) -> None:
    arguments = {**qkv(), **CASES[case](2, 4, 5, 75), "softcap": 3.0, "scale": 1.0}
    assert_is_attend(kernel, arguments)


def sinks(heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits from far below the scores to far above them."""
    return torch.linspace(-30, 9, heads, device=DEVICE).to(dtype)


@pytest.mark.slow_but(
    "window-3.0-tiled", "window-3.0-split_kv", "additive mask-0.0-tiled", "additive mask-0.0-split_kv"
)
@pytest.mark.parametrize("kernel", [split_kv, tiled])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("case", ["no mask", "window", "additive mask"])
def test_an_attention_sink_joins_the_sum_of_exponentials(kernel: Kernel, case: str, softcap: float) -> None:
    arguments = {**qkv(keys=40, key_size=16, value_size=16), **CASES[case](2, 4, 5, 40)}
    arguments |= {"sink": sinks(4), "softcap": softcap}
    assert_is_attend(kernel, arguments)
    without = kernel(**{**arguments, "sink": None})
    assert (kernel(**arguments) - without).abs().max() > 0.1
    far_below = {**arguments, "sink": torch.full((4,), -1e4, device=DEVICE)}
    torch.testing.assert_close(kernel(**far_below), without)


@pytest.mark.slow_but("additive-1-tiled", "none-1-split_kv", "additive-0-split_kv", "none-0-tiled")
@pytest.mark.parametrize("kernel", [split_kv, tiled])
@pytest.mark.parametrize("empty_row", [0, 1])
@pytest.mark.parametrize("mask", ["none", "additive"])
def test_a_row_that_sees_its_sink_alone_gives_zeros(kernel: Kernel, empty_row: int, mask: str) -> None:
    arguments = {**qkv(keys=40), "empty_row": empty_row, "sink": sinks(4)}
    visible = random_mask(2, 4, 5, 40)
    visible[0, :, 2] = False
    if mask == "none":
        arguments["bounds"] = bounds_of(2, 40, upper=[-3, 60], start=[0, 37])
    else:
        arguments["mask"] = visible if mask == "boolean" else additive(visible)
    assert_is_attend(kernel, arguments)
    assert not kernel(**arguments)[0, :, 0 if mask == "none" else 2].any()


@pytest.mark.parametrize("kernel", [split_kv, tiled])
def test_sinks_may_be_strided_and_of_another_dtype(kernel: Kernel) -> None:
    strided = sinks(8, HALF)[::2]
    assert_is_attend(kernel, {**qkv(keys=40, key_size=24, value_size=16), "sink": strided})


@pytest.mark.parametrize("kernel", [split_kv, tiled])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale_is_taken(kernel: Kernel, scale: float) -> None:
    assert_is_attend(kernel, {**qkv(batch=1), "scale": scale})


@pytest.mark.parametrize("order", ["packed", "shuffled", "one document", "all different"])
def test_documents_do_not_see_each_other(order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.arange(60)
    ids = {
        "packed": keys // 23,
        "shuffled": torch.randint(0, 4, (60,), generator=generator),
        "one document": keys * 0 + 7,
        "all different": keys,
    }[order].to(DEVICE)
    documents = torch.stack([ids, ids.flip(0)])
    arguments = qkv(queries=60, keys=60, key_size=16, value_size=16)
    arguments |= {"query_documents": documents, "key_documents": documents.int(), "bounds": bounds_of(2, 60, upper=0)}
    assert_is_attend(tiled, arguments)


def test_a_query_document_without_keys_is_an_empty_row() -> None:
    arguments = qkv(queries=20, keys=40, key_size=16, value_size=16)
    query_documents = torch.arange(20, device=DEVICE)[None] // 5 % torch.tensor([[2], [9]], device=DEVICE)
    key_documents = torch.arange(40, device=DEVICE)[None].expand(2, 40) // 20
    arguments |= {"query_documents": query_documents, "key_documents": key_documents}
    for empty_row in (0, 1, 2):
        assert_is_attend(tiled, {**arguments, "empty_row": empty_row})


EMPTY_ROWS = st.sampled_from(sorted(EMPTY_ROW.values()))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_that_see_no_key_are_filled_wherever_they_lie(data: st.DataObject) -> None:
    """Padding leaves whole blocks, parts of a block, or nothing empty; a block may be empty in one head only."""
    kv_heads, group = data.draw(st.sampled_from([(2, 1), (2, 3), (1, 6)]))
    heads, queries, keys = kv_heads * group, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    arguments = qkv(2, heads, kv_heads, queries, keys, 16, data.draw(st.sampled_from([16, 24])))
    padding = [data.draw(st.integers(0, keys)) for _ in range(2)]
    side = {"start": padding} if data.draw(st.booleans()) else {"stop": padding, "lower": -data.draw(st.integers(0, 9))}
    arguments["bounds"] = bounds_of(2, keys, upper=data.draw(st.integers(-20, 10)), **side)
    arguments["empty_row"] = data.draw(EMPTY_ROWS)
    kind = data.draw(st.sampled_from(["none", "key padding", "documents", "boolean", "additive", "additive with -inf"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    if kind == "key padding":
        arguments["key_mask"] = (torch.rand(2, keys, generator=generator) < 0.2).to(DEVICE)
        arguments["bounds"][:, HOLES] = 1
    elif kind == "documents":
        arguments["query_documents"] = torch.randint(0, 4, (2, queries), generator=generator).to(DEVICE)
        arguments["key_documents"] = torch.randint(1, 9, (2, keys), generator=generator).to(DEVICE)
    elif kind != "none":
        visible = (torch.rand(2, heads, queries, keys, generator=generator) < 1.0 / keys).to(DEVICE)
        visible[:, -1] = True
        hidden = -torch.inf if kind == "additive with -inf" else None
        arguments["mask"] = visible if kind == "boolean" else additive(visible, hidden=hidden)
    assert_is_attend(tiled, arguments)


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_empty_rows_take_the_softcap_that_other_rows_take(kind: str) -> None:
    arguments = {**qkv(batch=1, queries=20, keys=40, key_size=16, value_size=16), "softcap": 2.0, "empty_row": 4}
    arguments["bounds"] = bounds_of(1, 40, upper=-4, start=9)
    if kind != "none":
        visible = random_mask(1, 4, 20, 40)
        arguments["mask"] = visible if kind == "boolean" else additive(visible)
    for empty_row in (1, 4):
        assert_is_attend(tiled, {**arguments, "empty_row": empty_row})


def test_rows_that_see_a_key_are_not_touched_by_the_fill() -> None:
    """Bit by bit the same as without one, in a block that it does fill."""
    arguments = {**qkv(queries=30, keys=40), "bounds": bounds_of(2, 40, upper=[-7, 20])}
    zeros, filled = (tiled(**arguments, empty_row=empty_row) for empty_row in (0, 4))
    assert not zeros[0, :, :7].any() and filled[0, :, :7].any()
    torch.testing.assert_close(filled[0, :, 7:], zeros[0, :, 7:], atol=0, rtol=0)
    torch.testing.assert_close(filled[1], zeros[1], atol=0, rtol=0)
    assert_is_attend(lambda **_: filled, {**arguments, "empty_row": 4})


@pytest.mark.parametrize("case", ["causal", "window", "key padding", "chunk"])
def test_one_loop_over_all_tiles_gives_the_answer_of_three(case: str) -> None:
    arguments = {**qkv(heads=2, queries=52, keys=70, key_size=16, value_size=16), **CASES[case](2, 2, 52, 70)}
    assert_is_attend(
        lambda **kwargs: triton_ops.tiled(**kwargs, config=triton_ops.TileConfig(16, 16, 4, 2, True)), arguments
    )


def test_a_key_mask_is_not_read_when_the_bounds_say_that_it_has_no_holes() -> None:
    for kernel in (split_kv, tiled):
        arguments = {**qkv(), "bounds": bounds_of(2, 75, stop=[20, 60], holes=0)}
        with_lie = kernel(**arguments, key_mask=torch.zeros(2, 75, dtype=torch.bool, device=DEVICE))
        torch.testing.assert_close(with_lie, kernel(**arguments), atol=0, rtol=0)


@pytest.mark.parametrize("kernel", [split_kv, tiled])
def test_keys_outside_the_bounds_are_not_read(kernel: Kernel) -> None:
    arguments = {**qkv(), "bounds": bounds_of(2, 75, start=16, stop=[41, 64])}
    clean = kernel(**arguments)
    for name in ("key", "value"):
        arguments[name][0, :, 41:] = float("nan")
        arguments[name][1, :, 64:] = float("nan")
        arguments[name][:, :, :16] = float("nan")
    torch.testing.assert_close(kernel(**arguments), clean, atol=0, rtol=0)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_bounds_give_the_answer_of_attend(data: st.DataObject) -> None:
    queries, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    near = st.integers(-50, 80)
    columns: dict[str, Any] = {
        "upper": [data.draw(near | st.just(NO_UPPER)) for _ in range(2)],
        "lower": [data.draw(near | st.just(NO_LOWER)) for _ in range(2)],
        "start": [data.draw(near) for _ in range(2)],
        "stop": [data.draw(near | st.just(keys)) for _ in range(2)],
        "shift": data.draw(near),
        "origin": data.draw(near),
    }
    arguments = qkv(2, 2, 1, queries, keys, 16, 16)
    arguments |= {
        "bounds": bounds_of(2, keys, **columns),
        "chunk": data.draw(st.sampled_from([0, 0, 1, 7, 32])),
        "empty_row": data.draw(st.integers(0, 3)),
    }
    assert_is_attend(tiled, arguments)
    if queries <= 16:
        assert_is_attend(split_kv, arguments)


def test_the_number_of_splits_depends_on_sizes_alone() -> None:
    assert triton_ops.split_count(1, 8, 4096, 64, 132) == 64
    assert triton_ops.split_count(16, 8, 16384, 64, 132) == 5
    assert triton_ops.split_count(512, 8, 16384, 64, 132) == 1
    assert triton_ops.split_count(1, 8, 100, 64, 132) == 2


def test_the_fake_op_has_the_strides_of_the_kernel() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not CUDA:
        pytest.skip("wrap_triton refuses kernels of the interpreter")
    with FakeTensorMode() as mode:
        arguments = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in qkv().items()}
        for op in (triton_ops.split_kv_v2, triton_ops.tiled_v3):
            assert op(**arguments).stride() == attend_output(arguments["query"], arguments["value"]).stride()


class TestOnGpu:
    """The same kernels, compiled, with the tiles that they really use."""

    pytestmark = gpu

    @staticmethod
    def sizes(queries: int, dtype: torch.dtype = torch.bfloat16) -> Arguments:
        return qkv(2, 8, 2, queries, 1000, 128, 128, dtype)

    @pytest.mark.parametrize("queries", [1, 7])
    @pytest.mark.parametrize("case", CASES)
    def test_split_kv_with_its_own_tiles(self, case: str, queries: int) -> None:
        assert_is_attend(triton_ops.split_kv, {**self.sizes(queries), **CASES[case](2, 8, queries, 1000)})

    @pytest.mark.parametrize("queries", [16, 300])
    @pytest.mark.parametrize("case", CASES)
    def test_tiled_with_its_own_tiles(self, case: str, queries: int) -> None:
        assert_is_attend(triton_ops.tiled, {**self.sizes(queries), **CASES[case](2, 8, queries, 1000)})

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("case", ["window", "all terms", "additive mask"])
    @pytest.mark.parametrize("queries, kernel", [(16, triton_ops.split_kv), (300, triton_ops.tiled)])
    def test_other_dtypes_with_their_own_tiles(
        self, queries: int, kernel: Kernel, case: str, dtype: torch.dtype
    ) -> None:
        assert_is_attend(kernel, {**self.sizes(queries, dtype), **CASES[case](2, 8, queries, 1000)})

    @pytest.mark.parametrize("size", [16, 64, 80, 96, 192, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_every_head_size_fits_the_machine(self, size: int, dtype: torch.dtype) -> None:
        for queries, kernel in ((1, triton_ops.split_kv), (16, triton_ops.split_kv), (300, triton_ops.tiled)):
            arguments = qkv(2, 8, 2, queries, 1000, size, size, dtype)
            assert_is_attend(kernel, {**arguments, "bounds": bounds_of(2, 1000, upper=[600, 700])})

    @pytest.mark.parametrize("kernel", [triton_ops.split_kv, triton_ops.tiled])
    @pytest.mark.parametrize("empty_row", [0, 1, 2, 3])
    def test_empty_rows_with_the_real_tiles(self, kernel: Kernel, empty_row: int) -> None:
        visible = random_mask(2, 8, 16, 1000)
        visible[0, 1] = False
        for mask in (visible, additive(visible, torch.bfloat16)):
            assert_is_attend(kernel, {**self.sizes(16), "mask": mask, "empty_row": empty_row})

    @pytest.mark.parametrize("empty_row", EMPTY_ROW.values(), ids=EMPTY_ROW)
    @pytest.mark.parametrize("case", ["left padding", "right padding", "documents", "additive mask"])
    @pytest.mark.parametrize("size, dtype", [(128, torch.bfloat16), (80, torch.float16), (256, torch.bfloat16)])
    def test_blocks_of_empty_rows_are_filled_with_the_real_tiles(
        self, size: int, dtype: torch.dtype, case: str, empty_row: int
    ) -> None:
        arguments = {**qkv(2, 8, 2, 300, 333, size, size, dtype), "empty_row": empty_row}
        if case == "left padding":
            arguments["bounds"] = bounds_of(2, 333, upper=0, start=[0, 170])
        elif case == "right padding":
            arguments["bounds"] = bounds_of(2, 333, upper=0, lower=-20, stop=[333, 90])
        elif case == "documents":
            arguments["query_documents"] = torch.arange(300, device=DEVICE)[None].expand(2, 300) // 50
            arguments["key_documents"] = torch.arange(333, device=DEVICE)[None].expand(2, 333) // 100
        else:
            visible = random_mask(2, 8, 300, 333)
            visible[0, 3] = False
            visible[1, :, 100:180] = False
            arguments["mask"] = additive(visible, dtype)
        assert_is_attend(triton_ops.tiled, arguments)

    def test_empty_rows_may_appear_in_the_replay_of_a_captured_graph(self) -> None:
        arguments = {**self.sizes(300), "bounds": bounds_of(2, 1000, upper=700), "empty_row": 4}
        triton_ops.tiled_v3(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = triton_ops.tiled_v3(**arguments)
        for upper in ([-100, 20], [-400, -299], [0, 0]):
            arguments["bounds"].copy_(bounds_of(2, 1000, upper=upper))
            graph.replay()
            assert_is_attend(lambda **_: captured, arguments)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_torch_compile_fills_empty_rows_in_place(self, dynamic: bool) -> None:
        """The result, the marks of empty rows, and no copy of either."""
        compiled = torch.compile(
            lambda kwargs: triton_ops.tiled_v3(**kwargs, empty_row=4), fullgraph=True, dynamic=dynamic
        )
        arguments = {**self.sizes(300), "bounds": bounds_of(2, 1000, upper=[-100, 20])}
        assert_is_attend(lambda empty_row, **kwargs: compiled(kwargs), {**arguments, "empty_row": 4})
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = compiled(arguments)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 1.5 * out.numel() * out.element_size()

    @pytest.mark.parametrize("queries, op", [(1, triton_ops.split_kv_v2), (300, triton_ops.tiled_v3)])
    @pytest.mark.parametrize("case", ["no mask", "causal with an offset a row", "window", "additive mask"])
    @pytest.mark.parametrize("sizes", [(64, 64), (192, 128)])
    def test_sinks_and_unequal_head_sizes(self, queries: int, op: Kernel, case: str, sizes: tuple[int, int]) -> None:
        arguments = {**qkv(2, 8, 2, queries, 1000, *sizes, torch.bfloat16), **CASES[case](2, 8, queries, 1000)}
        assert_is_attend(op, arguments)
        assert_is_attend(op, {**arguments, "sink": sinks(8, torch.bfloat16)})
        compiled = torch.compile(lambda kwargs: op(**kwargs), fullgraph=True, dynamic=False)
        assert_is_attend(lambda **kwargs: compiled(kwargs), {**arguments, "sink": sinks(8, torch.bfloat16)})

    @pytest.mark.parametrize("queries, op", [(1, triton_ops.split_kv_v2), (300, triton_ops.tiled_v3)])
    def test_a_captured_graph_follows_bounds_that_change(self, queries: int, op: Kernel) -> None:
        arguments = {**self.sizes(queries), "bounds": bounds_of(2, 1000, upper=200, stop=[100, 400])}
        op(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(**arguments)
        arguments["bounds"].copy_(bounds_of(2, 1000, upper=600, stop=[900, 50]))
        graph.replay()
        assert_is_attend(lambda **_: captured, arguments)

    @pytest.mark.parametrize("queries, op", [(1, triton_ops.split_kv_v2), (300, triton_ops.tiled_v3)])
    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("case", ["causal with an offset a row", "boolean mask", "additive mask"])
    def test_torch_compile_launches_the_kernels_itself(
        self, queries: int, op: Kernel, dynamic: bool, case: str
    ) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(lambda kwargs: op(**kwargs), fullgraph=True, dynamic=dynamic)
        arguments = {**self.sizes(queries), **CASES[case](2, 8, queries, 1000)}
        assert_is_attend(lambda **kwargs: compiled(kwargs), arguments)
