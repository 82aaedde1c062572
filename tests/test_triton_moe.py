"""The fused mixture of experts against its meaning in float64: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

import lz_compile
from lz_compile.lowering import moe_ops
from lz_compile.lowering.kernels import registered
from lz_compile.lowering.moe import moe
from lz_compile.lowering.moe_ops import ProductConfig
from lz_compile.lowering.triton_moe import MOE
from lz_compile.moe import Moe, Router
from lz_compile.region import Provider
from road import compile_road
from tiny import _GROUPED, tokens
from versions import needs_wrapped_interpreter

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter multiplies bfloat16 tiles as integers (triton 3.6), so there bfloat16 is for the GPU alone.
HALF = torch.bfloat16 if CUDA else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

pytestmark = pytest.mark.usefixtures("interpreter_reads_loop_bounds")

# Small tiles, so that a few dozen columns fill several; as many splits as Inductor would unroll at most.
SMALL = (ProductConfig(32, 32, 4, 2), ProductConfig(32, 16, 4, 2, 2))


@dataclasses.dataclass
class Block:
    """Experts with their input, laid out as ``op`` says; weights of deviation one over the root of their depth."""

    op: Moe
    values: list[Any]

    def expected(self) -> torch.Tensor:
        """[T, H] in float64."""
        return moe(*[v.double() if v is not None and v.is_floating_point() else v for v in self.values], self.op)

    def run(self, configs: tuple[ProductConfig, ProductConfig] | None = None) -> torch.Tensor:
        """The terms of the sum, [T, K * splits, H]."""
        op = self.op
        along_k = [layout == "out, in" for layout in (op.gate_up_layout, op.down_layout)]
        facts = (op.activation, op.gated, op.interleaved, op.alpha, op.limit, op.up_offset)
        if configs is None:
            return torch.ops.lz_compile.moe_v1(*self.values, *along_k, *facts)
        return moe_ops.experts(*self.values, *along_k, *facts, configs=configs)

    def check(self, configs: tuple[ProductConfig, ProductConfig] | None = SMALL) -> None:
        terms, expected = self.run(configs), self.expected()
        assert terms.dtype == torch.float32 and terms.is_contiguous()
        error = (terms.double().sum(1) - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[self.values[3].dtype]


def block(
    count: int = 3,
    top_k: int = 2,
    experts: int = 5,
    size: int = 40,
    width: int = 56,
    activation: Any = "silu",
    gated: bool = True,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    layouts: tuple[Any, Any] = ("out, in", "out, in"),
    biases: tuple[bool, bool] = (False, False),
    dtype: torch.dtype = torch.float32,
    hidden_dtype: torch.dtype | None = None,
    among: int | None = None,
    seed: int = 0,
) -> Block:
    """``among``: the first experts, from which all tokens choose."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    columns = 2 * width if gated else width
    shapes = [(experts, columns, size), (experts, size, width)]
    gate_up, down = (
        (normal(*shape) / shape[2] ** 0.5).transpose(1, 2 if layout == "in, out" else 1).contiguous().to(DEVICE, dtype)
        for shape, layout in zip(shapes, layouts)
    )
    first, second = (normal(experts, shape[1]).to(DEVICE, dtype) if has else None for shape, has in zip(shapes, biases))
    indices = torch.rand(count, among or experts, generator=generator).argsort(-1)[:, :top_k].to(DEVICE)
    weights = normal(count, top_k).softmax(-1).to(DEVICE)
    hidden = normal(count, size).to(DEVICE, hidden_dtype or dtype)
    nodes: list[Any] = [None] * 7
    op = Moe(
        *nodes, experts, top_k, width, activation, gated, interleaved, alpha, limit, up_offset, *layouts, "batched_mm",
        Router("unknown"),
    )  # fmt: skip
    return Block(op, [hidden, weights, indices, gate_up, down, first, second])


GPT_OSS: dict[str, Any] = {
    "interleaved": True, "alpha": 1.702, "limit": 1.0, "up_offset": 1.0,
    "layouts": ("in, out", "in, out"), "biases": (True, True),
}  # fmt: skip
UNGATED: dict[str, Any] = {"gated": False, "activation": "relu"}


@pytest.mark.slow_but(
    "gpt-oss-1-dtype0",
    "gpt-oss-16-dtype2",
    "halves-3-dtype1",
    "halves-40-dtype3",
    "ungated-16-dtype2",
)
@pytest.mark.parametrize(("count", "dtype"), [(1, torch.float32), (3, HALF), (16, torch.float32), (40, HALF)])
@pytest.mark.parametrize("facts", [{}, GPT_OSS, UNGATED], ids=["halves", "gpt-oss", "ungated"])
def test_experts_of_few_tokens_are_what_they_mean(facts: dict[str, Any], count: int, dtype: torch.dtype) -> None:
    block(count, top_k=1 + count % 4, experts=4 + count % 5, dtype=dtype, **facts).check()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(activation: str, gated: bool) -> None:
    block(activation=activation, gated=gated).check()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("layouts", [(a, b) for a in ("out, in", "in, out") for b in ("out, in", "in, out")])
