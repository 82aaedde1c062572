"""Measures any Hugging Face model shape over `torch.compile` backends.

    python -m benchmarks.models --preset llama3-8b --layers 8 --phase decode --batch 16 --cache 16384 --position 1000 \
        --dtype bfloat16 --backends eager,inductor,inductor:reduce-overhead,layerzero,layerzero:reduce-overhead
    python -m benchmarks.models --config Qwen3Config --set hidden_size=1024 --set num_hidden_layers=4 --phase forward
    python -m benchmarks.models --matrix cpu --json cpu.jsonl --plot cpu.png

A *workload* is a model shape and one call of it; a *row* is a workload on a backend.  For every row:

==============  =====================================================================================================
median          of repeated calls; the backends of a workload take turns in rounds, so that drift hits all alike
vs Inductor     median of the best Inductor row of the workload, over this one (above 1 is faster)
error           RMS(output - reference) / RMS(reference); the reference is the same model in float32, eager.  Compare
                with the eager row's own error
peak memory     of one warm call.  CUDA: what the process holds from the device, CUDA-graph pools included, other
                backends' pools excluded.  CPU: weights and cache, plus how far the process grows during the call (what
                a backend keeps between calls does not show there)
first call      compilation included, with empty compile caches
roofline        time to move the bytes that must move (weights once, valid keys and values once) at the copy bandwidth
                measured in this run, over the median; for decode
kernels         what ran the attention regions, by lz-compile's report (`--report` prints it)
==============  =====================================================================================================

Phases: `forward` (one call without cache), `prefill` (the prompt into an empty StaticCache), `decode` (one token with
`--position` tokens in a StaticCache of `--cache`).  The cache is filled with random keys and values and put back to its
position before every call, outside the timed region.

Padding: `SIDE:ROWS[:SHARE]`, such as `left:0.5`: the last ROWS of the batch (a share of it) have SHARE (default 0.5) of
their tokens padded, on that side.  `SIDE:ragged`: the lengths of the rows are spread evenly, half of all on average.

Masks: `graph` calls the model as a user does, and it builds the mask while it runs; `input` builds the mask outside,
with `create_masks_for_generate`, as `generate` does for the decode step that it compiles.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import ctypes
import fnmatch
import gc
import json
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch._inductor.utils import fresh_inductor_cache
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.masking_utils import create_masks_for_generate

CPU_BACKENDS = ("eager", "inductor", "layerzero")
PREFILL_BACKENDS = (
    "eager",
    "inductor",
    "inductor:reduce-overhead",
    "layerzero",
    "layerzero:reduce-overhead",
)
DECODE_BACKENDS = ("eager", "inductor", "inductor:reduce-overhead", "layerzero", "layerzero:reduce-overhead")

console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)


@dataclass(frozen=True)
class Workload:
    """One model shape and one call of it; `benchmarks.models --help` explains the fields."""

    name: str
    config: str
    overrides: dict[str, Any] = field(default_factory=dict)
    model: str = "auto"
    layers: int | None = None
    phase: str = "forward"
    batch: int = 1
    sequence: int = 128
    cache: int = 4096
    position: int = 0
    padding: str = "none"
    mask: str = "graph"
    dtype: str = "float32"
    attention: str = "sdpa"
    backends: tuple[str, ...] = CPU_BACKENDS
    reference: bool = True

    @property
    def queries(self) -> int:
        return 1 if self.phase == "decode" else self.sequence

    def describe(self) -> str:
        shape = f"{self.phase} B={self.batch}"
        if self.phase == "decode":
            shape += f" cache={self.cache}@{self.position}"
        else:
            shape += f" S={self.sequence}" + (f" cache={self.cache}" if self.phase == "prefill" else "")
        layers = f" {self.layers}L" if self.layers else ""
        padding = f" {self.padding}" if self.padding != "none" else ""
        mask = " mask as input" if self.mask == "input" else ""
        return f"{self.name}{layers} {self.dtype} {shape}{padding}{mask}"


# --- presets and matrices -------------------------------------------------------------------------------------------

_LLAMA_ROPE = {"rope_type": "default", "rope_theta": 500000.0}

PRESETS: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "config": "LlamaConfig",
        "overrides": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA_ROPE,
        },
    },
    "mistral-7b": {
        "config": "MistralConfig",
        "overrides": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    },
    "qwen3-8b": {
        "config": "Qwen3Config",
        "overrides": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    },
    "phi3-mini": {"config": "Phi3Config", "overrides": {"pad_token_id": 0}},
    "pythia-6.9b": {
        "config": "GPTNeoXConfig",
        "overrides": {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "vocab_size": 50432},
    },
    "cpu-llama": {
        "config": "LlamaConfig",
        "overrides": {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "max_position_embeddings": 8192,
        },
    },
    "cpu-mistral": {
        "config": "MistralConfig",
        "overrides": {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "sliding_window": 256,
        },
    },
    "gemma2-9b": {
        "config": "Gemma2Config",
        "attention": "eager",  # the only one that it has: it caps its scores
        "overrides": {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
        },
    },
    "gpt-oss-20b": {
        "config": "GptOssConfig",
        "attention": "eager",  # likewise: sinks
        "overrides": {"num_hidden_layers": 24, "num_local_experts": 32},
    },
    # The attention of DeepSeek-V3 between dense MLPs: what is compared is attention, not experts.
    "deepseek-v3-dense": {
        "config": "DeepseekV3Config",
        "overrides": {"num_hidden_layers": 4, "first_k_dense_replace": 61, "max_position_embeddings": 32768},
    },
    "bert-base": {"config": "BertConfig", "model": "BertModel"},
    "bert-large": {
        "config": "BertConfig",
        "model": "BertModel",
        "overrides": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    },
    "vit-base": {"config": "ViTConfig", "model": "ViTModel", "sequence": 197},
    "whisper-tiny": {"config": "WhisperConfig", "model": "WhisperModel"},
}


def from_preset(preset: str, **changes: Any) -> Workload:
    return Workload(name=preset, **{**PRESETS[preset], **changes})


def matrix(name: str) -> list[Workload]:
    if name == "cpu":
        decode = from_preset("cpu-llama", phase="decode", batch=4, cache=4096, position=300)
        return [
            decode,
            replace(decode, dtype="bfloat16"),
            replace(decode, padding="left:0.5"),
            replace(decode, mask="input"),
            replace(decode, mask="input", padding="left:0.5", dtype="bfloat16"),
            replace(decode, batch=1),
            replace(decode, cache=1024, position=1000),
            replace(decode, cache=1024, position=1000, dtype="bfloat16"),
            from_preset("cpu-mistral", phase="decode", batch=4, cache=4096, position=200),
            from_preset("cpu-llama", phase="forward", batch=1, sequence=512),
            from_preset("cpu-llama", phase="forward", batch=4, sequence=256, padding="right:0.75"),
            from_preset("cpu-llama", phase="prefill", batch=4, sequence=256, cache=1024, padding="left:0.75"),
            from_preset("bert-base", layers=6, phase="forward", batch=4, sequence=128, padding="right:0.75"),
            from_preset("vit-base", layers=6, phase="forward", batch=4),
        ]
    if name == "h200":
        llama = from_preset("llama3-8b", layers=8, dtype="bfloat16", position=1000, backends=DECODE_BACKENDS)
        decode = replace(llama, phase="decode")
        prefill = replace(llama, phase="forward", backends=PREFILL_BACKENDS, position=0)
        graph_masks = [
            replace(decode, batch=16, cache=16384),
            replace(decode, batch=16, cache=4096, padding="left:0.5"),
            replace(decode, batch=1, cache=4096),
        ]
        return [
            *graph_masks,
            *(replace(row, mask="input") for row in graph_masks),
            replace(prefill, batch=1, sequence=8192),
            from_preset(
                "mistral-7b", layers=8, dtype="bfloat16", phase="forward", sequence=16384, backends=PREFILL_BACKENDS
            ),
            replace(prefill, batch=8, sequence=1024, padding="right:0.5"),
        ]
    if name == "h200-architectures":
        half: dict[str, Any] = {"dtype": "bfloat16"}
        step: dict[str, Any] = {"phase": "decode", "batch": 8, "cache": 8192, "position": 1000, **half}
        step["backends"] = DECODE_BACKENDS
        forward: dict[str, Any] = {"phase": "forward", "backends": PREFILL_BACKENDS, **half}
        oss = from_preset("gpt-oss-20b", layers=4, **step)
        return [
            from_preset("gemma2-9b", layers=8, **step),
            from_preset("gemma2-9b", layers=8, sequence=4096, **forward),
            from_preset("bert-large", batch=32, sequence=512, padding="right:ragged", **forward),
            replace(oss, overrides={**oss.overrides, "num_local_experts": 8}),
            from_preset("deepseek-v3-dense", **step),
        ]
    raise SystemExit(f"unknown matrix {name!r}; known: cpu, h200, h200-architectures")


# --- the model and its call -----------------------------------------------------------------------------------------


def build_model(work: Workload, device: torch.device) -> PreTrainedModel:
    """The model of a workload with random weights, made on the device in its dtype; RoPE tables stay float32."""
    overrides = dict(work.overrides)
    if work.layers:
        overrides["num_hidden_layers"] = work.layers
    config = getattr(transformers, work.config)(**overrides)
    options = {"dtype": getattr(torch, work.dtype), "attn_implementation": work.attention}
    torch.manual_seed(0)
    with torch.device(device):
        if work.model == "auto":
            model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = getattr(transformers, work.model)._from_config(config, **options)
    return model.eval()


def padding_mask(work: Workload, tokens: int, device: torch.device) -> torch.Tensor | None:
    """1 for real tokens, 0 for padding, int64 [batch, tokens]; None without padding."""
    if work.padding == "none":
        return None
    side, rows, *share = work.padding.split(":")
    if side not in ("left", "right") or (side == "right" and work.phase == "decode"):
        raise ValueError(
            f"padding {work.padding!r} in phase {work.phase!r}: SIDE:ROWS[:SHARE] or SIDE:ragged, in decode on the left"
        )
    if rows == "ragged":
        lengths = ((torch.arange(work.batch) + 0.5) / work.batch * tokens).ceil().long()
    else:
        lengths = torch.full((work.batch,), tokens)
        lengths[work.batch - round(float(rows) * work.batch) :] -= int(float(share[0] if share else 0.5) * tokens)
    positions = torch.arange(tokens)
    valid = positions < lengths[:, None] if side == "right" else positions >= tokens - lengths[:, None]
    return valid.long().to(device)


class Call:
    """One model with one set of inputs.  `rewind` puts the cache back, calling `model(**inputs)` moves it on."""

    def __init__(self, work: Workload, model: PreTrainedModel) -> None:
        self.model, self.work = model, work
        device = model.device
        self.cache: StaticCache | None = None
        self.full_windows: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        self.position = work.position if work.phase == "decode" else 0
        tokens = self.position + work.queries
        self.valid = padding_mask(work, tokens, device)
        self.inputs: dict[str, Any] = {}
        generator = torch.Generator(device).manual_seed(1)

        if model.main_input_name == "pixel_values":
            size, channels = model.config.image_size, model.config.num_channels
            self.inputs["pixel_values"] = torch.randn(
                work.batch, channels, size, size, device=device, dtype=model.dtype, generator=generator
            )
            return
        if model.main_input_name == "input_features":
            frames = 2 * model.config.max_source_positions
            self.inputs["input_features"] = torch.randn(
                work.batch, model.config.num_mel_bins, frames, device=device, dtype=model.dtype, generator=generator
            )
        ids = torch.randint(
            0, model.config.get_text_config().vocab_size, (work.batch, work.queries), device=device, generator=generator
        )
        self.inputs["decoder_input_ids" if "input_features" in self.inputs else "input_ids"] = ids
        if self.valid is not None:
            self.inputs["attention_mask"] = self.valid
        if model.can_generate() and not model.config.is_encoder_decoder:
            self.inputs["logits_to_keep"] = 1  # as generate() asks for them
            if work.padding.startswith("left"):
                assert self.valid is not None
                positions = (self.valid.cumsum(-1) - 1).clamp(min=0)
                self.inputs["position_ids"] = positions[:, -work.queries :].contiguous()
        if work.phase == "forward":
            if model.can_generate():
                self.inputs["use_cache"] = False
            return
        self.cache = self._filled_cache(generator)
        self.inputs["past_key_values"] = self.cache
        if work.mask == "input":
            self._make_mask_an_input()

    def _filled_cache(self, generator: torch.Generator) -> StaticCache:
        cache = StaticCache(config=self.model.config, max_cache_len=self.work.cache)
        with torch.no_grad():  # one eager token allocates the layers at the addresses that they keep
            self.model(self.inputs["input_ids"][:, :1], past_key_values=cache)
        for layer in cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
            if layer.max_cache_len > self.position:  # what was not written yet is zero in a fresh cache
                layer.keys[:, :, self.position :] = 0
                layer.values[:, :, self.position :] = 0
            if hasattr(layer, "cumulative_length_int") and layer.max_cache_len <= self.position:
                self.full_windows.append((layer, layer.keys.clone(), layer.values.clone()))
        self.cache = cache
        self.rewind()
        return cache

    def _make_mask_an_input(self) -> None:
        work, ids = self.work, self.inputs["input_ids"]
        valid = self.valid
        if valid is None:
            valid = torch.ones(work.batch, self.position + work.queries, dtype=torch.int64, device=ids.device)
        positions = (valid.cumsum(-1) - 1).clamp(min=0)[:, -work.queries :].contiguous()
        build = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)
        masks = build(
            config=self.model.config,
            inputs_embeds=torch.empty((*ids.shape, 0), dtype=self.model.dtype, device=ids.device),
            attention_mask=valid,
            past_key_values=self.cache,
            position_ids=positions,
        )
        if isinstance(masks, dict):
            masks = {key: value if value is None else value.contiguous() for key, value in masks.items()}
        elif masks is not None:
            masks = masks.contiguous()
        self.inputs |= {"attention_mask": masks, "position_ids": positions}

    def rewind(self) -> None:
        """Puts the cache back to its position, in place: its addresses are the CUDA graphs'."""
        if self.cache is None:
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.position)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.position
        for layer, keys, values in self.full_windows:  # a full sliding window moves on as a whole
            layer.keys.copy_(keys)
            layer.values.copy_(values)

    def output(self, function: Callable[..., Any]) -> torch.Tensor:
        """Logits or last hidden state of the real tokens, in float32 on the CPU."""
        self.rewind()
        with torch.no_grad():
            result = function(**self.inputs)
        tensor = result.logits if getattr(result, "logits", None) is not None else result.last_hidden_state
        tensor = tensor.float().cpu()
        if self.valid is not None and tensor.shape[:2] == self.valid.shape:
            tensor = tensor[self.valid.bool().cpu()]
        return tensor

    def in_float32(self) -> Call:
        """The same call on a float32 copy of the model (casting there and back would round the RoPE tables)."""
        other = copy.copy(self)
        with torch.no_grad():
            other.model = copy.deepcopy(self.model).float()
        other.inputs = {key: _to_float(value) for key, value in self.inputs.items()}
        if self.cache is not None:
            other.cache = copy.deepcopy(self.cache)
            for layer in other.cache.layers:
                layer.keys, layer.values = layer.keys.float(), layer.values.float()
            layers = dict(zip(self.cache.layers, other.cache.layers))
            other.full_windows = [
                (layers[layer], keys.float(), values.float()) for layer, keys, values in self.full_windows
            ]
            other.inputs["past_key_values"] = other.cache
        return other

    def static_bytes(self) -> int:
        """Weights, buffers and cache."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.cache is not None:
            tensors += [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def decode_bytes(self) -> int | None:
        """What one decode step must read: the weights once (but the embedding), the valid keys and values once."""
        if self.cache is None or self.work.phase != "decode":
            return None
        embedding = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings()
        tied = head is not None and head.weight is embedding
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters() if tied or p is not embedding)
        rows = self.valid.sum(1).tolist() if self.valid is not None else [self.position + 1] * self.work.batch
        keys_and_values = 0
        for layer in self.cache.layers:
            per_token = sum(t.shape[1] * t.shape[3] * t.element_size() for t in (layer.keys, layer.values))
            keys_and_values += per_token * sum(min(length, layer.max_cache_len) for length in rows)
        return weights + keys_and_values


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What one backend did on one workload; times in seconds, memory in bytes."""

    backend: str
    median: float | None = None
    fastest: float | None = None
    samples: int = 0
    versus_inductor: float | None = None
    error: float | None = None
    peak_memory: int | None = None
    first_call: float | None = None
    roofline: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    report: str = ""
    failure: str | None = None


