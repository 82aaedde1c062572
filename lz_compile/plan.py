"""Which kernel runs which region, decided for the whole graph at once.

Enters: regions, the kernels that compete, and the terms of the compile.  Leaves: a :class:`Plan` with one
:class:`Choice` a region.  Three questions are kept apart:

1. *May it run?*  The provider works on this machine (:mod:`lz_compile.discovery`), the kernel fits the region
   (``Kernel.supports``), the policy and the options allow it, its numbers and its CUDA-graph safety were proved here
   (:mod:`lz_compile.qualify`).
2. *What does it cost?*  Measured, remembered or estimated seconds (:mod:`lz_compile.measure`).
3. *Which choice is best for the graph?*  The least sum of costs of regions and of edges between them, exactly
   (:mod:`lz_compile.assignment`).  Equal regions in layers that differ in their number only get equal choices.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from lz_compile import assignment, config
from lz_compile.database import Database, default
from lz_compile.machine import Machine
from lz_compile.measure import Evidence, Figure, Gathered, Group, Terms, gather
from lz_compile.region import INDUCTOR, Cause, Kernel, Provider, Region, Verdict, Work, microseconds
from lz_compile.roofline import Roof, launch_seconds
from lz_compile.signature import signature_of

if TYPE_CHECKING:
    from lz_compile.policy import Judgement, Policy

log = logging.getLogger("lz_compile")

# Kinds that Inductor would fuse with pointwise neighbours; an opaque kernel in their place makes values cross memory.
FUSIBLE = frozenset({"rms_norm", "layer_norm", "rope", "glu"})
# Kinds in which a kernel has to win beyond the noise: fusion is worth more, and weights do not move for nothing.
_LEFT_IN_DOUBT = FUSIBLE | {"projections"}
# Inductor's version has to be this much faster than a kernel's: within the noise the kernel stays, which also saves the
# memory of a mask or of repeated heads.  In a kind that is left in doubt the kernel has to be that much faster.
_INDUCTOR_MARGIN = 1.03

COVERED = "covered by "


@dataclass
class Choice:
    """``kernel`` is None when the region is left to Inductor or covered by a neighbour's kernel (``covered_by``).

    ``figures`` are the costs of what competed, by kernel name, ``rejected`` maps the others to why not; ``rules`` are
    the policy rules that decided something.  ``cause`` is the class of the reason where no kernel was chosen.
    """

    region: Region
    kernel: Kernel | None
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    covered_by: str = ""
    cause: Cause = ""


@dataclass
class Plan:
    """``planner`` is how it was found, ``notes`` what the report adds; costs are seconds for the whole graph.

    ``measured`` are the seconds that measuring took, ``measuring`` says what was measured.
    """

    choices: list[Choice]
    planner: str
    notes: list[str] = field(default_factory=list)
    cost: float = math.nan
    greedy_cost: float = math.nan
    measured: float = 0.0
    measuring: str = ""


@dataclass(frozen=True)
class Market:
    """What competes: kernels in order of preference, the provider of each, and what leaving a region alone costs."""

    kernels: Sequence[Kernel]
    providers: Mapping[str, Provider] = field(default_factory=dict)
    inductor: Callable[[Region], Work] | None = None

    def trusted(self, kernel: Kernel) -> bool:
        """What comes with PyTorch or with us may win before it was qualified on this machine: our tests did that."""
        provider = self.providers.get(kernel.provider)
        return provider is None or not provider.distributions


@dataclass
class _Site:
    """A region while it is planned."""

    region: Region
    candidates: list[Kernel] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    judgement: Judgement | None = None
    ruled_out: list[Kernel] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)
    key: Any = None

    @property
    def overruled(self) -> bool:
        """Whether a kernel would fit that an option or the policy rules out."""
        return any(_why_not(kernel, self.region) is None for kernel in self.ruled_out)

    @property
    def leaving_allowed(self) -> bool:
        return self.judgement is None or self.judgement.why_not(INDUCTOR) is None


def joint(
    regions: Sequence[Region],
    market: Market,
    terms: Terms,
    policy: Policy,
    mode: str,
    is_copied: Callable[[fx.Node], bool],
    database: Database | None = None,
) -> Plan:
    """The cheapest plan for all regions of a graph.

    ``is_copied(output)`` says that whoever reads a region's output copies it anyway, so that its layout is free.

    Raises:
        PolicyError: a lock that cannot be honoured.
    """
    sites = [_site(region, market, policy, mode) for region in regions]
    _reject_partial_covers(sites)
    open_sites = [site for site in sites if not site.region.declined]
    if not open_sites:
        return Plan([_choice(site, None) for site in sites], planner="nothing to decide")
    groups, members = _groups(open_sites, market, is_copied)
    if database is None:
        database = default()
    device = open_sites[0].region.output.meta["val"].device
    gathered = gather(groups, terms, database, device, market.trusted)
    for group_sites, evidence in zip(members, gathered.evidence):
        for site in group_sites:
            site.evidence = evidence
            _require_lock(site)
    labels, solution = _solve(open_sites, gathered)
    picked = dict(zip(map(id, open_sites), labels))
    plan = Plan([_choice(site, picked.get(id(site))) for site in sites], planner=_planner_text(solution))
    plan.cost, plan.greedy_cost = solution.cost, solution.greedy_cost
    plan.notes = [gathered.note, *_gap_note(solution)]
    plan.measured, plan.measuring = gathered.measured, gathered.measuring
    return plan


# -- may it run?


def _site(region: Region, market: Market, policy: Policy, mode: str) -> _Site:
    site = _Site(region)
    if region.declined:
        return site
    kinds = [kernel for kernel in market.kernels if kernel.kind == region.kind]
    names = [kernel.name for kernel in kinds]
    known = [kernel.name for kernel in market.kernels]
    judgement = site.judgement = policy.judge(facts_of(region, mode), names, known)
    for kernel in kinds:
        if any(fnmatchcase(kernel.name, pattern) for pattern in config.disable):
            site.rejected[kernel.name] = "disabled by option"
            site.ruled_out.append(kernel)
        elif by_policy := judgement.why_not(kernel.name):
            site.rejected[kernel.name] = by_policy
            site.ruled_out.append(kernel)
        elif why_not := _why_not(kernel, region):
            site.rejected[kernel.name] = why_not
        else:
            site.candidates.append(kernel)
    _prefer(site)
    return site


def _reject_partial_covers(sites: Sequence[_Site]) -> None:
    """A region that spans others cannot be replaced where one of them may not be."""
    replaceable = {id(site.region) for site in sites if not site.region.declined}
    for site in sites:
        if any(id(region) not in replaceable for region in site.region.covers):
            why = "a region that it covers may not be replaced"
            site.rejected.update({kernel.name: why for kernel in site.candidates})
            site.candidates = []


def _why_not(kernel: Kernel, region: Region) -> Verdict:
    try:
        return kernel.supports(region)
    except Exception as error:
        if config.strict:
            raise
        log.warning("%s could not say whether it takes %s: %s", kernel.name, region.module, error)
        return f"failed: {type(error).__name__}: {error}"


def _prefer(site: _Site) -> None:
    """``config.prefer``: where a preferred kernel fits, the others do not compete."""
    for pattern in config.prefer:
        preferred = [kernel for kernel in site.candidates if fnmatchcase(kernel.name, pattern)]
        if preferred:
            for kernel in site.candidates:
                if kernel not in preferred:
                    site.rejected[kernel.name] = f"option prefers {pattern}"
            site.candidates = preferred
            return


def _require_lock(site: _Site) -> None:
    """A lock is a promise to the user: where its kernel cannot run the compile stops."""
    if site.judgement is not None:
        usable = [kernel.name for kernel in site.candidates if _may_win(site, kernel.name)]
        reasons = {**site.rejected, **site.evidence.why_not}
        site.judgement.require(usable, reasons, site.region.module or "the top level")


def facts_of(region: Region, mode: str) -> dict[str, Any]:
    """What policy rules may ask about a region (see :data:`lz_compile.policy.FACTS`)."""
    value = region.output.meta["val"]
    facts: dict[str, Any] = {
        "op": region.kind,
        "module": region.module,
        "pattern": region.pattern,
        "dtype": str(value.dtype).removeprefix("torch."),
        "device": value.device.type,
        "device_name": Machine.of(value.device).device,
        "mode": mode,
    }
    if region.attention is not None:
        q, k, v = region.attention.fake()
        facts |= {
            "head_size": q.shape[3],
            "value_head_size": v.shape[3],
            "queries": q.shape[2],
            "keys": k.shape[2],
            "batch": q.shape[0],
            "heads": q.shape[1],
            "kv_heads": k.shape[1],
            "phase": "decode" if isinstance(q.shape[2], int) and q.shape[2] == 1 else "prefill",
        }
    return {name: fact if isinstance(fact, (int, str)) else None for name, fact in facts.items()}


# -- what does it cost?


def _groups(
    sites: Sequence[_Site], market: Market, is_copied: Callable[[fx.Node], bool]
) -> tuple[list[Group], list[list[_Site]]]:
    """Sites that one measurement serves, together."""
    groups: dict[Any, tuple[Group, list[_Site]]] = {}
    for site in sites:
        region = site.region
        copied = is_copied(region.output)
        text = signature_of(region, copied)
        names = tuple(kernel.name for kernel in site.candidates)
        where = text if text is not None else id(region)
        site.key = (region.kind, region.pattern, where, names)
        if site.key not in groups:
            groups[site.key] = (Group([], list(site.candidates), copied, text, market.inductor), [])
        group, members = groups[site.key]
        group.regions.append(region)
        members.append(site)
    return [group for group, _ in groups.values()], [members for _, members in groups.values()]


# -- which is best for the graph?


def _solve(sites: Sequence[_Site], gathered: Gathered) -> tuple[list[str], assignment.Solution]:
    """The label of each site: a kernel's name, ``inductor``, or ``covered by ...``."""
    labels: list[list[str]] = []
    costs: list[list[float]] = []
    inside = {
        node for site in sites if site.region.kind in FUSIBLE for node in (*site.region.nodes, site.region.output)
    }
    for site in sites:
        names = [kernel.name for kernel in site.candidates if _may_win(site, kernel.name)]
        labels.append([*names, INDUCTOR])
        lost = _lost_fusion(site.region, inside, gathered.roof) if site.region.kind in FUSIBLE else 0.0
        costs.append([_cost(site, name) + lost for name in names] + [_cost_of_leaving(site, bool(names))])
    edges = _cover_edges(sites, labels, costs) | _fusion_edges(sites, labels, gathered)
    classes = [_class(site, i, label) for i, (site, label) in enumerate(zip(sites, labels))]
    solution = assignment.solve(assignment.Problem(costs, edges, classes))
    return [label[i] for label, i in zip(labels, solution.labels)], solution


