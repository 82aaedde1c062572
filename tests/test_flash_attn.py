"""FlashAttention: which regions fit which generation, and what reaches the library, for which a stand-in serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lz_compile.lowering import fit, flash_attn
from lz_compile.lowering.semantic import LOWER, NO_LOWER, NO_UPPER, STOP, UPPER, attend, attend_output
from one_kernel import compile_with

B, HEADS, KV_HEADS, KEYS, SIZE = 2, 4, 2, 24, 64

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or flash_attn.fa3_module() is None, reason="needs FlashAttention-3 on CUDA"
    ),
]

# FlashAttention's documented semantics in plain PyTorch: [B, M, H, D], masks aligned to the bottom right.
STAND_IN = """
import torch

CALLS = []


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, *, cache_seqlens=None, softmax_scale=None,
                            causal=False, window_size=(-1, -1), softcap=0.0, num_splits=0):
    assert k is None and v is None
    assert all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (q, k_cache, v_cache))
    batch, queries, heads, _ = q.shape
    keys, group = k_cache.shape[1], heads // k_cache.shape[2]
    CALLS.append(dict(lengths=cache_seqlens, causal=causal, window=window_size, splits=num_splits, keys=keys,
                      pointers=[x.data_ptr() for x in (q, k_cache, v_cache)]))
    if cache_seqlens is None:
        cache_seqlens = torch.full((batch,), keys)
    assert cache_seqlens.shape == (batch,) and cache_seqlens.is_contiguous()
    diagonal = torch.arange(queries)[None, :, None] + cache_seqlens[:, None, None] - queries
    column = torch.arange(keys)[None, None]
    visible = (column < cache_seqlens[:, None, None]).expand(batch, queries, keys)
    left, right = window_size
    if causal:
        right = 0
    if right >= 0:
        visible = visible & (column <= diagonal + right)
    if left >= 0:
        visible = visible & (column >= diagonal - left)
    scores = torch.einsum("bmhd,bnhd->bhmn", q.float(), k_cache.float().repeat_interleave(group, 2)) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~visible[:, None], float("-inf")), -1).nan_to_num()
    return torch.einsum("bhmn,bnhd->bmhd", weights, v_cache.float().repeat_interleave(group, 2)).to(q.dtype)