def test_every_layout_with_biases(layouts: tuple[str, str], interleaved: bool) -> None:
    block(1, experts=8, interleaved=interleaved, layouts=layouts, biases=(True, True), dtype=HALF).check()


@settings(max_examples=60 if CUDA else 12)
@given(st.data())
def test_sizes_need_not_fill_tiles(data: st.DataObject) -> None:
    def number(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    experts = number(1, 6)
    facts = {
        "experts": experts,
        "top_k": number(1, min(experts, 4)),
        "count": number(1, 20),
        "size": number(1, 70),
        "width": number(1, 70),
        "gated": data.draw(st.booleans()),
        "layouts": tuple(data.draw(st.sampled_from(["out, in", "in, out"])) for _ in range(2)),
        "biases": (data.draw(st.booleans()), data.draw(st.booleans())),
        "seed": number(0, 9),
    }
    interleaved = facts["gated"] and data.draw(st.booleans())
    block(**facts, interleaved=interleaved).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 9])
def test_experts_that_nobody_chose_are_not_read(count: int) -> None:
    case = block(count, top_k=2, experts=8, among=3, biases=(True, True))
    chosen = case.values[2].unique()
    for parameter in case.values[3:]:
        rest = torch.ones(len(parameter), dtype=torch.bool)
        rest[chosen] = False
        clean = parameter.clone()
        parameter[rest.to(DEVICE)] = torch.nan
        assert parameter.isnan().any() and torch.equal(clean[chosen], parameter[chosen])
    assert not case.run(SMALL).isnan().any()
    case.values[3:] = [parameter.nan_to_num() for parameter in case.values[3:]]
    case.check()


def test_every_term_is_written_and_calls_agree_bit_for_bit() -> None:
    case = block(11, top_k=3, experts=4, dtype=HALF)
    first = case.run(SMALL)
    assert not first.isnan().any() and torch.equal(first, case.run(SMALL))


def test_a_token_that_is_not_finite_leaves_the_others_alone() -> None:
    case = block(4, top_k=2, experts=3, activation="relu", limit=1.0)
    case.values[0][1] = torch.nan
    terms = case.run(SMALL).sum(1)
    assert terms.isnan().any(1).tolist() == [False, True, False, False] and terms[1].isnan().all()


def _transposed(value: torch.Tensor) -> torch.Tensor:
    return value.mT.contiguous().mT


def _spaced(value: torch.Tensor) -> torch.Tensor:
    return value.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("relaid", [_transposed, _spaced])
def test_strides_are_followed(relaid: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case = block(6, biases=(True, True))
    expected = case.run(SMALL)
    case.values = [relaid(value) for value in case.values]
    assert not any(value.is_contiguous() for value in case.values)
    torch.testing.assert_close(case.run(SMALL), expected, atol=1e-6, rtol=1e-5)


def test_other_dtypes_of_tokens_weights_and_indices() -> None:
    case = block(5, dtype=HALF, hidden_dtype=torch.float32)
    case.values[0] = case.values[0].to(HALF).float()
    case.values[1], case.values[2] = case.values[1].to(HALF), case.values[2].int()
    case.check()


@needs_wrapped_interpreter
@pytest.mark.parametrize("facts", [{"count": 8, "top_k": 4, "experts": 8}, {"count": 1, "experts": 40}])
def test_the_tiles_that_are_chosen_by_shape_give_the_same(facts: dict[str, int]) -> None:
    block(**facts, size=96, width=160, dtype=HALF, **GPT_OSS).check(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 8, 33, 64])
@pytest.mark.parametrize("facts", [{}, GPT_OSS, UNGATED], ids=["halves", "gpt-oss", "ungated"])
@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_the_tiles_that_are_chosen_by_shape_when_compiled(
    facts: dict[str, Any], count: int, dtype: torch.dtype
) -> None:
    block(count, top_k=4, experts=16, size=720, width=1000, dtype=dtype, **facts).check(None)


