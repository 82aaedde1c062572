"""xFormers: which regions fit which operator, and what reaches it, with a stand-in where the package is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lz_compile.lowering import fit, xformers
from lz_compile.lowering.semantic import LOWER, NO_LOWER, NO_UPPER, STOP, UPPER, attend
from one_kernel import compile_with
from test_flash_attn import both_sides, cached, causal, dense, plain, window

B, HEADS, KEYS, SIZE = 2, 4, 24, 64

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not xformers.installed(), reason="needs xFormers on CUDA"),
]

# xFormers' documented semantics in plain PyTorch; masks are what their classes say they are.
ATTN_BIAS = """
from dataclasses import dataclass
from typing import Any


class LowerTriangularFromBottomRightMask:
    limits = (-1, 0)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask:
    _window_size: int

    @property
    def limits(self):
        assert self._window_size > 0
        return self._window_size - 1, 0


@dataclass
class LocalAttentionFromBottomRightMask:
    window_left: int
    window_right: int

    @property
    def limits(self):
        assert self.window_left >= 0 and self.window_right >= 0
        return self.window_left, self.window_right


@dataclass
class _SeqLenInfo:
    seqstart: Any
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    seqlen: Any
    seqlen_py: list
    padding: int


@dataclass
class BlockDiagonalPaddedKeysMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo
    limits = (-1, -1)
"""
FMHA = """
import torch
from . import attn_bias

CALLS = []


def memory_efficient_attention_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert query.ndim == key.ndim == value.ndim and query.shape[2:-1] == key.shape[2:-1] == value.shape[2:-1]
    assert op.grouped or query.ndim == 4
    CALLS.append(dict(op=op.__name__, mask=attn_bias, pointers=[x.data_ptr() for x in (query, key, value)]))
    if query.ndim == 4:
        query, key, value = (x.unsqueeze(2) for x in (query, key, value))
    queries, keys = query.shape[1], key.shape[1]
    length = torch.full((query.shape[0],), keys)
    if hasattr(attn_bias, "k_seqinfo"):
        length = attn_bias.k_seqinfo.seqlen
        assert query.shape[0] == 1 and queries == 1 and length.stride(0) == 1
    left, right = attn_bias.limits if attn_bias is not None else (-1, -1)
    diagonal = torch.arange(queries)[:, None] + keys - queries
    column = torch.arange(keys)
    visible = column < length[:, None, None]
    if right >= 0:
        visible = visible & (column <= diagonal + right)
    if left >= 0:
        visible = visible & (column >= diagonal - left)
    scores = torch.einsum("bmghd,bnghd->bghmn", query.float(), key.float()) * scale
    weights = torch.softmax(scores.masked_fill(~visible[:, None, None], float("-inf")), -1)
    out = torch.einsum("bghmn,bnghd->bmghd", weights, value.float()).to(query.dtype).contiguous()
    return out if op.grouped else out.squeeze(2)
