"""The performance database: what was measured about a kernel on a machine, kept in one SQLite file for every process.

Records enter (:meth:`Database.store`) and the newest record of each key leaves (:meth:`Database.look_up`).  Nothing
here raises because of the file: one that is corrupt is moved aside, one that is read-only, full, locked for long or
newer than this code costs one warning, and what this process stored stays in its memory.  Two processes, or two
threads, that want the same measurement take turns::

    found = database.look_up(keys)
    for key in keys:
        if key in found:
            continue
        with database.claim(key, wait=5.0) as mine:
            again = database.look_up([key])       # someone may have measured it since the first look
            if mine and not again:
                database.store([measure(key)])
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import math
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from lz_compile.machine import Machine, cache_directory
from lz_compile.sqlite_file import Migrations, SharedFile

FILE = "performance.sqlite3"

# Seconds after which a claim counts as abandoned whatever its holder does: a JIT build of minutes fits.
LEASE = 300.0

# So many of its newest measurements a process keeps in memory, for the case that the file breaks or can't be written.
REMEMBERED = 4096

# A measurement counts as right when it is this close to the true median, relative to it.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Key:
    """What a record is about.

    ``kernel`` is ``provider.kernel`` and ``version`` its version; ``signature`` is the bucketed signature of the region
    as canonical JSON text; ``graphs`` says that the time is that of a CUDA-graph replay.

    :raises ValueError: for text that UTF-8 can't hold.
    """

    kernel: str
    version: str
    signature: str
    machine: Machine
    graphs: bool = False

    def __post_init__(self) -> None:
        for text in (self.kernel, self.version, self.signature):
            text.encode()  # UnicodeEncodeError, a ValueError, here rather than while storing


@dataclass(frozen=True)
class Record:
    """What is known about a key.

    ``seconds`` is the median, None when the kernel was rejected or not timed; ``variance`` (s^2) is that of the
    ``samples``; ``confidence`` (0..1) is :func:`confidence_of` them.  ``reason`` says why a kernel did not qualify.
    ``error`` is its largest error over the tolerance; NaN becomes infinity.  ``evidence`` is reduced to JSON: tuples
    become lists, what JSON can't say becomes text.  ``created`` is in unix seconds; 0.0 becomes the time of storing.

    :raises ValueError: for a number that can't be one (negative or not finite; a confidence above 1).
    """

    key: Key
    seconds: float | None
    variance: float
    samples: int
    confidence: float
    qualified: bool
    reason: str = ""
    error: float | None = None
    graph_safe: bool | None = None
    pool_bytes: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict, hash=False)
    created: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds", "variance", "samples", "confidence", "pool_bytes", "created"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63:
                raise ValueError(f"{name} is {value!r}, which is not a finite number from 0")
        if self.confidence > 1:
            raise ValueError(f"confidence is {self.confidence!r}, which is more than 1")
        if self.error is not None:
            if self.error < 0:
                raise ValueError(f"error is {self.error!r}, which is less than 0")
            object.__setattr__(self, "error", math.inf if math.isnan(self.error) else float(self.error))
        object.__setattr__(self, "reason", self.reason.encode("utf-8", "backslashreplace").decode())
        object.__setattr__(self, "evidence", _plain(self.evidence))


class FormatError(ValueError):
    """A line of an imported file that is not a record: the message names the file and the line."""


def confidence_of(samples: int, variance: float, median: float) -> float:
    """The probability (0..1) that the true median lies within 3% of the measured one.

    From the asymptotic standard error of a median of normal samples, ``sqrt(pi / 2 * variance / samples)`` (Kendall and
    Stuart, The Advanced Theory of Statistics, vol. 1, ch. 10), so an approximation for a handful of samples.
    ``variance`` in s^2, ``median`` in s.  0.0 with less than two samples, which have no spread.
    """
    if samples < 2 or not median > 0 or not variance >= 0:
        return 0.0
    relative = math.sqrt(math.pi / 2 * variance / samples) / median
    return math.erf(TOLERANCE / relative / math.sqrt(2)) if relative > 0 else 1.0


_KEY = ("kernel", "version", "signature", "device", "capability", "driver", "cuda", "torch", "graphs")
_FACTS = (
    *("seconds", "variance", "samples", "confidence", "qualified", "reason", "error", "graph_safe", "pool_bytes"),
    *("evidence", "created"),
)
_COLUMNS = ", ".join(_KEY + _FACTS)
_SAME_KEY = " AND ".join(f"{{0}}.{name} = {{1}}.{name}" for name in _KEY)
_KEY_GIVEN = " AND ".join(f"{name} = ?" for name in _KEY)

# Keys a statement: nine parameters each, and the least limit of any SQLite build is 999.
_CHUNK = 100

_MIGRATIONS: Migrations = (
    (
        """CREATE TABLE record (
            id INTEGER PRIMARY KEY,
            kernel TEXT NOT NULL, version TEXT NOT NULL, signature TEXT NOT NULL,
            device TEXT NOT NULL, capability TEXT NOT NULL, driver TEXT NOT NULL, cuda TEXT NOT NULL,
            torch TEXT NOT NULL, graphs INTEGER NOT NULL,
            seconds REAL, variance REAL NOT NULL, samples INTEGER NOT NULL, confidence REAL NOT NULL,
            qualified INTEGER NOT NULL, reason TEXT NOT NULL, error REAL, graph_safe INTEGER, pool_bytes INTEGER,
            evidence TEXT NOT NULL, created REAL NOT NULL)""",
        """CREATE INDEX record_key ON record
            (signature, kernel, version, device, capability, driver, cuda, torch, graphs, created)""",
        "CREATE INDEX record_created ON record (created)",
        """CREATE TABLE claim (
            kernel TEXT NOT NULL, version TEXT NOT NULL, signature TEXT NOT NULL,
            device TEXT NOT NULL, capability TEXT NOT NULL, driver TEXT NOT NULL, cuda TEXT NOT NULL,
            torch TEXT NOT NULL, graphs INTEGER NOT NULL,
            token TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL, taken REAL NOT NULL,
            PRIMARY KEY (signature, kernel, version, device, capability, driver, cuda, torch, graphs)) WITHOUT ROWID""",
    ),
)


class Database(SharedFile):
    """The records of one file.  May be shared by threads; a forked child opens its own connection."""

    def __init__(self, path: Path | None = None) -> None:
        """``path`` defaults to ``performance.sqlite3`` in the cache directory.  Nothing is opened yet."""
        super().__init__(_default_path() if path is None else path, _MIGRATIONS)
        self._own: dict[Key, Record] = {}
        self._unsaved: list[Record] = []
        self._measuring: set[Key] = set()
        self._finished = threading.Condition()

    def look_up(self, keys: Iterable[Key]) -> dict[Key, Record]:
        """The newest record of each key that has one."""
        keys = list(dict.fromkeys(keys))

        def read(connection: sqlite3.Connection) -> dict[Key, Record]:
            found = {}
            for start in range(0, len(keys), _CHUNK):
                chunk = keys[start : start + _CHUNK]
                parameters = [value for key in chunk for value in _key_values(key)]
                for position, *facts in connection.execute(_look_up_sql(len(chunk)), parameters):
                    record = self._readable(chunk[position], facts)
                    if record is not None:
                        found[chunk[position]] = record
            return found

        with self._lock:
            nothing: dict[Key, Record] = {}
            found = self.run(read, otherwise=nothing) if keys else nothing
            for key in keys if self._own else ():
                own = self._own.get(key)
                if own is not None and (key not in found or own.created >= found[key].created):
                    found[key] = own
        return found

    def store(self, records: Iterable[Record]) -> None:
        """Append records.  Earlier records of the same key stay in the file, and are no longer looked up."""
        now = time.time()
        records = [record if record.created else replace(record, created=now) for record in records]
        if records:
            self._append(records)

    def claim(self, key: Key, wait: float) -> AbstractContextManager[bool]:
        """A block that measures ``key`` while nobody else does.

        True: it is ours for the length of the block.  False: someone else had it, and has now finished or has not
        within ``wait`` seconds; look the key up again, or measure nothing.  The claim of a dead process, or one older
        than ``LEASE``, is taken over.  Without a usable file only the threads of this process take turns.
        """
        return self._claim(key, wait)

    def records(
        self, *, kernel: str = "*", device: str = "*", newest: bool = True, limit: int | None = None
    ) -> list[Record]:
        """Records whose kernel and device match the globs, newest first; ``newest``: one a key, else its history."""
        newer = f"SELECT 1 FROM record AS later WHERE {_SAME_KEY.format('later', 'record')}"
        newer += " AND (later.created, later.id) > (record.created, record.id)"
        statement = f"SELECT {_COLUMNS} FROM record WHERE matches(kernel, ?) AND matches(device, ?)"
        statement += f" AND NOT EXISTS ({newer})" if newest else ""
        statement += " ORDER BY created DESC, id DESC LIMIT ?"

        def read(connection: sqlite3.Connection) -> list[Record]:
            rows = connection.execute(statement, (kernel, device, -1 if limit is None else limit))
            found = (self._readable(row[: len(_KEY)], row[len(_KEY) :]) for row in rows)
            return [record for record in found if record is not None]

        with self._lock:
            nothing: list[Record] = []
            found = self.run(read, otherwise=nothing)
            if self.problem or self._unsaved:
                found = self._with_own(found, kernel, device, newest)
        return found if limit is None else found[:limit]

    def export(self, file: TextIO | str | os.PathLike[str]) -> int:
        """Write all records, the oldest first, as JSON lines; how many.

        :raises OSError: when ``file`` can't be written.
        """
        records = self.records(newest=False)
        with _text(file, "w") as stream:
            for record in reversed(records):
                stream.write(json.dumps(_to_json(record), allow_nan=False) + "\n")
        return len(records)

    def import_(self, file: TextIO | str | os.PathLike[str]) -> int:
        """Add the records of an exported file, all or none, but for those that are here already; how many were added.

        :raises FormatError: for a line that is not a record.
        :raises OSError: when ``file`` can't be read.
        """
        name = getattr(file, "name", "input") if hasattr(file, "read") else os.fspath(file)  # type: ignore[arg-type]
        records = []
        with _text(file, "r") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        records.append(_from_json(line))
                    except ValueError as error:
                        raise FormatError(f"{name}, line {number}: {error}") from None
        return self._append(records)

    def prune(self, older_than_days: float | None = None, keep_newest: bool = True) -> int:
        """Delete records older than so many days (None: of any age), but, with ``keep_newest``, the newest of each key.

        Claims that were abandoned go too.  Returns how many records went: 0 when the file can't be written.
        """
        limit = math.inf if older_than_days is None else time.time() - 86400 * older_than_days
        statement = "DELETE FROM record WHERE created <= ?"
        if keep_newest:
            statement += f""" AND EXISTS (SELECT 1 FROM record AS later WHERE {_SAME_KEY.format("later", "record")}
                AND (later.created, later.id) > (record.created, record.id))"""

        def delete(connection: sqlite3.Connection) -> int:
            connection.execute("DELETE FROM claim WHERE abs(? - taken) > ?", (time.time(), LEASE))
            return connection.execute(statement, (limit,)).rowcount

        with self._lock:
            count = self.run(delete, otherwise=0, write=True)
            if not self.problem:
                self._own.clear()
            if count and self._connection is not None:
                # Gives the space back; it needs the file for itself, and matters to no one.
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("VACUUM")
        return count

    def close(self) -> None:
        """Close the connection; the next operation opens another."""
        with self._lock:
            if self._unsaved:
                self.run(lambda connection: None, otherwise=None, write=True)
            self._disconnect()

    # Records and memory

    def _append(self, records: Sequence[Record]) -> int:
        """Write the records that are not in the file yet, and remember the newest of each key; how many were new."""
        with self._lock:
            for record in records:
                own = self._own.get(record.key)
                if own is None or record.created >= own.created:
                    self._own.pop(record.key, None)
                    self._own[record.key] = record
            while len(self._own) > REMEMBERED:
                del self._own[next(iter(self._own))]
            added = self.run(lambda connection: _insert(connection, records), otherwise=None, write=True)
            if added is not None:
                return added
            if not self.problem:
                self._unsaved = [*self._unsaved, *records][-REMEMBERED:]
            return len(records)

    def _readable(self, key: Key | Sequence[Any], facts: Sequence[Any]) -> Record | None:
        """The record of a row; None, with a warning, for values that this code never writes."""
        try:
            return _record(key if isinstance(key, Key) else _key(key), facts)
        except (ValueError, TypeError, AttributeError) as error:
            self.warn("record", f"a record can't be read and is ignored: {error}")
            return None

    def _with_own(self, found: list[Record], kernel: str, device: str, newest: bool) -> list[Record]:
        """Records of the file with those that only this process has."""
        seen = set(found)
        own = {record: None for record in [*self._own.values(), *self._unsaved] if record not in seen}
        mine = [
            record
            for record in own
            if fnmatch.fnmatchcase(record.key.kernel, kernel) and fnmatch.fnmatchcase(record.key.machine.device, device)
        ]
        merged = sorted([*reversed(mine), *found], key=lambda record: -record.created)
        if newest:
            first: dict[Key, Record] = {}
            for record in merged:
                first.setdefault(record.key, record)
            merged = list(first.values())
        return merged

    def save(self, connection: sqlite3.Connection) -> None:
        _insert(connection, self._unsaved)

    def saved(self) -> None:
        self._unsaved = []

    def replaced(self) -> None:
        self._unsaved = list(dict.fromkeys([*self._own.values(), *self._unsaved]))

    def _after_fork_in_child(self) -> None:
        super()._after_fork_in_child()
        self._measuring = set()
        self._finished = threading.Condition()

    # Claims

    @contextlib.contextmanager
    def _claim(self, key: Key, wait: float) -> Iterator[bool]:
        deadline = time.monotonic() + wait
        with self._finished:
            taken = key in self._measuring
            if taken:
                self._finished.wait_for(lambda: key not in self._measuring, max(0.0, wait))
            else:
                self._measuring.add(key)
        if taken:
            yield False
            return
        pid = os.getpid()
        token = uuid.uuid4().hex
        mine = False
        try:
            mine = self._take(key, token, deadline)
            yield mine
        finally:
            if pid == os.getpid():
                if mine:
                    self.run(lambda c: c.execute("DELETE FROM claim WHERE token = ?", (token,)), None, write=True)
                with self._finished:
                    self._measuring.discard(key)
                    self._finished.notify_all()

    def _take(self, key: Key, token: str, deadline: float) -> bool:
        """Enter a claim, or wait for the process that holds it; whether it is ours."""
        values = _key_values(key)

        def take(connection: sqlite3.Connection) -> str:
            row = connection.execute(f"SELECT token, host, pid, started, taken FROM claim WHERE {_KEY_GIVEN}", values)
            holder = row.fetchone()
            if holder is not None and not _abandoned_claim(*holder[1:]):
                return holder[0]
            connection.execute(
                f"INSERT OR REPLACE INTO claim VALUES ({', '.join('?' * 14)})",
                (*values, token, _host(), os.getpid(), _started(os.getpid()) or "", time.time()),
            )
            return token

        def look(connection: sqlite3.Connection) -> tuple[Any, ...] | None:
            row = connection.execute(f"SELECT token, host, pid, started, taken FROM claim WHERE {_KEY_GIVEN}", values)
            return row.fetchone()

        holder = self.run(take, otherwise=token, write=True)
        pause = 0.002
        while holder != token:
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, 0.05)
            row = self.run(look, otherwise=None)
            if row is None or row[0] != holder:
                return False
            if _abandoned_claim(*row[1:]):
                holder = self.run(take, otherwise=token, write=True)
        return True


def default() -> Database:
    """The database in the cache directory as it is now; the same object every time, for the threads to share."""
    path = _default_path()
    # A dict's setdefault is atomic, and a database that loses the race has opened nothing.
    return _by_path.get(path) or _by_path.setdefault(path, Database(path))


def _default_path() -> Path:
    try:
        return cache_directory() / FILE
    except RuntimeError:  # LZ_COMPILE_CACHE_DIR starts with ~ and names no user
        return Path(os.devnull) / FILE


_by_path: dict[Path, Database] = {}

# Rows and lines


def _plain(value: Any) -> Any:
    """The nearest that JSON can say."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if value is None or type(value) in (bool, int, str):
        return value
    return str(value)


