"""A region taken out of its graph, to be run on its own: how kernels are qualified and measured.

Enters: an attention region of a normalised graph.  Leaves: a :class:`Specimen`, which builds small graph modules of the
region (by a kernel's own ``emit``, or the nodes as they stood) and draws inputs for them: queries, keys and values of
the region's shapes and strides, and values for whatever its mask reads when it runs.

Sizes that are symbolic take the value they have in the call that is being compiled.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lz_compile.aliasing import Aliases
from lz_compile.mask import Bound, Documents, MaskForm, Read
from lz_compile.region import Attention, Region

Draw = Literal["typical", "other"]
Emit = Callable[[Any, Region], fx.Node]


class NoSpecimen(Exception):
    """The region cannot be run on its own; the message says why."""


@dataclass(frozen=True)
class Layout:
    """Sizes, strides and dtype of a tensor, as numbers."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: torch.Tensor) -> Layout:
        return cls(tuple(map(hint, value.shape)), tuple(map(hint, value.stride())), value.dtype, value.device)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=self.device)

    @property
    def bytes(self) -> int:
        """Memory that the elements span."""
        if 0 in self.sizes:
            return 0
        return (1 + sum((n - 1) * s for n, s in zip(self.sizes, self.strides))) * self.dtype.itemsize


def hint(size: Any) -> int:
    """A size as a number: of a symbolic one, what it is in the call that is being compiled."""
    if isinstance(size, int):
        return size
    known = size.node.hint if isinstance(size, torch.SymInt) else None
    if known is None:
        raise NoSpecimen(f"the size {size} is not known while compiling")
    return int(known)


