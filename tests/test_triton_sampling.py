"""Filters by threshold search against the warpers: in Triton's interpreter on a CPU, compiled on a GPU.

On the CPU PyTorch's sort is not stable: which of equal scores go is then compared with a stable sort's, as on CUDA.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import lz_compile
from lz_compile.lowering import sampling_ops
from lz_compile.lowering.kernels import registered
from lz_compile.lowering.triton_sampling import FILTERS, UNSETTLED
from lz_compile.region import Provider
from road import compile_road

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.usefixtures("interpreter_reads_loop_bounds")

ODD = {
    "normal": lambda x: x,
    "flat": lambda x: x / 8,
    "peaked": lambda x: x * 6,
    "ties": lambda x: x.round(),
    "equal": torch.zeros_like,
    "both zeros": lambda x: torch.where(x > 0, 0.0, -0.0),
    "half of it -inf": lambda x: x.masked_fill(x > 0, -torch.inf),
    "all -inf": lambda x: torch.full_like(x, -torch.inf),
    "one infinity": lambda x: x.masked_fill(x == x.max(), torch.inf),
    "some NaN": lambda x: x.masked_fill(x > 1, torch.nan),
    "tiny": lambda x: x * 1e-42,
    "large": lambda x: x * 1e36,
}


def rows(names: list[str], size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([ODD[name](torch.randn(size, generator=generator)) for name in names]).to(DEVICE)


def stable_top_p(x: torch.Tensor, share: float) -> torch.Tensor:
    """The top-p warper with a sort that keeps equal scores in order."""
    ordered, order = x.sort(stable=True)
    removed = ordered.softmax(-1).cumsum(-1) <= share
    removed[..., -1:] = False
    return x.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def search(x: torch.Tensor, splits: int, top_k: int = 0, share: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = (sampling_ops.largest_kernel, sampling_ops.pass_kernel, sampling_ops.apply_kernel)
    return sampling_ops._run(kernels, x, not top_k, share, x.shape[1] - top_k, -torch.inf, splits)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize(("size", "splits", "top_k"), [(90, 1, 1), (90, 1, 90), (140, 2, 7)])
def test_top_k_keeps_exactly_the_warpers_set(size: int, splits: int, top_k: int) -> None:
    names = list(ODD) if top_k == 7 else ["ties", "some NaN", "half of it -inf"]
    x = rows(names, size)
    got, _ = search(x, splits, top_k=top_k)
    assert same_bits(got, TopKLogitsWarper(top_k)(None, x))


@pytest.mark.parametrize(("size", "splits", "share"), [(90, 1, 0.5), (144, 2, 0.125)])
def test_top_p_keeps_the_warpers_set_but_where_it_says_that_it_may_not(size: int, splits: int, share: float) -> None:
    names = [name for name in ODD if size == 144 or name in ("ties", "flat", "one infinity")]
    x = rows(names, size)
    got, doubts = search(x, splits, share=share)
    expected = stable_top_p(x, share)
    for row, name in enumerate(names):
        assert doubts[row] or same_bits(got[row], expected[row]), name
    # Sums that meet the limit exactly: an eighth, or half, of equal scores.
    assert {names[row] for row in doubts.nonzero().flatten().tolist()} <= {"equal", "both zeros", "tiny"}


def test_equal_scores_at_the_boundary_go_in_order_of_the_row_across_splits() -> None:
    x = torch.zeros(1, 200, device=DEVICE)
    x[0, 5] = 1.0
    got, doubts = search(x, 2, share=0.75)
    assert same_bits(got, stable_top_p(x, 0.75)) and not doubts.any()
    gone = (got == -torch.inf)[0]
    assert 128 < int(gone.sum()) < 200 and not gone[int(gone.nonzero().max()) + 1 :].any()


def test_doubtful_rows_become_the_warpers_and_no_others() -> None:
    x = rows(["normal", "flat", "peaked"], 300)
    out = torch.full_like(x, 7.0)
    doubts = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    share = 0.1
    settled = torch.ops.lz_compile.settle_top_p_v1(x, out, doubts, share, -torch.inf)
    assert same_bits(settled[1], TopPLogitsWarper(0.9)(None, x)[1]) and bool((settled[::2] == 7.0).all())
    untouched = torch.ops.lz_compile.settle_top_p_v1(x, out, torch.zeros_like(doubts), share, -torch.inf)
    assert torch.equal(untouched, out) and untouched.data_ptr() != out.data_ptr()


def test_the_doubt_is_said_where_the_limit_is_next_to_a_sum() -> None:
    x = torch.log(torch.tensor([[0.125, 0.25, 0.5, 0.125]], device=DEVICE))
    for share, doubtful in ((0.25, True), (0.25 * (1 + 1e-6), True), (0.25 * (1 - 1e-6), True), (0.26, False)):
        _, doubts = search(x, 1, share=share)
        assert bool(doubts[0]) == doubtful, share


def test_programs_a_row_fill_the_device_and_are_no_more_than_there_is_work() -> None:
    assert sampling_ops.splits_of(16, 128256, 132) == 32
    assert sampling_ops.splits_of(1, 128256, 132) == 64
    assert sampling_ops.splits_of(1000, 128256, 132) == 1
    assert sampling_ops.splits_of(1, 100, 132) == 1


CHAIN = LogitsProcessorList(
    [TemperatureLogitsWarper(0.8), TopKLogitsWarper(30), TopPLogitsWarper(0.8), MinPLogitsWarper(0.02)]
)


@pytest.mark.parametrize("settled", [True, False])
def test_a_chain_runs_by_it(settled: bool) -> None:
    kernel = FILTERS if settled else UNSETTLED
    x = rows(["normal", "peaked"], 90)
    if not CUDA:
        kernel = dataclasses.replace(kernel, name="mine.filters", supports=lambda region: None, devices=())
    with registered(Provider("mine", () if CUDA else (kernel,))):
        run, road = compile_road(lambda x: CHAIN(None, x), prefer=[kernel.name], rounded_filters=True)
        assert same_bits(run(x), CHAIN(None, x))
    assert road.kernels == [kernel.name]
    assert (torch.ops.lz_compile.settle_top_p_v1.default in road.targets()) == settled


def test_what_it_does_not_take_it_says() -> None:
    with registered(Provider("mine", (dataclasses.replace(FILTERS, name="mine.filters", devices=()),))):
        run, road = compile_road(lambda x: CHAIN(None, x), measure="off")
        x = rows(["normal"], 90).cpu()
        run(x)
    assert road.regions[0].rejected["mine.filters"] == "runs on CUDA"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lz_compile.lowering import sampling_kernels as kernels

TYPES = {"size": "i32", "stride": "i32", "share": "fp32", "fewer": "i32", "fill": "fp32", "wide": "i32", "shift": "i32",
         "scores": "*fp32", "largest": "*fp32", "lows": "*i64", "new_lows": "*i64", "doubts": "*i32", "out": "*fp32"}
CONSTANTS = {"CHUNK": 4096, "OUTER": 1024, "SPLITS": 32}
for kernel in (kernels.largest_kernel, kernels.pass_kernel, kernels.apply_kernel):
    for weighted in (True, False):
        constants = {**CONSTANTS, "WEIGHTED": weighted}
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else TYPES.get(n, "*fp64") for n in names}
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items() if n in names})
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert binary.asm["cubin"]
print("compiled")
"""


