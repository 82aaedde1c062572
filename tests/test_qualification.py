"""Kernels that are wrong are rejected with the right reason, right ones are not, and the compiled model is correct."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from transformers import StaticCache

import kernels_for_tests as bad
from kernels_for_tests import make, provider
from lz_compile import config
from lz_compile.aliasing import Aliases
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.kernels import kernels, registered
from lz_compile.mask import MaskForm
from lz_compile.measure import _emit_mask
from lz_compile.normalize import module_path, normalize
from lz_compile.patterns.attention import find_attention
from lz_compile.qualify import Reference, qualify, uses_tf32
from lz_compile.region import Attention, Kernel, Region
from lz_compile.rewrite import is_copied, laid_out
from lz_compile.signature import bucket, signature, signature_of
from lz_compile.specimen import NoSpecimen, Specimen
from road import Road, compile_road
from test_masks import EMPTY_ROWS_OF_SDPA, SPELLINGS, Case, prove, reads_of, trace
from test_masks import visible as visible_by_form
from tiny import DECODERS, padding, tokens

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A database of its own, and no Inductor in the race: compiling its version takes seconds."""
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("lz_compile.measure._Bench._as_inductor", _no_inductor)
    bad.calls.clear()
    yield


def _no_inductor(*_: Any) -> Any:
    raise NoSpecimen("left out by the test")


# -- in a model


def decode(model: Any, length: int = 9, device: str = "cpu") -> torch.Tensor:
    """Logits of a prefill of two rows, one of them padded, over a static cache."""
    ids = tokens(2, length, seed=length).to(device)
    mask = padding(2, length, "left")
    assert mask is not None
    cache = StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        return model(ids, attention_mask=mask.to(device), past_key_values=cache).logits


def compiled_with(kernel: Kernel, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, Road]:
    """What a compiled tiny Llama gives while ``kernel`` competes, what eager gives, and the road."""
    model = DECODERS[0].build("sdpa")
    expected = decode(model)
    with registered(provider(kernel)):
        compiled, road = compile_road(model, measure="auto", strict=False, **settings)
        return decode(compiled), expected, road


WRONG: dict[str, tuple[Callable[[], bad.Run], str]] = {
    "wrong in one of 10,000": (lambda: bad.wrong_in_one_of_10000, "wrong result: "),
    "remembers the first length": (bad.remembers_the_first_length, "wrong result: "),
    "strides unlike its fake": (lambda: bad.contiguous_without_saying_so, "returned strides "),
    "ignores the mask": (lambda: bad.ignores_the_mask, "wrong result: "),
    "raises at call time": (lambda: bad.raises, "failed when called: RuntimeError: no kernel image is available"),
    "wrong dtype": (lambda: bad.returns_the_wrong_dtype, "returned torch.float64 "),
    "writes its query": (lambda: bad.scales_its_query_in_place, "writes into its inputs"),
}


@pytest.mark.slow_but("ignores the mask", "wrong in one of 10,000", "writes its query", "raises at call time")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_rejected_with_its_reason_and_the_model_is_right(name: str) -> None:
    run, reason = WRONG[name]
    got, expected, road = compiled_with(make("bad.kernel", run()))
    assert len(road.regions) == 2
    for region in road.regions:
        assert region.rejected["bad.kernel"].startswith(reason)
        assert region.kernel not in ("bad.kernel", "inductor")
    assert bad.calls["bad.kernel"] >= 1
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_right_kernel_is_not_rejected() -> None:
    got, expected, road = compiled_with(make("good.kernel", bad.right), prefer=["good.kernel"])
    assert road.kernels == ["good.kernel"] * 2
    candidate = next(c for c in road.regions[0].candidates if c.kernel == "good.kernel")
    assert candidate.source == "measured" and candidate.error is not None and candidate.error < 0.5
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_rejection_is_remembered_with_its_reason() -> None:
    kernel = make("bad.kernel", bad.raises)
    compiled_with(kernel)
    ran = bad.calls["bad.kernel"]
    _, _, road = compiled_with(kernel)
    assert bad.calls["bad.kernel"] == ran
    assert road.regions[0].rejected["bad.kernel"].startswith("failed when called: ")


