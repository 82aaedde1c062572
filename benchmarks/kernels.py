"""Times the Triton attention kernels against PyTorch's SDPA on a GPU; Llama-3-8B heads (32 over 8, size 128), bfloat16.

    python benchmarks/kernels.py                  # both tables, with an error against float64 for each row
    python benchmarks/kernels.py --only decode
    python benchmarks/kernels.py --tune           # block, warp and stage settings of both kernels instead
    python benchmarks/kernels.py --tune --only prefill --seconds 90 --json build/tune.json
    python benchmarks/kernels.py --dry            # what the settings of the prefill kernel take of an SM; needs no GPU

Each time is the median of ``triton.testing.do_bench``, which flushes L2 before every run.  Small inputs are rotated
as well, so that no run meets the previous run's addresses.  TFLOP/s counts visible pairs only, TB/s visible keys.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from lz_compile.lowering import triton_ops
from lz_compile.lowering.semantic import (
    BOUND_COLUMNS,
    EMPTY_ROW,
    LOWER,
    NO_LOWER,
    NO_UPPER,
    STOP,
    UPPER,
    attend,
    visible_keys,
)
from lz_compile.lowering.triton_ops import SplitConfig, TileConfig

HEADS, KV_HEADS, SIZE = 32, 8, 128
L2_BYTES = 50 * 2**20


@dataclass(frozen=True)
class Case:
    """One shape and one mask: ``valid`` holds the number of keys of each batch row.

    ``key_mask``: the kernel is also given the key padding as a mask, of which the bounds say that it need not be read;
    so it runs in a model that got an attention mask.  ``empty_row`` as in ``attend``.
    """

    name: str
    batch: int
    queries: int
    keys: int
    valid: tuple[int, ...]
    causal: bool = False
    window: int = 0
    key_mask: bool = False
    empty_row: str = "zero"
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    size: int = SIZE
    tensors: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = field(default=(), compare=False, repr=False)

    def with_tensors(self) -> Case:
        kv_bytes = 2 * self.batch * self.kv_heads * self.keys * self.size * 2
        copies = max(1, min(8, -(-2 * L2_BYTES // kv_bytes)))

        def random(heads: int, length: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, length, self.size, device="cuda", dtype=torch.bfloat16)

        return replace(
            self,
            tensors=tuple(
                (random(self.heads, self.queries), random(self.kv_heads, self.keys), random(self.kv_heads, self.keys))
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

    @property
    def scale(self) -> float:
        return self.size**-0.5

    def flops(self) -> float:
        return 4.0 * self.heads * self.size * self.pairs()

    def bytes_read(self) -> float:
        return 4.0 * self.kv_heads * self.size * sum(self.valid)


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
    group = case.heads // case.kv_heads
    first = max(0, case.queries - 64)
    worst = 0.0
    for kv_head, row in ((0, 0), (case.kv_heads - 1, case.batch - 1)):
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
            scale=case.scale,
        )
        difference = (out[row : row + 1, head : head + 1, first:].double() - exact).abs().max()
        worst = max(worst, float(difference / exact.abs().max()))
    return worst


def sdpa(case: Case, backend: SDPBackend | None, masked: bool) -> Attention:
    """SDPA with ``is_causal`` or the boolean mask, held to one backend where one is named."""
    mask = case.mask() if masked else None

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=case.causal and mask is None, scale=case.scale, enable_gqa=True
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
    group = case.heads // case.kv_heads

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=case.scale)

    return run


def ours(case: Case, config: TileConfig | SplitConfig | None = None) -> Attention:
    bounds = case.bounds()
    key_mask = None
    if case.key_mask:
        key_mask = torch.arange(case.keys, device="cuda") < bounds[:, STOP, None]
    empty_row = EMPTY_ROW[case.empty_row]

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if case.queries == 1:
            assert config is None or isinstance(config, SplitConfig)
            return triton_ops.split_kv(
                query, key, value, bounds, key_mask, scale=case.scale, empty_row=empty_row, config=config
            )
        assert config is None or isinstance(config, TileConfig)
        return triton_ops.tiled(
            query, key, value, bounds, key_mask, scale=case.scale, empty_row=empty_row, config=config
        )

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


TILES = [
    (64, 32, 4, 2),
    (64, 32, 4, 3),
    (64, 32, 4, 4),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 2),
    (64, 128, 4, 3),
    (128, 32, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 128, 4, 2),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (256, 32, 16, 3),
    (256, 64, 16, 2),
]
TILE_CONFIGS = [TileConfig(*tile, one_loop) for tile in TILES for one_loop in (False, True)]
SPLIT_CONFIGS = [
    SplitConfig(block_n, splits, warps, stages)
    for block_n, warps, stages in ((64, 4, 3), (64, 4, 2), (32, 4, 4), (128, 4, 2), (128, 8, 2), (32, 2, 4))
    for splits in (0, 8, 16, 32)
]

# Compiling a setting costs a second or two: the tuner keeps to the shapes on which settings differ.
TUNED_PREFILL = [
    Case("causal B=8 S=1024", 8, 1024, 1024, (1024,) * 8, causal=True),
    Case("causal B=8 S=1024, 4 rows half padded", 8, 1024, 1024, (1024, 512) * 4, causal=True, key_mask=True),
    Case("causal S=8192", 1, 8192, 8192, (8192,), causal=True),
    Case("window 4096, S=16384", 1, 16384, 16384, (16384,), causal=True, window=4096),
]
# A mean of half the keys, as padded batches have it.
RAGGED = tuple(16 * (row + 1) for row in range(32))
TUNED_PREFILL += [
    Case("causal B=8 S=1024 D=64", 8, 1024, 1024, (1024,) * 8, causal=True, heads=16, kv_heads=16, size=64),
    Case("encoder B=32 S=512 D=64", 32, 512, 512, RAGGED, key_mask=True, heads=16, kv_heads=16, size=64),
    Case("encoder B=32 S=512 D=64, no padding", 32, 512, 512, (512,) * 32, heads=16, kv_heads=16, size=64),
]
TUNED_DECODE = [
    case
    for case in DECODE
    if case.name
    in (
        "decode B=1 cache 4096, 4096 valid",
        "decode B=1 cache 16384, 1000 valid",
        "decode B=16 cache 16384, 16384 valid",
        "decode B=16 cache 4096, 1000 valid",
    )
]
ROUNDS = 3
# After the first round only settings within this factor of the fastest are timed on.
STILL_RUNNING = 1.3
# How many of the fastest settings are timed with the kernel for empty rows as well.
FINALISTS = 4


@dataclass
class Entrant:
    """One setting (or SDPA, with ``config`` None) on one case: the median of each round, or why there is none."""

    case: Case
    name: str
    config: TileConfig | SplitConfig | None
    attention: Attention | None = None
    us: list[float] = field(default_factory=list)
    error: float = 0.0
    failure: str = ""

    def median(self) -> float:
        return statistics.median(self.us) if self.us else float("inf")

    def record(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "empty_row": self.case.empty_row,
            "kernel": self.name,
            "config": None if self.config is None else self.config._asdict(),
            "us": self.us,
            "error": self.error,
            "failure": self.failure,
        }


def tune(cases: list[Case], seconds: float, json_path: str | None) -> None:
    """Times every setting on every case, in rounds over all of them so that drift meets all alike, until ``seconds``
    are over; and the fastest ones again with the kernel for empty rows, which finds none here."""
    deadline = time.monotonic() + seconds
    entrants: list[Entrant] = []
    for case in cases:
        case = case.with_tensors()
        field_of_case = list(entries(case))
        compile_all(field_of_case)
        race(field_of_case, ROUNDS, deadline)
        if case.queries > 1 and time.monotonic() < deadline:
            best = sorted((e for e in field_of_case if e.config is not None and e.us), key=Entrant.median)[:FINALISTS]
            ready = replace(case, empty_row="unmasked")
            again = [Entrant(ready, e.name, e.config, ours(ready, e.config)) for e in best]
            compile_all(again)
            race(again, ROUNDS, deadline)
            field_of_case += again
        show(field_of_case)
        entrants += [replace(e, attention=None, case=replace(e.case, tensors=())) for e in field_of_case]
        if json_path:
            Path(json_path).parent.mkdir(parents=True, exist_ok=True)
            report = {
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name(),
                "results": [e.record() for e in entrants],
            }
            Path(json_path).write_text(json.dumps(report, indent=1))


def entries(case: Case) -> Iterator[Entrant]:
    decode = case.queries == 1
    configs: list[TileConfig] | list[SplitConfig] = SPLIT_CONFIGS if decode else TILE_CONFIGS
    for name, attention in contestants(case):
        if name == "SDPA, boolean mask" and not decode:
            continue  # a replay of it is an illegal memory access (torch 2.11, H100 and H200)
        yield Entrant(case, f"{name}, its own choice" if name in ("split_kv", "tiled") else name, None, attention)
    for config in configs:
        yield Entrant(case, "split_kv" if decode else "tiled", config, ours(case, config))


def compile_all(entrants: list[Entrant]) -> None:
    """Calls each once: SDPA one by one, as its backends are chosen for the whole process, and settings many at a time,
    as Triton compiles outside of the interpreter lock for the most part."""

    def first_call(entrant: Entrant) -> None:
        assert entrant.attention is not None
        try:
            entrant.error = error(entrant.attention, entrant.case)
            if not entrant.error < 0.02:
                entrant.failure = f"WRONG by {entrant.error:.1e}"
        except Exception as reason:  # a setting that does not fit the machine is an answer, not a failure
            entrant.failure = f"{type(reason).__name__}: {str(reason).splitlines()[0][:60]}"

    for entrant in entrants:
        if entrant.config is None:
            first_call(entrant)
    with ThreadPoolExecutor(max_workers=12) as pool:
        list(pool.map(first_call, (entrant for entrant in entrants if entrant.config is not None)))


def race(entrants: list[Entrant], rounds: int, deadline: float) -> None:
    """Times all of them, in graphs, up to ``rounds`` times; what fails or comes too late has no times."""
    for entrant in entrants:
        if not entrant.failure:
            assert entrant.attention is not None
            try:
                entrant.attention = as_graph(entrant.attention, entrant.case)
                for tensors in entrant.case.tensors:
                    entrant.attention(*tensors)
                torch.cuda.synchronize()
            except torch.AcceleratorError as reason:  # nothing runs in this process from here on
                line = str(reason).splitlines()[0]
                raise SystemExit(f"{entrant.name} {entrant.config} on {entrant.case.name}: {line}") from None
            except Exception as reason:
                entrant.failure = f"{type(reason).__name__}: {str(reason).splitlines()[0][:60]}"
    running = [entrant for entrant in entrants if not entrant.failure]
    for _ in range(rounds):
        for entrant in running:
            if time.monotonic() < deadline:
                assert entrant.attention is not None
                try:
                    entrant.us.append(time_us(entrant.attention, entrant.case))
                except torch.AcceleratorError as reason:
                    line = str(reason).splitlines()[0]
                    raise SystemExit(f"{entrant.name} {entrant.config} on {entrant.case.name}, timed: {line}") from None
        fastest = min((entrant.median() for entrant in running if entrant.config is not None), default=0.0)
        running = [e for e in running if e.config is None or e.median() <= STILL_RUNNING * fastest]


def show(entrants: list[Entrant]) -> None:
    print(f"\n{'case':38} {'empty row':9} {'us':>8} {'spread':>6} {'rate':>14}  kernel")
    for entrant in sorted(entrants, key=Entrant.median):
        label = entrant.name if entrant.config is None else f"{entrant.name} {tuple(entrant.config)}"
        case = entrant.case
        if not entrant.us:
            print(
                f"{case.name:38} {case.empty_row:9} {'':8} {'':6} {'':14}  {label}: {entrant.failure or 'no time left'}"
            )
            continue
        us = entrant.median()
        spread = max(entrant.us) - min(entrant.us)
        print(
            f"{case.name:38} {case.empty_row:9} {us:8.1f} {spread:6.1f} {rate(case, us):>14}  {label}",
            flush=True,
        )


class Recorder:
    """Takes a kernel's place in ``triton_ops`` and keeps the arguments of the launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.arguments.update


