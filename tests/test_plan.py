"""The plan: measured figures decide, the user's word comes before them, equal layers agree, larger kernels cover."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels_for_tests as bad
import lz_compile
from kernels_for_tests import make, provider
from lz_compile import config
from lz_compile.database import Database, Key, Record
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.inductor import attention_as_it_stood
from lz_compile.machine import Machine
from lz_compile.measure import Evidence, Figure, Gathered, Terms
from lz_compile.plan import FUSIBLE, Market, Plan, _Site, _solve, joint
from lz_compile.policy import Policy, PolicyError
from lz_compile.region import INDUCTOR, Kernel, Provider, Region, Work
from lz_compile.rewrite import is_copied, laid_out
from lz_compile.roofline import launch_seconds, nominal
from lz_compile.signature import signature_of
from road import compile_road
from test_qualification import attend_under, capture, padded, qkv, windowed
from tiny import DECODERS, tokens

CPU = torch.device("cpu")
BANDWIDTH = nominal(CPU).bandwidth


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(tmp_path))
    yield


def terms(measure: str = "off", graphs: bool = False) -> Terms:
    return Terms(measure, 10.0, graphs, {}, Emitter, laid_out)


def plan(
    regions: list[Region],
    kernels: list[Kernel],
    *,
    providers: tuple[Provider, ...] = (),
    policy: dict[str, Any] | None = None,
    known: dict[str, float | str] | None = None,
    measure: str = "cached",
) -> Plan:
    """A plan with a database that holds ``known``: seconds, or why a kernel was rejected, by name, for all regions."""
    database = Database(Path(lz_compile.machine.cache_directory()) / "plan.sqlite3")
    versions = {kernel.name: kernel.version for kernel in kernels}
    for region in regions:
        text = signature_of(region, is_copied(region.output))
        versions[INDUCTOR] = f"{torch.__version__} {region.pattern}"
        for name, value in (known or {}).items():
            assert text is not None
            key = Key(name, versions[name], text, Machine.of(CPU), False)
            right = not isinstance(value, str)
            record = Record(key, value if right else None, 0.0, 9, 1.0, right, reason="" if right else str(value))
            database.store([record])
    market = Market(kernels, {p.name: p for p in providers}, attention_as_it_stood)
    rules = Policy.load({"rules": policy} if policy is not None else None)
    return joint(regions, market, terms(measure), rules, "default", is_copied, database)


def attention(mask: Any = windowed, *extra: torch.Tensor, **sizes: int) -> Region:
    return capture(attend_under(mask), *qkv(torch.float32, **sizes), *extra)[0][0]


def picked(result: Plan) -> list[str]:
    return [choice.kernel.name if choice.kernel else choice.covered_by or INDUCTOR for choice in result.choices]


A, B, C = (make(f"t.{name}", bad.right, seconds=0.0) for name in "abc")


# -- figures


def test_the_fastest_measured_kernel_wins_whatever_estimates_say() -> None:
    region = attention()
    found = plan([region], [A, B, C], known={"t.a": 3e-5, "t.b": 2e-5, INDUCTOR: 9e-5})
    assert picked(found) == ["t.b"]
    assert found.choices[0].rejected["t.c"] == "not measured, and others were"
    assert list(found.choices[0].figures) == ["t.b", "t.a", INDUCTOR]
    assert "20 us remembered, t.a 30 us" in found.choices[0].reason


def test_inductor_wins_only_beyond_the_noise() -> None:
    region = attention()
    for seconds, winner in ((0.99e-5, "t.a"), (0.9e-5, INDUCTOR), (2e-5, "t.a")):
        found = plan([region], [A], known={"t.a": 1e-5, INDUCTOR: seconds})
        assert picked(found) == [winner]


def test_estimates_decide_only_where_nothing_was_measured() -> None:
    slow = make("t.slow", bad.right, seconds=0.0)
    object.__setattr__(slow, "work", lambda region: Work(0.0, 1e9, 1.0, 0))
    assert picked(plan([attention()], [slow, A], measure="off")) == ["t.a"]
    assert picked(plan([attention()], [slow, A], known={"t.slow": 1e-6, INDUCTOR: 1e-3})) == ["t.slow"]


def test_a_measured_time_of_inductor_alone_says_nothing_beside_estimates() -> None:
    found = plan([attention()], [A], known={INDUCTOR: 1e-12})
    assert picked(found) == ["t.a"]
    assert found.choices[0].figures[INDUCTOR].source == "estimated"


def test_a_rejected_kernel_never_wins_and_its_reason_is_kept() -> None:
    found = plan([attention()], [A, B], known={"t.a": "wrong result: 7 times the tolerance", "t.b": 1.0})
    assert picked(found) == ["t.b"]
    assert found.choices[0].rejected["t.a"] == "wrong result: 7 times the tolerance"
    found = plan([attention()], [A], known={"t.a": "wrong result: 7 times the tolerance"})
    assert picked(found) == [INDUCTOR]


def test_a_third_party_kernel_wins_only_once_it_qualified() -> None:
    foreign = provider(A, third_party=True)
    for measure in ("off", "cached"):
        found = plan([attention()], [A], providers=(foreign,), measure=measure)
        assert picked(found) == [INDUCTOR]
        assert "not qualified here yet" in found.choices[0].rejected["t.a"]
    found = plan([attention()], [A], providers=(foreign,), known={"t.a": 1e-6, INDUCTOR: 1e-3})
    assert picked(found) == ["t.a"]


def test_a_kernel_that_cannot_say_whether_it_fits_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def broken(region: Region) -> None:
        raise KeyError("head size")

    found = plan([attention()], [make("t.broken", bad.right, supports=broken), A], measure="off")
    assert picked(found) == ["t.a"]
    assert "KeyError" in found.choices[0].rejected["t.broken"]


# -- the user's word


def test_a_preferred_kernel_wins_where_it_fits_and_others_where_it_does_not() -> None:
    picky = make("t.picky", bad.right, supports=lambda region: None if region.attention.queries == 24 else "no")  # type: ignore[union-attr]
    regions = [attention(), attention(queries=12)]
    with config.patch(prefer=["t.picky"]):
        found = plan(regions, [A, picky], known={"t.a": 1e-6, "t.picky": 1e-3, INDUCTOR: 1e-7})
    assert picked(found) == ["t.picky", INDUCTOR]


def test_a_disabled_kernel_does_not_compete() -> None:
    with config.patch(disable=["t.a"]):
        found = plan([attention()], [A, B], known={"t.a": 1e-6, "t.b": 1e-5, INDUCTOR: 1e-3})
    assert picked(found) == ["t.b"] and found.choices[0].rejected["t.a"] == "disabled by option"


def test_a_denied_kernel_leaves_the_next_best_and_the_rule_in_the_report() -> None:
    known: dict[str, float | str] = {"t.a": 1e-6, "t.b": 1e-5, "t.c": 2e-5, INDUCTOR: 1e-3}
    found = plan([attention()], [A, B, C], known=known, policy=[{"deny": "t.a", "because": "too fast"}])  # type: ignore[arg-type]
    assert picked(found) == ["t.b"]
    assert [rule for rule in found.choices[0].rules if "deny t.a" in rule and "too fast" in rule]


def test_a_boost_changes_the_winner_and_not_the_figure() -> None:
    known: dict[str, float | str] = {"t.a": 1e-5, "t.b": 1.5e-5, INDUCTOR: 1e-3}
    found = plan([attention()], [A, B], known=known, policy=[{"boost": "t.b", "by": 2}])  # type: ignore[arg-type]
    assert picked(found) == ["t.b"] and found.choices[0].figures["t.b"].seconds == 1.5e-5
    assert any("boost t.b" in rule for rule in found.choices[0].rules)


def test_a_lock_wins_against_figures_and_against_having_none() -> None:
    lock: Any = [{"lock": "t.b"}]
    known: dict[str, float | str] = {"t.a": 1e-5, INDUCTOR: 1e-6}
    found = plan([attention()], [A, B], known={**known, "t.b": 1.0}, policy=lock)
    assert picked(found) == ["t.b"] and "locked by policy" in found.choices[0].reason
    assert picked(plan([attention()], [A, C, B], policy=lock, providers=(provider(B, third_party=True),))) == ["t.b"]


@pytest.mark.parametrize(
    "reason", ["wrong result: 7 times the tolerance", "not safe under CUDA graphs: a replay with inputs changed gives"]
)
def test_a_lock_on_a_kernel_that_was_found_wrong_or_unsafe_is_an_error(reason: str) -> None:
    with pytest.raises(PolicyError, match=reason.split(":")[0]):
        plan([attention()], [A, B], known={"t.b": reason, "t.a": 1e-5}, policy=[{"lock": "t.b"}])  # type: ignore[arg-type]


def test_a_lock_end_to_end_is_an_error_that_can_be_read() -> None:
    inputs = qkv(torch.float32)
    lock = {"rules": [{"lock": "cpu.ranges", "when": {"op": "attention"}}]}

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_under(lambda q, k: None)(q, k, v)

    torch._dynamo.reset()
    with lz_compile.overrule(lock), torch.no_grad(), pytest.raises(Exception) as caught:
        torch.compile(plain, backend="layerzero")(*inputs)
    text = str(caught.value)
    assert "lock cpu.ranges" in text and "cannot be honoured" in text and "there is nothing to skip" in text
    chain: list[BaseException | None] = [
        caught.value,
        caught.value.__cause__,
        getattr(caught.value, "inner_exception", None),
    ]
    assert any(isinstance(error, PolicyError) for error in chain)


def test_policy_reaches_every_region_through_overrule() -> None:
    model = DECODERS[0].build("sdpa")
    ids = tokens(2, 12, seed=0)
    with torch.no_grad():
        expected = model(ids).logits
    rules = [
        {"deny": "aten.sdpa", "when": {"module": {"match": "*.layers.0.*"}}},
        {"boost": "aten.math", "by": 1000.0, "when": {"module": {"match": "*.layers.1.*"}}},
    ]
    with lz_compile.overrule({"rules": rules}):
        compiled, road = compile_road(model)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, expected, atol=1e-4, rtol=1e-4)
    first, second = road.regions
    assert [("deny" in rule) for rule in first.rules] == [True] and "deny aten.sdpa" in first.rejected["aten.sdpa"]
    assert [("boost" in rule) for rule in second.rules] == [True]
    assert first.kernel not in ("aten.sdpa",) and second.kernel == "aten.math"


# -- the graph as a whole


def test_identical_layers_get_identical_choices_and_different_masks_their_own() -> None:
    model = DECODERS[2].build("sdpa")  # sliding and plain layers may differ; equal ones may not
    compiled, road = compile_road(model)
    with torch.no_grad():
        compiled(tokens(2, 12, seed=0))
    by_mask: dict[str, set[str]] = {}
    for region in road.regions:
        by_mask.setdefault(region.mask, set()).add(region.kernel)
    assert by_mask and all(len(kernels) == 1 for kernels in by_mask.values())


def graph_of(*names: str) -> tuple[fx.Graph, list[fx.Node]]:
    """A chain of nodes, one for each name, on float32 values of one million elements: 4 MB."""
    graph = fx.Graph()
    value = FakeTensorMode().from_tensor(torch.empty(1000, 1000))
    nodes = [graph.placeholder("x")]
    for name in names:
        nodes.append(graph.create_node("call_function", torch.ops.aten.relu.default, (nodes[-1],), name=name))
    graph.output(nodes[-1])
    for node in nodes:
        node.meta["val"] = value
    return graph, nodes[1:]


def pointwise(name: str, kind: str, seconds: float) -> Kernel:
    """A kernel for a kind of region whose estimate is ``seconds``."""

    def emit(emitter: Any, region: Region) -> fx.Node:
        raise AssertionError("plans only")

    def work(region: Region) -> Work:
        return Work(0.0, seconds * BANDWIDTH, 1.0, 0)

    return Kernel(name, kind, "1", lambda region: None, emit, work=work)


def region(kind: str, node: fx.Node, *inputs: fx.Node, covers: tuple[Region, ...] = ()) -> Region:
    return Region(kind, kind, node, f"block.{node.name}", [node], inputs=inputs, covers=covers)


@pytest.mark.parametrize(("whole", "winner"), [(1.5e-5, "whole"), (2.5e-5, "parts")])
def test_a_region_that_spans_others_runs_by_one_kernel_when_that_is_cheaper(whole: float, winner: str) -> None:
    _, (a, b) = graph_of("first", "second")
    parts = [region("one", a, a.args[0]), region("two", b, a)]  # type: ignore[arg-type]
    both = region("both", b, a.args[0], covers=(parts[0], parts[1]))  # type: ignore[arg-type]
    kernels = [pointwise("k.one", "one", 1e-5), pointwise("k.two", "two", 1e-5), pointwise("k.both", "both", whole)]
    for order in itertools.permutations([both, *parts]):
        found = dict(zip(map(id, order), plan(list(order), kernels, measure="off").choices))
        names = [found[id(r)].kernel.name if found[id(r)].kernel else found[id(r)].covered_by for r in (both, *parts)]  # type: ignore[union-attr]
        if winner == "whole":
            assert names == ["k.both", "block.second", "block.second"]
        else:
            assert names == ["", "k.one", "k.two"]


def test_a_region_that_spans_a_declined_one_is_not_replaced() -> None:
    _, (a, b) = graph_of("first", "second")
    parts = [region("one", a), region("two", b)]
    parts[0].declined = "somebody reads the middle"
    both = region("both", b, covers=tuple(parts))
    kernels = [pointwise("k.two", "two", 1e-5), pointwise("k.both", "both", 1e-9)]
    found = plan([both, *parts], kernels, measure="off")
    assert picked(found) == [INDUCTOR, INDUCTOR, "k.two"]
    assert "covers" in found.choices[0].rejected["k.both"]
    with pytest.raises(PolicyError, match="covers"):
        plan([both, *parts], kernels, measure="off", policy=[{"lock": "k.both"}])  # type: ignore[arg-type]


def test_locks_hold_on_both_sides_of_a_cover() -> None:
    _, (a, b) = graph_of("first", "second")
    parts = [region("one", a), region("two", b)]
    both = region("both", b, covers=tuple(parts))
    kernels = [pointwise("k.one", "one", 1e-5), pointwise("k.two", "two", 1e-5), pointwise("k.both", "both", 1e-9)]
    found = plan([both, *parts], kernels, measure="off", policy=[{"lock": "k.one"}])  # type: ignore[arg-type]
    assert picked(found) == [INDUCTOR, "k.one", "k.two"]
    kernels[-1] = pointwise("k.both", "both", 1.0)
    found = plan([both, *parts], kernels, measure="off", policy=[{"lock": "k.both"}])  # type: ignore[arg-type]
    assert picked(found) == ["k.both", "block.second", "block.second"]


def test_neighbours_that_inductor_fuses_are_left_together_when_that_saves_more() -> None:
    """Two kernels of 1 us and 1000 us gain 5% each against Inductor; the 4 MB between them cost 320 us."""
    kind = sorted(FUSIBLE)[0]
    _, (a, b) = graph_of("first", "second")
    chain = [region(kind, a), region(kind, b, a)]
    apart = [region(kind, a), region(kind, b)]
    assert picked(plan(chain, [pointwise("k.k", kind, 1e-4)], measure="off")) == [INDUCTOR, INDUCTOR]
    assert picked(plan(apart, [pointwise("k.k", kind, 1e-4)], measure="off")) == ["k.k", "k.k"]
    assert picked(plan(chain, [pointwise("k.k", kind, 1.0)], measure="off")) == ["k.k", "k.k"]


def test_a_kernel_of_a_fusible_kind_wins_only_beyond_the_noise() -> None:
    _, (a,) = graph_of("first")
    kind = sorted(FUSIBLE)[0]
    for seconds, winner in ((0.99e-4, INDUCTOR), (1.01e-4, INDUCTOR), (1.05e-4, "k.k")):
        site = _Site(region(kind, a), [pointwise("k.k", kind, 1e-4)])
        site.evidence = Evidence({"k.k": Figure(1e-4, "measured"), INDUCTOR: Figure(seconds, "measured")})
        labels, _ = _solve([site], Gathered([], nominal(CPU), ""))
        assert labels == [winner]


def test_the_plan_costs_what_its_choices_cost_and_no_more_than_greed() -> None:
    kind = sorted(FUSIBLE)[0]
    _, nodes = graph_of(*"abcdef")
    chain = [region(kind, node, before) for node, before in zip(nodes[1:], nodes)]
    found = plan(chain, [pointwise("k.k", kind, 1e-4)], measure="off")
    saved = 4 * (2 * 4e6 / BANDWIDTH + launch_seconds("cpu"))
    assert found.cost == pytest.approx(5 * 1.05 / 1.03 * 1e-4 - saved)
    # The first one has a pointwise operation in front, which an opaque kernel would cut off.
    assert found.cost < found.greedy_cost == pytest.approx(4e-4 + 1.05 / 1.03 * 1e-4)
    assert any("each region on its own" in note for note in found.notes)


def test_one_database_gives_one_plan_in_any_order_of_regions() -> None:
    regions = [attention(), attention(queries=12), attention(padded, torch.ones(5, 24, dtype=torch.bool))]
    known: dict[str, float | str] = {"t.a": 1e-5, "t.b": 1e-5, "t.c": 1e-5, INDUCTOR: 1e-5}
    outcomes = set()
    for order in itertools.permutations(regions):
        found = plan(list(order), [A, B, C], known=known)
        outcomes.add(tuple(picked(found)))
        assert math.isfinite(found.cost)
    assert len(outcomes) == 1


# -- how long it takes


@pytest.mark.slow
def test_planning_32_layers_from_a_warm_database_takes_less_than_200_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = DECODERS[0]
    settings = {**architecture.settings, "num_hidden_layers": 32}
    model = type(architecture)("llama", architecture.config, architecture.model, settings, "decoder").build("sdpa")
    ids = tokens(1, 12, seed=0)
    seconds, steps = [], []
    for _ in range(4):
        compiled, road = compile_road(model, measure="auto")
        with torch.no_grad():
            compiled(ids)
        assert len([region for region in road.regions if region.kind == "attention"]) == 32
        receipt = next(receipt for receipt in road.graphs[0].receipts if receipt.step == "plan")
        seconds.append(receipt.seconds)
        steps.append({receipt.step: receipt.seconds for receipt in road.graphs[0].receipts})
    # Measuring is a step of its own, which the first compile has and which does not count as ours.
    assert steps[0]["measure"] > 0.05
    assert road.graphs[0].own_seconds == pytest.approx(sum(steps[-1].values()) - steps[-1]["libraries"])
    assert "figures remembered" in receipt.note and "measure" not in steps[-1]
    assert {c.source for c in road.regions[0].candidates} <= {"remembered"}
    print(f"planning took {[round(1e3 * s) for s in seconds]} ms")
    assert min(seconds[1:]) < 0.2, seconds
