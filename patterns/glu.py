"""Gated linear units: the activation of one projection times another (SwiGLU, GEGLU, ReGLU).

Enters: a normalised graph.  Leaves: one :class:`~lz_compile.region.Region` a site with a
:class:`~lz_compile.pointwise.Glu`, in graph order; a site that may not be replaced carries the reason.

A site is a product of two tensors of one shape, of which one is an activation that nothing else reads.  Where gate and
up are the halves of one tensor, in that order, the site starts at that tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.columns import half
from lz_compile.patterns.replaceable import Declined, only_user, own
from lz_compile.patterns.walk import arguments, aten, fake, same_shape, target
from lz_compile.pointwise import Activation, Glu
from lz_compile.region import Region

_NAMES = {"silu": "SwiGLU", "gelu": "GEGLU", "gelu_tanh": "GEGLU (tanh)", "relu": "ReGLU"}


def find_glus(graph: fx.Graph, aliases: Aliases, module_of: Callable[[fx.Node], str]) -> list[Region]:
    """All gated linear units of a graph.  ``module_of(node)`` gives the module path of a node."""
    regions: list[Region] = []
    for node in graph.nodes:
        parts = _parts(node)
        if parts is None:
            continue
        activated, up = parts
        op, views = _read(activated, up)
        region = Region("glu", _NAMES[op.activation], node, module_of(node), op=op)
        region.inputs = (op.gate, up) if op.packed is None else (op.packed,)
        if op.packed is not None:
            region.pattern += ", packed"
        try:
            own(region, [activated, node], views, aliases)
        except Declined as reason:
            region.declined = str(reason)
        regions.append(region)
    return regions


def activation(node: fx.Node) -> Activation | None:
    """Which activation a call computes."""
    kind = target(node)
    if kind is aten.silu.default:
        return "silu"
    if kind is aten.relu.default:
        return "relu"
    if kind is aten.gelu.default:
        return "gelu" if arguments(node)["approximate"] == "none" else "gelu_tanh"
    return None


def _parts(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The activation and the other factor of a product, or None when it is no gated linear unit."""
    if target(product) is not aten.mul.Tensor:
        return None
    a, b = product.args
    if a is b or fake(a) is None or fake(b) is None:
        return None
    candidates = [(x, y) for x, y in ((a, b), (b, a)) if activation(x) is not None]  # type: ignore[arg-type]
    if not candidates:
        return None
    activated, up = next((pair for pair in candidates if only_user(pair[0]) is product), candidates[0])  # type: ignore[arg-type]
    left, right, out = fake(activated), fake(up), fake(product)
    assert left is not None and right is not None and out is not None
    if not left.is_floating_point() or not left.dtype == right.dtype == out.dtype or left.device != right.device:
        return None
    return (activated, up) if same_shape(left.shape, right.shape) else None  # type: ignore[return-value]


def _read(activated: fx.Node, up: fx.Node) -> tuple[Glu, list[fx.Node]]:
    """The operator, and the views between a packed projection and its halves."""
    name, gate = activation(activated), activated.args[0]
    assert name is not None and isinstance(gate, fx.Node)
    first, second = half(gate), half(up)
    if first is not None and second is not None and first[0] is second[0] and (first[1], second[1]) == (0, 1):
        return Glu(gate, up, name, packed=first[0]), list(dict.fromkeys([*first[2], *second[2]]))
    return Glu(gate, up, name), []