def _may_win(site: _Site, name: str) -> bool:
    """A lock overrules that nothing was measured, never that a kernel was found wrong or unsafe."""
    locked = site.judgement is not None and site.judgement.locked is not None
    return name not in site.evidence.rejected and (locked or name not in site.evidence.unmeasured)


def _cost(site: _Site, name: str) -> float:
    figure = site.evidence.figures.get(name)
    boost = site.judgement.boost.get(name, 1.0) if site.judgement is not None else 1.0
    return (figure.seconds if figure is not None else 0.0) / boost


def _cost_of_leaving(site: _Site, has_choice: bool) -> float:
    """Infinite where the user will not have it, and where an option names a kernel that can run."""
    if not site.leaving_allowed:
        return math.inf if has_choice else 0.0
    if has_choice and (config.prefer and any(_is_preferred(k) for k in site.candidates)):
        return math.inf
    margin = 1 / _INDUCTOR_MARGIN if site.region.kind in _LEFT_IN_DOUBT else _INDUCTOR_MARGIN
    return _cost(site, INDUCTOR) * margin


def _asked_for(site: _Site) -> bool:
    """Whether the user named the kernel of this very region, so that no larger kernel may swallow it."""
    return (site.judgement is not None and site.judgement.locked is not None) or any(
        map(_is_preferred, site.candidates)
    )


