"""What is known of every candidate of every region: remembered, measured now, or estimated.

Enters: groups of equal regions with the kernels that fit them.  Leaves: for each group a :class:`Evidence`, with a
:class:`Figure` for each kernel that may win and the reason for each that may not.  Measuring happens here and nowhere
else: within a budget, dearest groups first, by one process at a time, on inputs of our own.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.fx as fx

from lz_compile import config, metrics
from lz_compile.compat import is_higher_order
from lz_compile.machine import Machine
from lz_compile.region import INDUCTOR, Kernel, Region, Work, microseconds
from lz_compile.roofline import VERSION as ROOF_VERSION
from lz_compile.roofline import Roof, fit, nominal
from lz_compile.specimen import NoSpecimen, Specimen, copy_of

if TYPE_CHECKING:
    from lz_compile.database import Database, Key, Record

log = logging.getLogger("lz_compile")

Source = Literal["measured", "remembered", "estimated"]

# A kernel whose estimate is this many times the best is not run: at 16384 tokens scores alone would fill a GPU.
_HOPELESS = 30.0
# What is estimated to take less (seconds) is run all the same: a roof that was fitted on a busy machine is off by more.
_CHEAP = 5e-3

# Told (signature, kernel) before each kernel is measured: progress bars.
listeners: list[Callable[[str, str], None]] = []
_NO_MEMORY = "not measured: too little memory is free"


@dataclass(frozen=True)
class Figure:
    """Seconds that a kernel takes on a region, where the number comes from, and the evidence beside it.

    ``spread`` is the standard deviation of the samples in seconds; ``error`` the largest error over its tolerance.
    """

    seconds: float
    source: Source
    spread: float = 0.0
    samples: int = 0
    error: float | None = None
    graph_safe: bool | None = None
    pool_bytes: int | None = None

    @classmethod
    def of(cls, record: Record, source: Source, planning: float = 0.0) -> Figure:
        assert record.seconds is not None
        return cls(
            record.seconds + planning,
            source,
            max(record.variance, 0.0) ** 0.5,
            record.samples,
            record.error,
            record.graph_safe,
            record.pool_bytes,
        )

    def __str__(self) -> str:
        return f"{microseconds(self.seconds)} {self.source}"


@dataclass
class Group:
    """Regions that one measurement serves.  ``signature`` is None when they cannot be run on their own."""

    regions: list[Region]
    kernels: list[Kernel]
    copied: bool
    signature: str | None = None
    stands: Callable[[Region], Work] | None = None


@dataclass
class Evidence:
    """Per kernel name (``inductor`` included) a figure, or why there is none and the kernel may not win.

    ``rejected`` kernels were found wrong or unsafe; of ``unmeasured`` ones nothing is known here.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)

    @property
    def why_not(self) -> dict[str, str]:
        return {**self.unmeasured, **self.rejected}


@dataclass(frozen=True)
class Terms:
    """How to gather: ``measure`` and ``budget`` as in :mod:`lz_compile.config`; ``graphs`` when the mode uses CUDA
    graphs; ``inductor`` are the config patches of the compile; the functions come from the road."""

    measure: str
    budget: float
    graphs: bool
    inductor: dict[str, Any]
    make_emitter: Callable[..., Any]
    lay_out: Callable[[Any, fx.Node, fx.Node], fx.Node]


@dataclass
class Gathered:
    """Evidence in the order of the groups, the roof that estimates used, and notes for the report.

    ``measured`` are the seconds that measuring took, ``measuring`` says what was measured.
    """

    evidence: list[Evidence]
    roof: Roof
    note: str
    measured: float = 0.0
    measuring: str = ""


def gather(
    groups: Sequence[Group],
    terms: Terms,
    database: Database,
    device: torch.device,
    trusted: Callable[[Kernel], bool],
) -> Gathered:
    """Evidence for every group.

    ``trusted(kernel)`` says that a kernel may win by an estimate, before it was qualified here.  Never raises for a
    kernel's sake: one that fails is rejected with the reason.
    """
    work = _Gathering(terms, database, device, trusted)
    return work.run(groups)


