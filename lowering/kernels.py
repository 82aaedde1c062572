"""Every kernel, in order of preference."""

from __future__ import annotations

from lz_compile.lowering import aten, cpu, tables, triton
from lz_compile.region import Kernel

KERNELS: list[Kernel] = [
    triton.SPLIT_KV,
    aten.SDPA,
    cpu.RANGES,
    triton.TILED,
    aten.SDPA_MASKED,
    tables.STORED,
]