"""
FLAGS = {"FP16": True, "LOCAL": True, "SOFTCAP": False, "VARLEN": False, "SPLIT": False}


@pytest.fixture(scope="module")
def _on_the_cpu() -> Iterator[None]:
    library = torch.library.Library("lz_compile", "FRAGMENT")
    library.impl("fa2_v1", flash_attn.fa2, "CPU")
    library.impl("fa3_v1", flash_attn.fa3, "CPU")
    yield
    library._destroy()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "capability", lambda device: (9, 0))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hopper: None, _on_the_cpu: None) -> Iterator[Any]:
    """Puts a stand-in for FlashAttention-3 on the path, built with the given flags; like ``fa3-fwd`` by default."""

    def forget() -> None:
        flash_attn.forget_installed()
        flash_attn._function.cache_clear()
        for name in ("fa3_fwd_interface", "fa3_fwd_config", "flash_attn", "flash_attn.flash_attn_interface"):
            sys.modules.pop(name, None)

    def write(**flags: bool) -> None:
        build = {f"FLASHATTENTION_DISABLE_{name}": value for name, value in {**FLAGS, **flags}.items()}
        (tmp_path / "fa3_fwd_interface.py").write_text(STAND_IN)
        (tmp_path / "fa3_fwd_config.py").write_text(f"CONFIG = {{'build_flags': {build!r}}}\nraise ImportError\n")
        forget()

    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield write
    forget()


def qkv(
    queries: int, keys: int = KEYS, dtype: torch.dtype = torch.bfloat16, size: int = SIZE, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """Views [B, H, M, D] of what a projection gives."""
    generator = torch.Generator(device).manual_seed(0)

    def random(length: int, heads: int) -> torch.Tensor:
        shape = (B, length, heads, size)
        return torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2)

    return random(queries, HEADS), random(keys, KV_HEADS), random(keys, KV_HEADS)


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def window(q, k, v):
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    mask = (columns <= rows) & (columns > rows - 5)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def both_sides(q, k, v):
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    mask = (columns <= rows + 4) & (columns >= rows - 4)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def dense(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def padded(q, k, v, valid):
    return F.scaled_dot_product_attention(q, k, v, valid[:, None, None, :], enable_gqa=True)


def softcapped(q, k, v):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.tanh(q @ k.transpose(-1, -2) * 0.125 / 20.0) * 20.0
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def cached(q, k, v, k_cache, v_cache, position):
    """A step over a static cache: the new keys are written at ``position``, and each query sees those up to its own."""
    index = torch.arange(q.shape[2]) + position
    k_cache.index_copy_(2, index, k)
    v_cache.index_copy_(2, index, v)
    mask = torch.arange(k_cache.shape[2])[None] <= index[:, None]
    return F.scaled_dot_product_attention(q, k_cache, v_cache, mask[None, None], enable_gqa=True)


def test_a_build_is_read_without_running_it(install: Any) -> None:
    install()
    assert flash_attn.fa3_module() == "fa3_fwd_interface"
    assert flash_attn._lacks("FP16") and flash_attn._lacks("LOCAL") and not flash_attn._lacks("SOFTCAP")
    assert "fa3_fwd_interface" not in sys.modules and "fa3_fwd_config" not in sys.modules


def test_a_build_that_says_nothing_is_trusted_with_the_least(install: Any, tmp_path: Path) -> None:
    install()
    (tmp_path / "fa3_fwd_config.py").write_text("CONFIG = {'build_flags': make()}")
    flash_attn.forget_installed()
    assert all(flash_attn._lacks(name) for name in ("FP16", "LOCAL", "SOFTCAP", "VARLEN"))


@pytest.mark.parametrize("attend_with", [plain, causal])
@pytest.mark.parametrize("queries", [1, KEYS])
def test_a_prefill_reaches_the_library_as_views_and_matches_eager(install: Any, attend_with: Any, queries: int) -> None:
    install()
    q, k, v = qkv(queries)
    if attend_with is causal and queries == 1:
        k, v = k[:, :, :1], v[:, :, :1]
    compiled, backend = compile_with(flash_attn.FA3, attend_with)
    got = compiled(q, k, v)
    assert backend.verdicts == [None]
    torch.testing.assert_close(got, attend_with(q, k, v), atol=2e-2, rtol=2e-2)
    assert got.stride() == attend_output(q, v).stride() or queries == 1
    (call,) = sys.modules["fa3_fwd_interface"].CALLS
    assert call["pointers"] == [x.data_ptr() for x in (q, k, v)]
    assert call["lengths"] is None and call["splits"] == 0 and call["causal"] == (attend_with is causal)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_step_over_a_static_cache_takes_its_position_as_a_length(install: Any, queries: int) -> None:
    install()
    compiled, backend = compile_with(flash_attn.FA3, cached)
    q, k, v = qkv(queries, queries)
    caches = [torch.randn(B, KV_HEADS, KEYS, SIZE).bfloat16() for _ in range(2)]
    for position in (0, 7, KEYS - queries):
        mine, eager = ([cache.clone() for cache in caches] for _ in range(2))
        got = compiled(q, k, v, *mine, torch.tensor(position))
        torch.testing.assert_close(got, cached(q, k, v, *eager, torch.tensor(position)), atol=2e-2, rtol=2e-2)
        call = sys.modules["fa3_fwd_interface"].CALLS[-1]
        assert call["lengths"].tolist() == [position + queries] * B and call["causal"] == (queries > 1)
        assert call["pointers"][1:] == [cache.data_ptr() for cache in mine]
    assert backend.verdicts == [None]


def test_windows_and_softcap_run_where_the_build_has_them(install: Any) -> None:
    install(LOCAL=False)
    for attend_with, expected in ((window, (4, 0)), (both_sides, (4, 4)), (softcapped, (-1, -1))):
        compiled, backend = compile_with(flash_attn.FA3, attend_with)
        q, k, v = qkv(KEYS)
        torch.testing.assert_close(compiled(q, k, v), attend_with(q, k, v), atol=2e-2, rtol=2e-2)
        assert backend.verdicts == [None]
        assert sys.modules["fa3_fwd_interface"].CALLS[-1]["window"] == expected


DECLINED = {
    "has no window": (window, {}, qkv(KEYS)),
    "has no softcap": (softcapped, {"SOFTCAP": True}, qkv(KEYS)),
    "the mask is not proved": (dense, {}, (*qkv(KEYS), torch.ones(KEYS, KEYS).tril() > 0)),
    "takes no key padding": (padded, {}, (*qkv(KEYS), torch.ones(B, KEYS) > 0)),
    "does not take torch.float16": (causal, {}, qkv(KEYS, dtype=torch.float16)),
    "does not take torch.float32": (causal, {}, qkv(KEYS, dtype=torch.float32)),
    "does not take head size 36": (causal, {}, qkv(KEYS, size=36)),
    "does not take head size 64": (causal, {"HDIM64": True}, qkv(KEYS)),
    "the head dimension is strided": (causal, {}, tuple(x.mT.contiguous().mT for x in qkv(KEYS))),
    "reads no expanded tensor": (causal, {}, tuple(x[:1].expand(B, -1, -1, -1) for x in qkv(KEYS))),
    "a stride is not a multiple": (causal, {}, tuple(F.pad(x, (0, 3))[..., :SIZE] for x in qkv(KEYS))),
    "takes no lengths": (
        cached,
        {"VARLEN": True},
        (*qkv(1, 1), *(x.contiguous() for x in qkv(1)[1:]), torch.tensor(3)),
    ),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_the_library_lacks_is_declined(install: Any, reason: str) -> None:
    attend_with, flags, arguments = DECLINED[reason]
    install(**flags)
    compiled, backend = compile_with(flash_attn.FA3, attend_with)
    compiled(*(x.clone() if x.is_contiguous() else x for x in arguments))
    (verdict,) = backend.verdicts
    assert reason in str(verdict)


def test_a_kernel_that_is_not_installed_or_does_not_run_here_says_so(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    def verdicts() -> list[str | None]:
        compiled, backend = compile_with(flash_attn.FA3, causal)
        compiled(*qkv(KEYS))
        return [kernel.supports(backend.regions[0]) for kernel in flash_attn.PROVIDER.kernels]

    if not (flash_attn.has_fa2() or flash_attn.has_fa4() or flash_attn.fa3_module()):
        assert all("is not installed" in str(verdict) for verdict in verdicts())
    install()
    monkeypatch.setattr(flash_attn, "capability", lambda device: (8, 0))
    assert verdicts()[0] == "needs compute capability 9.0"
    monkeypatch.setattr(flash_attn, "capability", fit.capability)
    assert set(verdicts()) == {"runs on CUDA"}


def test_generation_2_is_told_from_4_by_its_extension(install: Any, tmp_path: Path) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("")
    flash_attn.forget_installed()
    assert flash_attn.has_fa4() and not flash_attn.has_fa2()
    (tmp_path / "flash_attn_2_cuda.py").write_text("")
    flash_attn.forget_installed()
    assert flash_attn.has_fa2()
    assert "flash_attn" not in sys.modules


def test_generation_2_runs_windows_and_float16(install: Any, tmp_path: Path) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("")
    (tmp_path / "flash_attn_2_cuda.py").write_text("")
    flash_attn.forget_installed()
    compiled, backend = compile_with(flash_attn.FA2, window)
    q, k, v = qkv(KEYS, dtype=torch.float16)
    torch.testing.assert_close(compiled(q, k, v), window(q, k, v), atol=5e-3, rtol=5e-3)
    assert backend.verdicts == [None]


def test_a_symbolic_batch_and_length_are_no_obstacle(install: Any) -> None:
    install()

    def self_attention(x: torch.Tensor) -> torch.Tensor:
        return causal(*x.transpose(1, 2).split([HEADS, KV_HEADS, KV_HEADS], 1))

    compiled, backend = compile_with(flash_attn.FA3, self_attention, dynamic=None)
    for batch, length in ((2, 8), (3, 12)):
        x = torch.randn(batch, length, HEADS + 2 * KV_HEADS, SIZE).bfloat16()
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), self_attention(x), atol=2e-2, rtol=2e-2)
    assert backend.verdicts == [None]


@pytest.mark.parametrize("name", ["fa2_v1", "fa3_v1", "fa4_v1"])
def test_fakes_have_the_strides_of_the_library(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    numbers = (0.1, True) if name == "fa4_v1" else (None, 0.1, True, -1, -1, 0.0, 1)
    with FakeTensorMode():
        q, k, v = (torch.empty(B, h, KEYS, d) for h, d in ((HEADS, 192), (KV_HEADS, 192), (KV_HEADS, 128)))
        out = getattr(torch.ops.lz_compile, name)(q, k, v, *numbers)
    assert out.shape == (B, HEADS, KEYS, 128) and out.transpose(1, 2).is_contiguous()


def test_an_address_or_stride_that_nobody_announced_is_made_readable() -> None:
    row = torch.randn(B * HEADS * 8 + 1).bfloat16()
    misaligned = row[1:].view(B, HEADS, 1, 8)
    assert fit.readable(misaligned).data_ptr() % 16 == 0
    odd = row[:-1].view(B, HEADS, 1, 8).as_strided((B, HEADS, 1, 8), (HEADS * 8, 8, 1, 1))
    assert fit.readable(odd).data_ptr() == odd.data_ptr() and fit.readable(odd).stride() == (HEADS * 8, 8, 8, 1)
    assert torch.equal(fit.readable(odd), odd) and torch.equal(fit.readable(misaligned), misaligned)
    q = qkv(KEYS)[0]
    assert fit.readable(q) is q


def test_a_generation_that_crashes_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "_fits_here", lambda generation: generation != "fa4")

    def run(generation: str) -> None:
        if generation == "fa2":
            raise RuntimeError("the process ended with -11")

    monkeypatch.setattr(flash_attn, "_in_a_child", run)
    assert list(flash_attn.probe()) == ["fa3"]
    monkeypatch.setattr(flash_attn, "_fits_here", lambda generation: False)
    with pytest.raises(RuntimeError, match="no generation"):
        flash_attn.probe()


# -- on CUDA


def on_cuda(queries: int, keys: int, size: int = 128) -> tuple[torch.Tensor, ...]:
    return qkv(queries, keys, size=size, device="cuda")


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).abs().max())


class TestOnCuda:
    pytestmark = gpu

    def test_the_probe_passes(self) -> None:
        assert "fa3" in flash_attn.probe()

    @pytest.mark.parametrize("size", [64, 96, 128, 256])
    @pytest.mark.parametrize("queries, keys", [(300, 300), (5, 300), (1, 300)])
    def test_a_causal_prefill_is_attend(self, queries: int, keys: int, size: int) -> None:
        q, k, v = on_cuda(queries, keys, size)
        got = flash_attn.fa3(q, k, v, None, 0.1, True, -1, -1, 0.0, 1)
        limits = torch.zeros(B, 8, dtype=torch.int32, device="cuda")
        limits[:, UPPER], limits[:, LOWER], limits[:, STOP] = keys - queries, NO_LOWER, keys
        expected = attend(q.double(), k.double(), v.double(), limits, scale=0.1)
        assert error(got, expected) < 2e-2
        assert got.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize("queries", [1, 4])
    @pytest.mark.parametrize("splits", [0, 1, 4])
    def test_lengths_and_rows_without_keys_are_attend(self, queries: int, splits: int) -> None:
        q, _, _ = on_cuda(queries, 8)
        k, v = (torch.randn(B, KV_HEADS, 600, 128, device="cuda").bfloat16() for _ in range(2))
        for rows in ([600, 300], [5, 0], [0, 0], [2, 1]):
            lengths = torch.tensor(rows, dtype=torch.int32, device="cuda")
            got = flash_attn.fa3(q, k, v, lengths, 0.1, queries > 1, -1, -1, 0.0, splits)
            limits = torch.zeros(B, 8, dtype=torch.int32, device="cuda")
            limits[:, UPPER], limits[:, LOWER], limits[:, STOP] = NO_UPPER, NO_LOWER, lengths
            if queries > 1:
                limits[:, UPPER] = lengths - queries
            assert error(got, attend(q.double(), k.double(), v.double(), limits, scale=0.1)) < 2e-2, rows

    def test_softcap_is_attend(self) -> None:
        q, k, v = on_cuda(128, 128)
        expected = attend(q.double(), k.double(), v.double(), scale=0.3, softcap=5.0)
        assert error(flash_attn.fa3(q, k, v, None, 0.3, False, -1, -1, 5.0, 1), expected) < 2e-2

    def test_a_transposed_query_costs_no_copy(self) -> None:
        """Beside the output only the logsumexp is allocated, and a few bytes of scheduling."""
        q, k, v = on_cuda(512, 512)
        arguments = (q, k, v, None, 0.1, True, -1, -1, 0.0, 1)
        flash_attn.fa3(*arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = flash_attn.fa3(*arguments)
        logsumexp = 4 * B * HEADS * 512
        assert torch.cuda.max_memory_allocated() - before <= out.untyped_storage().nbytes() + logsumexp + 4096

    def test_a_captured_decode_follows_changed_lengths(self) -> None:
        q, _, _ = on_cuda(1, 8)
        k, v = (torch.randn(B, KV_HEADS, 2048, 128, device="cuda").bfloat16() for _ in range(2))
        lengths = torch.tensor([100, 7], dtype=torch.int32, device="cuda")
        arguments = (q, k, v, lengths, 0.1, False, -1, -1, 0.0, 0)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            flash_attn.fa3(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flash_attn.fa3(*arguments)
        for rows in ([2048, 1], [1000, 2000]):
            lengths.copy_(torch.tensor(rows, dtype=torch.int32))
            graph.replay()
            limits = torch.zeros(B, 8, dtype=torch.int32, device="cuda")
            limits[:, UPPER], limits[:, LOWER], limits[:, STOP] = NO_UPPER, NO_LOWER, lengths
            assert error(out, attend(q.double(), k.double(), v.double(), limits, scale=0.1)) < 2e-2
