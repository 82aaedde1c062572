"""Triton kernels that find the boundary of a top-k or top-p filter without a sort (see ``lowering.sampling_ops``).

Enter: pointers and numbers that ``lowering.sampling_ops`` prepares; scores ``[B, V]`` in float32, their last stride 1.
Leave: sums, boundaries and filtered scores in memory that the caller has allocated.

A float's bits, with those below the sign turned over where it is negative, order as the float does.  Each pass cuts the
range of bits that holds a row's boundary into :data:`PARTS`: several programs a row add up, for each part, the weights
of the scores in it, and every program of the next pass finds the part in which the sum from below passes the limit.
The last pass has parts of one value.  Nothing is compared but bits, so that ties and infinities need no case of their
own, and sums run in a fixed order, so that results do not change from call to call: up to 64 weights in float32, whose
sums are added up in float64.

No `from __future__ import annotations` here: Triton and Inductor read the annotations of a kernel.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# Parts of a range of bits in one pass.
PARTS = tl.constexpr(32)
# How far a sum of eager's may be from ours, of the limit; see ``lowering.sampling_ops``.
DOUBT = tl.constexpr(2e-6)


@triton.jit
def ordered(x):
    """Integers from 0 on that order as the floats do; both zeros are one, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    turned = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    turned = tl.where(x != x, 0x7FFFFFFF, turned)
    return turned.to(tl.int64) + 2147483648


@triton.jit
def passed(sums, low, base, limit, wide):
    """The part in which the sum from below passes the limit: its index, its lowest value, and the sum below it.

    ``sums`` [SPLITS, PARTS] are those of the range from ``low`` on, in parts of ``2 ** wide`` values, ``base`` that
    below it.
    """
    part = tl.arange(0, PARTS)
    weight = tl.sum(sums, 0)
    index = tl.sum((base + tl.cumsum(weight, 0) <= limit).to(tl.int32), 0)
    index = tl.minimum(index, PARTS - 1)
    below = tl.sum(tl.where(part < index, weight, 0.0), 0)
    return index, low + (index.to(tl.int64) << wide), base + below


@triton.jit
def largest_kernel(scores, out, size, stride, CHUNK: tl.constexpr, OUTER: tl.constexpr, SPLITS: tl.constexpr):
    """``out[row, split]`` is the largest score of a chunk; infinity where a NaN is among them."""
    split = tl.program_id(0)
    row = tl.program_id(1)
    line = scores + row.to(tl.int64) * stride
    best = tl.full([OUTER], float("-inf"), tl.float32)
    for start in range(0, CHUNK, OUTER):
        column = split * CHUNK + start + tl.arange(0, OUTER)
        x = tl.load(line + column, mask=column < size, other=float("-inf"))
        best = tl.maximum(best, tl.where(x != x, float("inf"), x))
    tl.store(out + row * SPLITS + split, tl.max(best, 0))