"""


@pytest.fixture(scope="module")
def _on_the_cpu() -> Iterator[None]:
    library = torch.library.Library("lz_compile", "FRAGMENT")
    for name in ("cutlass", "flash", "split_k"):
        library.impl(f"xformers_{name}_v1", getattr(xformers, name), "CPU")
    yield
    library._destroy()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _on_the_cpu: None) -> Iterator[None]:
    installed = xformers.installed

    def forget() -> None:
        installed.cache_clear()
        xformers._fmha.cache_clear()
        for name in [name for name in sys.modules if name == "xformers" or name.startswith("xformers.")]:
            del sys.modules[name]

    fmha = tmp_path / "xformers" / "ops" / "fmha"
    fmha.mkdir(parents=True)
    for place, text in ((fmha.parent.parent, ""), (fmha.parent, ""), (fmha, FMHA)):
        (place / "__init__.py").write_text(text)
    (fmha / "attn_bias.py").write_text(ATTN_BIAS)
    for name, grouped in (("cutlass", False), ("flash", True), ("triton_splitk", True)):
        (fmha / f"{name}.py").write_text(f"FwOp = type('{name}', (), {{'grouped': {grouped}}})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(xformers, "capability", lambda device: (9, 0))
    forget()
    yield
    forget()


def qkv(
    queries: int, kv_heads: int, keys: int = KEYS, size: int = SIZE, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """Views [B, H, M, D] of what a projection gives."""
    generator = torch.Generator(device).manual_seed(0)

    def random(length: int, heads: int) -> torch.Tensor:
        shape = (B, length, heads, size)
        return torch.randn(shape, generator=generator, device=device).bfloat16().transpose(1, 2)

    return random(queries, HEADS), random(keys, kv_heads), random(keys, kv_heads)


def last_call() -> dict[str, Any]:
    return sys.modules["xformers.ops.fmha"].CALLS[-1]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "kernel, kv_heads",
    [(xformers.FLASH, 1), (xformers.FLASH, 2), (xformers.FLASH, 4), (xformers.CUTLASS, 1), (xformers.CUTLASS, 4)],
    ids=lambda x: getattr(x, "name", x),
)
def test_static_masks_reach_the_operator_as_views_and_match_eager(stand_in: None, kernel: Any, kv_heads: int) -> None:
    q, k, v = qkv(KEYS, kv_heads)
    for attend_with in (plain, causal, window, both_sides):
        compiled, backend = compile_with(kernel, attend_with)
        got = compiled(q, k, v)
        if attend_with is both_sides and kernel is xformers.CUTLASS:
            assert backend.verdicts == ["takes a window only below the diagonal"]
            continue
        assert backend.verdicts == [None]
        torch.testing.assert_close(got, attend_with(q, k, v), atol=2e-2, rtol=2e-2)
        assert got.transpose(1, 2).is_contiguous()
        assert last_call()["pointers"] == [x.data_ptr() for x in (q, k, v)]


def test_a_window_over_one_side_and_fewer_queries_than_keys_is_aligned_to_the_end(stand_in: None) -> None:
    def after(q, k, v):
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, columns <= rows + KEYS - 5, enable_gqa=True)

    q, k, v = qkv(8, 2)
    compiled, backend = compile_with(xformers.FLASH, after)
    torch.testing.assert_close(compiled(q, k, v), after(q, k, v), atol=2e-2, rtol=2e-2)
    assert backend.verdicts == [None]
    assert last_call()["mask"].limits == (8 + KEYS, 3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_split_k_decodes_without_a_mask(stand_in: None, kv_heads: int) -> None:
    for queries in (1, 3):
        q, k, v = qkv(queries, kv_heads)
        compiled, backend = compile_with(xformers.SPLIT_K, plain)
        torch.testing.assert_close(compiled(q, k, v), plain(q, k, v), atol=2e-2, rtol=2e-2)
        assert backend.verdicts == [None] and last_call()["op"] == "triton_splitk"
        assert last_call()["pointers"] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_split_k_reads_the_position_of_a_static_cache_on_the_device(stand_in: None, kv_heads: int) -> None:
    q, k, v = qkv(1, kv_heads, 1)
    compiled, backend = compile_with(xformers.SPLIT_K, cached)
    caches = [torch.randn(B, kv_heads, KEYS, SIZE).bfloat16() for _ in range(2)]
    for position in (0, 9, KEYS - 1):
        mine, eager = ([cache.clone() for cache in caches] for _ in range(2))
        got = compiled(q, k, v, *mine, torch.tensor(position))
        torch.testing.assert_close(got, cached(q, k, v, *eager, torch.tensor(position)), atol=2e-2, rtol=2e-2)
        assert last_call()["pointers"][1:] == [cache.data_ptr() for cache in mine]
        assert last_call()["mask"].k_seqinfo.seqlen.tolist() == [position + 1]
    assert backend.verdicts == [None]


def uncached(q, k, v, position):
    mask = torch.arange(k.shape[2]) <= position
    return F.scaled_dot_product_attention(q, k, v, mask[None, None, None], enable_gqa=True)


def cache_of(queries: int, kv_heads: int, contiguous: bool = True) -> tuple[torch.Tensor, ...]:
    q, k, v = qkv(queries, kv_heads, queries)
    caches = [torch.randn(B, KEYS, kv_heads, SIZE).bfloat16().transpose(1, 2) for _ in range(2)]
    return (q, k, v, *(x.contiguous() if contiguous else x for x in caches), torch.tensor(3))


DECLINED = {
    "takes lengths only for keys packed": (xformers.FLASH, cached, cache_of(1, 2)),
    "grouped heads would be copied": (xformers.CUTLASS, causal, qkv(KEYS, 2)),
    "is for up to 16 queries": (xformers.SPLIT_K, plain, qkv(KEYS, 2)),
    "takes no causal mask": (xformers.SPLIT_K, cached, cache_of(3, 2)),
    "the batch rows of the cache don't merge": (xformers.SPLIT_K, cached, cache_of(1, 2, contiguous=False)),
    "a row may see no key": (xformers.SPLIT_K, uncached, (*qkv(1, 2), torch.tensor(-1))),
    "does not take head sizes 96": (xformers.SPLIT_K, plain, qkv(1, 2, size=96)),
    "head sizes are multiples of 8": (xformers.FLASH, plain, qkv(1, 2, size=20)),
    "the mask is not proved": (xformers.FLASH, dense, (*qkv(KEYS, 2), torch.rand(KEYS, KEYS) < 0.9)),
    "does not take torch.float32": (xformers.CUTLASS, plain, tuple(x.float() for x in qkv(KEYS, 4))),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_an_operator_lacks_is_declined(stand_in: None, reason: str) -> None:
    kernel, attend_with, arguments = DECLINED[reason]
    compiled, backend = compile_with(kernel, attend_with)
    got = compiled(*(x.clone() for x in arguments))
    torch.testing.assert_close(got, attend_with(*arguments), atol=2e-2, rtol=2e-2, equal_nan=True)
    (verdict,) = backend.verdicts
    assert reason in str(verdict)


def test_an_old_or_missing_device_or_package_is_declined(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, backend = compile_with(xformers.FLASH, causal)
    compiled(*qkv(KEYS, 2))
    (region,) = backend.regions
    monkeypatch.setattr(xformers, "capability", lambda device: (7, 5))
    assert "7.5" in str(xformers.FLASH.supports(region))
    monkeypatch.setattr(xformers, "installed", lambda: False)
    assert xformers.FLASH.supports(region) == "xFormers is not installed"
    monkeypatch.setattr(xformers, "capability", fit.capability)
    assert xformers.FLASH.supports(region) == "runs on CUDA"


@pytest.mark.parametrize("name", ["cutlass", "flash", "split_k"])
def test_fakes_have_the_strides_of_the_operators(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    numbers = (None, 0.1) if name == "split_k" else (0.1, True, -1, -1)
    with FakeTensorMode():
        q, k, v = (torch.empty(B, h, KEYS, SIZE) for h in (HEADS, 2, 2))
        out = getattr(torch.ops.lz_compile, f"xformers_{name}_v1")(q, k, v, *numbers)
    assert out.shape == (B, HEADS, KEYS, SIZE) and out.transpose(1, 2).is_contiguous()


# -- on CUDA


def limits_of(keys: int, **columns: Any) -> torch.Tensor:
    limits = torch.zeros(B, 8, dtype=torch.int32, device="cuda")
    limits[:, UPPER] = columns.get("upper", NO_UPPER)
    limits[:, LOWER] = columns.get("lower", NO_LOWER)
    limits[:, STOP] = columns.get("stop", keys)
    return limits


def error(got: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor) -> float:
    expected = attend(q.double(), k.double(), v.double(), limits, scale=0.1)
    assert got.transpose(1, 2).is_contiguous() and got.shape == expected.shape
    return float((got.double() - expected).abs().max())


class TestOnCuda:
    pytestmark = gpu

    def test_the_probe_passes(self) -> None:
        assert set(xformers.probe()) == {"cutlass", "flash", "split_k"}

    @pytest.mark.parametrize("queries", [300, 7])
    @pytest.mark.parametrize("operator, kv_heads", [("flash", 2), ("flash", 4), ("cutlass", 1), ("cutlass", 4)])
    def test_masks_are_attend(self, operator: str, kv_heads: int, queries: int) -> None:
        q, k, v = qkv(queries, kv_heads, 300, device="cuda")
        shift = 300 - queries
        run = getattr(xformers, operator)
        assert error(run(q, k, v, 0.1, False, -1, -1), q, k, v, limits_of(300)) < 2e-2
        assert error(run(q, k, v, 0.1, True, -1, -1), q, k, v, limits_of(300, upper=shift)) < 2e-2
        windowed = limits_of(300, upper=shift, lower=shift - 20)
        assert error(run(q, k, v, 0.1, True, 20, -1), q, k, v, windowed) < 2e-2
        if operator == "flash":
            around = limits_of(300, upper=shift + 9, lower=shift - 20)
            assert error(run(q, k, v, 0.1, False, 20, 9), q, k, v, around) < 2e-2

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_split_k_with_and_without_a_length_is_attend(self, kv_heads: int) -> None:
        q, _, _ = qkv(1, kv_heads, 8, device="cuda")
        k, v = (torch.randn(B, kv_heads, 1000, SIZE, device="cuda").bfloat16() for _ in range(2))
        assert error(xformers.split_k(q, k, v, None, 0.1), q, k, v, limits_of(1000)) < 2e-2
        for length in (1, 77, 1000):
            lengths = torch.full((B,), length, dtype=torch.int32, device="cuda")
            assert error(xformers.split_k(q, k, v, lengths, 0.1), q, k, v, limits_of(1000, stop=length)) < 2e-2

    @pytest.mark.parametrize("operator, kv_heads", [("flash", 2), ("cutlass", 4)])
    def test_a_transposed_query_costs_no_copy(self, operator: str, kv_heads: int) -> None:
        """Beside the output only a logsumexp and a few bytes of state are allocated."""
        length = 4096  # enough blocks of queries to fill the machine: FlashAttention splits the keys of fewer
        q, k, v = qkv(length, kv_heads, length, device="cuda")
        run = getattr(xformers, operator)
        run(q, k, v, 0.1, True, -1, -1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run(q, k, v, 0.1, True, -1, -1)
        logsumexp = 4 * B * HEADS * length
        assert torch.cuda.max_memory_allocated() - before <= out.untyped_storage().nbytes() + logsumexp + 4096

    def test_a_captured_decode_follows_the_length(self) -> None:
        q, _, _ = qkv(1, 2, 8, device="cuda")
        k, v = (torch.randn(B, 2, 1000, SIZE, device="cuda").bfloat16() for _ in range(2))
        lengths = torch.full((B,), 50, dtype=torch.int32, device="cuda")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            xformers.split_k(q, k, v, lengths, 0.1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = xformers.split_k(q, k, v, lengths, 0.1)
        for length in (1000, 3):
            lengths.fill_(length)
            graph.replay()
            assert error(out, q, k, v, limits_of(1000, stop=length)) < 2e-2
