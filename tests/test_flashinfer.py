"""FlashInfer's kernels: what they are given, what is declined, and the answers, with a stand-in for the library.

The stand-in follows the library's documents: ``NHD`` layout, causal from the bottom right, windows to the left, paged
caches with lengths on the device, semaphores that are zero before and after.  The tests at the end run the library.
"""

from __future__ import annotations

import enum
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from lz_compile.aliasing import Aliases
from lz_compile.lowering import flashinfer as provider
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.lengths import Prefix, find_prefix
from lz_compile.lowering.semantic import attend, attend_output
from lz_compile.normalize import module_path, normalize
from lz_compile.patterns.attention import find_attention
from lz_compile.region import Kernel, Region
from lz_compile.rewrite import rewrite
from road import compile_road

PREFILL, DECODE = provider.PREFILL, provider.DECODE
HOPPER = (9, 0)
Function = Callable[..., torch.Tensor]
Tensors = tuple[torch.Tensor, ...]


# -- the stand-in


class MaskMode(enum.Enum):
    NON_CAUSAL = 0
    CAUSAL = 1


class TensorLayout(enum.Enum):
    NHD = 0
    HND = 1


class Library:
    """Installs modules named as the library's; ``built`` lists the modules that were asked for, ``calls`` the calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.built: list[tuple[Any, ...]] = []
        self.calls: list[dict[str, Any]] = []
        self.on_disk: set[tuple[Any, ...]] = set()
        parts: dict[str, dict[str, Any]] = {
            "flashinfer": {"__path__": []},
            "flashinfer.utils": {"MaskMode": MaskMode, "TensorLayout": TensorLayout},
            "flashinfer.prefill": {"get_single_prefill_module": self.prefill_module},
            "flashinfer.xqa": {"xqa": self.xqa, "get_xqa_module": lambda *key: self.built.append(key)},
            "flashinfer.jit": {"__path__": []},
            "flashinfer.jit.attention": {"gen_single_prefill_module": self.spec},
            "flashinfer.jit.xqa": {"gen_xqa_module": self.spec},
        }
        for name, content in parts.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)

    def spec(self, *key: Any) -> Any:
        return SimpleNamespace(is_compiled=key in self.on_disk)

    def prefill_module(self, *key: Any) -> Any:
        backend, *dtypes, key_size, value_size, rope, has_window, has_softcap, fp16_sums = key
        self.built.append(key)

        def run(q: Any, k: Any, v: Any, workspace: Any, out: Any, lse: Any, mode: int, layout: int, *rest: Any) -> None:
            window_left, packed_mask, alibi, softcap, scale, *scales, _, _ = rest
            assert (q.dtype, k.dtype, out.dtype) == tuple(dtypes)
            assert (q.shape[-1], v.shape[-1]) == (key_size, value_size)
            assert (window_left >= 0, softcap > 0) == (has_window, has_softcap)
            assert layout == TensorLayout.NHD.value and rope == 0 and not fp16_sums
            assert lse is None and packed_mask is None and alibi is None and scales == [None] * 3
            assert backend == "fa3" or workspace.numel() == 0
            self.calls.append({"backend": backend, "tensors": (q, k, v, out)})
            m, n = q.shape[0], k.shape[0]
            position = torch.arange(m)[:, None] + n - m
            index = torch.arange(n)[None]
            visible = torch.ones(m, n, dtype=torch.bool)
            if mode == MaskMode.CAUSAL.value:
                visible &= index <= position
            if window_left >= 0:
                visible &= index >= position - window_left
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, 1).float() for x in (k, v))
            scores = torch.einsum("mhd,nhd->hmn", q.float(), k) * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
            out.copy_(torch.einsum("hmn,nhd->mhd", weights, v))

        return SimpleNamespace(run=run)

    def xqa(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        output: torch.Tensor,
        workspace_buffer: torch.Tensor,
        semaphores: torch.Tensor,
        num_kv_heads: int,
        page_size: int,
        q_scale: float = 1.0,
        sliding_win_size: int = 0,
        kv_layout: str = "NHD",
        enable_pdl: bool | None = None,
    ) -> None:
        batch, one, heads, size = q.shape
        assert one == 1 and q.is_contiguous() and output.is_contiguous() and output.shape == q.shape
        assert kv_layout == "NHD" and k_cache.shape[1:] == (page_size, num_kv_heads, size)
        assert k_cache.stride() == v_cache.stride() and all(s % size == 0 for s in k_cache.stride()[:-1])
        assert seq_lens.dtype == torch.uint32 and seq_lens.shape == (batch, 1) and seq_lens.is_contiguous()
        assert page_table.dtype == torch.int32 and page_table.is_contiguous()
        assert semaphores.numel() >= batch * num_kv_heads and not semaphores.view(torch.int32).any()
        assert workspace_buffer.dtype == torch.uint8
        self.calls.append({"page_size": page_size, "tensors": (q, k_cache, v_cache, output)})
        for b in range(batch):
            length = int(seq_lens[b, 0])
            assert 0 < length <= page_table.shape[1] * page_size
            tokens = torch.arange(length)
            if sliding_win_size:
                tokens = tokens[-sliding_win_size:]
            page = page_table[b].long()[tokens // page_size]
            k, v = (
                cache[page, tokens % page_size].repeat_interleave(heads // num_kv_heads, 1).float()
                for cache in (k_cache, v_cache)
            )
            scores = torch.einsum("hd,nhd->hn", q[b, 0].float(), k) * q_scale / math.sqrt(size)
            output[b, 0].copy_(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The stand-in, on a CPU that says it is a Hopper."""
    monkeypatch.setattr(provider, "capability", lambda device: HOPPER)
    monkeypatch.setattr(provider, "_device_of_module", {})
    return Library(monkeypatch)


