"""Is the kernel that the plan picks the fastest one?  Twelve attention signatures, each kernel timed again.

    python -m benchmarks.signatures --json build/signatures.jsonl

For every signature the road plans an attention function with an empty performance database, which qualifies and times
every kernel that fits.  Then all of them are timed again from nothing, ``--again`` (3) times on inputs of their own: by
the medians of those the pick may be at most ``--within`` (3%) slower than the fastest qualified kernel.  (One timing is
not enough: where its inputs lie in memory moves a decode kernel by up to a tenth.)  The command fails when it is not.

Decode writes its key and value into a static cache, as Hugging Face's ``StaticCache`` does, and reads it: half full.
The write proves that the position is inside the cache, which kernels that take lengths ask for.  Prefill is causal.
All in bfloat16 as CUDA-graph replay (float32 on a CPU, with sizes that suit it).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


@dataclass(frozen=True)
class Signature:
    """``keys`` equals ``queries`` in a prefill; a decode has one query and a cache of ``keys`` slots."""

    phase: str
    batch: int
    keys: int
    heads: int
    kv_heads: int
    head_size: int

    def __str__(self) -> str:
        length = f"S={self.keys}" if self.phase == "prefill" else f"cache={self.keys}"
        return f"{self.phase} B={self.batch} {length} H={self.heads}/{self.kv_heads} D={self.head_size}"


GPU = [
    Signature("prefill", 1, 512, 32, 8, 128),
    Signature("prefill", 4, 2048, 32, 8, 128),
    Signature("prefill", 1, 8192, 32, 8, 128),
    Signature("prefill", 2, 4096, 16, 16, 64),
    Signature("prefill", 1, 4096, 16, 4, 256),
    Signature("decode", 1, 4096, 32, 8, 128),
    Signature("decode", 16, 4096, 32, 8, 128),
    Signature("decode", 64, 1024, 32, 4, 128),
    Signature("decode", 4, 32768, 32, 8, 128),
    Signature("decode", 8, 8192, 16, 16, 64),
    Signature("decode", 16, 2048, 16, 4, 256),
    Signature("prefill", 1, 16384, 32, 4, 128),
]
CPU = [Signature("prefill", 1, 256, 8, 2, 64), Signature("decode", 2, 1024, 8, 2, 64)]


def attention_function(s: Signature, dtype: torch.dtype, device: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function as Hugging Face spells it, with its arguments."""
    queries = s.keys if s.phase == "prefill" else 1
    q = torch.randn(s.batch, queries, s.heads, s.head_size, dtype=dtype, device=device).transpose(1, 2)
    if s.phase == "prefill":
        k, v = (
            torch.randn(s.batch, s.keys, s.kv_heads, s.head_size, dtype=dtype, device=device).transpose(1, 2)
            for _ in range(2)
        )
        grouped = s.heads != s.kv_heads

        def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return out.transpose(1, 2).contiguous()

        return prefill, (q, k, v)
    k, v = (torch.randn(s.batch, s.kv_heads, s.keys, s.head_size, dtype=dtype, device=device) for _ in range(2))
    group = s.heads // s.kv_heads

    new_k, new_v = (torch.randn(s.batch, s.kv_heads, 1, s.head_size, dtype=dtype, device=device) for _ in range(2))
    position = torch.tensor([s.keys // 2], device=device)

    def decode(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        new_k: torch.Tensor,
        new_v: torch.Tensor,
        position: torch.Tensor,
    ) -> torch.Tensor:
        k.index_copy_(2, position, new_k)
        v.index_copy_(2, position, new_v)
        mask = (torch.arange(k.shape[2], device=k.device)[None] <= position[:, None])[None, None]
        if group > 1:
            k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask.expand(q.shape[0], 1, 1, -1))
        return out.transpose(1, 2).contiguous()

    return decode, (q, k, v, new_k, new_v, position)


@contextlib.contextmanager
def fresh_database(folder: Path) -> Iterator[None]:
    """A performance database of its own for a block."""
    kept = os.environ.get("LZ_COMPILE_CACHE_DIR")
    os.environ["LZ_COMPILE_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        if kept is None:
            del os.environ["LZ_COMPILE_CACHE_DIR"]
        else:
            os.environ["LZ_COMPILE_CACHE_DIR"] = kept


def plan(function: Callable[..., Any], arguments: tuple[Any, ...], budget: float) -> Any:
    """The report of the one attention region, planned with an empty performance database."""
    from lz_compile import config
    from lz_compile.backend import improve
    from lz_compile.report import GraphReport

    seen: list[GraphReport] = []

    def backend(module: Any, inputs: list[Any]) -> Callable[..., Any]:
        report = GraphReport.start(None, None)
        with config.patch(measure="auto", measure_budget=budget, strict=True):
            improve(module, report, {"triton.cudagraphs": arguments[0].is_cuda})
        seen.append(report)
        return module.forward

    with tempfile.TemporaryDirectory() as folder, fresh_database(Path(folder)), torch.no_grad():
        torch._dynamo.reset()
        torch.compile(function, backend=backend, dynamic=False)(*arguments)
    return seen[0].regions[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a signature")
    parser.add_argument("--within", type=float, default=0.03, help="how much slower than the fastest the pick may be")
    parser.add_argument("--again", type=int, default=3, metavar="N", help="how often all kernels are timed again")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that one planning may take")
    parser.add_argument("--only", default="", help="signatures whose text contains this")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which a signature counts as hung")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{name}, torch {torch.__version__}")
    table = Table()
    for column in ("signature", "pick", "us", "of the fastest", "all, timed again (us)"):
        table.add_column(column, overflow="fold")
    failures = 0
    for signature in GPU if device == "cuda" else CPU:
        if args.only not in str(signature):
            continue
        torch.manual_seed(0)
        faulthandler.dump_traceback_later(args.patience, exit=True)
        function, arguments = attention_function(signature, dtype, device)
        begin = time.perf_counter()
        picked = plan(function, arguments, args.budget)
        planned = time.perf_counter() - begin
        again: dict[str, list[float]] = {}
        kept = []
        for _ in range(args.again):
            for c in plan(function, arguments, args.budget).candidates:
                if c.source == "measured":
                    again.setdefault(c.kernel, []).append(c.microseconds)
            kept.append(torch.empty(random.randrange(1 << 20, 1 << 24), device=device))  # moves the next inputs
        times = {kernel: statistics.median(values) for kernel, values in again.items()}
        ratio = times[picked.kernel] / min(times.values()) if picked.kernel in times else float("nan")
        failures += not ratio <= 1 + args.within
        record = {
            "signature": asdict(signature),
            "device": name,
            "pick": picked.kernel,
            "ratio": ratio,
            "seconds": planned,
            "first": {c.kernel: c.microseconds for c in picked.candidates},
            "again": again,
            "rejected": picked.rejected,
        }
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(record) + "\n")
        listed = ", ".join(f"{kernel} {time:.1f}" for kernel, time in sorted(times.items(), key=lambda item: item[1]))
        table.add_row(str(signature), picked.kernel, f"{times.get(picked.kernel, 0):.1f}", f"{ratio:.3f}x", listed)
        console.print(f"{signature}: {picked.kernel} ({ratio:.3f}x of the fastest), planned in {planned:.1f} s")
    faulthandler.cancel_dump_traceback_later()
    console.print(table)
    if failures:
        console.print(f"{failures} picks are more than {args.within:.0%} slower than the fastest kernel")
        sys.exit(1)


if __name__ == "__main__":
    main()
