"""Cosine and sine tables that all layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx

from lz_compile.lowering import kernels, tables
from lz_compile.normalize import normalize
from lz_compile.patterns.rope_tables import find_rope_tables
from lz_compile.region import Kernel, Region
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


# -- the pattern by itself


def found(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool = False) -> list[Region]:
    """The tables of a function's normalised graph."""
    regions: list[Region] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        regions.extend(find_rope_tables(normalize(module).graph, lambda node: ""))
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return regions


def angles(rows: int = 1024) -> torch.Tensor:
    return torch.arange(rows)[:, None] * torch.rand(64)


def read(table: torch.Tensor, times: int = 4) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(2, 1, 1) * table + i for i in range(times))


def test_casts_scales_and_views_between_a_cosine_and_its_readers_are_part_of_the_table() -> None:
    def tables(x: torch.Tensor) -> Any:
        doubled = torch.cat((x.cos(), x.cos()), -1)
        return read(x.cos().to(torch.bfloat16)[None]) + read(x.sin() * 2.0), doubled

    assert [(r.pattern, r.output.meta["val"].dtype) for r in found(tables, angles())] == [
        ("cos", torch.bfloat16),
        ("sin", torch.float32),
    ]


@pytest.mark.parametrize("readers", [3, 4])
def test_four_readers_make_a_table_worth_storing(readers: int) -> None:
    assert len(found(lambda x: read(x.cos(), readers), angles())) == (readers == 4)


def test_a_small_table_is_not_worth_a_launch() -> None:
    assert len(found(lambda x: read(x.cos()), angles(1024))) == 1
    assert len(found(lambda x: read(x.cos()), angles(1023))) == 0


def test_a_table_through_which_gradients_flow_is_left_alone() -> None:
    assert not found(lambda x: read(x.cos()), angles().requires_grad_())


def test_a_table_of_a_length_that_changes_is_left_alone() -> None:
    assert not found(lambda x: read(x.cos()), angles(), dynamic=True)


def test_a_table_ends_where_something_else_is_made_of_it() -> None:
    """What comes after an exponential, or is copied out to many heads, is no table: it has one reader, not four."""
    assert not found(lambda x: read(x.cos().exp()), angles())

    def repeated(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = torch.ones(8, 1, 1) * x.cos()
        return tuple(heads + i for i in range(4))

    assert not found(repeated, angles())
