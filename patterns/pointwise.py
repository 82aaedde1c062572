"""The families of regions beside attention, by kind: what to look for where some kernel could run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.glu import find_glus
from lz_compile.patterns.norms import find_rms_norms
from lz_compile.patterns.rope import find_ropes
from lz_compile.region import Region

Finder = Callable[[fx.Graph, Aliases, Callable[[fx.Node], Any]], list[Region]]

POINTWISE: dict[str, Finder] = {"rms_norm": find_rms_norms, "glu": find_glus, "rope": find_ropes}