# -- regions and the road with one kernel


class With:
    """A Dynamo backend that replaces each attention by ``kernel`` where that takes it, and runs the graph as it is."""

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = kernel
        self.regions: list[Region] = []
        self.verdicts: list[str | None] = []
        self.modules: list[fx.GraphModule] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        normal = normalize(module)
        aliases = Aliases(normal.graph)
        self.regions += (found := find_attention(normal.graph, aliases, module_path))
        if self.kernel is None:
            self.modules.append(normal)
            return module.forward
        verdicts = [self.kernel.supports(region) for region in found]
        self.verdicts += verdicts
        choices = [
            SimpleNamespace(region=region, kernel=None if why_not else self.kernel, reason="", rejected={})
            for region, why_not in zip(found, verdicts)
        ]
        rewrite(normal, aliases, SimpleNamespace(choices=choices), Emitter)  # type: ignore[arg-type]
        normal.graph.lint()
        self.modules.append(normal)
        return normal.forward

    def targets(self) -> list[Any]:
        return [node.target for module in self.modules for node in module.graph.nodes if node.op == "call_function"]


def run_with(kernel: Kernel | None, fn: Function, inputs: Tensors, dynamic: bool = False) -> tuple[torch.Tensor, With]:
    torch._dynamo.reset()
    backend = With(kernel)
    with torch.no_grad():
        return torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs), backend


def region_of(fn: Function, inputs: Tensors, dynamic: bool = False) -> Iterator[Region]:
    """The one region of ``fn``; its graph lives as long as the generator."""
    _, backend = run_with(None, fn, inputs, dynamic)
    (region,) = backend.regions
    yield region


def verdict(kernel: Kernel, fn: Function, inputs: Tensors, dynamic: bool = False) -> str | None:
    (answer,) = [kernel.supports(region) for region in region_of(fn, inputs, dynamic)]
    return answer


