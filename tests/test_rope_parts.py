"""What is read of a rotation and of a norm, condition by condition, on graphs without a model around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lz_compile.aliasing import Aliases
from lz_compile.patterns.norms import find_rms_norms
from lz_compile.patterns.rope import find_ropes
from lz_compile.region import Region
from perturbation import trace

X = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def ropes(fn: Callable[..., Any], *inputs: torch.Tensor) -> list[Region]:
    graph = trace(lambda *given: fn(*given), *inputs).module.graph
    return find_ropes(graph, Aliases(graph), lambda node: "")


def halves(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([-x[..., 4:], x[..., :4]], -1)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + halves(x) * sin


def test_the_rotation_that_all_others_differ_from_is_read() -> None:
    (region,) = ropes(rotated, X, TABLE, TABLE + 1)
    assert not region.declined


NONE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "a number for the sines": (lambda x, cos: x * cos + halves(x) * 0.5, (X, TABLE)),
    "three parts": (
        lambda x, cos: x * cos + torch.cat([-x[..., 4:], x[..., :2], x[..., 2:4]], -1) * cos,
        (X, TABLE),
    ),
    "a half that is nobody's": (
        lambda x, y, cos: x * cos + torch.cat([-x[..., 4:], y], -1) * cos,
        (X, X[..., :4].clone(), TABLE),
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_only_looks_like_a_rotation_is_none(name: str) -> None:
    fn, inputs = NONE[name]
    assert ropes(fn, *inputs) == []


DECLINED: dict[str, tuple[tuple[torch.Tensor, ...], str]] = {
    "sines in another dtype": ((X, TABLE, TABLE.double()), "differ in shape or dtype"),
    "tables without dimensions": ((X, TABLE[0, 0].clone(), TABLE[0, 1].clone()), "do not broadcast"),
    "one cosine a position": ((X, TABLE[:, :1].clone(), TABLE[:, 1:2].clone()), "do not broadcast"),
    "integers": (((9 * X).int(), (9 * TABLE).int(), (9 * TABLE).int()), "takes torch.int32"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_a_rotation_of_tables_that_do_not_fit_says_why(name: str) -> None:
    inputs, reason = DECLINED[name]
    (region,) = ropes(rotated, *inputs)
    assert reason in region.declined


def test_what_gives_another_dtype_than_a_cast_is_no_end_of_a_rotation() -> None:
    half = X.bfloat16()
    (region,) = ropes(lambda x, cos, sin: rotated(x, cos, sin).softmax(-1, dtype=torch.bfloat16), half, TABLE, TABLE)
    assert "softmax" not in region.output.name and region.declined


def test_a_norm_of_integers_reads_the_floating_value() -> None:
    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.float32)
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    graph = trace(lambda x, weight: norm(x, weight), torch.arange(24).view(3, 8), torch.ones(8)).module.graph
    (region,) = find_rms_norms(graph, Aliases(graph), lambda node: "")
    assert all(node.meta["val"].is_floating_point() for node in region.inputs)
