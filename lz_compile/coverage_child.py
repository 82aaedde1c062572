"""What one tiny model gives on the road: sites, recognised sites, errors and compile times.

Enters: an :class:`~lz_compile.tiny_models.Architecture`.  Leaves: a :class:`Row`.  It is called in a process of its own
(:mod:`lz_compile.coverage`), because a model may take all memory, hang or crash.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.overrides import TorchFunctionMode

from lz_compile import config
from lz_compile.aliasing import Aliases
from lz_compile.backend import improve, layerzero
from lz_compile.normalize import LeftAlone, module_path, normalize
from lz_compile.patterns.near_attention import NearSite, near_sites
from lz_compile.patterns.pointwise import POINTWISE
from lz_compile.report import GraphReport, RegionReport, reports
from lz_compile.tiny_models import Architecture, Call, NotBuilt, calls, double

SEEDS = 3

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
# Modules of a tree by the name of their class; the innermost that matches is one site.
_SITES = {
    "attention": _ATTENTION,
    "norm": re.compile(r"norm", re.IGNORECASE),
    "mlp": re.compile(r"mlp|feedforward|ffn|experts$", re.IGNORECASE),
    "rope": re.compile(r"rotary|rope", re.IGNORECASE),
    "moe": re.compile(r"experts$", re.IGNORECASE),
}
# The kinds of regions that stand for a site of the tree.
_REGIONS = {"norm": "rms_norm", "mlp": "glu", "rope": "rope", "moe": "moe"}


@dataclass
class Miss:
    """An attention site that was not recognised: its module, why, and the node at which reading stopped."""

    module: str
    reason: str
    node: str = ""


@dataclass
class CallRow:
    """One call of a model.

    ``sites`` are the attention cores that eager ran, ``recognised`` those that a region stands for which may be
    replaced.  ``masks`` counts their masks as ``none``, ``proved`` and ``honoured`` (given to the kernel as a tensor),
    ``kernels`` what was chosen.  ``error`` and ``eager_error`` are medians over three inputs of the largest error
    against float64 relative to the largest value (``reference`` says when there is no float64 run); ``seconds`` and
    ``inductor_seconds`` the first calls.  ``failed`` and ``inductor_failed`` say why a call did not run, ``fell_back``
    why a graph was left to Inductor by a failure of ours.  ``modules`` counts modules that ran, by kind, ``regions``
    the pointwise regions that patterns find, whether or not this machine has a kernel for them.
    """

    name: str
    sites: int = 0
    recognised: int = 0
    masks: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    other_softmax: int = 0
    graphs: int = 0
    error: float | None = None
    eager_error: float | None = None
    reference: str = "float64"
    wrong: str = ""
    seconds: float | None = None
    inductor_seconds: float | None = None
    failed: str = ""
    inductor_failed: str = ""
    fell_back: str = ""
    not_called: str = ""
    modules: dict[str, int] = field(default_factory=dict)
    regions: dict[str, int] = field(default_factory=dict)


@dataclass
class Row:
    """One architecture; ``problem`` says why there are no calls (no tiny model, out of memory, too slow, crashed).

    ``attention`` is what the model ran with.  ``asked``, ``with_inductor`` and ``versions`` say how the row was made:
    a row that was made otherwise is not taken from an earlier run.
    """

    name: str
    model: str
    attention: str = ""
    asked: str = ""
    with_inductor: bool = False
    versions: str = ""
    problem: str = ""
    seconds: float = 0.0
    calls: list[CallRow] = field(default_factory=list)


def examine(architecture: Architecture, attention: str, with_inductor: bool) -> Row:
    """Builds, calls, compiles and compares one architecture.

    ``attention`` is preferred where the class supports it: ``sdpa`` falls back to ``eager`` and the other way round.
    Without Inductor the rewritten graphs run as they are, and there are no compile times.
    """
    row = Row(architecture.name, architecture.model)
    start = time.perf_counter()
    try:
        model, row.attention = _build(architecture, attention)
        ways = calls(model)
    except NotBuilt as error:
        row.problem = str(error)
        return row
    if with_inductor:
        _warm_up()
    for number, call in enumerate(ways):
        row.calls.append(_Examination(model, call, with_inductor, inductor_first=number % 2 == 0).run())
    row.seconds = time.perf_counter() - start
    return row


def _build(architecture: Architecture, attention: str) -> tuple[Any, str]:
    other = "eager" if attention == "sdpa" else "sdpa"
    try:
        return architecture.build(attention), attention
    except NotBuilt as error:
        with contextlib.suppress(NotBuilt):
            return architecture.build(other), other
        raise error


def _warm_up() -> None:
    """Both compilers import what they need, so that neither pays for it in the first time that is taken."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x) + 1.0

    for backend in ("inductor", "layerzero"):
        torch._dynamo.reset()
        with config.patch(measure="off"), torch.no_grad():
            torch.compile(attend, backend=backend)(torch.zeros(1, 1, 2, 8))


