"""On CUDA: kernels inside compiled models, CUDA graphs, rows without keys, no hidden copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import StaticCache

import lz_compile
from tiny import DECODERS, padding, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def strict(fn: Any, **keywords: Any) -> Any:
    return torch.compile(fn, backend="layerzero", **keywords)


def qkv(queries: int, keys: int, dtype: torch.dtype = torch.bfloat16, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q = torch.randn(2, queries, 8, 64, device=DEVICE, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(2, kv_heads, keys, 64, device=DEVICE, dtype=dtype) for _ in range(2))
    return q, k, v


def attention_kernels() -> set[str]:
    return {region.kernel for region in lz_compile.reports()[-1].regions if region.kind == "attention"}


@pytest.mark.parametrize("queries", [1, 12, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_left_padded_row_without_keys_gives_what_eager_gives(dtype: torch.dtype, queries: int) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        shown = torch.arange(k.shape[2], device=q.device)[None] <= torch.arange(q.shape[2], device=q.device)[:, None]
        mask = shown[None, None] & valid[:, None, None, :]
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        return F.scaled_dot_product_attention(q, k, v, mask)

    q, k, v = qkv(queries, 128, dtype)
    valid = torch.ones(2, 128, dtype=torch.bool, device=DEVICE)
    valid[0, :8] = False
    with torch.no_grad():
        got, expected = strict(attend)(q, k, v, valid), attend(q, k, v, valid)
    assert lz_compile.reports()[-1].regions[0].kernel != "inductor"
    torch.testing.assert_close(got, expected, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2)


def test_decode_under_reduce_overhead_follows_the_cache_position_and_is_captured() -> None:
    model = DECODERS[0].build("sdpa").to(DEVICE)
    compiled = strict(model, mode="reduce-overhead")
    results = []
    for run in (compiled, model):
        cache = StaticCache(config=model.config, max_cache_len=64)
        logits = []
        with torch.no_grad():
            model(tokens(2, 12, 0).to(DEVICE), past_key_values=cache)
            for step in range(8):
                ids = tokens(2, 1, step).to(DEVICE)
                logits.append(run(ids, past_key_values=cache).logits.clone())
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)
    from torch._dynamo.utils import counters

    assert counters["inductor"]["cudagraph_skips"] == 0
    assert attention_kernels() == {"triton.split_kv"}


def test_no_plan_is_made_for_every_length_under_a_mask_that_only_the_run_knows() -> None:
    """As with a paged cache: the mask is an input, and every step has another number of keys."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        return F.scaled_dot_product_attention(q, k, v, mask)

    def arguments(queries: int, keys: int) -> tuple[torch.Tensor, ...]:
        q, k, v = qkv(queries, keys)
        shown = torch.rand(2, 1, queries, keys, device=DEVICE) < 0.5
        shown[..., 0] = True
        least = torch.finfo(q.dtype).min
        return q, k, v, torch.where(shown, 0.0, least).to(q.dtype)

    compiled = strict(attend, fullgraph=True)
    with torch.no_grad():
        for queries, keys in ((20, 136), (33, 200), (64, 777)):
            given = arguments(queries, keys)
            for tensor, dims in zip(given, ([2], [2], [2], [2, 3])):
                torch._dynamo.mark_dynamic(tensor, dims)
            torch.testing.assert_close(compiled(*given), attend(*given), atol=2e-2, rtol=2e-2)
        q, k, v, mask = given
        wide = [x.repeat_interleave(4, 1) for x in (k, v)]
        plans = torch._fused_sdp_choice(q, *wide, mask) == torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
    (region,) = lz_compile.reports()[-1].regions
    assert (region.kernel == "triton.tiled") == plans, region


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefill_in_bfloat16_is_as_good_as_eager(attention: str, side: str) -> None:
    from road import cast_parameters

    model = DECODERS[0].build(attention)
    exact = cast_parameters(DECODERS[0].build("sdpa"), torch.float64).to(DEVICE)
    half = cast_parameters(model, torch.bfloat16).to(DEVICE)
    ids = tokens(2, 24, 0).to(DEVICE)
    mask = padding(2, 24, side)
    mask = mask.to(DEVICE) if mask is not None else None
    valid = mask.bool() if mask is not None else torch.ones(2, 24, dtype=torch.bool, device=DEVICE)
    with torch.no_grad():
        reference = exact(ids, attention_mask=mask, use_cache=False).logits[valid]
        eager = half(ids, attention_mask=mask, use_cache=False).logits[valid]
        ours = strict(half)(ids, attention_mask=mask, use_cache=False).logits[valid]
    error = (ours.double() - reference).abs().max()
    assert error <= 1.5 * (eager.double() - reference).abs().max() + 1e-6
    assert "inductor" not in attention_kernels()


def test_a_transposed_query_costs_no_copy_and_only_the_output_is_allocated() -> None:
    from lz_compile.lowering import triton_ops

    q, k, v = qkv(300, 300)
    triton_ops.tiled(q, k, v, scale=0.125)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = triton_ops.tiled(q, k, v, scale=0.125)
    assert torch.cuda.max_memory_allocated() - before == out.untyped_storage().nbytes()
    assert out.transpose(1, 2).is_contiguous()
