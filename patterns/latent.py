"""Latent attention: keys and values that a linear map makes of what the cache holds.

Enters: attention regions of a normalised graph.  Leaves: a :class:`~lz_compile.latent.Latent` for each that could
attend to the latents instead, which a few queries should: ``q . (W c) = (W^T q) . c``, and the values' map commutes
with the sum over keys.  Otherwise every step expands the whole cache, filled or not, for all heads.

Recognised: ``kv = linear(latents)`` cut into heads; keys of a part of ``kv`` and of a rotated part that all heads
share, concatenated or copied side by side into new memory; values of another part of ``kv``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch.fx as fx

from lz_compile.aliasing import Aliases, written_arguments
from lz_compile.gradients import needs_gradient
from lz_compile.latent import Latent
from lz_compile.patterns.walk import RESHAPES, arguments, aten, fake, same, same_shape, target
from lz_compile.region import Attention, Region

# Queries of a decode step, with drafted tokens.
_FEW = 16
_SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.split.sizes, aten.chunk.default}
_SWAPS = {aten.transpose.int, aten.permute.default, aten.mT.default}
_NEW = {aten.new_empty.default, aten.empty.memory_format, aten.new_zeros.default, aten.zeros.default}


def may_hold_latents(graph: fx.Graph) -> bool:
    """Whether some linear map is cut into heads and columns; saves matching twice where there is none."""
    return any(_expansion(node) is not None for node in graph.nodes if target(node) is aten.transpose.int)


def find_latents(regions: list[Region], aliases: Aliases) -> list[Latent]:
    """The attentions among ``regions`` that could read latents, in their order."""
    found = [_latent(region, aliases) for region in regions]
    return [latent for latent in found if latent is not None]


def _latent(region: Region, aliases: Aliases) -> Latent | None:
    a = region.attention
    if a is None or region.declined or a.stacked is not None or a.sink is not None or a.softcap:
        return None
    if needs_gradient(region.output) or not _keeps_its_mask(region, a, aliases):
        return None
    joined = _joined(a.key, aliases)
    value = _columns(a.value)
    if joined is None or value is None:
        return None
    first, second, reader, writes = joined
    part = _columns(first)
    expansion = _expansion(value[0])
    if part is None or expansion is None or part[0] is not value[0]:
        return None
    linear, columns = expansion
    known = arguments(linear)
    latents, weight, rotated = known["input"], known["weight"], _shared_by_heads(second)
    if rotated is None or not _fit(a, latents, weight, rotated, part, value, columns):
        return None
    if not _pays(a, value[2]):
        return None
    late = region.output
    if aliases.written_between(latents, linear, late) or aliases.written_between(weight, linear, late):
        return None
    if aliases.written_between(rotated, reader, late) or not _serve_only(a, region, writes):
        return None
    return Latent(region, latents, weight, rotated, part[1:], value[1:], columns, writes)


def _keeps_its_mask(region: Region, a: Attention, aliases: Aliases) -> bool:
    """Whether SDPA with the mask as it is means the same: spelled out, a boolean one may hide by a finite number."""
    mask = fake(a.mask_node)
    if mask is None:
        return a.mask.is_trivial
    if region.pattern == "sdpa":
        return True
    return mask.dtype == a.fake()[0].dtype and not aliases.is_written(a.mask_node)  # type: ignore[arg-type]


def _expansion(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The linear map behind ``linear(latents).view(B, N, H, C).transpose(1, 2)``, and C."""
    if target(node) is not aten.transpose.int or sorted(int(dim) % 4 for dim in node.args[1:3]) != [1, 2]:  # type: ignore[arg-type]
        return None
    view: Any = node.args[0]
    value = fake(view)
    if target(view) not in RESHAPES or value is None or value.dim() != 4:
        return None
    linear: Any = view.args[0]
    if target(linear) is not aten.linear.default or arguments(linear)["bias"] is not None:
        return None
    source, columns = fake(arguments(linear)["input"]), value.shape[3]
    if source is None or not isinstance(columns, int) or not isinstance(value.shape[2], int):
        return None
    if source.dim() not in (3, 4) or (source.dim() == 4 and not same(source.shape[1], 1)):
        return None
    rows = same(value.shape[0], source.shape[0]) and same(value.shape[1], source.shape[-2])
    whole = same(fake(linear).shape[-1], value.shape[2] * columns)  # type: ignore[union-attr]
    return (linear, columns) if rows and whole else None


