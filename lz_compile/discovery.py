"""Which third-party libraries work on this machine, found out where they can do no harm.

Enters: a provider, or the entry point of one.  Leaves: a :class:`Finding`.  An installed library is imported and called
once in a child process with a time limit (``lz_compile/_probe.py``); whether it is there at all is read from package
metadata.  Findings are remembered in ``cache_directory()/probes``, one JSON file for each combination of provider,
package versions, the probe's own file, torch, driver, device and Python, and in memory on top.

``LZ_COMPILE_PROVIDERS`` restricts which providers are considered: a comma-separated list of globs, ``-`` in front
excludes (``flash*,xformers`` or ``-flashinfer``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch

from lz_compile import config
from lz_compile.machine import Machine, cache_directory
from lz_compile.region import Provider

log = logging.getLogger("lz_compile")

State = Literal["works", "not installed", "failed", "crashed", "timed out", "built in"]

# Seconds that a library gets to be imported and called once; it may have to compile something.
TIMEOUT = 60.0

_FORMAT = 2
_AT_ONCE = 4
_STDERR_BYTES = 1 << 24
_SCRIPT = Path(__file__).with_name("_probe.py")
# Set in the child: a library that compiles a model while it is probed must not start probes of its own.
_INSIDE = "LZ_COMPILE_INSIDE_PROBE"
_AGAIN = "`lz-compile doctor --again` tries again"
# What says more about the moment than about the library; believed in this process, not written down.
_BY_CIRCUMSTANCE = re.compile(
    r"out of memory|MemoryError|busy or unavailable|No space left|temporarily unavailable|cannot start a child"
    r"|^SIG(KILL|TERM|INT|HUP)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Spec:
    """What a child has to do.

    ``target`` is ``"module:attribute"``: a function to be called when ``gives`` is ``"nothing"``, else a
    :class:`~lz_compile.region.Provider`, or a function that returns one, whose own probe is run after it was loaded.
    """

    name: str
    target: str
    gives: Literal["nothing", "provider"] = "nothing"
    distributions: tuple[str, ...] = ()

    @classmethod
    def of(cls, what: Provider | importlib.metadata.EntryPoint | Spec) -> Spec:
        if isinstance(what, Spec):
            return what
        if isinstance(what, Provider):
            return cls(what.name, what.probe, "nothing", what.distributions)
        dist = getattr(what, "dist", None)
        value = what.value.partition("[")[0].strip()
        return cls(what.name, value, "provider", (dist.metadata["Name"],) if dist is not None else ())


@dataclass(frozen=True)
class Finding:
    """Whether a provider can be used, and why not.

    ``detail`` is one line: the exception's text, the signal's name, what to install.  ``versions`` are those of the
    provider's distributions that are installed.  ``kernels`` are the names, without the provider's, that the probe
    vouched for, None when it spoke for all.  ``seconds`` is what the probe took when it ran.  ``remembered`` tells
    that an earlier process ran it.
    """

    provider: str
    state: State
    detail: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    kernels: tuple[str, ...] | None = None
    seconds: float = 0.0
    remembered: bool = False

    @property
    def usable(self) -> bool:
        return self.state in ("works", "built in")


@dataclass(frozen=True)
class _Outcome:
    state: State
    detail: str = ""
    distributions: tuple[str, ...] = ()
    kernels: tuple[str, ...] | None = None


_memory: dict[Spec, Finding] = {}
_locks: dict[Spec, threading.Lock] = {}
_running: set[subprocess.Popen[bytes]] = set()


def considered(name: str) -> bool:
    """Whether ``LZ_COMPILE_PROVIDERS`` lets a provider take part."""
    wanted, unwanted = selection()
    if any(fnmatchcase(name, glob) for glob in unwanted):
        return False
    return not wanted or any(fnmatchcase(name, glob) for glob in wanted)


def selection() -> tuple[list[str], list[str]]:
    """The globs of ``LZ_COMPILE_PROVIDERS``: those to be considered (empty: all), and those not to be."""
    items = [item.strip() for item in os.environ.get("LZ_COMPILE_PROVIDERS", "").split(",")]
    return [i for i in items if i and i[0] != "-"], [i[1:] for i in items if i.startswith("-")]


def finding(what: Provider | importlib.metadata.EntryPoint | Spec) -> Finding:
    """What is remembered about a provider, else what a probe finds; the first time this may take ``TIMEOUT`` seconds.

    Two threads, or two processes that share a cache directory, that ask at once start one child.
    """
    spec = Spec.of(what)
    known = _memory.get(spec)
    if known is None:
        with _locks.setdefault(spec, threading.Lock()):
            known = _memory.get(spec)
            if known is None:
                known = _memory[spec] = _find(spec)
    return known


def findings(whats: Sequence[Provider | importlib.metadata.EntryPoint | Spec]) -> list[Finding]:
    """:func:`finding` of each, several children at a time."""
    specs = [Spec.of(what) for what in whats]
    unknown = [spec for spec in specs if spec not in _memory]
    if len(unknown) > 1:
        pool = ThreadPoolExecutor(min(_AT_ONCE, len(unknown)), initializer=_use_device())
        try:
            list(pool.map(finding, unknown))
        except BaseException:
            _interrupt()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [finding(spec) for spec in specs]


def survey(again: bool = False) -> list[Finding]:
    """The findings on every provider that is considered; ``again`` forgets first."""
    from lz_compile.lowering import kernels

    if again:
        forget()
    return [status.finding for status in kernels.status()]


def forget() -> None:
    """Drops every remembered finding, of this process and of the cache directory."""
    _memory.clear()
    with contextlib.suppress(OSError):
        for path in (cache_directory() / "probes").glob("*.json"):
            path.unlink(missing_ok=True)


def probe(what: Provider | importlib.metadata.EntryPoint | Spec, timeout: float = TIMEOUT) -> Finding:
    """Tries a provider now, in a child process that is killed with all it started after ``timeout`` seconds.

    A provider's probe is a function without arguments.  It raises when the library cannot be used; it may return the
    names of the kernels that work (a collection, or a mapping from them) where others of the provider do not.
    """
    spec = Spec.of(what)
    versions = installed(spec.distributions)
    settled = _without_child(spec, versions)
    return settled or _probe(spec, versions, timeout)[0]


def installed(distributions: Sequence[str]) -> dict[str, str]:
    """The versions of those distributions that are installed, by package metadata; nothing is imported."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = str(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        except Exception:  # half an installation
            versions[name] = "unknown"
    return versions


