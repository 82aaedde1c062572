"""One SQLite file that many processes and threads share, and that may be missing, corrupt, read-only, full or replaced.

Work on a connection enters (:meth:`SharedFile.run`); its result leaves, or the caller's substitute and one warning.  A
corrupt file is moved aside under a file lock, once, whoever finds it; nothing here raises because of the file.

A file has one connection behind a lock.  A statement takes microseconds and SQLite admits one writer at a time, so a
connection a thread would gain little; and whoever forks must first close every connection, which needs that lock: a
child that inherits SQLite's bookkeeping believes to hold file locks that it does not (SQLite, How To Corrupt An SQLite
Database File, 2.6).
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # not a POSIX system: then a corrupt file stays where it is
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("lz_compile")

# Seconds for which an operation tries again while others hold the file's write lock.
PATIENCE = 10.0

T = TypeVar("T")

# What turns a file of version n into one of version n + 1; the length is the version that is written.
Migrations = tuple[tuple[str, ...], ...]


class _Unusable(Exception):
    """Why the file may not be used, or not be written, by this process."""


class SharedFile:
    """The file at ``path`` with the schema that ``migrations`` make.

    A subclass that keeps in memory what could not be written says how to write it later: :meth:`save` is called in
    every write transaction, :meth:`saved` once that is committed, :meth:`replaced` when the path has another file.
    """

    def __init__(self, path: Path, migrations: Migrations) -> None:
        """Nothing is opened yet."""
        self.path = Path(os.path.realpath(path))
        self._migrations = migrations
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._files: _Files | None = None
        self._warned: set[str] = set()
        self._problem = ""
        self._read_only = ""
        with _registry:
            _alive.add(self)

    @property
    def problem(self) -> str:
        """Why this process does not use the file, or does not write it; empty when all is well."""
        return self._problem or self._read_only

    def save(self, connection: sqlite3.Connection) -> None:
        """Write what is owed."""

    def saved(self) -> None:
        """What was owed is written."""

    def replaced(self) -> None:
        """What this process wrote is no longer in the file."""

    def run(self, work: Callable[[sqlite3.Connection], T], otherwise: T, write: bool = False) -> T:
        """``work`` in one transaction, tried again where that may help, else ``otherwise`` and a warning."""
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
                        self.warn(kind, f"{error}; what could not be written is kept in memory")
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
                self.warn("read-only", f"{self._read_only}; what this process stores is kept in memory")
            return otherwise

    def _transact(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            if write:
                self.save(connection)
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise
        if write:
            self.saved()
        return result

    def _connect(self) -> sqlite3.Connection:
        """The connection, opened, or opened again when the file at the path is no longer the one it has open."""
        known, files = self._files, _Files.at(self.path)
        if self._connection is not None and known is not None:
            if files == known:
                return self._connection
            if files.shared == known.shared and files.shared and files.shared_bytes < _SHARED_BYTES:
                # Touching it again, by closing even, would be a bus error.
                _untouchable.append(self._connection)
                self._connection = None
                raise _Unusable("its shared memory was truncated by another program")
            if files.database == known.database and files.empty:
                raise sqlite3.DatabaseError("database disk image is malformed: the file was emptied")
            self._disconnect()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._door(exclusive=False):
            connection = self._connection = self._open()
        if known is not None and self._files is not None and known.database != self._files.database:
            self.replaced()
            if not self._read_only:
                with contextlib.suppress(sqlite3.Error):
                    self._transact(connection, lambda c: None, write=True)
        return connection

    def _open(self) -> sqlite3.Connection:
        try:
            connection = _open(str(self.path), self._migrations)
        except (sqlite3.Error, OSError) as error:
            self._files = _Files.at(self.path)
            if _kind(error) not in ("read-only", "unopenable") or not self.path.is_file():
                raise
            # SQLite wants a log and shared memory beside a WAL file even to read it, unless told that no one writes.
            connection = _open(self.path.as_uri() + "?mode=ro&immutable=1", self._migrations)
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
        self.warn("corrupt", f"{error}; it was moved to {aside.name} and a new one begun")
        return True

    def _give_up(self, reason: str) -> None:
        self._problem = reason
        self.warn("unusable", f"{reason}; what this process stores is kept in memory")

    def warn(self, kind: str, text: str) -> None:
        """One warning a kind of trouble."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("the database %s: %s", self.path, text)

    # Forks

    def _before_fork(self) -> None:
        self._lock.acquire()
        self._disconnect()

    def _after_fork_in_parent(self) -> None:
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()


_registry = threading.Lock()
_alive: weakref.WeakSet[SharedFile] = weakref.WeakSet()
_forking: list[SharedFile] = []
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


def _open(name: str, migrations: Migrations) -> sqlite3.Connection:
    """Connect, check the schema's version and bring the schema up to date.  ``name`` is a path or a ``file:`` URI."""
    uri = name.startswith("file:")
    # Threads take turns under the database's lock, hence no check of theirs.
    connection = sqlite3.connect(name, timeout=PATIENCE / 2, isolation_level=None, check_same_thread=False, uri=uri)
    try:
        connection.execute("PRAGMA mmap_size = 0")  # a mapped file that is truncated is a bus error
        if _version(connection) > len(migrations):
            raise _Unusable("it was written by a newer version of lz-compile")
        if not uri:
            _choose_journal(connection, name)
        if _version(connection) < len(migrations):
            _migrate(connection, migrations)
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


def _migrate(connection: sqlite3.Connection, migrations: Migrations) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection)
        if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise _Unusable("it is a database of another program")
        for statements in migrations[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {max(version, len(migrations))}")
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