def test_nan_in_rows_without_keys_is_rejected() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        position = torch.arange(k.shape[2])
        shown = (position[None] <= position[:, None])[None, None] & (position >= lengths[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, shown)

    q, k, v = (torch.randn(2, 4, 24, 16) for _ in range(3))
    lengths = torch.tensor([5, 0])
    with registered(provider(make("bad.kernel", bad.nan_in_rows_without_keys))):
        compiled, road = compile_road(attend, measure="auto")
        got = compiled(q, k, v, lengths)
    assert "NaN" in road.regions[0].rejected["bad.kernel"]
    torch.testing.assert_close(got, attend(q, k, v, lengths))


# -- no right kernel is rejected


def capture(fn: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> list[tuple[Region, fx.GraphModule]]:
    """The attention regions of ``fn``, each with the graph it stands in."""
    found: list[tuple[Region, fx.GraphModule]] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Any:
        normal = normalize(module)
        aliases = Aliases(normal.graph)
        found.extend((region, normal) for region in find_attention(normal.graph, aliases, module_path))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs)
    assert found and not any(region.declined for region, _ in found)
    return found


def qkv(
    dtype: torch.dtype, batch: int = 5, heads: int = 4, kv_heads: int = 2, queries: int = 24, keys: int = 24
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads, 16, generator=generator).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, keys, 16, generator=generator) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attend_under(mask: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, mask(q, k, *extra))
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    return attend


def eager_under(mask: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) * 0.25
        shown = mask(q, k, *extra)
        scores = scores + torch.zeros_like(shown, dtype=q.dtype).masked_fill(~shown, torch.finfo(q.dtype).min)
        return F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    return attend


def causal(q: torch.Tensor, k: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None]


def windowed(q: torch.Tensor, k: torch.Tensor, *_: Any) -> torch.Tensor:
    return causal(q, k) & (torch.arange(k.shape[2])[None] > torch.arange(q.shape[2])[:, None] - 7)