# -- eager: the sites that are there -----------------------------------------------------------------------------------


class _Cores(TorchFunctionMode):
    """Notes the module of every attention core that runs: SDPA calls, and softmaxes over scores."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[torch.nn.Module] = []
        self.ran: dict[torch.nn.Module, int] = {}
        self.cores: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        softmax = name in ("softmax", "_softmax") and bool(args) and isinstance(args[0], torch.Tensor)
        fused = name in ("scaled_dot_product_attention", "multi_head_attention_forward")
        if fused or (softmax and self._scores(args[0])):
            self.cores.append(self._where())
        return func(*args, **(kwargs or {}))

    def _scores(self, value: torch.Tensor) -> bool:
        return value.dim() >= 3 and any(_ATTENTION.search(type(m).__name__) for m in self.stack)

    def _where(self) -> str:
        inside = [m for m in self.stack if not isinstance(m, torch.nn.Softmax)]
        return self.names[inside[-1]] if inside else ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def enter(module: torch.nn.Module, args: Any) -> None:
            self.stack.append(module)
            self.ran[module] = self.ran.get(module, 0) + 1

        def leave(module: torch.nn.Module, args: Any, result: Any) -> None:
            self.stack.pop()

        handles = [
            hook for m in self.names for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def modules(self) -> dict[str, int]:
        """How often modules of each kind ran, the innermost that matches."""
        found = {}
        for kind, pattern in _SITES.items():
            matching = [m for m in self.ran if pattern.search(type(m).__name__)]
            names = [self.names[m] for m in matching]
            innermost = [m for m, n in zip(matching, names) if not any(o.startswith(f"{n}.") for o in names)]
            found[kind] = sum(self.ran[m] for m in innermost)
        return found


# -- compiled: the sites that were recognised --------------------------------------------------------------------------


@dataclass
class _Graph:
    """A compiled graph: its report, what was near, and the pointwise regions that patterns find in it."""

    report: GraphReport
    near: list[NearSite] = field(default_factory=list)
    regions: dict[str, int] = field(default_factory=dict)
    left_alone: str = ""


class _Watched:
    """The Dynamo backend: "layerzero", or its road without Inductor, which also notes the graphs that run."""

    def __init__(self, with_inductor: bool) -> None:
        self.with_inductor = with_inductor
        self.ran: list[_Graph] = []
        self.looking = 0.0

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        graph = _look(module)
        self.looking += time.perf_counter() - start
        if self.with_inductor:
            run = layerzero(module, inputs, options={"measure": "off"})
            graph.report = reports()[-1].graphs[0]
        else:
            with config.patch(measure="off"):
                rewritten = improve(module, graph.report)
            run = (rewritten or module).forward

        def noted(*args: Any) -> Any:
            self.ran.append(graph)
            return run(*args)

        return noted


def _look(module: fx.GraphModule) -> _Graph:
    """What patterns see in a graph beside what the road reports."""
    graph = _Graph(GraphReport.start(None, None))
    try:
        normal = normalize(module)
        aliases = Aliases(normal.graph)
        graph.near = near_sites(normal.graph, aliases, module_path)
        for kind, find in POINTWISE.items():
            graph.regions[kind] = sum(not region.declined for region in find(normal.graph, aliases, module_path))
    except LeftAlone as reason:
        graph.left_alone = str(reason)
    except Exception as error:
        graph.left_alone = f"failed: {_one_line(error)}"
    return graph


class _Examination:
    """One call of one model, step by step."""

    def __init__(self, model: Any, call: Call, with_inductor: bool, inductor_first: bool) -> None:
        self.model, self.call = model, call
        self.with_inductor, self.inductor_first = with_inductor, inductor_first
        self.row = CallRow(call.name)

    def run(self) -> CallRow:
        row = self.row
        try:
            cores = _Cores(self.model)
            with torch.no_grad():
                prepared = self.call.prepare(self.model, 0)
                with cores.watching():
                    prepared(self.model)
                expected = [self._run(self.model, seed) for seed in range(SEEDS)]
        except Exception as error:
            row.not_called = _one_line(error)
            return row
        row.sites, row.modules = len(cores.cores), cores.modules()
        exact = self._exact(expected)
        order = [self._inductor, self._layerzero] if self.inductor_first else [self._layerzero, self._inductor]
        watched = _Watched(self.with_inductor)
        for step in order:
            step(watched, exact, expected)
        self._settle(cores.cores, watched)
        return row

    def _run(self, compiled: Any, seed: int, model: Any = None) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad():
            prepared = self.call.prepare(model or self.model, seed)
            torch.manual_seed(seed)
            return prepared(compiled)

    def _exact(self, expected: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """The float64 run; eager's float32 run where the model cannot."""
        try:
            model = double(self.model)
            exact = [self._run(model, seed, model) for seed in range(SEEDS)]
        except Exception as error:
            self.row.reference = f"float32: {_one_line(error)}"
            exact = expected
        self.row.eager_error = _median_error(expected, exact, self.call.valid)
        return exact

    def _inductor(self, watched: _Watched, exact: Any, expected: Any) -> None:
        if not self.with_inductor:
            return
        try:
            with _fresh():
                compiled = torch.compile(self.model, backend="inductor", dynamic=False)
                self.row.inductor_seconds = self._first_call(compiled)[0]
        except Exception as error:
            self.row.inductor_failed = _one_line(error)

    def _layerzero(self, watched: _Watched, exact: Any, expected: Any) -> None:
        row = self.row
        try:
            with _fresh():
                compiled = torch.compile(self.model, backend=watched, dynamic=False)
                seconds, first = self._first_call(compiled)
                row.seconds = seconds - watched.looking if self.with_inductor else None
                ran = list(watched.ran)
                got = [first, *(self._run(compiled, seed) for seed in range(1, SEEDS))]
                watched.ran = ran
        except Exception as error:
            row.failed = _one_line(error)
            if not self.with_inductor:
                self._dynamo()
            return
        row.error = _median_error(got, exact, self.call.valid)
        assert row.eager_error is not None
        if not row.error <= 1.5 * row.eager_error + 1e-6:
            row.wrong = f"error {row.error:.3g}, eager's {row.eager_error:.3g}"

    def _dynamo(self) -> None:
        """Without Inductor: whether the failure is Dynamo's, and so Inductor's too."""
        torch._dynamo.reset()
        try:
            self._run(torch.compile(self.model, backend="eager", dynamic=False), 0)
        except Exception as error:
            self.row.inductor_failed = _one_line(error)

    def _first_call(self, compiled: Any) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(0)
        with torch.no_grad():
            prepared = self.call.prepare(self.model, 0)
            torch.manual_seed(0)
            start = time.perf_counter()
            result = prepared(compiled)
            return time.perf_counter() - start, result

    def _settle(self, cores: list[str], watched: _Watched) -> None:
        row = self.row
        regions = [r for graph in watched.ran for r in graph.report.regions if r.kind == "attention"]
        good = [r for r in regions if not r.declined]
        row.graphs = len(watched.ran)
        row.recognised = min(len(good), row.sites)
        row.kernels = dict(Counter(r.kernel for r in good))
        row.masks = dict(Counter(_mask(r) for r in good))
        for kind, name in _REGIONS.items():
            row.regions[kind] = sum(graph.regions.get(name, 0) for graph in watched.ran)
        row.fell_back = next(
            (
                g.report.reason
                for g in watched.ran
                if "failed: " in g.report.reason or "did not take" in g.report.reason
            ),
            "",
        )
        if not row.failed:
            self._list_misses(cores, good, [r for r in regions if r.declined], watched.ran)

    def _list_misses(
        self, cores: list[str], good: list[RegionReport], declined: list[RegionReport], ran: list[_Graph]
    ) -> None:
        """Sites that no region stands for, each with what is known of it."""
        missing = list(cores)
        for region in [*good, *declined]:
            if found := _nearest(region.module, missing):
                missing.remove(found)
        self.row.misses = [Miss(r.module, f"declined: {r.reason}", r.stopped) for r in declined]
        near = [site for graph in ran for site in graph.near]
        alone = {graph.left_alone or graph.report.reason for graph in ran if not graph.report.regions} - {
            "",
            "nothing to replace",
        }
        for module in missing:
            mine = [site for site in near if _related(site.module, module)]
            site = next((s for s in mine if s.dot_product), mine[0] if mine else None)
            if site is not None:
                near.remove(site)
            if site is None:
                reason = "; ".join(sorted(alone)) or "its softmax is in no graph"
                self.row.misses.append(Miss(module, reason))
            elif site.dot_product:
                self.row.misses.append(Miss(module, site.reason, site.stopped))
            else:
                self.row.sites -= 1
                self.row.other_softmax += 1


