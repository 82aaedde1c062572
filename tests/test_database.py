"""The performance database: round trips, many processes and threads, and every way in which its file can go wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import signal
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lz_compile import database as module
from lz_compile import sqlite_file
from lz_compile.database import Database, FormatError, Key, Record, confidence_of, default
from lz_compile.machine import Machine

H200 = Machine("NVIDIA H200", "9.0", "580.65.06", "13.0", "2.11.0+cu130")
KEY = Key("flash_attn.fa3", "3.0.1", '{"q":[1,32,8192,128]}', H200)


def key(number: int, **changes: Any) -> Key:
    return replace(KEY, signature=json.dumps({"length": number}), **changes)


def record(of: Key = KEY, seconds: float | None = 1e-3, **changes: Any) -> Record:
    return Record(of, seconds, variance=1e-12, samples=20, confidence=0.99, qualified=True, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "performance.sqlite3"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(path)
    yield database
    database.close()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]


# Records

TEXT = st.text(max_size=20)
AMOUNT = st.floats(0, 1e12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MACHINES = st.builds(Machine, TEXT, TEXT, TEXT, TEXT, TEXT)
KEYS = st.builds(Key, TEXT, TEXT, TEXT, MACHINES, st.booleans())
RECORDS = st.builds(
    Record,
    key=KEYS,
    seconds=st.none() | AMOUNT,
    variance=AMOUNT,
    samples=st.integers(0, 10**6),
    confidence=st.floats(0, 1),
    qualified=st.booleans(),
    reason=TEXT,
    error=st.none() | st.floats(0, math.inf),
    graph_safe=st.none() | st.booleans(),
    pool_bytes=st.none() | st.integers(0, 2**40),
    evidence=st.dictionaries(TEXT, JSON, max_size=3),
    created=st.floats(1, 1e10),
)


@given(st.lists(RECORDS, max_size=6))
@settings(max_examples=25)
def test_what_is_stored_is_looked_up_by_another_process_and_survives_export_and_import(records: list[Record]) -> None:
    newest: dict[Key, Record] = {}
    for item in dict.fromkeys(records):  # of equal records the first is stored
        if item.key not in newest or item.created >= newest[item.key].created:
            newest[item.key] = item
    with tempfile.TemporaryDirectory() as folder:
        first, second, other = (Database(Path(folder, name)) for name in ("a", "a", "b"))
        first.store(records)
        assert second.look_up([*newest, KEY]) == newest
        assert set(second.records(newest=False)) == set(records)
        lines = io.StringIO()
        assert second.export(lines) == len(set(records))
        lines.seek(0)
        assert other.import_(lines) == len(set(records))
        assert other.look_up(newest) == newest
        for each in (first, second, other):
            each.close()


def test_the_newest_record_counts_and_the_older_ones_stay(database: Database) -> None:
    database.store([record(seconds=1.0, created=100.0), record(seconds=2.0, created=200.0)])
    database.store([record(seconds=3.0, created=150.0)])
    assert database.look_up([KEY])[KEY].seconds == 2.0
    assert [item.seconds for item in database.records(newest=False)] == [2.0, 3.0, 1.0]
    assert [item.seconds for item in database.records()] == [2.0]


@pytest.mark.parametrize("name", ["device", "capability", "driver", "cuda", "torch"])
def test_a_record_of_another_machine_is_ignored_and_kept(database: Database, name: str) -> None:
    database.store([record()])
    moved = replace(KEY, machine=replace(H200, **{name: "another"}))
    assert database.look_up([moved, replace(KEY, version="3.0.2"), replace(KEY, graphs=True)]) == {}
    assert len(database.records()) == 1


def test_storing_stamps_the_time(database: Database) -> None:
    before = time.time()
    database.store([record()])
    assert before <= database.look_up([KEY])[KEY].created <= time.time()


def test_records_are_filtered_by_kernel_and_device(database: Database) -> None:
    b200 = replace(H200, device="NVIDIA B200")
    database.store([record(key(n), created=n + 1.0) for n in range(3)])
    database.store([record(replace(KEY, kernel="aten.cudnn")), record(replace(KEY, machine=b200))])
    assert len(database.records(kernel="flash_attn.*")) == 4
    assert [item.key.machine for item in database.records(device="*B200")] == [b200]
    assert [item.created for item in database.records(kernel="flash_attn.*", device="NVIDIA H200", limit=2)] == [
        3.0,
        2.0,
    ]


@pytest.mark.parametrize(
    "changes", [{"seconds": -1.0}, {"seconds": math.nan}, {"created": math.inf}, {"pool_bytes": -1}, {"error": -1.0}]
)
def test_a_number_that_cannot_be_one_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        record(**changes)


def test_evidence_that_json_cannot_say_becomes_text_and_a_nan_error_infinity(database: Database) -> None:
    odd = record(error=math.nan, reason="\udcff", evidence={"path": Path("/x"), "worst": math.nan, "shape": (1, 2)})
    database.store([odd])
    found = database.look_up([KEY])[KEY]
    assert found.evidence == {"path": "/x", "worst": "nan", "shape": [1, 2]}
    assert found.error == math.inf and found.reason == "\\udcff"


def test_confidence_is_the_chance_that_the_median_is_within_three_percent() -> None:
    assert confidence_of(1, 0.0, 1.0) == 0.0
    assert confidence_of(10, 0.0, 1.0) == 1.0
    assert confidence_of(10, 1.0, 0.0) == 0.0
    generator = __import__("random").Random(0)
    medians = [sorted(generator.gauss(1.0, 0.1) for _ in range(25))[12] for _ in range(4000)]
    within = sum(abs(median - 1.0) < 0.03 for median in medians) / len(medians)
    assert confidence_of(25, 0.01, 1.0) == pytest.approx(within, abs=0.03)


# Speed and plan


def test_both_queries_of_a_compile_search_the_index(database: Database) -> None:
    database.store([record()])
    connection = sqlite3.connect(database.path)
    explained = connection.execute(f"EXPLAIN QUERY PLAN {module._look_up_sql(2)}", [""] * 18)
    plan = [row[3] for row in explained]
    connection.close()
    every = " AND ".join(
        f"{name}=?"
        for name in ("signature", "kernel", "version", "device", "capability", "driver", "cuda", "torch", "graphs")
    )
    assert f"SEARCH other USING COVERING INDEX record_key ({every})" in plan
    assert "SEARCH record USING INTEGER PRIMARY KEY (rowid=?)" in plan
    assert not [step for step in plan if step.startswith("SCAN record") or "TEMP B-TREE" in step]


def test_two_hundred_keys_among_a_hundred_thousand_records_take_under_twenty_milliseconds(database: Database) -> None:
    database.store([record()])
    connection = sqlite3.connect(database.path)
    columns = ", ".join(module._KEY + module._FACTS)
    marks = ", ".join("?" * 20)
    signature = '{"batch": 1, "dtype": "bfloat16", "strides": [1048576, 128, 4096, 1], "length": %d}'
    rows = (
        module._values(record(replace(KEY, signature=signature % (n // 4)), created=n + 1.0)) for n in range(100_000)
    )
    connection.executemany(f"INSERT INTO record ({columns}) VALUES ({marks})", rows)
    connection.commit()
    connection.close()
    fresh = Database(database.path)
    started = time.process_time()
    assert fresh.look_up([KEY])
    opening = time.process_time() - started
    times = []
    for turn in range(5):
        wanted = [replace(KEY, signature=signature % (100 * n + turn)) for n in range(200)]
        started = time.process_time()  # other processes' share of the machine is not ours to judge
        found = fresh.look_up(wanted)
        times.append(time.process_time() - started)
        assert len(found) == 200 and all(item.created % 4 == 0 for item in found.values())
    fresh.close()
    print(f"opening {1e3 * opening:.1f} ms, look_up of 200 keys {1e3 * min(times):.1f} ms")
    assert opening < 0.02 and min(times) < 0.02


# Many processes and threads


@dataclass
class Child:
    """A process forked from this one, which costs no import of torch."""

    pid: int
    stream: Any

    @classmethod
    def run(cls, function: Callable[[], Any]) -> Child:
        """``function`` in a child; what it returns must be JSON."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(100)
            try:
                os.close(reading)
                try:
                    said = json.dumps(function())
                except BaseException as error:
                    said = json.dumps(f"{type(error).__name__}: {error}")
                os.write(writing, said.encode())
            finally:
                os._exit(0)
        os.close(writing)
        return cls(pid, os.fdopen(reading, encoding="utf-8"))

    def result(self) -> Any:
        with self.stream:
            said = self.stream.read()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert code == 0, f"the child ended with {code}"
        return json.loads(said)


