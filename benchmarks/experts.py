"""Times the fused mixture of experts at few tokens against what Inductor makes of Transformers' experts; bfloat16.

    python benchmarks/experts.py                      # every model and number of tokens, with an error against float64
    python benchmarks/experts.py --only gpt-oss
    python benchmarks/experts.py --tune               # tiles, warps, stages and splits of both kernels instead
    python benchmarks/experts.py --tune --only gpt-oss --seconds 200

Each time is the median of ``triton.testing.do_bench`` over replays of a CUDA graph; it flushes L2 before every run.
TB/s counts the weights of the experts that some token chose, once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from triton.testing import do_bench

from lz_compile.lowering import moe_ops
from lz_compile.lowering.moe import moe
from lz_compile.lowering.moe_ops import ProductConfig
from lz_compile.moe import Moe, Router


@dataclass(frozen=True)
class Model:
    """A model's experts in Transformers; ``experts`` may be fewer than it has."""

    name: str
    prefix: str
    experts: int
    top_k: int
    size: int
    width: int

    def build(self) -> nn.Module:
        module = {"GptOss": "gpt_oss", "Mixtral": "mixtral", "Qwen3Moe": "qwen3_moe"}[self.prefix]
        settings: dict[str, Any] = {
            "hidden_size": self.size,
            "intermediate_size": self.width,
            "moe_intermediate_size": self.width,
            "num_local_experts": self.experts,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
        }
        config = getattr(transformers, f"{self.prefix}Config")(**settings)
        config._experts_implementation = "grouped_mm"
        library = getattr(transformers.models, module)
        with torch.device("cuda"):
            built = getattr(getattr(library, f"modeling_{module}"), f"{self.prefix}Experts")(config)
        for parameter in built.parameters():
            parameter.data = torch.randn_like(parameter, dtype=torch.bfloat16) / parameter.shape[-1] ** 0.5
        return built.eval().requires_grad_(False)

    @property
    def op(self) -> Moe:
        nodes: list[Any] = [None] * 7
        facts = (self.experts, self.top_k, self.width, "silu", True)
        if self.prefix == "GptOss":
            rest: tuple[Any, ...] = (True, 1.702, 7.0, 1.0, "in, out", "in, out")
        else:
            rest = (False, 1.0, None, 0.0, "out, in", "out, in")
        return Moe(*nodes, *facts, *rest, "grouped_mm", Router("unknown"))  # type: ignore[arg-type]


MODELS = [
    Model("gpt-oss, 8 experts", "GptOss", 8, 4, 2880, 2880),
    Model("gpt-oss-20b", "GptOss", 32, 4, 2880, 2880),
    Model("mixtral-8x7b", "Mixtral", 8, 2, 4096, 14336),
    Model("qwen3-30b-a3b", "Qwen3Moe", 128, 8, 2048, 768),
]
TOKENS = (1, 8, 32, 64)
TUNED_TOKENS = (1, 8)


class Case:
    """A model's experts with tokens that choose among them evenly."""

    def __init__(self, model: Model, module: nn.Module, tokens: int) -> None:
        self.model, self.module, self.tokens = model, module, tokens
        self.hidden = torch.randn(tokens, model.size, device="cuda", dtype=torch.bfloat16)
        self.indices = torch.rand(tokens, model.experts, device="cuda").argsort(-1)[:, : model.top_k].contiguous()
        self.weights = torch.randn(tokens, model.top_k, device="cuda").softmax(-1).to(torch.bfloat16)
        names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        self.parameters = [getattr(module, name, None) for name in names]
        self.name = f"{model.name}, {tokens} tokens"

    def terms(self, configs: tuple[ProductConfig, ProductConfig] | None = None) -> torch.Tensor:
        op = self.model.op
        along_k = op.gate_up_layout == "out, in"
        facts = (op.activation, op.gated, op.interleaved, op.alpha, op.limit, op.up_offset)
        values = (self.hidden, self.weights, self.indices, *self.parameters)
        return moe_ops.experts(*values, along_k, along_k, *facts, configs=configs)

    def configs(self) -> tuple[ProductConfig, ProductConfig]:
        along_k = self.model.op.gate_up_layout == "out, in"
        return moe_ops._configs(self.hidden, self.indices, *self.parameters[:2], along_k, along_k)

    def bytes_read(self) -> int:
        chosen = self.indices.unique().numel()
        return chosen * sum(weight[0].nbytes for weight in self.parameters[:2])

    def error(self, out: torch.Tensor) -> float:
        """The largest error over the largest answer, in float64."""
        values = (self.hidden.double(), self.weights.double(), self.indices, *self.parameters)
        expected = moe(*values, self.model.op)
        return float((out.double() - expected).abs().max() / expected.abs().max())


