"""Triton kernels of ``attend`` (see ``lowering.semantic`` for what the arguments mean).

Enter: pointers, strides and sizes that ``lowering.triton_ops`` prepares; the last dimension of query, key, value and
results has stride 1.  Leave: results in memory that the caller has allocated.

Every structured term of the mask narrows, for one query row, an interval of keys [first, stop).  So the kernels decide
from a few integers which key tiles to skip, which to compute without any mask, and which need a mask; only key
padding with holes, documents and dense masks have to be read key by key.

The methods are FlashAttention-2 (Dao 2023) for ``tiled_kernel``, Flash-Decoding (Dao et al. 2023) for ``split_kernel``.
No `from __future__ import annotations` here: Triton and Inductor read the annotations of a kernel.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Values of MASK_KIND.
BOOLEAN_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)
# Beside the kinds of masks: scores without any, for empty rows that attend as if there were no mask.
UNMASKED = tl.constexpr(3)

# Values of EMPTY_ROW, as in semantic.EMPTY_ROW.
EMPTY_MEAN = tl.constexpr(1)
EMPTY_NAN = tl.constexpr(2)
EMPTY_SAFE_MEAN = tl.constexpr(3)
EMPTY_UNMASKED = tl.constexpr(4)

# Values of MASKED.
NO_TILE = tl.constexpr(0)
EVERY_TILE = tl.constexpr(1)
TILES_OUTSIDE = tl.constexpr(2)

BOUND_COLUMNS = tl.constexpr(8)

# K and V of the heads that run at one time should stay in half of the H200's 50 MiB of L2.
L2_BUDGET = tl.constexpr(24 * 1024 * 1024)

# Document ids are a few bytes a key, so a scan over them takes large steps.
DOCUMENT_BLOCK = tl.constexpr(1024)


@triton.jit
def floor_divide(a, b):
    """``a // b`` rounded down: Triton's own division rounds towards zero."""
    remainder = a % b
    remainder = tl.where(remainder < 0, remainder + b, remainder)
    return (a - remainder) // b


@triton.jit
def row_interval(bounds, batch, query, keys, CHUNK: tl.constexpr, HAS_BOUNDS: tl.constexpr):
    """The keys [first, stop) that the structured terms leave to each query row, within [0, keys)."""
    if HAS_BOUNDS:
        row = bounds + batch * BOUND_COLUMNS
        upper = tl.load(row)
        lower = tl.load(row + 1)
        first = tl.maximum(query + lower, tl.load(row + 2))
        stop = tl.minimum(query + upper + 1, tl.load(row + 3))
        if CHUNK > 0:
            shift = tl.load(row + 4)
            origin = tl.load(row + 5)
            begin = origin + floor_divide(query + shift - origin, CHUNK) * CHUNK
            first = tl.maximum(first, begin)
            stop = tl.minimum(stop, begin + CHUNK)
        first = tl.maximum(first, 0)
        stop = tl.minimum(stop, keys)
    else:
        first = query * 0
        stop = query * 0 + keys
    return first, stop


@triton.jit
def key_mask_is_needed(bounds, batch, HAS_BOUNDS: tl.constexpr, HAS_KEY_MASK: tl.constexpr):
    """Whether ``key_mask`` must be read: it exists, and HOLES does not vouch for it."""
    needed = tl.full([], HAS_KEY_MASK, tl.int1)
    if HAS_KEY_MASK and HAS_BOUNDS:
        needed = tl.load(bounds + batch * BOUND_COLUMNS + 6) != 0
    return needed