def print_resources() -> None:
    """What each setting takes of an SM (registers, shared memory, spills), as compiled for sm_90 on any machine."""
    from lz_compile.lowering.triton_kernels import empty_rows_kernel, tiled_kernel

    print(f"{'kernel':18} {'setting':28} {'key mask':8} {'regs':>5} {'shared':>7} {'stack':>6} {'programs/SM':>11}")
    query, key = (torch.empty(8, 1024, heads, SIZE, dtype=torch.bfloat16, device="meta") for heads in (HEADS, KV_HEADS))
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    bounds = torch.empty(8, BOUND_COLUMNS, dtype=torch.int32, device="meta")
    padding = torch.empty(8, 1024, dtype=torch.bool, device="meta")
    for config, key_mask in itertools.product(TILE_CONFIGS, (None, padding)):
        launchers = Recorder(tiled_kernel), Recorder(empty_rows_kernel)
        triton_ops._run_tiled(
            launchers,
            query,
            key,
            key,
            bounds,
            key_mask,
            None,
            None,
            None,
            SIZE**-0.5,
            0.0,
            0,
            EMPTY_ROW["unmasked"],
            config,
        )
        print_resources_of(launchers[0], str(tuple(config)), key_mask is not None)
    print_resources_of(launchers[1], "", False)


