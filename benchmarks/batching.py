"""Continuous batching: ``model.generate_batch`` with the model compiled by each backend.

    python -m benchmarks.batching                       # Llama-3-8B shapes, 8 layers, on a GPU
    python -m benchmarks.batching --prompts 4 --new 8   # smaller

Prompts of different length are decoded together by transformers' own scheduler and paged cache, attention by SDPA.  The
first call of a backend compiles; the median of whole calls by the same scheduler, which keeps what was compiled, is
compared.  Greedy tokens are compared with eager's: with random weights and in bfloat16 near ties may fall to either
side, so their share is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import CompileConfig, ContinuousBatchingConfig

GPU = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
CPU = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


def build(layers: int, device: str) -> Any:
    torch.manual_seed(0)
    sizes = GPU if device == "cuda" else CPU
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=layers, **sizes)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def generate(model: Any, prompts: list[list[int]], new: int, backend: str | None) -> Any:
    """The tokens of each prompt, and the seconds that the call took."""
    how = {}
    if backend is not None:
        how["varlen_compile_config"] = CompileConfig(
            backend=backend, mode=None, options={}, fullgraph=False, dynamic=True
        )
    batching = ContinuousBatchingConfig(num_blocks=256, block_size=32, max_batch_tokens=512, **how)
    generation = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    begin = time.perf_counter()
    found = model.generate_batch(
        prompts,
        generation_config=generation,
        continuous_batching_config=batching,
        progress_bar=False,
        persistent_manager=True,
    )
    seconds = time.perf_counter() - begin
    return [request.generated_tokens for _, request in sorted(found.items())], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backends", default="eager,inductor,layerzero")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a backend")
    args = parser.parse_args()
    model = build(args.layers, args.device)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 32000, (24 + 13 * (i % 7),), generator=generator).tolist() for i in range(args.prompts)]
    names = args.backends.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, Any] = {}
    first: dict[str, float] = {}
    for name in names:
        torch._dynamo.reset()
        backend = None if name == "eager" else name
        tokens[name], first[name] = generate(model, prompts, args.new, backend)
        for _ in range(args.rounds):
            again, spent = generate(model, prompts, args.new, backend)
            seconds[name].append(spent)
            assert len(again) == len(prompts)
        model.destroy_cached_continuous_batching_manager()
        print(f"{name}: {statistics.median(seconds[name]):.3f} s, first call {first[name]:.1f} s", flush=True)
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    for name in names:
        pairs = [a == b for x, y in zip(tokens[names[0]], tokens[name]) for a, b in zip(x, y)]
        row = {
            "backend": name,
            "seconds": medians[name],
            "versus_inductor": medians.get("inductor", float("nan")) / medians[name],
            "same_tokens": sum(pairs) / len(pairs),
            "first_call": first[name],
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        }
        print(json.dumps(row))
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
