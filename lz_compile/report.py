"""What was compiled, which kernel runs where, and why: the face of the product.

Enters: receipts and choices from the road.  Leaves: :class:`Report` objects, as text, JSON or Python values.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from lz_compile.region import INDUCTOR, Cause, describe_node, microseconds

if TYPE_CHECKING:
    from lz_compile.measure import Figure
    from lz_compile.plan import Choice

_MAX_REPORTS = 1024
_published: list[GraphReport] = []
_lock = threading.Lock()
_watchers = threading.local()


@dataclass
class Receipt:
    """One step of the road: what it did, or why it did nothing, and how long it took."""

    step: str
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """What competed for a site: its time in microseconds, where that comes from (``measured`` in this compile,
    ``remembered`` from an earlier one, ``estimated`` from shapes), and the evidence of its qualification.

    ``spread`` is the standard deviation of the samples in microseconds, ``error`` the largest error over its tolerance.
    """

    kernel: str
    microseconds: float
    source: str
    spread: float = 0.0
    error: float | None = None
    graph_safe: bool | None = None
    pool_bytes: int | None = None

    @classmethod
    def of(cls, kernel: str, figure: Figure) -> Candidate:
        return cls(
            kernel,
            1e6 * _at_hint(figure.seconds),
            figure.source,
            1e6 * figure.spread,
            figure.error,
            figure.graph_safe,
            figure.pool_bytes,
        )

    def __str__(self) -> str:
        checks = [] if self.error is None else [f"error {self.error:.2g} of its tolerance"]
        checks += ["replays right"] if self.graph_safe else []
        return f"{self.kernel} {microseconds(1e-6 * self.microseconds)} {self.source}" + (
            f" ({', '.join(checks)})" if checks else ""
        )


def _at_hint(seconds: Any) -> float:
    """An estimate over symbolic sizes as a number, at those of the call that was compiled; it adds no guard."""
    return seconds.node.hint if isinstance(seconds, torch.SymFloat) else seconds


@dataclass
class RegionReport:
    """One recognised site.

    ``kernel`` is ``"inductor"`` when the site was left alone, ``declined`` when it may not be replaced by any kernel
    (``reason`` says why, ``stopped`` at which node reading stopped); ``candidates`` are the kernels that competed,
    fastest first, ``rejected`` maps the others to why not; ``rules`` are the policy rules that decided something.
    ``cause`` is the class of ``reason`` where no kernel was chosen.
    """

    kind: str
    module: str
    pattern: str
    shape: str
    mask: str
    cache: str
    kernel: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)
    unproved: str = ""
    candidates: list[Candidate] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    declined: bool = False
    stopped: str = ""
    cause: Cause = ""

    @classmethod
    def describe(cls, choice: Choice) -> RegionReport:
        region = choice.region
        attention = region.attention
        cache = ""
        if region.key_cache is not None:
            name = region.key_cache.cache.meta.get("lz_name", region.key_cache.cache.name)
            cache = f"{region.key_cache.kind} into {name}"
        return cls(
            kind=region.kind,
            module=region.module,
            pattern=region.pattern,
            shape=_shape_text(attention) if attention is not None else _tensor_text(region.output.meta["val"]),
            mask=str(attention.mask) if attention is not None else "",
            cache=cache,
            kernel=choice.kernel.name if choice.kernel else INDUCTOR,
            reason=choice.reason,
            rejected=dict(choice.rejected),
            unproved=attention.mask.unproved if attention is not None else "",
            candidates=[Candidate.of(name, figure) for name, figure in choice.figures.items()],
            rules=list(choice.rules),
            declined=bool(region.declined),
            stopped=describe_node(region.stopped) if region.stopped is not None else "",
            cause=choice.cause,
        )


def _shape_text(attention: Any) -> str:
    q, k, v = attention.fake()
    value = "" if str(v.shape[-1]) == str(k.shape[-1]) else f", v head size {v.shape[-1]}"
    dtype = str(q.dtype).removeprefix("torch.")
    return (
        f"batch {q.shape[0]}, {q.shape[1]} heads over {k.shape[1]}, {q.shape[2]} queries, {k.shape[2]} keys, "
        f"head size {q.shape[3]}{value}, {dtype} on {q.device.type}"
    )


def _tensor_text(value: torch.Tensor) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device.type}"


# "unsupported" graphs were not read; a "failed" one went to Inductor as it came, and its reason tells of the failure;
# "raised": the compile ended with an exception.
Outcome = Literal["rewritten", "unchanged", "unsupported", "failed", "raised"]

_NOT_OWN = ("Inductor", "libraries", "measure")


@dataclass
class GraphReport:
    """One compiled graph: its regions, the receipts of the steps, and why it was left alone if it was.

    ``trimmed`` says what runs on fewer rows because nobody reads the others.  ``cuda_graphs`` names what will make
    Inductor skip CUDA graphs, in a mode that uses them.  ``cost`` is what the regions take by the plan, ``greedy_cost``
    when each takes its own fastest kernel, in seconds.  ``outcome`` is what became of the graph.
    """

    compile_id: str
    mode: str
    options: dict[str, Any]
    regions: list[RegionReport] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    reason: str = ""
    trimmed: str = ""
    cuda_graphs: list[str] = field(default_factory=list)
    cost: float | None = None
    greedy_cost: float | None = None
    outcome: Outcome = "unchanged"

    @classmethod
    def start(cls, mode: str | None, options: dict[str, Any] | None) -> GraphReport:
        compile_id = torch._guards.CompileContext.current_compile_id()
        return cls(str(compile_id) if compile_id is not None else "", mode or "default", dict(options or {}))

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Receipt]:
        receipt = Receipt(name)
        self.receipts.append(receipt)
        start = time.perf_counter()
        try:
            yield receipt
        finally:
            receipt.seconds = time.perf_counter() - start

    def set_apart(self, name: str, seconds: float, note: str) -> None:
        """Makes part of the step before a step of its own."""
        self.receipts[-1].seconds -= seconds
        self.receipts.insert(-1, Receipt(name, seconds, note))

    def failed(self, reason: str) -> None:
        """The graph as it came goes to Inductor: no region of it runs a kernel."""
        self.reason, self.outcome = reason, "failed"
        for region in self.regions:
            region.kernel, region.reason, region.cause = INDUCTOR, reason, "failed"

    @property
    def own_seconds(self) -> float:
        """Time in our steps; Inductor's is left out, and what is done once on a machine: trying out and measuring."""
        return sum(receipt.seconds for receipt in self.receipts if receipt.step not in _NOT_OWN)