@dataclass
class Specimen:
    """One attention region on its own.

    ``sources`` are the values of the original graph that enter it, in the order of the inputs of every module that
    :meth:`build` and :meth:`as_it_stood` make: query, key, value, then what the mask reads, then attention sinks.
    """

    region: Region
    copied: bool
    sources: list[fx.Node] = field(default_factory=list)
    layouts: dict[fx.Node, Layout | int] = field(default_factory=dict)

    @classmethod
    def of(cls, region: Region, copied: bool) -> Specimen:
        """``copied``: whoever reads the result copies it anyway, so that its memory layout costs nothing.

        Raises:
            NoSpecimen: with the reason.
        """
        attention = region.attention
        if attention is None:
            raise NoSpecimen(f"regions of kind {region.kind} are not run on their own")
        specimen = cls(region, copied)
        rest = [node for node in (attention.mask_node, attention.sink) if node is not None]
        for node in (attention.query, attention.key, attention.value, *nodes_of(attention.mask), *rest):
            if node in specimen.layouts:
                continue
            value = node.meta["val"]
            specimen.sources.append(node)
            specimen.layouts[node] = Layout.of(value) if isinstance(value, torch.Tensor) else hint(value)
        return specimen

    @property
    def attention(self) -> Attention:
        assert self.region.attention is not None
        return self.region.attention

    @property
    def output(self) -> Layout:
        return Layout.of(self.region.output.meta["val"])

    @property
    def device(self) -> torch.device:
        return self.output.device

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Batch, query heads, key/value heads, queries, keys."""
        a = self.attention
        return hint(a.batch), hint(a.query_heads), hint(a.kv_heads), hint(a.queries), hint(a.keys)

    @property
    def roots(self) -> list[int]:
        """Inputs that differ from layer to layer; what depends on the others alone is computed once for all."""
        a = self.attention
        return sorted({self.sources.index(node) for node in (a.query, a.key, a.value)})

    # -- modules

    def build(self, emit: Emit, make_emitter: Callable[[fx.Graph, Aliases], Any]) -> fx.GraphModule:
        """The module of ``emit``, which gets an emitter and this region on a graph of its own and returns a node."""
        module, inputs = self._inputs()
        graph = module.graph
        mapping = dict(zip(self.sources, inputs))
        attention = dataclasses.replace(
            self.attention,
            query=mapping[self.attention.query],
            key=mapping[self.attention.key],
            value=mapping[self.attention.value],
            mask=moved(self.attention.mask, mapping),
            mask_node=mapping[self.attention.mask_node] if self.attention.mask_node is not None else None,
            sink=mapping[self.attention.sink] if self.attention.sink is not None else None,
        )
        anchor = graph.call_function(nothing, (mapping[self.attention.query],))
        with inputs[0].meta["val"].fake_mode:
            anchor.meta["val"] = self.output.empty()
        region = dataclasses.replace(self.region, output=anchor, nodes=[], attention=attention)
        return emitted(module, emit, make_emitter, region)

    def as_it_stood(self) -> fx.GraphModule:
        """The region's own nodes, from query, key, value and mask to its output.

        Raises:
            NoSpecimen: the nodes read something that is not among the sources.
        """
        module, inputs = self._inputs()
        graph = module.graph
        mapping = dict(zip(self.sources, inputs))
        for node in between(set(self.sources), self.region.output):
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        graph.output(mapping[self.region.output])
        module.recompile()
        return module

    def _inputs(self) -> tuple[fx.GraphModule, list[fx.Node]]:
        """A module with nothing but inputs; an emitter may put submodules into it."""
        module, inputs = fx.GraphModule(torch.nn.Module(), fx.Graph()), []
        with FakeTensorMode():
            for position, node in enumerate(self.sources):
                layout = self.layouts[node]
                placeholder = module.graph.placeholder(f"input_{position}")
                placeholder.meta["val"] = layout.empty() if isinstance(layout, Layout) else layout
                inputs.append(placeholder)
        return module, inputs

    # -- inputs

    def draw(self, kind: Draw, visible: Callable[[list[Any]], torch.Tensor], seed: int = 0) -> list[Any]:
        """Real inputs for the sources.

        ``"typical"``: half of a cache is filled, a quarter of every second row is padding.  ``"other"``: other lengths,
        padding with holes, rows without keys.  ``visible`` computes the boolean mask ``[B, H or 1, M, N]`` of the
        inputs from the mask's normal form; it gives the tensor that the graph had as its mask, where there is one
        beside the form, and hides in an unproved mask what the form's proved terms hide.  Draws with one seed are equal
        on one device.

        Raises:
            NoSpecimen: the values cannot be drawn.
        """
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{kind} {seed}".encode()))
        try:
            return _Inputs(self, kind, generator).draw(visible)
        except (torch.OutOfMemoryError, NoSpecimen):
            raise
        except Exception as error:
            raise NoSpecimen(f"no inputs for it: {type(error).__name__}: {error}") from error


def emitted(
    module: fx.GraphModule, emit: Emit, make_emitter: Callable[[fx.Graph, Aliases], Any], region: Region
) -> fx.GraphModule:
    """The module with what ``emit`` inserts for ``region``, whose output is the anchor that goes away."""
    graph = module.graph
    graph.output(emit(make_emitter(graph, Aliases(graph)), region))
    graph.erase_node(region.output)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def nothing(value: Any) -> Any:
    raise AssertionError("the anchor of a specimen does not run")


def nodes_of(form: Any) -> Iterable[fx.Node]:
    """The graph values that a mask form reads, in the order of its fields."""
    if isinstance(form, fx.Node):
        yield form
    elif isinstance(form, tuple):
        for item in form:
            yield from nodes_of(item)
    elif isinstance(form, Read):
        yield form.node
    elif dataclasses.is_dataclass(form):
        for item in dataclasses.fields(form):
            yield from nodes_of(getattr(form, item.name))


def moved(form: Any, mapping: dict[fx.Node, fx.Node]) -> Any:
    """A mask form over the nodes of another graph, in which nothing is written."""
    if isinstance(form, fx.Node):
        return mapping[form]
    if isinstance(form, tuple):
        return tuple(moved(item, mapping) for item in form)
    if isinstance(form, Read):
        return dataclasses.replace(form, node=mapping[form.node], version=0, reader=None)
    if dataclasses.is_dataclass(form) and not isinstance(form, type):
        fields = {item.name: moved(getattr(form, item.name), mapping) for item in dataclasses.fields(form)}
        return dataclasses.replace(form, **fields)
    return form


def between(first: set[fx.Node], last: fx.Node, constants: bool = False) -> list[fx.Node]:
    """The nodes from ``first`` (left out) to ``last``, in graph order, those of ``constants`` too where asked for."""
    found: set[fx.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node in first or node in found:
            continue
        if node.op != "call_function" and not (constants and node.op == "get_attr"):
            raise NoSpecimen(f"it reads {node.name}, which is neither query, key, value nor mask")
        found.add(node)
        waiting += node.all_input_nodes
        if len(found) > 200:
            raise NoSpecimen("it is not bounded by query, key, value and mask")
    return [node for node in last.graph.nodes if node in found]


class _Inputs:
    """Draws one set of inputs."""

    def __init__(self, specimen: Specimen, kind: Draw, generator: torch.Generator) -> None:
        self.specimen = specimen
        self.typical = kind == "typical"
        self.generator = generator
        self.values: dict[fx.Node, Any] = {}
        self.batch, _, _, self.queries, self.keys = specimen.sizes

    def draw(self, visible: Callable[[list[Any]], torch.Tensor]) -> list[Any]:
        a = self.specimen.attention
        self._tensor(a.query, self._normal(a.query) * self._unit_scores(a))
        for node in (a.key, a.value):
            self._tensor(node, self._normal(node))
        if a.sink is not None:
            self._tensor(a.sink, self._normal(a.sink))
        self._mask(a.mask)
        unproved = [(a.mask.dense, a.mask.dense_hides), (a.mask.bias, False)]
        drawn = [(node, hides) for node, hides in unproved if node is not None and node not in self.values]
        for node, hides in drawn:
            layout = self._layout(node)
            shows = layout.dtype == torch.bool and not hides
            self._tensor(node, torch.full((), shows, dtype=layout.dtype, device=layout.device))
        if drawn:
            terms = visible(self._known(a.mask_node))
            for node, hides in drawn:
                self._dense(node, hides, terms)
        if a.mask_node is not None and a.mask_node not in self.values:
            self._tensor(a.mask_node, self._mask_tensor(a.mask_node, visible(self._known(a.mask_node))))
        return [self.values[node] for node in self.specimen.sources]

    def _known(self, unknown: fx.Node | None) -> list[Any]:
        """The values so far, in the order of the sources; memory with any content for the one that is still unknown."""
        known = [self.values.get(node) for node in self.specimen.sources]
        if unknown is not None and unknown not in self.values:
            known[self.specimen.sources.index(unknown)] = self._layout(unknown).empty()
        return known

    def _layout(self, node: fx.Node) -> Layout:
        layout = self.specimen.layouts[node]
        assert isinstance(layout, Layout)
        return layout

    def _tensor(self, node: fx.Node, value: torch.Tensor) -> None:
        if node in self.values:
            return
        layout = self._layout(node)
        result = layout.empty()
        fill(result, value.expand(layout.sizes))
        self.values[node] = result

    def _normal(self, node: fx.Node) -> torch.Tensor:
        layout = self._layout(node)
        wide = torch.promote_types(layout.dtype, torch.float32)
        return torch.randn(layout.sizes, generator=self.generator, device=layout.device, dtype=wide)

    def _unit_scores(self, a: Attention) -> float:
        """The factor that gives scores a deviation of one, as a trained model's have: not all on one key."""
        return 1.0 / (abs(a.scale) * math.sqrt(self._layout(a.query).sizes[-1])) if a.scale else 1.0

    # -- what the mask reads

    def _mask(self, form: MaskForm) -> None:
        offset = max(self._length() - self.queries, 0)
        for bound in form.upper:
            self._bound(bound, offset)
        if form.chunk is not None:
            self._bound(form.chunk.offset, offset)
            self._bound(form.chunk.origin, 0)
        for bound in form.stop:
            self._bound(bound, self._length())
        for bound in form.start:
            self._bound(bound, self._length() // 8)
        for bound in form.lower:
            self._bound(bound, -self.keys)
        for read in (*form.key_padding, *form.key_hidden):
            # A decode step that gets its mask from outside: all that it says of the cache's filling is in there.
            fills = self.queries <= 16 and not (form.upper or form.stop)
            self._padding(read, hides=read in form.key_hidden, filled=self._length() if fills else self.keys)
        for documents in form.documents:
            self._documents(documents)

    def _length(self) -> int:
        """How many keys the last query may see."""
        share = 0.5 if self.typical else 0.85
        return min(max(int(share * self.keys), self.queries), self.keys)

    def _bound(self, bound: Bound, wanted: int) -> None:
        """Gives the first free read of a bound the value that brings it to ``wanted``; later ones are zero."""
        rest = wanted - bound.const
        for coefficient, read in bound.reads:
            if read.node not in self.values:
                value = rest // coefficient
                layout = self.specimen.layouts[read.node]
                if not isinstance(layout, Layout):
                    self.values[read.node] = value = layout  # a Python number of the call that is compiled
                else:
                    spread = torch.full(layout.sizes, value, dtype=torch.int64, device=layout.device)
                    if not self.typical and "b" in read.axes:
                        rows = torch.arange(spread.numel(), device=layout.device).reshape(layout.sizes)
                        spread -= (rows % 3) * coefficient
                    self._tensor(read.node, spread)
            else:
                known = self.values[read.node]
                value = int(known.flatten()[0]) if isinstance(known, torch.Tensor) else int(known)
            rest -= coefficient * value

    def _padding(self, read: Read, hides: bool, filled: int) -> None:
        if read.node in self.values:
            return
        layout = self._layout(read.node)
        length = layout.sizes[-1] if layout.sizes else 1
        position = torch.arange(length, device=layout.device).expand(layout.sizes)
        rows = torch.arange(math.prod(layout.sizes) // max(length, 1), device=layout.device)
        row = rows.reshape(*layout.sizes[:-1], 1) if layout.sizes else rows
        shown = ((position >= filled // 4) | (row % 2 == 0)) & (position < filled)
        if not self.typical:
            noise = torch.rand(layout.sizes, generator=self.generator, device=layout.device, dtype=torch.float32)
            hole = noise < 0.1
            shown = torch.where(row % 3 == 1, position < length - length // 3, ~hole)
            shown &= row % 4 != 3
        self._tensor(read.node, ~shown if hides else shown)

    def _documents(self, documents: Documents) -> None:
        """Documents follow each other; fewer queries than keys stand at the end of what is filled, as in a cache."""
        parts = 4 if self.typical else 7
        for read, end in ((documents.keys, 0), (documents.queries, self._length())):
            if read.node in self.values:
                continue
            layout = self._layout(read.node)
            length = layout.sizes[-1] if layout.sizes else 1
            position = torch.arange(length, device=layout.device).expand(layout.sizes) + max(end - length, 0)
            self._tensor(read.node, position * parts // max(self.keys, 1))

    def _dense(self, node: fx.Node, hides: bool, terms: torch.Tensor) -> None:
        """An unproved mask: what ``terms``, proved beside it, hide, it hides, since they follow from it.

        In float16 it leaves no row without keys that the terms show: the least number is too small there to make all
        scores equal, so that such a row would be a matter of rounding.
        """
        layout = self._layout(node)
        sizes = (1,) * (4 - len(layout.sizes)) + layout.sizes
        q = torch.arange(sizes[2], device=layout.device)[:, None]
        k = torch.arange(sizes[3], device=layout.device)
        shown = (k <= q + max(self._length() - sizes[2], 0)).expand(sizes)
        if not self.typical:
            noise = torch.rand(sizes, generator=self.generator, device=layout.device, dtype=torch.float32)
            shown = noise < 0.6
            shown[..., -1, :] &= torch.arange(sizes[0], device=layout.device)[:, None, None] % 4 != 3
        possible = _reduced(terms, layout)
        shown = shown.reshape(layout.sizes) & possible
        if layout.dtype == torch.float16:
            shown = torch.where(shown.any(-1, keepdim=True), shown, possible)
        del self.values[node]
        if layout.dtype == torch.bool:
            self._tensor(node, ~shown if hides else shown)
        else:
            bias = torch.zeros((), device=layout.device) if self.typical else self._normal(node)
            self._tensor(node, bias.to(layout.dtype).masked_fill(~shown, torch.finfo(layout.dtype).min))

    def _mask_tensor(self, node: fx.Node, visible: torch.Tensor) -> torch.Tensor:
        """The mask as the graph had it, from what is visible: ``[B, H or 1, M, N]`` in the shape of ``node``."""
        layout = self._layout(node)
        shown = _reduced(visible, layout)
        if layout.dtype == torch.bool:
            return shown
        finite = self.specimen.attention.mask.empty_row in ("mean", "safe mean", "unmasked")
        fill = torch.finfo(layout.dtype).min if finite else -math.inf
        return torch.zeros(layout.sizes, device=layout.device, dtype=layout.dtype).masked_fill(~shown, fill)


def _reduced(visible: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``visible`` in the shape of a mask tensor; along dimensions that the tensor broadcasts all entries are equal."""
    sizes = (1,) * (4 - len(layout.sizes)) + layout.sizes
    for dim, size in enumerate(sizes):
        if size == 1 and visible.shape[dim] != 1:
            visible = visible.narrow(dim, 0, 1)
    return visible.expand(sizes).reshape(layout.sizes)


def copy_of(value: Any) -> Any:
    """A tensor with the same values and strides in memory of its own; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    fill(result, value)
    return result


def fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies values between tensors of equal sizes; dimensions that ``target`` expands are written once."""
    strides = zip(target.shape, target.stride())
    index = tuple(slice(0, 1) if not stride and size != 1 else slice(None) for size, stride in strides)
    target[index].copy_(source[index])
