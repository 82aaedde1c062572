"""What must hold before any region of pointwise operators and reductions may be replaced.

A site's nodes are of two sorts: its *core*, values that only the site computes, and its *edges*, casts and views of
its inputs, which others may read as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx as fx

from lz_compile.aliasing import Aliases, written_arguments
from lz_compile.gradients import needs_gradient
from lz_compile.patterns.walk import fake, same
from lz_compile.region import Region


class Declined(Exception):
    """A site that may not be replaced; the message says why."""


def own(region: Region, core: Sequence[fx.Node], edges: Sequence[fx.Node], aliases: Aliases) -> None:
    """Sets ``region.nodes`` once it is sure that a kernel in front of ``region.output`` gives the same values.

    ``region.output`` belongs to the core and ``region.inputs`` are set.

    Raises:
        Declined: with the reason.
    """
    site = {*core, *edges}
    for node in core:
        if node is not region.output and any(user not in site for user in node.users):
            raise Declined("an inner value is used elsewhere")
    if needs_gradient(region.output):
        raise Declined("needs gradient")
    for node in site:
        for written in written_arguments(node):
            if any(aliases.same_storage(written, value) for value in region.inputs):
                raise Declined("its input is written in place")
    for value in region.inputs:
        first = min((user for user in value.users if user in site), key=aliases.position)
        if aliases.written_between(value, first, region.output):
            raise Declined(f"{value.name} is written between its use and the result")
    for node in edges:
        if aliases.written_between(node, node, region.output):
            raise Declined(f"{node.name} is written before it is used")
    tensors = [value for node in (*region.inputs, region.output) if (value := fake(node)) is not None]
    if any(same(size, 0) for value in tensors for size in value.shape):
        raise Declined("there is nothing to compute")
    region.nodes = _unshared(core, edges, aliases)


def _unshared(core: Sequence[fx.Node], edges: Sequence[fx.Node], aliases: Aliases) -> list[fx.Node]:
    """The core and those edges that nobody else reads, in graph order."""
    kept = set(core)
    for node in sorted(set(edges), key=aliases.position, reverse=True):
        if all(user in kept for user in node.users):
            kept.add(node)
    return sorted(kept, key=aliases.position)


def only_user(node: fx.Node) -> fx.Node | None:
    """The reader of a value that has one."""
    return next(iter(node.users)) if len(node.users) == 1 else None
