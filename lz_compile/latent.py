"""Latent attention: keys and values that are a linear map of a few numbers a token (DeepSeek-AI, "DeepSeek-V2", 2024).

The vocabulary between :mod:`lz_compile.patterns.latent`, which finds them, and :mod:`lz_compile.lowering.latent`, which
has queries attend to the latents themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from lz_compile.region import Region


@dataclass(frozen=True)
class Latent:
    """An attention whose keys and values are made of latents in front of it.

    ``latents`` is ``[B, 1, N, R]`` or ``[B, N, R]`` and ``weight`` ``[H * C, R]``, so that ``latents @ weight^T`` holds
    ``C = width`` columns for each of ``H`` heads: ``keys`` and ``values`` (first, count) are those of either.
    ``rotated`` ``[B, 1, N, P]`` is the rest of each key, the same for all heads.  The writes that put the two parts of
    a key into one tensor are among the region's nodes.
    """

    region: Region
    latents: fx.Node
    weight: fx.Node
    rotated: fx.Node
    keys: tuple[int, int]
    values: tuple[int, int]
    width: int
