"""Cosine and sine tables that every layer reads.

Inductor inlines a pointwise value into each of its readers.  For RoPE that means the cosine of a position is computed
again for every head of every layer: at 8192 tokens the rotation then takes four times what its bytes need (H200).
Recognised: a ``cos`` or ``sin`` whose casts, scales and views of size one lead to one value with several readers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx as fx

from lz_compile.gradients import needs_gradient
from lz_compile.patterns.walk import CASTS, COPIES, aten, fake, target
from lz_compile.region import Region

_SOURCES = {aten.cos.default, aten.sin.default}
_STEPS = CASTS | COPIES | {aten.mul.Tensor, aten.mul.Scalar, aten.unsqueeze.default, aten.cat.default}
# Below this many entries recomputing costs less than another launch.
_LEAST_ENTRIES = 64 * 1024
_LEAST_READERS = 4


def find_rope_tables(graph: fx.Graph, module_of: Callable[[fx.Node], str]) -> list[Region]:
    """All shared cosine and sine tables of a graph; ``region.output`` is the value that the layers read."""
    regions = []
    for node in graph.nodes:
        if target(node) not in _SOURCES:
            continue
        table = _last_step(node)
        value = fake(table)
        if value is None or needs_gradient(table) or _readers(table) < _LEAST_READERS:
            continue
        if not isinstance(value.numel(), int) or value.numel() < _LEAST_ENTRIES:
            continue
        name = str(node.target).split(".")[1]
        regions.append(Region("rope_table", name, table, module_of(node)))
    return regions


def _last_step(node: fx.Node) -> fx.Node:
    """The end of the chain of single readers that starts at a cosine or sine."""
    while len(node.users) == 1:
        (user,) = node.users
        before, after = fake(node), fake(user)
        if target(user) not in _STEPS or before is None or after is None:
            break
        if not isinstance(after.numel(), int) or after.numel() > 2 * before.numel():
            break
        node = user
    return node


def _readers(table: fx.Node) -> int:
    """Readers of a table, those behind views counted one by one."""
    count = 0
    for user in table.users:
        view = target(user) in {aten.unsqueeze.default, *CASTS, *COPIES} and isinstance(fake(user), torch.Tensor)
        count += len(user.users) if view else 1
    return count
