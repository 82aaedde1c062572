"""What a chain of filters over next-token scores means: the operator of a region of kind ``sampling``.

:mod:`lz_compile.lowering.sampling` says what it computes, in plain torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.fx as fx

Kind = Literal["temperature", "repetition_penalty", "top_k", "top_p", "min_p", "typical", "epsilon"]


@dataclass(frozen=True)
class Filter:
    """One step over scores ``[B, V]``; what it removes becomes ``fill``.

    ``value`` is a number, or a graph value (a 0-d tensor, or a symbolic number) known at run time only:

    - ``temperature``: scores are divided by it;
    - ``repetition_penalty``: scores of the tokens in ``ids`` ``[B, L]`` are multiplied with it where negative, divided
      by it elsewhere, once for each token; ids of V and more name no score;
    - ``top_k``: what is less than the ``value``-th largest score goes (Fan et al., 2018): ties with it stay;
    - ``top_p``: in ascending order, what has a cumulative probability of ``value`` (one minus top-p) or less goes
      (Holtzman et al., 2020): of ties the first ones in the row;
    - ``min_p``: what is less likely than ``value`` times the likeliest goes (Nguyen et al., 2024);
    - ``typical``: ordered by how far a score's information is from the entropy, what lies farther than the score at
      which the cumulative probability reaches ``value`` goes (Meister et al., 2022);
    - ``epsilon``: what is less likely than ``value`` goes (Hewitt et al., 2022).

    ``keep`` tokens at least stay: the last of the ascending order, of ``typical`` the first of its order.
    """

    kind: Kind
    value: float | fx.Node
    keep: int = 1
    fill: float = -math.inf
    ids: fx.Node | None = None

    def __str__(self) -> str:
        if self.kind in ("temperature", "repetition_penalty"):  # runs alike whatever its number
            return self.kind
        value = "?" if isinstance(self.value, fx.Node) else f"{self.value:g}"
        more = f" keep {self.keep}" if self.keep != 1 else ""
        return f"{self.kind} {value}{more}" + ("" if self.fill == -math.inf else f" fill {self.fill:g}")


@dataclass(frozen=True)
class Sampling:
    """``filters`` in their order over ``scores`` ``[B, V]``, floating; the result has its shape and dtype, contiguous.

    ``form`` is the chain as text: what a measurement of it holds for.
    """

    scores: fx.Node
    filters: tuple[Filter, ...]
    form: str

    def nodes(self) -> tuple[fx.Node, ...]:
        """The graph values that enter, each once, ``scores`` first."""
        more = [node for step in self.filters for node in (step.value, step.ids) if isinstance(node, fx.Node)]
        return tuple(dict.fromkeys([self.scores, *more]))
