"""Key/value caches of unmodified Hugging Face models: which are recognised, and that tokens and states stay eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation.configuration_utils import CompileConfig, ContinuousBatchingConfig

from lz_compile.aliasing import Aliases
from lz_compile.lowering import rolled
from lz_compile.lowering.lengths import Prefix, find_prefix
from lz_compile.normalize import normalize
from lz_compile.patterns.attention import find_attention
from lz_compile.patterns.cache import find_rolled_windows
from road import Road, compile_road
from tiny import DECODERS, Architecture, tokens
from versions import needs_wrapped_interpreter

WINDOW = 8
_GROUPED = {**DECODERS[0].settings, "head_dim": 16, "sliding_window": WINDOW}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
LLAMA, MISTRAL = DECODERS[0], DECODERS[2]
ONE_LAYER = Architecture("one layer", LLAMA.config, LLAMA.model, {**LLAMA.settings, "num_hidden_layers": 1}, "decoder")
GEMMA2 = Architecture("gemma2", "Gemma2Config", "Gemma2ForCausalLM", _GROUPED, "decoder")
GEMMA3 = Architecture("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, **_ALTERNATING}, "decoder")
GPT_OSS = Architecture(
    "gpt-oss",
    "GptOssConfig",
    "GptOssForCausalLM",
    {**_GROUPED, **_ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "decoder",
)
T5 = Architecture(
    "t5",
    "T5Config",
    "T5ForConditionalGeneration",
    {
        "vocab_size": 128,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
    "encoder and decoder",
)
slow = pytest.mark.slow


class Counting:
    """A Dynamo backend that adds no guard of its own: what it compiles is the least that any backend does."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


def greedy(model: Any, cache: Any, steps: int = 64) -> torch.Tensor:
    """The tokens of ``steps`` calls, of which the first is a prefill of 4."""
    ids, found = tokens(2, 4, 0), []
    with torch.no_grad():
        for _ in range(steps):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(ids)
    return torch.cat(found, 1)


def graphs_at_least(model: Any, cache: Any, steps: int = 64) -> int:
    torch._dynamo.reset()
    counting = Counting()
    greedy(torch.compile(model, backend=counting), cache, steps)
    return counting.graphs


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        (GEMMA3, "sdpa"),
        pytest.param(MISTRAL, "sdpa", marks=slow),
        pytest.param(MISTRAL, "eager", marks=slow),
        pytest.param(GEMMA3, "eager", marks=slow),
        pytest.param(GEMMA2, "eager", marks=slow),
        pytest.param(GPT_OSS, "eager", marks=slow),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_sliding_and_hybrid_models_give_eagers_tokens_and_states_across_the_window(
    architecture: Architecture, attention: str
) -> None:
    model = architecture.build(attention)
    caches = [StaticCache(config=model.config, max_cache_len=80) for _ in range(2)]
    compiled, road = compile_road(model, dynamic=None)
    assert torch.equal(greedy(compiled, caches[0]), greedy(model, caches[1]))
    for ours, theirs in zip(caches[0].layers, caches[1].layers):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys)
    assert len(road.graphs) == 3  # prefill, a window that fills, a full one
    if architecture is not GPT_OSS:
        past = [region for region in road.graphs[-1].regions if "rolled window" in region.cache]
        assert len(past) == (2 if architecture is MISTRAL else 1)
        assert all(region.mask == "none" for region in past)


@slow
@pytest.mark.parametrize("chunks", [(12, 1, 1, 1), (5, 5, 5, 1, 3, 1)], ids=str)
def test_chunks_of_any_length_before_across_and_past_the_window_are_proved(chunks: tuple[int, ...]) -> None:
    model = GEMMA3.build("sdpa")

    def run(m: Any) -> tuple[torch.Tensor, Any]:
        cache = StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad():
            logits = [m(tokens(2, n, i), past_key_values=cache).logits for i, n in enumerate(chunks)]
        return torch.cat(logits, 1), cache

    compiled, road = compile_road(model, dynamic=None)
    (got, ours), (expected, theirs) = run(compiled), run(model)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
    assert len(road.regions) == 2 * len(road.graphs) and "inductor" not in road.kernels
    assert all("dense" not in region.mask for region in road.regions)
    counting = Counting()
    torch._dynamo.reset()
    run(torch.compile(model, backend=counting))
    assert len(road.graphs) <= counting.graphs