def _is_preferred(kernel: Kernel) -> bool:
    return any(fnmatchcase(kernel.name, pattern) for pattern in config.prefer)


def _cover_edges(
    sites: Sequence[_Site], labels: list[list[str]], costs: list[list[float]]
) -> dict[tuple[int, int], list[list[float]]]:
    """A region that spans others runs by its own kernel if and only if the others are covered by it."""
    index = {id(site.region): i for i, site in enumerate(sites)}
    spans: list[tuple[int, int]] = []
    for i, site in enumerate(sites):
        inner = [index[id(region)] for region in site.region.covers if id(region) in index]
        if site.region.covers and not site.candidates:
            labels[i], costs[i] = [INDUCTOR], [0.0]
            inner = []
        elif inner and math.isfinite(costs[i][-1]):
            costs[i][-1] = 0.0  # left alone, it costs what its parts cost
        for j in inner:
            labels[j].append(f"{COVERED}{site.region.module or site.region.pattern} #{i}")
            costs[j].append(math.inf if _asked_for(sites[j]) else 0.0)
            spans.append((i, j))
    edges: dict[tuple[int, int], list[list[float]]] = {}
    for i, j in spans:
        mine = f"#{i}"
        edges[i, j] = [
            [
                0.0 if (outer != INDUCTOR) == (label.startswith(COVERED) and label.endswith(mine)) else math.inf
                for label in labels[j]
            ]
            for outer in labels[i]
        ]
    return edges


