"""Grouped-query heads: the key/value tensor before it was repeated for every query head."""

from __future__ import annotations

import torch.fx as fx

from lz_compile.patterns.walk import COPIES, arguments, aten, fake, same, same_shape, target

_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}


def ungroup(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The ``[B, Hkv, N, D]`` value behind a ``[B, Hkv * G, N, D]`` repetition, and the nodes in between, first to last.

    Query head ``h`` must read key/value head ``h // G``.  Spellings: ``x[:, :, None].expand(...).reshape(...)``
    (``repeat_kv``), ``repeat_interleave(x, G, 1)``, and a broadcast of one head.  Returns ``(node, [])`` when there is
    no repetition.
    """
    for spelling in (_expand_reshape, _repeat_interleave, one_head):
        found = spelling(node)
        if found is not None:
            return found
    return node, []


def _expand_reshape(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    outer = fake(node)
    if target(node) not in _RESHAPES or outer is None or outer.dim() != 4:
        return None
    inner: fx.Node = node.args[0]  # type: ignore[assignment]
    copies: list[fx.Node] = []
    while target(inner) in COPIES:
        copies.append(inner)
        inner = inner.args[0]  # type: ignore[assignment]
    if target(inner) is not aten.expand.default:
        return None
    unsqueezed: fx.Node = inner.args[0]  # type: ignore[assignment]
    slices: list[fx.Node] = []
    while target(unsqueezed) is aten.alias.default or _keeps_everything(unsqueezed):
        slices.append(unsqueezed)
        unsqueezed = unsqueezed.args[0]  # type: ignore[assignment]
    if target(unsqueezed) is not aten.unsqueeze.default:
        return None
    base = unsqueezed.args[0]
    shape, wide = fake(base), fake(inner)
    if shape is None or wide is None or shape.dim() != 4 or wide.dim() != 5:
        return None
    if unsqueezed.args[1] % 5 != 2:  # type: ignore[operator]
        return None
    batch, heads, keys, size = shape.shape
    kept = same(wide.shape[0], batch) and same(wide.shape[1], heads) and same(wide.shape[3], keys)
    merged = same(outer.shape[1], heads * wide.shape[2]) and same(outer.shape[2], keys) and same(outer.shape[3], size)
    if not (kept and merged and same(outer.shape[0], batch) and same(wide.shape[4], size)):
        return None
    between = [unsqueezed, *reversed(slices), inner, *reversed(copies), node]
    return base, between  # type: ignore[return-value]


def _keeps_everything(node: fx.Node) -> bool:
    """``x[:]``, which tracing keeps where the length is known only at run time."""
    if target(node) is not aten.slice.Tensor:
        return False
    known = arguments(node)
    before, after = fake(known["self"]), fake(node)
    whole = known["start"] in (None, 0) and known["step"] == 1
    return whole and before is not None and after is not None and same_shape(before.shape, after.shape)


def _repeat_interleave(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    if target(node) is not aten.repeat_interleave.self_int:
        return None
    known = arguments(node)
    base = known["self"]
    shape = fake(base)
    if shape is None or shape.dim() != 4 or known["dim"] is None or known["dim"] % 4 != 1:
        return None
    return (base, [node]) if isinstance(known["repeats"], int) else None


def one_head(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """``[B, 1, N, D]`` behind an expansion of it to all heads, and that expansion."""
    outer = fake(node)
    if target(node) is not aten.expand.default or outer is None or outer.dim() != 4:
        return None
    base = node.args[0]
    shape = fake(base)
    if shape is None or shape.dim() != 4 or not same(shape.shape[1], 1):
        return None
    if not all(same(shape.shape[i], outer.shape[i]) for i in (0, 2, 3)):
        return None
    return base, [node]  # type: ignore[return-value]