@pytest.mark.parametrize("architecture", [MISTRAL, pytest.param(GEMMA3, marks=slow)], ids=lambda a: a.name)
def test_generate_over_a_sliding_model_compiles_no_more_graphs_than_any_backend(architecture: Architecture) -> None:
    model = architecture.build("sdpa")
    counting, road = Counting(), Road()
    expected = generate(model, None)
    assert torch.equal(generate(model, lambda module, inputs: counting(module, inputs)), expected)
    assert torch.equal(generate(model, lambda module, inputs: road(module, inputs)), expected)
    assert 0 < len(road.graphs) <= counting.graphs
    assert len(road.regions) == 2 * len(road.graphs) and "inductor" not in road.kernels


def generate(model: Any, backend: Any) -> torch.Tensor:
    """30 tokens behind 5, over static caches; compiled unless ``backend`` is None."""
    torch._dynamo.reset()
    model.__dict__.pop("_compiled_call", None)
    how: dict[str, Any] = {"disable_compile": True}
    if backend is not None:
        compile_config = CompileConfig(backend=backend, mode=None, fullgraph=False)
        compile_config._compile_all_devices = True
        how = {"compile_config": compile_config}
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return model.generate(tokens(2, 5, 0), cache_implementation="static", **options, **how)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=slow)])
def test_a_growing_cache_has_one_graph_for_all_lengths_and_its_sites_are_recognised(attention: str) -> None:
    model = LLAMA.build(attention)
    compiled, road = compile_road(model, dynamic=None)
    assert torch.equal(greedy(compiled, DynamicCache()), greedy(model, DynamicCache()))
    assert len(road.graphs) == 3  # prefill, one step, a step of any length
    assert all("cat into past_key_values" in region.cache for region in road.graphs[-1].regions)
    assert all("4 heads over 2" in region.shape and "+ 1 keys" in region.shape for region in road.graphs[-1].regions)
    assert "inductor" not in road.kernels


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=slow)])
def test_padding_over_a_growing_cache_is_read_by_a_kernel_of_symbolic_length(attention: str) -> None:
    model = ONE_LAYER.build(attention)
    compiled, road = compile_road(model, dynamic=None, prefer=["cpu.ranges"])

    def padded(m: Any) -> torch.Tensor:
        ids, cache, found = tokens(2, 6, 0), DynamicCache(), []
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, :2] = 0
        with torch.no_grad():
            for _ in range(12):
                ids = m(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                found.append(ids)
        return torch.cat(found, 1)

    assert torch.equal(padded(compiled), padded(model))
    last = road.graphs[-1].regions
    assert all("+ 1 keys" in region.shape and region.kernel == "cpu.ranges" for region in last) and len(last) == 1


@slow
def test_a_sliding_cache_that_grows_is_recognised_at_every_length() -> None:
    model = MISTRAL.build("sdpa")
    compiled, road = compile_road(model, dynamic=None)
    expected = greedy(model, DynamicCache(config=model.config), 20)
    assert torch.equal(greedy(compiled, DynamicCache(config=model.config), 20), expected)
    assert len(road.graphs) <= graphs_at_least(model, DynamicCache(config=model.config), 20)
    assert len(road.regions) == 2 * len(road.graphs) and "inductor" not in road.kernels
    assert all(region.mask in ("none", "causal") for region in road.regions)


def test_keys_and_values_that_differ_in_length_only_now_are_compiled_anew_and_declined() -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    compiled, road = compile_road(attend, dynamic=None)
    query = torch.randn(1, 2, 1, 16)
    for length in (5, 6, 7):
        key, value = torch.randn(2, 1, 2, length, 16)
        torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))
    assert len(road.graphs) == 2 and "inductor" not in road.kernels
    compiled(query, torch.randn(1, 2, 8, 16), torch.randn(1, 2, 7, 16))
    assert len(road.graphs) == 3 and "do not fit" in road.graphs[-1].regions[0].reason


def repeated(x: torch.Tensor) -> torch.Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None, :, :].expand(batch, heads, 2, length, size).reshape(batch, heads * 2, length, size)


def from_the_second(x: torch.Tensor) -> torch.Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None, 1:, :].expand(batch, heads, 2, length - 1, size).reshape(batch, heads * 2, length - 1, size)


