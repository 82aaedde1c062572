"""Measuring: within its budget, once for all processes, without a trace in the caller's state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels_for_tests as bad
from kernels_for_tests import make, provider
from lz_compile import config
from lz_compile.database import FILE, Database
from lz_compile.lowering.kernels import registered
from lz_compile.machine import Machine
from lz_compile.region import INDUCTOR, Work
from lz_compile.roofline import Roof, fit, nominal
from lz_compile.specimen import NoSpecimen
from lz_compile.timing import time_together
from road import Road, compile_road

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(tmp_path))
    bad.calls.clear()
    yield tmp_path


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling Inductor's version takes seconds."""

    def left_out(*_: Any) -> Any:
        raise NoSpecimen("left out by the test")

    monkeypatch.setattr("lz_compile.measure._Bench._as_inductor", left_out)


def qkv(batch: int = 2, heads: int = 4, length: int = 48) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, 16, generator=generator) for _ in range(3)]


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    position = torch.arange(q.shape[2], device=q.device)
    shown = (position[None] <= position[:, None]) & (position[None] > position[:, None] - 20)
    return F.scaled_dot_product_attention(q, k, v, shown)


def run(fn: Callable[..., Any] = windowed, *inputs: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, Road]:
    compiled, road = compile_road(fn, **{"measure": "auto", **settings})
    with torch.no_grad():
        return compiled(*(inputs or qkv())), road


def records(folder: Path) -> list[Any]:
    return Database(folder / FILE).records(newest=False)


def twice(keys: list[Any]) -> list[Any]:
    return [key for key, count in Counter(keys).items() if count > 1]


# -- what is kept


def test_each_kernel_that_fits_is_measured_once_and_remembered(fresh: Path) -> None:
    out, road = run()
    torch.testing.assert_close(out, windowed(*qkv()))
    sources = {candidate.kernel: candidate.source for candidate in road.regions[0].candidates}
    assert {"cpu.ranges", "aten.sdpa_masked", INDUCTOR} <= set(sources)
    assert set(sources.values()) == {"measured"}
    first = records(fresh)
    assert not twice([record.key for record in first])
    assert all(record.samples >= 1 and record.seconds > 0 for record in first if record.key.kernel in sources)
    fastest = min((record for record in first if record.seconds), key=lambda record: record.seconds)
    assert fastest.samples >= 3 and fastest.confidence > 0
    _, again = run()
    assert {candidate.source for candidate in again.regions[0].candidates} == {"remembered"}
    assert again.kernels == road.kernels
    assert len(records(fresh)) == len(first)
    _, cached = run(measure="cached")
    assert [c.microseconds for c in cached.regions[0].candidates] == [
        c.microseconds for c in again.regions[0].candidates
    ]


@pytest.mark.parametrize("measure", ["cached", "off"])
def test_without_auto_nothing_runs_and_nothing_is_stored(measure: str, fresh: Path) -> None:
    with registered(provider(make("t.kernel", bad.right))):
        _, road = run(measure=measure)
    assert road.kernels == ["t.kernel"]  # by its own estimate of nothing
    assert bad.calls["t.kernel"] == 1  # the model itself
    assert {c.source for c in road.regions[0].candidates} == {"estimated"}
    assert not (fresh / FILE).exists() or not records(fresh)


def test_a_new_version_of_a_kernel_is_measured_anew(no_inductor: None, fresh: Path) -> None:
    for version in ("1", "2"):
        with registered(provider(make("t.kernel", bad.right, version=version))):
            run()
    versions = [record.key.version for record in records(fresh) if record.key.kernel == "t.kernel"]
    assert sorted(versions) == ["1", "2"]


# -- budget


def test_a_kernel_whose_first_call_exceeds_the_budget_is_skipped_and_says_so(no_inductor: None) -> None:
    with registered(provider(make("t.slow", bad.right, first_call=60.0))):
        _, road = run()
    assert "first call compiles for up to 60 s" in road.regions[0].rejected["t.slow"]
    assert "t.slow" not in bad.calls
    assert any(candidate.source == "measured" for candidate in road.regions[0].candidates)


