"""Last step before Inductor: the plan is carried out on the graph.

Enters: the normalised graph and a plan.  Leaves: the same graph with each chosen region replaced by its kernel's call
and what only the region used removed, in-place writes and their order untouched.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile import config
from lz_compile.aliasing import Aliases
from lz_compile.region import Region

if TYPE_CHECKING:
    from lz_compile.plan import Choice, Plan

log = logging.getLogger("lz_compile")

aten = torch.ops.aten

_COPIES_IN_ORDER = {aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints}


class Emitting(Protocol):
    """What this module needs of :class:`lz_compile.lowering.emit.Emitter`."""

    def call(self, anchor: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node: ...


EmitterFactory = Callable[[fx.Graph, Aliases], Emitting]


def rewrite(module: fx.GraphModule, aliases: Aliases, plan: Plan, make_emitter: EmitterFactory) -> int:
    """Replaces the planned regions; returns how many.  A region whose kernel fails to emit is left to Inductor."""
    emitter = make_emitter(module.graph, aliases)
    results: list[tuple[Region, fx.Node]] = []
    for choice in plan.choices:
        if choice.kernel is None:
            continue
        try:
            results.append((choice.region, _emit(emitter, choice)))
        except Exception as error:
            if config.strict:
                raise
            name = choice.kernel.name
            log.warning("%s: %s failed to emit, left to Inductor: %s", choice.region.module, name, error)
            choice.rejected[name] = f"failed: {error}"
            choice.kernel, choice.reason, choice.cause = None, f"{name} failed: {error}", "failed"
    if results:
        replace(module.graph, results)
        module.recompile()
    return len(results)


def replace(graph: fx.Graph, results: list[tuple[Region, fx.Node]]) -> None:
    """Each result takes the place of its region's output, and what only the regions used is removed.

    When all results are in the graph, not before: a later region may read the output of an earlier one.
    """
    for region, result in results:
        # A kernel may read the output itself (a stored table does).
        for user in [user for user in region.output.users if user is not result]:
            user.replace_input_with(region.output, result)
        _erase(region)
    graph.eliminate_dead_code()


def _emit(emitter: Emitting, choice: Choice) -> fx.Node:
    assert choice.kernel is not None
    region = choice.region
    before = region.output.prev
    result = choice.kernel.emit(emitter, region)
    _name(result, region, before)
    return as_laid_out(emitter, region.output, result)


def _name(result: fx.Node, region: Region, before: fx.Node) -> None:
    """Names the kernel's call ``lz_attention_model_layers_self_attn``: by names Inductor's output code and debug traces
    say where a call comes from.  Without the layer's number, so that equal layers compiled one by one stay equal graphs
    to Inductor's caches; the number that FX appends counts them.
    """
    node = result
    while node.args and isinstance(node.args[0], fx.Node) and _is_view(node.target):
        node = node.args[0]
    inserted = region.output.prev
    while inserted is not before and inserted is not node:
        inserted = inserted.prev
    if inserted is node and node is not before:
        words = [word for word in re.split(r"\W+", region.module) if word and not word.isdigit()]
        node._rename("_".join(["lz", region.kind, *words]))


def _is_view(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        returns = target._schema.returns
        return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return target is operator.getitem


def as_laid_out(emitter: Emitting, output: fx.Node, result: fx.Node) -> fx.Node:
    """``result`` in the memory layout of ``output`` where someone may notice: a view, an alias, the user."""
    if is_copied(output):
        return result
    return laid_out(emitter, output, result)


def laid_out(emitter: Emitting, output: fx.Node, result: fx.Node) -> fx.Node:
    """``result``, copied where its memory layout is not that of ``output``."""
    want, have = output.meta["val"], result.meta["val"]
    if _same_layout(want, have):
        return result
    if want.is_contiguous():
        return emitter.call(output, aten.clone.default, result, memory_format=torch.contiguous_format)
    order = _memory_order(want)
    if order is None:
        return result
    swapped = emitter.call(output, aten.permute.default, result, order)
    swapped = emitter.call(output, aten.clone.default, swapped, memory_format=torch.contiguous_format)
    return emitter.call(output, aten.permute.default, swapped, [order.index(dim) for dim in range(want.dim())])


def _memory_order(value: torch.Tensor) -> list[int] | None:
    """The order of dimensions in which a tensor's memory is row-major; None where that is not known, or none is."""
    if value.dim() == 4 and value.transpose(1, 2).is_contiguous():
        return [0, 2, 1, 3]
    if not all(isinstance(stride, int) for stride in value.stride()):
        return None
    order = sorted(range(value.dim()), key=lambda dim: -value.stride(dim))
    return order if value.permute(order).is_contiguous() else None


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(
        statically_known_true(size == 1) or statically_known_true(s == t)
        for size, s, t in zip(a.shape, a.stride(), b.stride())
    )


def is_copied(output: fx.Node) -> bool:
    """The usual end of an attention: ``output.transpose(1, 2)`` and nothing but a copy of that in row-major order."""
    users = list(output.users)
    if len(users) != 1 or not _swaps_heads(users[0]):
        return False
    readers = list(users[0].users)
    return len(readers) == 1 and (
        readers[0].target in _COPIES_IN_ORDER
        or (
            readers[0].target is aten.clone.default
            and readers[0].kwargs.get("memory_format") is torch.contiguous_format
        )
    )


def _swaps_heads(node: fx.Node) -> bool:
    if node.target is aten.transpose.int:
        return {int(dim) % 4 for dim in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]
    return node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]


def _erase(region: Region) -> None:
    """Removes the region's own nodes; dead-code elimination would keep those that write in place."""
    for node in reversed(region.nodes):
        if not node.users:
            node.graph.erase_node(node)
