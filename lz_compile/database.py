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

A database has one connection behind a lock.  A statement takes microseconds and SQLite admits one writer at a time, so
a connection a thread would gain little; and whoever forks must first close every connection, which needs that lock: a
child that inherits SQLite's bookkeeping believes to hold file locks that it does not.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import logging
import math
import os
import socket
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

from lz_compile.machine import Machine, cache_directory

try:
    import fcntl
except ImportError:  # not a POSIX system: then a corrupt file stays where it is
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("lz_compile")

FILE = "performance.sqlite3"

# Seconds after which a claim counts as abandoned whatever its holder does: a JIT build of minutes fits.
LEASE = 300.0

# Seconds for which an operation tries again while others hold the file's write lock.
PATIENCE = 10.0

# A measurement counts as right when it is this close to the true median, relative to it.
TOLERANCE = 0.03

T = TypeVar("T")


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

# What turns a file of version n into one of version n + 1; the length is the version this code writes.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
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


class _Unusable(Exception):
    """Why the file may not be used, or not be written, by this process."""


class Database:
    """The records of one file.  May be shared by threads; a forked child opens its own connection."""

    def __init__(self, path: Path | None = None) -> None:
        """``path`` defaults to ``performance.sqlite3`` in the cache directory.  Nothing is opened yet."""
        self.path = Path(os.path.realpath(_default_path() if path is None else path))
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._files: _Files | None = None
        self._warned: set[str] = set()
        self._problem = ""
        self._read_only = ""
        self._own: dict[Key, Record] = {}
        self._unsaved: list[Record] = []
        self._measuring: set[Key] = set()
        self._finished = threading.Condition()
        with _registry:
            _alive.add(self)

    @property
    def problem(self) -> str:
        """Why this process does not use the file, or does not write it; empty when all is well."""
        return self._problem or self._read_only

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
            found = self._run(read, otherwise=nothing) if keys else nothing
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
            found = self._run(read, otherwise=nothing)
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
            count = self._run(delete, otherwise=0, write=True)
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
                self._run(lambda connection: None, otherwise=None, write=True)
            self._disconnect()

    # Records and memory

    def _append(self, records: Sequence[Record]) -> int:
        """Write the records that are not in the file yet, and remember the newest of each key; how many were new."""
        with self._lock:
            for record in records:
                own = self._own.get(record.key)
                if own is None or record.created >= own.created:
                    self._own[record.key] = record
            added = self._run(lambda connection: _insert(connection, records), otherwise=None, write=True)
            if added is not None:
                return added
            if not self.problem:
                self._unsaved += records
            return len(records)

    def _readable(self, key: Key | Sequence[Any], facts: Sequence[Any]) -> Record | None:
        """The record of a row; None, with a warning, for values that this code never writes."""
        try:
            return _record(key if isinstance(key, Key) else _key(key), facts)
        except (ValueError, TypeError, AttributeError) as error:
            self._warn("record", f"a record can't be read and is ignored: {error}")
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
                    self._run(lambda c: c.execute("DELETE FROM claim WHERE token = ?", (token,)), None, write=True)
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

        holder = self._run(take, otherwise=token, write=True)
        pause = 0.002
        while holder != token:
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, 0.05)
            row = self._run(look, otherwise=None)
            if row is None or row[0] != holder:
                return False
            if _abandoned_claim(*row[1:]):
                holder = self._run(take, otherwise=token, write=True)
        return True

    # The file

    def _run(self, work: Callable[[sqlite3.Connection], T], otherwise: T, write: bool = False) -> T:
        """``work`` in one transaction, tried again where that may help, or ``otherwise``; a write saves the unsaved."""
        deadline = time.monotonic() + PATIENCE
        failures: list[str] = []
        pause = 0.005
        with self._lock:
            while not (self._problem or (write and self._read_only)):
                try:
                    return self._transact(self._connect(), work, write)
                except _Unusable as error:
                    self._give_up(str(error))
                except (sqlite3.Error, OSError) as error:
                    kind = _kind(error)
                    if kind == "busy" and time.monotonic() < deadline:
                        time.sleep(pause)
                        pause = min(2 * pause, 0.1)
                    elif kind in ("busy", "full"):
                        self._warn(kind, f"{error}; what could not be written is kept in memory")
                        return otherwise
                    elif kind == "corrupt" and failures.count("corrupt") < 3:
                        failures.append(kind)
                        self._disconnect()
                        if not self._move_aside(error):
                            self._give_up(f"{error}, and it could not be moved aside")
                    elif kind == "other" or kind in failures:
                        self._disconnect()
                        if kind == "read-only" and write:
                            self._read_only = str(error)
                        else:
                            self._give_up(str(error))
                    else:
                        failures.append(kind)
                        self._disconnect()
            if self._read_only and write and not self._problem:
                self._warn("read-only", f"{self._read_only}; new records are kept in memory")
            return otherwise

    def _transact(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            if write:
                _insert(connection, self._unsaved)
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise
        if write:
            self._unsaved = []
        return result

    def _connect(self) -> sqlite3.Connection:
        """The connection, opened, or opened again when the file at the path is no longer the one it has open."""
        if self._connection is not None:
            files = _Files.at(self.path)
            if files == self._files:
                return self._connection
            assert self._files is not None
            if files.shared == self._files.shared and files.shared and files.shared_bytes < _SHARED_BYTES:
                # Touching it again, by closing even, would be a bus error.
                _untouchable.append(self._connection)
                self._connection = None
                raise _Unusable("its shared memory was truncated by another program")
            if files.database == self._files.database and files.empty:
                raise sqlite3.DatabaseError("database disk image is malformed: the file was emptied")
            replaced = files.database != self._files.database
            self._disconnect()
        else:
            replaced = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._door(exclusive=False):
            connection = self._open()
        self._connection = connection
        if replaced and not self._read_only:
            # The new file has none of what this process knows.
            self._unsaved = list(dict.fromkeys([*self._own.values(), *self._unsaved]))
            with contextlib.suppress(sqlite3.Error):
                self._transact(connection, lambda c: None, write=True)
        return connection

    def _open(self) -> sqlite3.Connection:
        try:
            connection = _open(str(self.path))
        except (sqlite3.Error, OSError) as error:
            self._files = _Files.at(self.path)
            if _kind(error) not in ("read-only", "unopenable") or not self.path.is_file():
                raise
            # SQLite wants a log and shared memory beside a WAL file even to read it, unless told that no one writes.
            connection = _open(self.path.as_uri() + "?mode=ro&immutable=1")
            self._read_only = str(error)
        self._files = _Files.at(self.path)
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    @contextlib.contextmanager
    def _door(self, exclusive: bool) -> Iterator[bool]:
        """Held shared while opening and exclusively while moving the file aside; whether it could be had."""
        if fcntl is None:
            yield False
            return
        try:
            handle = os.open(f"{self.path}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            yield False
            return
        try:
            deadline = time.monotonic() + 2.0
            while not (held := _flock(handle, exclusive)) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield held
        finally:
            os.close(handle)

    def _move_aside(self, error: Exception) -> bool:
        """Rename the corrupt file, unless another process did; whether the path is free for a new one.

        The file that failed is known by its inode, so a new file that took its place meanwhile stays.
        """
        with self._door(exclusive=True) as held:
            if not held:
                return False
            if self._files is None or _Files.at(self.path).database != self._files.database:
                return True
            for number in range(1, 10):
                aside = self.path.with_name(f"{self.path.name}.corrupt-{number}")
                if not aside.exists():
                    break
            else:
                return False
            try:
                for suffix in ("-journal", "-wal", "-shm", ""):
                    if os.path.exists(f"{self.path}{suffix}"):
                        os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
            except OSError:
                return False
        self._unsaved = list(dict.fromkeys([*self._own.values(), *self._unsaved]))
        self._warn("corrupt", f"{error}; it was moved to {aside.name} and a new one begun")
        return True

    def _give_up(self, reason: str) -> None:
        self._problem = reason
        self._warn("unusable", f"{reason}; measurements are kept in memory")

    def _warn(self, kind: str, text: str) -> None:
        """One warning a kind of trouble."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("the performance database %s: %s", self.path, text)

    # Forks

    def _before_fork(self) -> None:
        self._lock.acquire()
        self._disconnect()

    def _after_fork_in_parent(self) -> None:
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._finished = threading.Condition()
        self._measuring = set()


def default() -> Database:
    """The database in the cache directory as it is now; the same object every time, for the threads to share."""
    path = _default_path()
    with _registry:
        database = _by_path.get(path)
    if database is None:
        database = Database(path)
        with _registry:
            database = _by_path.setdefault(path, database)
    return database


def _default_path() -> Path:
    try:
        return cache_directory() / FILE
    except RuntimeError:  # LZ_COMPILE_CACHE_DIR starts with ~ and names no user
        return Path(os.devnull) / FILE


_registry = threading.Lock()
_alive: weakref.WeakSet[Database] = weakref.WeakSet()
_by_path: dict[Path, Database] = {}
_forking: list[Database] = []
_untouchable: list[sqlite3.Connection] = []


def _before_fork() -> None:
    _registry.acquire()
    _forking[:] = _alive
    for database in _forking:
        database._before_fork()


def _after_fork_in_parent() -> None:
    for database in _forking:
        database._after_fork_in_parent()
    _forking.clear()
    _registry.release()


def _after_fork_in_child() -> None:
    for database in _forking:
        database._after_fork_in_child()
    _forking.clear()
    _registry.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


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


# SQLite and its files

# The least that the shared memory of a WAL database in use measures.
_SHARED_BYTES = 32768


@dataclass(frozen=True)
class _Files:
    """Which files stand at the path: device and inode of the database, its log and their shared memory."""

    database: tuple[int, int] | None
    empty: bool
    wal: tuple[int, int] | None
    shared: tuple[int, int] | None
    shared_bytes: int

    @classmethod
    def at(cls, path: Path) -> _Files:
        database, wal, shared = (_stat(f"{path}{suffix}") for suffix in ("", "-wal", "-shm"))
        return cls(
            database=database and (database.st_dev, database.st_ino),
            empty=database is not None and database.st_size == 0,
            wal=wal and (wal.st_dev, wal.st_ino),
            shared=shared and (shared.st_dev, shared.st_ino),
            shared_bytes=min(shared.st_size, _SHARED_BYTES) if shared else 0,
        )


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _open(name: str) -> sqlite3.Connection:
    """Connect, check the schema's version and bring the schema up to date.  ``name`` is a path or a ``file:`` URI."""
    uri = name.startswith("file:")
    # Threads take turns under the database's lock, hence no check of theirs.
    connection = sqlite3.connect(name, timeout=PATIENCE / 2, isolation_level=None, check_same_thread=False, uri=uri)
    try:
        connection.execute("PRAGMA mmap_size = 0")  # a mapped file that is truncated is a bus error
        if _version(connection) > len(_MIGRATIONS):
            raise _Unusable("it was written by a newer version of lz-compile")
        if not uri:
            _choose_journal(connection, name)
        if _version(connection) < len(_MIGRATIONS):
            _migrate(connection)
        connection.create_function("matches", 2, fnmatch.fnmatchcase, deterministic=True)
    except BaseException:
        connection.close()
        raise
    return connection


def _version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _choose_journal(connection: sqlite3.Connection, path: str) -> None:
    """A write-ahead log, whose readers don't wait for writers; a rollback journal where hosts can't share memory.

    A switch that can't be made now (a read-only file, other processes in it) is left to a later process.
    """
    wanted = "delete" if _on_network(path) else "wal"
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != wanted:
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute(f"PRAGMA journal_mode = {wanted}")
    connection.execute("PRAGMA synchronous = NORMAL")


def _migrate(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection)
        if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise _Unusable("it is a database of another program")
        for statements in _MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {max(version, len(_MIGRATIONS))}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


# SQLite's own texts for its result codes (sqlite3ErrStr); Python tells the codes from 3.11 on.
_KINDS = (
    ("is locked", "busy"),
    ("locking protocol", "busy"),
    ("is full", "full"),
    ("malformed", "corrupt"),
    ("file is not a database", "corrupt"),
    ("file is encrypted", "corrupt"),
    ("Could not decode to UTF-8", "corrupt"),
    ("readonly", "read-only"),
    ("unable to open", "unopenable"),
    ("disk I/O error", "input-output"),
)


def _kind(error: Exception) -> str:
    return next((kind for text, kind in _KINDS if text in str(error)), "other")


def _flock(handle: int, exclusive: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


_NETWORK = ("nfs", "cifs", "smb", "afs", "9p", "lustre", "gpfs", "beegfs", "ceph", "gluster", "fuse.sshfs", "fuse.gcs")


def _on_network(path: str) -> bool:
    """Whether other hosts may have the file too (Linux tells; elsewhere the answer is no)."""
    kind, longest = "", -1
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                before, _, after = line.partition(" - ")
                point = before.split()[4].replace("\\040", " ")
                inside = path.startswith(point if point.endswith("/") else point + "/")
                if inside and len(point) >= longest:
                    kind, longest = after.split()[0], len(point)
    except (OSError, IndexError):
        return False
    return kind.startswith(_NETWORK)


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
