"""An unmodified Llama through ``model.generate`` with a static cache: eager, Inductor and layerzero side by side.

The model is a `LlamaForCausalLM` with random weights, sized for the machine: 6 layers of width 768 in float32 on a
CPU, 8B shapes in bfloat16 on a GPU.  Prompts of different lengths are left-padded, as a tokenizer does it.  Every
contender runs the same `generate` call and differs in `CompileConfig.backend` alone; transformers compiles the decode
step.

Greedy tokens must equal eager's in float32.  In bfloat16 they may differ, for plain Inductor too (rounding decides
between nearly equal logits), so on a GPU a float32 copy with fewer layers is checked as well.

    python examples/generate_llama.py --help
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@dataclass
class Result:
    tokens: torch.Tensor
    first_call: float
    ms_per_token: float


def main() -> int:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    on_gpu = args.device == "cuda"
    dtype = getattr(torch, args.dtype)
    backends = args.backends.split(",")
    failed = False

    if on_gpu and dtype != torch.float32:
        console.print(f"[bold]float32 check[/]: 2 layers, {args.tokens} tokens")
        model = build_model(args, layers=2, dtype=torch.float32)
        results = run(model, args, rounds=0)
        failed = print_tokens(results)
        del model

    model = build_model(args, layers=args.layers, dtype=dtype)
    size = sum(p.numel() for p in model.parameters())
    console.print(
        f"[bold]{args.layers}-layer LlamaForCausalLM[/], {size / 1e6:,.0f} M parameters, {args.dtype}, {args.device}: "
        f"batch {args.batch}, prompts of up to {args.prompt} tokens, {args.tokens} new tokens, cache of {args.cache}"
    )
    results = run(model, args, rounds=args.rounds)
    print_table(results)
    if dtype == torch.float32:
        failed = any(not torch.equal(r.tokens, results[backends[0]].tokens) for r in results.values())
    if "layerzero" in backends:
        import lz_compile

        for report in lz_compile.reports()[-1:]:
            console.print()
            console.print(str(report), markup=False, soft_wrap=True)
    if failed:
        console.print("[red]float32 tokens differ from eager's[/]")
    return int(failed)


def build_model(args: argparse.Namespace, layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """An ordinary transformers model, made on the device with random weights."""
    if args.device == "cuda":  # Llama-3-8B
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        vocabulary = 128256
    else:
        shape = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
        vocabulary = 32000
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=args.cache, eos_token_id=None, **shape
    )
    with torch.device(args.device):
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


class Contender:
    """`generate` on one backend; its cache is made once and emptied in between, as CUDA graphs know its address."""

    def __init__(self, model: LlamaForCausalLM, args: argparse.Namespace, backend: str) -> None:
        self.model = copy.copy(model)  # the same weights; transformers keeps the compiled call on the object
        self.backend = backend
        self.cache = StaticCache(config=model.config, max_cache_len=args.cache)
        self.compile_config = CompileConfig(backend=backend, mode=args.mode, fullgraph=True, dynamic=False)
        self.compile_config._compile_all_devices = True  # transformers compiles on the CPU only when told to
        generator = torch.Generator().manual_seed(args.seed)
        input_ids = torch.randint(3, model.config.vocab_size, (args.batch, args.prompt), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        for row in range(args.batch):  # row 0 is as long as the batch, the last one about half of it
            attention_mask[row, : args.prompt * row // (2 * args.batch)] = 0
        self.inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}

    def generate(self, new_tokens: int) -> tuple[torch.Tensor, float]:
        """Greedy tokens [batch, new_tokens] on the CPU, and the seconds it took."""
        self.cache.reset()
        eager = self.backend == "eager"
        start = time.perf_counter()
        tokens = self.model.generate(
            **self.inputs,
            past_key_values=self.cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            disable_compile=eager,
            compile_config=None if eager else self.compile_config,
        ).cpu()
        return tokens[:, self.inputs["input_ids"].shape[1] :], time.perf_counter() - start

    def decode_seconds(self, new_tokens: int) -> float:
        """Prefill runs eagerly for all alike; what the decode steps take is the difference."""
        return self.generate(new_tokens)[1] - self.generate(1)[1]


def run(model: LlamaForCausalLM, args: argparse.Namespace, rounds: int) -> dict[str, Result]:
    """Generates once to compile and once for the tokens, then against the clock.

    The contenders take turns, so that a busy machine slows all of them.
    """
    torch._dynamo.reset()
    contenders = [Contender(model, args, backend) for backend in args.backends.split(",")]
    results = {}
    for contender in contenders:
        name = contender.backend
        with console.status(f"{name}: the first call" + ("" if name == "eager" else ", which compiles")):
            _, first_call = contender.generate(4)
        with console.status(f"{name}: generating {args.tokens} tokens"):
            tokens, _ = contender.generate(args.tokens)
        console.print(f"  {name}: first call {first_call:.1f} s")
        results[name] = Result(tokens, first_call, float("nan"))
    samples: dict[str, list[float]] = {name: [] for name in results}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn and time.perf_counter() - start > args.seconds:
            break
        for contender in contenders:
            with console.status(f"{contender.backend}: round {turn + 1} of {rounds}"):
                samples[contender.backend].append(contender.decode_seconds(args.tokens))
    for name, times in samples.items():
        if times:
            results[name].ms_per_token = 1e3 * statistics.median(times) / (args.tokens - 1)
    return results


def agreement(result: Result, reference: Result) -> str:
    different = (result.tokens != reference.tokens).nonzero()
    if not len(different):
        return "yes"
    first = int(different[:, 1].min())
    return f"first difference at token {first} of {result.tokens.shape[1]}"


def print_tokens(results: dict[str, Result]) -> bool:
    """One line a backend; True when any tokens differ from those of the first."""
    reference = next(iter(results.values()))
    for backend, result in results.items():
        console.print(f"  {backend}: tokens equal eager's: {agreement(result, reference)}")
    return any(not torch.equal(result.tokens, reference.tokens) for result in results.values())


def print_table(results: dict[str, Result]) -> None:
    reference = next(iter(results.values()))
    inductor = results.get("inductor")
    table = Table(title="decode, median")
    table.add_column("backend")
    table.add_column("tokens equal eager's")
    for name in ("ms per token", "against eager", "against Inductor", "first call"):
        table.add_column(name, justify="right")
    for backend, result in results.items():
        table.add_row(
            backend,
            agreement(result, reference),
            f"{result.ms_per_token:.2f}",
            f"{reference.ms_per_token / result.ms_per_token:.2f}x",
            f"{inductor.ms_per_token / result.ms_per_token:.2f}x" if inductor else "-",
            f"{result.first_call:.1f} s",
        )
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else "", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    device = parser.parse_known_args([a for a in sys.argv[1:] if a not in ("-h", "--help")])[0].device
    on_gpu = device == "cuda"
    parser.add_argument("--layers", type=int, default=8 if on_gpu else 6)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--prompt", type=int, default=512 if on_gpu else 64, help="length of the longest prompt")
    parser.add_argument("--tokens", type=int, default=64 if on_gpu else 48, help="tokens to generate")
    parser.add_argument("--cache", type=int, default=8192 if on_gpu else 4096, help="length of the static cache")
    parser.add_argument("--rounds", type=int, default=3, help="timed generations of each backend")
    parser.add_argument("--seconds", type=float, default=40.0, help="no further round after this time")
    parser.add_argument("--mode", default="reduce-overhead" if on_gpu else None, help="mode of torch.compile")
    parser.add_argument("--backends", default="eager,inductor,layerzero", help="the first one is the reference")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
