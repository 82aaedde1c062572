"""Numbers for services: what is counted, that memory stays flat, and that real parsers read what is exported."""

from __future__ import annotations

import importlib
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from blocks import without_inductor
from lz_compile import metrics
from lz_compile.backend import _told
from lz_compile.database import Database, Record
from lz_compile.metrics import BUCKETS, MOST_SERIES, OTHER
from lz_compile.report import GraphReport, Receipt, RegionReport
from road import compile_road

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def fresh() -> None:
    metrics.reset()


def series(name: str) -> dict[tuple[str, ...], metrics.Series]:
    family = next(family for family in metrics.snapshot() if family.name == f"lz_compile_{name}")
    return {series.labels: series for series in family.series}


def values(name: str) -> dict[tuple[str, ...], float]:
    return {labels: one.value for labels, one in series(name).items()}


def a_report(kernel: str = "cpu.ranges") -> GraphReport:
    report = GraphReport("0/0", "default", {}, outcome="rewritten")
    report.receipts = [Receipt("plan", 0.03), Receipt("measure", 2.0), Receipt("Inductor", 3.0)]
    ran = RegionReport("attention", "m.0", "sdpa", "", "causal", "", kernel, "fast")
    left = RegionReport("glu", "m.0.mlp", "swiglu", "", "", "", "inductor", "1 us, 2.00x faster", cause="slower")
    inside = RegionReport("rope", "m.0", "rotate_half", "", "", "", "inductor", "runs inside", cause="covered")
    report.regions = [ran, left, inside]
    return report


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# -- what is counted


def test_a_compiled_graph_counts_its_outcome_its_regions_and_its_time() -> None:
    metrics.compiled(a_report())
    assert values("compiles") == {("rewritten",): 1}
    assert values("regions") == {("attention", "cpu.ranges"): 1, ("glu", "inductor"): 1, ("rope", "inductor"): 1}
    assert values("fallbacks") == {("glu", "slower"): 1}  # what a neighbour's kernel covers is none
    assert values("step_seconds") == {("plan",): 0.03, ("measure",): 2.0, ("Inductor",): 3.0}
    whole, own = series("compile_seconds")[()], series("planning_seconds")[()]
    assert whole.value == pytest.approx(5.03) and own.value == pytest.approx(0.03)
    assert own.buckets == (*(int(bound >= 0.05) for bound in BUCKETS), 1)


def test_a_value_on_a_bound_counts_below_it_and_one_above_all_bounds_counts_only_in_all() -> None:
    histogram = metrics.Histogram("h", "")
    for seconds in (BUCKETS[2], BUCKETS[-1] + 1):
        histogram.observe(seconds)
    (only,) = histogram.family().series
    assert only.buckets == (0, 0, *[1] * (len(BUCKETS) - 2), 2)


@pytest.mark.parametrize(
    "settings, outcome, kernel, fallback",
    [
        ({}, "rewritten", "aten.sdpa", None),
        ({"kinds": []}, "unchanged", None, None),
        ({"disable": ["*"]}, "unchanged", "inductor", "overruled"),
        ({"policy": "rules: [{deny: '*'}]\nversion: 1"}, "unchanged", "inductor", "overruled"),
    ],
)
def test_the_backend_counts_every_graph(
    settings: dict[str, Any], outcome: str, kernel: str | None, fallback: str | None
) -> None:
    q = torch.randn(1, 2, 8, 16)
    with without_inductor(), torch.no_grad():
        torch.compile(sdpa, backend="layerzero", options=settings)(q, q, q)
    assert values("compiles") == {(outcome,): 1}
    assert values("regions") == ({("attention", kernel): 1} if kernel else {})
    assert values("fallbacks") == ({("attention", fallback): 1} if fallback else {})


def test_a_failure_of_ours_counts_as_failed_and_its_regions_as_fallbacks() -> None:
    q = torch.randn(1, 2, 8, 16)
    with without_inductor(), torch.no_grad():
        with mock.patch("lz_compile.backend.spell_out_constants", side_effect=RuntimeError("no")):
            torch.compile(sdpa, backend="layerzero")(q, q, q)
        assert values("compiles") == {("failed",): 1}
        assert values("fallbacks") == {("attention", "failed"): 1}