def print_resources_of(recorder: Recorder, setting: str, key_mask: bool) -> None:
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.bfloat16: "*bf16", torch.int32: "*i32", torch.bool: "*i1", torch.int8: "*i8"}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for index, parameter in enumerate(recorder.kernel.params):
        argument = recorder.arguments[parameter.name]
        if isinstance(argument, torch.Tensor):
            signature[parameter.name] = types[argument.dtype]
        elif parameter.is_constexpr or argument == 1:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = argument
            continue
        else:
            signature[parameter.name] = "fp32" if isinstance(argument, float) else "i32"
        if isinstance(argument, torch.Tensor) or (isinstance(argument, int) and argument % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: recorder.arguments[name] for name in ("num_warps", "num_stages")}
    name = recorder.kernel.__name__
    try:
        source = ASTSource(recorder.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as reason:
        print(f"{name:18} {setting:28} {type(reason).__name__}: {str(reason).splitlines()[0][:60]}")
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(inspect.getfile(nvidia)).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[0]) for word in ("REG", "STACK"))
    shared = compiled.metadata.shared
    # An SM has 64 Ki registers and 228 KiB of shared memory, of which each program takes 1 KiB more than it asks for.
    programs = min(65536 // (-(-registers // 8) * 8 * 32 * options["num_warps"]), 228 * 1024 // (shared + 1024))
    print(f"{name:18} {setting:28} {key_mask!s:8} {registers:5} {shared:7} {stack:6} {programs:11}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["prefill", "decode"], help="one of the two kernels")
    parser.add_argument("--case", default="", help="cases whose name holds this")
    parser.add_argument("--tune", action="store_true", help="time launch settings instead of comparing with SDPA")
    parser.add_argument("--seconds", type=float, default=180.0, help="no timing of --tune starts later (default 180)")
    parser.add_argument("--json", metavar="FILE", help="where --tune writes all that it has measured")
    parser.add_argument(
        "--dry", action="store_true", help="compile the prefill settings for sm_90 and print their needs"
    )
    arguments = parser.parse_args()
    if arguments.dry:
        print_resources()
        return
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    prefill, decode = (TUNED_PREFILL, TUNED_DECODE) if arguments.tune else (PREFILL, DECODE)
    cases = (prefill if arguments.only != "decode" else []) + (decode if arguments.only != "prefill" else [])
    cases = [case for case in cases if arguments.case in case.name]
    if arguments.tune:
        tune(cases, arguments.seconds, arguments.json)
    else:
        compare(cases)


if __name__ == "__main__":
    main()
