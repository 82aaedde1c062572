"""Inserting calls into the graph: fake values kept up to date, masks in normal form turned into kernel arguments.

Enters: regions with their :class:`~lz_compile.mask.MaskForm`.  Leaves: graph nodes.  What several layers share (the
bounds of one mask) is computed once, in front of the first layer that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.compat import fake_mode_of
from lz_compile.insert import insert_call
from lz_compile.lowering.semantic import BOUND_COLUMNS, EMPTY_ROW, NO_LOWER, NO_UPPER
from lz_compile.mask import Bound, Documents, MaskForm, Read
from lz_compile.region import Region

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskArguments:
    """A mask as the ``attend`` kernels take it (see lowering.semantic.attend); None where a part is absent."""

    bounds: fx.Node | None = None
    key_mask: fx.Node | None = None
    query_documents: fx.Node | None = None
    key_documents: fx.Node | None = None
    mask: fx.Node | None = None
    chunk: int = 0
    empty_row: int = 0


class Emitter:
    """Inserts nodes in front of an anchor and remembers what was inserted."""

    def __init__(self, graph: fx.Graph, aliases: Aliases) -> None:
        self.graph = graph
        self.aliases = aliases
        self._shared: dict[Hashable, Any] = {}
        self._fake_mode = fake_mode_of([node.meta.get("val") for node in graph.nodes])

    def call(self, anchor: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One call in front of ``anchor``; its fake value comes from running ``target`` on fake values."""
        return insert_call(self._fake_mode, anchor, target, *args, **kwargs)

    def shared(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """``build()`` the first time; later layers get the same nodes, which stand in front of them."""
        if key not in self._shared:
            self._shared[key] = build()
        return self._shared[key]

    def inputs(self, region: Region) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Query, key and value of an attention region, 4-d."""
        a = region.attention
        assert a is not None
        if a.stacked is None:
            return a.query, a.key, a.value
        return tuple(self._unstacked(region.output, node, a.stacked) for node in (a.query, a.key, a.value))  # type: ignore[return-value]

    def _unstacked(self, anchor: fx.Node, node: fx.Node, heads: int) -> fx.Node:
        if heads:
            return self.call(anchor, aten.unflatten.int, node, 0, [-1, heads])
        return self.call(anchor, aten.unsqueeze.default, node, 0)

    def result(self, region: Region, node: fx.Node) -> fx.Node:
        """A kernel's 4-d result in the shape of the region's output."""
        a = region.attention
        assert a is not None
        return node if a.stacked is None else self.call(region.output, aten.flatten.using_ints, node, 0, 1)

    def attend(self, region: Region, op: Any) -> fx.Node:
        """A call of ``op``, which takes the arguments of :func:`lz_compile.lowering.semantic.attend`, for a region."""
        a = region.attention
        assert a is not None
        m = self.mask_arguments(region)
        tensors = (m.bounds, m.key_mask, m.query_documents, m.key_documents, m.mask)
        numbers = (float(a.scale), float(a.softcap), m.chunk, m.empty_row)
        sink = () if a.sink is None else (a.sink,)
        return self.result(region, self.call(region.output, op, *self.inputs(region), *tensors, *numbers, *sink))

    def mask_arguments(self, region: Region) -> MaskArguments:
        """The mask of an attention region as kernel arguments."""
        attention = region.attention
        assert attention is not None
        if attention.mask.is_trivial:
            return MaskArguments()
        versions = [
            self.aliases.version(node, region.output)
            for node in (attention.mask.dense, attention.mask.bias)
            if node is not None
        ]
        sizes = (str(attention.batch), str(attention.queries), str(attention.keys))
        key = ("mask", attention.mask, sizes, tuple(versions))
        return self.shared(key, lambda: _MaskEmission(self, region).build())


class _MaskEmission:
    """Emits one mask in front of one anchor."""

    def __init__(self, emitter: Emitter, region: Region) -> None:
        attention = region.attention
        assert attention is not None
        self.emitter = emitter
        self.anchor = region.output
        self.form: MaskForm = attention.mask
        self.attention = attention
        self.device = attention.query.meta["val"].device
        query, key, _ = emitter.inputs(region)
        self.batch = self._size(query, 0)
        self.queries = self._size(query, 2)
        self.keys = self._size(key, 2)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.emitter.call(self.anchor, target, *args, **kwargs)

    def build(self) -> MaskArguments:
        form = self.form
        key_mask = self._key_mask()
        mask = self._dense_mask()
        if len(form.documents) > 1:
            raise NotImplementedError("a mask with two document terms")
        documents = form.documents[0] if form.documents else None
        return MaskArguments(
            bounds=self._bounds(key_mask, mask),
            key_mask=key_mask,
            query_documents=self._documents(documents, "queries") if documents else None,
            key_documents=self._documents(documents, "keys") if documents else None,
            mask=mask,
            chunk=form.chunk.size if form.chunk else 0,
            empty_row=EMPTY_ROW[form.empty_row],
        )

    # -- sizes and runtime integers

    def _size(self, node: fx.Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)

    def _column(self, value: int | fx.Node) -> fx.Node:
        """An int32 column [B] from a number, a 0-d or a [B] tensor."""
        if isinstance(value, int):
            value = max(min(value, NO_UPPER), NO_LOWER)
            return self.call(aten.full.default, [self.batch], value, dtype=torch.int32, device=self.device)
        if not isinstance(value.meta["val"], torch.Tensor):
            return self.call(aten.full.default, [self.batch], value, dtype=torch.int32, device=self.device)
        return self.call(aten.expand.default, value, [self.batch])

    def _bound(self, bound: Bound) -> int | fx.Node:
        """The value of a bound: a number, or an int32 tensor, 0-d or [B]."""
        total: fx.Node | None = None
        for coefficient, read in bound.reads:
            term = self._read(read)
            if coefficient != 1:
                term = self.call(aten.mul.Tensor, term, coefficient)
            total = term if total is None else self.call(aten.add.Tensor, total, term)
        if total is None:
            return bound.const
        return self.call(aten.add.Tensor, total, bound.const) if bound.const else total

    def _tightest(self, bounds: tuple[Bound, ...], pick: Any, combine: Any) -> int | fx.Node | None:
        """The smallest (or largest) of several bounds; None when there are none."""
        values = [self._bound(bound) for bound in bounds]
        if not values:
            return None
        numbers = [value for value in values if isinstance(value, int)]
        result: int | fx.Node | None = pick(numbers) if numbers else None
        for value in values:
            if isinstance(value, fx.Node):
                result = value if result is None else self._combine(combine, result, value)
        return result

    def _combine(self, combine: Any, a: int | fx.Node, b: int | fx.Node) -> fx.Node:
        return self.call(combine, self._column(a), self._column(b))

    def _snapshot(self, read: Read) -> fx.Node:
        """The tensor of a read as it stood when it was read: itself, or a copy made before it was written.

        Later layers share what is made of it, so a write after the anchor asks for a copy too.
        """
        node = read.node
        if not isinstance(node.meta["val"], torch.Tensor):
            return node
        if not self.emitter.aliases.written_after(node, read.version):
            return node
        assert read.reader is not None, f"{node.name} is written before it is used and its reader is unknown"
        reader = read.reader
        return self.emitter.shared(
            ("snapshot", node, read.version), lambda: self.emitter.call(reader, aten.clone.default, node)
        )

    def _read(self, read: Read) -> fx.Node:
        """A read that depends on the batch row at most, as int32: 0-d or [B]."""
        node = self._snapshot(read)
        if not isinstance(node.meta["val"], torch.Tensor):
            return self.call(aten.full.default, [], node, dtype=torch.int32, device=self.device)
        axes = [index.axis for index in read.index]
        for dim in reversed(range(len(read.index))):
            index = read.index[dim]
            if index.axis is None:
                node = self.call(aten.select.int, node, dim, index.shift)
            elif index.axis != "b":
                raise NotImplementedError(f"a bound that depends on {index.axis}")
            else:
                node = self._part(node, dim, index.shift, self.batch)
        if axes.count("b") > 1:
            raise NotImplementedError("a bound that reads the batch index twice")
        if node.meta["val"].dtype != torch.int32:
            if node.meta["val"].dtype == torch.int64:  # "no limit" is often the greatest number of the dtype
                node = self.call(aten.clamp.default, node, NO_LOWER, NO_UPPER)
            node = self.call(aten._to_copy.default, node, dtype=torch.int32)
        return node

    def _part(self, node: fx.Node, dim: int, start: int, size: Any) -> fx.Node:
        """``size`` elements from ``start`` on."""
        if not start and str(node.meta["val"].shape[dim]) == str(_value(size)):
            return node
        end = self.call(torch.sym_sum, [size, start]) if isinstance(size, fx.Node) else start + size
        return self.call(aten.slice.Tensor, node, dim, start, end)

    # -- tensors

    def _rows(self, read: Read, axis: str, length: Any) -> fx.Node:
        """A read indexed by ``b`` and one more axis, or by fewer, as a [B, length] tensor."""
        node = self._snapshot(read)
        kept: list[str] = []
        dim = 0
        for index in read.index:
            if index.axis is None:
                node = self.call(aten.select.int, node, dim, index.shift)
                continue
            if index.axis not in ("b", axis):
                raise NotImplementedError(f"a term indexed by {index.axis}")
            node = self._part(node, dim, index.shift, self.batch if index.axis == "b" else length)
            kept.append(index.axis)
            dim += 1
        if kept == [axis, "b"]:
            node = self.call(aten.transpose.int, node, 0, 1)
        elif kept == [axis]:
            node = self.call(aten.unsqueeze.default, node, 0)
        elif kept == ["b"]:
            node = self.call(aten.unsqueeze.default, node, 1)
        elif kept not in ([], ["b", axis]):
            raise NotImplementedError(f"a term indexed by {kept}")
        return self.call(aten.expand.default, node, [self.batch, length])

    def _key_mask(self) -> fx.Node | None:
        result: fx.Node | None = None
        visible = [(read, False) for read in self.form.key_padding]
        hidden = [(read, True) for read in self.form.key_hidden]
        for read, hides in visible + hidden:
            rows = self._rows(read, "k", self.keys)
            if hides:
                rows = self.call(aten.logical_not.default, rows)
            result = rows if result is None else self.call(aten.logical_and.default, result, rows)
        return result

    def _documents(self, documents: Documents, side: str) -> fx.Node:
        if side == "queries":
            return self._rows(documents.queries, "q", self.queries)
        return self._rows(documents.keys, "k", self.keys)

    def _dense_mask(self) -> fx.Node | None:
        form = self.form
        if form.bias is not None:
            return form.bias
        if form.dense is None:
            return None
        return self.call(aten.logical_not.default, form.dense) if form.dense_hides else form.dense

    # -- bounds

    def _bounds(self, key_mask: fx.Node | None, mask: fx.Node | None) -> fx.Node:
        form = self.form
        upper = self._tightest(form.upper, min, aten.minimum.default)
        lower = self._tightest(form.lower, max, aten.maximum.default)
        start = self._tightest(form.start, max, aten.maximum.default)
        stop = self._tightest((*form.stop,), min, aten.minimum.default)
        first: int | fx.Node = 0 if start is None else start
        last: int | fx.Node = self.keys if stop is None else stop
        holes: int | fx.Node = 0
        rows = self._visible_somewhere(key_mask, mask)
        if rows is not None:
            seen_first, seen_last, holes = self._range(rows)
            first = self._combine(aten.maximum.default, first, seen_first)
            last = self._combine(aten.minimum.default, last, seen_last)
        chunk = form.chunk
        columns = [
            NO_UPPER if upper is None else upper,
            NO_LOWER if lower is None else lower,
            first,
            last,
            self._bound(chunk.offset) if chunk else 0,
            self._bound(chunk.origin) if chunk else 0,
            holes,
            0,
        ]
        assert len(columns) == BOUND_COLUMNS
        return self.call(aten.stack.default, [self._column(column) for column in columns], 1)

    def _visible_somewhere(self, key_mask: fx.Node | None, mask: fx.Node | None) -> fx.Node | None:
        """bool [B, N]: keys that some query may see, from what has to be read anyway; None when nothing is read.

        A dense mask is reduced only for a few queries: for a long prefill reading it twice costs more than it saves.
        """
        rows = key_mask
        queries = self.attention.queries
        if mask is not None and isinstance(queries, int) and queries <= 16:
            value = mask.meta["val"]
            shown = mask
            if value.dtype != torch.bool:
                shown = self.call(aten.gt.Scalar, mask, torch.finfo(value.dtype).min)
            for _ in range(4 - value.dim()):
                shown = self.call(aten.unsqueeze.default, shown, 0)
            if not _all_one(shown.meta["val"].shape[1:3]):
                shown = self.call(aten.any.dims, shown, [1, 2], True)
            shown = self.call(aten.select.int, self.call(aten.select.int, shown, 1, 0), 1, 0)
            shown = self.call(aten.expand.default, shown, [self.batch, self.keys])
            rows = shown if rows is None else self.call(aten.logical_and.default, rows, shown)
        return rows

    def _range(self, rows: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """First visible key, last visible key + 1, and whether a hidden one lies between, int32 [B] each."""
        index = self.call(aten.arange.default, self.keys, dtype=torch.int32, device=self.device)
        first = self.call(aten.amin.default, self.call(aten.where.ScalarOther, rows, index, NO_UPPER), [1])
        last = self.call(aten.amax.default, self.call(aten.where.ScalarOther, rows, index, -1), [1])
        last = self.call(aten.add.Tensor, last, 1)
        count = self.call(aten.sum.dim_IntList, rows, [1], dtype=torch.int32)
        spread = self.call(aten.sub.Tensor, last, first)
        holes = self.call(aten._to_copy.default, self.call(aten.lt.Tensor, count, spread), dtype=torch.int32)
        return first, last, holes


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size


def _all_one(sizes: Any) -> bool:
    return all(isinstance(size, int) and size == 1 for size in sizes)
