"""Mixtures of experts: recognised in models and functions, what they mean, what is left alone, others' kernels."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
import transformers

from lz_compile.aliasing import Aliases
from lz_compile.coverage_child import _look
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.kernels import registered
from lz_compile.lowering.moe import moe_output
from lz_compile.lowering.pointwise import meaning
from lz_compile.moe import Router
from lz_compile.normalize import module_path, normalize
from lz_compile.patterns.moe import find_moes
from lz_compile.plan import Choice, Plan
from lz_compile.region import Kernel, Provider, Region
from lz_compile.rewrite import rewrite
from road import compile_road
from tiny import _GROUPED, tokens

_numbers = itertools.count()
SMALL = {**_GROUPED, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
CHOICE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "Mixtral": ({**SMALL, "num_local_experts": 5, "num_experts_per_tok": 3}, Router("softmax", True)),
    "Qwen3Moe": ({**SMALL, **CHOICE, "num_experts": 6}, Router("softmax")),
    "GptOss": ({**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}, Router("softmax over the top-k")),
    "DeepseekV3": (
        {**SMALL, **CHOICE, **LATENT, **GROUPS, "n_routed_experts": 6},
        Router("sigmoid", True, 2.5),
    ),
}
IMPLEMENTATIONS = ["grouped_mm", "batched_mm"]


@functools.cache
def model(name: str, implementation: str) -> Any:
    """Two layers in float32, with biases and experts that are not zero."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0])
    config._experts_implementation = implementation
    result = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in result.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return result


