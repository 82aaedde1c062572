"""Filters of next-token scores: eager's warpers, Inductor, layerzero and FlashInfer, on a GPU or a CPU.

    python -m benchmarks.sampling                  # times, and each one's ratio to eager's chained warpers
    python -m benchmarks.sampling --check          # kept sets on 10,000 rows, ties and infinities included
    python -m benchmarks.sampling --check --rounded    # the same with rounded_filters, as under CUDA graphs

Scores are normal values times ``--spread`` (1: flat, a top-p boundary among thousands of nearly equal tokens; those of
a language model are nearer to 3 or more).  ``--bfloat16`` rounds them, so that many are equal.  A time is the median of
the calls' own; on a GPU four inputs take turns, which its L2 cache may hold.

``layerzero`` filters rows whose boundary eager's own rounding may have moved as eager does, so its time depends on
the rows; ``layerzero, rounded`` never does, runs in a CUDA graph here, and ``--check`` counts the rows that differ.
FlashInfer draws from a random stream of its own, and its filters decide by sums in an order of their own: they are
timed, and ``--check`` counts how often their set is another.  Where `--check` finds a difference of layerzero's own
(without ``--rounded``) the exit code is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import lz_compile

Run = Callable[[torch.Tensor], torch.Tensor]

WARPERS: dict[str, LogitsProcessorList] = {
    "top-p": LogitsProcessorList([TopPLogitsWarper(0.9)]),
    "top-k": LogitsProcessorList([TopKLogitsWarper(50)]),
    "temperature, top-k, top-p": LogitsProcessorList(
        [TemperatureLogitsWarper(0.8), TopKLogitsWarper(50), TopPLogitsWarper(0.9)]
    ),
}


def filters(name: str) -> Run:
    return lambda scores: WARPERS[name](None, scores)


def draws(name: str) -> Run:
    return lambda scores: torch.multinomial(WARPERS[name](None, scores).softmax(-1), 1)


def microseconds(run: Run, scores: list[torch.Tensor], seconds: float) -> float:
    """The median time of a call, over inputs in turn."""
    on_gpu = scores[0].is_cuda
    for x in scores[:2]:
        run(x)
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 5:
        x = scores[len(times) % len(scores)]
        if on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run(x)
            last.record()
            last.synchronize()
            times.append(1e3 * first.elapsed_time(last))
        else:
            start = time.perf_counter()
            run(x)
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def compiled(fn: Run, backend: str, **settings: Any) -> Run:
    torch._dynamo.reset()
    run = torch.compile(fn, backend=backend, dynamic=False, **settings)

    def call(scores: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), lz_compile.config.patch(measure_budget=120.0):
            return run(scores)

    return call


def rounded(fn: Run) -> Run:
    """By layerzero in a CUDA graph, where nothing is settled."""
    options: dict[str, Any] = {"rounded_filters": True}
    if torch.cuda.is_available():
        options["triton.cudagraphs"] = True
    inner = compiled(fn, "layerzero", options=options)

    def call(scores: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return inner(scores)

    return call


def flashinfer(name: str) -> tuple[Run | None, Run | None]:
    """FlashInfer's filters and its draw, where it is installed and has them."""
    try:
        from flashinfer import sampling
    except Exception:
        return None, None
    temperature = 0.8 if "temperature" in name else 1.0
    top_k = 50 if "top-k" in name else 0
    top_p = 0.9 if "top-p" in name else 1.0

    def kept(scores: torch.Tensor) -> torch.Tensor:
        masked = sampling.top_k_mask_logits(scores / temperature, top_k) if top_k else scores / temperature
        if top_p == 1.0:
            return masked
        return sampling.top_p_renorm_probs(masked.softmax(-1), top_p).log()

    def draw(scores: torch.Tensor) -> torch.Tensor:
        weights = (scores / temperature).softmax(-1)
        if not top_k:
            return sampling.top_p_sampling_from_probs(weights, top_p)
        return sampling.top_k_top_p_sampling_from_probs(weights, top_k, top_p, filter_apply_order="top_k_first")

    return kept, draw


def contenders(name: str, drawing: bool) -> Iterator[tuple[str, Run]]:
    fn = draws(name) if drawing else filters(name)
    yield "eager", fn
    yield "inductor", compiled(fn, "inductor")
    yield "layerzero", compiled(fn, "layerzero")
    if torch.cuda.is_available():
        yield "layerzero, rounded", rounded(fn)
        rival = flashinfer(name)[drawing]
        if rival is not None:
            yield "FlashInfer", rival


