"""What a block of routed experts means: the operator of a region of kind ``moe``, over graph values.

:mod:`lz_compile.lowering.moe` says what it computes, in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.fx as fx

from lz_compile.pointwise import Activation

Layout = Literal["out, in", "in, out"]
Scores = Literal["softmax", "softmax over the top-k", "sigmoid", "logits", "unknown"]


@dataclass(frozen=True)
class Router:
    """What made the weights of the top-k, for reports and for kernels that take the router too; not in the region.

    ``scores`` are the weights' function of the logits, ``normalised`` says that the weights of a token are divided by
    their sum, ``scale`` is what they are multiplied with after that.
    """

    scores: Scores
    normalised: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Moe:
    """``sum over k of weights[t, k] * down[e] @ act(gate_up[e] @ hidden[t])`` with ``e = indices[t, k]``: a mixture of
    experts behind its router (Shazeer et al., 2017).  The result is ``[T, H]`` in the dtype of ``hidden``.

    ``hidden`` is ``[T, H]``, ``weights`` floating ``[T, K]``, ``indices`` integer ``[T, K]``, proved to lie in
    ``[0, experts)`` and to differ within a row.  ``gate_up`` is ``[experts, 2F, H]`` where its layout is ``"out, in"``,
    as in ``nn.Linear``, ``[experts, H, 2F]`` where it is ``"in, out"``; ``down`` is ``[experts, H, F]`` or
    ``[experts, F, H]``.  Without a gate (``gated`` is False) the first has F in place of 2F, ``F = intermediate``.
    ``gate_up_bias`` is ``[experts, 2F]`` and ``down_bias`` ``[experts, H]``, or None.  Products run in the dtype of the
    expert weights, to which ``hidden`` is cast.

    Gate and up are the halves of the first product, or its even and odd columns where ``interleaved``.  The expert's
    activation is ``act(gate) * (up + up_offset)``, or ``act`` alone.  With ``limit`` the gate is cut off above it and
    up on both sides (GPT-OSS); ``"silu"`` is ``gate * sigmoid(alpha * gate)``.

    ``implementation`` is how the graph had it: ``"grouped_mm"`` sorts the pairs of token and expert, ``"batched_mm"``
    gathers the weights of each pair.
    """

    hidden: fx.Node
    weights: fx.Node
    indices: fx.Node
    gate_up: fx.Node
    down: fx.Node
    gate_up_bias: fx.Node | None
    down_bias: fx.Node | None
    experts: int
    top_k: int
    intermediate: int
    activation: Activation
    gated: bool
    interleaved: bool
    alpha: float
    limit: float | None
    up_offset: float
    gate_up_layout: Layout
    down_layout: Layout
    implementation: Literal["grouped_mm", "batched_mm"]
    router: Router
