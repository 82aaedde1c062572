"""A decode loop written by hand: prefill and decode are both compiled, and nothing else stands between the tokens.

What `generate` does around the model costs time on a fast decode step.  This is the loop without it: a static cache
that is allocated beforehand (so that CUDA graphs find it at one address), one compiled function for the prompt and one
for each further token, greedy sampling inside the graph.

    python examples/decode_loop.py --backend layerzero
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

console = Console(highlight=False)
Step = Callable[[LlamaForCausalLM, torch.Tensor, StaticCache], torch.Tensor]


def step(model: LlamaForCausalLM, input_ids: torch.Tensor, cache: StaticCache) -> torch.Tensor:
    """Feeds `input_ids` [batch, length] and returns the greedy next tokens [batch, 1]; the cache remembers the rest."""
    logits = model(input_ids, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


def make_cache(model: LlamaForCausalLM, batch: int, length: int) -> StaticCache:
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    return cache


@torch.no_grad()
def decode(
    model: LlamaForCausalLM,
    prompt: torch.Tensor,
    cache: StaticCache,
    new_tokens: int,
    prefill_step: Step,
    decode_step: Step,
) -> tuple[torch.Tensor, float]:
    """Greedy tokens [batch, new_tokens], and decoded tokens per second of the whole batch."""
    cache.reset()
    tokens = [prefill_step(model, prompt, cache).clone()]
    synchronize(model.device)
    start = time.perf_counter()
    for _ in range(new_tokens - 1):
        torch.compiler.cudagraph_mark_step_begin()
        tokens.append(decode_step(model, tokens[-1], cache).clone())  # the next replay overwrites its output
    synchronize(model.device)
    elapsed = time.perf_counter() - start
    return torch.cat(tokens, dim=1), prompt.shape[0] * (new_tokens - 1) / elapsed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--backend", default="layerzero")
    parser.add_argument(
        "--mode", default="reduce-overhead" if on_gpu else None, help="mode of torch.compile for decode"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cache", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if on_gpu else "cpu")
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=args.layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=args.cache,
    )
    with device:
        model = LlamaForCausalLM(config).eval()
        prompt = torch.randint(0, config.vocab_size, (args.batch, args.prompt))
    cache = make_cache(model, args.batch, args.cache)

    prefill_step = torch.compile(step, backend=args.backend, fullgraph=True, dynamic=False)
    decode_step = torch.compile(step, backend=args.backend, fullgraph=True, dynamic=False, mode=args.mode)
    with console.status("compiling prefill and decode"):
        start = time.perf_counter()
        decode(model, prompt, cache, 4, prefill_step, decode_step)
        console.print(f"prefill and decode compiled in {time.perf_counter() - start:.1f} s")

    expected, eager_rate = decode(model, prompt, cache, args.tokens, step, step)
    actual, rate = decode(model, prompt, cache, args.tokens, prefill_step, decode_step)
    equal = torch.equal(actual, expected)
    console.print(f"eager      {eager_rate:8.1f} tokens/s")
    console.print(f"{args.backend:10} {rate:8.1f} tokens/s, {rate / eager_rate:.2f}x")
    console.print(f"tokens equal eager's: {'yes' if equal else 'NO'} ({actual.numel()} tokens, float32)")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
