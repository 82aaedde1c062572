"""Norms, gated units and rotations compete: qualified, measured, planned with what fusion is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx as fx

from lz_compile.lowering.kernels import registered
from lz_compile.lowering.pointwise import meaning
from lz_compile.region import Kernel, Provider, Region
from road import compile_road
from tiny import DECODERS, tokens

_library = torch.library.Library("pointwise_competition", "FRAGMENT")


def kernel(name: str, kind: str, wrong: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Kernel:
    """A kernel of the semantic function, called as one opaque function; ``wrong`` spoils its result."""

    def emit(emitter: Any, region: Region) -> fx.Node:
        function = meaning(region)

        def run(*values: torch.Tensor) -> torch.Tensor:
            result = function(*values)
            return wrong(result) if wrong is not None else result

        return emitter.call(region.output, run, *region.inputs)

    return Kernel(f"mine.{name}", kind, "1", lambda region: None, emit, cuda_graphs="shapes alone decide")


@pytest.fixture
def mine() -> Iterator[None]:
    def off_by_a_little(result: torch.Tensor) -> torch.Tensor:
        spoiled = result.clone()
        spoiled.view(-1)[::97] *= 1.01
        return spoiled

    kernels = (
        kernel("norm", "rms_norm"),
        kernel("wrong_norm", "rms_norm", off_by_a_little),
        kernel("glu", "glu"),
        kernel("rope", "rope"),
    )
    with registered(Provider("mine", kernels)):
        yield


@pytest.mark.slow_but("llama")
@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("architecture", DECODERS[:4], ids=lambda a: a.name)
def test_each_kind_is_measured_beside_inductor_and_a_wrong_kernel_is_rejected(architecture: Any) -> None:
    model = architecture.build("sdpa")
    run, road = compile_road(model, measure="auto", measure_budget=120.0, prefer=["mine.norm", "mine.glu", "mine.rope"])
    ids = tokens(2, 12, 0)
    with torch.no_grad():
        torch.testing.assert_close(run(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    by_kind: dict[str, list[Any]] = {}
    for region in road.regions:
        by_kind.setdefault(region.kind, []).append(region)
    per_layer = 4 if architecture.name == "qwen3" else 2
    assert len(by_kind["rms_norm"]) == 2 * per_layer + 1
    assert len(by_kind["glu"]) == 2 and len(by_kind["rope"]) == 4
    assert {region.kernel for region in by_kind["rms_norm"]} == {"mine.norm"}
    assert {region.kernel for region in by_kind["glu"]} == {"mine.glu"}
    for region in by_kind["rms_norm"] + by_kind["glu"] + by_kind["rope"]:
        assert {c.kernel for c in region.candidates if c.source != "estimated"} >= {"inductor", region.kernel}


@pytest.mark.usefixtures("mine")
def test_a_wrong_norm_is_rejected_by_its_numbers() -> None:
    model = DECODERS[0].build("sdpa")
    run, road = compile_road(model, measure="auto", measure_budget=120.0)
    with torch.no_grad():
        run(tokens(2, 12, 0), use_cache=False)
    norms = [region for region in road.regions if region.kind == "rms_norm"]
    assert norms and all("wrong result" in region.rejected["mine.wrong_norm"] for region in norms)


def test_without_a_kernel_for_them_they_are_not_looked_for() -> None:
    run, road = compile_road(DECODERS[0].build("sdpa"))
    with torch.no_grad():
        run(tokens(2, 12, 0), use_cache=False)
    assert {region.kind for region in road.regions} == {"attention"}
