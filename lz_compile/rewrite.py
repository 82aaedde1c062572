"""Last step before Inductor: the plan is carried out on the graph.

Enters: the normalised graph and a plan.  Leaves: the same graph with each chosen region replaced by its kernel's call
and what only the region used removed, in-place writes and their order untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch.fx as fx

from lz_compile import config
from lz_compile.aliasing import Aliases
from lz_compile.plan import Choice, Plan
from lz_compile.region import Region

log = logging.getLogger("lz_compile")

EmitterFactory = Callable[[fx.Graph, Aliases], "object"]


def rewrite(module: fx.GraphModule, aliases: Aliases, plan: Plan, make_emitter: EmitterFactory) -> int:
    """Replaces the planned regions; returns how many.  A region whose kernel fails to emit is left to Inductor."""
    emitter = make_emitter(module.graph, aliases)
    replaced = 0
    for choice in plan.choices:
        if choice.kernel is None:
            continue
        try:
            _replace(emitter, choice)
            replaced += 1
        except Exception as error:
            if config.strict:
                raise
            name = choice.kernel.name
            log.warning("%s: %s failed to emit, left to Inductor: %s", choice.region.module, name, error)
            choice.rejected[name] = f"failed: {error}"
            choice.kernel, choice.reason = None, f"{name} failed: {error}"
    if replaced:
        module.graph.eliminate_dead_code()
        module.recompile()
    return replaced


def _replace(emitter: object, choice: Choice) -> None:
    region = choice.region
    assert choice.kernel is not None
    result = choice.kernel.emit(emitter, region)
    region.output.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    _erase(region)


def _erase(region: Region) -> None:
    """Removes the region's own nodes; dead-code elimination would keep those that write in place."""
    for node in reversed(region.nodes):
        if not node.users:
            node.graph.erase_node(node)
