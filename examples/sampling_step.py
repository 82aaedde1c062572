"""A whole sampling step in one graph: forward, the logits warpers of Transformers, and the draw.

`generate` runs its warpers outside the compiled graph, one operator at a time.  Here a step takes the last tokens and
gives the next ones, drawn with temperature, top-k and top-p, and the same function runs eagerly, compiled by Inductor
and by layerzero.  From one seed all three should draw the same tokens.

    python examples/sampling_step.py
    python examples/sampling_step.py --batch 16 --vocabulary 128256 --top-k 0   # top-p over the whole vocabulary
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import lz_compile

console = Console(highlight=False)
Step = Callable[[torch.Tensor, StaticCache], torch.Tensor]


def make_step(model: LlamaForCausalLM, warpers: LogitsProcessorList) -> Step:
    """A function of `input_ids` [batch, length] and a cache that draws the next tokens [batch, 1]."""

    def step(input_ids: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        logits = model(input_ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        scores = warpers(input_ids, logits.to(torch.float32, copy=True))
        return torch.multinomial(scores.softmax(-1), 1)

    return step


@torch.no_grad()
def sample(
    first: Step, step: Step, prompt: torch.Tensor, cache: StaticCache, new_tokens: int
) -> tuple[list[int], float]:
    """Tokens drawn from seed 0 and the milliseconds of a step."""
    cache.reset()
    torch.manual_seed(0)
    drawn = [first(prompt, cache)]
    start = time.perf_counter()
    for _ in range(new_tokens - 1):
        torch.compiler.cudagraph_mark_step_begin()
        drawn.append(step(drawn[-1], cache).clone())
    tokens = torch.cat(drawn, 1).flatten().tolist()  # waits for the device
    return tokens, 1e3 * (time.perf_counter() - start) / (new_tokens - 1)


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=128256 if on_gpu else 32000)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50, help="0: no such filter")
    parser.add_argument("--top-p", type=float, default=0.9, help="1: no such filter")
    parser.add_argument("--mode", default=None, help="mode of torch.compile")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if on_gpu else "cpu")
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=args.vocabulary,
        initializer_range=0.2,
    )
    with device:
        model = LlamaForCausalLM(config).eval()
        prompt = torch.randint(0, config.vocab_size, (args.batch, args.prompt))
    cache = StaticCache(config=config, max_cache_len=args.prompt + args.tokens)
    cache.early_initialization(args.batch, config.num_key_value_heads, config.head_dim, model.dtype, device)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(args.temperature)])
    if args.top_k:
        warpers.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1:
        warpers.append(TopPLogitsWarper(args.top_p))

    eager = make_step(model, warpers)
    expected, slowest = sample(eager, eager, prompt, cache, args.tokens)
    console.print(f"{'eager':10} {slowest:8.2f} ms a step")
    failed = False
    for backend in ("inductor", "layerzero"):
        torch._dynamo.reset()
        compiled = torch.compile(eager, backend=backend, mode=args.mode, fullgraph=True, dynamic=False)
        try:
            with console.status(f"compiling with {backend}"):
                sample(eager, compiled, prompt, cache, 4)
            tokens, each = sample(eager, compiled, prompt, cache, args.tokens)
        except Exception as error:
            if backend == "layerzero":
                raise
            console.print(f"{backend:10} does not compile it: {type(error).__name__}")
            continue
        equal = sum(map(int.__eq__, tokens, expected))
        console.print(
            f"{backend:10} {each:8.2f} ms a step, {slowest / each:.2f}x; "
            f"{equal} of {len(expected)} tokens equal eager's"
        )
        failed = failed or equal < len(expected)
    for region in (r for report in lz_compile.reports()[-1:] for r in report.regions if r.kind == "sampling"):
        console.print(f"filters: {region.pattern}: {region.kernel}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
