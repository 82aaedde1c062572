"""The worked example of CONTRIBUTING: a kernel from outside the package, found by its entry point."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lz_compile.lowering import kernels
from lz_compile.lowering.semantic import attend
from road import compile_road

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as an installed distribution would show it."""
    info = tmp_path / "own_kernel-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-kernel\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lz_compile.providers]\nown = own_kernel:PROVIDER\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("own_kernel", None)


@pytest.mark.usefixtures("own")
def test_an_entry_point_is_enough_for_a_kernel_to_compete_and_to_win_where_the_user_says_so() -> None:
    assert "own.blockwise" in [kernel.name for kernel in kernels.kernels()]

    def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = (torch.randn(2, 3, 300, 16) for _ in range(3))
    run, road = compile_road(causal, prefer=["own.*"], measure="auto", measure_budget=30.0)
    with torch.no_grad():
        torch.testing.assert_close(run(q, k, v), causal(q, k, v), atol=1e-5, rtol=1e-5)
    assert road.kernels == ["own.blockwise"]
    (mine,) = (candidate for candidate in road.regions[0].candidates if candidate.kernel == "own.blockwise")
    assert mine.source == "measured" and mine.error is not None and mine.error <= 1.0

    run, road = compile_road(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, k.mT @ k > 0), prefer=["own.*"])
    q = k = v = torch.randn(1, 2, 16, 16)
    with torch.no_grad():
        run(q, k, v)
    assert road.regions[0].rejected["own.blockwise"] == "takes no mask but causal from key 0"

    import own_kernel  # type: ignore[import-not-found]

    got = own_kernel.blockwise(q, k, v, 0.25, False)
    torch.testing.assert_close(got, attend(q, k, v, scale=0.25), atol=1e-5, rtol=1e-5)
