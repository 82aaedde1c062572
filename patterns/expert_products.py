"""Products of rows with the weight of each row's expert, sorted by expert or with gathered weights.

Enters: nodes of a normalised graph.  Leaves: :class:`Product` records; that each row meets its expert is not proved
here.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.fx as fx

from lz_compile.moe import Layout
from lz_compile.patterns.routing import KEEPS_ORDER, taken
from lz_compile.patterns.walk import CASTS, arguments, aten, fake, same, target, tensor

_GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}
_BATCHED = {aten.bmm.default, aten.matmul.default}
_TRANSPOSES = {aten.transpose.int, aten.permute.default, aten.mT.default}
VIEWS = KEEPS_ORDER | CASTS | _TRANSPOSES | {aten.expand.default}
# Steps that may lie between the two products, by which the second is known to come from the first.
_PARTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor}
_BETWEEN = VIEWS | _PARTS | {operator.getitem}


@dataclass(frozen=True)
class Product:
    """A product of rows with the weight of each row's expert.

    ``weight`` is ``[E, ...]``; ``by`` is the vector of experts that gathered it, or the ends of the experts' shares.
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    layout: Layout
    by: fx.Node
    implementation: Literal["grouped_mm", "batched_mm"]


def product_of(node: fx.Node) -> Product | None:
    """The product per expert that a node is, None for anything else."""
    if str(node.target) in _GROUPED:
        known = arguments(node)
        rows, weight, by = (
            known.get(a, known.get(b)) for a, b in (("self", "input"), ("mat2", "weight"), ("offs", "offs"))
        )
        if known.get("bias") is not None or known.get("out_dtype") is not None:
            return None
        if tensor(weight).dim() != 3 or tensor(rows).dim() != 2:
            return None
        source, turned = _turned(weight)  # type: ignore[arg-type]
        return Product(node, rows, source, "out, in" if turned else "in, out", by, "grouped_mm")  # type: ignore[arg-type]
    if node.target not in _BATCHED:
        return None
    for rows, other, left in ((node.args[0], node.args[1], True), (node.args[1], node.args[0], False)):
        gathered, turned = _turned(other)  # type: ignore[arg-type]
        found, value = taken(gathered), tensor(rows)
        if found is None or value.dim() != 3 or not same(value.shape[1 if left else 2], 1):
            continue
        source, again = _turned(found[0])
        if tensor(source).dim() != 3:
            continue
        layout: Layout = "in, out" if left != (turned != again) else "out, in"
        return Product(node, rows, source, layout, found[1], "batched_mm")  # type: ignore[arg-type]
    return None


def _turned(node: fx.Node) -> tuple[fx.Node, bool]:
    """What is behind swaps of the last two of three dimensions, and whether these swap them."""
    turned = False
    while target(node) in _TRANSPOSES and fake(node) is not None and tensor(node).dim() == 3:
        if target(node) is aten.transpose.int and {int(dim) % 3 for dim in node.args[1:3]} != {1, 2}:  # type: ignore[arg-type]
            break
        if target(node) is aten.permute.default and [int(dim) % 3 for dim in node.args[1]] != [0, 2, 1]:  # type: ignore[union-attr, arg-type]
            break
        node, turned = node.args[0], not turned  # type: ignore[assignment]
    return node, turned


def first_of(last: Product, products: dict[fx.Node, Product]) -> Product | None:
    """The product of as many rows that a product's rows are made of, elementwise."""
    waiting = [last.rows]
    seen: set[fx.Node] = set()
    while waiting and len(seen) < 40:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in products:
            if same(tensor(node).shape[0], tensor(last.node).shape[0]):
                return products[node]
        elif target(node) in _BETWEEN or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            waiting += node.all_input_nodes
    return None