def _key_values(key: Key) -> tuple[Any, ...]:
    machine = key.machine
    return (
        *(key.kernel, key.version, key.signature),
        *(machine.device, machine.capability, machine.driver, machine.cuda, machine.torch),
        int(key.graphs),
    )


def _values(record: Record) -> tuple[Any, ...]:
    facts = {name: getattr(record, name) for name in _FACTS}
    facts["evidence"] = json.dumps(record.evidence, sort_keys=True)
    return (*_key_values(record.key), *facts.values())


def _key(row: Sequence[Any]) -> Key:
    kernel, version, signature, device, capability, driver, cuda, torch, graphs = row
    return Key(kernel, version, signature, Machine(device, capability, driver, cuda, torch), bool(graphs))


def _record(key: Key, facts: Sequence[Any]) -> Record:
    fields = dict(zip(_FACTS, facts))
    fields["qualified"] = bool(fields["qualified"])
    fields["graph_safe"] = None if fields["graph_safe"] is None else bool(fields["graph_safe"])
    fields["evidence"] = json.loads(fields["evidence"])
    return Record(key, **fields)


def _insert(connection: sqlite3.Connection, records: Sequence[Record]) -> int:
    """Insert the records that are not there in every column; how many."""
    same = " AND ".join(f"{name} IS ?" for name in _FACTS)
    marks = ", ".join("?" * len(_KEY + _FACTS))
    statement = f"""INSERT INTO record ({_COLUMNS}) SELECT {marks}
        WHERE NOT EXISTS (SELECT 1 FROM record WHERE {_KEY_GIVEN} AND {same})"""
    count = 0
    for record in records:
        values = _values(record)
        count += connection.execute(statement, values + values).rowcount
    return count


