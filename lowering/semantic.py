"""Semantic ops: one plain torch function each, which is the meaning, the test oracle and the shape of the result.

``attend`` is the calling convention that every mask-aware attention kernel of this package shares.
"""

from __future__ import annotations

import torch

# Columns of the ``bounds`` tensor, int32 [B, 8].
UPPER, LOWER, START, STOP, CHUNK_SHIFT, CHUNK_ORIGIN, HOLES = range(7)
BOUND_COLUMNS = 8
NO_UPPER = 1 << 30
NO_LOWER = -(1 << 30)

# What a row in which no key is visible gives; see lz_compile.mask.MaskForm.empty_row.
EMPTY_ROW = {"zero": 0, "mean": 1, "nan": 2, "safe mean": 3, "unmasked": 4}


def visible_keys(
    bounds: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    query_documents: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    chunk: int,
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
) -> torch.Tensor:
    """The boolean mask [B, H or 1, M, N] that the arguments of :func:`attend` describe, True = visible.

    An additive ``mask`` hides a key where it holds its dtype's most negative finite number or -inf: beside any other
    key the softmax gives such a key exactly zero.
    """
    q = torch.arange(queries, device=device)[None, :, None]
    k = torch.arange(keys, device=device)[None, None, :]
    visible = torch.ones(batch, queries, keys, dtype=torch.bool, device=device)
    if bounds is not None:
        column = bounds.to(torch.int64)[:, :, None, None].unbind(1)
        visible &= (k <= q + column[UPPER]) & (k >= q + column[LOWER])
        visible &= (k >= column[START]) & (k < column[STOP])
        if chunk:
            origin = column[CHUNK_ORIGIN]
            query_chunk = torch.div(q + column[CHUNK_SHIFT] - origin, chunk, rounding_mode="floor")
            visible &= torch.div(k - origin, chunk, rounding_mode="floor") == query_chunk
    if key_mask is not None:
        visible &= key_mask[:, None, :]
    if query_documents is not None and key_documents is not None:
        visible &= query_documents[:, :, None] == key_documents[:, None, :]
    visible = visible[:, None]
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        visible = visible & shown
    return visible


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk: int = 0,
    empty_row: int = 0,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a mask in normal form: ``softmax(softcap(scale * q k^T) + bias) v`` over visible keys.

    Args:
        query: [B, Hq, M, Dk], any strides with the last one 1.
        key: [B, Hkv, N, Dk]; ``Hq % Hkv == 0``, query head h reads key/value head ``h // (Hq // Hkv)``.
        value: [B, Hkv, N, Dv].
        bounds: int32 [B, 8], contiguous; per batch row the columns UPPER (k <= q + upper), LOWER (k >= q + lower),
            START (k >= start), STOP (k < stop), CHUNK_SHIFT, CHUNK_ORIGIN, HOLES, and one unused.
            HOLES is 0 when ``key_mask`` and the key side of ``mask`` are True on all of [start, stop), so that a
            kernel need not read ``key_mask`` there; it says nothing about ``mask``'s query side.
        key_mask: bool [B, N], True = visible.
        query_documents, key_documents: integers [B, M] and [B, N]; visible where equal.
        mask: broadcastable to [B, Hq, M, N]; bool (True = visible), or a float bias that is added to the scores.
        scale, softcap: softcap 0.0 means none, else scores become ``softcap * tanh(scale * q k^T / softcap)``.
        chunk: chunk size, 0 for none: ``(k - origin) // chunk == (q + shift - origin) // chunk``.
        empty_row: what a row without visible keys gives: 0 zeros, 1 the softmax over all N keys of the additive
            ``mask`` (with no additive mask: the mean of all values; NaN where it is -inf throughout), 2 NaN, 3 as 1
            but zeros instead of that NaN, 4 the softmax over all N keys without any mask.
        sink: [Hq] of any floating dtype; one more logit of each head in the softmax's denominator, which has no value
            and is neither scaled, capped nor masked.  A row without visible keys then gives zeros, whatever
            ``empty_row`` says.

    Returns:
        [B, Hq, M, Dv] in the dtype of ``query``, computed in float32 (float64 for float64 inputs), with the memory of
        a contiguous [B, M, Hq, Dv] tensor: the projection that follows an attention reads it without a copy.
    """
    batch, query_heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = query_heads // kv_heads
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    k = key.to(compute).repeat_interleave(group, 1)
    v = value.to(compute).repeat_interleave(group, 1)
    scores = (query.to(compute) @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    visible = visible_keys(
        bounds, key_mask, query_documents, key_documents, mask, chunk, batch, queries, keys, query.device
    )
    additive = mask is not None and mask.dtype != torch.bool
    plain = scores
    if mask is not None and additive:
        scores = scores + mask.to(compute)
    hidden = scores.masked_fill(~visible, float("-inf"))
    if sink is not None:
        column = sink.to(compute)[None, :, None, None].expand(batch, query_heads, queries, 1)
        hidden, empty_row = torch.cat([hidden, column], -1), 0
    weights = torch.softmax(hidden, -1)[..., :keys]
    empty = ~visible.any(-1, keepdim=True)
    if empty_row == 0:
        fallback = torch.zeros_like(weights)
    elif empty_row in (1, 3):
        fallback = torch.softmax(scores if additive else torch.zeros_like(scores), -1)
        if empty_row == 3 and additive:
            fallback = fallback.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    elif empty_row == 4:
        fallback = torch.softmax(plain, -1)
    else:
        fallback = torch.full_like(weights, float("nan"))
    weights = torch.where(empty, fallback, weights)
    out = (weights @ v).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attend_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The fake result of every ``attend`` kernel: [B, Hq, M, Dv] over contiguous [B, M, Hq, Dv] memory."""
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
