"""What may stand between scores and their softmax: the largest score subtracted, and a column of attention sinks.

    scores = cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1)], -1)
    softmax(scores - scores.max(-1, keepdim=True).values, -1)[..., :-1]

Enters: the node that a softmax reads.  Leaves: the scores under it, the sinks of the heads, and the nodes between.
"""

from __future__ import annotations

import operator
from typing import Any

import torch.fx as fx

from lz_compile.patterns.walk import CASTS, COPIES, arguments, aten, fake, same, target

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default}


def without_shift(node: Any) -> tuple[Any, list[fx.Node]]:
    """``x`` behind ``x - max(x)`` over the last dimension, which a softmax does not notice, and the nodes between.

    ``(node, [])`` when there is no such subtraction.
    """
    if target(node) is not aten.sub.Tensor or arguments(node)["alpha"] != 1:
        return node, []
    scores, highest = node.args[:2]
    passed: list[fx.Node] = [node]
    while target(highest) in COPIES:
        passed.append(highest)
        highest = highest.args[0]
    if target(highest) is operator.getitem and highest.args[1] == 0:
        passed.append(highest)
        highest = highest.args[0]
        if target(highest) is not aten.max.dim:
            return node, []
        passed += [unread for unread in highest.users if not unread.users]  # where the maximum is
    elif target(highest) is not aten.amax.default:
        return node, []
    known = arguments(highest)
    value = fake(scores)
    dims = known["dim"] if isinstance(known["dim"], (list, tuple)) else [known["dim"]]
    over_keys = value is not None and len(dims) == 1 and dims[0] in (-1, value.dim() - 1)
    if known["self"] is not scores or not over_keys or not known["keepdim"]:
        return node, []
    return scores, [*passed, highest]


def sink_column(node: Any) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """Scores ``[B, H, M, N]`` and sinks ``[H]`` behind ``cat([scores, column], -1)``, and the nodes that lead from the
    sinks to the column, first to last; None when the node is no such concatenation."""
    if target(node) is not aten.cat.default:
        return None
    known = arguments(node)
    if len(known["tensors"]) != 2 or known["dim"] not in (-1, 3):
        return None
    scores, column = known["tensors"]
    wide, last = fake(scores), fake(column)
    if wide is None or last is None or wide.dim() != 4 or not same(last.shape[3], 1):
        return None
    heads = wide.shape[1]
    passed: list[fx.Node] = []
    while True:
        value, kind = fake(column), target(column)
        if value is None or not value.dtype.is_floating_point:
            return None
        if value.dim() == 1:
            return (scores, column, passed[::-1]) if same(value.shape[0], heads) else None
        # Up to here all dimensions but that of the heads are one, or expanded from one: the order is that of the heads.
        if kind in _VIEWS and not same(value.numel(), heads):
            return None
        if kind is aten.expand.default:
            source = fake(column.args[0])
            if source is None or source.dim() < 3 or not same(source.shape[-3], heads):
                return None
            if not same(source.numel(), heads):
                return None
        elif kind not in _VIEWS | CASTS | COPIES:
            return None
        passed.append(column)
        column = column.args[0]


def drops_last_column(node: Any) -> bool:
    """True for ``x[..., :-1]``."""
    value = fake(node)
    if target(node) is not aten.slice.Tensor or value is None:
        return False
    known = arguments(node)
    source = fake(known["self"])
    if source is None or known["dim"] not in (-1, source.dim() - 1) or known["step"] != 1:
        return False
    return known["start"] in (0, None) and same(value.shape[-1], source.shape[-1] - 1)