def blocks(name: str, implementation: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The two expert blocks of a model with their routers, on hidden states ``[B, S, 32]``."""
    layers = [layer.mlp for layer in copy.deepcopy(model(name, implementation)).to(dtype).model.layers]

    def run(x: torch.Tensor) -> torch.Tensor:
        for block in layers:
            out = block(x)
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x

    return run


def as_custom_op(function: Callable[..., torch.Tensor], count: int) -> Any:
    """An opaque operator of ``count`` tensors, as the kernel of a library is one."""
    arguments = ", ".join(f"Tensor a{i}" for i in range(count))
    name = f"lz_compile_moe_tests::moe_{next(_numbers)}"
    operator = torch.library.custom_op(name, function, mutates_args=(), schema=f"({arguments}) -> Tensor")
    operator.register_fake(moe_output)
    return operator._opoverload


def kernel(name: str = "mine.moe", spoil: float = 0.0) -> Kernel:
    """The meaning as a kernel; ``spoil`` makes it wrong by that share."""

    def emit(emitter: Any, region: Region) -> fx.Node:
        function = meaning(region)

        def run(*values: torch.Tensor) -> torch.Tensor:
            return (function(*values) * (1 + spoil)).contiguous()

        return emitter.call(region.output, as_custom_op(run, len(region.inputs)), *region.inputs)

    return Kernel(name, "moe", "1", lambda region: None, emit, cuda_graphs="")


class Watch:
    """A Dynamo backend that replaces every block by what it means and keeps what it saw."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.errors: list[float] = []
        self.replaced = 0

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        normal = normalize(module)
        aliases = Aliases(normal.graph)
        found = find_moes(normal.graph, aliases, module_path)
        self.regions += found
        choices = [Choice(region, kernel(), "") for region in found if not region.declined]
        self.replaced += rewrite(normal, aliases, Plan(choices, ""), Emitter)
        normal.graph.lint()
        normal.recompile()
        return normal.forward


def watch(fn: Any, *inputs: torch.Tensor, dynamic: bool = False, eager: Any = None) -> tuple[Watch, Any, Any]:
    """What the backend saw, the compiled result and eager's (of ``eager``, where ``fn`` does not run uncompiled)."""
    torch._dynamo.reset()
    backend = Watch()
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        return backend, compiled(*inputs), (eager or fn)(*inputs)


def states(dtype: torch.dtype, rows: int = 7) -> torch.Tensor:
    return torch.randn(2, rows, 32, generator=torch.Generator().manual_seed(rows)).to(dtype)


def close(got: Any, expected: Any, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert got.dtype == expected.dtype and got.stride() == expected.stride()
    assert (got.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


# -- models


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", list(MODELS))
def test_every_layer_has_one_block_that_means_what_eager_computes_in_float64(name: str, implementation: str) -> None:
    fn, eager = (blocks(name, how, torch.float64) for how in (implementation, "batched_mm"))
    backend, got, expected = watch(fn, states(torch.float64), eager=eager)
    assert [region.declined for region in backend.regions] == ["", ""] and backend.replaced == 2
    settings, router = MODELS[name]
    for region in backend.regions:
        op = region.op
        assert op.implementation == implementation and op.router == router
        assert op.top_k == settings["num_experts_per_tok"]
        assert op.intermediate == settings.get("moe_intermediate_size", 48)
        is_gpt_oss = name == "GptOss"
        assert (op.gate_up_layout, op.interleaved, op.gate_up_bias is not None) == (
            "in, out" if is_gpt_oss else "out, in",
            is_gpt_oss,
            is_gpt_oss,
        )
        assert (op.limit, op.alpha, op.up_offset) == ((7.0, 1.702, 1.0) if is_gpt_oss else (None, 1.0, 0.0))
    close(got, expected, torch.float64)


def test_the_grouped_product_of_torch_itself_is_read_alike() -> None:
    backend, got, expected = watch(blocks("DeepseekV3", "grouped_mm", torch.bfloat16), states(torch.bfloat16))
    assert [region.declined for region in backend.regions] == ["", ""]
    targets = [node.target for region in backend.regions for node in region.nodes]
    assert targets.count(torch.ops.aten._grouped_mm.default) == 4
    close(got, expected, torch.bfloat16)


def test_dynamic_numbers_of_tokens_are_one_block() -> None:
    fn, eager = (blocks("Qwen3Moe", how, torch.float64) for how in IMPLEMENTATIONS)
    backend, got, expected = watch(fn, states(torch.float64, 5), dynamic=True, eager=eager)
    assert backend.replaced == 2
    close(got, expected, torch.float64)


# -- other spellings, and near misses

T, K, E, H, N = 9, 2, 4, 32, 16


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, H), (T, E), (E, 2 * N, H), (E, H, N), (E, H)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _gated(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def _counts(experts: torch.Tensor) -> torch.Tensor:
    return torch.histc(experts.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)


def sorted_by_expert(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor,
    *,
    gather: Callable[..., Any] = lambda x, order: x[order // K],
    descending: bool = False,
    ends: Callable[..., Any] = lambda experts, logits: _counts(experts),
    act: Callable[..., Any] = _gated,
    bias_of: Callable[..., Any] = lambda bias, experts, chosen: bias[experts],
    factor: Callable[..., Any] = lambda weights, order: weights.reshape(-1)[order].unsqueeze(-1),
    back: Callable[..., Any] = lambda y, order: y[order.argsort()].view(T, K, H).sum(1),
    choose: Callable[..., Any] = lambda logits: logits.topk(K, -1),
    foreign: Callable[..., Any] = lambda experts: None,
    limit: Callable[..., Any] = lambda experts: experts,
) -> Any:
    """``foreign`` experts' rows are filled with zeros, and their numbers limited, as expert parallelism needs it."""

    scores, chosen = choose(logits.softmax(-1))
    experts, order = chosen.reshape(-1).sort(descending=descending)
    shares = ends(experts, logits)
    mask = foreign(experts)
    experts = limit(experts)
    fill = (lambda y: y) if mask is None else (lambda y: y.masked_fill(mask.unsqueeze(-1), 0.0))
    rows = gather(x, order) if mask is None else gather(x, order).masked_fill_(mask.unsqueeze(-1), 0.0)
    y = act(fill(torch._grouped_mm(rows, gate_up.transpose(-2, -1), offs=shares)))
    y = fill(torch._grouped_mm(y, down.transpose(-2, -1), offs=shares)) + bias_of(bias, experts, chosen.reshape(-1))
    return back(y * factor(scores, order), order)


def _every_token() -> torch.Tensor:
    return torch.arange(T).unsqueeze(1).expand(-1, K).reshape(-1)


def _written_inverse(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(T * K)
    return y[inverse].view(T, K, H).sum(1)


def _nothing(y: torch.Tensor) -> torch.Tensor:
    return torch.zeros(T, H, dtype=y.dtype)


SPELLINGS: dict[str, dict[str, Callable[..., Any]]] = {
    "as it is": {},
    "tokens of all pairs, then sorted": {"gather": lambda x, order: x[_every_token()][order]},
    "numbers of tokens, sorted": {"gather": lambda x, order: x[_every_token()[order]]},
    "repeated tokens, then sorted": {"gather": lambda x, order: x.repeat_interleave(K, 0)[order]},
    "tokens selected by number": {"gather": lambda x, order: x.index_select(0, order // K)},
    "divided and rounded down": {"gather": lambda x, order: x[torch.div(order, K, rounding_mode="floor")]},
    "a written inverse": {"back": _written_inverse},
    "added up by token": {"back": lambda y, order: _nothing(y).index_add_(0, order // K, y)},
    "experts of other devices": {
        "foreign": lambda experts: experts >= E,
        "limit": lambda experts: experts.clamp_(max=E - 1),
    },
    "experts of other devices, no number of which is read": {
        "foreign": lambda experts: experts >= E,
        "limit": lambda experts: (experts.clone(), experts.clamp_(max=E - 1))[0],
    },
    "back, then added up by token": {
        "back": lambda y, order: _nothing(y).index_add(0, _every_token(), y[order.argsort()]),
    },
}


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_other_spellings_are_the_same_block(name: str) -> None:
    fn = functools.partial(sorted_by_expert, **SPELLINGS[name])
    backend, got, expected = watch(fn, *inputs())
    assert [region.declined for region in backend.regions] == [""] and backend.replaced == 1
    close(got, expected, torch.bfloat16)


def _into_a_sum_that_is_returned(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    total = _nothing(y)
    total.index_add_(0, order // K, y)
    return total


def _into_a_view_of_the_sum(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    total = _nothing(y)
    row = total[0]
    total.index_add_(0, order // K, y)
    return row


@pytest.mark.parametrize("back", [_into_a_sum_that_is_returned, _into_a_view_of_the_sum], ids=lambda fn: fn.__name__)
def test_a_sum_that_is_read_through_the_memory_it_was_written_to(back: Callable[..., Any]) -> None:
    backend, got, expected = watch(functools.partial(sorted_by_expert, back=back), *inputs())
    assert backend.replaced == (back is _into_a_sum_that_is_returned)
    close(got, expected, torch.bfloat16)


def test_experts_without_a_gate() -> None:
    def fn(x: torch.Tensor, logits: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, chosen = logits.topk(K, -1)
        experts = chosen.reshape(-1)
        y = F.relu(torch.bmm(x.repeat_interleave(K, 0).unsqueeze(1), up[experts]).squeeze(1))
        y = torch.bmm(y.unsqueeze(1), down[experts].transpose(1, 2)).squeeze(1)
        return (y.view(T, K, H) * weights.unsqueeze(-1)).sum(1)

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator).double() for s in ((T, H), (T, E), (E, H, N), (E, H, N))]
    backend, got, expected = watch(fn, *values)
    (region,) = backend.regions
    assert not region.declined and not region.op.gated and region.op.router == Router("unknown")
    assert (region.op.gate_up_layout, region.op.down_layout) == ("in, out", "out, in")
    close(got, expected, torch.float64)


def _swapped(y: torch.Tensor) -> torch.Tensor:
    up, gate = y.chunk(2, -1)
    return F.silu(gate) * up


def _other_rows(y: torch.Tensor) -> torch.Tensor:
    return _gated(y.reshape(2 * y.shape[0], N)).reshape(-1, N)


def _one_sided(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate.clamp(max=1.0)) * up.clamp(max=1.0)


def _interleaved_up_first(y: torch.Tensor) -> torch.Tensor:
    return F.silu(y[:, 1::2]) * y[:, ::2]


def _every_second_twice(y: torch.Tensor) -> torch.Tensor:
    return F.silu(y[:, ::2]) * y[:, ::2]


def _scaled_offset(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * torch.add(up, 1.0, alpha=2.0)


def _two_sided(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate.clamp(-1.0, 1.0)) * up.clamp(-1.0, 1.0)


def _up_to_less(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate.clamp(max=1.0)) * up.clamp(-2.0, 2.0)


def _into_another_order(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(T * K - 1, -1, -1)
    return y[inverse].view(T, K, H).sum(1)


def _added_onto_ones(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    inverse = torch.ones_like(order).index_put((order,), torch.arange(T * K), accumulate=True) % (T * K)
    return y[inverse].view(T, K, H).sum(1)


def _added_onto_zeros(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    inverse = torch.zeros_like(order).index_put((order,), torch.arange(T * K), accumulate=True)
    return y[inverse].view(T, K, H).sum(1)


def _values_as_numbers(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = scores.topk(K, -1)[0]
    return values, values.long()


def _read_after_a_write(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return gate.mul_(torch.sigmoid(gate)) * up


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "weights applied twice": (
        {"back": lambda y, order: (y * torch.ones(T * K, 1).to(y))[order.argsort()].view(T, K, H).sum(1)},
        "applied twice",
    ),
    "no weights": ({"factor": lambda weights, order: 1.0}, ""),
    "weights of other rows": ({"factor": lambda w, order: w.reshape(-1, 1)}, "the factor is not the weight"),
    "weights by another order": (
        {"factor": lambda w, order: w.reshape(-1)[order.argsort()].unsqueeze(-1)},
        "the factor is not the weight",
    ),
    "the same way again": ({"back": lambda y, order: y[order].view(T, K, H).sum(1)}, "do not go back"),
    "no way back": ({"back": lambda y, order: y.view(T, K, H).sum(1)}, "does not sum over"),
    "sums over tokens": ({"back": lambda y, o: y[o.argsort()].view(K, T, H).sum(0)}, "does not sum over"),
    "adds up by another token": (
        {"back": lambda y, order: _nothing(y).index_add_(0, order // 3, y)},
        "does not sum over",
    ),
    "adds up onto something": (
        {"back": lambda y, order: (_nothing(y) + 1).index_add_(0, order // K, y)},
        "does not sum over",
    ),
    "another number of experts a token": ({"gather": lambda x, order: x[order // 3]}, "gathered by something else"),
    "tokens in the order of pairs": ({"gather": lambda x, order: x.repeat_interleave(K, 0)}, "not sorted by expert"),
    "sorted twice": ({"gather": lambda x, order: x[_every_token()][order][order]}, "gathered by something else"),
    "sorted from the last expert": ({"descending": True}, "gathered by something else"),
    "shares of another choice": (
        {"ends": lambda experts, logits: _counts((-logits).topk(K, -1)[1].reshape(-1).sort()[0])},
        "gathered by something else",
    ),
    "shares counted otherwise": (
        {"ends": lambda experts, logits: torch.histc(experts.float(), E, 0, E).cumsum(0, dtype=torch.int32)},
        "not counted",
    ),
    "bias of other rows": ({"bias_of": lambda bias, experts, chosen: bias[chosen]}, "not the bias"),
    "twice the bias": ({"bias_of": lambda bias, experts, chosen: bias[experts] * 2}, "not the bias"),
    "another activation": ({"act": lambda y: torch.tanh(y[:, :N]) * y[:, N:]}, "the activation is not known"),
    "interleaved, up comes first": ({"act": _interleaved_up_first}, "the activation is not known"),
    "every second column twice": ({"act": _every_second_twice}, "the activation is not known"),
    "an offset that is scaled": ({"act": _scaled_offset}, "the activation is not known"),
    "a gate clamped on both sides": ({"act": _two_sided}, "the activation is not known"),
    "up clamped at another limit": ({"act": _up_to_less}, "the activation is not known"),
    "an inverse of other places": ({"back": _into_another_order}, "do not go back"),
    "an inverse added onto numbers": ({"back": _added_onto_ones}, "do not go back"),
    "an inverse added onto zeros": ({"back": _added_onto_zeros}, "do not go back"),
    "shares counted by comparison": (
        {"ends": lambda e, logits: (e[:, None] == torch.arange(E)).sum(0).cumsum(0, dtype=torch.int32)},
        "not counted",
    ),
    "shares and nothing more": ({"ends": lambda experts, logits: _counts(experts) + 0}, "not counted"),
    "the weights taken for numbers": ({"choose": _values_as_numbers}, "not the choice of a top-k"),
    "sorted instead of chosen": (
        {"choose": lambda scores: scores[:, :K].sort(-1, descending=True)},
        "not the choice of a top-k",
    ),
    "a slice of all, sorted": (
        {"choose": lambda scores: [part[:, :K] for part in scores.sort(-1, descending=True)]},
        "not the choice of a top-k",
    ),
    "up comes first": ({"act": _swapped}, "the activation is not known"),
    "halves of other rows": ({"act": _other_rows}, "not parts of a row"),
    "clamped on one side": ({"act": _one_sided}, "the activation is not known"),
    "read after a write": ({"act": _read_after_a_write}, "read after it was written"),
    "experts of less than all": ({"choose": lambda scores: scores[:, :3].topk(K, -1)}, "not the choice of a top-k"),
    "the last expert of another device": ({"foreign": lambda experts: experts >= E - 1}, "not gathered for each"),
    "other rows without an expert": ({"foreign": lambda experts: experts < 1}, "not gathered for each"),
    "the last expert taken for the one before": ({"limit": lambda e: e.clamp_(max=E - 2)}, "not the bias"),
    "the first expert taken for the next": ({"limit": lambda e: e.clamp(min=1)}, "not the bias"),
    "a value used elsewhere": (
        {"back": lambda y, order: (y[order.argsort()].view(T, K, H).sum(1), y)},
        "used elsewhere",
    ),
    "a sum of activations": ({"act": lambda y: _gated(y) + y[:, :N]}, "the activation is not known"),
    "a rounded activation": ({"act": lambda y: _gated(y).to(torch.float16).to(y.dtype)}, "the activation is not known"),
    "weights cast after they were gathered": (
        {"factor": lambda w, order: w.reshape(-1)[order].unsqueeze(-1).float()},
        "the factor is not the weight",
    ),
}


@pytest.mark.parametrize("name", list(NEAR_MISSES))
def test_what_is_not_quite_a_block_is_left_alone_and_says_why(name: str) -> None:
    twist, reason = NEAR_MISSES[name]
    backend, got, expected = watch(functools.partial(sorted_by_expert, **twist), *inputs())
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    (region,) = backend.regions
    assert backend.replaced == 0 and region.declined and reason in region.declined


def test_gathered_weights_of_other_experts_are_no_block() -> None:
    def fn(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, chosen = logits.topk(K, -1)
        experts = chosen.reshape(-1)
        y = _gated(torch.bmm(gate_up[experts], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1))
        y = torch.bmm(down[experts.sort()[0]], y.unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(T, K, H).sum(1)

    backend, _, _ = watch(fn, *inputs(torch.float32)[:4])
    assert [region.declined.partition(":")[0] for region in backend.regions] == ["a row does not meet its expert"]


@pytest.mark.parametrize("experts", [E, E + 1])
def test_products_that_differ_in_kind_or_in_experts_are_no_block(experts: int) -> None:
    def fn(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, chosen = logits.topk(K, -1)
        numbers, order = chosen.reshape(-1).sort()
        if experts == E:
            y = torch._grouped_mm(x[order // K], gate_up.transpose(-2, -1), offs=_counts(numbers))
        else:
            y = torch.bmm(gate_up[numbers], x[order // K].unsqueeze(-1)).squeeze(-1)
        y = torch.bmm(down[numbers], _gated(y).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1)[order].unsqueeze(-1))[order.argsort()].view(T, K, H).sum(1)

    x, logits, gate_up, _, _ = inputs()
    backend, got, expected = watch(fn, x, logits, gate_up, torch.randn(experts, H, N).bfloat16())
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    reason = "made in different ways" if experts == E else "different numbers of experts"
    assert backend.replaced == 0 and [reason in region.declined for region in backend.regions] == [True]


def test_a_block_in_training_is_left_to_autograd() -> None:
    values = [value.requires_grad_() for value in inputs(torch.float64)[:4]]

    def fn(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, chosen = logits.topk(K, -1)
        experts = chosen.reshape(-1)
        y = _gated(torch.bmm(gate_up[experts], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1))
        y = torch.bmm(down[experts], y.unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(T, K, H).sum(1)

    torch._dynamo.reset()
    backend = Watch()
    torch.compile(fn, backend=backend)(*values).sum().backward()
    assert [region.declined for region in backend.regions] == ["needs gradient"] and values[2].grad is not None
    backend, got, expected = watch(fn, *values)
    assert backend.replaced == 1
    close(got, expected, torch.float64)


# -- the road


def test_where_no_kernel_takes_it_the_report_names_the_block_and_what_runs_it() -> None:
    fn, eager = (blocks("Mixtral", how, torch.float32) for how in ("grouped_mm", "batched_mm"))
    picky = dataclasses.replace(kernel(), supports=lambda region: "is for other experts")
    with registered(Provider("mine", (picky,))):
        run, road = compile_road(fn, measure="off")
        with torch.no_grad():
            close(run(states(torch.float32)), eager(states(torch.float32)), torch.float32)
    found = [region for region in road.regions if region.kind == "moe"]
    assert [(region.kind, region.module, region.kernel) for region in found] == [
        ("moe", f"layers.{i}.experts", "inductor") for i in range(2)
    ]
    assert {region.pattern for region in found} == {"grouped_mm, SwiGLU, top 3 of 5"}


def test_blocks_are_not_looked_for_where_no_kernel_runs_on_the_device() -> None:
    elsewhere = dataclasses.replace(kernel(), devices=("xpu",))
    with registered(Provider("mine", (elsewhere,))):
        run, road = compile_road(blocks("Mixtral", "batched_mm", torch.float32), measure="off")
        with torch.no_grad():
            run(states(torch.float32))
    assert not road.regions


LOCK = """
version: 1
rules:
  - lock: mine.moe
    when: {op: moe}
"""


@pytest.mark.slow
def test_a_kernel_from_outside_competes_qualifies_and_runs_by_a_lock() -> None:
    net = model("GptOss", "grouped_mm").float()
    kernels = (kernel(), kernel("mine.wrong", spoil=1e-3))
    with registered(Provider("mine", kernels)):
        run, road = compile_road(net, kinds=["moe"], measure="auto", measure_budget=60.0, policy=LOCK)
        with torch.no_grad():
            got, expected = run(tokens(1, 9, 0), use_cache=False)[0], net(tokens(1, 9, 0), use_cache=False)[0]
    found = [region for region in road.regions if region.kind == "moe"]
    assert [region.kernel for region in found] == ["mine.moe"] * 2
    for region in found:
        assert {c.kernel for c in region.candidates if c.source != "estimated"} >= {"mine.moe", "inductor"}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_is_wrong_by_a_thousandth_is_rejected() -> None:
    with registered(Provider("mine", (kernel("mine.wrong", spoil=1e-3),))):
        fn = blocks("DeepseekV3", "batched_mm", torch.float32)
        run, road = compile_road(fn, kinds=["moe"], measure="auto", measure_budget=60.0)
        with torch.no_grad():
            run(states(torch.float32))
    assert len(road.regions) == 2 and {region.kernel for region in road.regions} == {"inductor"}
    assert all("wrong result" in region.rejected["mine.wrong"] for region in road.regions)


@pytest.mark.slow
@pytest.mark.parametrize(("outside", "inside"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_block_is_judged_by_the_coarser_dtype_of_tokens_and_experts(
    outside: torch.dtype, inside: torch.dtype
) -> None:
    def fn(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, chosen = logits.topk(K, -1)
        experts = chosen.reshape(-1)
        y = x.repeat_interleave(K, 0).to(inside).unsqueeze(-1)
        y = _gated(torch.bmm(gate_up[experts], y).squeeze(-1))
        y = torch.bmm(down[experts], y.unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(T, K, H).sum(1).to(x.dtype)

    x, logits, gate_up, down, _ = inputs(inside)
    kernels = (kernel(), kernel("mine.wrong", spoil=0.1))
    with registered(Provider("mine", kernels)):
        run, road = compile_road(fn, kinds=["moe"], prefer=["mine.moe"], measure="auto", measure_budget=60.0)
        run(x.to(outside), logits, gate_up, down)
        (region,) = road.regions
        assert region.kernel == "mine.moe"
        (candidate,) = [c for c in region.candidates if c.kernel == "mine.moe"]
        assert candidate.source != "estimated"
        run, road = compile_road(fn, kinds=["moe"], prefer=["mine.wrong"], measure="auto", measure_budget=60.0)
        run(x.to(outside), logits, gate_up, down)
    assert "wrong result" in road.regions[0].rejected["mine.wrong"]


def test_a_block_and_the_unit_inside_it_run_by_one_kernel_or_apart() -> None:
    glu = Kernel(
        "other.glu", "glu", "1", lambda region: None, lambda e, r: e.call(r.output, meaning(r), *r.inputs), summary=""
    )
    fn = blocks("Mixtral", "batched_mm", torch.float32)
    for preferred, kinds in (("mine.moe", {"moe"}), ("other.glu", {"glu"})):
        with registered(Provider("mine", (kernel(),))), registered(Provider("other", (glu,))):
            run, road = compile_road(fn, kinds=["glu", "moe"], measure="off", prefer=[preferred])
            with torch.no_grad():
                close(run(states(torch.float32)), fn(states(torch.float32)), torch.float32)
        assert {region.kind for region in road.regions if region.kernel == preferred} == kinds
        assert sum(region.kernel == preferred for region in road.regions) == 2


def test_coverage_counts_blocks() -> None:
    counted: list[dict[str, int]] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counted.append(_look(module).regions)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(blocks("Qwen3Moe", "grouped_mm", torch.float32), backend=backend)(states(torch.float32))
    assert [regions["moe"] for regions in counted] == [2]
