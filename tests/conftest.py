"""Test settings: one thread a process; Triton's interpreter stands in for a missing GPU."""

import os
import tempfile
from typing import Any

# Tiny models: a second thread costs more than it helps, and pytest runs one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Which kernel a test gets must not depend on this machine's clock, or on what its user measured before.
os.environ.setdefault("LZ_COMPILE_MEASURE", "off")
os.environ.setdefault("LZ_COMPILE_CACHE_DIR", tempfile.mkdtemp(prefix="lz-compile-tests-"))

from hypothesis import settings  # noqa: E402

# CI draws the same examples every time, so that a red run is about the change; developers' runs keep searching.
settings.register_profile("search", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "search")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``slow_but("a", "b")`` marks all cases of a test slow except ``test[a]`` and ``test[b]``."""
    for item in items:
        marker = item.get_closest_marker("slow_but")
        if marker is not None and item.callspec.id not in marker.args:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def interpreter_reads_loop_bounds() -> None:
    """NumPy 2.4 no longer turns the one-element arrays of triton 3.6's interpreter into an index."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    if getattr(patch_tensor, "reads_items", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.reads_items = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
