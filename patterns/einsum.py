"""Batched products that are spelled as ``einsum`` over any order of dimensions, such as ``ibnd,jbnd->bnij``.

Enters: the two products of an attention site.  Leaves: the same products as ``matmul`` of permuted views, which is what
``einsum`` computes: a batch of matrix products over the letters that both operands and the result have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from lz_compile.gradients import needs_gradient
from lz_compile.insert import insert_call
from lz_compile.patterns.walk import aten, same, target, tensor


@dataclass(frozen=True)
class Equation:
    """``left,right->result`` with one letter a dimension and none twice: ``batch`` letters in all three (in the
    result's order), ``summed`` ones in both operands only, ``rows`` and ``columns`` in the result and ``left`` or
    ``right`` only."""

    left: str
    right: str
    result: str
    batch: str
    summed: str
    rows: str
    columns: str


def equation_of(node: fx.Node) -> Equation | None:
    """The equation of a product of two tensors; None when it has an ellipsis, a diagonal, or not two operands."""
    if target(node) is not aten.einsum.default or len(node.args[1]) != 2:  # type: ignore[arg-type]
        return None
    inputs, _, result = str(node.args[0]).replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if any(len(set(letters)) != len(letters) for letters in (left, right, result)):  # the dots of an ellipsis, too
        return None
    both = set(left) & set(right)
    if set(result) != (set(left) | set(right)) - (both - set(result)):
        return None
    return Equation(
        left,
        right,
        result,
        batch="".join(letter for letter in result if letter in both),
        summed="".join(letter for letter in left if letter in both and letter not in result),
        rows="".join(letter for letter in left if letter not in both),
        columns="".join(letter for letter in right if letter not in both),
    )


def is_matrix_of_scores(node: fx.Node) -> bool:
    """False when the last two dimensions of an ``einsum`` are not the free ones of its operands: no queries by keys."""
    found = equation_of(node)
    if target(node) is aten.einsum.default and len(node.args[1]) != 2:  # type: ignore[arg-type]
        return False
    return found is None or {*found.result[-2:]} == {*found.rows, *found.columns}


def is_plain(node: fx.Node) -> bool:
    """Whether a product needs no other spelling: no ``einsum``, or one that keeps batch and heads in front."""
    found = equation_of(node)
    if target(node) is not aten.einsum.default:
        return True
    return found is not None and found.left[:2] == found.right[:2] == found.result[:2] == found.batch


def spell_scores(node: fx.Node, fake_mode: Any) -> bool:
    """Replaces queries times keys by ``matmul(query, key.transpose(-1, -2))``; False when it is left."""
    found = equation_of(node)
    if found is None or not _is_simple(node, found):
        return False
    query, key = node.args[1]  # type: ignore[misc]
    queries, keys = (found.left, found.rows), (found.right, found.columns)
    if found.result == found.batch + found.columns + found.rows:
        query, key, queries, keys = key, query, keys, queries
    elif found.result != found.batch + found.rows + found.columns:
        return False
    first = _permuted(node, fake_mode, query, queries[0], found.batch + queries[1] + found.summed)
    second = _permuted(node, fake_mode, key, keys[0], found.batch + keys[1] + found.summed)
    transposed = insert_call(fake_mode, node, aten.transpose.int, second, -1, -2)
    _replace(node, insert_call(fake_mode, node, aten.matmul.default, first, transposed))
    return True


def spell_weights(node: fx.Node, fake_mode: Any) -> bool:
    """Replaces weights ``[B, H, M, N]`` times values by ``matmul(weights, values)``, permuted to the result's order;
    False when it is left."""
    found = equation_of(node)
    if found is None or not _is_simple(node, found):
        return False
    weights, values = node.args[1]  # type: ignore[misc]
    batch = found.left[:2]
    if found.left != batch + found.rows + found.summed:
        return False
    second = _permuted(node, fake_mode, values, found.right, batch + found.summed + found.columns)
    product = insert_call(fake_mode, node, aten.matmul.default, weights, second)
    _replace(node, _permuted(node, fake_mode, product, batch + found.rows + found.columns, found.result))
    return True


def _is_simple(node: fx.Node, found: Equation) -> bool:
    """Two batch dimensions, one of each other kind, nothing broadcast, no gradient (which new calls do not carry)."""
    single = len(found.summed) == len(found.rows) == len(found.columns) == 1
    if needs_gradient(node) or len(found.batch) != 2 or not single:
        return False
    left, right = (tensor(operand) for operand in node.args[1])  # type: ignore[union-attr]
    pairs = [(found.left.index(letter), found.right.index(letter)) for letter in found.batch + found.summed]
    return all(same(left.shape[a], right.shape[b]) for a, b in pairs)


def _permuted(node: fx.Node, fake_mode: Any, value: fx.Node, have: str, want: str) -> fx.Node:
    if have == want:
        return value
    return insert_call(fake_mode, node, aten.permute.default, value, [have.index(letter) for letter in want])


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
