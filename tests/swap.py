"""Test helper: a Dynamo backend that replaces every pointwise region by one kernel, or by what it means; tiny models.

The default kernels call the semantic functions, so that whatever a pattern reads wrongly shows in the result's bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import transformers

from lz_compile.aliasing import Aliases
from lz_compile.lowering import pointwise
from lz_compile.lowering.emit import Emitter
from lz_compile.normalize import module_path, normalize
from lz_compile.patterns.glu import find_glus
from lz_compile.patterns.norms import find_rms_norms
from lz_compile.patterns.rope import find_ropes
from lz_compile.plan import Choice, Plan
from lz_compile.pointwise import Glu, RmsNorm
from lz_compile.region import Kernel, Region
from lz_compile.rewrite import rewrite
from road import cast_parameters
from tiny import _DECODER, _GROUPED, Architecture, tokens

FINDERS = (find_rms_norms, find_glus, find_ropes)


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    op = region.op
    if isinstance(op, RmsNorm):
        return emitter.call(region.output, pointwise.rms_norm, op.x, op.weight, op.eps, op.cast, op.offset)
    if isinstance(op, Glu):
        return emitter.call(region.output, pointwise.glu, op.gate, op.up, op.activation)
    return emitter.call(region.output, pointwise.rope, op.x, op.cos, op.sin)


MEANING = [Kernel(f"test.{kind}", kind, "1", lambda region: None, _emit) for kind in ("rms_norm", "glu", "rope")]


class Swap:
    """``regions`` holds what was found, in order of the finders, ``replaced`` how many were replaced, ``verdicts``
    what a kernel's ``supports`` said."""

    def __init__(self, kernels: Sequence[Kernel] = MEANING) -> None:
        self.kernels = {kernel.kind: kernel for kernel in kernels}
        self.regions: list[Region] = []
        self.verdicts: list[str | None] = []
        self.modules: list[fx.GraphModule] = []
        self.replaced = 0

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        normal = normalize(module)
        aliases = Aliases(normal.graph)
        found = [region for find in FINDERS for region in find(normal.graph, aliases, module_path)]
        self.regions += found
        choices = []
        for region in found:
            kernel = self.kernels.get(region.kind)
            if kernel is None or region.declined:
                continue
            self.verdicts.append(kernel.supports(region))
            if self.verdicts[-1] is None:
                choices.append(Choice(region, kernel, ""))
        self.replaced += rewrite(normal, aliases, Plan(choices, ""), Emitter)
        normal.graph.lint()
        normal.recompile()
        self.modules.append(normal)
        return normal.forward

    def of(self, kind: str) -> list[Region]:
        return [region for region in self.regions if region.kind == kind]

    def declined(self) -> list[str]:
        return [region.declined for region in self.regions if region.declined]

    def targets(self) -> list[Any]:
        return [node.target for module in self.modules for node in module.graph.nodes if node.op == "call_function"]


def swap(fn: Any, kernels: Sequence[Kernel] = MEANING, dynamic: bool | None = False) -> tuple[Any, Swap]:
    """``fn`` compiled with nothing but the kernels, and the backend that shows what happened."""
    torch._dynamo.reset()
    backend = Swap(kernels)
    return torch.compile(fn, backend=backend, dynamic=dynamic), backend


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


# -- models


@dataclass(frozen=True)
class Case:
    """How many regions of each kind a model of two layers has."""

    architecture: Architecture
    norms: int
    glus: int
    ropes: int
    attention: str = "sdpa"
    call: dict[str, Any] = field(default_factory=lambda: {"use_cache": False})


def _case(name: str, prefix: str, settings: dict[str, Any], norms: int, glus: int, ropes: int, **more: Any) -> Case:
    model = more.pop("model", f"{prefix}ForCausalLM")
    config = more.pop("config", f"{prefix}Config")
    return Case(Architecture(name, config, model, settings, "decoder"), norms, glus, ropes, **more)


_HEADS = {**_GROUPED, "head_dim": 16}
_T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
_DEEPSEEK = {
    **_DECODER,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_GPT_OSS = {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}
_LLAMA4 = {**_HEADS, "num_local_experts": 2, "intermediate_size_mlp": 96}

CASES = {
    case.architecture.name: case
    for case in (
        _case("llama", "Llama", _GROUPED, 5, 2, 4),
        _case("qwen3", "Qwen3", _HEADS, 9, 2, 4),
        _case("mistral", "Mistral", {**_GROUPED, "sliding_window": 8}, 5, 2, 4),
        _case("phi3", "Phi3", _GROUPED, 5, 2, 4),
        _case("gemma2", "Gemma2", _HEADS, 9, 2, 4, attention="eager"),
        _case("gemma3", "Gemma3", {**_HEADS, "sliding_window": 8}, 13, 2, 4, config="Gemma3TextConfig"),
        _case("olmo2", "Olmo2", _GROUPED, 9, 2, 4),
        _case("t5", "T5", {**_T5}, 5, 0, 0, model="T5EncoderModel", call={}),
        _case("gpt-oss", "GptOss", _GPT_OSS, 5, 0, 0, attention="eager"),
        _case("gpt-neox", "GPTNeoX", _DECODER, 0, 0, 0),
        _case("deepseek", "DeepseekV3", _DEEPSEEK, 9, 2, 0),
        _case("llama4", "Llama4", _LLAMA4, 9, 4, 0, config="Llama4TextConfig"),
    )
}


@functools.cache
def run(name: str, dtype: torch.dtype) -> tuple[Swap, torch.Tensor, torch.Tensor]:
    """A model with all its regions replaced by what they mean: the backend, its result, and eager's."""
    case = CASES[name]
    transformers.logging.set_verbosity_error()
    model = case.architecture.build(case.attention)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # weights of norms are all ones, or all zeros, before training
        if parameter.dim() == 1:
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=generator)
    model = cast_parameters(model, dtype)
    compiled, backend = swap(model)
    ids = tokens(2, 8, 0)
    with torch.no_grad():
        got, expected = compiled(input_ids=ids, **case.call)[0], model(input_ids=ids, **case.call)[0]
    return backend, got, expected