def test_a_budget_of_nothing_measures_nothing_and_says_so() -> None:
    out, road = run(measure_budget=0.0)
    torch.testing.assert_close(out, windowed(*qkv()))
    assert {candidate.source for candidate in road.regions[0].candidates} == {"estimated"}


def test_the_time_is_bounded_when_a_kernel_is_slow(no_inductor: None) -> None:
    """One call of 0.25 s on each of two draws and at most two for the time: never dozens of samples."""
    with registered(provider(make("t.slow", bad.sleeps(0.25)))):
        start = time.perf_counter()
        _, road = run(measure_budget=5.0)
        took = time.perf_counter() - start
    assert bad.calls["t.slow"] <= 8, bad.calls
    assert took < 12
    assert road.kernels != ["t.slow"]
    figure = next(c for c in road.regions[0].candidates if c.kernel == "t.slow")
    assert figure.source == "measured" and figure.microseconds > 2e5


def test_dear_groups_come_first_when_the_budget_is_short(no_inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *small: torch.Tensor) -> torch.Tensor:
        return windowed(*small).sum() + windowed(q, k, v).sum()

    from lz_compile.measure import _Gathering

    order: list[int] = []
    measure = _Gathering._measure

    def noted(self: Any, group: Any, *rest: Any) -> Any:
        order.append(group.regions[0].attention.queries)
        return measure(self, group, *rest)

    monkeypatch.setattr(_Gathering, "_measure", noted)
    compiled, _ = compile_road(both, measure="auto", prefer=["cpu.*", "triton.*"])
    with torch.no_grad():
        compiled(*qkv(length=256), *qkv(length=24))
    assert order == [256, 24]


# -- what goes wrong


def test_too_little_memory_says_nothing_about_a_kernel(no_inductor: None, fresh: Path) -> None:
    with registered(provider(make("t.large", bad.runs_out_of_memory))):
        out, road = run()
    torch.testing.assert_close(out, windowed(*qkv()))
    assert road.regions[0].rejected["t.large"] == "not measured: too little memory is free"
    assert any(candidate.source == "measured" for candidate in road.regions[0].candidates)
    assert "t.large" not in {record.key.kernel for record in records(fresh)}


def test_a_kernel_that_fails_after_it_qualified_is_not_chosen(no_inductor: None) -> None:
    count = iter(range(100))

    def third_time_unlucky(*arguments: Any) -> torch.Tensor:
        if next(count) >= 2:
            raise RuntimeError("too late")
        return bad.attend(*arguments)

    with registered(provider(make("t.fickle", third_time_unlucky))):
        out, road = run()
    torch.testing.assert_close(out, windowed(*qkv()))
    assert "too late" in road.regions[0].rejected["t.fickle"]
    assert any(candidate.source == "measured" for candidate in road.regions[0].candidates)


@pytest.mark.parametrize("content", [b"", b"garbage " * 1000])
def test_a_file_that_is_garbage_costs_a_warning_only(content: bytes, no_inductor: None, fresh: Path) -> None:
    (fresh / FILE).write_bytes(content)
    out, road = run()
    torch.testing.assert_close(out, windowed(*qkv()))
    assert {candidate.source for candidate in road.regions[0].candidates if candidate.kernel != INDUCTOR} == {
        "measured"
    }


@pytest.mark.parametrize("how", ["truncated", "garbage", "removed"])
def test_a_file_that_breaks_while_measuring_costs_a_warning_only(how: str, no_inductor: None, fresh: Path) -> None:
    def breaks(*arguments: Any) -> torch.Tensor:
        for path in fresh.glob(FILE + "*"):
            if path.name.endswith("-shm") and how != "removed":
                continue  # memory shared by processes: the system kills whoever reads behind its end
            if how == "removed":
                path.unlink()
            else:
                path.write_bytes(b"" if how == "truncated" else b"garbage" * 500)
        return bad.attend(*arguments)

    run()  # a file that holds something
    with registered(provider(make("t.vandal", breaks))):
        out, road = run(windowed, *qkv(length=40))
    torch.testing.assert_close(out, windowed(*qkv(length=40)), atol=1e-5, rtol=1e-4)
    assert "t.vandal" in {candidate.kernel for candidate in road.regions[0].candidates}