def test_tiles_fill_the_machine_and_leave_a_sum_that_is_unrolled() -> None:
    models = [(8, 4, 8, 2880, 2880), (1, 2, 8, 4096, 14336), (1, 8, 128, 2048, 768)]
    for along_k, (count, top_k, experts, size, width) in itertools.product((True, False), models):
        slots = min(experts, count * top_k)
        most = max(1, 8 // top_k)
        first = moe_ops.product_config(torch.bfloat16, count, 2 * width, size, along_k, slots, 132)
        second = moe_ops.product_config(torch.bfloat16, count, size, width, along_k, slots, 132, most)
        assert first.splits == 1 and second.splits <= most
        for config, columns in ((first, 2 * width), (second, size)):
            assert -(-columns // config.columns) * config.splits * slots >= 2 * 132
            assert config.columns * config.block_k * 2 == 16 << 10


@needs_wrapped_interpreter
def test_the_fake_result_has_the_shape_and_strides_of_the_real_one() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = block(1, top_k=2, experts=2, size=32, width=256)
    real = case.run()
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(value) if value is not None else None for value in case.values]
    with mode:
        fake = Block(case.op, fakes).run()
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.shape[1] > 2  # it was split


# -- in models

TINY = {**_GROUPED, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "GptOss": {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {**TINY, "num_local_experts": 5, "num_experts_per_tok": 3},
    "Qwen3Moe": {**TINY, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
}


def model(name: str, dtype: torch.dtype) -> Any:
    """Two layers with biases and experts that are not zero."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    result = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in result.parameters():
        parameter.data = (parameter.data + 0.2 * torch.randn(parameter.shape)).to(DEVICE, dtype)
    return result.to(DEVICE)


@pytest.mark.slow
@needs_wrapped_interpreter
def test_it_qualifies_and_runs_in_a_model() -> None:
    """Under another name and without the question for a GPU, where there is none."""
    kernel = MOE if CUDA else dataclasses.replace(MOE, name="mine.moe", supports=lambda region: None, devices=())
    net = model("GptOss", torch.float32)
    ids = tokens(1, 4, 0).to(DEVICE)
    with registered(Provider("mine", () if CUDA else (kernel,))):
        run, road = compile_road(net, kinds=["moe"], prefer=["*.moe"], measure="auto", measure_budget=60.0)
        with torch.no_grad():
            got, expected = run(ids, use_cache=False)[0], net(ids, use_cache=False)[0]
    assert road.kernels == [kernel.name] * 2
    for region in road.regions:
        assert {c.kernel for c in region.candidates if c.source != "estimated"} >= {kernel.name, "inductor"}
    assert road.targets().count(torch.ops.lz_compile.moe_v1.default) == 2
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_more_tokens_than_it_is_for_and_other_devices_are_declined_with_a_reason() -> None:
    net = model("Mixtral", torch.float32)
    with registered(Provider("mine", () if CUDA else (dataclasses.replace(MOE, name="mine.moe", devices=()),))):
        run, road = compile_road(net, kinds=["moe"], measure="off")
        with torch.no_grad():
            run(tokens(1, 80, 0).to(DEVICE), use_cache=False)
    reason = "is for up to 64 tokens" if CUDA else "runs on CUDA"
    assert [set(region.rejected.values()) for region in road.regions] == [{reason}] * 2


LOCK = """
version: 1
rules:
  - lock: triton.moe
    when: {op: moe}
"""


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_lock_on_it_holds_in_a_decode_step_in_bfloat16(name: str, mode: str | None) -> None:
    from transformers import StaticCache

    torch._dynamo.reset()
    counters.clear()
    half = model(name, torch.bfloat16)
    exact = copy.deepcopy(half).double()
    exact.config._experts_implementation = "batched_mm"
    with lz_compile.config.patch(policy=LOCK, measure="auto", measure_budget=120.0, strict=True):
        compiled = torch.compile(half, backend="layerzero", mode=mode)
        results = []
        for net, run in ((half, compiled), (half, half), (exact, exact)):
            cache = StaticCache(config=net.config, max_cache_len=32)
            logits = []
            with torch.no_grad():
                net(tokens(2, 12, 0).to(DEVICE), past_key_values=cache)
                for step in range(4):
                    logits.append(run(tokens(2, 1, step).to(DEVICE), past_key_values=cache).logits.double())
            results.append(torch.cat(logits, 1))
    found = [region for region in lz_compile.reports()[-1].regions if region.kind == "moe"]
    assert [region.kernel for region in found] == ["triton.moe"] * 2
    for region in found:
        assert {c.kernel for c in region.candidates if c.source != "estimated"} >= {"triton.moe", "inductor"}
    if mode == "reduce-overhead":
        assert counters["inductor"]["cudagraph_skips"] == 0
    ours, eager, reference = results
    error = (ours - reference).abs().max() / reference.abs().max()
    assert error <= 1.5 * (eager - reference).abs().max() / reference.abs().max() + 4 * 2.0**-8


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_compiled_graph_knows_that_only_results_are_written() -> None:
    """What Inductor takes for written it copies first: here that would be choices, or all weights."""
    from torch._dynamo.backends.common import aot_autograd

    case = block(3, biases=(True, True), dtype=torch.bfloat16)
    cloned: list[Any] = []

    def look(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        cloned.extend(n.kwargs["tensors_to_clone"] for n in module.graph.nodes if "tensors_to_clone" in n.kwargs)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: Block(case.op, list(values)).run(), backend=aot_autograd(fw_compiler=look))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*case.values), case.run(), atol=0, rtol=0)
    assert cloned == [["out"], ["out"]]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_only_activations_and_terms_are_allocated() -> None:
    case = block(8, top_k=4, experts=8, size=512, width=1024, dtype=torch.bfloat16, **GPT_OSS)
    terms = case.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = case.run()
    assert torch.cuda.max_memory_allocated() - before == again.nbytes + 8 * 4 * 1024 * 2
    assert torch.equal(terms, again)
