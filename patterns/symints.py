"""The SymInts of a graph as linear forms, so that sizes known only at run time take part in a proof.

Enters: a graph whose nodes carry SymInts in ``meta["val"]``, and any size or scalar argument in it.  Leaves: the
argument as a :class:`~lz_compile.patterns.symbolic.Linear`, and for each symbol a graph value that holds it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from lz_compile.patterns.symbolic import Linear, Space


class SymInts:
    """SymInts as linear forms over the symbols of the graph, and the graph values that hold these symbols."""

    def __init__(self, graph: fx.Graph) -> None:
        self._holders: dict[str, tuple[int, fx.Node, int]] = {}
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._note(node, value.node.expr, value.node.shape_env)

    def _note(self, node: fx.Node, expr: Any, shape_env: Any) -> None:
        """Remember that ``symbol = sign * (node - const)``; a node that is the symbol itself comes first."""
        parts: dict[str, int] = {}
        const = _decompose(expr, 1, parts, {}, shape_env)
        if len(parts) == 1 and abs(next(iter(parts.values()))) == 1:
            ((name, sign),) = parts.items()
            known = self._holders.get(name)
            if known is None or ((known[0], known[2]) != (1, 0) and (sign, const) == (1, 0)):
                self._holders[name] = (sign, node, const)
        self._holders.setdefault(str(expr), (1, node, 0))

    def linear(self, space: Space, value: Any) -> Linear | None:
        """The linear form of an int, a SymInt or a node that holds a SymInt; None for anything else."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, int):  # bool too: True counts as 1
            return space.number(int(value))
        if not isinstance(value, torch.SymInt):
            return None
        parts: dict[str, int] = {}
        atoms: dict[str, Any] = {}
        total = space.number(_decompose(value.node.expr, 1, parts, atoms, value.node.shape_env))
        for name, coefficient in parts.items():
            low, high = _symbol_range(value.node.shape_env, atoms[name])
            total = space.add(total, space.size(name, low, high), coefficient)
        return total

    def holder(self, name: str) -> tuple[int, fx.Node, int] | None:
        """``(sign, node, const)`` such that the symbol is ``sign * (node - const)``."""
        return self._holders.get(name)


def _decompose(expr: Any, factor: int, parts: dict[str, int], atoms: dict[str, Any], shape_env: Any) -> int:
    """Collect ``factor * expr`` (sympy) as coefficients by symbol; returns the constant."""
    if expr.is_Integer:
        return factor * int(expr)
    if expr.is_Add:
        return sum(_decompose(term, factor, parts, atoms, shape_env) for term in expr.args)
    if expr.is_Mul and expr.args[0].is_Integer and len(expr.args) == 2:
        return _decompose(expr.args[1], factor * int(expr.args[0]), parts, atoms, shape_env)
    decided = _decided(expr, shape_env)
    if decided is not None:
        return _decompose(decided, factor, parts, atoms, shape_env)
    parts[str(expr)] = parts.get(str(expr), 0) + factor
    atoms[str(expr)] = expr
    return 0


def _decided(expr: Any, shape_env: Any) -> Any:
    """The argument that a ``Max`` or ``Min`` always is, as far as the ranges of the symbols tell; None for others.

    A sliding cache starts its mask at ``Max(0, length - window + 1)``: the guard that says whether the window is full
    decides which one it is.
    """
    sign = {"Max": 1, "Min": -1}.get(type(expr).__name__)
    if sign is None:
        return None
    for winner in expr.args:
        lows = [_symbol_range(shape_env, sign * (winner - other))[0] for other in expr.args]
        if all(low is not None and low >= 0 for low in lows):
            return winner
    return None


def _symbol_range(shape_env: Any, expr: Any) -> tuple[int | None, int | None]:
    try:
        found = shape_env.bound_sympy(expr)
        low, high = (int(end) if end.is_Integer else None for end in (found.lower, found.upper))
    except Exception:  # a range only sharpens the proof
        return None, None
    return low, high