def measure(batch: int, size: int, spread: float, low: bool, seconds: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = [scores_of(batch, size, spread, low, device, seed) for seed in range(4)]
    for name in WARPERS:
        for drawing in (False, True):
            what = f"{name}{', softmax, multinomial' if drawing else ''}"
            eager = 0.0
            for who, run in contenders(name, drawing):
                try:
                    taken = microseconds(run, scores, seconds)
                except Exception as error:
                    print(f"{what:48} {who:20} fails: {type(error).__name__}", flush=True)
                    continue
                eager = eager or taken
                kernel = chosen() if who.startswith("layerzero") else ""
                print(f"{what:48} {who:20} {taken:10.1f} us {eager / taken:6.2f}x  {kernel}", flush=True)


def chosen() -> str:
    """The kernels of the filters that were compiled last."""
    return ", ".join(r.kernel for r in lz_compile.reports()[-1].regions if r.kind == "sampling")


def scores_of(batch: int, size: int, spread: float, low: bool, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    scores = spread * torch.randn(batch, size, generator=generator, device=device)
    return scores.bfloat16().float() if low else scores


def odd_scores(batch: int, size: int, device: str, seed: int) -> torch.Tensor:
    """Rows of every sort: spreads from 0 to 6, with ties, equal ones, -inf, infinity and NaN among them."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.randn(batch, size, generator=generator, device=device)
    scores *= 6 * torch.rand(batch, 1, generator=generator, device=device)
    kind = torch.randint(0, 12, (batch, 1), generator=generator, device=device)
    half = torch.rand(batch, size, generator=generator, device=device) < 0.5
    scores = torch.where(kind == 0, scores.round(), scores)
    scores = torch.where(kind == 1, scores.bfloat16().float(), scores)
    scores = scores.masked_fill((kind == 2) & half, -torch.inf)
    odd = torch.randint(0, 16, (batch, 1), generator=generator, device=device)
    scores = scores.masked_fill((kind == 3) & (odd == 0), -torch.inf).masked_fill((kind == 3) & (odd == 1), 0.5)
    first = torch.arange(size, device=device) == 7
    scores = scores.masked_fill((kind == 3) & (odd == 2) & first, torch.inf)
    return scores.masked_fill((kind == 3) & (odd == 3) & first, torch.nan)


def check(batch: int, size: int, rows: int, allow: bool) -> int:
    """Compares kept sets with the eager warpers' on the same scores; 1 where layerzero's differ and may not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong = 0
    for name, warpers in WARPERS.items():
        runs: dict[str, Run] = {"layerzero": rounded(filters(name)) if allow else compiled(filters(name), "layerzero")}
        rival = flashinfer(name)[0] if device == "cuda" else None
        if rival is not None:
            runs["FlashInfer"] = rival
        different = dict.fromkeys(runs, 0)
        tokens = dict.fromkeys(runs, 0)
        count = -(-rows // batch)
        kernel = ""
        for seed in range(count):
            scores = odd_scores(batch, size, device, seed)
            kept = warpers(None, scores.clone()) > -torch.inf
            for who, run in runs.items():
                other = (run(scores) > -torch.inf) != kept
                tokens[who] += int(other.sum())
                different[who] += int(other.any(-1).sum())
                if who == "layerzero":
                    kernel = kernel or chosen()
        for who in runs:
            note = kernel if who == "layerzero" else ""
            print(f"{name:28} {who:12} {different[who]} of {count * batch} rows differ, {tokens[who]} tokens  {note}")
        wrong += 0 if allow else different["layerzero"]
        if device == "cuda" and "top-p" in name:
            print(f"{name:28} {'doubtful':12} {distance(batch, size)}")
    return int(wrong > 0)


def distance(batch: int, size: int) -> str:
    """How far eager's cumulative sums are from float64's around 0.1, and how many rows are settled, by spread."""
    parts = []
    for spread in (1.0, 3.0, 6.0):
        worst, doubtful, count = 0.0, 0, 8
        for seed in range(count):
            scores = scores_of(batch, size, spread, False, "cuda", seed)
            ordered = scores.sort()[0]
            sums, exact = ordered.softmax(-1).cumsum(-1), ordered.double().softmax(-1).cumsum(-1)
            near = (exact > 0.09) & (exact < 0.11)
            worst = max(worst, float(((sums - exact).abs() / 0.1)[near].max()) if near.any() else 0.0)
            doubtful += int(torch.ops.lz_compile.filter_top_p_v1(scores, 0.1, -torch.inf)[1].sum())
        parts.append(f"spread {spread:g}: sums off by {worst:.1e} of 0.1, {doubtful} of {count * batch} rows settled")
    return "; ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviation of the scores (default 3)")
    parser.add_argument("--bfloat16", action="store_true", help="scores as a bfloat16 model gives them")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each time (default 2)")
    parser.add_argument("--check", action="store_true", help="compare kept sets instead of times")
    parser.add_argument("--rounded", action="store_true", help="check what rounded_filters allows")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of --check (default 10,000)")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, batch {args.batch}, vocabulary {args.vocabulary}")
    with torch.no_grad():
        if args.check:
            return check(args.batch, args.vocabulary, args.rows, args.rounded)
        measure(args.batch, args.vocabulary, args.spread, args.bfloat16, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
