"""Chains of logits warpers: what is recognised, near misses, and that the CPU kernel keeps exactly eager's set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import lz_compile
from lz_compile.lowering.kernels import registered
from lz_compile.lowering.sampling import Step, filter_scores, sampling_meaning
from lz_compile.lowering.sampling_cpu import FILTERED, filter_scores_cpu
from lz_compile.region import Kernel, Provider, Region
from road import Road, compile_road
from tiny import _GROUPED, tokens

WARPERS: dict[str, tuple[Any, str]] = {
    "top-k": (TopKLogitsWarper(5), "top_k 5"),
    "top-k of all": (TopKLogitsWarper(500), "top_k 64"),
    "top-p": (TopPLogitsWarper(0.75), "top_p 0.25"),
    "top-p, three at least": (TopPLogitsWarper(0.1, min_tokens_to_keep=3), "top_p 0.9 keep 3"),
    "top-p into a number": (TopPLogitsWarper(0.75, filter_value=-7.0), "top_p 0.25 fill -7"),
    "min-p": (MinPLogitsWarper(0.25), "min_p 0.25"),
    "min-p, four at least": (MinPLogitsWarper(0.9, min_tokens_to_keep=4), "min_p 0.9 keep 4"),
    "typical": (TypicalLogitsWarper(0.5), "typical 0.5"),
    "typical, three at least": (TypicalLogitsWarper(0.25, min_tokens_to_keep=3), "typical 0.25 keep 3"),
    "epsilon": (EpsilonLogitsWarper(0.0625), "epsilon 0.0625"),
    "epsilon, two at least": (EpsilonLogitsWarper(0.5, min_tokens_to_keep=2), "epsilon 0.5 keep 2"),
    "repetition penalty": (RepetitionPenaltyLogitsProcessor(1.3), "repetition_penalty"),
}
EVERYTHING = LogitsProcessorList(
    [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.95),
        MinPLogitsWarper(0.01),
        TypicalLogitsWarper(0.9),
        EpsilonLogitsWarper(1e-3),
    ]
)
USUAL = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)])

# What a chain means, so that whatever the pattern reads wrongly shows in the result's bits.
MEANING = Kernel(
    "mine.filters",
    "sampling",
    "1",
    lambda region: None,
    lambda emitter, region: emitter.call(region.output, sampling_meaning(region), *region.inputs),
    devices=("cpu",),
)


def scores(rows: int = 6, size: int = 64, seed: int = 0) -> torch.Tensor:
    """Normal values; every third row in whole numbers with -inf among them."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(rows, size, generator=generator)
    x[::3] = x[::3].round().masked_fill(torch.rand(x[::3].shape, generator=generator) < 0.2, -torch.inf)
    return x


def ids(rows: int = 6, size: int = 64) -> torch.Tensor:
    """Token numbers; beyond the scores, too, where transformers takes them."""
    end = size + 3 if TAKES_ANY_TOKEN else size
    return torch.randint(0, end, (rows, 9), generator=torch.Generator().manual_seed(1))


def takes_any_token() -> bool:
    try:
        RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[2]]), torch.zeros(1, 2))
    except RuntimeError:
        return False
    return True


TAKES_ANY_TOKEN = takes_any_token()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def watch(fn: Any, *inputs: Any, dynamic: bool = False, **settings: Any) -> tuple[Road, Any, Any]:
    """What was found when each chain runs as what it means, the result, and eager's."""
    with registered(Provider("mine", (MEANING,))):
        run, road = compile_road(fn, dynamic=dynamic, kinds=["sampling"], prefer=["mine.*"], **settings)
        with torch.no_grad():
            return road, run(*inputs), fn(*inputs)


# -- what is recognised


@pytest.mark.parametrize("name", list(WARPERS))
def test_each_warper_is_one_filter_and_keeps_its_bits(name: str) -> None:
    warper, form = WARPERS[name]
    road, got, expected = watch(lambda i, x: warper(i, x), ids(), scores())
    assert [(region.pattern, region.kernel) for region in road.regions] == [(form, "mine.filters")]
    assert same_bits(got, expected) and got.stride()[1] == expected.stride()[1]


