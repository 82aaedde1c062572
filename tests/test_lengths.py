"""A mask that is read as a length gives each query exactly the keys that the mask shows."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lz_compile.aliasing import Aliases
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.lengths import Prefix, accepted_prefix, emit_prefix, find_prefix
from lz_compile.lowering.semantic import attend, visible_keys
from lz_compile.lowering.work import attention_work, visible_pairs
from lz_compile.mask import Bound, Chunk, Index, MaskForm, Read
from lz_compile.region import Attention, Region

aten = torch.ops.aten


class Site:
    """A region of its own: query, key, value and a 0-d position (or one a row) as placeholders.

    ``write`` adds ``cache.index_copy_(2, arange(M) + position, ...)`` on a cache as long as the keys.
    """

    def __init__(
        self,
        form: Callable[[Read], MaskForm],
        queries: int,
        keys: int,
        by_row: bool = False,
        write: str = "",
        batch: int = 2,
    ) -> None:
        self.queries, self.keys, self.batch = queries, keys, batch
        self.graph = fx.Graph()
        with FakeTensorMode():
            self.query = self.placeholder("query", torch.empty(batch, 4, queries, 8))
            self.key = self.placeholder("key", torch.empty(batch, 2, keys, 8))
            self.value = self.placeholder("value", torch.empty(batch, 2, keys, 8))
            shape = (batch,) if by_row else ()
            self.position = self.placeholder("position", torch.empty(shape, dtype=torch.int64))
            anchor = self.graph.call_function(operator.pos, (self.query,))
            anchor.meta["val"] = torch.empty(batch, 4, queries, 8)
        read = Read(self.position, (Index("b"),) if by_row else (), 0, anchor)
        attention = Attention(self.query, self.key, self.value, 0.5, form(read))
        self.region = Region("attention", "sdpa", anchor, "test", attention=attention)
        self.emitter = Emitter(self.graph, Aliases(self.graph))
        if write:
            self.write(write)

    def placeholder(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, target: Any, *args: Any, **keywords: Any) -> fx.Node:
        return self.emitter.call(self.region.output, target, *args, **keywords)

    def write(self, kind: str) -> None:
        count = self.queries
        if kind == "of one position":
            count = 1
        position = self.position
        if kind == "of a position that was written":
            self.call(aten.add_.Tensor, position, 1)
        if kind == "through casts":
            position = self.call(aten._to_copy.default, position, dtype=torch.int64)
        index = self.call(aten.add.Tensor, self.call(aten.arange.default, count), position)
        if kind == "through an index that was written":
            self.call(aten.sub_.Tensor, index, 3)
        if kind == "through casts":
            index = self.call(aten._to_copy.default, index, dtype=torch.int64)
        source = self.call(aten.slice.Tensor, self.key, 2, 0, count)
        self.call(aten.index_copy_.default, self.call(aten.clone.default, self.key), 2, index, source)

    def run(self, prefix: Prefix, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Visible keys [B, 1, M, N] as the mask says, and as a kernel that takes the prefix sees them."""
        inputs = emit_prefix(self.emitter, self.region, prefix)
        bounds = self.emitter.mask_arguments(self.region).bounds
        self.graph.output((inputs.key, inputs.lengths, bounds))
        for node in [n for n in self.graph.nodes if n.target is aten.index_copy_.default]:
            self.graph.erase_node(node)
        self.graph.erase_node(self.region.output)
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        tensors = [torch.zeros(n.meta["val"].shape) for n in (self.query, self.key, self.value)]
        key, lengths, limits = module(*tensors, position)
        sizes = (self.batch, self.queries, self.keys, torch.device("cpu"))
        expected = visible_keys(limits, None, None, None, None, 0, *sizes)
        return expected, seen(prefix, self.batch, self.queries, self.keys, key.shape[2], lengths)