@pytest.mark.parametrize(("repeat", "kv_heads"), [(repeated, 2), (from_the_second, 4)])
def test_repeated_heads_are_seen_through_a_slice_that_keeps_everything_only(
    repeat: Callable[..., torch.Tensor], kv_heads: int
) -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = repeat(key), repeat(value)
        return (query @ key.transpose(2, 3) / 4).softmax(-1) @ value

    compiled, road = compile_road(attend, dynamic=None)
    for length in (7, 8, 9):
        query, key, value = torch.randn(2, 4, 1, 16), torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
        torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))
    assert f"4 heads over {kv_heads}" in road.regions[-1].shape and "queries, s" in road.regions[-1].shape


@slow
@pytest.mark.parametrize("static", [True, False], ids=["static", "growing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_caches_of_an_encoder_decoder_keep_eagers_tokens(attention: str, static: bool) -> None:
    model = T5.build(attention)
    compiled, road = compile_road(model, dynamic=None)
    assert torch.equal(translate(compiled, model, static), translate(model, model, static))
    assert len(road.graphs) == (2 if static else 3)
    assert len(road.regions) == 4 * len(road.graphs)
    cross = [region for region in road.regions if "EncDec" in region.module]
    assert len(cross) == len(road.regions) // 2
    assert all(region.mask == "none" and region.kernel != "inductor" for region in cross)


def translate(model: Any, whole: Any, static: bool) -> torch.Tensor:
    """16 greedy tokens of a decoder after one pass of its encoder."""

    def cache(length: int) -> Any:
        return StaticCache(config=whole.config, max_cache_len=length) if static else DynamicCache()

    caches = EncoderDecoderCache(cache(40), cache(12))
    ids, found = tokens(2, 4, 0), []
    with torch.no_grad():
        encoded = whole.encoder(tokens(2, 12, 1))
        for _ in range(16):
            logits = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=caches).logits
            ids = logits[:, -1:].argmax(-1)
            found.append(ids)
    return torch.cat(found, 1)


class Bytes(QuantizedLayer):
    """A quantised cache in plain torch: eight bits and one scale a row."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return q_tensor[0].to(q_tensor[1].dtype) * q_tensor[1]


@pytest.mark.slow
def test_a_quantised_cache_is_left_alone_and_the_report_says_so() -> None:
    model = ONE_LAYER.build("sdpa")

    def cache() -> Cache:
        return Cache(layers=[Bytes(residual_length=16) for _ in range(1)])

    compiled, road = compile_road(model, dynamic=None)
    assert torch.equal(greedy(compiled, cache(), 4), greedy(model, cache(), 4))
    steps = [region for graph in road.graphs[1:] for region in graph.regions]
    assert steps and all("quantised cache, left alone" in region.cache for region in steps)


# -- continuous batching


@pytest.mark.parametrize(
    ("architecture", "attention", "dynamic"),
    [
        (ONE_LAYER, "sdpa", None),
        pytest.param(LLAMA, "sdpa", True, marks=slow),
        pytest.param(LLAMA, "eager", None, marks=slow),
        pytest.param(MISTRAL, "sdpa", None, marks=slow),
        pytest.param(GEMMA3, "sdpa", None, marks=slow),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="this transformers finds no memory for pages on a CPU"
)
def test_continuous_batching_gives_eagers_tokens(
    architecture: Architecture, attention: str, dynamic: bool | None
) -> None:
    model = architecture.build(attention)
    road = Road()
    expected = generate_batch(model, None)
    assert generate_batch(model, lambda module, inputs: road(module, inputs), dynamic) == expected
    assert road.regions
    if attention == "eager":  # the graph break in the cache's update makes the weights a result
        assert {region.reason for region in road.regions} == {"attention weights are used elsewhere"}
    else:
        assert "inductor" not in road.kernels
    assert all("additive mask(" in region.mask for region in road.regions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", [LLAMA, MISTRAL, GEMMA3], ids=lambda value: value.name)
def test_continuous_batching_on_a_gpu_gives_eagers_tokens(architecture: Architecture) -> None:
    model = architecture.build("sdpa").cuda()
    road = Road()
    expected = generate_batch(model, None)
    assert generate_batch(model, lambda module, inputs: road(module, inputs)) == expected
    assert road.regions and "inductor" not in {r.kernel for r in road.regions if r.kind == "attention"}


def generate_batch(model: Any, backend: Any, dynamic: bool | None = None) -> list[list[int]]:
    """20 tokens behind prompts of different length, decoded together; compiled unless ``backend`` is None."""
    torch._dynamo.reset()
    prompts = [tokens(1, length, length)[0].tolist() for length in (5, 9, 3)]
    how = {}
    if backend is not None:
        how["varlen_compile_config"] = CompileConfig(
            backend=backend, mode=None, options={}, fullgraph=False, dynamic=dynamic
        )
    batching = ContinuousBatchingConfig(num_blocks=32, block_size=8, max_batch_tokens=32, **how)
    generation = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batching, progress_bar=False
    )
    return [request.generated_tokens for _, request in sorted(found.items())]


# -- rolled windows


def step(keys: torch.Tensor, values: torch.Tensor, new: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """One step of a full sliding cache, as transformers spells it."""
    rolled_keys, rolled_values = keys.roll(-1, dims=-2), values.roll(-1, dims=-2)
    index = torch.tensor([-1], dtype=int, device=keys.device)
    rolled_keys[:, :, index] = new
    rolled_values[:, :, index] = new * 2
    keys.copy_(rolled_keys)
    values.copy_(rolled_values)
    return F.scaled_dot_product_attention(query, keys, values)


def windows(fn: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """How many rolled windows the graph of ``fn`` has."""
    found = []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = normalize(module).graph
        found.append(len(find_rolled_windows(graph, Aliases(graph))))
        return module.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=False)(*inputs)
    return sum(found)


def inputs(length: int = WINDOW, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, length, size), (2, 3, length, size), (2, 3, 1, size), (2, 3, 1, size)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def rolls_two(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-2, dims=-2)
    moved[:, :, torch.tensor([-1])] = new
    return keys.copy_(moved)


def rolls_heads(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=1)
    moved[:, :, torch.tensor([-1])] = new
    return keys.copy_(moved)


def puts_first(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    moved[:, :, torch.tensor([0])] = new
    return keys.copy_(moved)


def is_read_elsewhere(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = new
    keys.copy_(moved)
    return moved.sum()


def is_written_in_between(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    keys.zero_()
    moved[:, :, torch.tensor([-1])] = new
    return keys.copy_(moved)


def new_row_changes(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = new
    new.zero_()
    return keys.copy_(moved)


def goes_elsewhere(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = new
    return torch.empty_like(keys).copy_(moved)


def is_flipped(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.flip(2)
    moved[:, :, torch.tensor([-1])] = new
    return keys.copy_(moved)


def accumulates(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    moved.index_put_((torch.tensor([[[0]], [[1]]]), torch.arange(3)[:, None], torch.tensor([-1])), new, accumulate=True)
    return keys.copy_(moved)


def adds_to_the_last(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    torch.ops.aten.index_put_(moved, [None, None, torch.tensor([-1])], new, True)
    return keys.copy_(moved)


def puts_into_a_head(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    moved[:, torch.tensor([-1])] = new
    return keys.copy_(moved)


def puts_the_same_everywhere(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    moved = keys.roll(-1, dims=-2)
    moved[:, :, torch.tensor([-1])] = new[:1]
    return keys.copy_(moved)


def test_a_rolled_window_is_recognised_for_keys_and_for_values() -> None:
    assert windows(step, *inputs()) == 2


@pytest.mark.parametrize(
    "near_miss",
    [
        rolls_two,
        rolls_heads,
        puts_first,
        is_read_elsewhere,
        is_written_in_between,
        new_row_changes,
        goes_elsewhere,
        is_flipped,
        accumulates,
        adds_to_the_last,
        puts_the_same_everywhere,
    ],
    ids=lambda fn: fn.__name__,
)
def test_what_only_looks_like_a_rolled_window_is_not(near_miss: Callable[..., Any]) -> None:
    keys, _, new, _ = inputs(3 if near_miss is rolls_heads else WINDOW)
    assert windows(near_miss, keys, new) == 0


def test_a_row_that_all_positions_of_a_head_get_is_no_rolled_window() -> None:
    keys, _, new, _ = inputs()
    assert windows(puts_into_a_head, keys[:, :1].contiguous(), new[:, :1].contiguous()) == 0


def test_a_rolled_tensor_of_three_dimensions_is_no_window() -> None:
    def rolled_rows(keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        moved = keys.roll(-1, dims=2)
        moved[:, :, torch.tensor([-1])] = new
        return keys.copy_(moved)

    assert windows(rolled_rows, torch.randn(2, 3, 8), torch.randn(2, 3, 1)) == 0


@needs_wrapped_interpreter
@pytest.mark.parametrize(("length", "size"), [(WINDOW, 16), (64, 16), (130, 40), (65, 128), (2, 1)])
def test_a_window_moved_in_place_is_the_rolled_one_bit_for_bit(length: int, size: int) -> None:
    keys, _, new, _ = inputs(length, size)
    transposed = keys.transpose(1, 2).contiguous().transpose(1, 2)
    expected = torch.cat([keys[:, :, 1:], new], 2)
    for cache in (keys, transposed):
        last = torch.cat([cache[:, :, rolled.SEGMENT :: rolled.SEGMENT], new], 2)
        torch.ops.lz_compile.roll_window_v1(cache, last)
        assert torch.equal(cache, expected)


@needs_wrapped_interpreter
def test_the_road_moves_windows_in_place_when_asked_and_attention_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolled, "takes", lambda cache: True)
    compiled, road = compile_road(step, kinds=["attention", "rolled_window"])
    ours, theirs = inputs(130), inputs(130)
    for _ in range(3):
        torch.testing.assert_close(compiled(*ours), step(*theirs))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert road.targets().count(torch.ops.lz_compile.roll_window_v1.default) == 2
    assert not {torch.ops.aten.roll.default, torch.ops.aten.copy_.default} & set(road.targets())
    (region,) = road.regions
    assert region.cache.startswith("rolled window into") and region.mask == "none"


def test_windows_stay_as_they_are_on_the_cpu() -> None:
    compiled, road = compile_road(step, kinds=["attention", "rolled_window"])
    torch.testing.assert_close(compiled(*inputs()), step(*inputs()))
    assert torch.ops.aten.roll.default in road.targets()


# -- pages


def test_attention_over_gathered_pages_names_the_write_to_the_pages() -> None:
    def attend(
        query: torch.Tensor, pages: torch.Tensor, new: torch.Tensor, write: torch.Tensor, read: torch.Tensor
    ) -> torch.Tensor:
        pages.index_copy_(0, write, new)
        key = torch.index_select(pages, 0, read).transpose(0, 1).unsqueeze(0)
        return F.scaled_dot_product_attention(query, key, key)

    found = []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = normalize(module).graph
        found.extend(find_attention(graph, Aliases(graph), lambda node: ""))
        return module.forward

    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    query, pages = torch.randn(1, 2, 1, 16, generator=generator), torch.randn(20, 2, 16, generator=generator)
    torch.compile(attend, backend=backend)(query, pages, query[0].transpose(0, 1), torch.tensor([7]), torch.arange(9))
    (region,) = found
    assert region.key_cache.kind == "index_copy_ of pages" and region.key_cache.cache.op == "placeholder"


# -- new tokens behind a growing cache


def behind(shift: int, window: int | None) -> Callable[..., torch.Tensor]:
    """Attention of new tokens over past and new ones; with ``shift`` the diagonal is off by as many keys."""

    def attend(query: torch.Tensor, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        key = torch.cat([past, new], 2)
        place = torch.arange(new.shape[2])[:, None] + past.shape[2] + shift
        index = torch.arange(key.shape[2])
        mask = index <= place
        if window is not None:
            mask = mask & (index > place - window)
        return F.scaled_dot_product_attention(query, key, key, mask)

    return attend


@pytest.mark.parametrize(
    ("shift", "window", "expected"),
    [
        (0, None, Prefix(causal=True)),
        (0, 8, Prefix(causal=True, window_left=7)),
        (-1, None, None),
        (1, None, None),
        (1, 8, None),
    ],
)
def test_new_tokens_behind_a_growing_cache_are_causal_from_the_last_key_at_any_length(
    shift: int, window: int | None, expected: Prefix | None
) -> None:
    found: list[Any] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = normalize(module).graph
        found.extend(find_prefix(region) for region in find_attention(graph, Aliases(graph), lambda node: ""))
        return module.forward

    torch._dynamo.reset()
    inputs = [torch.randn(1, 2, length, 16) for length in (3, 11, 3)]
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 2)
    torch.compile(behind(shift, window), backend=backend)(*inputs)
    (prefix,) = found
    assert prefix == expected if expected is not None else isinstance(prefix, str)
