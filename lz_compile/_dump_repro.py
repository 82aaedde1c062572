"""What a dumped ``repro.py`` does with its graph: eager, Inductor and layerzero side by side.

:mod:`lz_compile.dump` copies the text below the last import and stand-in into the files that it writes; nothing there
may need lz_compile before the backend "layerzero" is asked for.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

MODE: str | None = None
INDUCTOR: dict[str, Any] = {}
LAYERZERO: dict[str, Any] = {}
SIZES: dict[int, tuple[int, int]] = {}
DYNAMIC: dict[int, list[int]] = {}


def graph(*values: Any) -> Any:
    raise NotImplementedError("stands for the dumped graph")


def inputs() -> list[Any]:
    raise NotImplementedError("stands for the inputs of the dumped graph")


def context() -> contextlib.AbstractContextManager[Any]:
    raise NotImplementedError("stands for what was set around the call")


# -- copied from here on

BACKENDS = ("eager", "inductor", "layerzero")
HELD = (torch.nn.Parameter, torch.nn.Buffer)


class Model(torch.nn.Module):
    """The graph over parameters and buffers of its own; ``forward`` takes the other inputs, None for its own."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        self.held = [isinstance(value, HELD) for value in values]
        for i, value in enumerate(values):
            if self.held[i]:
                setattr(self, f"held_{i}", value)

    def forward(self, *given: Any) -> Any:
        values = [getattr(self, f"held_{i}") if held else given[i] for i, held in enumerate(self.held)]
        for i, (j, dim) in SIZES.items():
            values[i] = values[j].shape[dim]
        return graph(*values)


class InFloat64(TorchFunctionMode):
    """Whoever asks for a floating dtype gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("float", "half", "bfloat16") and len(args) == 1:
            return args[0].double()
        args, kwargs = tree_map_only(torch.dtype, self._wide, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @staticmethod
    def _wide(dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype.is_floating_point else dtype


def copied(values: list[Any]) -> list[Any]:
    """The inputs that a call may write to as copies of the same layout, their symbolic sizes marked."""

    def copy(value: Any) -> Any:
        if isinstance(value, HELD) or not isinstance(value, torch.Tensor) or 0 in value.stride():
            return value
        with torch.no_grad():
            fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            return fresh.copy_(value).requires_grad_(value.requires_grad)

    result = [copy(value) for value in values]
    for i, dims in DYNAMIC.items():
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(result[i], dim)
    return result


def results(model: Any, values: list[Any]) -> list[torch.Tensor]:
    """What a call returns and what it wrote to its inputs."""
    values = copied(values)
    given = [None if isinstance(value, HELD) else value for value in values]
    leaves = tree_leaves((model(*given), [v for v in given if isinstance(v, torch.Tensor)]))
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def exact(values: list[Any]) -> list[torch.Tensor]:
    """The graph in float64."""

    def wide(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().clone()
        return value.double() if value.is_floating_point() else value

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wide_values = [wide(value) for value in values]
        with torch.no_grad(), InFloat64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # autocast to float64 says that it does nothing
            outputs = graph(*wide_values)
    finally:
        torch.set_default_dtype(default)
    given = [w for w, v in zip(wide_values, values) if isinstance(v, torch.Tensor) and not isinstance(v, HELD)]
    return [leaf for leaf in tree_leaves((outputs, given)) if isinstance(leaf, torch.Tensor)]


def largest_error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest difference of an element over the largest value of its tensor."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.double(), b.double()
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        if a.numel():
            difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0, posinf=float("inf"))
            worst = max(worst, float(difference.max() / b.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-30)))
    return worst


def call_once(model: Any, values: list[Any], fresh: dict[int, torch.Tensor]) -> float:
    """Seconds of a call; integers that calls count on (a cache's length) start anew each time."""
    with torch.no_grad():
        for i, value in fresh.items():
            values[i].copy_(value)
    given = [None if isinstance(value, HELD) else value for value in values]
    synchronize()
    start = time.perf_counter()
    model(*given)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compiled(backend: str, model: torch.nn.Module) -> Any:
    if backend == "eager":
        return model
    if MODE and not INDUCTOR:
        return torch.compile(model, backend=backend, mode=MODE)
    return torch.compile(model, backend=backend, options=dict(INDUCTOR))


def settings(backend: str) -> contextlib.AbstractContextManager[Any]:
    if backend != "layerzero":
        return contextlib.nullcontext()
    import lz_compile

    return lz_compile.config.patch(**LAYERZERO)


def reports(backend: str) -> list[Any]:
    """What layerzero did in this process."""
    if backend != "layerzero":
        return []
    import lz_compile

    return [graph for report in lz_compile.reports() for graph in report.graphs]


def compare(backends: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """A row for each backend; ``ratio`` is eager's time, or that of the first backend, over this one's."""
    values = inputs()
    model = Model(values)
    rows: dict[str, dict[str, Any]] = {}
    try:
        reference = exact(values)
    except Exception as error:  # an operator without float64
        print(f"no reference: the graph does not run in float64: {error}", file=sys.stderr)
        reference = None
    runs: dict[str, Callable[[], float]] = {}
    fresh = {i: v.clone() for i, v in enumerate(values) if is_counter(v)}
    for backend in backends:
        with settings(backend):
            mine = copied(values)
            run = compiled(backend, model)
            known = {id(report) for report in reports(backend)}
            got = results(run, mine)
        runs[backend] = lambda run=run, mine=mine: call_once(run, mine, fresh)  # type: ignore[misc]
        rows[backend] = {"error": None if reference is None else largest_error(got, reference)}
        if backend == "layerzero":
            graphs = [report for report in reports(backend) if id(report) not in known]
            rows[backend]["kernels"] = [region.kernel for graph in graphs for region in graph.regions]
            if len(graphs) != 1:
                print(f"note: traced again, the graph falls into {len(graphs)} graphs", file=sys.stderr)
    samples: dict[str, list[float]] = {backend: [] for backend in backends}
    for timed in runs.values():
        timed()
    end = time.perf_counter() + seconds * len(backends)
    while time.perf_counter() < end or len(samples[backends[-1]]) < 5:  # taking turns: a slow spell hits all
        for backend, timed in runs.items():
            samples[backend].append(timed())
    for backend, row in rows.items():
        row["milliseconds"] = 1e3 * statistics.median(samples[backend])
        row["ratio"] = rows[backends[0]]["milliseconds"] / row["milliseconds"]
    return rows


def is_counter(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or isinstance(value, HELD):
        return False
    return not value.is_floating_point() and not value.is_complex() and 0 not in value.stride()


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the graph in eager mode, compiled by Inductor and by layerzero.")
    parser.add_argument("--backends", default=",".join(BACKENDS), help=f"some of {','.join(BACKENDS)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, for each backend")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    arguments = parser.parse_args()
    backends = arguments.backends.split(",")
    if unknown := [backend for backend in backends if backend not in BACKENDS]:
        parser.error(f"unknown backend {unknown[0]!r}; known: {', '.join(BACKENDS)}")
    with context():
        rows = compare(backends, arguments.seconds)
    if arguments.json:
        print(json.dumps({"backends": rows, "torch": torch.__version__, "mode": MODE or "default"}))
        return
    print(f"{'backend':<10}  {'error':>9}  {'ms':>9}  speed of {backends[0]}")
    for backend, row in rows.items():
        error = "-" if row["error"] is None else f"{row['error']:.2e}"
        print(f"{backend:<10}  {error:>9}  {row['milliseconds']:>9.3f}  {row['ratio']:.2f}x")