@functools.cache
def _look_up_sql(keys: int) -> str:
    """The newest record of each of so many keys, given as nine parameters each: position of the key, facts."""
    marks = ", ".join("?" * len(_KEY))
    wanted = ", ".join(f"({position}, {marks})" for position in range(keys))
    facts = ", ".join(f"record.{name}" for name in _FACTS)
    return f"""WITH wanted (position, {", ".join(_KEY)}) AS (VALUES {wanted})
        SELECT position, {facts} FROM wanted JOIN record ON record.id = (
            SELECT other.id FROM record AS other WHERE {_SAME_KEY.format("other", "wanted")}
            ORDER BY other.created DESC, other.id DESC LIMIT 1)"""


_NUMBER = (float, int)
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_KEY, (str,)),
    "graphs": (bool,),
    "seconds": (*_NUMBER, type(None)),
    "variance": _NUMBER,
    "samples": (int,),
    "confidence": _NUMBER,
    "qualified": (bool,),
    "reason": (str,),
    "error": (*_NUMBER, type(None)),
    "graph_safe": (bool, type(None)),
    "pool_bytes": (int, type(None)),
    "evidence": (dict,),
    "created": _NUMBER,
}


def _to_json(record: Record) -> dict[str, Any]:
    """One flat object, the columns of the table; an infinite error is ``"inf"``, which JSON has no number for."""
    line = dict(zip(_KEY, _key_values(record.key)))
    line["graphs"] = record.key.graphs
    line |= {name: getattr(record, name) for name in _FACTS}
    if record.error is not None and math.isinf(record.error):
        line["error"] = "inf"
    return line