def test_a_chain_is_one_region_with_its_filters_in_order() -> None:
    road, got, expected = watch(lambda i, x: EVERYTHING(i, x), ids(), scores())
    assert [region.pattern for region in road.regions] == [
        "repetition_penalty, temperature, top_k 40, top_p 0.05, min_p 0.01, typical 0.9, epsilon 0.001"
    ]
    assert road.kernels == ["mine.filters"] and same_bits(got, expected)
    assert torch.ops.aten.sort.default not in road.targets()


def test_a_chain_twice_is_two_regions_or_one_where_they_meet() -> None:
    road, got, expected = watch(lambda i, x: (USUAL(i, x), USUAL(i, 2 * x)), ids(), scores())
    assert len(road.regions) == 2 and all(map(same_bits, got, expected))
    road, got, expected = watch(lambda i, x: USUAL(i, USUAL(i, x)), ids(), scores())
    assert [region.pattern.count("top_p") for region in road.regions] == [2] and same_bits(got, expected)


def test_a_value_between_two_filters_that_someone_else_reads_ends_the_chain() -> None:
    def fn(i: torch.Tensor, x: torch.Tensor) -> Any:
        inner = WARPERS["top-k"][0](i, x)
        return WARPERS["top-p"][0](i, inner), inner.exp()

    road, got, expected = watch(fn, ids(), scores())
    assert [region.pattern for region in road.regions] == ["top_k 5", "top_p 0.25"]
    assert road.kernels == ["mine.filters"] * 2 and all(map(same_bits, got, expected))


