"""``lz_compile.explain``: which kernel runs where in a model, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lz_compile.report import Report, watch


def explain(fn: Callable[..., Any] | torch.nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Runs ``fn(*args, **kwargs)`` compiled with ``backend="layerzero"`` and reports on the graphs that ran.

    ``fn`` may be compiled already (``torch.compile(..., backend="layerzero")`` or ``module.compile(...)``): then
    nothing is compiled a second time.  An eager function or module is compiled on the first call; Dynamo keeps the code
    with the function and takes equal backends for the same, so that a later call finds it.  The call really runs:
    caches that the arguments hold move on by a step.

    Raises:
        whatever ``fn`` raises.
    """
    run = fn if _is_compiled(fn) else torch.compile(fn, backend="layerzero")
    with watch() as seen:
        run(*args, **kwargs)
    return Report(list(seen))


def _is_compiled(fn: Any) -> bool:
    if isinstance(fn, torch._dynamo.eval_frame.OptimizedModule):
        return True
    if isinstance(fn, torch.nn.Module):
        return getattr(fn, "_compiled_call_impl", None) is not None
    return hasattr(fn, "_torchdynamo_orig_callable")