def measure(work: Workload, device: torch.device, bandwidth: float, seconds: float, rounds: int) -> list[Row]:
    """All rows of a workload.  A backend that fails has the failure in its row and nothing else."""
    rows = [Row(backend) for backend in work.backends]
    try:
        call = Call(work, build_model(work, device))
        expected = _reference(call) if work.reference else None
    except Exception as error:
        for row in rows:
            row.failure = _first_line(error)
        traceback.print_exc()
        return rows

    torch._dynamo.reset()
    # All backends of a workload stay compiled, side by side on one code object, so that they can take turns.
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 1024}
    with torch._dynamo.config.patch(**limits), torch.no_grad():
        functions: dict[str, Callable[..., Any]] = {}
        for row in rows:
            with console.status(f"{row.backend}: the first call"):
                try:
                    functions[row.backend] = _prepare(call, row, expected, device)
                except Exception as error:
                    row.failure = _first_line(error)
                    traceback.print_exc()
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(rounds):
            for row in rows:
                if row.backend not in functions or row.failure:
                    continue
                with console.status(f"{row.backend}: round {turn + 1} of {rounds}"):
                    try:
                        calls = 3 if turn == 0 else _calls(seconds / rounds, samples[row.backend])
                        samples[row.backend] += _time(call, functions[row.backend], calls, device)
                    except Exception as error:
                        row.failure = _first_line(error)
                        traceback.print_exc()

    for row in rows:
        if row.failure is None:
            times = samples[row.backend]
            row.median, row.fastest, row.samples = statistics.median(times), min(times), len(times)
            if (must_move := call.decode_bytes()) is not None:
                row.roofline = must_move / bandwidth / row.median
    best = min((r.median for r in rows if r.median and r.backend.split(":")[0] == "inductor"), default=None)
    for row in rows:
        if best and row.median:
            row.versus_inductor = best / row.median
    functions.clear()
    torch._dynamo.reset()
    _collect()
    return rows


