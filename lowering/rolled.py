"""The step of a full sliding cache in one pass over its memory.

Past its window a sliding cache gives up its first row for a new one: ``cache.copy_(cache.roll(-1, 2))`` with the last
row replaced.  Inductor makes a rolled copy of the whole window and copies it back, so the window crosses memory four
times a step before attention reads it.  :func:`shift_in` moves the rows in place, which crosses it twice; the state
afterwards is the same, bit for bit.  Attention itself reads the cache and no copy of it either way.
"""

import sys
from typing import Any

import torch
import torch.fx as fx
from torch.library import triton_op, wrap_triton

try:
    # By name: torch finds the kernels of a triton_op in this module's names and puts their sources in its cache keys.
    from .rolled_kernels import roll_kernel
except ImportError:
    _has_triton = False
else:
    _has_triton = True

aten = torch.ops.aten

# Rows that one program holds in registers: 64 x 128 values are 64 a thread of 128.
SEGMENT = 64
MAX_SIZE = 256


@triton_op("lz_compile::roll_window_v1", mutates_args={"cache"})
def roll_window_v1(cache: torch.Tensor, last: torch.Tensor) -> None:
    """Moves the rows of ``cache`` ``[B, H, W, D]``, any strides, one up inside segments of :data:`SEGMENT` rows.

    ``last`` ``[B, H, ceil(W / SEGMENT), D]`` is what the last row of each segment becomes; it shares no memory with
    ``cache``.
    """
    batch, heads, rows, size = cache.shape
    grid = (-(-rows // SEGMENT), batch * heads)
    wrap_triton(roll_kernel)[grid](
        cache,
        last,
        rows,
        size,
        heads,
        *cache.stride(),
        *last.stride(),
        ROWS=SEGMENT,
        SIZE=1 << (size - 1).bit_length(),
        num_warps=4,
    )


@roll_window_v1.register_fake
def _fake(cache: torch.Tensor, last: torch.Tensor) -> None:
    """It returns nothing; Triton's interpreter, which tests use, could not run on fake tensors."""


def takes(cache: torch.Tensor) -> bool:
    """True when :func:`shift_in` runs on a cache like this one: on CUDA, with static sizes and heads of up to 256."""
    if not _has_triton or cache.device.type != "cuda" or not all(isinstance(size, int) for size in cache.shape):
        return False
    batch, heads, rows, size = cache.shape
    floating = cache.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return floating and rows > 1 and 0 < size <= MAX_SIZE and 0 < batch * heads < 1 << 16


def shift_in(emitter: Any, anchor: fx.Node, cache: fx.Node, new: fx.Node) -> None:
    """Inserts, in front of ``anchor``, the write that drops the first row of ``cache`` and puts ``new`` last."""
    call = emitter.call
    firsts = call(anchor, aten.slice.Tensor, cache, 2, SEGMENT, sys.maxsize, SEGMENT)
    last = call(anchor, aten.cat.default, [firsts, new], 2)
    call(anchor, torch.ops.lz_compile.roll_window_v1.default, cache, last)
