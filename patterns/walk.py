"""Small steps that patterns share when they walk a graph: arguments by name, scalars, casts, equal sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from lz_compile.aliasing import Aliases

aten = torch.ops.aten

# In-place spellings, read as the functional one once the writes were checked.
FUNCTIONAL = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Scalar: aten.div.Scalar,
    aten.add_.Scalar: aten.add.Scalar,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
}

CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}
# What torch.tensor(number) becomes behind its constant.
_CONSTANT_COPIES = {aten.lift_fresh_copy.default, aten.detach_.default}
COPIES = {aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default}

RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}

_ROOTS: dict[Any, Callable[[float], float]] = {aten.sqrt.default: math.sqrt, aten.rsqrt.default: lambda x: x**-0.5}


def target(node: Any) -> Any:
    """The operator of a call, in-place spellings as their functional twin; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    return FUNCTIONAL.get(node.target, node.target)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values


def fake(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, None when it is not a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def tensor(node: Any) -> torch.Tensor:
    """The fake tensor of a node that is known to be one."""
    value = fake(node)
    assert value is not None, f"{node} is not a tensor"
    return value


def same(a: Any, b: Any) -> bool:
    """True when two sizes are known to be equal, without adding a guard."""
    return bool(statically_known_true(a == b))


def agree(a: Any, b: Any) -> bool:
    """True when two sizes that the program needs to be equal are.

    A growing cache gives its keys and its values a length of their own each; an attention over two lengths would be an
    error.  The guard that this adds makes it a recompilation instead of a read behind the shorter one.
    """
    return bool(guard_or_false(a == b))


def same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


def scalar(value: Any, aliases: Aliases) -> float | None:
    """A Python number, or the number that a constant of the graph holds throughout, in the constant's dtype.

    None when it is known only at run time, or when the constant is written anywhere.
    """
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, fx.Node) or aliases.is_written(value):
        return None
    number: float | None = None
    if target(value) in CASTS | COPIES | _CONSTANT_COPIES:
        number = scalar(value.args[0], aliases)
    elif target(value) in (aten.full.default, aten.scalar_tensor.default):
        known = arguments(value)
        number = scalar(known.get("fill_value", known.get("s")), aliases)
    elif target(value) in _ROOTS:
        under = scalar(value.args[0], aliases)
        number = _ROOTS[target(value)](under) if under is not None and under > 0 else None
    elif target(value) is aten.mul.Tensor:
        factors = [scalar(factor, aliases) for factor in value.args[:2]]
        number = math.prod(factors) if None not in factors else None  # type: ignore[arg-type]
    elif value.target is torch.tensor:  # kept as a call of its own by torch 2.11
        number = scalar(value.args[0], aliases) if isinstance(value.args[0], (bool, int, float)) else None
    else:
        constant = constant_tensor(value)
        if constant is not None and constant.numel() == 1:
            number = float(constant.item())
    tensor = fake(value)
    if number is None or tensor is None or tensor.is_complex():
        return number
    return _rounded(number, tensor.dtype)


def _rounded(number: float, dtype: torch.dtype) -> float | None:
    """The number as a tensor of ``dtype`` holds it, None when it does not fit."""
    try:
        return float(torch.tensor(number, dtype=torch.float64).to(dtype)) if math.isfinite(number) else number
    except (RuntimeError, OverflowError):
        return None


def constant_tensor(node: fx.Node) -> torch.Tensor | None:
    """The tensor behind a ``get_attr`` node of a small constant that nothing writes to."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    value = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(value, torch.Tensor) or isinstance(value, torch._subclasses.FakeTensor):
        return None
    return value if value.numel() <= 1 else None