def test_a_compile_that_raises_counts_as_raised_but_not_a_trace_that_dynamo_starts_again() -> None:
    q = torch.randn(1, 2, 8, 16)
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        mock.patch("torch._inductor.compile_fx.compile_fx", side_effect=MemoryError("no")),
        pytest.raises(Exception, match="no"),
    ):
        torch.compile(sdpa, backend="layerzero")(q, q, q)
    assert values("compiles") == {("raised",): 1}
    with pytest.raises(torch._dynamo.exc.RestartAnalysis), _told(GraphReport.start(None, None)):
        raise torch._dynamo.exc.RestartAnalysis
    assert values("compiles") == {("raised",): 1}


def test_reasons_have_classes() -> None:
    def causes(fn: Any, *inputs: torch.Tensor, **settings: Any) -> set[str]:
        run, road = compile_road(fn, **settings)
        with torch.no_grad():
            run(*inputs)
        return {region.cause for region in road.regions}

    q = torch.randn(1, 2, 8, 16)
    assert causes(sdpa, q, q, q) == {""}
    # Scores that leave the graph: seen, and no kernel may replace them.
    assert causes(lambda q: ((s := (q @ q.mT).softmax(-1)) @ q, s), q) == {"declined"}
    assert causes(sdpa, q, q, q, disable=["aten.*"]) == {"overruled"}
    with mock.patch("lz_compile.lowering.kernels.kernels", lambda: []):
        assert causes(sdpa, q, q, q) == {"no kernel fits"}


def test_what_the_database_knows_counts_as_a_hit(tmp_path: Path) -> None:
    q = torch.randn(1, 2, 8, 16)
    database = Database(tmp_path / "performance.sqlite3")
    asked: list[Any] = []
    look_up = database.look_up

    def noted(keys: Any) -> Any:
        asked.extend(keys)
        return look_up(keys)

    with mock.patch("lz_compile.plan.default", lambda: database), mock.patch.object(database, "look_up", noted):
        run, _ = compile_road(sdpa, measure="cached")
        with torch.no_grad():
            run(q, q, q)
        assert values("database_lookups") == {("miss",): len(asked), ("hit",): 0}
        database.store([Record(asked[0], 1e-6, 0.0, 9, 1.0, True)])
        before = len(asked)
        run, _ = compile_road(sdpa, measure="cached")
        with torch.no_grad():
            run(q, q, q)
    assert values("database_lookups") == {("hit",): 1, ("miss",): 2 * before - 1}


def test_without_measuring_no_look_up_is_counted() -> None:
    q = torch.randn(1, 2, 8, 16)
    run, _ = compile_road(sdpa, measure="off")
    with torch.no_grad():
        run(q, q, q)
    assert values("database_lookups") == {}


# -- bounded, safe, cheap


def test_a_million_events_leave_memory_flat() -> None:
    names = [f"kernel{i}" for i in range(5000)]

    def record(times: int) -> None:
        for _ in range(times):
            for name in names:  # many more than are told apart
                metrics.regions.add("attention", name)
            for i in range(len(names)):
                metrics.planning_seconds.observe(i * 1e-3)

    report = a_report()
    record(1)
    tracemalloc.start()
    begin = time.process_time()
    record(100)
    for _ in range(1000):
        metrics.compiled(report)
    seconds = time.process_time() - begin
    grown, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{seconds:.2f} s, {grown} bytes kept, {peak} at most")
    assert grown < 20_000 and peak < 50_000
    assert seconds < 15  # 3 to 4 on an idle core, most of it tracemalloc's
    counts = values("regions")
    assert len(counts) == MOST_SERIES
    assert sum(counts.values()) == 505_000 + 3 * 1000
    assert counts[OTHER, OTHER] == 505_000 - 101 * (MOST_SERIES - 1) + 3 * 1000
    assert series("planning_seconds")[()].buckets[-1] == 506_000


def test_threads_lose_no_event() -> None:
    def work(number: int) -> None:
        for i in range(5000):
            metrics.regions.add("attention", f"k{(i + number) % 5}")
            metrics.compile_seconds.observe(1.0)
            if i % 500 == 0:
                metrics.snapshot()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert values("regions") == {("attention", f"k{i}"): 6000 for i in range(5)}
    assert series("compile_seconds")[()].value == 30_000


