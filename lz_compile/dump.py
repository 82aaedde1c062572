"""Graph dumps: a folder for each compiled graph, from which what happened can be read, run and compared.

Enters: the graphs of the road as they come by, plan and report.  Leaves: ``01_dynamo.py``, ``02_normalised.py``,
``03_regions.py``, ``04_rewritten.py``, ``repro.py``, ``plan.json``, ``timings.json``, ``report.txt`` and a README.  The
files hold shapes, dtypes and small constants; values of inputs and parameters are made up (``config.dump_weights``
stores the parameters).  A dump that fails leaves one warning, and the compile as it is (``config.strict`` raises).
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from lz_compile import _dump_inputs, _dump_repro, config
from lz_compile.graph_source import Source, layout_text, readable_name, source_of, value_of
from lz_compile.input_values import Values, is_number, kind_of, made_up
from lz_compile.region import INDUCTOR
from lz_compile.report import GraphReport, Report
from lz_compile.specimen import hint

if TYPE_CHECKING:
    from lz_compile.plan import Plan

log = logging.getLogger("lz_compile")

_STEPS = {
    "01_dynamo.py": "the graph as Dynamo handed it over",
    "02_normalised.py": "the same over ATen operators",
    "03_regions.py": "the graph that was planned, regions marked",
    "04_rewritten.py": "the graph that Inductor got, chosen kernels in it",
}
_SETTINGS = ("dump", "dump_weights")
_COPIED = "# -- copied from here on\n"
_numbers = itertools.count()


@contextmanager
def dumped(module: fx.GraphModule, example_inputs: Sequence[Any], report: GraphReport) -> Iterator[Dump]:
    """A dump of one graph under ``config.dump``: finished when the block ends, also where the compile raises."""
    dump = Dump(report)
    dump.start(module, example_inputs)
    try:
        yield dump
    finally:
        dump.finish()


class Dump:
    """One folder while it is written."""

    def __init__(self, report: GraphReport) -> None:
        self.report = report
        self.folder: Path | None = None
        self._values: dict[str, Values] = {}
        self._numbers: dict[str, float] = {}
        self._stored: dict[str, torch.Size] = {}
        self._context = _context_text()
        self._notes: dict[str, list[str]] = {}
        self._region_nodes: list[list[str]] = []
        self._planner = ""

    def start(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._attempt("folder", self._start, module, example_inputs)

    def normalised(self, module: fx.GraphModule) -> None:
        self._attempt("02_normalised.py", self._write_graph, "02_normalised.py", module)

    def regions(self, module: fx.GraphModule, plan: Plan) -> None:
        self._attempt("03_regions.py", self._write_regions, module, plan)

    def rewritten(self, module: fx.GraphModule) -> None:
        self._attempt("04_rewritten.py", self._write_graph, "04_rewritten.py", module)

    def finish(self) -> None:
        self._attempt("plan.json", self._finish)

    # -- the files

    def _start(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        folder = _new_folder(Path(config.dump).expanduser().absolute())
        placeholders = module.graph.find_nodes(op="placeholder")
        for node, example in zip(placeholders, example_inputs):
            if is_number(node) and type(example) is torch.Tensor:
                self._numbers[readable_name(node)] = example.item()
            elif isinstance(value_of(node), torch.Tensor):
                self._values[readable_name(node)] = made_up(node)
        self.folder = folder
        if config.dump_weights:
            self._store_weights(placeholders, example_inputs)
        source = self._write_graph("01_dynamo.py", module)
        text = self._file_text("repro.py", module, source, self._repro_text(module, source))
        self._write("repro.py", text)

    def _store_weights(self, placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]) -> None:
        weights = {
            readable_name(node): value.detach()
            for node, value in zip(placeholders, example_inputs)
            if kind_of(node) != "input" and isinstance(value, torch.Tensor)
        }
        assert self.folder is not None
        torch.save(weights, self.folder / "weights.pt")
        self._stored = {name: weight.shape for name, weight in weights.items()}

    def _write_regions(self, module: fx.GraphModule, plan: Plan) -> None:
        self._planner = plan.planner
        owner: dict[fx.Node, int] = {}
        marks: dict[fx.Node, list[str]] = {}
        for i, choice in enumerate(plan.choices):
            region = choice.region
            nodes = [node for node in module.graph.nodes if node in {*region.nodes, region.output}]
            self._region_nodes.append([node.name for node in nodes])
            owner |= {node: i for node in nodes if node not in owner}
            mask = f", mask {region.attention.mask}" if region.attention is not None else ""
            kernel = choice.kernel.name if choice.kernel else INDUCTOR
            heading = f"region {i}: {region.kind} ({region.pattern}){mask}; {kernel}: {choice.reason}"
            marks.setdefault(nodes[0], []).append(" ".join(heading.split()))
        previous = None
        for node in module.graph.nodes:
            here = owner.get(node)
            if here is not None and here != previous and node not in marks:
                marks[node] = [f"region {here} goes on"]
            elif here is None and previous is not None and node.op != "output":
                marks[node] = [f"not of region {previous}"]
            previous = here
        self._write_graph("03_regions.py", module, marks)

    def _write_graph(
        self, name: str, module: fx.GraphModule, marks: Mapping[fx.Node, Sequence[str]] | None = None
    ) -> Source:
        numbers = [n for n in module.graph.find_nodes(op="placeholder") if readable_name(n) in self._numbers]
        source = source_of(module, marks, numbers)
        self._notes[name] = [f"does not run: {problem}" for problem in source.problems] + source.notes
        self._write(name, self._file_text(name, module, source, _main_text()))
        return source

    def _file_text(self, name: str, module: fx.GraphModule, source: Source, main: str) -> str:
        title = _STEPS.get(name, "Eager, Inductor and layerzero on one graph: error against float64, and time.")
        header = [f"{title[0].upper()}{title[1:].rstrip('.')}.", ""]
        header += [f"Run it: python {name}" + (" (--help)" if name == "repro.py" else "; it prints what comes out.")]
        header += [
            "Values of the inputs are made up from their metadata: integers are small and not negative, booleans"
        ]
        header += ["True, masks hide nothing." + (" Parameters are as they were." if self._stored else "")]
        if source.problems:
            header += ["", "DOES NOT RUN, for want of:", *(f"- {problem}" for problem in source.problems)]
        header += [f"Note: {note}." for note in source.notes]
        header += [f"Compiled by PyTorch {torch.__version__}, mode {self.report.mode}."]
        runtime = _copied(_dump_inputs)
        imports = sorted(source.imports | {"contextlib", "math", "pathlib", "zlib"})
        parts = [
            _docstring(header),
            "\n".join(f"import {module}" for module in imports)
            + "\nfrom collections.abc import Callable, Sequence\nfrom typing import Any"
            + ("\n" + main.partition("\n\n")[0] if name == "repro.py" else ""),
            source.text.rstrip(),
            self._inputs_text(module),
            runtime,
            "\n".join(f"{key} = {text}" for key, text in source.constants.items()),
            self._context,
            main.partition("\n\n")[2] if name == "repro.py" else main,
            'if __name__ == "__main__":\n    main()',
        ]
        return "\n\n\n".join(part.strip("\n") for part in parts if part) + "\n"

    def _inputs_text(self, module: fx.GraphModule) -> str:
        lines = ["def inputs() -> list[Any]:", "    return ["]
        for node in module.graph.find_nodes(op="placeholder"):
            value = self._numbers.get(readable_name(node), value_of(node))
            if isinstance(value, torch.Tensor):
                lines.append(f"        {self._input_text(node, value)},")
            else:
                known = value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value
                text = repr(known) if isinstance(known, int) else f'float("{known}")'
                lines.append(f"        {text},  # {readable_name(node)}")
        return "\n".join([*lines, "    ]"])

    def _input_text(self, node: fx.Node, value: torch.Tensor) -> str:
        name = readable_name(node)
        values = self._values.get(name) or made_up(node)
        text = '"weights.pt"' if self._stored.get(name) == value.shape else str(values)  # packed ones are made up
        maker = "tensor" if values.kind == "input" else values.kind
        grad = ", grad=True" if value.requires_grad else ""
        return f"{maker}({json.dumps(name)}, {layout_text(value)}, {text}{grad})"

    def _repro_text(self, module: fx.GraphModule, source: Source) -> str:
        """The imports of ``repro.py``, a blank line, and what it does."""
        sizes, dynamic = _symbolic_sizes(module)
        ours = {key: value for key, value in config.get_config_copy().items() if key not in _SETTINGS}
        options = self.report.options
        known = {key.replace("-", "_"): value for key, value in options.items()}
        inductor = {key: value for key, value in known.items() if key not in ours and key not in _SETTINGS}
        mode = None if self.report.mode == "default" else self.report.mode
        settings = [
            f"MODE = {mode!r}",
            f"INDUCTOR = {inductor!r}",
            f"LAYERZERO = {ours!r}",
            "# Sizes that an input is, as (tensor, dimension), and the symbolic dimensions of tensors.",
            f"SIZES = {sizes!r}",
            f"DYNAMIC = {dynamic!r}",
        ]
        head = inspect.getsource(_dump_repro).partition(_COPIED)[0]
        imports = re.findall(r"^(?:import|from) .*$", head, re.MULTILINE)
        extra = [line for line in imports if "collections.abc" not in line and "typing" not in line]
        extra = [line for line in extra if line not in ("import torch", "import contextlib")]
        return "\n".join(extra) + "\n\n" + "\n".join(settings) + "\n\n" + _copied(_dump_repro)

    def _finish(self) -> None:
        report = self.report
        regions = [asdict(region) for region in report.regions]
        for i, entry in enumerate(regions):
            entry["nodes"] = self._region_nodes[i] if i < len(self._region_nodes) else []
        plan = {
            "compile_id": report.compile_id,
            "mode": report.mode,
            "options": report.options,
            "left_to_inductor": report.reason,
            "trimmed": report.trimmed,
            "planner": self._planner,
            "seconds": report.cost,
            "greedy_seconds": report.greedy_cost,
            "no_cuda_graph": report.cuda_graphs,
            "regions": regions,
        }
        self._write("plan.json", json.dumps(plan, indent=2, default=str) + "\n")
        steps = [asdict(receipt) for receipt in report.receipts]
        self._write("timings.json", json.dumps(steps, indent=2) + "\n")
        self._write("report.txt", f"{Report([report])}\n")
        self._write("README.md", self._readme_text())

    def _readme_text(self) -> str:
        lines = [f"# Graph {self.report.compile_id}".rstrip(), "", "| file | holds |", "|---|---|"]
        for name, what in _STEPS.items():
            if self.folder is not None and (self.folder / name).exists():
                lines.append(f"| `{name}` | {what}; {'; '.join(self._notes.get(name) or ['runs'])} |")
            else:
                lines.append(f"| `{name}` | not written: {'; '.join(self._notes.get(name) or [self._absent()])} |")
        lines += ["| `repro.py` | eager, Inductor and layerzero on the first graph: error and time |"]
        lines += ["| `plan.json` | regions, candidates with their figures, chosen kernels, reasons |"]
        lines += ["| `timings.json` | the steps of the compile |", "| `report.txt` | the same as text |"]
        stored = "`weights.pt` holds the parameters." if self._stored else "No parameter and no input is stored."
        return "\n".join([*lines, "", stored]) + "\n"

    def _absent(self) -> str:
        return (self.report.reason or "nothing was replaced").replace("|", "/").replace("\n", " ")

    def _write(self, name: str, text: str) -> None:
        assert self.folder is not None
        (self.folder / name).write_text(text, encoding="utf-8")

    def _attempt(self, what: str, write: Callable[..., Any], *args: Any) -> None:
        """Runs one part; what fails is said once, and no more is written where the folder cannot be."""
        if what != "folder" and self.folder is None:
            return
        try:
            write(*args)
        except Exception as error:
            if config.strict:
                raise
            self._notes[what] = [f"{type(error).__name__}: {error}"]
            log.warning("lz-compile could not dump %s of a graph: %s: %s", what, type(error).__name__, error)
            if isinstance(error, OSError):
                self.folder = None


def _new_folder(parent: Path) -> Path:
    """A folder that was not there before: ``<process>_<graph number>``."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / f"{os.getpid()}_{next(_numbers):03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def _symbolic_sizes(module: fx.GraphModule) -> tuple[dict[int, tuple[int, int]], dict[int, list[int]]]:
    """Inputs that are a size of a tensor, and which dimensions of which tensors are symbolic."""
    placeholders = module.graph.find_nodes(op="placeholder")
    given: dict[str, tuple[int, int]] = {}
    dynamic: dict[int, list[int]] = {}
    for i, node in enumerate(placeholders):
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or kind_of(node) != "input":
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and hint(size) > 1:
                dynamic.setdefault(i, []).append(dim)
                given.setdefault(str(size), (i, dim))
    sizes = {i: given[str(value_of(node))] for i, node in enumerate(placeholders) if str(value_of(node)) in given}
    return sizes, dynamic


def _context_text() -> str:
    """What was set around the call: gradients, autocast, precision of products."""
    lines = ["def context() -> contextlib.ExitStack:", "    stack = contextlib.ExitStack()"]
    if not torch.is_grad_enabled():
        lines.append("    stack.enter_context(torch.no_grad())")
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            lines.append(f'    stack.enter_context(torch.autocast("{device}", {dtype}))')
    if torch.get_default_dtype() != torch.float32:
        lines.append(f"    torch.set_default_dtype({torch.get_default_dtype()})")
    if torch.get_float32_matmul_precision() != "highest":
        lines.append(f'    torch.set_float32_matmul_precision("{torch.get_float32_matmul_precision()}")')
    return "\n".join([*lines, "    return stack"])


def _main_text() -> str:
    return """def main() -> None:
    with context():
        outputs = graph(*inputs())
    for i, value in enumerate(torch.utils._pytree.tree_leaves(outputs)):
        print(f"output {i}: {described(value)}")"""


def _copied(module: ModuleType) -> str:
    return inspect.getsource(module).partition(_COPIED)[2].strip("\n")


def _docstring(lines: Sequence[str]) -> str:
    text = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{text}\n"""'
