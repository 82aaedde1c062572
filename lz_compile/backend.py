"""The road: a Dynamo graph becomes a compiled function with the best kernels in it.

    Dynamo graph -> normalise -> find regions -> plan -> rewrite -> Inductor

This is the only module that sees patterns, kernels, planner and reports together.  Each step leaves a receipt in the
report.  A step that fails leaves the graph to Inductor as it came (``config.strict`` raises instead).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
from torch._dynamo.exc import RestartAnalysis

from lz_compile import config
from lz_compile.aliasing import Aliases
from lz_compile.channels import show_graph, tell
from lz_compile.normalize import LeftAlone, module_path, normalize, spell_out_constants
from lz_compile.options import split_options
from lz_compile.packing import Packing, memory_order
from lz_compile.policy import PolicyError
from lz_compile.projections import Projections
from lz_compile.region import INDUCTOR, Region
from lz_compile.report import GraphReport, RegionReport, publish, watched
from lz_compile.rewrite import as_laid_out, is_copied, laid_out, replace, rewrite

if TYPE_CHECKING:
    from lz_compile.dump import Dump
    from lz_compile.measure import Terms
    from lz_compile.plan import Market, Plan

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
        packing = Packing(example_inputs)
        with _told(report), _dumped(module, example_inputs, report) as dump:
            rewritten = improve(module, report, inductor, packing, dump)
            show_graph(rewritten)
            with report.step("Inductor"):
                compiled = _compile(compile_fx, module, rewritten, packing, inductor, report)
    publish(report)
    return watched(compiled, report)


@contextlib.contextmanager
def _told(report: GraphReport) -> Iterator[None]:
    """PyTorch's channels hear of the compile, also of one that raises; not of a trace that Dynamo starts again."""
    try:
        yield
    except torch._dynamo.exc.RestartAnalysis:
        raise
    except Exception:
        report.outcome = "raised"
        tell(report)
        raise
    tell(report)