def padded(q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return causal(q, k)[None, None] & valid[:, None, None, :]


def cached(q: torch.Tensor, k: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return torch.arange(k.shape[2])[None] <= (torch.arange(q.shape[2]) + position)[:, None]


def chunked(q: torch.Tensor, k: torch.Tensor, *_: Any) -> torch.Tensor:
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return (columns <= rows) & (columns // 8 == rows // 8)


def packed(q: torch.Tensor, k: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    return causal(q, k)[None, None] & (documents[:, None, :, None] == documents[:, None, None, :])


def given_mask(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask


def biased(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Learned numbers under a causal mask: the proof knows the mask and not the numbers."""
    return bias.to(q.dtype).masked_fill(~causal(q, k), torch.finfo(q.dtype).min)


VALID, IDS = torch.ones(5, 24, dtype=torch.bool), torch.zeros(5, 24, dtype=torch.long)
MASKS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], dict[str, int]]] = {
    "none": (lambda q, k: None, (), {}),
    "causal": (causal, (), {}),
    "window": (windowed, (), {}),
    "padding": (padded, (VALID,), {}),
    "cache": (cached, (torch.tensor(3),), {"queries": 1, "keys": 64}),
    "cache chunk": (cached, (torch.tensor(3),), {"queries": 6, "keys": 64}),
    "chunk": (chunked, (), {}),
    "documents": (packed, (IDS,), {}),
    "input decode": (given_mask, (torch.ones(5, 1, 1, 24, dtype=torch.bool),), {"queries": 1}),
    "input prefill": (given_mask, (torch.ones(5, 1, 24, 24, dtype=torch.bool),), {}),
    "bias": (biased, (torch.zeros(24, 24),), {}),
    "head bias": (biased, (torch.zeros(4, 24, 24),), {}),
}


def verdicts(region: Region, candidates: list[Kernel] | None = None) -> dict[str, Any]:
    """What qualification says of every kernel that takes the region, by the road's own steps."""
    copied = is_copied(region.output)
    specimen = Specimen.of(region, copied)
    reference = Reference(specimen, specimen.build(_emit_mask, Emitter))
    result = {}
    for kernel in kernels() if candidates is None else candidates:
        if kernel.kind != "attention" or kernel.supports(region) is not None:
            continue

        def emit(emitter: Any, moved: Region, kernel: Kernel = kernel) -> fx.Node:
            node = kernel.emit(emitter, moved)
            return node if copied else laid_out(emitter, moved.output, node)

        result[kernel.name] = qualify(reference, specimen.build(emit, Emitter))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_our_kernels_qualify_in_every_dtype_and_under_every_mask(name: str, dtype: torch.dtype) -> None:
    mask, extra, sizes = MASKS[name]
    for fn in (attend_under(mask), eager_under(mask)):
        spelled = fn.__qualname__.startswith("eager")
        # Spelled in float16, rows without keys are a matter of rounding: such a region is declined.
        if spelled and (name == "none" or "bias" in name or dtype == torch.float16):
            continue
        [(region, _)] = capture(fn, *qkv(dtype, **sizes), *extra)
        found = verdicts(region)
        assert found, region
        for kernel, verdict in found.items():
            assert verdict.qualified, f"{kernel} {region.pattern}: {verdict.reason} {region.attention}"
            assert verdict.error > 0


@pytest.mark.parametrize("name", MASKS)
def test_what_inductor_is_timed_on_computes_the_region(name: str) -> None:
    mask, extra, sizes = MASKS[name]
    for fn in (attend_under(mask), eager_under(mask)):
        if fn.__qualname__.startswith("eager") and (name == "none" or "bias" in name):
            continue
        [(region, _)] = capture(fn, *qkv(torch.float32, **sizes), *extra)
        specimen = Specimen.of(region, True)
        reference = Reference(specimen, specimen.build(_emit_mask, Emitter))
        module = specimen.as_it_stood()
        for draw in ("typical", "other"):
            problem = reference.problem(draw)
            assert reference.error(problem, module(*problem.inputs)) < 1


MEASURED = ["chunk", "documents", "input decode", "input prefill", "bias", "cache chunk"]


@pytest.mark.parametrize("name", MEASURED)
def test_every_kind_of_mask_is_measured_through_the_road(name: str) -> None:
    mask, extra, sizes = MASKS[name]
    inputs = qkv(torch.float32, **sizes)
    fn = attend_under(mask)
    compiled, road = compile_road(fn, measure="auto")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs, *extra), fn(*inputs, *extra), atol=1e-5, rtol=1e-4)
    [region] = road.regions
    sources = {candidate.source for candidate in region.candidates if candidate.kernel != "inductor"}
    assert sources == {"measured"}, region.rejected
    assert not [why for why in region.rejected.values() if why.startswith(("wrong", "failed", "returned"))]


def test_stacked_products_of_three_dimensions_qualify() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, -1), v)

    [(region, _)] = capture(attend, *(torch.randn(8, 12, 16) for _ in range(3)))
    found = verdicts(region)
    assert found and all(verdict.qualified for verdict in found.values()), found


def test_symbolic_sizes_take_their_hints() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, windowed(q, k))

    [(region, _)] = capture(attend, *qkv(torch.float32, batch=2, kv_heads=4), dynamic=True)
    assert any(isinstance(size, torch.SymInt) for size in region.output.meta["val"].shape)
    found = verdicts(region)
    assert found and all(verdict.qualified for verdict in found.values()), found


def test_the_tolerance_tells_rounding_from_a_slip_in_each_dtype() -> None:
    """A relative slip of 2% of the values' scale is an error in every dtype, and rounding is at most a third of it."""

    def slips(*arguments: Any) -> torch.Tensor:
        out = bad.attend(*arguments)
        return out + 0.05 * arguments[2].abs().mean()

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        [(region, _)] = capture(attend_under(causal), *qkv(dtype))
        found = verdicts(region, [make("t.right", bad.right), make("t.slips", slips)])
        assert found["t.right"].qualified and found["t.right"].error < 0.5
        assert not found["t.slips"].qualified and found["t.slips"].error > 1.5


def test_tf32_is_known_by_the_old_setting_and_by_the_new_one() -> None:
    matmul, cuda = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.fp32_precision
    try:
        assert not uses_tf32(torch.float32, cuda)
        torch.set_float32_matmul_precision("high")
        assert uses_tf32(torch.float32, cuda) and not uses_tf32(torch.bfloat16, cuda)
        assert not uses_tf32(torch.float32, torch.device("cpu"))
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"
        assert uses_tf32(torch.float32, cuda)
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_every_wrong_element_of_a_short_output_is_seen_and_the_ends_of_a_long_one() -> None:
    for queries, where in ((24, (4, 3, 13, 5)), (700, (4, 3, 699, 5)), (700, (0, 0, 0, 0))):

        def wrong(*arguments: Any, where: tuple[int, ...] = where) -> torch.Tensor:
            out = bad.attend(*arguments)
            out[where] += 0.1
            return out

        [(region, _)] = capture(attend_under(causal), *qkv(torch.float32, queries=queries, keys=queries))
        found = verdicts(region, [make("t.wrong", wrong)])
        assert not found["t.wrong"].qualified


def test_a_failing_reference_blames_no_kernel() -> None:
    [(region, _)] = capture(attend_under(causal), *qkv(torch.float32))
    specimen = Specimen.of(region, True)

    def broken(*inputs: Any) -> Any:
        raise RuntimeError("not the kernel's fault")

    kernel = make("t.right", bad.right)
    with pytest.raises(NoSpecimen, match="not the kernel's fault"):
        qualify(Reference(specimen, broken), specimen.build(kernel.emit, Emitter))


# -- inputs that are drawn


def region_of(form: MaskForm, mask: fx.Node, shape: tuple[int, int, int, int]) -> Region:
    """A region on the graph of its mask."""
    batch, heads, queries, keys = shape
    graph = mask.graph
    first = next(iter(graph.nodes))
    nodes = []
    with graph.inserting_before(first):
        for name, length in (("query", queries), ("key", keys), ("value", keys), ("out", queries)):
            node = graph.placeholder(name)
            node.meta["val"] = torch.empty(batch, heads, length, 8, device="meta")
            nodes.append(node)
    query, key, value, output = nodes
    with mask.meta["val"].fake_mode:
        for node in nodes:
            node.meta["val"] = torch.empty(node.meta["val"].shape)
    return Region("attention", "sdpa", output, "", attention=Attention(query, key, value, 0.3, form, mask))


def draws_agree(case: Case, kind: str) -> bool:
    """Whether the drawn mask is what the form says of the drawn reads, for both draws; False when nothing was drawn."""
    module = trace(case.build, *case.inputs(0))
    form = prove(module, case.shape, kind, EMPTY_ROWS_OF_SDPA)
    mask = next(iter(reversed(module.graph.nodes))).args[0]
    assert isinstance(mask, fx.Node)
    if mask.meta["val"].dim() > 4:
        return False
    region = region_of(form, mask, case.shape)
    try:
        specimen = Specimen.of(region, True)
        reference = Reference(specimen, specimen.build(_emit_mask, Emitter))
    except NoSpecimen:
        return False
    for draw in ("typical", "other"):
        problem = reference.problem(draw)
        values = dict(zip(specimen.sources, problem.inputs))
        drawn = values[mask]
        shown = drawn if drawn.dtype == torch.bool else drawn > torch.finfo(drawn.dtype).min
        if form.dense is mask and form.dense_hides:
            shown = ~shown
        found = {read: values[read.node] for read in reads_of(form)}
        terms = visible_by_form(form, found, case.shape)
        if form.proved:
            assert torch.equal(shown.expand(case.shape), terms), f"{form} {draw}"
        else:
            assert not (shown.expand(case.shape) & ~terms).any(), f"{form} {draw}"
        assert torch.equal(reference.visible(problem.inputs).expand(case.shape), shown.expand(case.shape))
        assert torch.equal(drawn, dict(zip(specimen.sources, reference.problem(draw).inputs))[mask])
    return True


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.lists(st.sampled_from(sorted(SPELLINGS)), min_size=1, max_size=3, unique=True))
def test_a_drawn_mask_is_what_its_form_says(seed: int, families: list[str]) -> None:
    case = Case(seed, tuple(families))
    if case.kind != "hide":  # a hidden mask is spelled in the scores, never a mask of its own
        draws_agree(case, case.kind)


