"""The road: a Dynamo graph becomes a compiled function with the best kernels in it.

    Dynamo graph -> normalise -> find regions -> plan -> rewrite -> Inductor

This is the only module that sees patterns, kernels, planner and reports together.  Each step leaves a receipt in the
report.  A step that fails leaves the graph to Inductor as it came (``config.strict`` raises instead).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch.fx as fx

from lz_compile import config
from lz_compile.aliasing import Aliases
from lz_compile.normalize import LeftAlone, module_path, normalize, spell_out_constants
from lz_compile.options import split_options
from lz_compile.plan import INDUCTOR, Plan, first_fit
from lz_compile.region import Region
from lz_compile.report import GraphReport, RegionReport, publish, watched
from lz_compile.rewrite import rewrite

log = logging.getLogger("lz_compile")


def layerzero(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend ``"layerzero"``: ``torch.compile(model, backend="layerzero", mode=..., options=...)``.

    ``mode`` means what it means to Inductor.  ``options`` holds settings of :mod:`lz_compile.config` and of Inductor.

    Raises:
        OptionError: an unknown mode or option.
    """
    from torch._inductor.compile_fx import compile_fx

    ours, inductor = split_options(mode, options)
    with config.patch(ours):
        report = GraphReport.start(mode, options)
        rewritten = improve(module, report)
        with report.step("Inductor"):
            compiled = _compile(compile_fx, module, rewritten, example_inputs, inductor, report)
    publish(report)
    return watched(compiled, report)


def _reset() -> None:
    """torch._dynamo.reset() resets CUDA-graph trees as it does for Inductor."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


layerzero.reset = _reset  # type: ignore[attr-defined]


def improve(module: fx.GraphModule, report: GraphReport) -> fx.GraphModule | None:
    """The rewritten graph, or None when nothing was replaced; the report says why."""
    with report.step("normalise") as receipt:
        normal = None
        with _left_to_inductor(report, "normalise"):
            normal = normalize(module)
        if normal is None:
            receipt.note = report.reason
            return None
        receipt.note = f"{len(module.graph.nodes)} Dynamo nodes, {len(normal.graph.nodes)} ATen nodes"
    replaced = 0
    with _left_to_inductor(report, "rewrite"):
        replaced = _transform(normal, report)
        if replaced:
            spell_out_constants(normal)
    return normal if replaced else None


def _transform(normal: fx.GraphModule, report: GraphReport) -> int:
    from lz_compile.lowering.emit import Emitter
    from lz_compile.lowering.kernels import KERNELS
    from lz_compile.patterns.attention import find_attention
    from lz_compile.patterns.rope_tables import find_rope_tables

    with report.step("match") as receipt:
        aliases = Aliases(normal.graph)
        regions: list[Region] = []
        if "attention" in config.kinds:
            regions += find_attention(normal.graph, aliases, module_path)
        receipt.note = f"{len(regions)} attention sites"
        if regions and "rope_table" in config.kinds:
            regions += find_rope_tables(normal.graph, module_path)
    if not regions:
        report.reason = report.reason or "nothing to replace"
        return 0
    with report.step("plan") as receipt:
        plan = first_fit(regions, KERNELS)
        # A table that no kernel stores is what Inductor does anyway: nothing to report.
        plan.choices = [c for c in plan.choices if c.kernel is not None or c.region.kind == "attention"]
        receipt.note = plan.planner
    described = [RegionReport.describe(choice) for choice in plan.choices]
    with report.step("rewrite") as receipt:
        replaced = rewrite(normal, aliases, plan, Emitter)
        receipt.note = f"{replaced} of {len(regions)} regions replaced"
    report.regions = _settled(described, plan)
    return replaced


def _settled(described: list[RegionReport], plan: Plan) -> list[RegionReport]:
    """Descriptions are taken before the rewrite (it removes nodes), the outcome after it."""
    for entry, choice in zip(described, plan.choices):
        entry.kernel = choice.kernel.name if choice.kernel else INDUCTOR
        entry.reason = choice.reason
        entry.rejected = dict(choice.rejected)
    return described


@contextlib.contextmanager
def _left_to_inductor(report: GraphReport, step: str) -> Iterator[None]:
    """Swallows a failure of ours: the graph then goes to Inductor, the report and one warning say why."""
    try:
        yield
    except LeftAlone as reason:
        report.reason = str(reason)
    except Exception as error:
        if config.strict:
            raise
        report.reason = f"{step} failed: {type(error).__name__}: {error}"
        for entry in report.regions:
            entry.kernel, entry.reason = INDUCTOR, report.reason
        log.warning("lz-compile left a graph to Inductor: %s", report.reason)


def _compile(
    compile_fx: Callable[..., Any],
    original: fx.GraphModule,
    rewritten: fx.GraphModule | None,
    example_inputs: list[Any],
    inductor: dict[str, Any],
    report: GraphReport,
) -> Callable[..., Any]:
    if rewritten is None:
        return compile_fx(original, example_inputs, config_patches=inductor)
    try:
        return compile_fx(rewritten, example_inputs, config_patches=inductor)
    except Exception as error:
        if config.strict:
            raise
        report.reason = f"Inductor did not take the rewritten graph: {type(error).__name__}: {error}"
        log.warning("lz-compile left a graph to Inductor: %s", report.reason)
        for entry in report.regions:
            entry.kernel, entry.reason = INDUCTOR, report.reason
        return compile_fx(original, example_inputs, config_patches=inductor)