def seen(prefix: Prefix, batch: int, queries: int, keys: int, kept: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """FlashAttention's documented semantics, as a mask over all keys: lengths, then limits from the bottom right."""
    if lengths is None:
        lengths = torch.full((batch,), kept, dtype=torch.int32)
    else:
        assert lengths.dtype == torch.int32 and lengths.is_contiguous() and lengths.shape == (batch,)
        assert bool(((lengths >= 0) & (lengths <= keys)).all())
    length = lengths.to(torch.int64)[:, None, None]
    diagonal = torch.arange(queries)[None, :, None] + length - queries
    k = torch.arange(keys)[None, None, :]
    visible = (k < length).expand(batch, queries, keys)
    right = 0 if prefix.causal else prefix.window_right
    if right is not None:
        visible = visible & (k <= diagonal + right)
    if prefix.window_left is not None:
        visible = visible & (k >= diagonal - prefix.window_left)
    return visible[:, None]


@st.composite
def bounds(draw: Any, around: list[int], together: bool | None) -> tuple[bool, int]:
    """Whether it moves with the position (``together``: as all do), and its constant."""
    moves = draw(st.booleans()) if together is None else together
    return moves, draw(st.sampled_from(around)) + draw(st.integers(-2, 2))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_prefix_shows_exactly_the_keys_that_the_mask_shows(data: st.DataObject) -> None:
    queries = data.draw(st.sampled_from([1, 1, 2, 5, 9]))
    keys = data.draw(st.integers(1, 12))
    together = data.draw(st.sampled_from([None, False, True]))

    def several(most: int, *around: int) -> list[tuple[bool, int]]:
        return data.draw(st.lists(bounds(list(around), together), max_size=most))

    terms = {
        "upper": several(2, 0, keys - queries),
        "lower": several(2, 0, 1 - queries),
        "start": several(1, 0, keys - queries),
        "stop": several(1, queries, keys),
    }
    for name in data.draw(st.sampled_from([(), ("lower", "start"), ("start", "stop"), ("start",)])):
        terms[name] = []
    by_row = data.draw(st.booleans())
    empty_row = data.draw(st.sampled_from(["zero", "mean"]))
    write = data.draw(st.sampled_from(["", "plain", "through casts", "of one position"])) if not by_row else ""
    if write and queries > keys:
        write = ""

    def form(read: Read) -> MaskForm:
        def made(moves: bool, const: int) -> Bound:
            return Bound(const, ((1, read),) if moves else ())

        return MaskForm(**{k: tuple(made(*b) for b in v) for k, v in terms.items()}, empty_row=empty_row)  # type: ignore[arg-type]

    site = Site(form, queries, keys, by_row, write)
    prefix = find_prefix(site.region)
    if isinstance(prefix, str):
        return
    assert accepted_prefix(site.region) == prefix
    written = 1 if write == "of one position" else queries
    low, high = (0, keys - written) if write else (-2 * keys, 2 * keys)
    count = site.batch if by_row else 1
    values = data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    position = torch.tensor(values) if by_row else torch.tensor(values[0])
    expected, got = site.run(prefix, position)
    assert torch.equal(expected.expand_as(got), got)
    if not prefix.may_be_empty or empty_row != "zero":
        assert bool(got.any(-1).all())


@pytest.mark.parametrize("position", [-3, 0, 4, 11, 12, 40])
def test_decode_takes_any_position_as_a_length(position: int) -> None:
    site = Site(lambda read: MaskForm(upper=(Bound(0, ((1, read),)),)), 1, 12)
    prefix = find_prefix(site.region)
    assert prefix == Prefix(has_lengths=True, may_be_empty=True)
    expected, got = site.run(prefix, torch.tensor(position))
    assert torch.equal(expected, got)


def test_a_length_of_each_row_runs_as_attend_does() -> None:
    site = Site(lambda read: MaskForm(stop=(Bound(1, ((1, read),)),)), 3, 12, by_row=True)
    prefix = find_prefix(site.region)
    assert prefix == Prefix(has_lengths=True, may_be_empty=True, same_for_all_rows=False)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    expected, got = site.run(prefix, torch.tensor([4, -1]))
    assert got[0].any() and not got[1].any()
    torch.testing.assert_close(attend(q, k, v, mask=got), attend(q, k, v, mask=expected))
    assert bool((attend(q, k, v, mask=got)[1] == 0).all())


def moving(read: Read) -> MaskForm:
    return MaskForm(upper=(Bound(0, ((1, read),)),))


def test_several_queries_at_a_position_need_the_write_that_proves_it() -> None:
    assert find_prefix(Site(moving, 4, 12).region) == "no proof that as many keys exist as the mask may show"
    proved = Prefix(has_lengths=True, causal=True)
    for write in ("plain", "through casts"):
        assert find_prefix(Site(moving, 4, 12, write=write).region) == proved
    for write in ("of one position", "of a position that was written", "through an index that was written"):
        assert isinstance(find_prefix(Site(moving, 4, 12, write=write).region), str), write


@pytest.mark.parametrize(
    "moves, upper, stop, expected",
    [
        (False, 1, 5, Prefix(keys=5, causal=True)),
        (False, 1, 4, "both a causal limit and a number of keys"),
        (True, 0, 4, Prefix(has_lengths=True, causal=True)),
        (True, 0, 3, "both a causal limit and a number of keys"),
    ],
)
def test_a_number_of_keys_beside_a_causal_limit_must_not_hide_the_last_querys_last_key(
    moves: bool, upper: int, stop: int, expected: Prefix | str
) -> None:
    def form(read: Read) -> MaskForm:
        reads = ((1, read),) if moves else ()
        return MaskForm(upper=(Bound(upper, reads),), stop=(Bound(stop, reads),))

    assert find_prefix(Site(form, 4, 12, write="plain" if moves else "").region) == expected


def test_a_row_without_keys_that_is_not_zero_needs_the_proof_that_there_is_none() -> None:
    def mean(read: Read) -> MaskForm:
        return MaskForm(upper=(Bound(0, ((1, read),)),), empty_row="mean")

    assert "may see no key" in str(find_prefix(Site(mean, 1, 12).region))
    assert find_prefix(Site(mean, 1, 12, write="plain").region) == Prefix(has_lengths=True)


def test_a_window_that_moves_with_the_position_has_a_static_size() -> None:
    def sliding(read: Read) -> MaskForm:
        return MaskForm(upper=(Bound(0, ((1, read),)),), lower=(Bound(-3, ((1, read),)),))

    assert find_prefix(Site(sliding, 1, 12, write="plain").region) == Prefix(None, True, True, window_left=3)
    assert find_prefix(Site(sliding, 4, 12, write="plain").region) == Prefix(None, True, True, window_left=3)
    assert find_prefix(Site(sliding, 1, 12).region) == "no proof that the window ends inside the keys"


def test_a_window_as_large_as_the_cache_is_dropped() -> None:
    def sliding(read: Read) -> MaskForm:
        return MaskForm(upper=(Bound(0, ((1, read),)),), lower=(Bound(-11, ((1, read),)),))

    assert find_prefix(Site(sliding, 1, 12, write="plain").region) == Prefix(has_lengths=True)
    with_trust = Site(sliding, 1, 12).region
    assert isinstance(find_prefix(with_trust), str)
    assert accepted_prefix(with_trust) == Prefix(has_lengths=True)


STATIC = {
    "none": (MaskForm(), Prefix()),
    "square causal": (MaskForm(upper=(Bound(0),)), Prefix(causal=True)),
    "square causal window": (MaskForm(upper=(Bound(0),), lower=(Bound(-2),)), Prefix(causal=True, window_left=2)),
    "both sides": (MaskForm(upper=(Bound(2),), lower=(Bound(-2),)), Prefix(window_left=2, window_right=2)),
    "fewer keys": (MaskForm(stop=(Bound(5),)), Prefix(keys=5)),
    "terms that hide nothing": (
        MaskForm(upper=(Bound(7),), lower=(Bound(-7),), start=(Bound(-1),), stop=(Bound(8),)),
        Prefix(),
    ),
    "causal with a redundant stop": (MaskForm(upper=(Bound(0),), stop=(Bound(8),)), Prefix(causal=True)),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_masks_need_no_lengths(name: str) -> None:
    form, prefix = STATIC[name]
    assert find_prefix(Site(lambda read: form, 8, 8).region) == prefix


def test_causal_from_the_top_left_over_more_keys_cuts_the_keys() -> None:
    site = Site(lambda read: MaskForm(upper=(Bound(0),)), 4, 12)
    assert find_prefix(site.region) == Prefix(keys=4, causal=True)
    assert emit_prefix(site.emitter, site.region, Prefix(keys=4, causal=True)).key.meta["val"].shape[2] == 4


def test_what_is_no_prefix_is_declined() -> None:
    declined: dict[str, Callable[[Read], MaskForm]] = {
        "takes no chunked mask": lambda read: MaskForm(chunk=Chunk(4)),
        "takes no key padding": lambda read: MaskForm(key_padding=(read,)),
        "keys in front": lambda read: MaskForm(start=(Bound(2),)),
        "both a causal limit": lambda read: MaskForm(upper=(Bound(0),), stop=(Bound(5),)),
        "the window is empty": lambda read: MaskForm(upper=(Bound(0),), lower=(Bound(1),)),
        "no key is visible": lambda read: MaskForm(stop=(Bound(0),)),
        "the mask is not proved": lambda read: MaskForm(bias=read.node),
    }
    for reason, form in declined.items():
        assert reason in str(find_prefix(Site(form, 8, 8).region)), reason


def test_lengths_of_one_mask_are_computed_once() -> None:
    site = Site(moving, 1, 12, write="plain")
    prefix = find_prefix(site.region)
    assert isinstance(prefix, Prefix)
    first, second = (emit_prefix(site.emitter, site.region, prefix) for _ in range(2))
    assert first.lengths is second.lengths is not None


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_the_estimate_counts_the_pairs_of_a_static_mask(queries: int, keys: int, data: st.DataObject) -> None:
    upper, width = data.draw(st.integers(-4, 12)), data.draw(st.integers(0, 12))
    start, stop = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 12))
    form = MaskForm((Bound(upper),), (Bound(upper - width),), (Bound(start),), (Bound(stop),))
    q, k = torch.arange(queries)[:, None], torch.arange(keys)
    visible = (k <= q + upper) & (k >= q + upper - width) & (k >= start) & (k < stop)
    pairs, touched = visible_pairs(form, queries, keys)
    assert pairs == visible.sum()
    assert touched >= visible.any(0).sum()


def test_a_causal_prefill_is_half_the_work_and_a_decode_reads_half_the_cache() -> None:
    full = attention_work(Site(lambda read: MaskForm(), 64, 64).region, 0.5)
    causal = attention_work(Site(lambda read: MaskForm(upper=(Bound(0),)), 64, 64).region, 0.5)
    assert full.flops == 4.0 * 2 * 4 * 64 * 64 * 8
    assert causal.flops / full.flops == (64 + 1) / 2 / 64
    assert causal.bytes == full.bytes == 4 * 2 * 16 * (4 * 64 + 2 * 64)
    decode = attention_work(Site(moving, 1, 64).region, 0.5)
    assert decode.flops == full.flops / 64 / 2
    assert decode.bytes == 4 * 2 * 16 * (4 + 2 * 32)


def test_what_a_cache_write_proves_dies_with_its_graph() -> None:
    site = Site(moving, 4, 12, write="plain")
    assert isinstance(find_prefix(site.region), Prefix)
    graph = weakref.ref(site.graph)
    del site
    gc.collect()
    assert graph() is None