def test_most_random_masks_were_drawn() -> None:
    cases = [Case(seed, tuple(sorted(SPELLINGS)[seed % 5 :][:2])) for seed in range(25)]
    drawn = [draws_agree(case, case.kind) for case in cases if case.kind != "hide"]
    assert sum(drawn) > 0.8 * len(drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_terms_beside_a_bias_are_hidden_in_the_bias(dtype: torch.dtype) -> None:
    def short(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return biased(q, k, bias).masked_fill(torch.arange(24) >= 9, torch.finfo(q.dtype).min)

    [(region, _)] = capture(attend_under(short), *qkv(dtype), torch.zeros(24, 24))
    attention = region.attention
    assert attention is not None and attention.mask.bias is not None and attention.mask.stop
    specimen = Specimen.of(region, True)
    reference = Reference(specimen, specimen.build(_emit_mask, Emitter))
    q, k, _ = qkv(dtype)
    hidden = ~causal(q, k) | (torch.arange(24) >= 9)
    for draw in ("typical", "other"):
        bias = dict(zip(specimen.sources, reference.problem(draw).inputs))[attention.mask.bias]
        rows = (bias > torch.finfo(dtype).min).any(-1)
        assert (bias == torch.finfo(dtype).min)[rows][hidden[rows]].all()
        assert rows.float().mean() > 0.8


# -- signatures


def text_of(mask: Callable[..., Any], *extra: torch.Tensor, dtype: torch.dtype = torch.float32, **sizes: int) -> str:
    [(region, _)] = capture(attend_under(mask), *qkv(dtype, **sizes), *extra)
    text = signature_of(region, is_copied(region.output))
    assert text is not None
    return text


def test_lengths_in_one_bucket_share_a_signature_and_nothing_else_does() -> None:
    base = text_of(causal, queries=100, keys=100)
    assert text_of(causal, queries=98, keys=98) == base
    others = [
        text_of(causal, queries=130, keys=130),
        text_of(causal, queries=100, keys=100, heads=8),
        text_of(causal, queries=100, keys=100, batch=4),
        text_of(causal, queries=100, keys=100, dtype=torch.bfloat16),
        text_of(windowed, queries=100, keys=100),
        text_of(lambda q, k: None, queries=100, keys=100),
        text_of(cached, torch.tensor(0), queries=100, keys=100),
        text_of(padded, torch.ones(5, 100, dtype=torch.bool), queries=100, keys=100),
        text_of(given_mask, torch.ones(5, 1, 100, 100, dtype=torch.bool), queries=100, keys=100),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_a_signature_knows_the_memory_layout() -> None:
    q, k, v = qkv(torch.float32)
    [(one, _)] = capture(attend_under(causal), q, k, v)
    [(two, _)] = capture(attend_under(causal), q.contiguous(), k, v)
    [(three, _)] = capture(attend_under(causal), q, torch.cat([k, k], -1)[..., :16], v)
    assert len({signature_of(region, True) for region in (one, two, three)}) == 3


def test_a_signature_names_no_graph_value_and_is_the_same_every_time() -> None:
    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, zebra: torch.Tensor) -> torch.Tensor:
        return attend_under(padded)(q, k, v, zebra)

    def two(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, quagga: torch.Tensor) -> torch.Tensor:
        return attend_under(padded)(a * 1.0, b, c, quagga)

    texts = []
    for fn in (one, two, one):
        [(region, _)] = capture(fn, *qkv(torch.float32), VALID)
        text = signature_of(region, True)
        assert text is not None and "zebra" not in text and "quagga" not in text
        texts.append(text)
    assert len(set(texts)) == 1


@given(st.integers(0, 1 << 20))
def test_a_bucket_is_at_most_a_quarter_larger_and_its_own_bucket(length: int) -> None:
    found = bucket(length)
    assert length <= found <= max(1.25 * length, 16)
    assert bucket(found) == found
    assert bucket(max(length - 1, 0)) <= found


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.sampled_from(sorted(SPELLINGS)))
def test_the_signature_of_a_random_mask_is_deterministic(seed: int, family: str) -> None:
    case = Case(seed, (family,))
    texts = set()
    for _ in range(2):
        module = trace(case.build, *case.inputs(0))
        form = prove(module, case.shape, case.kind, EMPTY_ROWS_OF_SDPA)
        mask = next(iter(reversed(module.graph.nodes))).args[0]
        assert isinstance(mask, fx.Node)
        texts.add(signature(Specimen.of(region_of(form, mask, case.shape), True)))
    assert len(texts) == 1


# -- under CUDA graphs


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (bad.plans_on_the_host, "not safe under CUDA graphs: a replay with inputs changed gives"),
        (bad.remembers_the_first_length, "wrong result: "),
        (bad.allocates_outside_the_pool, "bytes allocated outside the graph's pool"),
        (lambda: bad.right, ""),
    ],
)
def test_a_kernel_that_cannot_be_replayed_is_rejected_under_cuda_graphs(run: Any, reason: str) -> None:
    model = DECODERS[0].build("sdpa").cuda()
    ids = tokens(2, 1, seed=0).cuda()

    def step(model: Any, cache: Any, position: int) -> torch.Tensor:
        with torch.no_grad():
            where = torch.tensor([position], device="cuda")
            return model(ids, past_key_values=cache, cache_position=where, position_ids=where[None]).logits.clone()

    def cache() -> Any:
        result = StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            model(tokens(2, 9, seed=1).cuda(), past_key_values=result)
        return result

    kernel = make("bad.kernel", run())
    torch._dynamo.reset()
    with registered(provider(kernel)), config.patch(measure="auto", measure_budget=60.0, strict=True):
        import lz_compile

        compiled = torch.compile(model, backend="layerzero", mode="reduce-overhead")
        a, b = cache(), cache()
        for position in range(9, 14):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(step(compiled, a, position), step(model, b, position), atol=1e-4, rtol=1e-3)
        region = lz_compile.reports()[-1].regions[0]
    if reason:
        assert reason in region.rejected["bad.kernel"]
        assert region.kernel != "bad.kernel"
    else:
        found = next(c for c in region.candidates if c.kernel == "bad.kernel")
        assert found.graph_safe and found.pool_bytes is not None
