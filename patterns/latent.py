"""Latent attention: keys and values that a linear map makes of what the cache holds.

Enters: attention regions of a normalised graph.  Leaves: a :class:`~lz_compile.latent.Latent` for each that could
attend to the latents instead, which a few queries should: ``q . (W c) = (W^T q) . c``, and the values' map commutes
with the sum over keys.  Otherwise every step expands the whole cache, filled or not, for all heads.

Recognised: ``kv = linear(latents)`` cut into heads; keys of a part of ``kv`` and of a rotated part that all heads
share, concatenated or copied side by side into new memory; values of another part of ``kv``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases, written_arguments
from lz_compile.latent import Latent
from lz_compile.patterns.columns import columns
from lz_compile.patterns.heads import one_head
from lz_compile.patterns.walk import RESHAPES, arguments, aten, fake, same, same_shape, target, tensor
from lz_compile.region import Attention, Region

# Queries of a decode step, with drafted tokens.
_FEW = 16
_SWAPS = {aten.transpose.int, aten.permute.default, aten.mT.default}
_NEW = {aten.new_empty.default, aten.empty.memory_format, aten.new_zeros.default, aten.zeros.default}


def may_hold_latents(graph: fx.Graph) -> bool:
    """Whether something that all heads share becomes part of something else; saves matching twice where not."""
    joins = {aten.cat.default, aten.copy_.default}
    return any(
        one_head(node) is not None and any(user.target in joins for user in node.users)
        for node in graph.nodes
        if target(node) is aten.expand.default
    )


def find_latents(regions: list[Region], aliases: Aliases) -> list[Latent]:
    """The attentions among ``regions`` that could read latents, in their order."""
    found = [_latent(region, aliases) for region in regions]
    return [latent for latent in found if latent is not None]


def _latent(region: Region, aliases: Aliases) -> Latent | None:
    a = region.attention
    if a is None or region.declined or a.stacked is not None or a.sink is not None or a.softcap:
        return None
    if not _keeps_its_mask(region, a, aliases):
        return None
    joined = _joined(a.key, region.output, aliases)
    values = _range(a.value)
    if joined is None or values is None:
        return None
    first, second, reader, writes = joined
    keys, shared = _range(first), one_head(second)
    expansion = _expansion(values[0])
    if keys is None or shared is None or expansion is None or keys[0] is not values[0]:
        return None
    linear, width = expansion
    known = arguments(linear)
    latents, weight, rotated = known["input"], known["weight"], shared[0]
    if not _fit(a, latents, weight, rotated, keys[2], values[2], width) or not _pays(a, values[2]):
        return None
    late = region.output
    if any(aliases.written_between(node, linear, late) for node in (latents, weight)) or aliases.is_written(linear):
        return None
    if aliases.written_between(rotated, reader, late) or not _serve_only(a, region, writes):
        return None
    region = replace(region, nodes=[*writes, *region.nodes])
    return Latent(region, latents, weight, rotated, keys[1:], values[1:], width)


def _keeps_its_mask(region: Region, a: Attention, aliases: Aliases) -> bool:
    """Whether SDPA with the mask as it is means the same: spelled out, a boolean one may hide by a finite number."""
    mask = fake(a.mask_node)
    if mask is None:
        return a.mask.is_trivial
    if region.pattern == "sdpa":
        return True
    return mask.dtype == a.fake()[0].dtype and not aliases.is_written(a.mask_node)  # type: ignore[arg-type]


def _expansion(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """The linear map behind ``linear(latents).view(B, N, H, C).transpose(1, 2)``, and C, the width of a head."""
    if target(node) is not aten.transpose.int or sorted(int(dim) % 4 for dim in node.args[1:3]) != [1, 2]:  # type: ignore[arg-type]
        return None
    view: Any = node.args[0]
    if target(view) not in RESHAPES:
        return None
    linear: Any = view.args[0]
    if target(linear) is not aten.linear.default or arguments(linear)["bias"] is not None:
        return None
    source, value = tensor(arguments(linear)["input"]), tensor(view)
    if source.dim() not in (3, 4):
        return None
    width = value.shape[3]
    rows = same(value.shape[0], source.shape[0]) and same(value.shape[1], source.shape[-2])
    whole = same(tensor(linear).shape[-1], value.shape[2] * width)
    # A view has its base's elements: of four dimensions the second has size one.
    return (linear, width) if rows and whole else None


def _range(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """``(whole, first, count)`` when ``node`` is columns of ``whole`` at places that are numbers."""
    found = columns(node)
    if found is None:
        return None
    whole, first, _ = found
    count = tensor(node).shape[-1]
    return (whole, first, count) if isinstance(first, int) and first >= 0 and isinstance(count, int) else None


def _joined(
    key: fx.Node, late: fx.Node, aliases: Aliases
) -> tuple[fx.Node, fx.Node, fx.Node, tuple[fx.Node, ...]] | None:
    """The two parts of a key's columns, the node that reads the second of them, and the writes that join them."""
    if target(key) is aten.cat.default:
        parts = arguments(key)["tensors"]
        if len(parts) != 2 or aliases.is_written(key):
            return None
        return parts[0], parts[1], key, ()
    if target(key) not in _NEW:
        return None
    writes = [
        node
        for node in key.graph.nodes
        if any(aliases.same_storage(key, written) for written in written_arguments(node))
    ]
    if len(writes) != 2 or any(target(write) is not aten.copy_.default for write in writes):
        return None
    if aliases.version(key, late) != len(writes):
        return None
    places = [_range(write.args[0]) for write in writes]  # type: ignore[arg-type]
    if any(place is None or place[0] is not key for place in places):
        return None
    ordered = sorted(zip(places, writes), key=lambda pair: pair[0][1])  # type: ignore[index]
    (_, start, size), (_, middle, _) = (place for place, _ in ordered)  # type: ignore[misc]
    if start != 0 or middle != size:
        return None
    first, second = (write for _, write in ordered)
    for write in (first, second):
        if not same_shape(tensor(write.args[0]).shape, tensor(write.args[1]).shape):
            return None
    return first.args[1], second.args[1], second, tuple(writes)  # type: ignore[return-value]


