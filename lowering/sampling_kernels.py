"""Triton kernels that find the boundary of a top-k or top-p filter without a sort (see ``lowering.sampling_ops``).

Enter: pointers and numbers that ``lowering.sampling_ops`` prepares; scores ``[B, V]`` in float32, their last stride 1.
Leave: sums, boundaries and filtered scores in memory that the caller has allocated.

A float's bits, with those below the sign turned over where it is negative, order as the float does.  Each pass cuts the
range of bits that holds a row's boundary into :data:`PARTS`: several programs a row add up, for each part, the weights
of all scores below its end, and every program of the next pass finds the first part at whose end the sum passes the
limit.  The last pass has parts of one value.  Nothing is compared but bits, so that ties and infinities need no case of
their own, and sums run in a fixed order, so that results do not change from call to call: up to :data:`STEPS` weights
in float32, whose sums are added up in float64.

No `from __future__ import annotations` here: Triton and Inductor read the annotations of a kernel.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# Parts of a range of bits in one pass; ``pass_kernel`` has a sum for each of 16.
PARTS = tl.constexpr(16)
# A row of what a pass leaves: sums at the ends of the parts, that in front of them, and that of the whole row.
BASE = tl.constexpr(16)
TOTAL = tl.constexpr(17)
STATE = tl.constexpr(18)
# Weights that one lane adds up in float32.
STEPS = tl.constexpr(16)
# How far a sum of eager's may be from ours, of the limit; see ``lowering.sampling_ops``.
DOUBT = tl.constexpr(2e-6)
# Bits count from 0 in memory and from here in registers, where they are compared.
LEAST = tl.constexpr(-2147483648)


@triton.jit
def ordered(x):
    """Integers from ``LEAST`` on that order as the floats do; both zeros are one, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    turned = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, turned)


@triton.jit
def limit_of(before, every, share, fewer, WEIGHTED: tl.constexpr):
    """What the weights below the boundary may not pass: a share of all, or a number of scores."""
    if WEIGHTED:
        limit = tl.sum(tl.load(before + every * STATE + TOTAL), 0) * share
    else:
        limit = fewer * 1.0
    return limit


@triton.jit
def passed(before, every, limit):
    """The part in which the sum from below passes the limit, and for each program the sums at its start and end.

    ``before`` points at the row's sums, [SPLITS, STATE].
    """
    part = tl.arange(0, PARTS)
    ends = tl.load(before + every[:, None] * STATE + part[None, :])
    index = tl.sum((tl.sum(ends, 0) <= limit).to(tl.int32), 0)
    index = tl.minimum(index, PARTS - 1)
    start = tl.load(before + every * STATE + tl.where(index == 0, BASE, index - 1))
    end = tl.load(before + every * STATE + index)
    return index, start, end


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
def below(key, weight, low, shift, PART: tl.constexpr):
    """The weights of the keys below the end of a part; others are zero.  Parts hold ``2 ** shift`` keys."""
    last = low + ((tl.full([], PART + 1, tl.int64)) << shift) - 1 + LEAST
    return tl.where(key <= last.to(tl.int32), weight, 0.0)


