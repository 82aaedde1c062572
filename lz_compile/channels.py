"""What PyTorch's own tools show of a compile: TORCH_LOGS, ``tlparse`` and ``torch._dynamo.utils.counters``.

Enters: the report of one graph and the graph as it was rewritten.  Leaves: numbers in ``counters["layerzero"]``; with
``TORCH_LOGS="lz_compile"`` one screen of text (``"+lz_compile"``: the whole report); with ``TORCH_TRACE=DIR`` the
artifacts ``layerzero_graph`` and ``layerzero_report``, the latter as text and as JSON, under the compile's id.

PyTorch reads TORCH_LOGS while it is imported and takes names that it knows, or names of modules: hence the module's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
import torch.fx as fx
from torch._dynamo.utils import counters
from torch._logging import getArtifactLogger, trace_structured
from torch._logging._internal import register_artifact

from lz_compile import config, metrics
from lz_compile.region import INDUCTOR
from lz_compile.report import GraphReport, RegionReport, Report, folded

# Lines and columns of a screen.
LINES, COLUMNS = 40, 120

# The lines come without PyTorch's prefix of half a screen's width; the heading has the compile's id.
register_artifact(
    "layerzero", "Which kernel backend 'layerzero' chose for each region of a graph.", log_format="%(message)s"
)
log = getArtifactLogger(__name__, "layerzero")
_warnings = logging.getLogger("lz_compile")


def show_graph(module: fx.GraphModule | None) -> None:
    """The rewritten graph, as Inductor gets it, for ``tlparse``."""
    if module is not None:
        with _harmless():
            _artifact("layerzero_graph", "string", lambda: _readable(module))


def tell(report: GraphReport) -> None:
    """Everything that is told of one compiled graph.  A failure costs a warning (``config.strict`` raises it)."""
    with _harmless():
        _count(report)
        metrics.compiled(report)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", Report([report]))
        elif log.isEnabledFor(logging.INFO):
            log.info("%s", screen(report))
        _artifact("layerzero_report", "string", lambda: str(Report([report])))
        _artifact("layerzero_report", "json", Report([report]).to_json)


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if config.strict:
            raise
        _warnings.warning("lz-compile could not tell what it compiled: %s: %s", type(error).__name__, error)


def _count(report: GraphReport) -> None:
    numbers = counters["layerzero"]
    numbers["graphs"] += 1
    numbers[f"graphs {report.outcome}"] += 1
    for region in report.regions:
        numbers[f"{region.kind} regions"] += 1
        numbers[f"{region.kind} left: {region.cause}" if region.cause else f"{region.kind} by {region.kernel}"] += 1


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Costs nothing without TORCH_TRACE: then nobody asks for the payload."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=torch._guards.CompileContext.current_trace_id() is not None,
    )


def _readable(module: fx.GraphModule) -> str:
    return module.print_readable(print_output=False, include_stride=True, include_device=True)


def screen(report: GraphReport, lines: int = LINES, columns: int = COLUMNS) -> str:
    """A report in so many lines and columns at most: a line for identical layers, the slow steps, and what is cut."""
    chosen = sum(region.kernel != INDUCTOR for region in report.regions)
    seconds = {receipt.step: receipt.seconds for receipt in report.receipts}
    name = "layerzero" + (f" [{report.compile_id}]" if report.compile_id else "")
    head = [f"{name}: graph {report.outcome}, {chosen} of {len(report.regions)} regions run a chosen kernel"]
    head[0] += f", mode {report.mode}"
    if report.reason:
        head.append(f"  left to Inductor: {report.reason}")
    if report.trimmed:
        head.append(f"  unread rows are not computed: {report.trimmed}")
    tail = [f"  no CUDA graph: {reason}" for reason in report.cuda_graphs[:3]]
    steps = sorted(seconds, key=lambda step: -seconds[step])[:6]
    tail.append(f"  {sum(seconds.values()):.2f} s: " + ", ".join(f"{step} {seconds[step]:.2f} s" for step in steps))
    groups = folded(report.regions)
    groups.sort(key=lambda group: group[1].kernel == INDUCTOR)  # those that were left come last
    shown = groups
    if len(groups) > (room := lines - len(head) - len(tail)):
        shown = groups[: room - 1]
        tail.insert(0, f"  and {len(groups) - len(shown)} more kinds of sites (TORCH_LOGS=+lz_compile shows all)")
    kind = max((len(region.kind) for _, region in shown), default=0)
    kernel = max((len(region.kernel) for _, region in shown), default=0)
    rows = [f"  {r.kind:{kind}}  {r.kernel:{kernel}}  {modules}: {_why(r)}" for modules, r in shown]
    return "\n".join(_cut(" ".join(line.splitlines()), columns) for line in [*head, *rows, *tail])


def _why(region: RegionReport) -> str:
    return f"{region.mask}; {region.reason}" if region.mask else region.reason


def _cut(line: str, columns: int) -> str:
    return line if len(line) <= columns else f"{line[: columns - 3]}..."