def _reference(call: Call) -> torch.Tensor:
    exact = call.in_float32()
    return exact.output(exact.model)


def _prepare(call: Call, row: Row, expected: torch.Tensor | None, device: torch.device) -> Callable[..., Any]:
    """Compiles with empty caches, and fills the row's fields that need no clock but the first call's."""
    backend, _, mode = row.backend.partition(":")
    _own_graph_pool(device)
    _collect()
    reserved = torch.cuda.memory_reserved() if device.type == "cuda" else 0
    reports = _report_count()
    function: Callable[..., Any] = call.model
    if backend != "eager":
        function = torch.compile(call.model, backend=backend, mode=mode or None, dynamic=False)
    with fresh_inductor_cache():
        call.rewind()
        start = time.perf_counter()
        function(**call.inputs)
        _synchronize(device)
        row.first_call = time.perf_counter() - start
        for _ in range(3):  # CUDA graphs: warm up, record, replay
            call.rewind()
            torch.compiler.cudagraph_mark_step_begin()
            function(**call.inputs)
        _synchronize(device)
    if expected is not None:
        output = call.output(function)
        row.error = float((output - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        del output
    row.peak_memory = _peak_memory(call, function, device, reserved)
    ours = _reports_since(reports)
    row.kernels = dict(Counter(region.kernel for report in ours for region in report.regions))
    row.report = "\n".join(map(str, ours))
    return function


def _own_graph_pool(device: torch.device) -> None:
    """The next backend's CUDA graphs get a memory pool of their own, so that its size can be told from the others'.

    Inductor keeps one tree of graphs and one pool a device; compiled functions hold on to the tree they began with.
    """
    if device.type == "cuda":
        from torch._inductor import cudagraph_trees

        cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_containers").clear()


def _time(call: Call, function: Callable[..., Any], calls: int, device: torch.device) -> list[float]:
    """Seconds of each call.  On a GPU the calls queue up back to back, as in a decode loop, between pairs of events."""
    if device.type == "cpu":
        times = []
        for _ in range(calls):
            call.rewind()
            start = time.perf_counter()
            function(**call.inputs)
            times.append(time.perf_counter() - start)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start_event, stop_event in events:
        call.rewind()
        torch.compiler.cudagraph_mark_step_begin()
        start_event.record()
        function(**call.inputs)
        stop_event.record()
    _synchronize(device)
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def _calls(budget: float, samples: list[float]) -> int:
    return max(2, min(50, int(budget / statistics.median(samples))))


def _peak_memory(call: Call, function: Callable[..., Any], device: torch.device, reserved_before: int) -> int | None:
    """Peak of one warm call, in bytes; `benchmarks.models` says how each kind of device counts."""
    _collect()
    call.rewind()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.compiler.cudagraph_mark_step_begin()
        function(**call.inputs)
        torch.cuda.synchronize()
        # Private pools of CUDA graphs are reserved but not always allocated; other backends' pools were there before.
        return call.static_bytes() + torch.cuda.max_memory_reserved() - reserved_before
    growth = []
    for _ in range(3):
        _collect()
        call.rewind()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (VmHWM)
        except OSError:
            return None
        before = _resident("VmRSS")
        function(**call.inputs)
        growth.append(max(0, _resident("VmHWM") - before))
    return call.static_bytes() + int(statistics.median(growth))


def _resident(field_name: str) -> int:
    match = re.search(rf"{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, f"no {field_name} in /proc/self/status"
    return 1024 * int(match[1])


def _collect() -> None:
    """Gives back what nobody holds, to the device and to the operating system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy: the median of 20."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(23):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(times[3:])


def _report_count() -> int:
    if "lz_compile" not in sys.modules:
        return 0
    return len(sys.modules["lz_compile"].reports())


def _reports_since(count: int) -> list[Any]:
    """The reports of lz-compile since `count`."""
    if "lz_compile" not in sys.modules:
        return []
    return list(sys.modules["lz_compile"].reports()[count:])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


# --- output ---------------------------------------------------------------------------------------------------------


def print_rows(work: Workload, rows: list[Row]) -> None:
    table = Table(title=work.describe(), title_justify="left", title_style="bold")
    table.add_column("backend", no_wrap=True)
    for name in ("median ms", "vs Inductor", "error", "peak MiB", "first call s", "roofline"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kernels", overflow="fold")
    for row in rows:
        if row.failure:
            table.add_row(row.backend, "failed", *[""] * 5, row.failure)
            continue
        table.add_row(
            row.backend,
            _format(row.median and row.median * 1e3, ".3f"),
            _format(row.versus_inductor, ".2f", "x"),
            _format(row.error, ".1e"),
            _format(row.peak_memory and row.peak_memory / 2**20, ",.0f"),
            _format(row.first_call, ".1f"),
            _format(row.roofline and 100 * row.roofline, ".0f", "%"),
            ", ".join(f"{kernel} x{count}" for kernel, count in row.kernels.items()),
        )
    console.print(table)


def _format(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def environment(device: torch.device, bandwidth: float) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bandwidth": bandwidth,
    }


def plot(records: list[dict[str, Any]], path: str) -> None:
    """Speed against the best Inductor row, one group of bars a workload."""
    try:
        import matplotlib
    except ImportError:
        console.print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(record["label"] for record in records))
    backends = [b for b in dict.fromkeys(record["backend"] for record in records) if b != "eager"]
    ratios = {(record["label"], record["backend"]): record["versus_inductor"] or 0.0 for record in records}
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.24 * len(labels) * (len(backends) + 1)), layout="constrained")
    height = 0.8 / max(len(backends), 1)
    for i, backend in enumerate(backends):
        values = [ratios.get((label, backend), 0.0) for label in labels]
        bars = axes.barh([y + i * height for y in range(len(labels))], values, height, label=backend)
        axes.bar_label(bars, [f"{value:.2f}x" if value else "" for value in values], padding=2, fontsize=7)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.1)
    axes.set_xlabel("speed against the best Inductor row (higher is better)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    console.print(f"plot: {path}")


# --- command line ---------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--matrix", choices=["cpu", "h200", "h200-architectures"], help="a list of workloads")
    what.add_argument("--preset", choices=sorted(PRESETS))
    what.add_argument("--config", help="a configuration class of transformers, such as LlamaConfig")
    what.add_argument(
        "--model", help="a model class of transformers; default: the configuration's causal language model"
    )
    what.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the configuration")
    what.add_argument("--layers", type=int)
    what.add_argument("--phase", choices=["forward", "prefill", "decode"])
    what.add_argument("--batch", type=int)
    what.add_argument("--sequence", type=int, help="tokens of forward and prefill")
    what.add_argument("--cache", type=int, help="length of the static cache")
    what.add_argument("--position", type=int, help="tokens in the cache before a decode step")
    what.add_argument("--padding", help="none, left:ROWS[:SHARE] or right:ROWS[:SHARE]")
    what.add_argument("--mask", choices=["graph", "input"])
    what.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    what.add_argument("--attn", dest="attention", help="attn_implementation: sdpa, eager, flex_attention")
    what.add_argument("--backends", help="comma-separated BACKEND or BACKEND:MODE")
    what.add_argument("--workload", help=argparse.SUPPRESS)
    how = parser.add_argument_group("how")
    how.add_argument("--rows", default="*", metavar="GLOB", help="of a matrix, only workloads whose title matches")
    how.add_argument("--list", action="store_true", help="print the titles of the workloads and stop")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--seconds", type=float, default=2.0, help="time to measure each row for")
    how.add_argument("--rounds", type=int, default=5, help="turns that the backends take")
    how.add_argument("--no-error", action="store_true", help="skip the float32 reference")
    how.add_argument("--isolate", action="store_true", help="each workload in a process of its own")
    how.add_argument("--report", action="store_true", help="print what lz-compile did, for each of its rows")
    how.add_argument("--json", metavar="FILE", help="append one JSON line a row")
    how.add_argument("--plot", metavar="FILE", help="draw a PNG")
    return parser.parse_args()


def workloads(args: argparse.Namespace) -> list[Workload]:
    if args.workload:
        fields = json.loads(args.workload)
        return [Workload(**{**fields, "backends": tuple(fields["backends"])})]
    if args.matrix:
        works = matrix(args.matrix)
    elif args.preset:
        works = [from_preset(args.preset)]
    elif args.config:
        works = [Workload(name=args.config.removesuffix("Config"), config=args.config)]
    else:
        raise SystemExit("say what to measure: --matrix, --preset or --config (see --help)")
    changes: dict[str, Any] = {}
    for name in ("model", "layers", "phase", "batch", "sequence", "cache", "position", "padding", "mask", "dtype"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if args.attention:
        changes["attention"] = args.attention
    if args.backends:
        changes["backends"] = tuple(args.backends.split(","))
    if args.no_error:
        changes["reference"] = False
    overrides = dict(_assignment(text) for text in args.set)
    works = [replace(work, **changes, overrides={**work.overrides, **overrides}) for work in works]
    return [work for work in works if fnmatch.fnmatch(work.describe(), args.rows)]


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"--set takes NAME=VALUE, not {text!r}")
    with contextlib.suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(value)
    return name, value


def measured(args: argparse.Namespace, works: list[Workload]) -> Iterator[tuple[Workload, list[Row], dict[str, Any]]]:
    """Each workload with its rows and the environment they were measured in."""
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device)
    console.print(f"{environment(device, bandwidth)['device']}: copies at {bandwidth / 1e9:,.0f} GB/s")
    for work in works:
        console.print(f"\n{work.describe()}")
        rows = measure(work, device, bandwidth, args.seconds, args.rounds)
        print_rows(work, rows)
        for row in rows:
            if args.report and row.report:
                console.print(f"{row.backend}\n{row.report}", markup=False)
        yield work, rows, environment(device, bandwidth)


def run_isolated(args: argparse.Namespace, works: list[Workload]) -> list[dict[str, Any]]:
    """Each workload in a child process, whose JSON lines are collected; a crash there costs that workload alone."""
    path = Path(args.json or "build/isolated.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = len(path.read_text().splitlines()) if path.exists() else 0
    for work in works:
        command = [
            sys.executable,
            "-m",
            "benchmarks.models",
            "--workload",
            json.dumps(asdict(work)),
            "--json",
            str(path),
        ]
        command += ["--device", args.device, "--seconds", str(args.seconds), "--rounds", str(args.rounds)]
        status = subprocess.run(command).returncode
        if status:
            console.print(f"[red]exit status {status}[/]: {work.describe()}")
    return [json.loads(line) for line in path.read_text().splitlines()[before:]]


def main() -> None:
    args = parse_arguments()
    works = workloads(args)
    if args.list:
        for work in works:
            console.print(work.describe())
        return
    if args.isolate:
        records = run_isolated(args, works)
    else:
        records = []
        for work, rows, machine in measured(args, works):
            new = [{"label": work.describe(), **asdict(row), "workload": asdict(work), **machine} for row in rows]
            records += new
            if args.json:
                with open(args.json, "a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in new)
    if args.plot and records:
        plot(records, args.plot)


if __name__ == "__main__":
    main()
