"""Triton kernels of a mixture of experts for few tokens (see ``lowering.moe`` for what it computes).

Enter: pointers, and sizes and strides as constants, that ``lowering.moe_ops`` prepares; any strides.  Leave: results in
memory that the caller has allocated.

With few tokens the experts' weights are all that costs: each program streams one tile of columns of one expert once and
multiplies it with the rows of the tokens that chose this expert.  Which they are it reads from the indices itself, so
that nothing is sorted, no host is asked, and the grid depends on shapes only.  A program whose expert nobody chose ends
at once.

No `from __future__ import annotations` here: Triton and Inductor read the annotations of a kernel.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# Values of ACTIVATION.
SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)

# Values of PARTS: the columns of the first product are one part, gate and up as halves, or as even and odd columns.
WHOLE = tl.constexpr(1)
HALVES = tl.constexpr(2)
INTERLEAVED = tl.constexpr(3)


@triton.jit
def place_of(chosen, expert, slot, BY_PAIR: tl.constexpr, TOP_K: tl.constexpr):
    """For each token which of its choices ``expert`` is, -1 when it is none of them; ``chosen`` [ROWS, CHOICES] are the
    experts of all tokens.

    A slot is an expert, or with BY_PAIR a pair of token and choice: then the first pair with an expert runs it for all.
    """
    token = tl.arange(0, chosen.shape[0])
    choice = tl.arange(0, chosen.shape[1])
    place = tl.max(tl.where(chosen == expert, choice[None, :], -1), 1)
    if BY_PAIR:
        first = tl.min(tl.where(place >= 0, token * TOP_K + place, 1 << 30), 0)
        place = tl.where(first == slot, place, -1)
    return place


@triton.jit
def product(
    rows,
    used,
    weight,
    column,
    inside,
    first,
    last,
    DEPTH: tl.constexpr,
    STRIDE_XK: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x @ weight`` over blocks ``first`` to ``last`` of the depth, in float32; ``rows`` points to the rows of ``x``,
    of which only ``used`` ones are read, ``column`` and ``inside`` are the columns of ``weight`` ``[DEPTH, N]``."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(first, last):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask = used[:, None]
        w_mask = inside[None, :]
        if DEPTH % BLOCK_K != 0:
            x_mask = x_mask & (k < DEPTH)[None, :]
            w_mask = w_mask & (k < DEPTH)[:, None]
        x = tl.load(rows[:, None] + k[None, :] * STRIDE_XK, mask=x_mask, other=0.0)
        w = tl.load(weight + k[:, None] * STRIDE_WK + column[None, :] * STRIDE_WN, mask=w_mask, other=0.0)
        total = tl.dot(x.to(w.dtype), w, total, input_precision=PRECISION)
    return total


@triton.jit
def activate(x, alpha, ACTIVATION: tl.constexpr):
    """An activation function of float32 values; NaN stays NaN."""
    if ACTIVATION == SILU:
        return x * tl.sigmoid(alpha * x)
    elif ACTIVATION == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(z)) / 2 is sigmoid(2 z).
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def gate_up_kernel(
    hidden,
    indices,
    weight,
    bias,
    out,
    alpha,
    limit,
    up_offset,
    TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PAIR: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STRIDE_XT: tl.constexpr,
    STRIDE_XK: tl.constexpr,
    STRIDE_IT: tl.constexpr,
    STRIDE_IK: tl.constexpr,
    STRIDE_WE: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_BE: tl.constexpr,
    STRIDE_BN: tl.constexpr,
):
    """``out[t * K + k] = act(hidden[t] @ weight[e] + bias[e])``, ``out`` [T * K, WIDTH] contiguous.

    COLUMNS are those of the first product: a program makes COLUMNS of WIDTH, or half as many where there is a gate.
    """
    slot = tl.program_id(1)
    token = tl.arange(0, ROWS)
    choice = tl.arange(0, CHOICES)
    # Loads whose values lead to addresses stand in the kernel itself: behind a call of a function Inductor takes what
    # they read for written, and copies it.
    exists = (token < TOKENS)[:, None] & (choice < TOP_K)[None, :]
    chosen = tl.load(indices + token[:, None] * STRIDE_IT + choice[None, :] * STRIDE_IK, mask=exists, other=-1)
    expert = slot
    if BY_PAIR:
        expert = tl.load(indices + (slot // TOP_K) * STRIDE_IT + (slot % TOP_K) * STRIDE_IK).to(tl.int32)
    place = place_of(chosen.to(tl.int32), expert, slot, BY_PAIR, TOP_K)
    if tl.max(place, 0) >= 0:
        used = place >= 0
        j = tl.arange(0, COLUMNS)
        UNITS: tl.constexpr = COLUMNS if PARTS == WHOLE else COLUMNS // 2
        if PARTS == HALVES:
            unit = tl.program_id(0) * UNITS + j % UNITS
            column = unit + (j // UNITS) * WIDTH
            inside = unit < WIDTH
        else:
            column = tl.program_id(0) * COLUMNS + j
            inside = column < (WIDTH if PARTS == WHOLE else 2 * WIDTH)
        y = product(
            hidden + token * STRIDE_XT,
            used,
            weight + expert.to(tl.int64) * STRIDE_WE,
            column,
            inside,
            0,
            (HIDDEN + BLOCK_K - 1) // BLOCK_K,
            HIDDEN,
            STRIDE_XK,
            STRIDE_WK,
            STRIDE_WN,
            ROWS,
            COLUMNS,
            BLOCK_K,
            PRECISION,
        )
        if HAS_BIAS:
            b = tl.load(bias + expert.to(tl.int64) * STRIDE_BE + column * STRIDE_BN, mask=inside, other=0.0)
            y += b.to(tl.float32)[None, :]
        if PARTS == HALVES:
            gate, up = tl.split(tl.permute(tl.reshape(y, [ROWS, 2, UNITS]), [0, 2, 1]))
        elif PARTS == INTERLEAVED:
            gate, up = tl.split(tl.reshape(y, [ROWS, UNITS, 2]))
        if PARTS == WHOLE:
            y = activate(y, alpha, ACTIVATION)
        else:
            if HAS_LIMIT:
                gate = tl.where(gate > limit, limit, gate)
                up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
            y = activate(gate, alpha, ACTIVATION) * (up + up_offset)
        unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
        to = out + (token * TOP_K + place)[:, None] * WIDTH + unit[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=used[:, None] & (unit < WIDTH)[None, :])


@triton.jit
def down_kernel(
    act,
    weights,
    indices,
    weight,
    bias,
    out,
    TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PAIR: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STRIDE_RT: tl.constexpr,
    STRIDE_RK: tl.constexpr,
    STRIDE_IT: tl.constexpr,
    STRIDE_IK: tl.constexpr,
    STRIDE_WE: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_BE: tl.constexpr,
    STRIDE_BN: tl.constexpr,
):
    """``weights[t, k] * (act[t * K + k] @ weight[e] + bias[e])`` in float32, ``out`` [T, K, SPLITS, HIDDEN] contiguous.

    Each split sums over a part of WIDTH, and the first one adds the bias.
    """
    split = tl.program_id(0) % SPLITS
    slot = tl.program_id(1)
    token = tl.arange(0, ROWS)
    choice = tl.arange(0, CHOICES)
    # Loads whose values lead to addresses stand in the kernel itself: behind a call of a function Inductor takes what
    # they read for written, and copies it.
    exists = (token < TOKENS)[:, None] & (choice < TOP_K)[None, :]
    chosen = tl.load(indices + token[:, None] * STRIDE_IT + choice[None, :] * STRIDE_IK, mask=exists, other=-1)
    expert = slot
    if BY_PAIR:
        expert = tl.load(indices + (slot // TOP_K) * STRIDE_IT + (slot % TOP_K) * STRIDE_IK).to(tl.int32)
    place = place_of(chosen.to(tl.int32), expert, slot, BY_PAIR, TOP_K)
    if tl.max(place, 0) >= 0:
        used = place >= 0
        pair = token * TOP_K + place
        column = (tl.program_id(0) // SPLITS) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < HIDDEN
        BLOCKS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
        SHARE: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
        y = product(
            act + pair * WIDTH,
            used,
            weight + expert.to(tl.int64) * STRIDE_WE,
            column,
            inside,
            split * SHARE,
            tl.minimum(split * SHARE + SHARE, BLOCKS),
            WIDTH,
            1,
            STRIDE_WK,
            STRIDE_WN,
            ROWS,
            COLUMNS,
            BLOCK_K,
            PRECISION,
        )
        if HAS_BIAS:
            at = bias + expert.to(tl.int64) * STRIDE_BE + column * STRIDE_BN
            b = tl.load(at, mask=inside & (split == 0), other=0.0)
            y += b.to(tl.float32)[None, :]
        share = tl.load(weights + token * STRIDE_RT + place * STRIDE_RK, mask=used, other=0.0)
        to = out + (pair * SPLITS + split)[:, None] * HIDDEN + column[None, :]
        tl.store(to, y * share.to(tl.float32)[:, None], mask=used[:, None] & inside[None, :])
