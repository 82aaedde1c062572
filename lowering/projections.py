"""Several linear layers as one, over a weight that holds theirs one after the other.

The weight is no copy: :mod:`lz_compile.packing` lays the parameters side by side in one storage, and the graph input
that was the first of them becomes all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from lz_compile.projections import Projections
from lz_compile.region import Kernel, Region, Verdict, Work

aten = torch.ops.aten
# Rows of a weight that the reference widens at a time.
_WIDENED = 1024


def projections_meaning(region: Region) -> Callable[..., torch.Tensor]:
    """The concatenated results, as a function of the values of ``region.inputs``: the input, then weights and biases.

    A weight is widened to the dtype of the input in parts: whole in float64 it may not fit beside the model.
    """
    count = len(region.op.weights)

    def meaning(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        parts = []
        for weight in parameters[:count]:
            parts += [torch.nn.functional.linear(x, rows.to(x.dtype)) for rows in weight.split(_WIDENED)]
        result = torch.cat(parts, -1)
        return result + torch.cat(parameters[count:]).to(x.dtype) if len(parameters) > count else result

    return meaning


def projections_work(region: Region, launches: int) -> Work:
    """Every weight read once; a product of few rows reaches half of the bandwidth, whatever its size."""
    op: Projections = region.op
    x = op.input.meta["val"]
    features, depth = sum(op.sizes), x.shape[-1]
    rows = 1.0
    for size in x.shape[:-1]:
        rows *= _hint(size)
    elements = features * depth + rows * (features + launches * _hint(depth))
    return Work(2.0 * rows * features * _hint(depth), elements * x.dtype.itemsize, launches=launches)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(getattr(size.node, "hint", None) or 1)


def replace_by_packed(emitter: Any, op: Projections, anchor: fx.Node) -> list[fx.Node]:
    """One linear layer in front of ``anchor`` (the first of them in the graph) and slices of its result in their place,
    which are returned.

    The first weight (and bias) node becomes the packed one: its fake value changes its shape.  Fake values of what
    reads the slices are not brought up to date.
    """
    sizes = op.sizes
    packed = [_retyped(nodes) for nodes in (op.weights, op.biases) if nodes]
    result = emitter.call(anchor, aten.linear.default, op.input, *packed)
    start, parts = 0, []
    last = result.meta["val"].dim() - 1
    for member, size in zip(op.members, sizes):
        part = emitter.call(anchor, aten.slice.Tensor, result, last, start, start + size)
        part.meta = {**member.meta, "val": part.meta["val"]}
        parts.append(part)
        start += size
    for member, part in zip(op.members, parts):
        member.replace_all_uses_with(part)
        member.graph.erase_node(member)
    return parts


def _retyped(nodes: tuple[fx.Node, ...]) -> fx.Node:
    value = nodes[0].meta["val"]
    rows = sum(node.meta["val"].shape[0] for node in nodes)
    with value.fake_mode:
        packed = torch.empty((rows, *value.shape[1:]), dtype=value.dtype, device=value.device)
    nodes[0].meta = {**nodes[0].meta, "val": packed, "example_value": packed}
    return nodes[0]


def _emit(emitter: Any, region: Region) -> fx.Node:
    """On its own, for measuring: the packed weight is made of the others, beside what is timed."""
    op: Projections = region.op
    packed = [emitter.call(region.output, aten.cat.default, list(nodes)) for nodes in (op.weights, op.biases) if nodes]
    return emitter.call(region.output, aten.linear.default, op.input, *packed)


def _supports(region: Region) -> Verdict:
    device = region.op.weights[0].meta["val"].device.type
    return None if device in ("cpu", "cuda") else f"parameters on {device}"


PACKED = Kernel(
    name="aten.packed",
    kind="projections",
    version="1",
    supports=_supports,
    emit=_emit,
    cuda_graphs="PyTorch's own linear layer",
    summary="one product over weights that lie side by side; the parameters became views of them",
    work=lambda region: projections_work(region, 1),
)
