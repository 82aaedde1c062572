"""Which tensor is the key/value cache: the write in front of an attention.

Recognised: ``index_copy_``, ``index_put_``, slice assignment (``copy_`` into a view), ``copy_`` of the whole tensor,
the rolled window of a full sliding cache, ``slice_scatter``, ``cat``, a gather from a paged cache, and what a
quantised cache gives back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases, written_arguments
from lz_compile.gradients import needs_gradient
from lz_compile.patterns.walk import CASTS, COPIES, arguments, aten, fake, same, same_shape, scalar, target
from lz_compile.region import CacheWrite

_VIEWS = {
    aten.slice.Tensor,
    aten.alias.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
}
_KINDS = {
    aten.index_copy_.default: "index_copy_",
    aten.index_put_.default: "index_put_",
    aten.copy_.default: "slice assignment",
    aten.index_copy.default: "index_copy",
    aten.index_put.default: "index_put",
    aten.slice_scatter.default: "slice_scatter",
    aten.cat.default: "cat",
}
_GATHERS = {aten.index_select.default, aten.index.Tensor}
# What turns stored integers into keys: (x - zero) * scale, in any order of casts and shapes.
_DEQUANTISES = (
    CASTS
    | COPIES
    | _VIEWS
    | {
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.mul.Tensor,
        aten.sub.Tensor,
        aten.add.Tensor,
        aten.div.Tensor,
    }
)


def find_cache_write(node: fx.Node, at: fx.Node, aliases: Aliases) -> CacheWrite | None:
    """The write that put this step's keys (or values) into the tensor ``node`` that attention at ``at`` reads.

    Of a paged cache, of which attention reads a gathered copy, it is the last write to the pages.  A quantised cache
    is no tensor that a kernel could read; the report says that it is left alone.
    """
    base = node
    while target(base) in _VIEWS | COPIES:
        base = base.args[0]  # type: ignore[assignment]
    if target(base) in _GATHERS:
        pages = find_cache_write(base.args[0], base, aliases)  # type: ignore[arg-type]
        return None if pages is None else replace(pages, kind=f"{pages.kind} of pages")
    if base.op == "call_function" and base.target in _KINDS:
        cache = _cache_of(base)
        if base.target is aten.cat.default:
            if _is_dequantised(cache):
                return CacheWrite(cache, base, "quantised cache, left alone: cat")
            while target(cache) in _VIEWS | COPIES:
                cache = cache.args[0]  # type: ignore[assignment]
        return CacheWrite(cache, base, _kind(base, aliases))
    write = _last_write(base, at, aliases)
    return CacheWrite(base, write, _kind(write, aliases)) if write is not None else None


def _kind(write: fx.Node, aliases: Aliases) -> str:
    if rolled_window(write, aliases) is not None or "roll_window" in str(write.target):
        return "rolled window"
    return _KINDS.get(write.target, str(write.target))


def _is_dequantised(node: fx.Node, depth: int = 12) -> bool:
    """True for ``(integers - zero) * scale``: what a cache that stores integers gives back."""
    for _ in range(depth):
        if target(node) not in _DEQUANTISES or not isinstance(node.args[0], fx.Node):
            return False
        source = fake(node.args[0])
        if source is None or not source.dtype.is_floating_point:
            return source is not None and source.dtype != torch.bool and source.dim() > 0
        node = node.args[0]
    return False


@dataclass(frozen=True)
class RolledWindow:
    """A full sliding cache ``[B, H, W, D]`` that gives up its first row and gets ``new`` ``[B, H, 1, D]`` as its last:
    ``write`` is ``cache.copy_(rolled)``, and ``nodes`` (it among them, last to first) serve nothing else."""

    cache: fx.Node
    new: fx.Node
    write: fx.Node
    nodes: tuple[fx.Node, ...]


def find_rolled_windows(graph: fx.Graph, aliases: Aliases) -> list[RolledWindow]:
    """All windows of a graph that are rolled by one row and want no gradient, in graph order."""
    windows = [rolled_window(node, aliases) for node in graph.nodes if node.target is aten.copy_.default]
    return [w for w in windows if w is not None and not any(needs_gradient(n) for n in (w.cache, w.new, w.write))]


def rolled_window(write: fx.Node, aliases: Aliases) -> RolledWindow | None:
    """The window that ``write`` rolls: ``cache.copy_(rolled)`` where ``rolled`` is ``cache.roll(-1, 2)`` with its last
    row set to ``new``.  None when somebody else reads ``rolled``, or ``cache`` or ``new`` is written in between."""
    put = write.args[1] if write.target is aten.copy_.default else None
    if not isinstance(put, fx.Node) or put.target is not aten.index_put_.default:
        return None
    known = arguments(put)
    rolled, new = known["self"], known["values"]
    if target(rolled) is not aten.roll.default or known["accumulate"]:
        return None
    turn, cache = arguments(rolled), write.args[0]
    if turn["self"] is not cache or not isinstance(cache, fx.Node):
        return None
    whole, row = fake(cache), fake(new)
    if whole is None or row is None or whole.dim() != 4 or row.dtype != whole.dtype:
        return None
    if list(turn["shifts"]) != [-1] or [dim % 4 for dim in turn["dims"]] != [2]:
        return None
    if not same_shape(row.shape, (*whole.shape[:2], 1, whole.shape[3])) or not _is_last(known["indices"], aliases):
        return None
    private = set(rolled.users) == {put} and set(put.users) == {write}
    kept = not aliases.written_between(cache, rolled, write) and not aliases.written_between(new, put, write)
    return RolledWindow(cache, new, write, (write, put, rolled)) if private and kept else None


def _is_last(indices: Any, aliases: Aliases) -> bool:
    """``[:, :, [-1]]``: the last row."""
    if not isinstance(indices, (list, tuple)) or len(indices) != 3 or any(i is not None for i in indices[:2]):
        return False
    index = fake(indices[2])
    if index is None or index.dtype.is_floating_point or index.dtype == torch.bool or not same(index.numel(), 1):
        return False
    if target(indices[2]) is torch.tensor:  # kept as a call of its own by torch 2.11
        return list(indices[2].args[0]) == [-1]
    return scalar(indices[2], aliases) == -1


def _cache_of(write: fx.Node) -> fx.Node:
    first = write.args[0]
    node = first[0] if isinstance(first, (list, tuple)) else first
    return node  # type: ignore[return-value]


def _last_write(base: fx.Node, at: fx.Node, aliases: Aliases) -> fx.Node | None:
    if not aliases.is_written(base) or not aliases.version(base, at):
        return None
    last = None
    for node in base.graph.nodes:
        if node is at:
            break
        if any(aliases.same_storage(written, base) for written in written_arguments(node)):
            last = node
    return last