@triton.jit
def pass_kernel(
    scores,
    largest,
    sums,
    total,
    lows,
    bases,
    new_sums,
    new_total,
    new_lows,
    new_bases,
    size,
    stride,
    share,
    fewer,
    wide,
    shift,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One pass: ``sums``, ``total``, ``lows`` and ``bases`` are those of the pass before, of whose parts one is this
    one's range.  Parts hold ``2 ** shift`` values, those of the pass before ``2 ** wide``.

    The limit is ``share`` of a row's total weight, or without weights ``fewer``, and each score then weighs one.  A
    program looks at OUTER scores at once, and adds those up, BLOCK at a time, only where one lies in the range.
    """
    split = tl.program_id(0)
    row = tl.program_id(1)
    every = tl.arange(0, SPLITS)
    part = tl.arange(0, PARTS)
    before = tl.load(sums + (row * SPLITS + every[:, None]) * PARTS + part[None, :])
    low = tl.load(lows + row)
    base = tl.load(bases + row)
    top = tl.max(tl.load(largest + row * SPLITS + every), 0)
    if WEIGHTED:
        limit = tl.sum(tl.load(total + row * SPLITS + every), 0) * share
    else:
        limit = fewer * 1.0
    _, low, base = passed(before, low, base, limit, wide)
    line = scores + row.to(tl.int64) * stride
    weighed = tl.zeros([OUTER], tl.float32)
    found = tl.zeros([BLOCK, PARTS], tl.float32)
    for start in range(0, CHUNK, OUTER):
        column = split * CHUNK + start + tl.arange(0, OUTER)
        exists = column < size
        x = tl.load(line + column, mask=exists, other=float("-inf"))
        if WEIGHTED:
            weighed += tl.where(exists, tl.exp(x - top), 0.0)
        index = (ordered(x) - low) >> shift
        inside = exists & (index >= 0) & (index < PARTS)
        if tl.max(inside.to(tl.int32), 0) > 0:
            for inner in range(0, OUTER, BLOCK):
                at = split * CHUNK + start + inner + tl.arange(0, BLOCK)
                value = tl.load(line + at, mask=at < size, other=float("-inf"))
                part_of = (ordered(value) - low) >> shift
                counts = (at < size) & (part_of >= 0) & (part_of < PARTS)
                place = tl.where(counts, part_of, -1).to(tl.int32)
                if WEIGHTED:
                    weight = tl.exp(value - top)
                else:
                    weight = tl.full([BLOCK], 1.0, tl.float32)
                found += tl.where(place[:, None] == part[None, :], weight[:, None], 0.0)
    # Few enough terms an element for float32: in float64 from here on.
    tl.store(new_sums + (row * SPLITS + split) * PARTS + part, tl.sum(found.to(tl.float64), 0))
    tl.store(new_total + row * SPLITS + split, tl.sum(weighed.to(tl.float64), 0))
    # All splits store the same.
    tl.store(new_lows + row, low)
    tl.store(new_bases + row, base)


@triton.jit
def apply_kernel(
    scores,
    largest,
    sums,
    total,
    lows,
    bases,
    out,
    doubts,
    size,
    stride,
    share,
    fewer,
    fill,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTER: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """``out`` [B, V], contiguous: ``scores`` without what lies below the boundary; ``doubts[row]`` is 1 where rounding
    may have decided it.

    With weights, of the values that equal the boundary the first ones in the row go, as many as the limit asks for.  A
    row that holds NaN or infinity, or nothing but -inf, stays as it is.
    """
    split = tl.program_id(0)
    row = tl.program_id(1)
    every = tl.arange(0, SPLITS)
    part = tl.arange(0, PARTS)
    before = tl.load(sums + (row * SPLITS + every[:, None]) * PARTS + part[None, :])
    low = tl.load(lows + row)
    base = tl.load(bases + row)
    top = tl.max(tl.load(largest + row * SPLITS + every), 0)
    if WEIGHTED:
        limit = tl.sum(tl.load(total + row * SPLITS + every), 0) * share
    else:
        limit = fewer * 1.0
    index, edge, base = passed(before, low, base, limit, 0)
    gone = 0
    earlier = 0
    if WEIGHTED:
        turned = (edge - 2147483648).to(tl.int32)
        value = tl.where(turned < 0, turned ^ 0x7FFFFFFF, turned).to(tl.float32, bitcast=True)
        weight = tl.exp(value - top).to(tl.float64)
        finite = (top < float("inf")) & (top > float("-inf"))
        # Weights of equal scores are equal: their sum says how many there are.
        equal = tl.where(finite, tl.sum(tl.where(part[None, :] == index, before, 0.0), 1) / weight, 0.0)
        equal = tl.floor(equal + 0.5)
        ties = tl.where(finite, (limit - base) / weight, 0.0)
        gone = tl.minimum(ties, tl.sum(equal, 0) - 1.0).to(tl.int32)
        gone = tl.maximum(gone, 0)
        earlier = tl.sum(tl.where(every < split, equal, 0.0), 0).to(tl.int32)
        under = limit - (base + gone * weight)
        over = base + (gone + 1) * weight - limit
        doubt = finite & (tl.minimum(under, over) <= limit * DOUBT)
        tl.store(doubts + row, doubt.to(tl.int32))
        edge = tl.where(finite, edge, 0)
    line = scores + row.to(tl.int64) * stride
    into = out + row.to(tl.int64) * size
    for start in range(0, CHUNK, OUTER):
        column = split * CHUNK + start + tl.arange(0, OUTER)
        exists = column < size
        x = tl.load(line + column, mask=exists, other=float("-inf"))
        key = ordered(x)
        removed = key < edge
        if WEIGHTED:
            tied = (exists & (key == edge)).to(tl.int32)
            rank = earlier + tl.cumsum(tied, 0)
            removed = removed | ((tied > 0) & (rank <= gone))
            earlier += tl.sum(tied, 0)
        else:
            removed = removed & (edge < 4294967295)  # nothing is less than NaN
        tl.store(into + column, tl.where(removed, fill, x), mask=exists)