def _from_json(line: str) -> Record:
    """:raises ValueError: when the line is not what :func:`_to_json` gives."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if fields.get("error") == "inf":
        fields["error"] = math.inf
    for name in fields:
        if name not in _JSON_TYPES:
            raise ValueError(f"{name!r} is not a field of a record")
    for name, types in _JSON_TYPES.items():
        if name not in fields:
            raise ValueError(f"{name!r} is missing")
        if type(fields[name]) not in types:
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{name!r} is {fields[name]!r}, not {expected}")
    fields["evidence"] = json.dumps(fields["evidence"])
    return _record(_key([fields[name] for name in _KEY]), [fields[name] for name in _FACTS])


@contextlib.contextmanager
def _text(file: TextIO | str | os.PathLike[str], mode: str) -> Iterator[Any]:
    if isinstance(file, (str, os.PathLike)):
        with open(file, mode, encoding="utf-8") as stream:
            yield stream
    else:
        yield file


# Processes


def _abandoned_claim(host: str, pid: int, started: str, taken: float) -> bool:
    """Whether the holder of a claim is gone; the claims of other hosts only age."""
    if abs(time.time() - taken) > LEASE:
        return True
    if host != _host():
        return False
    now = _started(pid)
    return now is None or bool(now and started and now != started)


@functools.cache
def _host() -> str:
    """Where a process number means what it means here: host name, boot, and namespace of processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot; empty where the system does not say, None when it is gone."""
    if os.name != "posix":
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return ""