def qkv(
    queries: int,
    keys: int,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 64,
    value_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cache: bool = True,
    seed: int = 0,
) -> Tensors:
    """A transposed query; keys and values as a cache keeps them ([B, H, N, D]) or transposed ([B, N, H, D])."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, heads: int, size: int, transposed: bool) -> torch.Tensor:
        shape = (batch, length, heads, size) if transposed else (batch, heads, length, size)
        value = torch.randn(shape, generator=generator).to(dtype)
        return value.transpose(1, 2) if transposed else value

    return (
        draw(queries, heads, size, True),
        draw(keys, kv_heads, size, not cache),
        draw(keys, kv_heads, value_size or size, not cache),
    )


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def banded(upper: int, lower: int | None = None, softcap: float = 0.0, scale: float = 0.125) -> Function:
    """``q + lower <= k <= q + upper``, spelled out."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        visible = column <= row + upper
        if lower is not None:
            visible = visible & (column >= row + lower)
        group = q.shape[1] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
        if not softcap:
            return F.scaled_dot_product_attention(q, k, v, visible, scale=scale)
        scores = torch.tanh(q @ k.transpose(2, 3) * scale / softcap) * softcap
        return torch.softmax(scores + torch.where(visible, 0.0, -math.inf).to(scores.dtype), -1) @ v

    return attend


def decode_step(window: int | None = None) -> Function:
    """A step of a static cache: writes keys and values at ``position``, sees keys up to it."""

    def step(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        new_k: torch.Tensor,
        new_v: torch.Tensor,
        position: torch.Tensor,
    ) -> torch.Tensor:
        index = torch.arange(1) + position
        k.index_copy_(2, index, new_k)
        v.index_copy_(2, index, new_v)
        column = torch.arange(k.shape[2])
        visible = column[None] <= index[:, None]
        if window is not None:
            visible = visible & (column[None] > index[:, None] - window)
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (
            x[:, :, None].expand(-1, -1, group, -1, -1).reshape(*q.shape[:2], -1, x.shape[-1]) for x in (k, v)
        )
        return F.scaled_dot_product_attention(q, wide_k, wide_v, visible[None, None])

    return step


def step_inputs(keys: int = 64, position: int = 20, seed: int = 0, **options: Any) -> Tensors:
    q, k, v = qkv(1, keys, seed=seed, **options)
    new_k, new_v = (x[:, :, :1].clone() + 1 for x in (k, v))
    return q, k, v, new_k, new_v, torch.tensor([position])


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.float(), expected.float(), atol=2e-2, rtol=2e-2, equal_nan=True)


# -- prefill


@pytest.mark.parametrize(
    ("fn", "sizes", "keys_read"),
    [
        (plain, {"queries": 5, "keys": 9}, 9),
        (causal, {"queries": 9, "keys": 9}, 9),
        (causal, {"queries": 9, "keys": 9, "batch": 1, "cache": False}, 9),
        (banded(0), {"queries": 5, "keys": 12}, 5),
        (banded(7), {"queries": 5, "keys": 12}, 12),
        (banded(3), {"queries": 5, "keys": 12}, 8),
        (banded(0, -3), {"queries": 12, "keys": 12}, 12),
        (banded(0, -3, softcap=2.0), {"queries": 12, "keys": 12}, 12),
        (banded(0, softcap=2.0), {"queries": 12, "keys": 12, "dtype": torch.float16}, 12),
        (causal, {"queries": 6, "keys": 6, "size": 192, "value_size": 128}, 6),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(value)),
)
def test_a_prefill_gives_eagers_answer(library: Library, fn: Function, sizes: dict[str, Any], keys_read: int) -> None:
    inputs = qkv(**sizes)
    got, backend = run_with(PREFILL, fn, inputs)
    assert backend.verdicts == [None]
    assert torch.ops.lz_compile.flashinfer_prefill_v1.default in backend.targets()
    assert_close(got, fn(*inputs))
    assert len(library.calls) == inputs[0].shape[0]
    assert {call["tensors"][1].shape[0] for call in library.calls} == {keys_read}