def _mask(region: RegionReport) -> str:
    if region.mask in ("", "none"):
        return "none"
    return "honoured" if "dense" in region.mask or "additive" in region.mask else "proved"


def _related(a: str, b: str) -> bool:
    """Whether one module path lies in the other.  A frame that Dynamo compiled after a graph break has paths that begin
    at its own module."""
    if not a or not b or a == b:
        return True
    short, long = sorted((f".{a}.", f".{b}."), key=len)
    return short in long


def _nearest(module: str, names: list[str]) -> str | None:
    related = [name for name in names if _related(module, name)]
    return min(related, key=lambda name: (name != module, abs(len(name) - len(module)))) if related else None


@contextlib.contextmanager
def _fresh() -> Iterator[None]:
    """No code in memory or on disk; random numbers as eager draws them."""
    import torch._inductor.config as inductor_config
    from torch._inductor.utils import fresh_inductor_cache

    torch._dynamo.reset()
    with inductor_config.patch(fallback_random=True), fresh_inductor_cache():
        yield


def _median_error(got: list[list[torch.Tensor]], exact: list[list[torch.Tensor]], valid: torch.Tensor | None) -> float:
    """Median over the inputs of the largest difference, relative to the largest value; inf where other elements are
    not finite."""
    errors = sorted(max(_error(a, b, valid) for a, b in zip(ours, theirs)) for ours, theirs in zip(got, exact))
    return errors[len(errors) // 2]


def _error(got: torch.Tensor, expected: torch.Tensor, valid: torch.Tensor | None) -> float:
    if valid is not None and got.shape[:2] == valid.shape:
        got, expected = got[valid], expected[valid]
    got, expected = got.detach().double(), expected.detach().double()
    if got.shape != expected.shape or not torch.equal(got.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    if not finite.any():
        return 0.0
    scale = expected[finite].abs().max().clamp(min=1e-30)
    return float((got - expected)[finite].abs().max() / scale)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