def _reset() -> None:
    """torch._dynamo.reset() resets CUDA-graph trees as it does for Inductor."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


layerzero.reset = _reset  # type: ignore[attr-defined]


def _dumped(
    module: fx.GraphModule, example_inputs: list[Any], report: GraphReport
) -> contextlib.AbstractContextManager[Dump | None]:
    """The dump of this graph, None unless ``config.dump`` asks for one."""
    if not config.dump:
        return contextlib.nullcontext()
    from lz_compile.dump import dumped

    return dumped(module, example_inputs, report)


def improve(
    module: fx.GraphModule,
    report: GraphReport,
    inductor: dict[str, Any] | None = None,
    packing: Packing | None = None,
    dump: Dump | None = None,
) -> fx.GraphModule | None:
    """The rewritten graph, or None when nothing was replaced; the report says why.

    ``inductor`` are the config patches that Inductor will get.  Where ``packing`` is given parameters may move: the
    rewritten graph then takes ``packing.example_inputs()``.  ``dump`` writes down the graphs on the way.

    Raises:
        PolicyError: the user's policy cannot be read, or a lock in it cannot be honoured.
    """
    with report.step("normalise") as receipt:
        normal = None
        with _left_to_inductor(report, "normalise"):
            normal = normalize(module)
        if normal is None:
            receipt.note = report.reason
            return None
        receipt.note = f"{len(module.graph.nodes)} Dynamo nodes, {len(normal.graph.nodes)} ATen nodes"
    if dump is not None:
        dump.normalised(normal)
    rewritten = None
    with _left_to_inductor(report, "rewrite"):
        if _transform(normal, report, inductor or {}, packing, dump):
            spell_out_constants(normal)
            rewritten = normal
            report.outcome = "rewritten"
    if dump is not None and rewritten is not None:
        dump.rewritten(rewritten)
    return rewritten


def _transform(
    normal: fx.GraphModule,
    report: GraphReport,
    inductor: dict[str, Any],
    packing: Packing | None,
    dump: Dump | None = None,
) -> bool:
    """Changes the graph by what was found in it; whether anything was."""
    from lz_compile.graph_safety import skipped_reasons
    from lz_compile.lowering.emit import Emitter
    from lz_compile.lowering.inductor import as_it_stood
    from lz_compile.lowering.kernels import kernels, providers
    from lz_compile.measure import Terms
    from lz_compile.needed_rows import trim
    from lz_compile.patterns.attention import find_attention
    from lz_compile.patterns.latent import may_hold_latents
    from lz_compile.patterns.pointwise import POINTWISE, spans
    from lz_compile.patterns.rope_tables import find_rope_tables
    from lz_compile.plan import Market, joint
    from lz_compile.policy import active

    policy = active()
    trimmed = ""
    if config.trim_rows:
        with report.step("trim rows") as receipt:
            trimmed = trim(normal.graph, Aliases(normal.graph), Emitter)
            receipt.note = trimmed or "every row is read"
        report.trimmed = trimmed
    shifted = 0
    if "rolled_window" in config.kinds:
        with report.step("rolled windows") as receipt:
            shifted = _shift_windows(normal.graph, Aliases(normal.graph), Emitter)
            receipt.note = f"{shifted} move in place"
    absorbed = 0
    if config.absorb_latents and "attention" in config.kinds and may_hold_latents(normal.graph):
        with report.step("latents") as receipt:
            absorbed = _absorb_latents(normal.graph, Aliases(normal.graph), Emitter)
            receipt.note = f"{absorbed} attentions read them instead of expanding them"
    with report.step("libraries") as receipt:  # the first time on a machine each is tried out in a child process
        running = kernels()
        receipt.note = f"{len(running)} kernels"
    graphs = _uses_cuda_graphs(inductor)
    terms = Terms(config.measure, config.measure_budget, graphs, inductor, Emitter, laid_out)
    market = Market(running, {provider.name: provider for provider in providers()}, as_it_stood)
    packed: list[RegionReport] = []
    packs_here = config.pack_weights and _device_types(normal.graph) & set(config.pack_devices)
    if packing is not None and packs_here and "projections" in config.kinds:
        with report.step("pack weights") as receipt:
            packed, receipt.note = _pack_weights(normal.graph, market, terms, report.mode, packing)
    report.regions = packed
    with report.step("match") as receipt:
        aliases = Aliases(normal.graph)
        regions: list[Region] = []
        if "attention" in config.kinds:
            regions += find_attention(normal.graph, aliases, module_path)
        receipt.note = f"{len(regions)} attention sites"
        if regions and "rope_table" in config.kinds:
            regions += find_rope_tables(normal.graph, module_path)
        devices = _device_types(normal.graph)
        possible = {kernel.kind for kernel in running if not kernel.devices or devices & set(kernel.devices)}
        wanted = possible & set(config.kinds) & set(POINTWISE)
        for kind in sorted(wanted):
            regions += POINTWISE[kind](normal.graph, aliases, module_path)
        spans(regions)
    changed = bool(trimmed or shifted or absorbed or (packing is not None and packing.packs))
    if not regions:
        report.reason = report.reason or ("" if changed else "nothing to replace")
        return changed
    with report.step("plan") as receipt:
        plan = joint(regions, market, terms, policy, report.mode, is_copied)
        # A table that no kernel stores is what Inductor does anyway: nothing to report.
        plan.choices = [c for c in plan.choices if c.kernel is not None or c.region.kind != "rope_table"]
        receipt.note = "; ".join([plan.planner, *plan.notes])
        report.cost, report.greedy_cost = plan.cost, plan.greedy_cost
        if graphs:
            report.cuda_graphs = skipped_reasons(normal.graph)
    if plan.measured:
        report.set_apart("measure", plan.measured, plan.measuring)
    described = [RegionReport.describe(choice) for choice in plan.choices]
    if dump is not None:
        dump.regions(normal, plan)
    with report.step("rewrite") as receipt:
        replaced = rewrite(normal, aliases, plan, Emitter)
        receipt.note = f"{replaced} of {len(regions)} regions replaced"
    report.regions = _settled(described, plan) + packed
    return bool(replaced or changed)


def _shift_windows(graph: fx.Graph, aliases: Aliases, make_emitter: Callable[..., Any]) -> int:
    """Full sliding caches move their rows in place; how many do."""
    from lz_compile.lowering.rolled import shift_in, takes
    from lz_compile.patterns.cache import find_rolled_windows

    windows = [window for window in find_rolled_windows(graph, aliases) if takes(window.cache.meta["val"])]
    emitter = make_emitter(graph, aliases)
    for window in windows:
        shift_in(emitter, window.write, window.cache, window.new)
        window.write.replace_all_uses_with(window.cache)
        for node in window.nodes:
            graph.erase_node(node)
    return len(windows)


def _absorb_latents(graph: fx.Graph, aliases: Aliases, make_emitter: Callable[..., Any]) -> int:
    """Attentions whose keys and values are made of latents read the latents; how many do."""
    from lz_compile.lowering.latent import attend_to_latents, refuses_latents
    from lz_compile.patterns.attention import find_attention
    from lz_compile.patterns.latent import find_latents

    found = find_latents(find_attention(graph, aliases, module_path), aliases)
    emitter = make_emitter(graph, aliases)
    results = [
        (latent.region, as_laid_out(emitter, latent.region.output, attend_to_latents(emitter, latent)))
        for latent in found
        if refuses_latents(latent) is None
    ]
    replace(graph, results)
    return len(results)


def _pack_weights(
    graph: fx.Graph, market: Market, terms: Terms, mode: str, packing: Packing
) -> tuple[list[RegionReport], str]:
    """Linear layers that read one value become one, where that is faster and their parameters may move."""
    from lz_compile.lowering.emit import Emitter
    from lz_compile.lowering.projections import replace_by_packed
    from lz_compile.needed_rows import relay
    from lz_compile.patterns.projections import find_projections
    from lz_compile.plan import joint
    from lz_compile.policy import active

    aliases = Aliases(graph)
    regions = find_projections(graph, aliases, module_path)
    if not regions:
        return [], "no linear layers of a module share an input"
    positions = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}

    def ordered(op: Projections) -> Projections:
        order = memory_order([packing.inputs[positions[weight]] for weight in op.weights])
        weights, members = (tuple(nodes[i] for i in order) for nodes in (op.weights, op.members))
        return Projections(op.input, weights, tuple(op.biases[i] for i in order) if op.biases else (), members)

    def groups(op: Projections) -> list[list[int]]:
        return [[positions[node] for node in nodes] for nodes in (op.weights, op.biases) if nodes]

    for region in regions:
        if terms.inductor.get("freezing", torch._inductor.config.freezing):
            region.declined = region.declined or "Inductor freezes the weights"
        if not region.declined:
            region.declined = packing.why_not(groups(ordered(region.op)))
    plan = joint(regions, market, terms, active(), mode, is_copied)
    described = [RegionReport.describe(choice) for choice in plan.choices]
    emitter, moved = Emitter(graph, aliases), set()
    for choice in plan.choices:
        if choice.kernel is None:
            continue
        op = ordered(choice.region.op)
        if reason := packing.pack(groups(op)):
            choice.kernel, choice.reason, choice.cause = None, reason, "weights stay"
            continue
        moved |= set(replace_by_packed(emitter, op, choice.region.output))
    if moved:
        before = _strides(graph)
        relay(graph, Aliases(graph), Emitter, moved)
        if _strides(graph) != before:
            raise RuntimeError("packed weights change the memory layout of a result")
    count = sum(choice.kernel is not None for choice in plan.choices)
    return _settled(
        described, plan
    ), f"{count} of {len(regions)} groups of linear layers; {plan.measuring or plan.planner}"


def _strides(graph: fx.Graph) -> list[Any]:
    values = [node.meta.get("val") for node in graph.output_node().all_input_nodes]
    return [value.stride() if isinstance(value, torch.Tensor) else None for value in values]


def _device_types(graph: fx.Graph) -> set[str]:
    values = [node.meta.get("val") for node in graph.nodes]
    return {value.device.type for value in values if isinstance(value, torch.Tensor)}


def _uses_cuda_graphs(inductor: dict[str, Any]) -> bool:
    import torch._inductor.config as inductor_config

    return bool(inductor.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def _settled(described: list[RegionReport], plan: Plan) -> list[RegionReport]:
    """Descriptions are taken before the rewrite (it removes nodes), the outcome after it."""
    for entry, choice in zip(described, plan.choices):
        entry.kernel = choice.kernel.name if choice.kernel else INDUCTOR
        entry.reason, entry.cause = choice.reason, choice.cause
        entry.rejected = dict(choice.rejected)
    return described


@contextlib.contextmanager
def _left_to_inductor(report: GraphReport, step: str) -> Iterator[None]:
    """Swallows a failure of ours: the graph then goes to Inductor, the report and one warning say why."""
    try:
        yield
    except LeftAlone as reason:
        report.reason, report.outcome = str(reason), "unsupported"
    except PolicyError:
        raise
    except Exception as error:
        if config.strict:
            raise
        report.failed(f"{step} failed: {type(error).__name__}: {error}")
        log.warning("lz-compile left a graph to Inductor: %s", report.reason)


def _compile(
    compile_fx: Callable[..., Any],
    original: fx.GraphModule,
    rewritten: fx.GraphModule | None,
    packing: Packing,
    inductor: dict[str, Any],
    report: GraphReport,
) -> Callable[..., Any]:
    def as_it_came() -> Callable[..., Any]:
        compiled = compile_fx(original, packing.unpacked_inputs(), config_patches=inductor)
        return packing.bind(compiled)

    if rewritten is None:
        return as_it_came()
    try:
        compiled = compile_fx(rewritten, packing.example_inputs(), config_patches=inductor)
        return packing.bind(compiled, _unpacked(original, inductor) if packing.packs else None)
    except RestartAnalysis:  # no failure: Dynamo traces the frame again, with a scalar as a constant
        raise
    except Exception as error:
        if config.strict:
            raise
        report.failed(f"Inductor did not take the rewritten graph: {type(error).__name__}: {error}")
        log.warning("lz-compile left a graph to Inductor: %s", report.reason)
        return as_it_came()


def _unpacked(original: fx.GraphModule, inductor: dict[str, Any]) -> Callable[..., Any]:
    """The graph as it came, compiled when it is first called: for parameters that may not be packed any more.

    Without CUDA graphs, which would copy parameters that nobody says are static.
    """
    compiled: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not compiled:
            options = {**inductor, "triton.cudagraphs": False}
            compiled.append(torch.compile(original.forward, backend="inductor", options=options))
        return compiled[0](*args)

    return run