def test_counting_a_graph_of_a_hundred_regions_takes_less_than_a_millisecond() -> None:
    report = a_report()
    report.regions = report.regions * 33
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        metrics.compiled(report)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-3


def test_numbers_that_cannot_be_counted_break_no_compile(caplog: pytest.LogCaptureFixture) -> None:
    q = torch.randn(1, 2, 8, 16)
    with without_inductor(), torch.no_grad(), mock.patch.object(metrics, "compiled", side_effect=RuntimeError("full")):
        torch.testing.assert_close(torch.compile(sdpa, backend="layerzero")(q, q, q), sdpa(q, q, q))
        assert "full" in caplog.text
        torch._dynamo.reset()
        with pytest.raises(Exception, match="full"):
            torch.compile(sdpa, backend="layerzero", options={"strict": True})(q, q, q)


# -- exported


def test_prometheus_own_parser_reads_what_is_scraped() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    metrics.compiled(a_report("aten.sdpa"))
    metrics.compiled(a_report('odd "name"\n\\'))
    metrics.looked_up(3, 2)
    registry = prometheus.CollectorRegistry()
    metrics.prometheus(registry)
    families = {f.name: f for f in text_string_to_metric_families(prometheus.generate_latest(registry).decode())}
    assert set(families) == {family.name for family in metrics.snapshot()}
    samples = {(s.name, *sorted(s.labels.items())): s.value for f in families.values() for s in f.samples}
    assert samples["lz_compile_compiles_total", ("outcome", "rewritten")] == 2
    assert samples["lz_compile_regions_total", ("kernel", 'odd "name"\n\\'), ("kind", "attention")] == 1
    assert samples["lz_compile_fallbacks_total", ("kind", "glu"), ("reason", "slower")] == 2
    assert samples["lz_compile_database_lookups_total", ("result", "hit")] == 3
    assert samples["lz_compile_planning_seconds_bucket", ("le", "0.025")] == 0
    assert samples["lz_compile_planning_seconds_bucket", ("le", "0.05")] == 2
    assert samples["lz_compile_planning_seconds_bucket", ("le", "+Inf")] == 2
    assert samples["lz_compile_planning_seconds_count",] == 2
    assert samples["lz_compile_planning_seconds_sum",] == pytest.approx(0.06)
    with pytest.raises(ValueError, match=r"[Dd]uplicated"):
        metrics.prometheus(registry)


def test_opentelemetry_reads_the_same_numbers() -> None:
    pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    metrics.opentelemetry(MeterProvider(metric_readers=[reader]))
    metrics.compiled(a_report())
    metrics.compiled(a_report())
    data: Any = reader.get_metrics_data()
    found = {
        (metric.name, *sorted(point.attributes.items())): point.value
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }
    assert found["lz_compile.compiles", ("outcome", "rewritten")] == 2
    assert found["lz_compile.regions", ("kernel", "cpu.ranges"), ("kind", "attention")] == 2
    assert found["lz_compile.planning_seconds.sum",] == pytest.approx(0.06)
    assert found["lz_compile.planning_seconds.count",] == 2
    assert found["lz_compile.planning_seconds.bucket", ("le", "0.025")] == 0
    assert found["lz_compile.planning_seconds.bucket", ("le", "+Inf")] == 2


@pytest.mark.parametrize("export, module", [("prometheus", "prometheus_client"), ("opentelemetry", "opentelemetry")])
def test_a_missing_library_is_named(export: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'lz-compile\[metrics\]'"):
        getattr(metrics, export)()


def test_the_example_serves_what_it_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    monkeypatch.syspath_prepend(str(EXAMPLES))
    with without_inductor():
        importlib.import_module("metrics_endpoint").main(["--port", "0"])
    text = capsys.readouterr().out
    families = {family.name: family for family in text_string_to_metric_families(text)}
    kernels = {s.labels["kernel"]: s.value for s in families["lz_compile_regions"].samples}
    assert kernels == {"aten.sdpa": 2}
