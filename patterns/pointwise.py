"""The families of regions beside attention, by kind: what to look for where some kernel could run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.glu import find_glus
from lz_compile.patterns.moe import find_moes
from lz_compile.patterns.norms import find_rms_norms
from lz_compile.patterns.rope import find_ropes
from lz_compile.patterns.sampling import find_samplings
from lz_compile.region import Region

Finder = Callable[[fx.Graph, Aliases, Callable[[fx.Node], Any]], list[Region]]

POINTWISE: dict[str, Finder] = {
    "rms_norm": find_rms_norms,
    "glu": find_glus,
    "rope": find_ropes,
    "moe": find_moes,
    "sampling": find_samplings,
}

# Whole blocks, which hold regions of other kinds.
BLOCKS = frozenset({"moe"})


def spans(regions: Sequence[Region]) -> None:
    """Sets ``covers`` of regions that hold whole blocks: those of the others that lie inside and may be replaced."""
    for region in regions:
        if region.kind in BLOCKS and not region.declined:
            inside = set(region.nodes) - {region.output}
            region.covers = tuple(other for other in regions if other.output in inside and not other.declined)