def _find(spec: Spec) -> Finding:
    try:
        return _recall_or_probe(spec)
    except Exception as error:
        if config.strict:
            raise
        log.warning("lz-compile does not use %s: its probe could not be run: %s", spec.name, error)
        return Finding(spec.name, "failed", _one_line(f"{type(error).__name__}: {error}"))


def _recall_or_probe(spec: Spec) -> Finding:
    versions = installed(spec.distributions)
    settled = _without_child(spec, versions)
    if settled:
        return settled
    key = _key(spec, versions)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_directory() / "probes" / f"{digest}.json"
    recalled = _recall(path, key)
    if recalled:
        return recalled
    with _alone(path.with_suffix(".lock")):
        recalled = _recall(path, key)
        if recalled:
            return recalled
        log.info("lz-compile tries %s in a child process, for the first time on this machine", spec.name)
        found, distributions = _probe(spec, versions, TIMEOUT)
        if found.state in ("failed", "crashed", "timed out"):
            log.warning("lz-compile does not use %s: %s: %s", spec.name, found.state, found.detail)
        if found.usable or not _BY_CIRCUMSTANCE.search(found.detail):
            _store(path, key, found, distributions)
    return found


def _without_child(spec: Spec, versions: dict[str, str]) -> Finding | None:
    """The finding where nothing has to be tried, or nothing can be."""
    if spec.distributions and not versions:
        return Finding(spec.name, "not installed", f"pip install {' or '.join(spec.distributions)}")
    if not spec.target:
        return Finding(spec.name, "works" if versions else "built in", "" if not versions else "has no probe", versions)
    if os.environ.get(_INSIDE):
        return Finding(spec.name, "failed", "not tried inside another provider's probe", versions)
    if spec.target.startswith("__main__:"):
        return Finding(spec.name, "failed", "a probe in __main__ cannot be imported by a child: use a module", versions)
    return None