def test_a_folder_that_cannot_be_written_costs_a_warning_only(
    no_inductor: None, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(fresh / "file" / "below"))
    out, _ = run()
    torch.testing.assert_close(out, windowed(*qkv()))


# -- many at once

_WORKER = """
    import json, sys, threading, torch
    import torch.nn.functional as F
    sys.path.insert(0, {tests!r})
    import kernels_for_tests as bad
    from lz_compile.lowering.kernels import registered
    from lz_compile.backend import improve
    from lz_compile import config
    from lz_compile.report import GraphReport
    import lz_compile.measure
    from lz_compile.specimen import NoSpecimen
    torch.set_num_threads(1)

    def left_out(*_): raise NoSpecimen("left out by the test")
    lz_compile.measure._Bench._as_inductor = left_out
    problems, reports = [], []

    def backend(module, inputs):
        with config.patch(strict=True, measure="auto", measure_budget=60.0):
            report = GraphReport.start(None, None)
            rewritten = improve(module, report)
        reports.append(report)
        return rewritten.forward if rewritten is not None else module.forward

    def work(number):
        try:
            for length in (32, 64):
                def attend(q, k, v):
                    position = torch.arange(length)
                    shown = (position[None] <= position[:, None]) & (position[None] > position[:, None] - 20)
                    return F.scaled_dot_product_attention(q, k, v, shown)
                # Code of its own, so that no thread gets what another has compiled.
                attend.__code__ = attend.__code__.replace(co_name=f"attend_{{number}}_{{length}}")
                q, k, v = (torch.randn(2, 4, length, 16) for _ in range(3))
                with torch.no_grad():
                    out = torch.compile(attend, backend=backend, dynamic=False)(q, k, v)
                torch.testing.assert_close(out, attend(q, k, v), atol=1e-5, rtol=1e-4)
        except BaseException as error:
            problems.append(f"{{type(error).__name__}}: {{error}}")

    print("ready", flush=True)
    sys.stdin.readline()
    with registered(bad.provider(bad.make("t.kernel", bad.right))):
        threads = [threading.Thread(target=work, args=(i,)) for i in range({threads})]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    sources = [c.source for r in reports for region in r.regions for c in region.candidates if c.kernel != "inductor"]
    print(json.dumps([problems, sorted(set(sources)), len(reports)]))
"""


