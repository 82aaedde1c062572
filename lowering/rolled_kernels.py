"""The Triton kernel of ``lowering.rolled``: moves every row of a window one up, in place.

No `from __future__ import annotations` here: Triton and Inductor read the annotations of a kernel.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def roll_kernel(
    cache,
    last,
    rows,
    size,
    heads,
    stride_cb,
    stride_ch,
    stride_cr,
    stride_cd,
    stride_lb,
    stride_lh,
    stride_ls,
    stride_ld,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program moves one segment of ROWS rows: it holds all of them before it writes any, and takes its last row
    from ``last``, since the segment behind it may have moved already."""
    segment = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch, head = head // heads, head % heads
    cache += batch * stride_cb + head * stride_ch
    last += batch * stride_lb + head * stride_lh + segment * stride_ls
    row = tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    inside = column < size
    count = tl.minimum(rows - segment * ROWS, ROWS)
    place = cache + (segment * ROWS + row)[:, None].to(tl.int64) * stride_cr + column[None, :] * stride_cd
    moved = tl.load(place + stride_cr, mask=(row < count - 1)[:, None] & inside[None, :], other=0.0)
    final = tl.load(last + column * stride_ld, mask=inside, other=0.0)
    values = tl.where((row == count - 1)[:, None], final[None, :], moved)
    tl.debug_barrier()
    tl.store(place, values, mask=(row < count)[:, None] & inside[None, :])
