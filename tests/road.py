"""Test helpers: the road without Inductor's code generation, tiny models, error against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from lz_compile import config
from lz_compile.backend import improve
from lz_compile.report import GraphReport, RegionReport


class Road:
    """A Dynamo backend that plans and rewrites as "layerzero" does, then runs the graph as it is.

    It makes the same graph that Inductor would get, in a tenth of the time.  ``regions`` collects what it found.
    """

    def __init__(self, **settings: Any) -> None:
        self.graphs: list[GraphReport] = []
        self.modules: list[fx.GraphModule] = []
        self.settings = {"strict": True, **settings}

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with config.patch(self.settings):
            report = GraphReport.start(None, None)
            rewritten = improve(module, report)
        self.graphs.append(report)
        if rewritten is None:
            return module.forward
        rewritten.graph.lint()
        self.modules.append(rewritten)
        return rewritten.forward

    @property
    def regions(self) -> list[RegionReport]:
        return [region for graph in self.graphs for region in graph.regions]

    @property
    def kernels(self) -> list[str]:
        return [region.kernel for region in self.regions]

    def targets(self) -> list[Any]:
        """Operators of all rewritten graphs."""
        return [node.target for module in self.modules for node in module.graph.nodes if node.op == "call_function"]


def compile_road(fn: Any, dynamic: bool | None = False, **settings: Any) -> tuple[Any, Road]:
    """``fn`` compiled with the road only, and the backend that shows what happened."""
    torch._dynamo.reset()
    road = Road(**settings)
    return torch.compile(fn, backend=road, dynamic=dynamic), road


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy with parameters in ``dtype``; buffers such as RoPE's frequencies keep their precision."""
    result = copy.deepcopy(model)
    for parameter in result.parameters():
        parameter.data = parameter.data.to(dtype)
    return result


def median_error(run: Callable[[int], torch.Tensor], reference: Callable[[int], torch.Tensor]) -> float:
    """Median over three inputs of the largest absolute difference, relative to the largest value."""
    errors = []
    for seed in range(3):
        expected = reference(seed).double()
        got = run(seed).double()
        assert torch.equal(got.isnan(), expected.isnan())
        difference = (got - expected).nan_to_num().abs().max() / expected.nan_to_num().abs().max()
        errors.append(float(difference))
    return sorted(errors)[1]