def _columns(node: Any) -> tuple[fx.Node, int, int] | None:
    """``(whole, first, count)`` when ``node`` is a range of the last dimension's columns of ``whole``."""
    part = fake(node)
    if part is None:
        return None
    if node.target is operator.getitem and target(node.args[0]) in _SPLITS:
        split, index = node.args
        known = arguments(split)
        before = [piece.shape[-1] for piece in split.meta["val"][:index]]
        first: Any = sum(before)
    elif target(node) in (aten.slice.Tensor, aten.narrow.default):
        known = arguments(node)
        first = known["start"] or 0
        if known.get("step", 1) != 1:
            return None
    else:
        return None
    whole = known["self"]
    value, count = fake(whole), part.shape[-1]
    if value is None or known["dim"] not in (-1, value.dim() - 1):
        return None
    if not isinstance(first, int) or not isinstance(count, int) or not isinstance(value.shape[-1], int):
        return None
    if not same_shape(value.shape[:-1], part.shape[:-1]):
        return None
    return whole, first % value.shape[-1] if count else first, count


def _joined(key: fx.Node, aliases: Aliases) -> tuple[fx.Node, fx.Node, fx.Node, tuple[fx.Node, ...]] | None:
    """The two parts of a key's columns, the node that reads the second of them, and the writes that join them."""
    if target(key) is aten.cat.default:
        known, value = arguments(key), fake(key)
        parts = known["tensors"]
        if value is None or known["dim"] not in (-1, value.dim() - 1) or len(parts) != 2:
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
    places = [_columns(write.args[0]) for write in writes]
    if any(place is None or place[0] is not key for place in places):
        return None
    ordered = sorted(zip(places, writes), key=lambda pair: pair[0][1])  # type: ignore[index]
    (_, start, size), (_, middle, rest) = (place for place, _ in ordered)  # type: ignore[misc]
    if start != 0 or middle != size or not same(size + rest, fake(key).shape[-1]):  # type: ignore[union-attr]
        return None
    first, second = (write for _, write in ordered)
    for write in (first, second):
        into, source = fake(write.args[0]), fake(write.args[1])
        if into is None or source is None or into.dtype != source.dtype or not same_shape(into.shape, source.shape):
            return None
    return first.args[1], second.args[1], second, tuple(writes)  # type: ignore[return-value]


def _shared_by_heads(node: Any) -> fx.Node | None:
    """``[B, 1, N, P]`` behind an expansion of it to all heads."""
    if target(node) is not aten.expand.default:
        return None
    source, value = fake(node.args[0]), fake(node)
    if source is None or value is None or source.dim() != 4 or not same(source.shape[1], 1):
        return None
    alike = all(same(source.shape[i], value.shape[i]) for i in (0, 2, 3))
    return node.args[0] if alike else None


def _fit(
    a: Attention,
    latents: Any,
    weight: Any,
    rotated: fx.Node,
    keys: tuple[fx.Node, int, int],
    values: tuple[fx.Node, int, int],
    columns: int,
) -> bool:
    """Whether the sizes are those of one batch of tokens and heads, in one dtype."""
    query, key, value = a.fake()
    c, w, rope = fake(latents), fake(weight), fake(rotated)
    if c is None or w is None or rope is None or not (query.dtype == c.dtype == w.dtype == rope.dtype == key.dtype):
        return False
    heads = query.shape[1]
    tokens = same(c.shape[0], key.shape[0]) and same(c.shape[-2], key.shape[2])
    sizes = [size for size in (heads, query.shape[2], rope.shape[3], c.shape[-1]) if not isinstance(size, int)]
    return (
        not sizes
        and tokens
        and same(key.shape[1], heads)
        and same(value.shape[1], heads)
        and same_shape(w.shape, (heads * columns, c.shape[-1]))
        and same(key.shape[3], keys[2] + rope.shape[3])
        and same(query.shape[3], key.shape[3])
        and same(value.shape[3], values[2])
    )


def _pays(a: Attention, value_size: int) -> bool:
    """Whether attending to latents takes fewer products than expanding them.

    Expanded, a key costs ``R`` products for each column of each head, once; as latents about ``2 R`` a query.
    """
    queries, keys = a.queries, a.keys
    if not isinstance(queries, int) or queries > _FEW or 4 * queries > a.fake()[1].shape[3] + value_size:
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
