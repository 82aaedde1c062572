"""Ranges of a tensor's last dimension, in the spellings that models use: chunks, splits, slices."""

from __future__ import annotations

import operator
from typing import Any

import torch.fx as fx

from lz_compile.patterns.walk import arguments, aten, fake, same, same_shape, target, tensor

_SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default}


def columns(node: fx.Node) -> tuple[fx.Node, Any, list[fx.Node]] | None:
    """``(whole, start, views)`` when ``node`` is columns of ``whole`` from ``start`` on, as many as it has; else None.

    ``views`` are the nodes that lead from ``whole`` to ``node``, the latter included.  ``start`` may be a node, and of
    a symbolic width negative, counted from the end.
    """
    if fake(node) is None:
        return None
    if node.target is operator.getitem:
        split, index = node.args
        if target(split) not in _SPLITS:
            return None
        assert isinstance(split, fx.Node)
        known = arguments(split)
        views, start = [split, node], sum(piece.shape[-1] for piece in split.meta["val"][:index])
    elif target(node) in (aten.slice.Tensor, aten.narrow.default):
        known = arguments(node)
        if known.get("step", 1) != 1:
            return None
        views, start = [node], known["start"] or 0
    else:
        return None
    whole = known["self"]
    value = tensor(whole)
    if known["dim"] not in (-1, value.dim() - 1):
        return None
    width = value.shape[-1]
    if isinstance(start, int) and isinstance(width, int) and start < 0:
        start = max(start + width, 0)
    return whole, start, views


def half(node: fx.Node) -> tuple[fx.Node, int, list[fx.Node]] | None:
    """``(whole, 0 or 1, views)`` when ``node`` is the first or the second half of ``whole``; else None.

    ``views`` as those of :func:`columns`; other pieces of the same split are no concern of theirs.
    """
    found = columns(node)
    if found is None:
        return None
    whole, start, views = found
    part, value = tensor(node), tensor(whole)
    if not same_shape(value.shape, (*part.shape[:-1], 2 * part.shape[-1])):
        return None
    if same(start, 0):
        return whole, 0, views
    return (whole, 1, views) if same(start, part.shape[-1]) else None
