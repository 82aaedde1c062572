"""How a router made the weights of its top-k: softmax before or after it, sigmoid, normalised, scaled.

Enters: the weights ``[T, K]`` of a mixture of experts.  Leaves: a :class:`~lz_compile.moe.Router`, for reports; nothing
is proved by it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.moe import Router
from lz_compile.patterns.routing import KEEPS_ORDER
from lz_compile.patterns.walk import CASTS, aten, scalar, target

_SOFTMAX = {aten.softmax.int, aten._softmax.default}


def router_of(weights: fx.Node, aliases: Aliases) -> Router:
    """What is known of the router behind ``weights``."""
    node: Any = weights
    scale, normalised = 1.0, False
    for _ in range(12):
        kind = target(node)
        if kind in KEEPS_ORDER | CASTS:
            node = node.args[0]
        elif kind is aten.mul.Tensor and not normalised and (factor := scalar(node.args[1], aliases)) is not None:
            scale, node = scale * factor, node.args[0]
        elif kind is aten.div.Tensor and _sums(node.args[1], node.args[0]):
            normalised, node = True, node.args[0]
        elif kind in _SOFTMAX:
            of_chosen = _behind(node.args[0])
            after = target(of_chosen) is operator.getitem and target(of_chosen.args[0]) is aten.topk.default
            return Router("softmax over the top-k" if after else "softmax", normalised, scale)
        elif kind is aten.sigmoid.default:
            return Router("sigmoid", normalised, scale)
        elif kind is aten.gather.default:
            node = node.args[0]
        elif kind is operator.getitem and target(node.args[0]) is aten.topk.default:
            node = node.args[0].args[0]
        elif kind is aten.linear.default:
            return Router("logits", normalised, scale)
        else:
            break
    return Router("unknown", normalised, scale)


def _behind(node: Any) -> Any:
    while target(node) in KEEPS_ORDER | CASTS:
        node = node.args[0]
    return node


def _sums(divisor: Any, values: Any) -> bool:
    """Whether a divisor is the sum of these values, perhaps with a little added."""
    if target(divisor) is aten.add.Tensor and isinstance(divisor.args[1], (int, float)):
        divisor = divisor.args[0]
    return target(divisor) is aten.sum.dim_IntList and _behind(divisor.args[0]) is _behind(values)