def _fusion_edges(
    sites: Sequence[_Site], labels: list[list[str]], gathered: Gathered
) -> dict[tuple[int, int], list[list[float]]]:
    """Two neighbours that Inductor would fuse share a value that then never goes through memory.

    Measured alone, each pays for writing or reading it; left to Inductor together they save that.
    """
    producer = {id(site.region.output): i for i, site in enumerate(sites) if site.region.kind in FUSIBLE}
    edges: dict[tuple[int, int], list[list[float]]] = {}
    for j, site in enumerate(sites):
        if site.region.kind not in FUSIBLE:
            continue
        for value in site.region.inputs:
            i = producer.get(id(_behind_views(value)))
            if i is None or i == j:
                continue
            device = value.meta["val"].device.type
            saved = gathered.roof.transfer(2 * _bytes(value)) + launch_seconds(device)
            edges[i, j] = [[-saved if a == INDUCTOR and b == INDUCTOR else 0.0 for b in labels[j]] for a in labels[i]]
    return edges


def _lost_fusion(region: Region, inside: set[fx.Node], roof: Roof) -> float:
    """Seconds that an opaque kernel costs because pointwise neighbours, which Inductor would fuse with the region, run
    apart: each is another launch, and values cross memory.

    A value that only this region reads is written and read in vain, one that others read too is read once more.  What
    is ``inside`` a region is left out: edges between regions count that.
    """

    def fuses(node: fx.Node) -> bool:
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        return node.op == "call_function" and pointwise and node not in inside

    moved, launches = 0.0, 0
    for value in region.inputs:
        if fuses(_behind_views(value)):
            moved += _bytes(value) * (2 if len(value.users) == 1 else 1)
            launches += 1
    readers = list(region.output.users)
    if readers and all(map(fuses, readers)):
        moved += 2 * _bytes(region.output)
        launches += 1
    return roof.transfer(moved) + launches * launch_seconds(region.output.meta["val"].device.type)


def _bytes(node: fx.Node) -> float:
    tensor = node.meta["val"]
    count = tensor.numel()
    return float(count * tensor.element_size()) if isinstance(count, int) else 0.0