@triton.jit
def load_tile(base, offsets, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile with zeros outside ``rows`` and ``columns``; without predicates where none are needed."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(base + offsets, mask=rows[:, None] & columns[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(base + offsets, mask=rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(base + offsets, mask=columns[None, :], other=0.0)
    else:
        tile = tl.load(base + offsets)
    return tile


@triton.jit
def shape_scores(scores, scale, softcap, SOFTCAP: tl.constexpr, MASK_KIND: tl.constexpr):
    """Dot products to what ``online_softmax`` takes.

    Without an additive mask the factor before the exponent (``scale``, or ``softcap`` after the tanh) is left to
    ``online_softmax``, where it is free; a bias has to be added to finished scores.
    """
    if SOFTCAP:
        scores = 1.0 - 2.0 / (1.0 + tl.exp(scores * (2.0 * scale / softcap)))
        if MASK_KIND == ADDITIVE_MASK:
            scores = scores * softcap
    elif MASK_KIND == ADDITIVE_MASK:
        scores = scores * scale
    return scores


@triton.jit
def lowest(dtype: tl.constexpr):
    """The most negative finite number of a float type, in float32: an additive mask hides a key where it holds it."""
    if dtype == tl.float16:
        value = -65504.0
    elif dtype == tl.bfloat16:
        value = -3.3895313892515355e38
    else:
        value = -3.4028234663852886e38
    return value


@triton.jit
def mask_scores(
    scores,
    key,
    stop_key,
    first,
    stop,
    key_mask,
    stride_key_mask,
    key_mask_needed,
    mask,
    mask_offsets,
    HAS_KEY_MASK: tl.constexpr,
    MASK_KIND: tl.constexpr,
):
    """Scores with the bias added, and -inf where a row does not see a key; nothing is read from ``stop_key`` on.

    ``mask`` points at the tile's first key; ``mask_offsets`` [rows, keys] do not change from tile to tile, and are
    worth keeping in 32 bits: in 64 they alone take a quarter of the registers of a 128 x 64 tile.
    """
    visible = (key[None, :] >= first[:, None]) & (key[None, :] < stop[:, None])
    inside = key < stop_key
    if HAS_KEY_MASK:
        shown = tl.load(key_mask + tl.cast(key, tl.int64) * stride_key_mask, mask=inside & key_mask_needed, other=True)
        visible = visible & shown[None, :]
    if MASK_KIND > 0:
        if MASK_KIND == BOOLEAN_MASK:
            # As bytes: a cast of the scalar pointer keeps what Triton knows of the addresses, one of a tile does not.
            shown_bytes = tl.load(mask.to(tl.pointer_type(tl.int8)) + mask_offsets, mask=inside[None, :], other=0)
            visible = visible & (shown_bytes != 0)
        else:
            bias = tl.load(mask + mask_offsets, mask=inside[None, :], other=0.0).to(tl.float32)
            visible = visible & (bias > lowest(mask.dtype.element_ty))
            scores = scores + bias
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def online_softmax(
    accumulator,
    row_max,
    row_sum,
    scores,
    v,
    factor,
    MASK_KIND: tl.constexpr,
    GUARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the streaming softmax.  GUARD: rows may have seen no key yet, and must not become NaN by it.

    ``row_max`` is in base-2 units without an additive mask, so that factor and subtraction are one FMA, and in the
    scores' own units with one: a bias near the end of float32's range must not overflow in the product with log2 e.
    """
    if MASK_KIND == ADDITIVE_MASK:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    if GUARD:
        offset = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        offset = new_max
    if MASK_KIND == ADDITIVE_MASK:
        p = tl.exp2((scores - offset[:, None]) * LOG2E)
        correction = tl.exp2((row_max - offset) * LOG2E)
    else:
        p = tl.exp2(scores * factor - offset[:, None])
        correction = tl.exp2(row_max - offset)
    row_sum = row_sum * correction + tl.sum(p, 1)
    accumulator = accumulator * correction[:, None]
    accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision=PRECISION)
    return accumulator, new_max, row_sum


@triton.jit
def sink_logit(sink, MASK_KIND: tl.constexpr):
    """A head's attention sink in the units of ``row_max`` (see :func:`online_softmax`)."""
    logit = tl.load(sink).to(tl.float32)
    if MASK_KIND != ADDITIVE_MASK:
        logit = logit * LOG2E
    return logit


@triton.jit
def sink_weight(logit, offset, MASK_KIND: tl.constexpr):
    """What a sink adds to the sum of exponentials that are taken from ``offset`` on."""
    if MASK_KIND == ADDITIVE_MASK:
        weight = tl.exp2((logit - offset) * LOG2E)
    else:
        weight = tl.exp2(logit - offset)
    return weight


@triton.jit
def split_kernel(
    query,
    key,
    value,
    bounds,
    key_mask,
    mask,
    partial_out,
    partial_max,
    partial_sum,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_key_mask_b,
    stride_key_mask_n,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    queries,
    keys,
    scale,
    softcap,
    factor,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    MASK_KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of the keys, for up to ROWS of the GROUP * queries rows that share one key/value head.

    With BLOCK_TAIL the products of queries and keys run over BLOCK_DK columns and then over the BLOCK_TAIL that follow:
    576 columns of a latent attention are 512 and 64, not 1024.

    Grid: (row blocks * SPLITS, Hkv, B).  Writes, contiguous over [B, Hq, queries, SPLITS]: the largest score, the sum
    of the exponentials, and the weighted sum of values [.., DV] before division; a split without keys writes no values.
    """
    # Inductor passes Python floats as float64.
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    factor = tl.cast(factor, tl.float32)
    block = tl.program_id(0)
    split = block % SPLITS
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    batch = tl.program_id(2)
    batch64 = batch.to(tl.int64)

    row = (block // SPLITS) * ROWS + tl.arange(0, ROWS)
    alive = row < GROUP * queries
    row = tl.minimum(row, GROUP * queries - 1)
    head = kv_head * GROUP + row // queries
    position = row % queries

    first, stop = row_interval(bounds, batch, position, keys, CHUNK, HAS_BOUNDS)
    key_mask_needed = key_mask_is_needed(bounds, batch, HAS_BOUNDS, HAS_KEY_MASK)
    # Tiles start at multiples of BLOCK_N, so that Triton knows the alignment of what it loads from a mask.
    range_first = tl.min(first, 0) // BLOCK_N * BLOCK_N
    range_stop = tl.max(stop, 0)
    share = (tl.maximum(range_stop - range_first, 0) + SPLITS - 1) // SPLITS
    share = (share + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin = range_first + split * share
    end = tl.minimum(begin + share, range_stop)
    stop = tl.minimum(stop, end)

    column_k = tl.arange(0, BLOCK_DK)
    column_v = tl.arange(0, BLOCK_DV)
    query_rows = batch64 * stride_qb + head.to(tl.int64) * stride_qh + position.to(tl.int64) * stride_qm
    q = load_tile(query, query_rows[:, None] + column_k[None, :], alive, column_k < DK, True, BLOCK_DK > DK)
    if BLOCK_TAIL > 0:
        column_t = BLOCK_DK + tl.arange(0, BLOCK_TAIL)
        q_tail = load_tile(query, query_rows[:, None] + column_t[None, :], alive, column_t < DK, True, True)
    mask_rows = batch64 * stride_mask_b + head.to(tl.int64) * stride_mask_h + position.to(tl.int64) * stride_mask_m
    key_base = key + batch64 * stride_kb + tl.cast(kv_head, tl.int64) * stride_kh
    value_base = value + batch64 * stride_vb + tl.cast(kv_head, tl.int64) * stride_vh
    tile_row = tl.arange(0, BLOCK_N)
    key_offsets = tile_row[:, None] * stride_kn + column_k[None, :]
    value_offsets = tile_row[:, None] * stride_vn + column_v[None, :]
    mask_offsets = mask_rows[:, None] + tile_row[None, :] * stride_mask_n

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        index = start + tile_row
        inside = index < end
        start64 = tl.cast(start, tl.int64)
        k = load_tile(key_base + start64 * stride_kn, key_offsets, inside, column_k < DK, True, BLOCK_DK > DK)
        v = load_tile(value_base + start64 * stride_vn, value_offsets, inside, column_v < DV, True, BLOCK_DV != DV)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if BLOCK_TAIL > 0:
            tail_offsets = tile_row[:, None] * stride_kn + column_t[None, :]
            k_tail = load_tile(key_base + start64 * stride_kn, tail_offsets, inside, column_t < DK, True, True)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
        scores = shape_scores(scores, scale, softcap, SOFTCAP, MASK_KIND)
        scores = mask_scores(
            scores,
            index,
            end,
            first,
            stop,
            key_mask + batch64 * stride_key_mask_b,
            stride_key_mask_n,
            key_mask_needed,
            mask + start64 * stride_mask_n,
            mask_offsets,
            HAS_KEY_MASK,
            MASK_KIND,
        )
        accumulator, row_max, row_sum = online_softmax(
            accumulator, row_max, row_sum, scores, v, factor, MASK_KIND, True, PRECISION
        )

    slot = ((batch64 * (kv_heads * GROUP) + head) * queries + position) * SPLITS + split
    tl.store(partial_max + slot, row_max, mask=alive)
    tl.store(partial_sum + slot, row_sum, mask=alive)
    written = alive & (begin < end)
    tl.store(
        partial_out + slot[:, None] * DV + column_v[None, :],
        accumulator,
        mask=written[:, None] & (column_v < DV)[None, :],
    )


@triton.jit
def combine_kernel(
    partial_out,
    partial_max,
    partial_sum,
    query,
    key,
    value,
    mask,
    sink,
    out,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_sink,
    stride_ob,
    stride_oh,
    stride_om,
    queries,
    keys,
    scale,
    softcap,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EMPTY_ROW: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """Adds up the splits of one row.  Grid: (HEADS * queries, B)."""
    # Inductor passes Python floats as float64.
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    row = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    head = (row // queries).to(tl.int64)
    position = (row % queries).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    column = tl.arange(0, BLOCK_DV)

    slot = ((batch * HEADS + head) * queries + position) * SPLITS + split
    highest = tl.load(partial_max + slot, mask=split < SPLITS, other=float("-inf"))
    sums = tl.load(partial_sum + slot, mask=split < SPLITS, other=0.0)
    # A sum of zero marks a split that saw no key; its values may never have been written.
    seen = sums != 0.0
    largest = tl.max(highest, 0)
    if HAS_SINK:
        logit = sink_logit(sink + head * stride_sink, MASK_KIND)
        largest = tl.maximum(largest, logit)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    if MASK_KIND == ADDITIVE_MASK:
        weights = tl.exp2((highest - largest) * LOG2E)
    else:
        weights = tl.exp2(highest - largest)
    weights = tl.where(seen, weights, 0.0)
    total = tl.sum(weights * sums, 0)
    if HAS_SINK:
        total += sink_weight(logit, largest, MASK_KIND)
    values = tl.load(
        partial_out + slot[:, None] * DV + column[None, :], mask=seen[:, None] & (column < DV)[None, :], other=0.0
    )
    result = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)

    if EMPTY_ROW == EMPTY_NAN:
        result = tl.where(total == 0.0, float("nan"), result)
    # Nested: the outer condition is settled when Triton compiles, the inner one is a branch at run time.
    if EMPTY_ROW == EMPTY_MEAN or EMPTY_ROW == EMPTY_SAFE_MEAN or EMPTY_ROW == EMPTY_UNMASKED:
        if total == 0.0:
            result = all_keys_row(
                query + batch * stride_qb + head * stride_qh + position * stride_qm,
                key + batch * stride_kb + (head // GROUP) * stride_kh,
                value + batch * stride_vb + (head // GROUP) * stride_vh,
                mask + batch * stride_mask_b + head * stride_mask_h + position * stride_mask_m,
                stride_kn,
                stride_vn,
                stride_mask_n,
                keys,
                scale,
                softcap,
                DK,
                DV,
                BLOCK_DK,
                BLOCK_DV,
                BLOCK_N,
                UNMASKED if EMPTY_ROW == EMPTY_UNMASKED else MASK_KIND,
                SOFTCAP,
            )
            if EMPTY_ROW == EMPTY_SAFE_MEAN:  # the softmax over a row of -inf is NaN
                result = tl.where(result == result, result, 0.0)
    offsets = batch * stride_ob + head * stride_oh + position * stride_om + column
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=column < DV)


@triton.jit
def all_keys_row(
    query,
    key,
    value,
    mask,
    stride_kn,
    stride_vn,
    stride_mask,
    keys,
    scale,
    softcap,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """What an empty row gives that still sees all keys: the softmax with the additive mask or (UNMASKED) without one,
    else the mean of values."""
    column_k = tl.arange(0, BLOCK_DK)
    column_v = tl.arange(0, BLOCK_DV)
    tile_row = tl.arange(0, BLOCK_N)
    q = tl.load(query + column_k, mask=column_k < DK, other=0.0).to(tl.float32)
    row_max = tl.full([], float("-inf"), tl.float32)
    row_sum = tl.zeros([], tl.float32)
    accumulator = tl.zeros([BLOCK_DV], tl.float32)
    for start in tl.range(0, keys, BLOCK_N):
        index = start + tile_row
        inside = index < keys
        index64 = tl.cast(index, tl.int64)
        if MASK_KIND == ADDITIVE_MASK or MASK_KIND == UNMASKED:
            k = load_tile(key, index64[:, None] * stride_kn + column_k[None, :], inside, column_k < DK, True, True)
            scores = shape_scores(tl.sum(k.to(tl.float32) * q[None, :], 1), scale, softcap, SOFTCAP, ADDITIVE_MASK)
            if MASK_KIND == ADDITIVE_MASK:
                scores = scores + tl.load(mask + index64 * stride_mask, mask=inside, other=0.0).to(tl.float32)
        else:
            scores = tl.zeros([BLOCK_N], tl.float32)
        scores = tl.where(inside, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        p = tl.exp2((scores - new_max) * LOG2E)
        correction = tl.exp2((row_max - new_max) * LOG2E)
        v = load_tile(value, index64[:, None] * stride_vn + column_v[None, :], inside, column_v < DV, True, True)
        row_sum = row_sum * correction + tl.sum(p, 0)
        accumulator = accumulator * correction + tl.sum(v.to(tl.float32) * p[:, None], 0)
        row_max = new_max
    return accumulator / row_sum


@triton.jit
def attend_tiles(
    accumulator,
    row_max,
    row_sum,
    q,
    begin,
    end,
    full_first,
    full_stop,
    key_base,
    value_base,
    stride_kn,
    stride_vn,
    first,
    stop,
    key_mask,
    stride_key_mask,
    key_mask_needed,
    query_ids,
    key_documents,
    stride_key_documents,
    one_document,
    mask,
    mask_rows,
    stride_mask,
    scale,
    softcap,
    factor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    MASK_KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Runs the key tiles of [begin, end).

    MASKED says which of them need the mask: NO_TILE, EVERY_TILE, or TILES_OUTSIDE [full_first, full_stop), decided tile
    by tile.
    """
    column_k = tl.arange(0, BLOCK_DK)
    column_v = tl.arange(0, BLOCK_DV)
    tile_row = tl.arange(0, BLOCK_N)
    key_offsets = tile_row[:, None] * stride_kn + column_k[None, :]
    value_offsets = tile_row[:, None] * stride_vn + column_v[None, :]
    mask_offsets = mask_rows[:, None] + tile_row[None, :] * stride_mask
    for start in tl.range(begin, end, BLOCK_N):
        index = start + tile_row
        inside = index < end
        start64 = tl.cast(start, tl.int64)
        k = load_tile(
            key_base + start64 * stride_kn, key_offsets, inside, column_k < DK, MASKED != NO_TILE, BLOCK_DK != DK
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = shape_scores(scores, scale, softcap, SOFTCAP, MASK_KIND)
        if MASKED != NO_TILE:
            needed = True
            if MASKED == TILES_OUTSIDE:
                needed = (start < full_first) | (start >= full_stop)
            if needed:
                scores = mask_scores(
                    scores,
                    index,
                    end,
                    first,
                    stop,
                    key_mask,
                    stride_key_mask,
                    key_mask_needed,
                    mask + start64 * stride_mask,
                    mask_offsets,
                    HAS_KEY_MASK,
                    MASK_KIND,
                )
                if HAS_DOCUMENTS:
                    ids = tl.load(key_documents + tl.cast(index, tl.int64) * stride_key_documents, mask=inside, other=0)
                    same = (query_ids[:, None] == ids[None, :]) | one_document
                    scores = tl.where(same, scores, float("-inf"))
        v = load_tile(
            value_base + start64 * stride_vn, value_offsets, inside, column_v < DV, MASKED != NO_TILE, BLOCK_DV != DV
        )
        accumulator, row_max, row_sum = online_softmax(
            accumulator, row_max, row_sum, scores, v, factor, MASK_KIND, MASKED != NO_TILE, PRECISION
        )
    return accumulator, row_max, row_sum


@triton.jit
def all_keys_tile(
    q,
    keys,
    key_base,
    value_base,
    stride_kn,
    stride_vn,
    mask,
    mask_rows,
    stride_mask,
    scale,
    softcap,
    BLOCK_M: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``all_keys_row`` for a block of queries: [BLOCK_M, BLOCK_DV] float32."""
    column_k = tl.arange(0, BLOCK_DK)
    column_v = tl.arange(0, BLOCK_DV)
    tile_row = tl.arange(0, BLOCK_N)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_DV], tl.float32)
    for start in tl.range(0, keys, BLOCK_N):
        index = start + tile_row
        inside = index < keys
        index64 = tl.cast(index, tl.int64)
        v = load_tile(value_base, index64[:, None] * stride_vn + column_v[None, :], inside, column_v < DV, True, True)
        if MASK_KIND == ADDITIVE_MASK or MASK_KIND == UNMASKED:
            k = load_tile(key_base, index64[:, None] * stride_kn + column_k[None, :], inside, column_k < DK, True, True)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores = shape_scores(scores, scale, softcap, SOFTCAP, ADDITIVE_MASK)
            if MASK_KIND == ADDITIVE_MASK:
                offsets = mask_rows[:, None] + tile_row[None, :] * stride_mask
                bias_base = mask + tl.cast(start, tl.int64) * stride_mask
                scores = scores + tl.load(bias_base + offsets, mask=inside[None, :], other=0.0).to(tl.float32)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            accumulator, row_max, row_sum = online_softmax(
                accumulator, row_max, row_sum, scores, v, 1.0, ADDITIVE_MASK, False, PRECISION
            )
        else:
            total += tl.sum(v.to(tl.float32), 0)
    if MASK_KIND == ADDITIVE_MASK or MASK_KIND == UNMASKED:
        result = accumulator / row_sum[:, None]
    else:
        result = accumulator + (total / keys)[None, :]
    return result


@triton.jit
def tiled_kernel(
    query,
    key,
    value,
    bounds,
    key_mask,
    query_documents,
    key_documents,
    mask,
    sink,
    out,
    empty_rows,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_key_mask_b,
    stride_key_mask_n,
    stride_query_documents_b,
    stride_query_documents_m,
    stride_key_documents_b,
    stride_key_documents_n,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_sink,
    stride_ob,
    stride_oh,
    stride_om,
    queries,
    keys,
    scale,
    softcap,
    factor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    MASK_KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EMPTY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """Attention of one query block of one head.  Grid: (query blocks * HEADS, B).

    Where an empty row still attends to all keys, it gets zeros here and a 1 in ``empty_rows`` (int8, contiguous [B,
    HEADS, queries], written whole): ``empty_rows_kernel`` does the rest.  Done here, its loop would take registers from
    every program (220 instead of 146 with 64 x 32 tiles, so that two instead of three programs fit on an SM).

    ONE_LOOP decides tile by tile whether the mask is needed, else three loops run one after the other, each with its
    own pipeline.

    Programs run in sections of heads whose keys and values fit in L2 together; within a section the last query
    blocks, which a causal mask makes the longest, go first, so that short ones fill the end.
    """
    # Inductor passes Python floats as float64.
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    factor = tl.cast(factor, tl.float32)
    batch = tl.program_id(1)
    batch64 = batch.to(tl.int64)
    program = tl.program_id(0)
    blocks = (queries + BLOCK_M - 1) // BLOCK_M
    head_bytes = keys * ((DK + DV) * (key.dtype.element_ty.primitive_bitwidth // 8))
    section_heads = tl.minimum(tl.maximum(L2_BUDGET // tl.maximum(head_bytes, 1), 1), HEADS // GROUP) * GROUP
    section = program // (section_heads * blocks)
    within = program % (section_heads * blocks)
    heads_here = tl.minimum(section_heads, HEADS - section * section_heads)
    head = section * section_heads + within % heads_here
    block = blocks - 1 - within // heads_here
    head64 = head.to(tl.int64)
    kv_head64 = (head // GROUP).to(tl.int64)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = row < queries
    # Rows past the end repeat the last query, so that they widen no interval.
    position = tl.minimum(row, queries - 1)
    position64 = position.to(tl.int64)
    # Before the bounds are waited for: the two latencies overlap.
    column_k = tl.arange(0, BLOCK_DK)
    query_base = query + batch64 * stride_qb + head64 * stride_qh
    q = load_tile(
        query_base, position64[:, None] * stride_qm + column_k[None, :], alive, column_k < DK, False, BLOCK_DK != DK
    )

    first, stop = row_interval(bounds, batch, position, keys, CHUNK, HAS_BOUNDS)
    key_mask_needed = key_mask_is_needed(bounds, batch, HAS_BOUNDS, HAS_KEY_MASK)
    # Both ends of the interval never fall from one query to the next, so that two rows stand for all: reductions over
    # the block, with their barriers, would hold up the first load of keys.
    range_first, full_stop = row_interval(bounds, batch, block * BLOCK_M, keys, CHUNK, HAS_BOUNDS)
    last = tl.minimum(block * BLOCK_M + BLOCK_M, queries) - 1
    full_first, range_stop = row_interval(bounds, batch, last, keys, CHUNK, HAS_BOUNDS)

    one_document = True
    query_ids = position
    if HAS_DOCUMENTS:
        # Keys outside the span of this block's document ids are invisible to it, whatever the order of the ids.
        query_ids = tl.load(
            query_documents + batch64 * stride_query_documents_b + position64 * stride_query_documents_m
        )
        lowest_id = tl.min(query_ids, 0)
        highest_id = tl.max(query_ids, 0)
        found_first = range_stop
        found_stop = range_first
        found = range_first * 0
        for start in tl.range(range_first, range_stop, DOCUMENT_BLOCK):
            index = start + tl.arange(0, DOCUMENT_BLOCK)
            inside = index < range_stop
            ids = tl.load(
                key_documents + batch64 * stride_key_documents_b + tl.cast(index, tl.int64) * stride_key_documents_n,
                mask=inside,
                other=0,
            )
            hit = inside & (ids >= lowest_id) & (ids <= highest_id)
            found_first = tl.minimum(found_first, tl.min(tl.where(hit, index, range_stop), 0))
            found_stop = tl.maximum(found_stop, tl.max(tl.where(hit, index + 1, range_first), 0))
            found += tl.sum(hit.to(tl.int32), 0)
        range_first = found_first
        range_stop = found_stop
        first = tl.maximum(first, range_first)
        stop = tl.minimum(stop, range_stop)
        full_first = tl.maximum(full_first, range_first)
        full_stop = tl.minimum(full_stop, range_stop)
        one_document = (lowest_id == highest_id) & (found == range_stop - range_first)

    # Tiles start at multiples of BLOCK_N, so that Triton knows the alignment of what it loads from a mask.
    range_first = range_first // BLOCK_N * BLOCK_N
    # Tiles of [full_first, full_stop) are visible to every row of the block.
    full_first = (full_first + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_stop = full_first + tl.maximum(full_stop - full_first, 0) // BLOCK_N * BLOCK_N
    no_full_tile = full_stop <= full_first
    if HAS_KEY_MASK:
        no_full_tile = no_full_tile | key_mask_needed
    if HAS_DOCUMENTS:
        no_full_tile = no_full_tile | (one_document == 0)
    if MASK_KIND > 0:
        no_full_tile = no_full_tile | True
    full_first = tl.where(no_full_tile, range_first, full_first)
    full_stop = tl.where(no_full_tile, range_first, full_stop)

    column_v = tl.arange(0, BLOCK_DV)
    key_base = key + batch64 * stride_kb + kv_head64 * stride_kh
    value_base = value + batch64 * stride_vb + kv_head64 * stride_vh
    key_mask_base = key_mask + batch64 * stride_key_mask_b
    key_documents_base = key_documents + batch64 * stride_key_documents_b
    block_start = (block * BLOCK_M).to(tl.int64)
    mask_base = mask + batch64 * stride_mask_b + head64 * stride_mask_h + block_start * stride_mask_m
    mask_rows = (position - block * BLOCK_M) * stride_mask_m

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    parts: tl.constexpr = 1 if ONE_LOOP or MASK_KIND > 0 else 3
    for part in tl.static_range(parts):
        # Of three parts the one in the middle needs no mask.
        begin = range_first
        end = range_stop
        if parts == 3:
            if part == 0:
                end = full_first
            elif part == 1:
                begin = full_first
                end = full_stop
            else:
                begin = full_stop
        accumulator, row_max, row_sum = attend_tiles(
            accumulator,
            row_max,
            row_sum,
            q,
            begin,
            end,
            full_first,
            full_stop,
            key_base,
            value_base,
            stride_kn,
            stride_vn,
            first,
            stop,
            key_mask_base,
            stride_key_mask_n,
            key_mask_needed,
            query_ids,
            key_documents_base,
            stride_key_documents_n,
            one_document,
            mask_base,
            mask_rows,
            stride_mask_n,
            scale,
            softcap,
            factor,
            DK,
            DV,
            BLOCK_DK,
            BLOCK_DV,
            BLOCK_N,
            HAS_KEY_MASK,
            HAS_DOCUMENTS,
            MASK_KIND,
            SOFTCAP,
            PRECISION,
            EVERY_TILE if MASK_KIND > 0 else TILES_OUTSIDE if parts == 1 else NO_TILE if part == 1 else EVERY_TILE,
        )

    if HAS_SINK:
        logit = sink_logit(sink + head64 * stride_sink, MASK_KIND)
        offset = tl.maximum(row_max, logit)
        offset = tl.where(offset == float("-inf"), 0.0, offset)
        correction = sink_weight(row_max, offset, MASK_KIND)
        row_sum = row_sum * correction + sink_weight(logit, offset, MASK_KIND)
        accumulator = accumulator * correction[:, None]
    # A row that saw a key, or a sink, has a sum that is not zero.
    empty = row_sum == 0.0
    result = accumulator / tl.where(empty, 1.0, row_sum)[:, None]
    if EMPTY_ROW == EMPTY_NAN:
        result = tl.where(empty[:, None], float("nan"), result)
    if EMPTY_ROW == EMPTY_MEAN or EMPTY_ROW == EMPTY_SAFE_MEAN or EMPTY_ROW == EMPTY_UNMASKED:
        slot = (batch64 * HEADS + head) * queries + position
        tl.store(empty_rows + slot, empty.to(tl.int8), mask=alive)
    out_rows = batch64 * stride_ob + head64 * stride_oh + position64 * stride_om
    tl.store(
        out + out_rows[:, None] + column_v[None, :],
        result.to(out.dtype.element_ty),
        mask=alive[:, None] & (column_v < DV)[None, :],
    )


@triton.jit
def empty_rows_kernel(
    query,
    key,
    value,
    mask,
    empty_rows,
    out,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_ob,
    stride_oh,
    stride_om,
    queries,
    keys,
    scale,
    softcap,
    HEADS: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_KIND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EMPTY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fills the rows that ``tiled_kernel`` has marked in ``empty_rows``; the others it neither reads nor writes.

    One program looks at one query block of HEADS_PER_PROGRAM (a power of two) heads: mostly there is nothing to do, and
    fewer programs are through sooner.  Grid: (query blocks * ceil(HEADS / HEADS_PER_PROGRAM), B).
    """
    # Inductor passes Python floats as float64.
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    batch64 = tl.program_id(1).to(tl.int64)
    blocks = (queries + BLOCK_M - 1) // BLOCK_M
    block = tl.program_id(0) % blocks
    first_head = tl.program_id(0) // blocks * HEADS_PER_PROGRAM
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = row < queries
    heads = first_head + tl.arange(0, HEADS_PER_PROGRAM)
    slots = (batch64 * HEADS + heads[:, None]) * queries + row[None, :]
    marks = tl.load(empty_rows + slots, mask=(heads < HEADS)[:, None] & alive[None, :], other=0).to(tl.int32)
    if tl.max(tl.max(marks, 1), 0) > 0:
        position = tl.minimum(row, queries - 1)
        position64 = position.to(tl.int64)
        column_k = tl.arange(0, BLOCK_DK)
        column_v = tl.arange(0, BLOCK_DV)
        mask_rows = (position - block * BLOCK_M) * stride_mask_m
        block_start = (block * BLOCK_M).to(tl.int64)
        for head in tl.range(first_head, tl.minimum(first_head + HEADS_PER_PROGRAM, HEADS)):
            head64 = tl.cast(head, tl.int64)
            kv_head64 = head64 // GROUP
            slot = (batch64 * HEADS + head) * queries + row
            empty = tl.load(empty_rows + slot, mask=alive, other=0) != 0
            if tl.max(empty.to(tl.int32), 0) > 0:
                query_rows = batch64 * stride_qb + head64 * stride_qh + position64 * stride_qm
                q = load_tile(
                    query, query_rows[:, None] + column_k[None, :], alive, column_k < DK, False, BLOCK_DK != DK
                )
                result = all_keys_tile(
                    q,
                    keys,
                    key + batch64 * stride_kb + kv_head64 * stride_kh,
                    value + batch64 * stride_vb + kv_head64 * stride_vh,
                    stride_kn,
                    stride_vn,
                    mask + batch64 * stride_mask_b + head64 * stride_mask_h + block_start * stride_mask_m,
                    mask_rows,
                    stride_mask_n,
                    scale,
                    softcap,
                    BLOCK_M,
                    DK,
                    DV,
                    BLOCK_DK,
                    BLOCK_DV,
                    BLOCK_N,
                    UNMASKED if EMPTY_ROW == EMPTY_UNMASKED else MASK_KIND,
                    SOFTCAP,
                    PRECISION,
                )
                if EMPTY_ROW == EMPTY_SAFE_MEAN:  # the softmax over a row of -inf is NaN
                    result = tl.where(result == result, result, 0.0)
                out_rows = batch64 * stride_ob + head64 * stride_oh + position64 * stride_om
                tl.store(
                    out + out_rows[:, None] + column_v[None, :],
                    result.to(out.dtype.element_ty),
                    mask=empty[:, None] & (column_v < DV)[None, :],
                )
