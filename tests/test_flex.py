"""flex_attention from proved masks: the mask function, the block lists, the generated kernel, the caches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import lz_compile
from lz_compile.aliasing import Aliases
from lz_compile.lowering import flex
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.semantic import (
    CHUNK_ORIGIN,
    CHUNK_SHIFT,
    LOWER,
    NO_LOWER,
    NO_UPPER,
    START,
    STOP,
    UPPER,
    attend,
    visible_keys,
)
from lz_compile.mask import Bound, Chunk, Documents, Index, MaskForm, Read
from lz_compile.region import Attention, Region

CUDA = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
_HOP = torch.ops.higher_order.flex_attention


@dataclass
class Site:
    """One attention in a graph of its own; ``values`` are what its mask reads, by name."""

    tensors: tuple[torch.Tensor, ...]
    scale: float = 0.25
    softcap: float = 0.0
    form: MaskForm = field(default_factory=MaskForm)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    stacked: int | None = None

    def __post_init__(self) -> None:
        self.root = torch.nn.Module()
        self.graph = fx.Graph(self.root)  # type: ignore[arg-type]
        self.mode = FakeTensorMode()
        self.inputs: list[torch.Tensor] = []
        self.qkv = [self.input(name, value) for name, value in zip("qkv", self.tensors)]

    def input(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(value)
        self.inputs.append(value)
        return node

    @property
    def region(self) -> Region:
        if not hasattr(self, "_region"):
            anchor = self.graph.call_function(torch.ops.aten.clone.default, (self.qkv[0],))
            anchor.meta["val"] = self.qkv[0].meta["val"]
            a = Attention(*self.qkv, self.scale, self.form, None, self.softcap, self.stacked)
            self._region = Region("attention", "sdpa", anchor, "", attention=a)
        return self._region

    def emit(self, layers: int = 1) -> fx.GraphModule:
        emitter = Emitter(self.graph, Aliases(self.graph))
        anchor = self.region.output
        results = [flex.ATTENTION.emit(emitter, self.region) for _ in range(layers)]
        self.graph.output(results[0] if layers == 1 else tuple(results))
        self.graph.erase_node(anchor)
        return fx.GraphModule(self.root, self.graph)


def qkv(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, dtype: torch.dtype = torch.float32, size: int = 16
) -> tuple[torch.Tensor, ...]:
    device = "cuda" if CUDA else "cpu"
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads, size, generator=generator).to(device, dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, keys, size, generator=generator).to(device, dtype) for _ in range(2))
    return q, k, v


@dataclass
class Drawn:
    """A site with a mask of random terms, and that mask in the arguments of ``attend``."""

    site: Site
    bounds: torch.Tensor
    key_mask: torch.Tensor | None = None
    documents: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    chunk: int = 0

    def visible(self) -> torch.Tensor:
        q, k, _ = self.site.tensors
        sizes = (q.shape[0], q.shape[2], k.shape[2])
        mask = (self.bounds, self.key_mask, *self.documents, None, self.chunk)
        return visible_keys(*mask, *sizes, q.device)

    def expected(self) -> torch.Tensor:
        wide = [x.double() for x in self.site.tensors]
        mask = (self.bounds, self.key_mask, *self.documents, None)
        return attend(*wide, *mask, self.site.scale, self.site.softcap, self.chunk)


@st.composite
def sites(draw: st.DrawFn) -> Drawn:
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, keys = draw(st.sampled_from([17, 128, 150, 300])), draw(st.sampled_from([20, 128, 256, 290]))
    site = Site(qkv(batch, kv_heads * group, kv_heads, queries, keys), softcap=draw(st.sampled_from([0.0, 0.0, 2.0])))
    device = site.tensors[0].device
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    row = [NO_UPPER, NO_LOWER, 0, keys, 0, 0, 0, 0]
    bounds = torch.tensor([row] * batch, dtype=torch.int32, device=device)
    terms: dict[str, Any] = {}

    def bound(name: str, column: int, low: int, high: int) -> Bound:
        """A number, or one that a tensor of the whole batch, or of each row, holds."""
        kind = draw(st.sampled_from(["static", "shared", "per row"]))
        const = draw(st.integers(low, high))
        if kind == "static":
            bounds[:, column] = const
            return Bound(const)
        extra = torch.randint(0, 40, (batch if kind == "per row" else 1,), generator=generator).to(device)
        bounds[:, column] = const + extra
        index = Index("b") if kind == "per row" else Index(None)
        return Bound(const, ((1, Read(site.input(name, extra), (index,))),))

    if draw(st.booleans()):
        terms["upper"] = (bound("upper", UPPER, -30, keys - 5),)
    if draw(st.booleans()):
        terms["lower"] = (bound("lower", LOWER, -300, 20),)
    if draw(st.integers(0, 3)) == 0:
        terms["start"] = (bound("start", START, 0, 30),)
    if draw(st.integers(0, 3)) == 0:
        terms["stop"] = (bound("stop", STOP, 5, keys),)
    chunk = 0
    if draw(st.integers(0, 3)) == 0:
        chunk = draw(st.sampled_from([1, 16, 128, 150]))
        parts = (bound("shift", CHUNK_SHIFT, -20, 60), bound("origin", CHUNK_ORIGIN, -20, 20))
        terms["chunk"] = Chunk(chunk, *parts)
    key_mask = None
    if draw(st.booleans()):
        per_row = draw(st.booleans())
        mask = torch.rand(batch if per_row else 1, keys, generator=generator).to(device) < draw(
            st.sampled_from([0.0, 0.5, 0.98])
        )
        node = site.input("padding", mask)
        terms["key_padding"] = (Read(node, (Index("b") if per_row else Index(None), Index("k"))),)
        key_mask = mask.expand(batch, keys)
    documents: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if draw(st.integers(0, 2)) == 0:
        ids = [torch.randint(0, 3, (batch, n), generator=generator).sort(-1).values.to(device) for n in (queries, keys)]
        nodes = [site.input(f"documents_{i}", x) for i, x in enumerate(ids)]
        axes = ("q", "k")
        terms["documents"] = (Documents(*(Read(n, (Index("b"), Index(x))) for n, x in zip(nodes, axes))),)  # type: ignore[arg-type]
        documents = (ids[0], ids[1])
    if not terms:
        terms["upper"] = (bound("upper", UPPER, 0, 9),)
    site.form = MaskForm(**terms)
    return Drawn(site, bounds, key_mask, documents, chunk)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(sites())
def test_the_mask_function_is_the_form_and_the_block_lists_name_every_visible_block_once(drawn: Drawn) -> None:
    module = drawn.site.emit()
    q, k, _ = drawn.site.tensors
    call = module.graph.find_nodes(op="call_function", target=_HOP)[0]
    mask_mod = getattr(module, call.args[4][-1].target)
    tensors = run_until(module, call.args[8], drawn.site.inputs)
    visible = drawn.visible().expand(q.shape[0], 1, q.shape[2], k.shape[2])[:, 0]
    index = [torch.arange(n, dtype=torch.int32, device=q.device) for n in visible.shape]
    b, m, n = index[0][:, None, None], index[1][None, :, None], index[2][None, None, :]
    assert torch.equal(mask_mod(b, b, m, n, *tensors).expand(visible.shape), visible)
    counts = run_until(module, call.args[4][2:6], drawn.site.inputs)
    assert_blocks(counts, visible)


def run_until(module: fx.GraphModule, nodes: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The values of some nodes of a graph."""
    known: dict[fx.Node, Any] = dict(zip(module.graph.find_nodes(op="placeholder"), inputs))
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is not _HOP and all(a in known for a in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
            known[node] = node.target(*args, **kwargs)
    return [known[node] for node in nodes]


def assert_blocks(lists: list[torch.Tensor], visible: torch.Tensor) -> None:
    partly_count, partly, whole_count, whole = lists
    rows, size = partly.shape[0], flex.BLOCK
    for b in range(visible.shape[0]):
        row = 0 if rows == 1 else b
        for i, block_row in enumerate(visible[b].split(size)):
            parts, wholes = [], []
            for j, block in enumerate(block_row.split(size, 1)):
                if block.shape == (size, size) and bool(block.all()):
                    wholes.append(j)
                elif bool(block.any()):
                    parts.append(j)
            assert partly[row, 0, i, : int(partly_count[row, 0, i])].tolist() == parts
            assert whole[row, 0, i, : int(whole_count[row, 0, i])].tolist() == wholes


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(sites())
def test_the_operator_run_eagerly_gives_the_oracles_answer_with_the_strides_of_the_fake(drawn: Drawn) -> None:
    if CUDA:
        pytest.skip("float32 runs compiled on the CPU only")
    assert flex.ATTENTION.supports(drawn.site.region) is None or torch.__version__ < (2, 13)
    module = drawn.site.emit()
    with torch.no_grad():
        out = module(*drawn.site.inputs)
    torch.testing.assert_close(out.double(), drawn.expected(), atol=2e-5, rtol=2e-5)
    fake = next(iter(reversed(module.graph.nodes))).args[0].meta["val"]
    assert (out.shape, out.stride()) == (fake.shape, fake.stride())


def test_layers_share_block_lists_and_the_mask_function() -> None:
    site = Site(qkv(2, 4, 2, 300, 300), form=MaskForm(upper=(Bound(0),), lower=(Bound(-99),)))
    module = site.emit(layers=3)
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(_HOP) == 3
    assert targets.count(torch.ops.aten.argsort.stable) == 2
    assert len(list(module.children())) == 2


def test_a_mask_of_numbers_reads_nothing_and_is_listed_once_for_the_batch() -> None:
    site = Site(qkv(2, 4, 2, 300, 300), form=MaskForm(upper=(Bound(0),), lower=(Bound(-99),)))
    call = site.emit().graph.find_nodes(op="call_function", target=_HOP)[0]
    assert call.args[8] == ()
    assert call.args[4][2].meta["val"].shape == (1, 1, 3)


WINDOW = MaskForm(upper=(Bound(0),), lower=(Bound(-9),))


@pytest.mark.parametrize(
    ("expected", "keywords", "shape"),
    [
        ("not proved", {"form": MaskForm(dense=fx.Graph().placeholder("m"))}, (300, 300)),
        ("not proved", {"form": MaskForm(bias=fx.Graph().placeholder("m"))}, (300, 300)),
        ("no mask", {"form": MaskForm()}, (300, 300)),
        ("queries or more", {"form": WINDOW}, (1, 300)),
        ("'mean'", {"form": MaskForm(upper=(Bound(-1),), empty_row="mean")}, (300, 300)),
        ("'nan'", {"form": MaskForm(stop=(Bound(3),), empty_row="nan")}, (300, 300)),
        ("", {"form": MaskForm(upper=(Bound(0),), lower=(Bound(-9),), empty_row="mean")}, (300, 300)),
        ("", {"form": MaskForm(upper=(Bound(-1),))}, (300, 300)),
    ],
)
def test_what_it_would_answer_otherwise_is_declined(
    expected: str, keywords: dict[str, Any], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_supports_cpu", lambda query: None)
    dtype = torch.bfloat16 if CUDA else torch.float32
    reason = flex.ATTENTION.supports(Site(qkv(1, 2, 2, *shape, dtype=dtype), **keywords).region)
    assert reason is None if not expected else expected in (reason or "")


def test_dtypes_and_layouts_without_a_kernel_are_declined() -> None:
    if CUDA:
        return
    for dtype, reason in ((torch.float64, "float64"), (torch.bfloat16, "2.13")):
        why_not = flex.ATTENTION.supports(Site(qkv(1, 2, 2, 300, 300, dtype), form=WINDOW).region)
        assert reason in (why_not or "2.13")
    strided = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv(1, 2, 2, 300, 300))
    assert "strided" in (flex.ATTENTION.supports(Site(strided, form=WINDOW).region) or "")


# -- compiled


OPTIONS = {"prefer": ["flex.*"], "measure": "off", "strict": True}


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from lz_compile.lowering import kernels

    monkeypatch.setattr(kernels, "OPTIONAL", ("flex",))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# No earlier run has left a graph with this scale in Inductor's caches.
SCALE = random.uniform(0.2, 0.3)


class Windowed(torch.nn.Module):
    """Layers of packed, padded, windowed attention with grouped heads that share memory."""

    def __init__(self, window: int, size: int = 16, layers: int = 1, packed: bool = True) -> None:
        super().__init__()
        self.window, self.size, self.layers, self.packed = window, size, layers, packed
        torch.manual_seed(0)
        self.project = torch.nn.Linear(32, 8 * size)
        self.back = torch.nn.Linear(4 * size, 32)

    def forward(self, x: torch.Tensor, valid: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        index = torch.arange(x.shape[1], device=x.device)
        mask = (index[None] <= index[:, None]) & (index[None] > index[:, None] - self.window)
        mask = mask[None, None]
        if self.packed:
            mask = mask & valid[:, None, None, :] & (documents[:, None, :, None] == documents[:, None, None, :])
        for _ in range(self.layers):
            q, k, v = self.project(x).unflatten(-1, (8, self.size)).transpose(1, 2).split([4, 2, 2], 1)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE)
            x = x + self.back(out.transpose(1, 2).flatten(2))
        return x


def arguments(length: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, :40] = False  # rows 0 to 39 see nothing
    documents = torch.arange(length)[None] // torch.tensor([[70], [length]])
    return x.to(device), valid.to(device), documents.to(device)


def counts() -> dict[str, int]:
    from torch._dynamo.utils import counters

    names = ["autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass"]
    return {name: counters["aot_autograd"][name] for name in names} | {
        "fxgraph_cache_miss": counters["inductor"]["fxgraph_cache_miss"],
        "fxgraph_cache_bypass": counters["inductor"]["fxgraph_cache_bypass"],
    }


def compile_and_run(window: int, inputs: tuple[torch.Tensor, ...]) -> dict[str, int]:
    """Compiles anew, compares with eager, and says what the caches did."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = Windowed(window).eval()
    with torch.no_grad():
        got = torch.compile(model, backend="layerzero", options=OPTIONS, fullgraph=True)(*inputs)
        torch.testing.assert_close(got, model(*inputs), atol=2e-5, rtol=2e-5)
    assert [region.kernel for region in lz_compile.reports()[-1].regions] == ["flex.attention"]
    return counts()


cpu_compiles = pytest.mark.skipif(
    CUDA or torch.__version__ < (2, 13) or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="needs the CPU's kernel of PyTorch 2.13",
)


@pytest.mark.slow
@cpu_compiles
@pytest.mark.usefixtures("_registered")
def test_a_compiled_model_is_right_and_comes_from_the_caches_the_second_time() -> None:
    inputs = arguments(200)
    first = compile_and_run(100, inputs)
    assert first["autograd_cache_miss"] == 1 and first["autograd_cache_bypass"] == 0
    assert first["fxgraph_cache_bypass"] == 0
    again = compile_and_run(100, inputs)
    assert again["autograd_cache_hit"] == 1 and again["fxgraph_cache_miss"] == 0


@cpu_compiles
@pytest.mark.slow
@pytest.mark.usefixtures("_registered")
def test_the_caches_tell_masks_apart() -> None:
    inputs = arguments(200)
    for window in (90, 60, 7):  # none that another test has put into the caches
        assert compile_and_run(window, inputs)["autograd_cache_hit"] == 0


@cpu_compiles
@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(sites())
def test_generated_kernels_give_the_oracles_answer(drawn: Drawn) -> None:
    from torch._inductor.compile_fx import compile_fx

    module = drawn.site.emit()
    fake = next(iter(reversed(module.graph.nodes))).args[0].meta["val"]
    for node in module.graph.nodes:
        node.meta = {}
    with torch.no_grad():
        out = compile_fx(module, drawn.site.inputs)(*drawn.site.inputs)
    out = out[0] if isinstance(out, (tuple, list)) else out
    torch.testing.assert_close(out.double(), drawn.expected(), atol=2e-5, rtol=2e-5)
    assert (out.shape, out.stride()) == (fake.shape, fake.stride())


# -- on CUDA


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("_registered")
    @pytest.mark.parametrize("mode", [None, "reduce-overhead"])
    def test_windows_give_the_oracles_answer(self, mode: str | None) -> None:
        """Without padding: where cuDNN is PyTorch's pick, a row without keys is not what flex_attention gives."""
        model = Windowed(100, 64, 2, packed=False).eval().to("cuda", torch.bfloat16)
        exact = Windowed(100, 64, 2, packed=False).eval().to("cuda", torch.bfloat16).double()
        keywords: dict[str, Any] = {"options": OPTIONS}
        if mode is not None:
            keywords["options"] = {**OPTIONS, "triton.cudagraphs": True}
        compiled = torch.compile(model, backend="layerzero", fullgraph=True, **keywords)
        for length in (300, 300, 300):
            x, valid, documents = arguments(length, "cuda")
            x = x.bfloat16()
            with torch.no_grad():
                got, expected = compiled(x, valid, documents).clone(), exact(x.double(), valid, documents)
            torch.testing.assert_close(got.double(), expected, atol=3e-2, rtol=3e-2)
        assert [region.kernel for region in lz_compile.reports()[-1].regions] == ["flex.attention"] * 2