@pytest.mark.skipif(CUDA, reason="the other tests compile them")
def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter lets types change inside a branch, which the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


# -- on a GPU


def _gpu_rows(count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(count, size, generator=generator, device="cuda")
    x *= 6 * torch.rand(count, 1, generator=generator, device="cuda")
    half = torch.rand(count, size, generator=generator, device="cuda") < 0.5
    x[::5] = x[::5].round()
    x[1::7] = x[1::7].masked_fill(half[1::7], -torch.inf)
    x[2::50] = 1.5
    x[3::50] = -torch.inf
    x[4::50, 7] = torch.inf
    x[6::50, 3] = torch.nan
    x[8::10] = x[8::10].bfloat16().float()
    return x


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("size", [1000, 32000, 128256])
def test_ten_thousand_rows_on_a_gpu_keep_exactly_the_warpers_set(size: int) -> None:
    for seed in range(625 if size == 128256 else 10):
        x = _gpu_rows(16 if size == 128256 else 1000, size, seed)
        for warper in (TopKLogitsWarper(50), TopPLogitsWarper(0.9)):
            if isinstance(warper, TopKLogitsWarper):
                got = torch.ops.lz_compile.filter_top_k_v1(x, 50, -torch.inf)
            else:
                share = float(torch.tensor(1 - warper.top_p))
                out, doubts = torch.ops.lz_compile.filter_top_p_v1(x, share, -torch.inf)
                got = torch.ops.lz_compile.settle_top_p_v1(x, out, doubts, share, -torch.inf)
            assert same_bits(got, warper(None, x)), (seed, type(warper).__name__)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_chain_compiles_on_a_gpu_where_inductor_alone_may_not(mode: str | None) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return CHAIN(None, x * 2)

    torch._dynamo.reset()
    counters.clear()
    with lz_compile.config.patch(measure="auto", measure_budget=120.0, strict=True, rounded_filters=mode is not None):
        run: Any = torch.compile(step, backend="layerzero", mode=mode)
        for seed in range(4):
            x = _gpu_rows(16, 32000, seed)[:2]
            got, expected = run(x).clone(), step(x)
            assert int((got != expected).nan_to_num().sum()) <= (0 if mode is None else 1)
    (region,) = lz_compile.reports()[-1].regions
    assert region.kernel in ("triton.filters", "triton.filters_unsettled", "aten.warpers")
    if mode is not None:
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_compiled_graph_knows_that_only_results_are_written() -> None:
    """What Inductor takes for written it copies first: here that would be the scores."""
    from torch._dynamo.backends.common import aot_autograd

    cloned: list[set[str]] = []

    def look(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nodes = [node for node in module.graph.nodes if "tensors_to_clone" in node.kwargs]
        cloned.extend(set(node.kwargs["tensors_to_clone"]) for node in nodes)
        return module.forward

    torch._dynamo.reset()
    x = _gpu_rows(4, 5000, 0)
    run = torch.compile(
        lambda x: torch.ops.lz_compile.filter_top_p_v1(x, 0.1, -torch.inf)[0],
        backend=aot_autograd(fw_compiler=look),
    )
    with torch.no_grad():
        assert same_bits(run(x), torch.ops.lz_compile.filter_top_p_v1(x, 0.1, -torch.inf)[0])
    found = {"new_sums", "new_lows"}
    assert cloned == [{"out"}, *[found] * len(sampling_ops.SHIFTS), {"out", "doubts"}]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_replay_follows_its_input() -> None:
    x = _gpu_rows(4, 5000, 0)
    torch.ops.lz_compile.filter_top_p_v1(x, 0.1, -torch.inf)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = torch.ops.lz_compile.filter_top_p_v1(x, 0.1, -torch.inf)
    x.copy_(_gpu_rows(4, 5000, 1))
    graph.replay()
    assert same_bits(out, torch.ops.lz_compile.filter_top_p_v1(x, 0.1, -torch.inf)[0])