def _probe(spec: Spec, versions: dict[str, str], timeout: float) -> tuple[Finding, tuple[str, ...]]:
    """The finding, and all distributions it depends on: a provider behind an entry point names its own."""
    started = time.perf_counter()
    outcome = _run(spec, timeout)
    distributions = (*spec.distributions, *outcome.distributions)
    return (
        Finding(
            spec.name,
            outcome.state,
            _one_line(outcome.detail),
            {**versions, **installed(outcome.distributions)},
            outcome.kernels,
            round(time.perf_counter() - started, 3),
        ),
        distributions,
    )


# The child.


def _run(spec: Spec, timeout: float) -> _Outcome:
    reason = _no_interpreter()
    if reason:
        return _Outcome("failed", f"cannot start a child: {reason}")
    try:
        with tempfile.TemporaryDirectory(prefix="lz-compile-probe-", ignore_cleanup_errors=True) as name:
            return _run_in(Path(name), spec, timeout)
    except OSError as error:
        return _Outcome("failed", f"cannot start a child: {error}")


def _run_in(folder: Path, spec: Spec, timeout: float) -> _Outcome:
    request, result = folder / "request.json", folder / "result.json"
    request.write_text(
        json.dumps(
            {
                "name": spec.name,
                "target": spec.target,
                "gives": spec.gives,
                "timeout": timeout,
                "path": [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)],
                "result": str(result),
            }
        ),
        encoding="utf-8",
    )
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    # Appending, so that truncating the file is enough to bound it.
    with open(folder / "stderr", "ab+") as words:
        process = subprocess.Popen(
            [sys.executable, *safe, str(_SCRIPT), str(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            cwd=folder,
            env=_environment(),
            start_new_session=True,
        )
        _running.add(process)
        try:
            code = _wait(process, words, timeout)
        finally:
            _end(process)
        if process not in _running:
            raise KeyboardInterrupt
        _running.discard(process)
        return _outcome(code, _read(result), _last_line(words), timeout)


def _wait(process: subprocess.Popen[bytes], words: IO[bytes], timeout: float) -> int | None:
    """The exit code, None when time is up."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return process.wait(min(0.2, max(0.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                return None
        if os.fstat(words.fileno()).st_size > _STDERR_BYTES:
            words.truncate(0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the child and what it started; one that the kernel cannot end (a hung driver) is left behind."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _interrupt() -> None:
    """Ends all children; their threads give up without a finding."""
    processes = list(_running)
    _running.clear()
    for process in processes:
        _end(process)


def _outcome(code: int | None, result: dict[str, Any] | None, words: str, timeout: float) -> _Outcome:
    distributions = tuple(str(name) for name in result["distributions"]) if result else ()
    passed = " at exit, after its call had succeeded" if result and not result["error"] else ""
    said = f": {words}" if words else ""
    if code is None:
        return _Outcome("timed out", f"no answer within {timeout:g} s{passed}{said}", distributions)
    if code < 0:
        return _Outcome("crashed", f"{_signal_name(-code)}{passed}{said}", distributions)
    if result and result["error"]:
        return _Outcome("failed", str(result["error"]), distributions)
    if code or not result:
        return _Outcome("failed", f"exit code {code}{passed or ' without a result'}{said}", distributions)
    if result["absent"]:
        return _Outcome("not installed", f"pip install {' or '.join(map(str, result['absent']))}", distributions)
    works = result["works"]
    return _Outcome("works", "", distributions, None if works is None else tuple(map(str, works)))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if {"error", "absent", "distributions", "works"} <= result.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _last_line(words: IO[bytes]) -> str:
    words.seek(0, os.SEEK_END)
    words.seek(max(0, words.tell() - 4096))
    lines = [line.strip() for line in words.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _one_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    printable = "".join(c for c in line if c.isprintable())
    return printable if len(printable) <= 300 else printable[:297] + "..."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _no_interpreter() -> str:
    """Why ``sys.executable`` cannot run a script, empty when it can: a frozen or embedding program is no Python."""
    if getattr(sys, "frozen", False):
        return "this is a frozen application"
    if not sys.executable:
        return "sys.executable is empty"
    if not Path(sys.executable).name.lstrip(".").lower().startswith(("python", "pypy")):
        return f"{sys.executable} is not a Python interpreter"
    if not _SCRIPT.is_file():
        return f"{_SCRIPT.name} is not a file (a zipped installation)"
    return ""


def _environment() -> dict[str, str]:
    """The user's, with this thread's GPU as the child's only one: the ranks of a job do not all load GPU 0.

    The child stands in another folder, so relative entries of ``PYTHONPATH`` (for Pythons that it starts) are resolved.
    """
    environment = {**os.environ, _INSIDE: "1"}
    if os.environ.get("PYTHONPATH"):
        entries = os.environ["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in entries)
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    if index:
        visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        if not visible:
            environment["CUDA_VISIBLE_DEVICES"] = str(index)
        elif index < len(visible):
            environment["CUDA_VISIBLE_DEVICES"] = visible[index]
    return environment


def _use_device() -> Callable[[], None] | None:
    """What a thread runs to have this thread's current GPU."""
    if not torch.cuda.is_initialized():
        return None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


# What is remembered.


def _key(spec: Spec, versions: dict[str, str]) -> dict[str, Any]:
    device, driver = _device()
    return {
        "format": _FORMAT,
        "provider": spec.name,
        "target": spec.target,
        "gives": spec.gives,
        "versions": versions,
        "source": _source_stamp(spec.target.partition(":")[0]),
        "lz_compile": installed(["lz-compile"]),
        "torch": torch.__version__,
        "device": device,
        "driver": driver,
        "python": platform.python_version(),
        "prefix": sys.prefix,
    }


def _device() -> tuple[str, str]:
    """Product name and driver of the current GPU; the instruction set without one (threads do not matter here)."""
    try:
        if torch.cuda.is_available():
            gpu = Machine.of(torch.device("cuda"))
            return f"{gpu.device} {gpu.capability}", gpu.driver
    except Exception as error:  # a forked process, for one, cannot ask
        log.debug("the GPU does not say what it is: %s", error)
    return Machine.of(torch.device("cpu")).capability, ""


def _source_stamp(module: str) -> list[int]:
    """Size and time of the module's file, so that an edited probe runs again; empty when only an import would tell."""
    parts = module.split(".")
    try:
        known = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in sys.modules), 0)
        if known:
            folders = list(sys.modules[".".join(parts[:known])].__path__)
        else:
            known = 1
            spec = importlib.util.find_spec(parts[0])
            if spec is None:
                return []
            if len(parts) == 1 and spec.origin:
                return _stamp(Path(spec.origin))
            folders = list(spec.submodule_search_locations or ())
        for folder in folders:
            base = Path(folder, *parts[known:])
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path.is_file():
                    return _stamp(path)
    except Exception as error:
        log.debug("no source of %s: %s", module, error)
    return []


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _recall(path: Path, key: dict[str, Any]) -> Finding | None:
    """The stored finding; None when there is none, it is damaged, or a distribution it depends on has changed."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        names = record["finding"]["kernels"]
        kernels = None if names is None else tuple(str(name) for name in names)
        found = Finding(**{**record["finding"], "kernels": kernels, "remembered": True})
        sound = (
            record["key"] == key
            and found.provider == key["provider"]
            and found.state in get_args(State)
            and isinstance(found.detail, str)
            and isinstance(found.seconds, (int, float))
            and found.versions == installed(record["distributions"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not sound:
        return None
    if found.usable or found.state == "not installed":
        return found
    return dataclasses.replace(found, detail=f"{found.detail} ({_AGAIN})")


def _store(path: Path, key: dict[str, Any], found: Finding, distributions: Sequence[str]) -> None:
    record = {"key": key, "finding": dataclasses.asdict(found), "distributions": list(distributions)}
    unfinished = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        log.debug("the finding on %s is kept for this process only: %s", found.provider, error)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock between processes, for no longer than a probe may take; does without where locks do not work."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a"))
            deadline = time.monotonic() + TIMEOUT + 10
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
        yield