def work(path: Path, name: int, threads: int, keys: int, start: Path | None = None) -> dict[str, Any]:
    """Every thread of a process wants every key measured, and has records of its own; begins when ``start`` exists."""
    database = Database(path)
    failures: list[str] = []
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: warnings.append(entry.getMessage())  # type: ignore[method-assign]
    sqlite_file.log.addHandler(handler)

    def one(thread: int) -> None:
        try:
            while start is not None and not start.exists():
                time.sleep(0.005)
            for number in range(keys):
                shared = key((number + 7 * thread) % keys)
                while not database.look_up([shared]):
                    with database.claim(shared, wait=30.0) as mine:
                        if mine and not database.look_up([shared]):
                            time.sleep(0.005)
                            database.store([record(shared, evidence={"by": name})])
                database.store([record(key(number, kernel=f"own.{name}.{thread}"))])
        except BaseException as error:
            failures.append(f"{type(error).__name__}: {error}")

    crowd = [threading.Thread(target=one, args=(number,)) for number in range(threads)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()
    own = [key(number, kernel=f"own.{name}.{thread}") for thread in range(threads) for number in range(keys)]
    lost = len(own) - len(database.look_up(own))
    database.close()
    return {"failures": failures, "warnings": warnings, "problem": database.problem, "lost": lost}


def check_crowd(path: Path, processes: int, threads: int, keys: int) -> None:
    start = path.parent.parent / "start"
    children = [Child.run(functools.partial(work, path, n, threads, keys, start)) for n in range(processes)]
    start.touch()
    for child in children:
        assert child.result() == {"failures": [], "warnings": [], "problem": "", "lost": 0}
    database = Database(path)
    shared = database.records(kernel=KEY.kernel, newest=False)
    assert sorted(item.key.signature for item in shared) == sorted(key(n).signature for n in range(keys)), (
        "each key was measured once"
    )
    assert len(database.records(kernel="own.*", newest=False)) == processes * threads * keys, "no record was lost"
    assert len({item.evidence["by"] for item in shared}) > 1, "several processes took part"
    database.close()
    assert not list(path.parent.glob("*.corrupt-*"))


def test_eight_processes_of_four_threads_measure_every_key_once_and_lose_no_record(path: Path) -> None:
    check_crowd(path, processes=8, threads=4, keys=40)


@pytest.mark.slow
def test_eight_processes_of_thirty_two_threads_measure_every_key_once_and_lose_no_record(path: Path) -> None:
    check_crowd(path, processes=8, threads=32, keys=40)


@pytest.mark.parametrize("how", ["emptied", "cut", "overwritten", "removed"])
def test_processes_at_work_survive_that_the_file_is(path: Path, how: str) -> None:
    children = [Child.run(functools.partial(work, path, n, 3, 60)) for n in range(3)]
    reader = Database(path)
    while len(reader.records(newest=False)) < 60:
        time.sleep(0.01)
    reader.close()
    if how == "emptied":
        os.truncate(path, 0)
    elif how == "cut":
        os.truncate(path, 6000)
    elif how == "overwritten":
        with open(path, "r+b") as file:
            file.write(b"not a database, by no means " * 4000)
    else:
        for file in path.parent.glob("performance.sqlite3*"):
            file.unlink()
    for child in children:
        said = child.result()
        assert not said["failures"] and not said["lost"] and len(said["warnings"]) <= 2, said
    after = Database(path)
    after.store([record()])
    after.close()
    again = Database(path)
    assert again.look_up([KEY]) and not again.problem
    again.close()


def test_threads_share_a_database(database: Database) -> None:
    threads = [threading.Thread(target=database.store, args=([record(key(n))],)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(database.records()) == 32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_and_its_parent_both_write_and_the_file_stays_sound(database: Database) -> None:
    database.store([record(key(n)) for n in range(200)])
    with database.claim(KEY, 0.0) as mine:
        assert mine

        def write() -> bool:
            database.store([record(key(n)) for n in range(200, 400)])
            with database.claim(KEY, 0.0) as also:
                time.sleep(0.3)
                database.store([record(key(n)) for n in range(600, 800)])
                return also

        child = Child.run(write)
        database.store([record(key(n)) for n in range(400, 600)])
        database.close()  # were the child's locks not real, this would take its log away
        assert child.result() is False
    assert len(database.records()) == 800
    connection = sqlite3.connect(database.path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_the_default_database_is_one_object_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(tmp_path / "one"))
    first = default()
    assert first is default() and first.path == tmp_path / "one" / "performance.sqlite3"
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(tmp_path / "two"))
    assert default() is not first
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", "~no-such-user/cache")
    default().store([record()])
    assert default().look_up([KEY]) and default().problem


# Claims


def test_a_second_claim_waits_for_the_first_to_end(path: Path) -> None:
    for second in (Database(path), None):
        first = Database(path)
        second = second or first
        got: list[tuple[bool, float]] = []

        def wait(second: Database = second, got: list[tuple[bool, float]] = got) -> None:
            started = time.monotonic()
            with second.claim(KEY, wait=10.0) as mine:
                got.append((mine, time.monotonic() - started))

        with first.claim(KEY, wait=0.0) as mine:
            assert mine
            with second.claim(KEY, wait=0.05) as impatient, second.claim(key(5), wait=0.0) as other:
                assert not impatient and other
            thread = threading.Thread(target=wait)
            thread.start()
            time.sleep(0.2)
            assert not got
        thread.join()
        assert not got[0][0] and 0.1 < got[0][1] < 5.0
        with second.claim(KEY, wait=0.0) as mine:
            assert mine
        first.close()
        second.close()


def test_a_claim_ends_with_an_error_of_its_block(database: Database) -> None:
    with pytest.raises(RuntimeError, match="no"), database.claim(KEY, 0.0):
        raise RuntimeError("no")
    with database.claim(KEY, 0.0) as mine:
        assert mine


def test_the_claim_of_a_killed_process_is_taken_over(path: Path, tmp_path: Path) -> None:
    def hold() -> None:
        with Database(path).claim(KEY, 0.0) as mine:
            (tmp_path / "held").write_text(str(mine))
            time.sleep(60)

    child = Child.run(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    database = Database(path)
    with database.claim(KEY, wait=0.1) as mine:
        assert not mine
    os.kill(child.pid, signal.SIGKILL)
    child.stream.read()
    with database.claim(KEY, wait=0.5) as mine:  # the child was not waited for: a zombie counts as dead
        assert mine
    os.waitpid(child.pid, 0)
    child.stream.close()
    database.close()


@pytest.mark.parametrize(
    ("change", "taken_over"),
    [
        ("host = 'elsewhere'", False),
        ("host = 'elsewhere', taken = taken - 301", True),
        ("taken = taken + 86400", True),
        ("started = '1'", True),
        ("pid = 4194305", True),
    ],
)
def test_a_claim_is_taken_over_when_its_process_is_gone_or_its_lease_over(
    path: Path, change: str, taken_over: bool
) -> None:
    holder, other = Database(path), Database(path)
    with holder.claim(KEY, 0.0) as mine:
        assert mine
        connection = sqlite3.connect(path)
        connection.execute(f"UPDATE claim SET {change}")
        connection.commit()
        connection.close()
        with other.claim(KEY, 0.0) as mine:
            assert mine == taken_over
        with other.claim(KEY, 0.0) as mine:
            assert mine == taken_over
    other.close()
    holder.close()


def test_the_end_of_a_claim_leaves_that_of_who_took_it_over(path: Path) -> None:
    slow, quick, third = Database(path), Database(path), Database(path)
    with contextlib.ExitStack() as stack:
        late = contextlib.ExitStack()
        assert late.enter_context(slow.claim(KEY, 0.0))
        connection = sqlite3.connect(path)
        connection.execute("UPDATE claim SET taken = 0")
        connection.commit()
        connection.close()
        assert stack.enter_context(quick.claim(KEY, 0.0))
        late.close()
        with third.claim(KEY, 0.0) as mine:
            assert not mine
    for each in (slow, quick, third):
        each.close()


# Files that can't be used


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """File permissions count, for root too."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that :func:`unprivileged` may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)
        os.chmod(folder, 0o777)


def check_memory(database: Database) -> None:
    """What this process stores it finds, and its threads take turns, whatever the file does."""
    fresh = record(key(999), seconds=7.0)
    database.store([fresh])
    assert database.look_up([key(999)])[key(999)].seconds == 7.0
    assert any(item.seconds == 7.0 for item in database.records())
    with database.claim(KEY, 0.0) as mine, database.claim(KEY, 0.0) as second:
        assert mine and not second


def test_a_process_remembers_its_newest_measurements_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir()  # no file can be made of it
    database = Database(path)
    for number in (0, 1, 2, 0, 3):
        database.store([record(key(number), created=10.0 + number)])
    assert sorted(database.look_up([key(number) for number in range(4)]), key=str) == [key(0), key(2), key(3)]
    assert len(database._own) == 3 and len(database._unsaved) <= 3


def test_a_read_only_folder_is_read_and_costs_one_warning(public: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = public / "performance.sqlite3"
    with unprivileged():
        first = Database(path)
        first.store([record()])
        first.close()
        os.chmod(path, stat.S_IRUSR)
    os.chown(public, 0 if os.geteuid() == 0 else os.geteuid(), -1)
    os.chmod(public, 0o555)
    with unprivileged():
        second = Database(path)
        assert second.look_up([KEY])[KEY].seconds == 1e-3
        assert not warnings_of(caplog)
        check_memory(second)
        assert second.look_up([KEY])[KEY].seconds == 1e-3
        assert second.prune() == 0
        second.close()
        check_memory(second)
    assert len(warnings_of(caplog)) == 1 and "kept in memory" in warnings_of(caplog)[0]
    assert sorted(file.name for file in public.iterdir() if file.suffix != ".lock") == ["performance.sqlite3"]


def test_a_file_made_read_only_while_open_loses_nothing(public: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = public / "performance.sqlite3"
    with unprivileged():
        database = Database(path)
        database.store([record()])
        for file in public.iterdir():
            os.chmod(file, 0o444)
        check_memory(database)
        database.close()
        check_memory(database)
        assert database.look_up([KEY])
        database.close()
    assert len(warnings_of(caplog)) == 1


def test_a_connection_that_stops_writing_costs_one_warning(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``query_only`` gives the error of a file system that is remounted read-only."""
    database.store([record()])

    def read_only(*arguments: Any, opened: Any = sqlite_file._open) -> sqlite3.Connection:
        connection = opened(*arguments)
        connection.execute("PRAGMA query_only = 1")
        return connection

    assert database._connection is not None
    database._connection.execute("PRAGMA query_only = 1")
    monkeypatch.setattr(sqlite_file, "_open", read_only)
    check_memory(database)
    check_memory(database)
    assert database.look_up([KEY])
    assert len(warnings_of(caplog)) == 1 and database.problem


@pytest.mark.parametrize("where", ["file/performance.sqlite3", "folder.sqlite3"])
def test_a_path_that_cannot_be_opened_costs_one_warning(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.sqlite3").mkdir()
    database = Database(tmp_path / where)
    assert database.look_up([KEY]) == {}
    check_memory(database)
    assert len(warnings_of(caplog)) == 1


def test_a_folder_that_may_not_be_made_costs_one_warning(public: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.chmod(public, 0o555)
    with unprivileged():
        database = Database(public / "cache" / "performance.sqlite3")
        check_memory(database)
        assert database.look_up([KEY]) == {}
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(("version", "words"), [(2, "newer version"), (0, "another program")])
def test_a_newer_or_foreign_schema_is_left_alone(
    path: Path, version: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE future (x)")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    before = path.read_bytes()
    database = Database(path)
    assert database.look_up([KEY]) == {}
    check_memory(database)
    database.close()
    assert path.read_bytes()[100:] == before[100:] and not list(path.parent.glob("*.corrupt-*"))
    if version:
        assert path.read_bytes() == before
    assert len(warnings_of(caplog)) == 1 and words in warnings_of(caplog)[0]


def test_a_file_of_the_last_version_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Database(path)
    old.store([record()])
    old.close()
    step = ("ALTER TABLE record ADD COLUMN note TEXT",)
    monkeypatch.setattr(module, "_MIGRATIONS", (*module._MIGRATIONS, step))
    new = Database(path)
    assert new.look_up([KEY])[KEY].seconds == 1e-3
    new.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    assert connection.execute("SELECT note FROM record").fetchone() == (None,)
    connection.close()


@pytest.mark.parametrize("content", [b"garbage " * 1000, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_corrupt_file_is_moved_aside_with_one_warning(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    database = Database(path)
    assert database.look_up([KEY]) == {}
    database.store([record()])
    database.close()
    assert Database(path).look_up([KEY])
    assert path.with_name("performance.sqlite3.corrupt-1").read_bytes() == content
    assert len(warnings_of(caplog)) == 1 and "corrupt-1" in warnings_of(caplog)[0]


def test_a_record_that_cannot_be_read_is_ignored_with_one_warning(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.store([record(key(1)), record(key(2)), record(key(3))])
    database.close()
    connection = sqlite3.connect(database.path)
    connection.execute("UPDATE record SET evidence = 'no JSON' WHERE signature = ?", (key(1).signature,))
    connection.execute("UPDATE record SET samples = -1 WHERE signature = ?", (key(2).signature,))
    connection.commit()
    connection.close()
    other = Database(database.path)
    assert other.look_up([key(1), key(2), key(3)]).keys() == {key(3)}
    assert [item.key for item in other.records()] == [key(3)]
    assert not other.problem and len(warnings_of(caplog)) == 1
    other.close()


def damage_pages(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xaa" * (path.stat().st_size - 4096))


@pytest.mark.parametrize("damage", [functools.partial(os.truncate, length=0), damage_pages], ids=["emptied", "damaged"])
def test_a_file_that_goes_bad_while_open_is_replaced_by_one_with_what_this_process_knew(
    path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(path)
    database.store([record(key(n)) for n in range(500)])
    database.close()
    database.look_up([KEY])
    damage(path)
    database.store([record(key(n)) for n in range(500, 600)])
    database.look_up([key(n) for n in range(600)])
    database.close()
    after = Database(path)
    assert len(after.look_up([key(n) for n in range(600)])) == 600
    after.close()
    assert len(warnings_of(caplog)) == 1
    assert len([file for file in path.parent.glob("*.corrupt-*") if file.name[-1].isdigit()]) == 1


def test_two_processes_that_meet_the_same_corrupt_file_move_it_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Database(path), Database(path)
    for each in (first, second):
        each.look_up([KEY])
    os.truncate(path, 0)
    first.store([record(key(1))])
    second.store([record(key(2))])
    third = Database(path)
    assert len(third.look_up([key(1), key(2)])) == 2
    assert len([file for file in path.parent.glob("*.corrupt-*") if file.name[-1].isdigit()]) == 1
    assert len(warnings_of(caplog)) == 1
    for each in (first, second, third):
        each.close()


def test_a_new_file_is_not_moved_aside_by_who_saw_the_old_one_fail(path: Path) -> None:
    """The second finds the damage before the first has moved the file, and comes to move it after."""
    first, second = Database(path), Database(path)
    for each in (first, second):
        each.look_up([KEY])
    os.truncate(path, 0)
    first.store([record()])
    second._disconnect()
    assert second._move_aside(sqlite3.DatabaseError("database disk image is malformed"))
    assert not path.with_name("performance.sqlite3.corrupt-2").exists()
    assert second.look_up([KEY])
    for each in (first, second):
        each.close()


def test_truncated_shared_memory_is_not_touched_again(path: Path) -> None:
    """In a process of its own: reading it is a bus error."""

    def truncate() -> tuple[float | None, str]:
        database = Database(path)
        database.store([record(seconds=1.0)])
        os.truncate(f"{path}-shm", 0)
        database.store([record(seconds=2.0)])
        database.close()
        return database.look_up([KEY])[KEY].seconds, database.problem

    seconds, problem = Child.run(truncate).result()
    assert seconds == 2.0 and "shared memory was truncated" in problem
    after = Database(path)
    assert [item.seconds for item in after.records(newest=False)] == [1.0]
    after.close()


def test_a_file_locked_for_long_keeps_records_until_it_is_free(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "PATIENCE", 0.2)
    database.look_up([KEY])
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    database.store([record(key(1))])
    database.store([record(key(2))])
    assert len(database.look_up([key(1), key(2)])) == 2 and len(database.records()) == 2
    assert not database.problem and len(warnings_of(caplog)) == 1
    other.execute("ROLLBACK")
    database.store([record(key(3))])
    assert other.execute("SELECT count(*) FROM record").fetchone() == (3,)
    other.close()


def test_a_full_disk_keeps_records_in_memory(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    database.store([record(key(1))])
    assert database._connection is not None
    pages = database._connection.execute("PRAGMA page_count").fetchone()[0]
    database._connection.execute(f"PRAGMA max_page_count = {pages}")
    many = [record(key(n), evidence={"text": "x" * 2000}) for n in range(2, 40)]
    database.store(many)
    assert len(database.look_up([item.key for item in many])) == len(many)
    assert len(warnings_of(caplog)) == 1 and "full" in warnings_of(caplog)[0]
    database._connection.execute("PRAGMA max_page_count = 100000")
    database.close()
    after = Database(database.path)
    assert len(after.records()) == 39
    after.close()


def test_a_rollback_journal_serves_where_hosts_cannot_share_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "_on_network", lambda path: True)
    first, second = Database(path), Database(path)
    first.store([record(key(1))])
    second.store([record(key(2))])
    assert len(first.look_up([key(1), key(2)])) == 2
    assert not Path(f"{path}-wal").exists()
    for each in (first, second):
        each.close()


# Export, import, prune


def test_importing_twice_adds_nothing(database: Database, tmp_path: Path) -> None:
    database.store([record(key(n), error=math.inf, evidence={"a": [1]}) for n in range(3)])
    assert database.export(tmp_path / "out.jsonl") == 3
    assert all(json.loads(line)["error"] == "inf" for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert database.import_(tmp_path / "out.jsonl") == 0
    other = Database(tmp_path / "other.sqlite3")
    assert other.import_(tmp_path / "out.jsonl") == 3
    assert other.import_(tmp_path / "out.jsonl") == 0
    assert sorted(other.records(), key=str) == sorted(database.records(), key=str)
    other.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": None}, "'kernel' is None, not str"),
        ({"samples": True}, "'samples' is True, not int"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"confidence": 1.5}, "more than 1"),
        ({"colour": 1}, "'colour' is not a field"),
        ({"variance": ...}, "'variance' is missing"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_imported(
    database: Database, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    file = tmp_path / "in.jsonl"
    database.store([record()])
    database.export(file)
    good = json.loads(file.read_text())
    bad = {name: value for name, value in {**good, **change}.items() if value is not ...}
    file.write_text(f"{json.dumps(good | {'created': 5.0})}\n\n{json.dumps(bad)}\n")
    with pytest.raises(FormatError, match=f"in.jsonl, line 3: .*{words}"):
        database.import_(file)
    assert len(database.records(newest=False)) == 1
    with pytest.raises(FormatError, match="line 1: not JSON"):
        database.import_(io.StringIO("{"))


def test_pruning_keeps_the_newest_of_each_key(database: Database) -> None:
    now = time.time()
    day = 86400.0
    database.store([record(key(1), created=now - age * day) for age in (0, 10, 100)])
    database.store([record(key(2), created=now - age * day) for age in (50, 200)])
    assert database.prune(older_than_days=150) == 1
    assert database.prune() == 2
    assert sorted(round((now - item.created) / day) for item in database.records(newest=False)) == [0, 50]
    assert database.prune(older_than_days=20, keep_newest=False) == 1
    assert database.look_up([key(1), key(2)]).keys() == {key(1)}
    assert database.prune(keep_newest=False) == 1
    assert database.look_up([key(1)]) == {} and database.records() == []