_VIEWS = {"view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "alias", "detach"}


def _behind_views(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and getattr(node.target, "_opname", "") in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _class(site: _Site, index: int, labels: list[str]) -> Any:
    """Sites of one class get one choice: equal regions whose module paths differ in layer numbers only."""
    if any(label.startswith(COVERED) for label in labels) or site.region.covers:
        return index
    module = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site.region.module)
    boosts = tuple(sorted(site.judgement.boost.items())) if site.judgement is not None else ()
    return (site.key, module, tuple(labels), boosts, site.leaving_allowed)


def _planner_text(solution: assignment.Solution) -> str:
    return f"joint, exact (width {solution.width})"


def _gap_note(solution: assignment.Solution) -> list[str]:
    notes = []
    if solution.greedy_cost > solution.cost * (1 + 1e-9) or math.isinf(solution.greedy_cost):
        greedy = "impossible" if math.isinf(solution.greedy_cost) else microseconds(solution.greedy_cost)
        notes.append(f"plan {microseconds(solution.cost)}, each region on its own: {greedy}")
    if solution.cost > solution.bound + 1e-9 * abs(solution.bound):
        notes.append(f"equal choices for equal layers cost {1e6 * (solution.cost - solution.bound):.3g} us")
    return notes


# -- words


def _choice(site: _Site, label: str | None) -> Choice:
    region = site.region
    if region.declined:
        return Choice(region, None, region.declined, cause="declined")
    assert label is not None
    rejected = {**site.rejected, **site.evidence.why_not}
    figures = {name: site.evidence.figures[name] for name in sorted(site.evidence.figures, key=_by_time(site))}
    rules = list(site.judgement.fired) if site.judgement is not None else []
    if label.startswith(COVERED):
        name = label.removeprefix(COVERED).rpartition(" #")[0]
        inside = f"runs inside the kernel of {name}"
        return Choice(region, None, inside, rejected, figures, rules, covered_by=name, cause="covered")
    if label == INDUCTOR:
        cause, reason = _reason_to_leave(site)
        return Choice(region, None, reason, rejected, figures, rules, cause=cause)
    kernel = next(kernel for kernel in site.candidates if kernel.name == label)
    rejected.pop(label, None)
    return Choice(region, kernel, _reason_to_take(site, kernel), rejected, figures, rules)


def _by_time(site: _Site) -> Callable[[str], float]:
    return lambda name: site.evidence.figures[name].seconds


def _reason_to_leave(site: _Site) -> tuple[Cause, str]:
    figures = site.evidence.figures
    others = [name for name in figures if name != INDUCTOR]
    if not others:
        if not site.candidates:
            return "overruled" if site.overruled else "no kernel fits", "no kernel takes it"
        if site.evidence.unmeasured:
            return "not measured", "no kernel was measured"
        return "not qualified", "no kernel qualified"
    mine = figures.get(INDUCTOR)
    if not site.leaving_allowed:
        return "overruled", "no allowed kernel takes it"
    if mine is None or mine.source == "estimated":
        return "slower", "estimated to be the fastest"
    best = min(others, key=_by_time(site))
    if figures[best].seconds < mine.seconds:
        ratio = mine.seconds / figures[best].seconds
        return "slower", f"{mine}; {best} is {ratio:.2f}x faster alone, not with the fusion it cuts"
    return "slower", f"{mine}, {figures[best].seconds / mine.seconds:.2f}x faster than {best}"


def _reason_to_take(site: _Site, kernel: Kernel) -> str:
    """Why this kernel: its figure beside the next best, and what it does."""
    figure = site.evidence.figures.get(kernel.name)
    parts = []
    if site.judgement is not None and site.judgement.locked is not None:
        parts.append("locked by policy")
    if figure is not None and figure.source != "estimated":
        others = [name for name in site.evidence.figures if name != kernel.name]
        text = str(figure)
        if others:
            best = min(others, key=_by_time(site))
            other = site.evidence.figures[best]
            if other.source != "estimated":
                text += f", {best} {microseconds(other.seconds)}"
        parts.append(text)
    parts.append(kernel.summary)
    return "; ".join(part for part in parts if part)