@triton.jit
def pass_kernel(
    scores,
    largest,
    sums,
    lows,
    new_sums,
    new_lows,
    size,
    stride,
    share,
    fewer,
    wide,
    shift,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTER: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One pass: ``sums`` and ``lows`` are those of the pass before, of whose parts one is this one's range.  Parts hold
    ``2 ** shift`` values, those of the pass before ``2 ** wide``; the first pass, with ``wide`` 32, reads neither.

    The limit is ``share`` of a row's total weight, or without weights ``fewer``, and each score then weighs one.  A
    program looks at OUTER scores at once.
    """
    split = tl.program_id(0)
    row = tl.program_id(1)
    every = tl.arange(0, SPLITS)
    before = sums + row * SPLITS * STATE
    top = tl.max(tl.load(largest + row * SPLITS + every), 0)
    index, start, _ = passed(before, every, limit_of(before, every, share, fewer, WEIGHTED))
    low = tl.load(lows + row) + (index.to(tl.int64) << wide)
    base = tl.sum(tl.where(every == split, start, 0.0), 0)
    if wide == 32:
        low = low * 0
        base = base * 0.0
    line = scores + row.to(tl.int64) * stride
    ends = tl.zeros([PARTS], tl.float64)
    total = tl.zeros([], tl.float64)
    for segment in range(0, CHUNK, STEPS * OUTER):
        # One accumulator a part, so that a lane compares and adds and nothing moves between lanes.
        s0 = tl.zeros([OUTER], tl.float32)
        s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15 = (
            s0, s0, s0, s0, s0, s0, s0, s0, s0, s0, s0, s0, s0, s0, s0,
        )  # fmt: skip
        whole = s0
        for begin in range(segment, min(segment + STEPS * OUTER, CHUNK), OUTER):
            column = split * CHUNK + begin + tl.arange(0, OUTER)
            exists = column < size
            x = tl.load(line + column, mask=exists, other=float("-inf"))
            key = ordered(x)
            if WEIGHTED:
                weight = tl.where(exists, tl.exp(x - top), 0.0)
            else:
                weight = exists.to(tl.float32)
            whole += weight
            s0 += below(key, weight, low, shift, 0)
            s1 += below(key, weight, low, shift, 1)
            s2 += below(key, weight, low, shift, 2)
            s3 += below(key, weight, low, shift, 3)
            s4 += below(key, weight, low, shift, 4)
            s5 += below(key, weight, low, shift, 5)
            s6 += below(key, weight, low, shift, 6)
            s7 += below(key, weight, low, shift, 7)
            s8 += below(key, weight, low, shift, 8)
            s9 += below(key, weight, low, shift, 9)
            s10 += below(key, weight, low, shift, 10)
            s11 += below(key, weight, low, shift, 11)
            s12 += below(key, weight, low, shift, 12)
            s13 += below(key, weight, low, shift, 13)
            s14 += below(key, weight, low, shift, 14)
            s15 += below(key, weight, low, shift, 15)
        # Joined so that the four new dimensions, in their order, are the bits of a part's number.
        even = tl.join(
            tl.join(tl.join(s0, s8), tl.join(s4, s12)),
            tl.join(tl.join(s2, s10), tl.join(s6, s14)),
        )
        odd = tl.join(
            tl.join(tl.join(s1, s9), tl.join(s5, s13)),
            tl.join(tl.join(s3, s11), tl.join(s7, s15)),
        )
        ends += tl.reshape(tl.sum(tl.join(even, odd).to(tl.float64), 0), [PARTS])
        total += tl.sum(whole.to(tl.float64), 0)
    mine = new_sums + (row * SPLITS + split) * STATE
    tl.store(mine + tl.arange(0, PARTS), ends)
    tl.store(mine + BASE, base)
    tl.store(mine + TOTAL, total)
    tl.store(new_lows + row, low)  # all splits store the same


@triton.jit
def apply_kernel(
    scores,
    largest,
    sums,
    lows,
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
    before = sums + row * SPLITS * STATE
    top = tl.max(tl.load(largest + row * SPLITS + every), 0)
    limit = limit_of(before, every, share, fewer, WEIGHTED)
    index, start, end = passed(before, every, limit)
    edge = (tl.load(lows + row) + index + LEAST).to(tl.int32)
    gone = 0
    earlier = 0
    if WEIGHTED:
        value = tl.where(edge < 0, edge ^ 0x7FFFFFFF, edge).to(tl.float32, bitcast=True)
        weight = tl.exp(value - top).to(tl.float64)
        finite = (top < float("inf")) & (top > float("-inf"))
        base = tl.sum(start, 0)
        # Weights of equal scores are equal: their sum says how many there are.
        equal = tl.where(finite, (end - start) / weight, 0.0)
        equal = tl.floor(equal + 0.5)
        ties = tl.where(finite, (limit - base) / weight, 0.0)
        gone = tl.minimum(ties, tl.sum(equal, 0) - 1.0).to(tl.int32)
        gone = tl.maximum(gone, 0)
        earlier = tl.sum(tl.where(every < split, equal, 0.0), 0).to(tl.int32)
        under = limit - (base + gone * weight)
        over = base + (gone + 1) * weight - limit
        doubt = finite & (tl.minimum(under, over) <= limit * DOUBT)
        tl.store(doubts + row, doubt.to(tl.int32))
        edge = tl.where(finite, edge, LEAST)
    line = scores + row.to(tl.int64) * stride
    into = out + row.to(tl.int64) * size
    for begin in range(0, CHUNK, OUTER):
        column = split * CHUNK + begin + tl.arange(0, OUTER)
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
            removed = removed & (edge < 0x7FFFFFFF)  # nothing is less than NaN
        tl.store(into + column, tl.where(removed, fill, x), mask=exists)
