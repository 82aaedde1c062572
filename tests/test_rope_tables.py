"""Cosine and sine tables that all layers share."""

from __future__ import annotations

import pytest
import torch

from lz_compile.lowering import kernels, tables
from lz_compile.region import Kernel
from road import compile_road
from tiny import DECODERS, tokens

LLAMA = DECODERS[0]


@pytest.fixture
def stored_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the kernel's condition (CUDA) away."""
    always = Kernel(**{**vars(tables.STORED), "supports": lambda region: None})
    monkeypatch.setattr(kernels, "KERNELS", [always if k is tables.STORED else k for k in kernels.KERNELS])


@pytest.mark.usefixtures("stored_everywhere")
def test_a_long_prefill_has_one_cosine_and_one_sine_table_however_many_layers() -> None:
    model = LLAMA.build("sdpa")
    compiled, road = compile_road(model)
    ids = tokens(1, 4096, 0)
    with torch.no_grad():
        got, expected = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    found = [region.pattern for region in road.regions if region.kind == "rope_table"]
    assert found == ["cos", "sin"]
    stored = [n for m in road.modules for n in m.graph.nodes if n.target is torch.ops.lz_compile.stored.default]
    assert len(stored) == 2
    assert all(len(node.args[0].users) == 1 for node in stored)


@pytest.mark.usefixtures("stored_everywhere")
def test_a_decode_step_has_no_table_worth_storing() -> None:
    model = LLAMA.build("sdpa")
    compiled, road = compile_road(model)
    with torch.no_grad():
        compiled(tokens(1, 1, 0), use_cache=False)
    assert not [region for region in road.regions if region.kind == "rope_table"]


@pytest.mark.usefixtures("stored_everywhere")
def test_a_table_with_one_reader_is_left_alone() -> None:
    def one_reader(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).sum() + x.cos() * x

    compiled, road = compile_road(one_reader)
    compiled(torch.randn(1, 1, 4, 16), torch.randn(512, 512))
    assert not [region for region in road.regions if region.kind == "rope_table"]


def test_on_the_cpu_a_table_is_left_to_inductor_without_a_word() -> None:
    compiled, road = compile_road(LLAMA.build("sdpa"))
    with torch.no_grad():
        compiled(tokens(1, 4096, 0), use_cache=False)
    assert {region.kind for region in road.regions} == {"attention"}