class _Gathering:
    def __init__(
        self, terms: Terms, database: Database, device: torch.device, trusted: Callable[[Kernel], bool]
    ) -> None:
        self.terms = terms
        self.trusted = trusted
        self.database = database
        self.device = device
        self.machine = Machine.of(device)
        self.graphs = terms.graphs and device.type == "cuda"
        self.started = time.perf_counter()
        self.measured = 0
        self.seconds = 0.0  # of measuring
        self.roof = nominal(device)

    @property
    def left(self) -> float:
        return self.terms.budget - (time.perf_counter() - self.started)

    def key(self, group: Group, kernel: str, version: str) -> Key:
        from lz_compile.database import Key

        assert group.signature is not None
        return Key(kernel, version, group.signature, self.machine, self.graphs)

    def keys(self, group: Group) -> dict[str, Key]:
        if group.signature is None:
            return {}
        versions = {kernel.name: kernel.version for kernel in group.kernels}
        # What Inductor makes of a region depends on how it was spelled.
        versions[INDUCTOR] = f"{torch.__version__} {group.regions[0].pattern}"
        return {name: self.key(group, name, version) for name, version in versions.items()}

    def run(self, groups: Sequence[Group]) -> Gathered:
        keys = [self.keys(group) for group in groups]
        known = self._look_up([key for mapping in keys for key in mapping.values()])
        self.roof = self._roof()
        fresh: dict[Key, Record] = {}
        skipped: list[dict[str, str]] = [{} for _ in groups]
        # With one candidate there is nothing to decide, but its numbers are checked all the same.
        unknown = [
            {name: key for name, key in mapping.items() if key not in known} if group.kernels else {}
            for group, mapping in zip(groups, keys)
        ]
        if any(unknown) and self.terms.measure == "auto" and _is_measurable(self.device):
            with self._clocked(), apart(self.device):
                for i in sorted(range(len(groups)), key=lambda i: -self._value(groups[i])):
                    missing = {name: key for name, key in unknown[i].items() if key not in known}
                    if missing:
                        fresh.update(self._measure(groups[i], missing, known, skipped[i]))
        evidence = [
            self._evidence(group, mapping, known, fresh, why) for group, mapping, why in zip(groups, keys, skipped)
        ]
        note = f"{len(known)} figures remembered" if known else "no figures remembered"
        return Gathered(evidence, self.roof, note, self.seconds, f"{self.measured} kernels" if self.seconds else "")

    @contextlib.contextmanager
    def _clocked(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin

    def _look_up(self, keys: list[Key]) -> dict[Key, Record]:
        if self.terms.measure == "off" or not keys:
            return {}
        found = self.database.look_up(keys)
        metrics.looked_up(len(found), len(set(keys)) - len(found))
        return found

    # -- estimates

    def _roof(self) -> Roof:
        """Fitted to the device where measuring is allowed or was done before, else by what the driver says."""
        from lz_compile.database import Key, Record

        signature = f"roof {self.device.type}"
        key = Key("machine.roof", ROOF_VERSION, signature, self.machine, False)

        def remembered() -> Roof | None:
            found = self._look_up([key]).get(key)
            if found is not None:
                with contextlib.suppress(Exception):
                    peaks = {getattr(torch, name): float(value) for name, value in found.evidence["flops"].items()}
                    return Roof(float(found.evidence["bandwidth"]), peaks, fitted=True)
            return None

        known = remembered()
        if known is not None:
            return known
        if self.terms.measure != "auto" or self.left <= 0 or not _is_measurable(self.device):
            return nominal(self.device)
        with self.database.claim(key, wait=max(self.left, 0.0)) as mine:
            known = remembered()  # someone else may have measured it meanwhile
            if known is not None or not mine:
                return known or nominal(self.device)
            try:
                with self._clocked(), apart(self.device):
                    roof = fit(self.device)
            except Exception as error:
                log.warning("lz-compile could not measure %s: %s", self.device, error)
                return nominal(self.device)
            facts = {"bandwidth": roof.bandwidth, "flops": {str(d).split(".")[1]: f for d, f in roof.flops.items()}}
            self.database.store([Record(key, None, 0.0, 0, 0.0, True, evidence=facts, created=time.time())])
        return roof

    def _value(self, group: Group) -> float:
        """Seconds at stake in a group, roughly."""
        estimates = [self.estimate(work, group) for work in (group.stands, *(k.work for k in group.kernels))]
        return max([e for e in estimates if e is not None], default=0.0) * len(group.regions)

    @staticmethod
    def _planning(work: Callable[[Region], Work] | None, group: Group) -> float:
        with contextlib.suppress(Exception):  # the estimate warns of it
            return work(group.regions[0]).planning if work is not None else 0.0
        return 0.0

    def estimate(self, work: Callable[[Region], Work] | None, group: Group) -> float | None:
        """Roofline seconds of a kernel on a group, None where it has none."""
        if work is None:
            return None
        region = group.regions[0]
        try:
            dtype = region.output.meta["val"].dtype
            return self.roof.seconds(work(region), dtype, self.device.type)
        except Exception as error:
            if config.strict:
                raise
            log.warning("lz-compile could not estimate a kernel for %s: %s", region.module, error)
            return None

    def _evidence(
        self,
        group: Group,
        keys: dict[str, Key],
        known: dict[Key, Record],
        fresh: dict[Key, Record],
        skipped: dict[str, str],
    ) -> Evidence:
        """Measured kernels compete with each other; only where none was measured do estimates decide."""
        result = Evidence()
        works = {kernel.name: kernel.work for kernel in group.kernels} | {INDUCTOR: group.stands}
        for name, key in keys.items():
            record, source = (fresh[key], "measured") if key in fresh else (known.get(key), "remembered")
            if record is None:
                continue
            if not record.qualified:
                result.rejected[name] = record.reason
            elif record.seconds is not None:
                planning = self._planning(works.get(name), group)
                result.figures[name] = Figure.of(record, source, planning)  # type: ignore[arg-type]
        anything_measured = any(name != INDUCTOR for name in result.figures)
        if not anything_measured and any(kernel.name not in result.rejected for kernel in group.kernels):
            result.figures.pop(INDUCTOR, None)  # a measured time says nothing beside estimated ones
        for kernel in group.kernels:
            if kernel.name in result.figures or kernel.name in result.rejected:
                continue
            why = skipped.get(kernel.name, "")
            if anything_measured:
                result.unmeasured[kernel.name] = why or "not measured, and others were"
            elif not self.trusted(kernel):
                result.unmeasured[kernel.name] = why or f"not qualified here yet (measure={self.terms.measure!r})"
            elif self.graphs and not kernel.cuda_graphs:
                result.rejected[kernel.name] = "not safe under CUDA graphs: its record does not say that it is"
            else:
                seconds = self.estimate(kernel.work, group)
                # Without an estimate the order of preference decides.
                result.figures[kernel.name] = Figure(
                    1e-9 * (1 + group.kernels.index(kernel)) if seconds is None else seconds, "estimated"
                )
        if INDUCTOR not in result.figures:
            slowest = max((f.seconds for f in result.figures.values()), default=0.0)
            stands = self.estimate(group.stands, group) if not anything_measured else None
            # Unknown and unmeasured: a kernel that was picked for a reason goes first.
            result.figures[INDUCTOR] = Figure(max(stands or 0.0, 1.05 * slowest), "estimated")
        return result

    # -- measuring

    def _measure(
        self, group: Group, missing: dict[str, Key], known: dict[Key, Record], skipped: dict[str, str]
    ) -> dict[Key, Record]:
        if group.regions[0].output.meta["val"].device != self.device:
            skipped.update(dict.fromkeys(missing, "not measured: the graph's first region is on another device"))
            return {}
        if self.left <= 0:
            skipped.update(dict.fromkeys(missing, f"not measured: the budget of {self.terms.budget:g} s was spent"))
            return {}
        claim = self.key(group, "*", "")
        with self.database.claim(claim, wait=max(self.left, 0.0)) as mine:
            # Someone else may have measured it meanwhile.
            again = self.database.look_up(missing.values())
            known.update(again)
            missing = {name: key for name, key in missing.items() if key not in again}
            if not mine:
                skipped.update(dict.fromkeys(missing, "not measured: someone else is measuring it"))
            if not missing or not mine:
                return {}
            try:
                records = _Bench(self, group, missing, skipped).run()
            except NoSpecimen as reason:
                skipped.update(dict.fromkeys(missing, f"not measured: {reason}"))
                return {}
            except torch.OutOfMemoryError:
                skipped.update(dict.fromkeys(missing, _NO_MEMORY))
                return {}
            except Exception as error:
                if config.strict:
                    raise
                log.warning("lz-compile could not measure %s: %s", group.regions[0].module, error)
                skipped.update(dict.fromkeys(missing, f"not measured: {type(error).__name__}: {error}"))
                return {}
            self.database.store(records)
        self.measured += len(records)
        return {record.key: record for record in records}


class _Bench:
    """Qualifies and times the candidates of one group."""

    def __init__(self, gathering: _Gathering, group: Group, missing: dict[str, Key], skipped: dict[str, str]) -> None:
        from lz_compile.qualify import Reference

        self.gathering = gathering
        self.terms = gathering.terms
        self.group = group
        self.missing = missing
        self.skipped = skipped
        estimates = {kernel.name: gathering.estimate(kernel.work, group) for kernel in group.kernels}
        self.estimates = {name: seconds for name, seconds in estimates.items() if seconds is not None}
        self.specimen: Specimen
        self.reference: Any
        if group.regions[0].attention is not None:
            self.specimen = Specimen.of(group.regions[0], group.copied)
            mask = self.specimen.build(_emit_mask, self.terms.make_emitter)
            self.reference = Reference(self.specimen, mask)
        else:
            from lz_compile.lowering.pointwise import meaning
            from lz_compile.pointwise_specimen import PointwiseReference, PointwiseSpecimen, ProjectionsSpecimen
            from lz_compile.projections import Projections

            is_linear = isinstance(group.regions[0].op, Projections)
            kind = ProjectionsSpecimen if is_linear else PointwiseSpecimen
            pointwise = kind.of(group.regions[0], group.copied)
            self.specimen, self.reference = pointwise, PointwiseReference(pointwise, meaning(group.regions[0]))

    def run(self) -> list[Record]:
        from lz_compile.database import Record, confidence_of

        verdicts: dict[str, Any] = {}
        modules: dict[str, fx.GraphModule] = {}
        for kernel in self.group.kernels:
            if kernel.name not in self.missing or self._is_hopeless(kernel) or not self._affordable(kernel):
                continue
            begin = time.perf_counter()
            try:
                verdict, module = self._qualify(kernel)
                log.debug("lz-compile: %s took %.1f s to qualify", kernel.name, time.perf_counter() - begin)
            except torch.OutOfMemoryError:
                self.skipped[kernel.name] = _NO_MEMORY
                _give_memory_back(self.gathering.device)
                continue
            verdicts[kernel.name] = verdict
            if verdict.qualified and module is not None:
                modules[kernel.name] = module
        # With nothing to compare to, the time of Inductor's version decides nothing.
        timings = self._time(modules) if modules else {}
        records = []
        for name, key in self.missing.items():
            verdict, timing = verdicts.get(name), timings.get(name)
            if verdict is None and timing is None:
                continue
            if verdict is not None and verdict.qualified and timing is None:
                self.skipped.setdefault(name, "not measured: it could not be timed")
                continue
            records.append(
                Record(
                    key,
                    timing.median if timing else None,
                    timing.variance if timing else 0.0,
                    timing.samples if timing else 0,
                    confidence_of(timing.samples, timing.variance, timing.median) if timing else 0.0,
                    verdict.qualified if verdict is not None else True,
                    reason=verdict.reason if verdict is not None else "",
                    error=verdict.error if verdict is not None and verdict.error == verdict.error else None,
                    graph_safe=verdict.graph_safe if verdict is not None else None,
                    pool_bytes=verdict.pool_bytes if verdict is not None else None,
                    evidence=verdict.evidence if verdict is not None else {},
                    created=time.time(),
                )
            )
        return records

    def _is_hopeless(self, kernel: Kernel) -> bool:
        """Whether a kernel's estimate is so far from the best that running it would only cost time and memory."""
        known = self.estimates
        mine = known.get(kernel.name)
        if mine is None or mine < _CHEAP:
            return False
        best = min(known, key=known.__getitem__)
        times = mine / max(known[best], 1e-6)
        if times <= _HOPELESS:
            return False
        self.skipped[kernel.name] = f"not measured: estimated to take {times:.0f} times as long as {best}"
        return True

    def _affordable(self, kernel: Kernel) -> bool:
        left = self.gathering.left
        wanted = kernel.first_call(self.group.regions[0]) if kernel.first_call is not None else 0.0
        if left > wanted:
            return True
        if left <= 0:
            self.skipped[kernel.name] = f"not measured: the budget of {self.terms.budget:g} s was spent"
        else:
            self.skipped[kernel.name] = (
                f"not measured: its first call compiles for up to {wanted:.0f} s, more than the budget leaves "
                "(`lz-compile tune` takes the time)"
            )
        return False

    def _qualify(self, kernel: Kernel) -> tuple[Any, fx.GraphModule | None]:
        from lz_compile.graph_safety import replay_follows
        from lz_compile.qualify import Verdict, one_line, qualify

        for listener in listeners:
            listener(self.group.signature or "", kernel.name)
        try:
            module = self.specimen.build(self._emit_of(kernel), self.terms.make_emitter)
            if _is_generated(module):
                inputs = self.reference.problem("typical").inputs
                module.forward = _compiled(module, inputs, self.terms.inductor)  # type: ignore[method-assign]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return Verdict(False, f"failed to emit: {one_line(error)}"), None
        verdict = qualify(self.reference, module)
        if verdict.qualified and self.gathering.graphs:
            verdict = replay_follows(self.reference, module, kernel.cuda_graphs, verdict)
        return verdict, module

    def _emit_of(self, kernel: Kernel) -> Callable[[Any, Region], fx.Node]:
        def emit(emitter: Any, region: Region) -> fx.Node:
            result = kernel.emit(emitter, region)
            return result if self.specimen.copied else self.terms.lay_out(emitter, region.output, result)

        return emit

    def _time(self, modules: dict[str, fx.GraphModule]) -> dict[str, Any]:
        from lz_compile.qualify import one_line
        from lz_compile.timing import copies_for, time_together

        device = self.gathering.device
        one = sum(x.bytes for x in self.specimen.layouts.values() if not isinstance(x, int))
        inputs = [self.reference.problem("typical", seed=2).inputs]
        for _ in range(copies_for(one, device) - 1):
            inputs.append([copy_of(value) for value in inputs[0]])
        calls: dict[str, Callable[[int], Any]] = {}
        for name, module in modules.items():
            try:
                calls[name] = _bound(module, self.specimen, inputs, self.terms.inductor)
            except torch.OutOfMemoryError:
                self.skipped[name] = _NO_MEMORY
                _give_memory_back(device)
            except Exception as error:
                self.skipped[name] = f"not measured: {one_line(error)}"
        if INDUCTOR in self.missing and self.gathering.left > 0:
            try:
                calls[INDUCTOR] = self._as_inductor(inputs)
            except NoSpecimen as reason:
                self.skipped[INDUCTOR] = f"not measured: {reason}"
            except Exception as error:
                log.info("lz-compile could not time Inductor's version of %s: %s", self.group.regions[0].module, error)
                self.skipped[INDUCTOR] = f"not measured: {type(error).__name__}: {error}"
        return time_together(calls, len(inputs), device, seconds=min(1.0, 0.15 * max(len(calls), 1)))

    def _as_inductor(self, inputs: list[list[Any]]) -> Callable[[int], Any]:
        """What Inductor makes of the region's own nodes."""
        for listener in listeners:
            listener(self.group.signature or "", INDUCTOR)
        compiled = _compiled(self.specimen.as_it_stood(), inputs[0], self.terms.inductor)
        compiled(*inputs[0])
        return lambda copy: compiled(*inputs[copy])


def _is_generated(module: fx.GraphModule) -> bool:
    """Whether Inductor generates the kernel: a higher-order operator runs as something else eagerly."""
    return any(is_higher_order(node) for node in module.graph.nodes)


def _compiled(module: fx.GraphModule, inputs: list[Any], inductor: dict[str, Any]) -> Callable[..., Any]:
    """A module as Inductor compiles it in the middle of another compile, for real inputs, without CUDA graphs."""
    from torch._inductor.compile_fx import compile_fx

    plain = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in plain.graph.nodes:
        node.meta = {}
    with torch._guards.tracing(None):
        return compile_fx(plain, inputs, config_patches={**inductor, "triton.cudagraphs": False})


def _bound(
    module: fx.GraphModule, specimen: Specimen, inputs: list[list[Any]], inductor: dict[str, Any]
) -> Callable[[int], Any]:
    """The part of a module that every layer runs; what depends on the mask alone is shared by layers and done here."""
    roots = set(specimen.roots)
    shared, own = _split(module, roots)
    arguments = [[*(values[i] for i in sorted(roots)), *shared(*values)] for values in inputs]
    run: Callable[..., Any] = _compiled(own, arguments[0], inductor) if _is_generated(own) else own
    run(*arguments[0])
    return lambda copy: run(*arguments[copy])


def _split(module: fx.GraphModule, roots: set[int]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A module as two: what does not depend on the inputs ``roots`` (returns a tuple), and the rest, which takes those
    inputs in order and then that tuple's members."""
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    late = {placeholders[i] for i in roots}
    for node in graph.nodes:
        if any(argument in late for argument in node.all_input_nodes):
            late.add(node)
    output = graph.output_node()
    late.add(output)
    cut: list[fx.Node] = []
    for node in graph.nodes:
        if node in late:
            cut += [a for a in node.all_input_nodes if a not in late and a not in cut and a.op != "get_attr"]
    first = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or node not in late:
            mapping[node] = first.node_copy(node, lambda n: mapping[n])
    first.output(tuple(mapping[node] for node in cut))
    second = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    for i in sorted(roots):
        moved[placeholders[i]] = second.node_copy(placeholders[i])
    for node in cut:
        moved[node] = second.placeholder(f"shared_{node.name}")
    for node in graph.nodes:
        if node.op == "get_attr" or (node in late and node.op != "placeholder"):
            moved[node] = second.node_copy(node, lambda n: moved[n])
    return fx.GraphModule(module, first), fx.GraphModule(module, second)


def _emit_mask(emitter: Any, region: Region) -> Any:
    try:
        m = emitter.mask_arguments(region)
    except NotImplementedError as reason:
        raise NoSpecimen(str(reason)) from None
    return (m.bounds, m.key_mask, m.query_documents, m.key_documents, m.mask)


def _is_measurable(device: torch.device) -> bool:
    """Other devices run asynchronously in ways of their own; a stream that is being captured runs nothing."""
    return device.type == "cpu" or (device.type == "cuda" and not torch.cuda.is_current_stream_capturing())


@contextlib.contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Real tensors in the middle of a compile: no dispatch modes of the caller's, no gradients; random states are put
    back and memory is given back.  (Default devices and inference mode Dynamo keeps away from a backend.)
    """
    from torch.utils._python_dispatch import _disable_current_modes

    on_gpu = device.type == "cuda"
    guard = torch.cuda.device(device) if on_gpu else contextlib.nullcontext()
    with (
        torch.random.fork_rng([device] if on_gpu else []),
        _disable_current_modes(),
        torch.no_grad(),
        guard,
    ):
        try:
            yield
        finally:
            _give_memory_back(device)


def _give_memory_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
