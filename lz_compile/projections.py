"""Linear layers of one module that read the same value: the operator of a region of kind ``projections``."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx


@dataclass(frozen=True)
class Projections:
    """``input @ weight^T + bias`` for each of several weights: q, k and v of an attention, gate and up of an MLP.

    ``input`` is ``[..., K]``; ``weights`` are parameters ``[N_i, K]`` and ``biases`` parameters ``[N_i]``, one for each
    weight or none at all.  All have one dtype and device.  ``members`` are the calls whose values these are, in the
    order of the weights; the value of the region on its own is their concatenation ``[..., sum(N_i)]``.
    """

    input: fx.Node
    weights: tuple[fx.Node, ...]
    biases: tuple[fx.Node, ...]
    members: tuple[fx.Node, ...]

    @property
    def sizes(self) -> list[int]:
        """``N_i``: how many features each weight gives."""
        return [weight.meta["val"].shape[0] for weight in self.weights]
