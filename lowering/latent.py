"""Attention over latents: what a head's part of ``W`` does to keys and values is done to its query and its result.

With keys ``[W_k c, r]`` and values ``W_v c``, ``q = [n, r']``: ``q . k = (W_k^T n) . c + r' . r`` and
``sum p W_v c = W_v sum p c``.  So all heads share one key ``[c, r]`` and one value ``c`` (the absorbed form of
DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.2), and the cache is read instead of expanded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from lz_compile.latent import Latent
from lz_compile.lowering.triton import SPLIT_KEY_SIZE, SPLIT_VALUE_SIZE
from lz_compile.region import Verdict

aten = torch.ops.aten


def refuses_latents(latent: Latent) -> Verdict:
    """Why no kernel here attends to latents of these sizes; None when one does."""
    value, rotated = latent.latents.meta["val"], latent.rotated.meta["val"]
    if value.device.type != "cuda":
        return None  # PyTorch's own attention does, on the CPU
    from lz_compile.lowering import triton_ops

    missing = triton_ops.available()
    if missing:
        return missing
    size = value.shape[-1] + rotated.shape[-1]
    if size > SPLIT_KEY_SIZE or value.shape[-1] > SPLIT_VALUE_SIZE:
        return f"latents of {size} numbers"
    return None


def attend_to_latents(emitter: Any, latent: Latent) -> fx.Node:
    """Inserts the attention in front of the region's output and returns its result ``[B, H, M, V]``, in some layout."""
    region = latent.region
    a, anchor = region.attention, region.output
    assert a is not None

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emitter.call(anchor, op, *args, **kwargs)

    query = a.query.meta["val"]
    heads, queries = query.shape[1], query.shape[2]
    size = latent.keys[1]
    weight = call(aten.unflatten.int, latent.weight, 0, [heads, latent.width])
    for_keys, for_values = (
        call(aten.slice.Tensor, weight, 1, first, first + count) for first, count in (latent.keys, latent.values)
    )

    def by_head(rows: fx.Node, matrix: fx.Node) -> fx.Node:
        """``[B, H, M, X]`` times ``[H, X, Y]``: one product a head over all rows of the batch."""
        width = rows.meta["val"].shape[3]
        rows = call(aten.reshape.default, call(aten.permute.default, rows, [1, 0, 2, 3]), [heads, -1, width])
        product = call(aten.unflatten.int, call(aten.bmm.default, rows, matrix), 1, [-1, queries])
        return call(aten.permute.default, product, [1, 0, 2, 3])

    plain = call(aten.slice.Tensor, a.query, 3, 0, size)
    turned = call(aten.slice.Tensor, a.query, 3, size, query.shape[3])
    new_query = call(aten.cat.default, [by_head(plain, for_keys), turned], -1)
    latents = latent.latents
    if latents.meta["val"].dim() == 3:
        latents = call(aten.unsqueeze.default, latents, 1)
    key = call(aten.cat.default, [latents, latent.rotated], -1)
    key, value = (call(aten.expand.default, x, [-1, heads, -1, -1]) for x in (key, latents))
    arguments = (new_query, key, value, a.mask_node)
    out = call(aten.scaled_dot_product_attention.default, *arguments, scale=float(a.scale))
    return by_head(out, call(aten.transpose.int, for_values, 1, 2))