def time_us(run: Callable[[], Any]) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1000.0 * do_bench(graph.replay, warmup=20, rep=60, return_mode="median")


def show(case: Case, name: str, us: float, note: str = "") -> None:
    print(f"{case.name:32} {name:52} {us:8.1f} us {case.bytes_read() / us * 1e-6:6.2f} TB/s  {note}", flush=True)


def compare(model: Model) -> None:
    module = model.build()
    for tokens in TOKENS:
        case = Case(model, module, tokens)
        error = case.error(case.terms().sum(1))
        flag = "" if error < 0.02 else "  WRONG"
        show(case, "two kernels", time_us(case.terms), f"error {error:.1e}{flag}")
        show(case, "and the sum, eager", time_us(lambda case=case: case.terms().sum(1).to(torch.bfloat16)))
        torch._dynamo.reset()
        compiled = functools.partial(torch.compile(module, dynamic=False), case.hidden, case.indices, case.weights)
        try:
            error = case.error(compiled())
            rival = time_us(compiled)
        except Exception as reason:
            print(f"{case.name:32} Inductor: {type(reason).__name__}: {str(reason).splitlines()[0][:60]}")
            continue
        show(case, "Inductor, grouped_mm", rival, f"error {error:.1e}")


def settings(depth: int) -> Iterator[ProductConfig]:
    """Tiles of 8 to 32 KiB, as many stages as fit beside 16 rows of tokens."""
    for columns, block_k, warps, stages in itertools.product((32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (3, 4, 5)):
        tile = 2 * columns * block_k
        if 8 << 10 <= tile <= 32 << 10 and stages * (tile + 32 * block_k) <= 220 << 10 and block_k <= depth:
            yield ProductConfig(columns, block_k, warps, stages)


def tune(model: Model, deadline: float) -> None:
    """Varies the setting of one kernel while the other keeps its own; shows the ten fastest of each."""
    module = model.build()
    for tokens in TUNED_TOKENS:
        case = Case(model, module, tokens)
        own = case.configs()
        firsts = [(config, own[1]) for config in settings(model.size)]
        splits = [n for n in (1, 2, 4) if n * model.top_k <= 8]
        seconds = [(own[0], c._replace(splits=n)) for c in settings(model.width) for n in splits]
        for which, tried in (("gate_up", firsts), ("down", seconds)):
            expected = case.terms().sum(1)

            def compile_one(pair: tuple[ProductConfig, ProductConfig], case: Case = case) -> str:
                try:
                    case.terms(pair)
                except Exception as reason:  # a setting that does not fit the machine is an answer, not a failure
                    return f"{type(reason).__name__}: {str(reason).splitlines()[0][:60]}"
                return ""

            with ThreadPoolExecutor(max_workers=16) as pool:
                failures = list(pool.map(compile_one, tried))
            torch.cuda.synchronize()
            found = [(time_us(case.terms), own)]
            for pair, failure in zip(tried, failures):
                if failure or time.monotonic() > deadline:
                    continue
                got = case.terms(pair).sum(1)
                if not (got - expected).abs().max() <= 0.02 * expected.abs().max():
                    print(f"{case.name:32} WRONG: {pair}")
                    continue
                found.append((time_us(lambda case=case, pair=pair: case.terms(pair)), pair))
            at = 0 if which == "gate_up" else 1
            show(case, f"{which} {tuple(own[at])}", found[0][0], "its own choice")
            for us, pair in sorted(found)[:10]:
                show(case, f"{which} {tuple(pair[at])}", us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="models whose name holds this")
    parser.add_argument("--tune", action="store_true", help="time launch settings instead of comparing with Inductor")
    parser.add_argument("--seconds", type=float, default=300.0, help="no timing of --tune starts later (default 300)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    deadline = time.monotonic() + arguments.seconds
    for model in MODELS:
        if arguments.only is None or arguments.only in model.name:
            with torch.no_grad():
                tune(model, deadline) if arguments.tune else compare(model)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
