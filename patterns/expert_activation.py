"""The activation of an expert, read backwards from the rows of its second product.

Enters: those rows.  Leaves: :class:`Act`, the activation as :class:`lz_compile.moe.Moe` has it, and its argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.columns import half
from lz_compile.patterns.glu import activation
from lz_compile.patterns.routing import behind_order
from lz_compile.patterns.walk import arguments, aten, scalar, target, tensor
from lz_compile.pointwise import Activation


@dataclass(frozen=True)
class Act:
    """The activation as :class:`Moe` has it, of ``y``."""

    y: fx.Node
    activation: Activation
    gated: bool
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


def activation_of(rows: fx.Node, aliases: Aliases) -> Act | None:
    """What made ``rows``, None where it is no activation that :class:`~lz_compile.moe.Moe` has."""
    node = behind_order(rows)[-1]
    if target(node) is aten.mul.Tensor:
        a, b = node.args[:2]
        return _gated(a, b, aliases) or _gated(b, a, aliases)
    name = activation(node)
    return Act(node.args[0], name, gated=False) if name is not None else None  # type: ignore[arg-type]


def _gated(act: Any, up: Any, aliases: Aliases) -> Act | None:
    alpha, gate = 1.0, None
    name = activation(act)
    if name is not None:
        gate = act.args[0]
    elif target(act) is aten.mul.Tensor:
        for x, s in ((act.args[0], act.args[1]), (act.args[1], act.args[0])):
            if target(s) is not aten.sigmoid.default:
                continue
            inner = s.args[0]
            factor = scalar(inner.args[1], aliases) if target(inner) is aten.mul.Tensor else None
            if inner is x or (factor is not None and inner.args[0] is x):
                name, gate, alpha = "silu", x, 1.0 if inner is x else float(factor)  # type: ignore[arg-type]
    if name is None:
        return None
    offset = 0.0
    if target(up) is aten.add.Tensor and (number := scalar(up.args[1], aliases)) is not None:
        if arguments(up)["alpha"] != 1:
            return None
        offset, up = number, up.args[0]
    gate, low, high = _clamped(gate, aliases)
    up, up_low, up_high = _clamped(up, aliases)
    if low is not None or high != up_high or up_low != (None if high is None else -high):
        return None
    parts = half(gate), half(up)
    if parts[0] is not None and parts[1] is not None:
        if parts[0][0] is not parts[1][0] or (parts[0][1], parts[1][1]) != (0, 1):
            return None
        return Act(parts[0][0], name, True, False, alpha, high, offset)
    y = _every_second(gate, 0)
    if y is None or y is not _every_second(up, 1):
        return None
    return Act(y, name, True, True, alpha, high, offset)


def _clamped(node: Any, aliases: Aliases) -> tuple[Any, float | None, float | None]:
    """What was clamped, and between which numbers; the node itself where that is not known."""
    if target(node) is not aten.clamp.default:
        return node, None, None
    known = arguments(node)
    ends = [known["min"], known["max"]]
    numbers = [None if end is None else scalar(end, aliases) for end in ends]
    if any(end is not None and number is None for end, number in zip(ends, numbers)):
        return node, None, None
    return known["self"], numbers[0], numbers[1]


def _every_second(node: Any, start: int) -> fx.Node | None:
    """``y`` of ``y[:, start::2]``."""
    if target(node) is not aten.slice.Tensor:
        return None
    known, width = arguments(node), tensor(node.args[0]).shape[-1]
    if not isinstance(width, int) or width % 2 or known["dim"] not in (-1, tensor(node).dim() - 1):
        return None
    # No end is None, or a number beyond any size.
    whole = known["end"] is None or (isinstance(known["end"], int) and known["end"] >= width)
    return known["self"] if whole and (known["start"] or 0) == start and known["step"] == 2 else None
