"""Linear layers that could be one: q, k and v, gate and up.

Enters: a normalised graph.  Leaves: one :class:`~lz_compile.region.Region` of kind ``projections`` for every module in
which several ``aten.linear`` read the very same value through parameters that nobody else reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases, storage_key
from lz_compile.gradients import needs_gradient
from lz_compile.patterns.walk import arguments, aten, fake
from lz_compile.projections import Projections
from lz_compile.region import Region

# What they give depends on where in memory their argument lies.
_READS_MEMORY = {aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default}


def find_projections(graph: fx.Graph, aliases: Aliases, module_of: Callable[[fx.Node], str]) -> list[Region]:
    """The groups of a graph, in graph order; one that may not be packed carries the reason."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        key = _key(node, module_of(node))
        if key is not None:
            groups.setdefault(key, []).append(node)
    groups = {key: members for key, members in groups.items() if len(members) > 1}
    if not groups:
        return []
    reads_memory = any(node.target in _READS_MEMORY for node in graph.nodes)
    kept = {storage_key(v) for node in graph.output_node().all_input_nodes if (v := fake(node)) is not None}
    regions = []
    for (_, module, *_), members in groups.items():
        good, reason = [], "the graph reads values by their place in memory" if reads_memory else ""
        for member in members if not reason else []:
            why_not = _why_not(member, members[0], aliases, kept)
            reason = reason or why_not
            if not why_not:
                good.append(member)
        if len(good) > 1:
            regions.append(_region(good, module))
        else:
            regions.append(_region(members, module))
            regions[-1].declined = reason
    return regions


def _key(node: fx.Node, module: str) -> Any:
    """What calls must have in common; None for a call whose weight or bias is no input of static shape."""
    known = arguments(node)
    x, weight, bias = known["input"], known["weight"], known["bias"]
    value = fake(weight)
    if value is None or value.dim() != 2 or fake(x) is None:
        return None
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if parameter.op != "placeholder" or not all(isinstance(size, int) for size in parameter.meta["val"].shape):
            return None
    parent = module.rpartition(".")[0] if weight.meta.get("lz_name", "").startswith(module + ".") else module
    return x, parent, bias is None, value.dtype, value.device, value.shape[1]


def _why_not(node: fx.Node, first: fx.Node, aliases: Aliases, kept: set[int]) -> str:
    known = arguments(node)
    for parameter in (known["weight"], known["bias"]):
        if parameter is None:
            continue
        name = parameter.meta.get("lz_name", parameter.name)
        if len(parameter.users) != 1:
            return f"{name} is used elsewhere too (tied, or shared between modules)"
        if aliases.is_written(parameter):
            return f"{name} is written in the graph"
    if needs_gradient(node):
        return "needs gradient"
    if aliases.is_written(node):
        return f"{node.name} is written in place"
    if storage_key(node.meta["val"]) in kept:
        return f"the caller gets the memory of {node.name}"
    if aliases.written_between(known["input"], first, node):
        return "their input is written between them"
    if any(isinstance(size, int) and size == 0 for size in node.meta["val"].shape):
        return "there is nothing to compute"
    return ""


def _region(members: list[fx.Node], module: str) -> Region:
    known = [arguments(node) for node in members]
    weights = tuple(each["weight"] for each in known)
    biases = tuple(each["bias"] for each in known if each["bias"] is not None)
    op = Projections(known[0]["input"], weights, biases, tuple(members))
    region = Region("projections", f"{len(members)} linear layers", members[0], module, nodes=list(members), op=op)
    region.inputs = (op.input, *weights, *biases)
    return region
