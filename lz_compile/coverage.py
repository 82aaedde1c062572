"""``lz-compile coverage``: what is recognised in tiny models of every architecture that transformers knows.

Enters: model types (or none: all) and limits.  Leaves: one JSON line for each in a file, which a later run reads back
instead of doing it again, and the rows as :class:`~lz_compile.coverage_child.Row`.

Each architecture runs in a process of its own, forked from a server that imported torch and transformers once.  It may
take so much memory and so much time, and nothing that happens to it is more than a row.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lz_compile.coverage_child import CallRow, Miss, Row, examine
from lz_compile.tiny_models import Architecture, architectures

# What runs in the child; :func:`examine` but in tests of what happens to a child that misbehaves.
Examine = Callable[[Architecture, str, bool], Row]


@dataclass(frozen=True)
class Plan:
    """How every architecture is examined: see :func:`lz_compile.coverage_child.examine`."""

    attention: str = "sdpa"
    with_inductor: bool = True
    examine: Examine = examine

    def made(self, row: Row) -> bool:
        """Whether a row was made this way, by these versions."""
        return (row.asked, row.with_inductor, row.versions) == (self.attention, self.with_inductor, versions())

    def sign(self, row: Row) -> Row:
        row.asked, row.with_inductor, row.versions = self.attention, self.with_inductor, versions()
        return row


def versions() -> str:
    """``lz-compile 0.1.0, torch 2.13.0, transformers 5.24.0``."""
    import torch
    import transformers

    import lz_compile

    torch_version = torch.__version__.partition("+")[0]
    return f"lz-compile {lz_compile.__version__}, torch {torch_version}, transformers {transformers.__version__}"


@dataclass(frozen=True)
class Limits:
    """``seconds`` of wall time and ``gigabytes`` of private memory for each architecture, ``jobs`` at a time."""

    seconds: float = 300.0
    gigabytes: float = 4.0
    jobs: int = 1


@dataclass
class _Running:
    architecture: Architecture
    process: Any
    answer: Connection
    started: float


def cover(
    wanted: Sequence[Architecture],
    plan: Plan,
    limits: Limits,
    file: Path,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """A row for each architecture, in order; those of the same plan that ``file`` holds are taken from there.

    ``on_row`` is told of each new row.

    Raises:
        OSError: the file cannot be read or written.
    """
    done = {row.model: row for row in read_rows(file) if plan.made(row)}
    queue = [a for a in wanted if a.model not in done]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["transformers", "torch._dynamo", "torch._inductor.compile_fx", __name__])
    running: list[_Running] = []
    try:
        with file.open("a", encoding="utf-8") as out:
            while queue or running:
                while queue and len(running) < limits.jobs:
                    running.append(_start(server, queue.pop(0), plan, limits))
                wait([child.answer for child in running], timeout=1.0)
                for child in list(running):
                    row = _settled(child, limits)
                    if row is not None:
                        running.remove(child)
                        done[row.model] = plan.sign(row)
                        out.write(json.dumps(asdict(row)) + "\n")
                        out.flush()
                        on_row(row)
    finally:
        for child in running:
            _end(child)
    return [done[a.model] for a in wanted if a.model in done]


def select(names: Iterable[str]) -> list[Architecture]:
    """The architectures of these model types (globs), all without any.

    Raises:
        KeyError: a name that fits none.
    """
    known = architectures()
    globs = list(names)
    for glob in globs:
        if not any(fnmatchcase(a.name, glob) for a in known):
            raise KeyError(glob)
    return [a for a in known if not globs or any(fnmatchcase(a.name, glob) for glob in globs)]


def read_rows(file: Path) -> list[Row]:
    """The rows that an earlier run left; a line that was cut off is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(row_of(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return rows


def row_of(facts: dict[str, Any]) -> Row:
    """A :class:`Row` from what :func:`dataclasses.asdict` made of it."""
    calls = [CallRow(**{**call, "misses": [Miss(**miss) for miss in call["misses"]]}) for call in facts["calls"]]
    return Row(**{**facts, "calls": calls})


# -- children ----------------------------------------------------------------------------------------------------------


def _start(server: Any, architecture: Architecture, plan: Plan, limits: Limits) -> _Running:
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=_child, args=(theirs, architecture, plan, limits.gigabytes))
    process.start()
    theirs.close()
    return _Running(architecture, process, ours, time.monotonic())


def _child(answer: Connection, architecture: Architecture, plan: Plan, gigabytes: float) -> None:
    import logging
    import resource
    import warnings

    import torch
    import torch._inductor.config as inductor_config

    os.setpgid(0, 0)  # compilers that it starts end with it
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
    torch.set_num_threads(1)
    inductor_config.compile_threads = 1
    try:
        row = plan.examine(architecture, plan.attention, plan.with_inductor)
    except MemoryError:
        row = Row(architecture.name, architecture.model, problem=f"took more than {gigabytes:g} GB")
    except BaseException as error:
        text = " ".join(str(error).split())[:200]
        row = Row(architecture.name, architecture.model, problem=f"failed: {type(error).__name__}: {text}")
    answer.send(asdict(row))


def _settled(child: _Running, limits: Limits) -> Row | None:
    """The row of a child that answered, died or is over time; None while it works."""
    taken = time.monotonic() - child.started
    row = Row(child.architecture.name, child.architecture.model, seconds=taken)
    try:
        if child.answer.poll():
            row = row_of(child.answer.recv())
            child.process.join(10)
        elif taken > limits.seconds:
            row.problem = f"took more than {limits.seconds:g} s"
        else:
            return None
    except EOFError:
        child.process.join(5)
        code = child.process.exitcode
        row.problem = f"died: {signal.Signals(-code).name if code and code < 0 else f'exit code {code}'}"
    _end(child)
    return row


def _end(child: _Running) -> None:
    """Ends a child with everything that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is no group yet, or gone
        os.killpg(child.process.pid, signal.SIGKILL)
    if child.process.is_alive():
        child.process.kill()
    child.process.join()
    child.answer.close()
