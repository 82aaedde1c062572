"""Products spelled as ``einsum``: their letters, and which become a matrix product of permuted views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from lz_compile.compat import fake_mode_of
from lz_compile.gradients import META
from lz_compile.patterns.einsum import equation_of, is_matrix_of_scores, is_plain, spell_scores, spell_weights

SIZES = dict(zip("bhmndk", (2, 3, 4, 5, 6, 7)))


def product(equation: str, *shapes: tuple[int, ...]) -> tuple[fx.Node, fx.GraphModule, list[torch.Tensor]]:
    """The node of an ``einsum`` whose letters say the sizes, unless ``shapes`` do."""
    letters = equation.replace(" ", "").partition("->")[0].split(",")
    values = [torch.randn(shape) for shape in shapes or [tuple(SIZES[x] for x in word) for word in letters]]
    module = make_fx(lambda *x: torch.einsum(equation, *x), pre_dispatch=True, tracing_mode="fake")(*values)
    return module.graph.output_node().args[0], module, values  # type: ignore[return-value]


def test_letters_are_sorted_by_where_they_stand() -> None:
    found = equation_of(product("bhmd, bhnd -> bhmn")[0])
    assert found is not None
    assert (found.batch, found.summed, found.rows, found.columns) == ("bh", "d", "m", "n")


NO_EQUATIONS: dict[str, tuple[Any, ...]] = {
    "one operand": ("mn->nm",),
    "three operands": ("mn,nd,dk->mk",),
    "an ellipsis": ("...md,...nd->...mn", (2, 3, 4, 6), (2, 3, 5, 6)),
    "a diagonal": ("mm,mn->mn",),
    "a diagonal of the second": ("mn,mm->mn",),
    "a letter that is summed on one side": ("bhmd,bhnd->bhm",),
    "a letter that is summed on the other": ("bhmd,bhnd->bhn",),
    "no result": ("md,nd",),
}


@pytest.mark.parametrize("name", list(NO_EQUATIONS))
def test_other_products_have_no_equation(name: str) -> None:
    assert equation_of(product(*NO_EQUATIONS[name])[0]) is None


@pytest.mark.parametrize(
    ("equation", "plain"),
    [("bhmd,bhnd->bhmn", True), ("bmhd,bnhd->bhmn", False), ("bhmd,hbnd->bhmn", False), ("bhmd,bhnd->bhm", False)],
)
def test_batch_and_heads_in_front_are_plain(equation: str, plain: bool) -> None:
    assert is_plain(product(equation)[0]) == plain


@pytest.mark.parametrize(
    ("equation", "scores"),
    [("bhmd,bhnd->bhmn", True), ("bmhd,bnhd->bhnm", True), ("bhmd,bhnd->mnbh", False), ("mh,nh,hd->dmn", False)],
)
def test_scores_end_with_queries_and_keys_of_two_operands(equation: str, scores: bool) -> None:
    assert is_matrix_of_scores(product(equation)[0]) == scores


def test_what_is_no_einsum_is_plain() -> None:
    module = make_fx(torch.matmul, pre_dispatch=True, tracing_mode="fake")(torch.randn(3, 4), torch.randn(4, 5))
    assert is_plain(module.graph.output_node().args[0])  # type: ignore[arg-type]


SCORES = ["bhmd,bhnd->bhmn", "mbhd,nbhd->bhmn", "bmhd,bnhd->bhnm", "bmhd,bnhd->hbmn", "bhdm,bnhd->bhmn"]
WEIGHTS = ["bhmn,bhnd->bhmd", "bhmn,bnhd->bmhd", "hbmn,bhnd->bhmd", "bhmn,nbhd->mbhd", "bhmn,bhdn->dmbh"]


@pytest.mark.parametrize("equation", SCORES + WEIGHTS)
def test_a_product_of_two_batch_dimensions_is_a_matrix_product(equation: str) -> None:
    spell: Callable[..., bool] = spell_scores if equation in SCORES else spell_weights
    node, module, values = product(equation)
    expected = torch.einsum(equation, *values)
    assert spell(node, fake_mode_of([node.meta["val"]]))
    module.recompile()
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)
    torch.testing.assert_close(module(*values), expected)
    assert module.graph.output_node().args[0].meta["val"].shape == expected.shape  # type: ignore[union-attr]


LEFT: dict[str, tuple[Callable[..., bool], str, tuple[tuple[int, ...], ...]]] = {
    "no equation": (spell_scores, "bhmd,bhnd->bhm", ()),
    "weights without an equation": (spell_weights, "bhmn,bhnd->bhm", ()),
    "one batch dimension": (spell_scores, "bmd,bnd->bmn", ()),
    "weights of one batch dimension": (spell_weights, "bmn,bnd->bmd", ()),
    "three batch dimensions": (spell_scores, "bhkmd,bhknd->bhkmn", ()),
    "two summed dimensions": (spell_scores, "bhmdk,bhndk->bhmn", ()),
    "two free dimensions of a side": (spell_scores, "bhmkd,bhnd->bhmkn", ()),
    "two free dimensions of the other": (spell_scores, "bhmd,bhnkd->bhmnk", ()),
    "rows between batch and heads": (spell_scores, "bhmd,bhnd->bmhn", ()),
    "rows in front": (spell_scores, "bhmd,bhnd->mbhn", ()),
    "weights whose keys come first": (spell_weights, "bhnm,bhnd->bhmd", ()),
    "weights whose heads come last": (spell_weights, "bmnh,bhnd->bhmd", ()),
    "a broadcast batch": (spell_scores, "bhmd,bhnd->bhmn", ((2, 3, 4, 6), (1, 3, 5, 6))),
    "a broadcast sum": (spell_weights, "bhmn,bhnd->bhmd", ((2, 3, 4, 1), (2, 3, 5, 6))),
}


@pytest.mark.parametrize("name", list(LEFT))
def test_other_products_are_left(name: str) -> None:
    spell, equation, shapes = LEFT[name]
    node, module, _ = product(equation, *shapes)
    before = str(module.graph)
    assert not spell(node, fake_mode_of([node.meta["val"]])) and str(module.graph) == before


@pytest.mark.parametrize(("spell", "equation"), [(spell_scores, SCORES[1]), (spell_weights, WEIGHTS[1])])
def test_a_product_that_gradients_flow_through_is_left(spell: Callable[..., bool], equation: str) -> None:
    node, _, _ = product(equation)
    node.meta[META] = True
    assert not spell(node, fake_mode_of([node.meta["val"]]))
