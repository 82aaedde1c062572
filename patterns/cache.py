"""Which tensor is the key/value cache: the write in front of an attention.

Recognised: ``index_copy_``, ``index_put_``, slice assignment (``copy_`` into a view), ``copy_`` of the whole window,
``slice_scatter`` and ``cat``.
"""

from __future__ import annotations

import torch.fx as fx

from lz_compile.aliasing import Aliases, written_arguments
from lz_compile.patterns.walk import COPIES, aten, target
from lz_compile.region import CacheWrite

_VIEWS = {aten.slice.Tensor, aten.alias.default, aten.view.default, aten.transpose.int, aten.permute.default}
_KINDS = {
    aten.index_copy_.default: "index_copy_",
    aten.index_put_.default: "index_put_",
    aten.copy_.default: "slice assignment",
    aten.index_copy.default: "index_copy",
    aten.index_put.default: "index_put",
    aten.slice_scatter.default: "slice_scatter",
    aten.cat.default: "cat",
}


def find_cache_write(node: fx.Node, at: fx.Node, aliases: Aliases) -> CacheWrite | None:
    """The write that put this step's keys (or values) into the tensor ``node`` that attention at ``at`` reads."""
    base = node
    while target(base) in _VIEWS | COPIES:
        base = base.args[0]  # type: ignore[assignment]
    if base.op == "call_function" and base.target in _KINDS:
        return CacheWrite(_cache_of(base), base, _KINDS[base.target])
    write = _last_write(base, at, aliases)
    return CacheWrite(base, write, _KINDS.get(write.target, str(write.target))) if write is not None else None


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
