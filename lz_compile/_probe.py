"""The child's side of a probe: one third-party library is imported and called once, where it can hurt nobody.

Enters: a request file, run as ``python _probe.py request.json`` by :mod:`lz_compile.discovery`.  Leaves: the file
``result`` names, with ``error`` (empty on success), ``absent`` (distributions that the provider asks for when none of
them is there), ``distributions`` (those it asks for) and ``works`` (the kernels that the probe vouched for by returning
their names, None when it returned nothing: all of them).  A crash or a hang leaves no file.

Run by path and free of imports from this package, so that the child pays for torch only when the library needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import signal
import sys
from typing import Any

# How long after the parent's limit a child ends itself, for a parent that was killed meanwhile.
_ORPHAN_SECONDS = 10


def main(request_path: str) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    sys.path[:] = request["path"]
    sys.argv = sys.argv[:1]
    _no_core_file()
    _end_by_itself(request["timeout"])
    result: dict[str, Any] = {"error": "", "absent": [], "distributions": [], "works": None}
    try:
        _attempt(request, result)
    except BaseException as error:  # a library may raise SystemExit too
        result["error"] = _describe(error)
    unfinished = request["result"] + ".part"
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(unfinished, request["result"])


def _attempt(request: dict[str, Any], result: dict[str, Any]) -> None:
    found = _resolve(request["target"])
    if request["gives"] == "nothing":
        result["works"] = _names(found())
        return
    provider = found if hasattr(found, "kernels") else found()
    if provider.name != request["name"]:
        raise ValueError(f"the entry point is called {request['name']}, its provider {provider.name}")
    result["distributions"] = list(provider.distributions)
    if provider.distributions and not any(_is_installed(name) for name in provider.distributions):
        result["absent"] = list(provider.distributions)
    elif provider.probe:
        result["works"] = _names(_resolve(provider.probe)())


def _names(returned: Any) -> list[str] | None:
    return None if returned is None else [str(name) for name in returned]


def _resolve(reference: str) -> Any:
    module, _, attributes = reference.partition(":")
    if not attributes:
        raise ValueError(f"{reference!r} is not module:function")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _describe(error: BaseException) -> str:
    try:
        text = str(error).strip()
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _no_core_file() -> None:
    """A limit of one byte also stops the collectors that a kernel pipes cores to, which ignore a limit of zero."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))


def _end_by_itself(timeout: float) -> None:
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(timeout) + _ORPHAN_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1])