def test_the_prefill_reads_keys_where_they_lie_and_writes_its_result_in_place(library: Library) -> None:
    q, k, v = qkv(6, 6)
    out = torch.ops.lz_compile.flashinfer_prefill_v1(q, k, v, 0.125, 0.0, True, -1)
    assert out.stride() == attend_output(q, v).stride()
    for b, call in enumerate(library.calls):
        for given, whole in zip(call["tensors"], (q, k, v, out)):
            assert given.data_ptr() == whole[b].data_ptr()
            assert given.stride() == whole[b].transpose(0, 1).stride()
    assert_close(out, causal(q, k, v))


def test_hopper_runs_flash_attention_3_and_others_2(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = qkv(6, 6, batch=1)
    run_with(PREFILL, causal, inputs)
    monkeypatch.setattr(provider, "capability", lambda device: (8, 6))
    run_with(PREFILL, causal, inputs)
    assert [call["backend"] for call in library.calls] == ["fa3", "fa2"]
    assert verdict(PREFILL, causal, qkv(6, 6, size=192, value_size=128)) == "does not take head sizes 192 and 128"


def test_a_symbolic_length_needs_no_number(library: Library) -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return causal(*x.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4).unbind())

    torch._dynamo.reset()
    backend = With(PREFILL)
    compiled = torch.compile(attend, backend=backend)
    for length in (7, 11):
        x = torch.randn(2, length, 3 * 2 * 64).bfloat16()
        torch._dynamo.mark_dynamic(x, 1)
        assert_close(compiled(x), attend(x))
    assert backend.verdicts == [None]


def test_a_symbolic_head_size_is_declined(library: Library) -> None:
    answer = verdict(PREFILL, plain, qkv(6, 8), dynamic=True)
    assert answer == "takes head sizes that are known when it is compiled"


def test_three_dimensional_products_are_given_as_four(library: Library) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.125, -1), v)

    inputs = tuple(torch.randn(4, 6, 64).bfloat16() for _ in range(3))
    got, backend = run_with(PREFILL, attend, inputs)
    assert backend.verdicts == [None]
    assert_close(got, attend(*inputs))


def hide(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, causal & valid[:, None, None])


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, causal & (ids[:, None, :, None] == ids[:, None, None, :]))


def chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, (column <= row) & (column // 4 == row // 4))


def up_to(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, (torch.arange(k.shape[2]) <= last)[None, None, None])


def mha(*sizes: int, **options: Any) -> Tensors:
    return qkv(*sizes, heads=2, kv_heads=2, **options)


@pytest.mark.parametrize(
    ("fn", "inputs", "reason"),
    [
        (causal, qkv(8, 8, dtype=torch.float32), "does not take torch.float32"),
        (causal, qkv(8, 8, size=80), "does not take head sizes 80 and 80"),
        (plain, qkv(1, 8), "is for two queries or more"),
        (hide, (*mha(8, 8), torch.rand(8, 8) > 0.5), "the mask is not proved"),
        (hide, (*mha(8, 8), torch.randn(8, 8).bfloat16()), "the mask is not proved"),
        (padded, (*mha(8, 8), torch.ones(2, 8, dtype=torch.bool)), "takes no key padding"),
        (packed, (*mha(8, 8), torch.arange(8).expand(2, 8) // 4), "takes no packed documents"),
        (chunked, mha(8, 8), "takes no chunked mask"),
        (up_to, (*mha(8, 8), torch.tensor(3)), "program 'zero'|known only when the graph runs"),
        (banded(-1), mha(8, 8), "without visible keys"),
        (banded(2, -2), mha(8, 8), "takes no window without a causal limit"),
        (banded(0, scale=1e-4), mha(8, 8), "would let masked keys through"),
        (banded(0, scale=-0.1), mha(8, 8), "would let masked keys through"),
        (plain, tuple(x[..., ::2] for x in qkv(8, 8, size=128)), "the head dimension is strided"),
        (plain, tuple(x[..., 1:65] for x in qkv(8, 8, size=128)), "not aligned to 16 bytes"),
        (plain, tuple(x[..., :64] for x in qkv(8, 8, size=67)), "not a multiple of 16 bytes"),
        (plain, (mha(8, 8)[0], *(x[:1].expand(2, -1, -1, -1) for x in mha(8, 8)[1:])), "reads no expanded tensor"),
    ],
)  # fmt: skip
def test_what_the_prefill_declines(library: Library, fn: Function, inputs: Tensors, reason: str) -> None:
    answer = verdict(PREFILL, fn, inputs)
    assert answer is not None
    assert any(part in answer for part in reason.split("|")), answer


@pytest.mark.parametrize(("device", "reason"), [(None, "runs on CUDA"), ((7, 5), "needs compute capability 8.0")])
def test_other_devices_are_declined(
    library: Library, monkeypatch: pytest.MonkeyPatch, device: tuple[int, int] | None, reason: str
) -> None:
    monkeypatch.setattr(provider, "capability", lambda _: device)
    assert verdict(PREFILL, causal, qkv(8, 8)) == reason
    assert verdict(DECODE, plain, qkv(1, 64)) == reason


# -- decode


@pytest.mark.parametrize("layout", ["cache", "transposed"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", [None, 7])
def test_a_decode_step_follows_the_position(library: Library, window: int | None, batch: int, layout: str) -> None:
    torch._dynamo.reset()
    step, backend = decode_step(window), With(DECODE)
    compiled = torch.compile(step, backend=backend, dynamic=False)
    for position in (0, 3, 15, 16, 47, 63):
        inputs = step_inputs(64, position, seed=position, batch=batch, cache=layout == "cache")
        eager = tuple(x.clone() for x in inputs)
        with torch.no_grad():
            assert_close(compiled(*inputs), step(*eager))
        assert torch.equal(inputs[1], eager[1])
    assert backend.verdicts == [None]
    assert torch.ops.aten.masked_fill.Scalar not in backend.targets()  # the cache write proves that a key is visible


def test_the_decode_of_the_benchmark_is_taken(library: Library) -> None:
    benchmark = pytest.importorskip("benchmarks.signatures", reason="needs the repository's root on the path")
    fn, inputs = benchmark.attention_function(benchmark.Signature("decode", 2, 128, 8, 2, 64), torch.bfloat16, "cpu")
    for region in region_of(fn, inputs):
        assert DECODE.supports(region) is None
        prefix = find_prefix(region)
        assert isinstance(prefix, Prefix) and prefix.has_lengths and not prefix.may_be_empty


@pytest.mark.parametrize(
    ("keys", "page_size"), [(128, 64), (96, 32), (80, 16)], ids=["64 tokens", "32 tokens", "16 tokens"]
)
def test_pages_are_as_large_as_the_cache_allows(library: Library, keys: int, page_size: int) -> None:
    inputs = qkv(1, keys)
    got, backend = run_with(DECODE, plain, inputs)
    assert backend.verdicts == [None]
    assert [call["page_size"] for call in library.calls] == [page_size]
    assert_close(got, plain(*inputs))


def test_the_cache_is_read_where_it_lies(library: Library) -> None:
    q, k, v = qkv(1, 64)
    pages = torch.arange(2, dtype=torch.int32)[:, None] * 4 + torch.arange(2, dtype=torch.int32)
    lengths, semaphores = torch.tensor([64, 40], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    out = torch.ops.lz_compile.flashinfer_decode_v1(q, k, v, lengths, pages, semaphores, 0.125, 32, -1)
    (call,) = library.calls
    assert [x.data_ptr() for x in call["tensors"]] == [x.data_ptr() for x in (q, k, v, out)]
    assert out.stride() == attend_output(q, v).stride()
    visible = torch.arange(64) < lengths[:, None]
    assert_close(out, F.scaled_dot_product_attention(q, k, v, visible[:, None, None], enable_gqa=True))


def test_a_view_of_a_larger_cache_is_paged_through_its_strides(library: Library) -> None:
    q, k, v = qkv(1, 256)
    k, v = (x[:, :, 64:192] for x in (k, v))
    got, backend = run_with(DECODE, plain, (q, k, v))
    assert backend.verdicts == [None]
    assert_close(got, plain(q, k, v))


def test_a_static_stop_becomes_a_length(library: Library) -> None:
    def first_twenty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, (torch.arange(k.shape[2]) < 20)[None, None, None])

    inputs = mha(1, 64)
    got, backend = run_with(DECODE, first_twenty, inputs)
    assert backend.verdicts == [None]
    assert_close(got, first_twenty(*inputs))


def test_a_row_without_keys_gives_zeros_where_eager_does(library: Library) -> None:
    """Nothing proves that ``last`` is not negative, and XQA is made for one key or more."""
    torch._dynamo.reset()
    backend = With(DECODE)
    compiled = torch.compile(up_to, backend=backend, dynamic=False)
    for last in (-1, 0, 40):
        inputs = (*mha(1, 64), torch.tensor(last))
        got = compiled(*inputs)
        assert_close(got, up_to(*inputs))
        assert bool((got == 0).all()) == (last < 0)
    assert backend.verdicts == [None]


def test_layers_share_lengths_page_table_and_semaphores(library: Library) -> None:
    def two_layers(*inputs: torch.Tensor) -> torch.Tensor:
        first = decode_step()(*inputs)
        return decode_step()(first, *inputs[1:])

    got, backend = run_with(DECODE, two_layers, step_inputs())
    calls = [
        node
        for module in backend.modules
        for node in module.graph.nodes
        if node.target is torch.ops.lz_compile.flashinfer_decode_v1.default
    ]
    assert len(calls) == 2
    assert calls[0].args[4:6] == calls[1].args[4:6]
    assert_close(got, two_layers(*step_inputs()))


@pytest.mark.parametrize(
    ("fn", "inputs", "reason"),
    [
        (plain, qkv(1, 64, dtype=torch.float32), "does not take torch.float32"),
        (plain, qkv(2, 64), "is for one query"),
        (plain, qkv(1, 63), "does not divide into pages"),
        (plain, qkv(1, 64, size=72), "head size 72 is no multiple of 16"),
        (plain, qkv(1, 64, size=64, value_size=128), "keys and values of one head size"),
        (plain, qkv(1, 64, heads=17, kv_heads=1), "more than 16 query heads"),
        (plain, (*qkv(1, 64)[:2], qkv(1, 64, cache=False)[2]), "keys and values of equal strides"),
        (plain, (qkv(2, 64)[0][:, :, :1], *qkv(1, 64)[1:]), "the query's rows are not contiguous"),
        (plain, (qkv(1, 64)[0], *(x[..., :64] for x in qkv(1, 64, size=96)[1:])), "no multiples of the head size"),
        (plain, (qkv(1, 64)[0], *(x[:, :, :64] for x in qkv(1, 65)[1:])), "does not divide into pages"),
        (banded(70, softcap=2.0), qkv(1, 64), "has no softcap"),
        (banded(70, scale=-0.1), qkv(1, 64), "takes a positive scale"),
        (hide, (*mha(1, 64), torch.ones(2, 1, 1, 64, dtype=torch.bool)), "takes no key padding"),
        (hide, (*mha(1, 64), torch.ones(2, 2, 1, 64, dtype=torch.bool)), "the mask is not proved"),
        (hide, (*mha(1, 64), torch.zeros(2, 1, 1, 64).bfloat16()), "the mask is not proved"),
        (padded, (*mha(1, 64), torch.ones(2, 64, dtype=torch.bool)), "takes no key padding"),
    ],
)  # fmt: skip
def test_what_the_decode_declines(library: Library, fn: Function, inputs: Tensors, reason: str) -> None:
    answer = verdict(DECODE, fn, inputs)
    assert answer is not None and reason in answer, answer


def test_a_decode_of_symbolic_sizes_is_declined(library: Library) -> None:
    assert verdict(DECODE, plain, qkv(1, 64), dynamic=True) == "takes sizes that are known when it is compiled"


def test_a_decode_on_a_machine_without_xqa_is_declined(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "capability", lambda _: (8, 9))
    assert verdict(DECODE, plain, qkv(1, 64)) == "needs compute capability 9, 10 or 12"


# -- the ops, compilation, the provider


def test_the_fakes_have_the_strides_of_the_kernels(library: Library) -> None:
    ops = torch.ops.lz_compile
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in qkv(6, 6, size=192, value_size=128))
        out = ops.flashinfer_prefill_v1(q, k, v, 0.1, 0.0, True, -1)
        assert out.shape == (2, 4, 6, 128) and out.transpose(1, 2).is_contiguous() and out.dtype == q.dtype
        q, k, v = (mode.from_tensor(x) for x in qkv(1, 64))
        table = torch.zeros(2, 1, dtype=torch.int32)
        out = ops.flashinfer_decode_v1(q, k, v, table[:, 0], table, table, 0.1, 64, -1)
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    assert not library.calls


def test_modules_are_compiled_when_the_call_is_inserted(library: Library) -> None:
    run_with(DECODE, plain, qkv(1, 64))
    assert library.built == [(torch.bfloat16, torch.bfloat16, 64, 64, 2, False, torch.bfloat16, 1)]


def test_a_decode_module_serves_the_device_on_which_it_was_loaded(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(DECODE, plain, qkv(1, 64))
    assert verdict(DECODE, plain, qkv(1, 64)) is None
    (module,) = library.built
    monkeypatch.setitem(provider._device_of_module, module, torch.device("cuda", 1))
    assert verdict(DECODE, plain, qkv(1, 64)) == "this process has set the kernel up for another device"


def test_a_module_that_does_not_compile_leaves_the_region(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any) -> None:
        raise RuntimeError("ninja failed")

    monkeypatch.setattr(sys.modules["flashinfer.prefill"], "get_single_prefill_module", no_compiler)
    inputs = qkv(6, 6)
    got, backend = run_with(PREFILL, causal, inputs)
    assert torch.ops.lz_compile.flashinfer_prefill_v1.default not in backend.targets()
    assert_close(got, causal(*inputs))


@pytest.mark.parametrize(
    ("fn", "inputs", "module"),
    [
        (causal, qkv(6, 6), ("fa3", *[torch.bfloat16] * 3, 64, 64, 0, False, False, False)),
        (banded(0, -3, softcap=2.0), qkv(6, 6), ("fa3", *[torch.bfloat16] * 3, 64, 64, 0, True, True, False)),
        (plain, qkv(1, 64), (torch.bfloat16, torch.bfloat16, 64, 64, 2, False, torch.bfloat16, 1)),
    ],
)
def test_whether_a_module_has_to_be_compiled_is_known(
    library: Library, fn: Function, inputs: Tensors, module: tuple[Any, ...]
) -> None:
    kernel = DECODE if fn is plain else PREFILL
    assert kernel.first_call is not None
    for region in region_of(fn, inputs):
        assert provider.flashinfer_needs_jit(region)
        assert kernel.first_call(region) == provider.JIT_SECONDS
        library.on_disk.add(module)
        assert not provider.flashinfer_needs_jit(region)
        assert kernel.first_call(region) == 0


def test_a_region_that_no_kernel_takes_compiles_nothing(library: Library) -> None:
    for region in region_of(causal, qkv(6, 6, dtype=torch.float32)):
        assert not provider.flashinfer_needs_jit(region)


def test_the_estimates_count_launches_and_bytes() -> None:
    for region in region_of(plain, qkv(6, 64, batch=3)):
        work = PREFILL.work(region)  # type: ignore[misc]
        assert work.launches == 3 and work.flops == 4 * 3 * 4 * 6 * 64 * 64
    for region in region_of(plain, qkv(1, 64)):
        work = DECODE.work(region)  # type: ignore[misc]
        assert work.launches == 1 and work.bytes == 2 * 2 * (2 * 64 * 64 * 2 + 2 * 4 * 64)


def test_the_probe_needs_a_gpu(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provider.PROVIDER.probe == f"{provider.__name__}:{provider.probe.__name__}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        provider.probe()


@pytest.mark.parametrize(
    ("fn", "inputs", "kernel"),
    [(causal, qkv(6, 6), "flashinfer.prefill"), (decode_step(), step_inputs(), "flashinfer.decode")],
    ids=["prefill", "decode"],
)
def test_the_whole_road_picks_a_preferred_kernel(
    library: Library, monkeypatch: pytest.MonkeyPatch, fn: Function, inputs: Tensors, kernel: str
) -> None:
    from lz_compile.lowering import kernels

    monkeypatch.setattr(kernels, "KERNELS", [PREFILL, DECODE])
    monkeypatch.setattr(kernels, "OPTIONAL", ())
    eager = fn(*(x.clone() for x in inputs))
    compiled, road = compile_road(fn, prefer=["flashinfer.*"], measure="off")
    with torch.no_grad():
        assert_close(compiled(*inputs), eager)
    assert road.kernels == [kernel]


# -- the library itself: one prefill module and one decode module


SIZES = {"heads": 32, "kv_heads": 8, "size": 128}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer")
class TestOnGpu:
    @pytest.mark.parametrize(
        ("batch", "queries", "keys", "cache"),
        [(1, 1000, 1000, True), (1, 1000, 1000, False), (2, 77, 300, True), (1, 300, 1301, False)],
    )
    def test_a_causal_prefill_is_attend(self, batch: int, queries: int, keys: int, cache: bool) -> None:
        q, k, v = (x.cuda() for x in qkv(queries, keys, batch, cache=cache, **SIZES))
        got = torch.ops.lz_compile.flashinfer_prefill_v1(q, k, v, 0.088, 0.0, True, -1)
        bounds = torch.zeros(batch, 8, dtype=torch.int32, device="cuda")
        bounds[:, 0], bounds[:, 1], bounds[:, 3] = keys - queries, -(1 << 30), keys
        expected = attend(q.double(), k.double(), v.double(), bounds, scale=0.088)
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=2e-2)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_nothing_is_allocated_but_the_output_of_a_prefill(self, batch: int) -> None:
        q, k, v = (x.cuda() for x in qkv(300, 300, batch, **SIZES))
        op = torch.ops.lz_compile.flashinfer_prefill_v1
        op(q, k, v, 0.088, 0.0, True, -1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = op(q, k, v, 0.088, 0.0, True, -1)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before == out.untyped_storage().nbytes()

    @pytest.mark.parametrize("cache", [True, False], ids=["cache", "transposed"])
    @pytest.mark.parametrize("batch", [1, 3, 40])
    def test_a_captured_decode_follows_lengths_that_change(self, batch: int, cache: bool) -> None:
        keys, page = 1024, 64
        q, k, v = (x.cuda() for x in qkv(1, keys, batch, cache=cache, **SIZES))
        distance = k.stride(0) // (page * k.stride(2))
        columns = torch.arange(keys // page, dtype=torch.int32, device="cuda")
        pages = torch.arange(batch, dtype=torch.int32, device="cuda")[:, None] * distance + columns
        lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        semaphores = torch.zeros(batch * 8, dtype=torch.int32, device="cuda")
        arguments = (q, k, v, lengths, pages, semaphores, 0.088, page, -1)
        torch.ops.lz_compile.flashinfer_decode_v1(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = torch.ops.lz_compile.flashinfer_decode_v1(*arguments)
        for step in (1, 17, 500, keys):
            lengths.copy_((torch.arange(batch, device="cuda") * 131 + step - 1) % keys + 1)
            graph.replay()
            visible = torch.arange(keys, device="cuda") < lengths[:, None]
            expected = attend(q.double(), k.double(), v.double(), mask=visible[:, None, None], scale=0.088)
            assert out.transpose(1, 2).is_contiguous()
            torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
            assert not semaphores.any()
