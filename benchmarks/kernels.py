"""Times the Triton attention kernels against PyTorch's SDPA on a GPU; Llama-3-8B heads (32 over 8, size 128), bfloat16.

    python benchmarks/kernels.py                  # both tables, with an error against float64 for each row
    python benchmarks/kernels.py --only decode
    python benchmarks/kernels.py --tune           # block, warp and stage settings of both kernels instead

Each time is the median of ``triton.testing.do_bench``, which flushes L2 before every run.  Small inputs are rotated
as well, so that no run meets the previous run's addresses.  TFLOP/s counts visible pairs only, TB/s visible keys.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from lz_compile.lowering import triton_ops
from lz_compile.lowering.semantic import BOUND_COLUMNS, LOWER, NO_LOWER, NO_UPPER, STOP, UPPER, attend, visible_keys
from lz_compile.lowering.triton_ops import SplitConfig, TileConfig

HEADS, KV_HEADS, SIZE = 32, 8, 128
SCALE = SIZE**-0.5
L2_BYTES = 50 * 2**20


@dataclass(frozen=True)
class Case:
    """One shape and one mask: ``valid`` holds the number of keys of each batch row."""

    name: str
    batch: int
    queries: int
    keys: int
    valid: tuple[int, ...]
    causal: bool = False
    window: int = 0
    tensors: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = field(default=(), compare=False, repr=False)

    def with_tensors(self) -> Case:
        kv_bytes = 2 * self.batch * KV_HEADS * self.keys * SIZE * 2
        copies = max(1, min(8, -(-2 * L2_BYTES // kv_bytes)))

        def random(heads: int, length: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, length, SIZE, device="cuda", dtype=torch.bfloat16)

        return replace(
            self,
            tensors=tuple(
                (random(HEADS, self.queries), random(KV_HEADS, self.keys), random(KV_HEADS, self.keys))
                for _ in range(copies)
            ),
        )

    def bounds(self) -> torch.Tensor:
        bounds = torch.zeros(self.batch, BOUND_COLUMNS, dtype=torch.int32)
        bounds[:, UPPER] = 0 if self.causal else NO_UPPER
        bounds[:, LOWER] = 1 - self.window if self.window else NO_LOWER
        bounds[:, STOP] = torch.tensor(self.valid, dtype=torch.int32)
        return bounds.cuda()

    def mask(self) -> torch.Tensor:
        """The boolean mask [B, 1, M, N] that SDPA needs for what ``bounds`` says."""
        return visible_keys(
            self.bounds(), None, None, None, None, 0, self.batch, self.queries, self.keys, torch.device("cuda")
        )

    def pairs(self) -> int:
        """Visible (query, key) pairs over the batch."""
        total = 0
        for valid in self.valid:
            q = torch.arange(self.queries)
            stop = torch.minimum(q + 1, torch.tensor(valid)) if self.causal else torch.full_like(q, valid)
            start = (q + 1 - self.window).clamp(min=0) if self.window else torch.zeros_like(q)
            total += int((stop - start).clamp(min=0).sum())
        return total

    def flops(self) -> float:
        return 4.0 * HEADS * SIZE * self.pairs()

    def bytes_read(self) -> float:
        return 4.0 * KV_HEADS * SIZE * sum(self.valid)


PREFILL = [
    Case("causal S=2048", 1, 2048, 2048, (2048,), causal=True),
    Case("causal S=8192", 1, 8192, 8192, (8192,), causal=True),
    Case("window 4096, S=16384", 1, 16384, 16384, (16384,), causal=True, window=4096),
    Case("padded B=8 S=1024", 8, 1024, 1024, (128, 256, 384, 512, 512, 640, 768, 896)),
]
DECODE = [
    Case(f"decode B={batch} cache {keys}, {valid} valid", batch, 1, keys, (valid,) * batch)
    for batch, keys in itertools.product((1, 16), (4096, 16384))
    for valid in (1000, keys)
]

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def time_us(attention: Attention, case: Case) -> float:
    """Median time; the inputs of successive runs rotate through the copies of ``case``."""
    rotation = itertools.cycle(case.tensors)
    budget = 60 if case.flops() < 1e12 else 150
    return 1000.0 * do_bench(lambda: attention(*next(rotation)), warmup=budget // 3, rep=budget, return_mode="median")


def error(attention: Attention, case: Case) -> float:
    """Largest error over the largest answer, against ``attend`` in float64 on the last 64 queries of two heads."""
    query, key, value = case.tensors[0]
    out = attention(query, key, value)
    group = HEADS // KV_HEADS
    first = max(0, case.queries - 64)
    worst = 0.0
    for kv_head, row in ((0, 0), (KV_HEADS - 1, case.batch - 1)):
        bounds = case.bounds()[row : row + 1]
        if case.causal:
            bounds[:, UPPER] += first
        if case.window:
            bounds[:, LOWER] += first
        head = kv_head * group
        exact = attend(
            query[row : row + 1, head : head + 1, first:].double(),
            key[row : row + 1, kv_head : kv_head + 1].double(),
            value[row : row + 1, kv_head : kv_head + 1].double(),
            bounds,
            scale=SCALE,
        )
        difference = (out[row : row + 1, head : head + 1, first:].double() - exact).abs().max()
        worst = max(worst, float(difference / exact.abs().max()))
    return worst


def sdpa(case: Case, backend: SDPBackend | None, masked: bool) -> Attention:
    """SDPA with ``is_causal`` or the boolean mask, held to one backend where one is named."""
    mask = case.mask() if masked else None

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=case.causal and mask is None, scale=SCALE, enable_gqa=True
        )

    if backend is None:
        return run

    def pinned(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return run(query, key, value)

    return pinned


def sdpa_expanded(case: Case) -> Attention:
    """What a compiled Hugging Face model does under a mask: repeat the key/value heads, then a masked SDPA."""
    mask = case.mask()
    group = HEADS // KV_HEADS

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)

    return run


def ours(case: Case, config: TileConfig | SplitConfig | None = None) -> Attention:
    bounds = case.bounds()

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if case.queries == 1:
            assert config is None or isinstance(config, SplitConfig)
            return triton_ops.split_kv(query, key, value, bounds, scale=SCALE, config=config)
        assert config is None or isinstance(config, TileConfig)
        return triton_ops.tiled(query, key, value, bounds, scale=SCALE, config=config)

    return run


def contestants(case: Case) -> Iterator[tuple[str, Attention]]:
    decode = case.queries == 1
    yield ("split_kv" if decode else "tiled"), ours(case)
    exactly_causal = case.causal and not case.window and case.valid == (case.keys,) * case.batch
    if exactly_causal:
        yield "SDPA cuDNN, is_causal", sdpa(case, SDPBackend.CUDNN_ATTENTION, False)
        yield "SDPA FA2, is_causal", sdpa(case, SDPBackend.FLASH_ATTENTION, False)
    yield "SDPA, boolean mask", sdpa(case, None, True)
    if decode:
        yield "repeat_kv + SDPA, mask", sdpa_expanded(case)


def rate(case: Case, us: float) -> str:
    if case.queries == 1:
        return f"{case.bytes_read() / us * 1e-6:6.2f} TB/s"
    return f"{case.flops() / us * 1e-6:6.0f} TFLOP/s"


def as_graph(attention: Attention, case: Case) -> Attention:
    """Decode as it runs in a model, in a CUDA graph: one launch is shorter than Python's way to it."""
    graphs = {}
    for tensors in case.tensors:
        attention(*tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(*tensors)
        graphs[tensors[0].data_ptr()] = (graph, out)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        graph, out = graphs[query.data_ptr()]
        graph.replay()
        return out

    return run


def compare(cases: list[Case]) -> None:
    print(f"{'case':38} {'kernel':26} {'us':>9} {'ratio':>6} {'rate':>14} {'error':>8}")
    for case in cases:
        case = case.with_tensors()
        own = 0.0
        for name, attention in contestants(case):
            try:
                wrong = error(attention, case)
                timed = as_graph(attention, case) if case.queries == 1 else attention
                us = time_us(timed, case)
            except RuntimeError as reason:
                print(f"{case.name:38} {name:26} {str(reason).splitlines()[0][:60]}")
                continue
            own = own or us
            flag = "" if wrong < 0.02 else "  WRONG"
            print(
                f"{case.name:38} {name:26} {us:9.1f} {us / own:6.2f} {rate(case, us):>14} {wrong:8.1e}{flag}",
                flush=True,
            )


TILE_CONFIGS = [
    TileConfig(128, 128, 8, 2),
    TileConfig(128, 64, 8, 2),
    TileConfig(128, 64, 8, 3),
    TileConfig(128, 64, 4, 3),
    TileConfig(64, 128, 4, 2),
    TileConfig(64, 64, 4, 3),
    TileConfig(256, 64, 8, 2),
]
SPLIT_CONFIGS = [
    SplitConfig(block_n, splits, warps, stages)
    for block_n, warps, stages in ((64, 4, 3), (64, 4, 2), (32, 4, 4), (128, 4, 2), (128, 8, 2), (32, 2, 4))
    for splits in (0, 8, 16, 32)
]


# Compiling a setting costs about a second: the tuner keeps to the shapes on which settings differ.
TUNED = {
    "causal S=2048",
    "causal S=8192",
    "window 4096, S=16384",
    "decode B=1 cache 4096, 4096 valid",
    "decode B=1 cache 16384, 1000 valid",
    "decode B=16 cache 16384, 16384 valid",
    "decode B=16 cache 4096, 1000 valid",
}


def tune(cases: list[Case]) -> None:
    for case in cases:
        case = case.with_tensors()
        configs: list[TileConfig] | list[SplitConfig] = SPLIT_CONFIGS if case.queries == 1 else TILE_CONFIGS
        for config in configs:
            attention = ours(case, config)
            try:
                wrong = error(attention, case)
                us = time_us(as_graph(attention, case) if case.queries == 1 else attention, case)
            except Exception as reason:  # a setting that does not fit the machine is an answer, not a failure
                print(f"{case.name:38} {config}: {type(reason).__name__}: {str(reason).splitlines()[0][:60]}")
                continue
            flag = "" if wrong < 0.02 else "  WRONG"
            print(f"{case.name:38} {us:9.1f} us {rate(case, us)}  {config}{flag}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["prefill", "decode"], help="one of the two kernels")
    parser.add_argument("--tune", action="store_true", help="time launch settings instead of comparing with SDPA")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    cases = (PREFILL if arguments.only != "decode" else []) + (DECODE if arguments.only != "prefill" else [])
    if arguments.tune:
        tune([c for c in cases if c.name in TUNED])
    else:
        compare(cases)


if __name__ == "__main__":
    main()
