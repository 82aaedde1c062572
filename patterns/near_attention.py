"""Softmaxes that :mod:`lz_compile.patterns.attention` takes for no attention site, and where its reading stopped.

Enters: a normalised graph.  Leaves: one :class:`NearSite` for each such softmax, in graph order.  A report lists them,
so that a missed site names the node that a pattern would have to learn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.attention import _SOFTMAX, _back_to_product, _forward_to_product, _outline_eager
from lz_compile.patterns.sinks import sink_column, without_shift
from lz_compile.patterns.steps import PRODUCTS, leads_to_product
from lz_compile.patterns.walk import aten, target
from lz_compile.region import describe_node

# Where the search for a product ends: beyond them lies another layer.
_WALLS = {aten.linear.default, aten.addmm.default, aten.convolution.default, aten.embedding.default} | _SOFTMAX
_REACH = 200


@dataclass(frozen=True)
class NearSite:
    """A softmax outside every recognised site.

    ``dot_product`` is True when a product stands before it and one behind it, with anything but a linear layer, a
    convolution, an embedding or another softmax in between: then it is attention in a spelling that is not read, and
    ``stopped`` is the node that stands in the way.  Else it is something else, a router or a sampling weight.
    """

    module: str
    softmax: str
    stopped: str
    reason: str
    dot_product: bool


def near_sites(graph: fx.Graph, aliases: Aliases, module_of: Callable[[fx.Node], str]) -> list[NearSite]:
    """All softmaxes of a graph that no attention site is anchored at."""
    found = []
    for node in graph.nodes:
        if target(node) in _SOFTMAX and _outline_eager(node, aliases) is None:
            found.append(_near(node, module_of(node)))
    return found


def _near(softmax: fx.Node, module: str) -> NearSite:
    before = _path(softmax, lambda node: node.all_input_nodes)
    behind = _path(softmax, lambda node: node.users)
    if before is None or behind is None:
        side = "before" if before is None else "behind"
        return NearSite(module, softmax.name, "", f"no product stands {side} the softmax", False)
    scores, _ = without_shift(softmax.args[0])
    sink = sink_column(scores)
    if _back_to_product(scores if sink is None else sink[0]) is None:
        stop = _last_that(lambda node: not leads_to_product(node), before)
        if stop is None:
            return NearSite(module, softmax.name, describe_node(softmax), "several operands lead to a product", True)
        return NearSite(module, softmax.name, describe_node(stop), f"before the softmax comes {stop.target}", True)
    stop = behind[0]
    for previous, node in zip([softmax, *behind], behind):
        if _forward_to_product(previous, sink is not None) is None:
            stop = node
    return NearSite(module, softmax.name, describe_node(stop), f"after the softmax comes {stop.target}", True)


def _path(softmax: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> list[fx.Node] | None:
    """The shortest way from a softmax (left out) to a product (the last); None when there is none."""
    came: dict[fx.Node, fx.Node] = {}
    queue = deque([softmax])
    while queue and len(came) < _REACH:
        node = queue.popleft()
        for other in neighbours(node):
            if other in came or other.op != "call_function" or target(other) in _WALLS:
                continue
            came[other] = node
            if target(other) in PRODUCTS:
                path = [other]
                while path[-1] is not softmax:
                    path.append(came[path[-1]])
                return path[-2::-1]
            queue.append(other)
    return None


def _last_that(holds: Callable[[Any], bool], nodes: list[fx.Node]) -> fx.Node | None:
    return next((node for node in reversed(nodes) if holds(node)), None)