@dataclass
class Report:
    """The graphs of one function, or one graph of :func:`lz_compile.reports`."""

    graphs: list[GraphReport]

    @property
    def regions(self) -> list[RegionReport]:
        return [region for graph in self.graphs for region in graph.regions]

    def to_json(self) -> str:
        """The report as JSON: ``{"graphs": [{"regions": [...], "receipts": [...], ...}]}``."""
        return json.dumps({"graphs": [asdict(graph) for graph in self.graphs]}, indent=2, default=str)

    def __str__(self) -> str:
        if not self.graphs:
            return "lz-compile: no graph was compiled with backend 'layerzero'"
        return "\n\n".join(_graph_text(graph, i, len(self.graphs)) for i, graph in enumerate(self.graphs))


def _graph_text(graph: GraphReport, index: int, count: int) -> str:
    sites = [region for region in graph.regions if region.kind == "attention"]
    replaced, total = sum(region.kernel != INDUCTOR for region in sites), len(sites)
    name = f"graph {index + 1} of {count}" + (f" [{graph.compile_id}]" if graph.compile_id else "")
    lines = [f"{name}: {replaced} of {total} attention sites run a chosen kernel, mode {graph.mode}"]
    if graph.reason:
        lines.append(f"  left to Inductor: {graph.reason}")
    if graph.trimmed:
        lines.append(f"  unread rows are not computed: {graph.trimmed}")
    for modules, region in folded(graph.regions):
        lines.append(f"  {modules}")
        lines.append(f"    {region.pattern}: {region.shape or 'shape unknown'}")
        if region.mask:
            lines.append(f"    mask    {region.mask}")
        if region.unproved:
            lines.append(f"            not proved: {region.unproved}")
        if region.cache:
            lines.append(f"    cache   {region.cache}")
        lines.append(f"    kernel  {region.kernel}: {region.reason}")
        lines += [f"            {candidate}" for candidate in region.candidates if candidate.source != "estimated"]
        lines += [f"    policy  {rule}" for rule in region.rules]
        reasons: dict[str, list[str]] = {}
        for kernel, why in region.rejected.items():
            reasons.setdefault(why, []).append(kernel)
        lines += [f"            not {', '.join(kernels)}: {why}" for why, kernels in reasons.items()]
    lines += [f"  no CUDA graph: {reason}" for reason in graph.cuda_graphs]
    times = ", ".join(f"{r.step} {r.seconds:.2f} s" + (f" ({r.note})" if r.note else "") for r in graph.receipts)
    lines.append(f"  steps   {times}")
    return "\n".join(lines)


def folded(regions: list[RegionReport]) -> list[tuple[str, RegionReport]]:
    """Identical layers under one heading: ``model.layers.0-31.self_attn (32 sites)``."""
    groups: dict[str, list[RegionReport]] = {}
    for region in regions:
        facts = asdict(region)
        facts["module"] = re.sub(r"\.\d+(?=\.|$)", ".*", region.module)
        facts["cache"] = re.sub(r"\.\d+(?=\.|$)", ".*", region.cache)
        groups.setdefault(json.dumps(facts, default=str), []).append(region)
    result = []
    for members in groups.values():
        first = members[0]
        if len(members) == 1:
            result.append((first.module or "(top level)", first))
            continue
        numbers = [int(n) for m in members if (n := _layer_number(m.module)) is not None]
        heading = re.sub(r"\.\d+(?=\.|$)", f".{_ranges(numbers)}", first.module, count=1)
        result.append((f"{heading or '(top level)'} ({len(members)} sites)", first))
    return result


def _layer_number(module: str) -> str | None:
    found = re.search(r"\.(\d+)(?=\.|$)", module)
    return found.group(1) if found else None


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


# -- the reports of this process -------------------------------------------------------------------------------------


def publish(report: GraphReport) -> None:
    with _lock:
        _published.append(report)
        del _published[:-_MAX_REPORTS]


def reports() -> list[Report]:
    """One report for each graph that this process compiled, oldest first (the newest 1024 are kept).

    Graphs whose Inductor code came from a cache on disk are among them: planning runs on warm starts too.
    """
    with _lock:
        return [Report([graph]) for graph in _published]


def watched(compiled: Callable[..., Any], report: GraphReport) -> Callable[..., Any]:
    """The compiled function; while :func:`watch` is active in the thread it also notes that it ran."""

    def run(*args: Any) -> Any:
        seen = getattr(_watchers, "seen", None)
        if seen is not None and report not in seen:
            seen.append(report)
        return compiled(*args)

    return run


@contextlib.contextmanager
def watch() -> Iterator[list[GraphReport]]:
    """Collects the reports of the graphs that run in this thread."""
    previous = getattr(_watchers, "seen", None)
    seen: list[GraphReport] = []
    _watchers.seen = seen
    try:
        yield seen
    finally:
        _watchers.seen = previous