def test_a_temperature_alone_counts_in_front_of_a_draw_only() -> None:
    warper = TemperatureLogitsWarper(0.7)
    road, *_ = watch(lambda x: warper(None, x), scores())
    assert not road.regions

    def draw(x: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(warper(None, x).softmax(-1), 1)

    road, *_ = watch(draw, scores())
    assert [region.pattern for region in road.regions] == ["temperature"]


def test_parameters_that_are_graph_inputs_are_values_of_the_region() -> None:
    def fn(x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return WARPERS["top-k"][0](None, x / temperature)

    road, got, expected = watch(fn, scores(), torch.tensor(0.7))
    assert road.kernels == ["mine.filters"] and same_bits(got, expected)
    run, road = compile_road(fn)
    assert same_bits(run(scores(), torch.tensor(0.7)), expected)
    assert [region.pattern for region in road.regions] == ["temperature, top_k 5"] and road.kernels == ["inductor"]
    assert "known only at run time" in road.regions[0].rejected["cpu.filters"]


def test_a_dynamic_batch_keeps_one_graph() -> None:
    warpers = LogitsProcessorList([WARPERS["top-k"][0], WARPERS["top-p"][0]])
    run, road = compile_road(lambda x: warpers(None, x), dynamic=None, prefer=["cpu.filters"])
    batches = [scores(rows) for rows in (3, 5, 8)]
    for x in batches:
        torch._dynamo.mark_dynamic(x, 0)
        assert same_bits(run(x), warpers(None, x))
    assert len(road.graphs) == 1 and road.kernels == ["cpu.filters"]


def test_numbers_that_become_inputs_leave_the_chain_to_inductor() -> None:
    run, road = compile_road(lambda i, x: USUAL(i, x), dynamic=True, prefer=["cpu.filters"])
    assert same_bits(run(ids(), scores()), USUAL(ids(), scores()))
    assert len(road.regions) == 1 and road.kernels == ["inductor"]
    assert "known only at run time" in road.regions[0].rejected["cpu.filters"]


# -- near misses


def _top_p(x: torch.Tensor, **twist: Callable[..., Any]) -> torch.Tensor:
    """The top-p warper with one of its steps replaced."""
    ordered, order = twist.get("sort", lambda x: x.sort())(x)
    sums = twist.get("sums", lambda v: v.softmax(-1).cumsum(-1))(ordered)
    removed = twist.get("compare", lambda c: c <= 0.25)(sums)
    twist.get("keep", lambda m: m[..., -1:].fill_(False))(removed)
    mask = twist.get("scatter", lambda m, o: m.scatter(1, o, m))(removed, order)
    return twist.get("fill", lambda x, m: x.masked_fill(m, -torch.inf))(x, mask)


def _kept_late(m: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    mask = m.scatter(1, o, m)
    m[..., -1:] = False
    return mask


def _written_twice(m: torch.Tensor) -> None:
    m[..., -1:] = False
    m[..., :1] = True


NEAR_MISSES: dict[str, dict[str, Callable[..., Any]]] = {
    "sorted downwards": {"sort": lambda x: x.sort(descending=True)},
    "sorted by column": {"sort": lambda x: x.sort(0)},
    "sorted otherwise": {"sort": lambda x: (-x).sort()},
    "weights over rows": {"sums": lambda v: v.softmax(0).cumsum(-1)},
    "sums over rows": {"sums": lambda v: v.softmax(-1).cumsum(0)},
    "sums in double precision": {"sums": lambda v: v.softmax(-1).cumsum(-1, dtype=torch.float64)},
    "weights in double precision": {"sums": lambda v: v.softmax(-1, dtype=torch.float64).cumsum(-1)},
    "less, not less or equal": {"compare": lambda c: c < 0.25},
    "nothing is kept": {"keep": lambda m: None},
    "the first ones are kept": {"keep": lambda m: m[..., :1].fill_(False)},
    "the last one goes": {"keep": lambda m: m[..., -1:].fill_(True)},
    "kept after the mask was read": {"keep": lambda m: None, "scatter": _kept_late},
    "a mask written twice": {"keep": _written_twice},
    "an index of its own": {"scatter": lambda m, o: m.scatter(1, o.flip(-1), m)},
    "scattered into another mask": {"scatter": lambda m, o: torch.ones_like(m).scatter(1, o, m)},
    "other scores are filled": {"fill": lambda x, m: (x + 1).masked_fill(m, -torch.inf)},
    "filled in place": {"fill": lambda x, m: x.clone().masked_fill_(m, -torch.inf)},
}


@pytest.mark.parametrize("name", list(NEAR_MISSES))
def test_what_is_not_quite_a_top_p_filter_is_none(name: str) -> None:
    road, got, expected = watch(functools.partial(_top_p, **NEAR_MISSES[name]), scores())
    assert not road.regions and same_bits(got, expected)
    road, *_ = watch(_top_p, scores())
    assert [region.pattern for region in road.regions] == ["top_p 0.25"]


def _top_k(x: torch.Tensor, least: Callable[..., Any], compare: Callable[..., Any] = torch.lt) -> torch.Tensor:
    return x.masked_fill(compare(x, least(x)), -torch.inf)


OTHER_TOP_K: dict[str, Callable[..., Any]] = {
    "the smallest": lambda x: _top_k(x, lambda x: x.topk(5, largest=False)[0][..., -1, None]),
    "the second of the top": lambda x: _top_k(x, lambda x: x.topk(5)[0][..., 1, None]),
    "unsorted": lambda x: _top_k(x, lambda x: x.topk(5, sorted=False)[0][..., -1, None]),
    "of columns": lambda x: _top_k(x, lambda x: x.topk(5, 0)[0][-1, None]),
    "of other scores": lambda x: _top_k(x, lambda x: (2 * x).topk(5)[0][..., -1, None]),
    "less or equal": lambda x: _top_k(x, lambda x: x.topk(5)[0][..., -1, None], torch.le),
    "of scores before they were written": lambda x: _filled_after_a_write(x * 1.0),
    "min-p of other weights": lambda x: x.masked_fill(
        x.softmax(-1) < 0.5 * (2 * x).softmax(-1).amax(-1, True), -torch.inf
    ),
    "a penalty of two numbers": lambda x: _penalty(x, 1.3, 1.4),
    "a penalty of two numbers, without padding": lambda x: _unpadded(x, 1.3, 1.4),
    "a penalty of other scores": lambda x: _unpadded(x, of=2.0),
    "a penalty written to other scores": lambda x: _unpadded(x, to=2.0),
    "a penalty for positive scores": lambda x: _penalty(x, 1.3, 1.3, torch.gt),
}


def _unpadded(x: torch.Tensor, times: float = 1.3, over: float = 1.3, of: float = 1.0, to: float = 1.0) -> torch.Tensor:
    """The penalty as older versions of transformers spell it: for tokens of the scores only."""
    index = ids() % x.shape[1]
    seen = (of * x if of != 1 else x).gather(1, index)
    seen = torch.where(seen < 0, seen * times, seen / over)
    return (to * x if to != 1 else x).scatter(1, index, seen)


def test_a_penalty_without_padding_is_the_same_filter() -> None:
    road, got, expected = watch(_unpadded, scores())
    assert [(r.pattern, r.kernel) for r in road.regions] == [("repetition_penalty", "mine.filters")]
    assert same_bits(got, expected)


def _penalty(x: torch.Tensor, times: float, over: float, compare: Callable[..., Any] = torch.lt) -> torch.Tensor:
    index = ids().clamp(max=x.shape[1])
    padded = torch.nn.functional.pad(x, (0, 1))
    seen = padded.gather(1, index)
    seen = torch.where(compare(seen, 0), seen * times, seen / over)
    return padded.scatter(1, index, seen)[:, : x.shape[1]]


def _filled_after_a_write(y: torch.Tensor) -> torch.Tensor:
    mask = y < y.topk(5)[0][..., -1, None]
    y.mul_(2)
    return y.masked_fill(mask, -torch.inf)


@pytest.mark.parametrize("name", list(OTHER_TOP_K))
def test_what_is_not_quite_another_filter_is_none(name: str) -> None:
    road, got, expected = watch(OTHER_TOP_K[name], scores())
    assert not road.regions and same_bits(got, expected)


def test_the_eta_warper_is_left_alone() -> None:
    warper = EtaLogitsWarper(3e-2)
    road, got, expected = watch(lambda i, x: warper(i, x), ids(), scores())
    assert not road.regions and same_bits(got, expected)


def _order_is_read(x: torch.Tensor) -> Any:
    ordered, order = x.sort()
    removed = ordered.softmax(-1).cumsum(-1) <= 0.25
    removed[..., -1:] = False
    return x.masked_fill(removed.scatter(1, order, removed), -torch.inf), order


def _mask_is_read(x: torch.Tensor) -> Any:
    mask = x < x.topk(5)[0][..., -1, None]
    return x.masked_fill(mask, -torch.inf), mask


def _a_view_of_the_scores_is_written(x: torch.Tensor) -> Any:
    y = x * 1.0
    first = y[:, :3]
    mask = y < y.topk(5)[0][..., -1, None]
    first.zero_()
    return y.masked_fill(mask, -torch.inf)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (_order_is_read, "used elsewhere"),
        (_mask_is_read, "used elsewhere"),
        (_a_view_of_the_scores_is_written, "is written between"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_filter_that_may_not_be_replaced_says_why(fn: Callable[..., Any], reason: str) -> None:
    road, got, expected = watch(fn, scores())
    assert [region.declined for region in road.regions] == [True] and reason in road.regions[0].reason
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_a_filter_that_needs_a_gradient_is_left_to_autograd() -> None:
    x = scores().nan_to_num(neginf=-9.0).requires_grad_()
    run, road = compile_road(lambda x: USUAL(None, x).softmax(-1).square().sum())
    run(x).backward()
    (region,) = road.regions
    assert region.declined and region.reason == "needs gradient" and x.grad is not None
    got, x.grad = x.grad, None
    USUAL(None, x).softmax(-1).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_bits(dtype: torch.dtype) -> None:
    x = scores().to(dtype)
    run, road = compile_road(lambda i, x: USUAL(i, x), prefer=["cpu.filters"])
    assert torch.equal(run(ids(), x), USUAL(ids(), x))
    assert road.kernels == ["cpu.filters" if dtype == torch.float64 else "inductor"]


# -- the kept set on the CPU

NUMBERS = {"top_k": (1, 3, 20), "top_p": (0.0, 0.1, 0.5, 0.95, 1.0), "min_p": (0.0, 0.1, 1.0), "epsilon": (1e-3, 0.2),
           "typical": (0.2, 0.9), "temperature": (0.3, 1.7)}  # fmt: skip


@st.composite
def chains(draw: st.DrawFn) -> list[Step]:
    steps = []
    for kind in draw(st.lists(st.sampled_from(list(NUMBERS)), min_size=1, max_size=3)):
        fill = draw(st.sampled_from([-torch.inf, -torch.inf, -3.0]))
        steps.append(Step(kind, draw(st.sampled_from(NUMBERS[kind])), draw(st.sampled_from([1, 1, 3])), fill))
    return steps


def odd_scores(rows: int, size: int, seed: int) -> torch.Tensor:
    """Rows of every sort: peaked and flat, with ties, equal, of both zeros, with -inf, all -inf, infinity, NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = 6 * torch.randn(rows, size, generator=generator) * torch.rand(rows, 1, generator=generator)
    half = torch.rand(rows, size, generator=generator) < 0.5
    x[::3] = x[::3].round()
    x[1::5] = x[1::5].masked_fill(half[1::5], -torch.inf)
    x[2::11] = 1.5
    x[3::17] = torch.where(half[3::17], 0.0, -0.0)
    x[4::31] = -torch.inf
    x[5::31, ::7] = torch.nan
    x[6::31, 3::11] = torch.inf
    return x


def filtered(x: torch.Tensor, steps: list[Step]) -> torch.Tensor:
    return filter_scores_cpu(
        x, [], *([getattr(step, name) for step in steps] for name in ("kind", "value", "keep", "fill"))
    )


@settings(max_examples=60)
@given(chains(), st.integers(20, 300), st.integers(0, 10**6))
def test_any_chain_keeps_exactly_the_warpers_set(steps: list[Step], size: int, seed: int) -> None:
    x = odd_scores(12, size, seed)
    x = x[torch.randperm(12, generator=torch.Generator().manual_seed(seed))]
    assert same_bits(filtered(x, steps), filter_scores(x, steps))


def test_ten_thousand_rows_keep_exactly_the_top_p_warpers_set() -> None:
    x = odd_scores(10_000, 331, 0)
    warper = TopPLogitsWarper(0.9)
    got = filtered(x, [Step("top_p", 1 - warper.top_p)])
    assert same_bits(got, warper(None, x))
    assert int((got == -torch.inf).sum()) > 1000 * 331


def test_a_row_longer_than_a_block_of_sums_keeps_exactly_the_warpers_set() -> None:
    x = odd_scores(12, 20_011, 3)
    for steps in ([Step("top_p", 0.1)], [Step("top_k", 50), Step("top_p", 0.1)]):
        assert same_bits(filtered(x, steps), filter_scores(x, steps))


def test_the_kernel_reads_a_strided_batch_and_never_gives_its_input_back() -> None:
    wide = odd_scores(6, 128, 0)
    for x in (wide[:, ::2], wide[:3, :64].t().contiguous().t(), wide[::2]):
        got = filtered(x, [Step("top_p", 0.2)])
        assert same_bits(got, filter_scores(x, [Step("top_p", 0.2)])) and got.is_contiguous()
    x = wide.clone()
    got = filtered(x, [Step("top_k", 128)])
    got.zero_()
    assert same_bits(x, wide)


def test_scores_that_could_have_a_gradient_are_filtered_where_none_is_recorded() -> None:
    x = odd_scores(6, 64, 0)
    leaf = x.clone().requires_grad_()
    run, road = compile_road(lambda x: USUAL(None, x), prefer=["cpu.filters"])
    with torch.no_grad():
        assert same_bits(run(leaf), USUAL(None, x))
    assert road.kernels == ["cpu.filters"]


def test_several_threads_give_the_same_as_one() -> None:
    x = odd_scores(12, 300, 1)
    one = filtered(x, [Step("top_p", 0.2)])
    torch.set_num_threads(2)
    try:
        assert same_bits(filtered(x, [Step("top_p", 0.2)]), one)
        with torch.inference_mode():
            assert same_bits(
                filtered(x * 1, [Step("top_k", 9), Step("top_p", 0.2)]),
                filtered(x, [Step("top_k", 9), Step("top_p", 0.2)]),
            )
    finally:
        torch.set_num_threads(1)


# -- draws


def test_same_seed_same_tokens_as_eager() -> None:
    def step(i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(USUAL(i, x).softmax(-1), 1).squeeze(1)

    run, road = compile_road(step, prefer=["cpu.filters"])
    for seed in range(5):
        drawn = []
        for fn in (run, step, run):
            torch.manual_seed(seed)
            drawn.append(fn(ids(), scores()))
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert road.kernels == ["cpu.filters"]
    greedy, road = compile_road(lambda i, x: USUAL(i, x).argmax(-1), prefer=["cpu.filters"])
    assert torch.equal(greedy(ids(), scores()), USUAL(ids(), scores()).argmax(-1)) and road.kernels == ["cpu.filters"]


def test_draws_follow_the_filtered_distribution() -> None:
    x = scores(2, 24, 5)[1:] / 4
    expected = USUAL(None, x)[0].double().softmax(-1)
    run, _ = compile_road(lambda x: torch.multinomial(USUAL(None, x).softmax(-1), 1), prefer=["cpu.filters"])
    torch.manual_seed(0)
    count = 5_000
    seen = torch.bincount(run(x.expand(count, -1)).squeeze(1), minlength=24).double()
    kept = expected > 0
    assert seen[~kept].sum() == 0 and kept.sum() > 4
    statistic = ((seen - count * expected) ** 2 / (count * expected))[kept].sum()
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_whole_step_of_a_real_model_draws_eagers_tokens() -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED)).eval()

    def step(prompt: torch.Tensor) -> torch.Tensor:
        logits = net(prompt, use_cache=False).logits[:, -1].to(torch.float32, copy=True)
        return torch.multinomial(USUAL(prompt, logits).softmax(-1), 1)

    run, road = compile_road(step, kinds=["sampling"], prefer=["cpu.filters"])
    drawn = []
    with torch.no_grad():
        for fn in (run, step):
            torch.manual_seed(3)
            drawn.append([fn(tokens(4, 8, seed)) for seed in range(4)])
    assert all(map(torch.equal, *drawn))
    assert [region.pattern for region in road.regions if region.kind == "sampling"] == [
        "temperature, top_k 20, top_p 0.1"
    ]


# -- the road


def test_the_kernel_qualifies_competes_with_inductor_and_one_that_is_wrong_is_rejected() -> None:
    def spoiled(emitter: Any, region: Region) -> Any:
        steps = (dataclasses.replace(region.op.filters[-1], keep=2),)
        wrong = dataclasses.replace(region.op, filters=(*region.op.filters[:-1], *steps))
        return FILTERED.emit(emitter, dataclasses.replace(region, op=wrong))

    x = scores(4, 900)
    warper = LogitsProcessorList([TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.05)])
    wrong = dataclasses.replace(FILTERED, name="mine.wrong", emit=spoiled)
    with registered(Provider("mine", (wrong,))):
        run, road = compile_road(lambda x: warper(None, x), measure="auto", measure_budget=60.0)
        assert same_bits(run(x), warper(None, x))
    (region,) = road.regions
    assert {c.kernel for c in region.candidates if c.source == "measured"} == {"cpu.filters", "inductor"}
    assert "wrong result" in region.rejected["mine.wrong"]


def test_layerzero_compiles_a_step_through_inductor() -> None:
    def step(i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(USUAL(i, x * 1.5).softmax(-1), 1)

    torch._dynamo.reset()
    run = torch.compile(step, backend="layerzero", options={"strict": True, "prefer": ["cpu.filters"]})
    torch.manual_seed(0)
    got = run(ids(), scores())
    torch.manual_seed(0)
    with torch.no_grad():
        kept = USUAL(ids(), scores() * 1.5)
    assert got.shape == (6, 1) and bool((kept.gather(1, got) > -torch.inf).all())
    (region,) = [region for region in lz_compile.reports()[-1].regions if region.kind == "sampling"]
    assert region.kernel == "cpu.filters"


def test_graphs_without_filters_are_not_searched() -> None:
    run, road = compile_road(lambda x: (x / 2.0).masked_fill(x < 0, -torch.inf).softmax(-1))
    run(scores())
    assert not road.regions