def compile_in_processes(folder: Path, processes: int, threads: int, meanwhile: Callable[[], None]) -> list[Any]:
    code = textwrap.dedent(_WORKER).format(tests=str(Path(__file__).parent), threads=threads)
    environment = {**os.environ, "LZ_COMPILE_CACHE_DIR": str(folder), "LZ_COMPILE_PROVIDERS": "aten,cpu,t"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", worker.communicate()[1]
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        meanwhile()
        answers = []
        for worker in workers:
            out, errors = worker.communicate(timeout=400)
            assert worker.returncode == 0, errors
            answers.append(json.loads(out.splitlines()[-1]))
        return answers
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "threads"), [(2, 3), pytest.param(8, 32, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_processes_and_threads_measure_everything_once(processes: int, threads: int, fresh: Path) -> None:
    answers = compile_in_processes(fresh, processes, threads, lambda: None)
    for problems, sources, graphs in answers:
        assert not problems
        assert set(sources) <= {"measured", "remembered"} and graphs == 2 * threads
    stored = records(fresh)
    assert not twice([record.key for record in stored]), twice([record.key for record in stored])
    names = Counter(record.key.kernel for record in stored)
    assert names["machine.roof"] == 1
    assert all(count == 2 for name, count in names.items() if name != "machine.roof"), names
    assert {"t.kernel", "cpu.ranges", "aten.sdpa_masked"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "read-only"])
def test_a_file_that_is_broken_while_many_compile_breaks_no_compile(how: str, fresh: Path) -> None:
    def meanwhile() -> None:
        deadline = time.monotonic() + 60
        while not (fresh / FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(5):
            time.sleep(0.2)
            if how == "truncated":
                os.truncate(fresh / FILE, 100)
            else:
                (fresh / FILE).chmod(0o444)
                fresh.chmod(0o555)

    try:
        answers = compile_in_processes(fresh, 2, 2, meanwhile)
    finally:
        fresh.chmod(0o755)
    assert not [problem for problems, _, _ in answers for problem in problems]


# -- the caller's state


def test_random_numbers_go_on_as_if_nothing_had_been_measured(no_inductor: None) -> None:
    q, k, v = qkv()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with registered(provider(make("t.kernel", lambda *a: (torch.rand(3), bad.right(*a))[1]))):
        # Not through Dynamo, which puts random states back itself.
        roads: list[Road] = []

        def keep(module: Any, inputs: Any) -> Any:
            torch.manual_seed(7)
            road = Road(measure="auto", disable=["nothing"])
            roads.append(road)
            result = road(module, inputs)
            assert torch.equal(torch.get_rng_state(), before)
            return result

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(windowed, backend=keep, dynamic=False)(q, k, v)
    assert roads[0].regions and bad.calls["t.kernel"] > 2


@pytest.mark.parametrize("state", ["float64", "meta", "inference", "grad", "deterministic"])
def test_the_callers_modes_change_no_verdict(state: str, no_inductor: None) -> None:
    import contextlib

    @contextlib.contextmanager
    def default_dtype() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    @contextlib.contextmanager
    def deterministic() -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    mode: Any = {
        "float64": default_dtype,
        "meta": lambda: torch.device("meta"),
        "inference": torch.inference_mode,
        "grad": torch.enable_grad,
        "deterministic": deterministic,
    }[state]()
    inputs = qkv()
    expected = windowed(*inputs)
    with registered(provider(make("t.kernel", bad.right))):
        compiled, road = compile_road(windowed, measure="auto", strict=True)
        with mode:
            out = compiled(*inputs)
            assert torch.is_inference_mode_enabled() == (state == "inference")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    measured = {c.kernel for c in road.regions[0].candidates if c.source == "measured"}
    assert {"t.kernel", "cpu.ranges", "aten.sdpa_masked"} <= measured, road.regions[0].rejected


def test_compiling_inductors_version_leaves_dynamo_and_inductor_as_they_were() -> None:
    """The whole road with Inductor inside, twice: the outer compile is one graph, and config is what it was."""
    import torch._inductor.config as inductor_config

    before = inductor_config.get_config_copy()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    contexts: list[Any] = []

    def look(module: Any, inputs: Any) -> Any:
        contexts.append(torch._guards.TracingContext.try_get())
        result = Road(measure="auto")(module, inputs)
        contexts.append(torch._guards.TracingContext.try_get())
        return result

    with torch.no_grad():
        torch.compile(windowed, backend=look, dynamic=False)(*qkv())
    assert contexts[0] is contexts[1] is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert inductor_config.get_config_copy() == before


def test_the_whole_road_measures_and_gives_the_eager_result() -> None:
    import lz_compile

    def two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return windowed(windowed(q, k, v), k, v)

    torch._dynamo.reset()
    with config.patch(measure="auto", strict=True), torch.no_grad():
        out = torch.compile(two, backend="layerzero")(*qkv())
    torch.testing.assert_close(out, two(*qkv()), atol=1e-5, rtol=1e-4)
    regions = lz_compile.reports()[-1].regions
    assert [region.kernel for region in regions][:1] * 2 == [region.kernel for region in regions]
    assert {c.source for c in regions[0].candidates} == {"measured"}
    assert json.loads(lz_compile.reports()[-1].to_json())["graphs"][0]["regions"][0]["candidates"]


def test_dynamic_shapes_are_measured_at_their_hints(no_inductor: None) -> None:
    compiled, road = compile_road(windowed, dynamic=True, measure="auto")
    with torch.no_grad():
        for length in (48, 60):
            torch.testing.assert_close(
                compiled(*qkv(length=length)), windowed(*qkv(length=length)), atol=1e-5, rtol=1e-4
            )
    assert len(road.graphs) == 1
    assert any(c.source == "measured" for c in road.regions[0].candidates)


def test_threads_that_compile_at_once_share_one_measurement(no_inductor: None, fresh: Path) -> None:
    problems: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                backend = Road(measure="auto", measure_budget=30.0)
                fn = torch.compile(lambda q, k, v: windowed(q, k, v), backend=backend, dynamic=False)
                torch.testing.assert_close(fn(*qkv()), windowed(*qkv()), atol=1e-5, rtol=1e-4)
        except BaseException as error:
            problems.append(error)

    torch._dynamo.reset()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert not twice([record.key for record in records(fresh)])


# -- the clock


def test_a_function_that_sleeps_is_timed_within_a_fifth_and_in_order() -> None:
    found = time_together(
        {"slow": lambda i: time.sleep(0.02), "fast": lambda i: time.sleep(0.005)}, 2, CPU, seconds=0.6
    )
    assert found["slow"].median == pytest.approx(0.02, rel=0.2)
    assert found["fast"].median == pytest.approx(0.005, rel=0.2)
    assert found["fast"].samples >= 2 and found["fast"].variance >= 0


def test_a_function_that_raises_is_left_out_whenever_it_does() -> None:
    count = iter(range(1000))

    def late(copy: int) -> None:
        if next(count) > 3:
            raise RuntimeError("late")
        time.sleep(0.002)

    def at_once(copy: int) -> None:
        raise RuntimeError("at once")

    calls: dict[str, Any] = {"late": late, "at once": at_once, "good": lambda copy: time.sleep(0.002)}
    assert set(time_together(calls, 1, CPU, seconds=0.1)) == {"good"}


def test_copies_take_turns() -> None:
    seen: list[int] = []
    time_together({"one": seen.append}, 3, CPU, seconds=0.05)
    counts = Counter(seen[-300:])
    assert set(counts) == {0, 1, 2} and max(counts.values()) - min(counts.values()) <= 1


def test_a_hopeless_function_is_not_called_again_and_again() -> None:
    seen: list[int] = []

    def slow(copy: int) -> None:
        seen.append(copy)
        time.sleep(0.2)

    found = time_together({"slow": slow, "fast": lambda copy: time.sleep(0.001)}, 1, CPU, seconds=0.3)
    assert len(seen) == 1 and found["slow"].median >= 0.2


# -- the roof


def test_a_roof_is_the_greater_limit_over_the_efficiency_and_the_launches() -> None:
    roof = Roof(1e9, {torch.float32: 1e12}, fitted=True)
    assert roof.seconds(Work(1e9, 8e6, 0.5, 2), torch.float32, "cpu") == pytest.approx(8e-3 / 0.5 + 2 * 5e-6)
    assert roof.seconds(Work(1e11, 8e6, 0.5, 0), torch.float32, "cpu") == pytest.approx(0.1 / 0.5)
    assert roof.seconds(Work(1e11, 8e6, 0.5, 0, planning=0.3), torch.float32, "cpu") == pytest.approx(0.5)
    assert roof.transfer(2e9) == pytest.approx(2.0)


def test_the_fitted_and_the_nominal_roof_are_of_one_order() -> None:
    fitted, by_name = fit(CPU), nominal(CPU)
    assert fitted.fitted and not by_name.fitted
    assert 0.01 < fitted.bandwidth / by_name.bandwidth < 100
    assert 0.001 < fitted.flops[torch.float32] / by_name.flops[torch.float32] < 100


def test_the_machine_of_the_records_is_this_one(no_inductor: None, fresh: Path) -> None:
    run()
    assert {record.key.machine for record in records(fresh)} == {Machine.of(CPU)}


def test_a_region_on_a_device_that_cannot_be_timed_is_estimated(fresh: Path) -> None:
    compiled, road = compile_road(windowed, measure="auto")
    with torch.no_grad():
        out = compiled(*(tensor.to("meta") for tensor in qkv()))
    assert out.device.type == "meta"
    assert {candidate.source for region in road.regions for candidate in region.candidates} <= {"estimated"}
    assert not (fresh / FILE).exists() or not records(fresh)