def _fit(
    a: Attention,
    latents: Any,
    weight: Any,
    rotated: fx.Node,
    key_count: int,
    value_count: int,
    width: Any,
) -> bool:
    """Whether the sizes are those of one batch of tokens and heads, in one dtype; ``width`` columns a head.

    They tell a key whose parts stand side by side from one of parts in other rows, too.
    """
    query, key, value = a.fake()
    c, w, rope = tensor(latents), tensor(weight), tensor(rotated)
    heads = query.shape[1]
    tokens = same(c.shape[0], key.shape[0]) and same(c.shape[-2], key.shape[2])
    sizes = (heads, query.shape[2], rope.shape[3], c.shape[-1], width)
    return (
        query.dtype == c.dtype == w.dtype == rope.dtype
        and all(isinstance(size, int) for size in sizes)
        and tokens
        and same(key.shape[1], heads)
        and same(value.shape[1], heads)
        and same_shape(w.shape, (heads * width, c.shape[-1]))
        and same(key.shape[3], key_count + rope.shape[3])
        and same(query.shape[3], key.shape[3])
        and same(value.shape[3], value_count)
    )


def _pays(a: Attention, value_size: int) -> bool:
    """Whether attending to latents takes fewer products than expanding them.

    Expanded, a key costs ``R`` products for each column of each head, once; as latents about ``2 R`` a query.
    """
    queries, keys = a.queries, a.keys
    if queries > _FEW or 4 * queries > a.fake()[1].shape[3] + value_size:
        return False
    return not isinstance(keys, int) or keys >= 2 * queries


def _serve_only(a: Attention, region: Region, writes: tuple[fx.Node, ...]) -> bool:
    """Whether nobody else reads the expanded keys and values: then there is something to save."""
    own = {*region.nodes, region.output}
    places = {write.args[0] for write in writes}
    if any(write.users for write in writes) or any(set(place.users) - set(writes) for place in places):  # type: ignore[union-attr]
        return False
    readers = (set(a.key.users) | set(a.value.users)) - own - places
    return all(reader.target in _SWAPS and set(reader.users) <= own for reader in readers)
