"""Attention in all its forms: models of Hugging Face, hand-written blocks, single spellings, and near misses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from lz_compile.lowering import cpu
from lz_compile.lowering.kernels import kernels
from lz_compile.lowering.triton import SPLIT_KV, TILED
from lz_compile.region import Kernel, Region
from one_kernel import compile_with
from road import Road, cast_parameters, compile_road, median_error
from tiny import padding, tokens

# -- models ----------------------------------------------------------------------------------------------------------

_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = {**_BASE, "intermediate_size": 96, "max_position_embeddings": 64}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_BART = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}


@dataclass(frozen=True)
class Form:
    """A model with one form of attention: how it is called, and how many sites one forward pass has."""

    name: str
    config: str
    model: str
    settings: dict[str, Any]
    call: str = "decoder"
    sites: int = 2
    attention: tuple[str, ...] = ("sdpa", "eager")
    cache: str = "static"

    @property
    def pads_left(self) -> bool:
        """Whether the reference knows rows without keys: a softmax in float32 over float64's least number is NaN."""
        return self.call == "decoder" and ("sdpa" in self.attention or self.name == "GPT-OSS")

    def exact(self) -> Any:
        """The model in float64, with SDPA where it has that."""
        model = cast_parameters(self.build(self.attention[0]), torch.float64)
        model.config._experts_implementation = "eager"  # grouped products have no float64
        return model

    def build(self, attention: str) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        config._attn_implementation = attention
        model = getattr(transformers, self.model)(config).eval()
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("sinks", "rel_pos", "relative")):  # zeros at first: they would not show
                parameter.data = torch.randn_like(parameter)
            parameter.data = parameter.data.to(torch.bfloat16).float()
        return model


EAGER = ("eager",)
FORMS = [
    Form("GPT-OSS", "GptOssConfig", "GptOssForCausalLM", {**_GROUPED, **_EXPERTS, "head_dim": 16, "sliding_window": 8},
         attention=EAGER),
    Form("BLOOM", "BloomConfig", "BloomForCausalLM", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4},
         attention=EAGER, cache="static, whole mask"),
    Form("MPT", "MptConfig", "MptForCausalLM", {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4,
         "max_seq_len": 64}, attention=EAGER, cache="dynamic"),
    Form("Falcon with ALiBi", "FalconConfig", "FalconForCausalLM", {**_BASE, "multi_query": False, "alibi": True},
         cache="static, whole mask"),
    Form("Falcon with one K/V head", "FalconConfig", "FalconForCausalLM", {**_BASE, "alibi": False}),
    Form("T5", "T5Config", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}, "encoder-decoder", 6),
    Form("DeepSeek-V3", "DeepseekV3Config", "DeepseekV3ForCausalLM", {**_DECODER, **_LATENT,
         "first_k_dense_replace": 1}),
    Form("DeBERTa", "DebertaV2Config", "DebertaV2Model", {**_DECODER, "type_vocab_size": 0, "position_buckets": 8,
         "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "encoder", attention=EAGER),
    Form("Swin", "SwinConfig", "SwinModel", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4}, "vision", 4),
    Form("ViTDet", "VitDetConfig", "VitDetModel", {**_VISION, "pretrain_image_size": 32, "patch_size": 4,
         "use_relative_position_embeddings": True, "window_block_indices": [0], "window_size": 4}, "vision",
         attention=EAGER),
    Form("SAM", "SamVisionConfig", "SamVisionModel", {**_VISION, "patch_size": 4, "window_size": 4, "mlp_dim": 96,
         "output_channels": 16, "global_attn_indexes": [1]}, "vision"),
]  # fmt: skip
MORE = [
    Form("mT5", "MT5Config", "MT5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}, "encoder-decoder", 6),
    Form("Falcon with groups", "FalconConfig", "FalconForCausalLM", {**_BASE, "alibi": False, "num_kv_heads": 2,
         "new_decoder_architecture": True}),
    Form("DeepSeek-V2", "DeepseekV2Config", "DeepseekV2ForCausalLM", {**_DECODER, **_LATENT}),
    Form("Gemma2", "Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 16, "sliding_window": 8},
         attention=EAGER),
    Form("Gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, "head_dim": 16, "sliding_window": 8}),
    Form("OLMo2", "Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    Form("Qwen3-MoE", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_GROUPED, "head_dim": 16, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    Form("Llama4", "Llama4TextConfig", "Llama4ForCausalLM", {**_GROUPED, "head_dim": 16, "attention_chunk_size": 8,
         "num_local_experts": 2, "intermediate_size_mlp": 64}),
    Form("GPT-NeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", _DECODER),
    Form("GPT-2", "GPT2Config", "GPT2LMHeadModel", _GPT2),
    Form("GPT-J", "GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 8}),
    Form("CodeGen", "CodeGenConfig", "CodeGenForCausalLM", {**_GPT2, "rotary_dim": 8}),
    Form("OPT", "OPTConfig", "OPTForCausalLM", {**_BASE, "ffn_dim": 96, "word_embed_proj_dim": 64}, cache="none"),
    Form("ModernBERT", "ModernBertConfig", "ModernBertModel", {**_DECODER, "local_attention": 8, "cls_token_id": 1,
         "sep_token_id": 2, "global_attn_every_n_layers": 2}, "encoder"),
    Form("MPNet", "MPNetConfig", "MPNetModel", _DECODER, "encoder", attention=EAGER),
    Form("BART", "BartConfig", "BartForConditionalGeneration", {**_BART, "decoder_start_token_id": 1},
         "encoder-decoder", 6),
    Form("BEiT", "BeitConfig", "BeitModel", {**_VISION, "intermediate_size": 96, "patch_size": 8,
         "use_relative_position_bias": True}, "vision"),
]  # fmt: skip


# A compile takes seconds: of the others the sweep makes sure.
_QUICK_FORWARD = {"BLOOM", "GPT-NeoX", "MPT", "Falcon with ALiBi", "DeBERTa", "ViTDet", "SAM", "T5"}
_QUICK_DECODE = {"GPT-OSS"}


def forms(quick: set[str]) -> list[Any]:
    """Each form with each implementation of attention; all but the ``quick`` ones, spelled out, in the sweep."""
    found = []
    for form in FORMS + MORE:
        for attention in form.attention:
            marks = [] if form.name in quick and attention == "eager" else [pytest.mark.slow]
            found.append(pytest.param(form, attention, id=f"{form.name}-{attention}", marks=marks))
    return found


def forward(form: Form, model: Any, seed: int) -> torch.Tensor:
    """One pass without a cache; decoders and encoders with padding, of which nothing is compared."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        if form.call == "vision":
            pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
            result = model(pixels)
            return result[0]
        ids, mask = tokens(2, 16, seed), padding(2, 16, "left" if form.pads_left else "right")
        valid = mask.bool()  # type: ignore[union-attr]
        if form.call == "encoder":
            return model(ids, attention_mask=mask).last_hidden_state[valid]
        if form.call == "encoder-decoder":
            decoder = tokens(2, 6, seed + 9)
            return model(ids, attention_mask=mask, decoder_input_ids=decoder, use_cache=False).logits
        return model(ids, attention_mask=mask, use_cache=False).logits[valid]


def decode(form: Form, model: Any, config: Any, seed: int) -> torch.Tensor:
    """Logits of a prompt of 12 tokens and two more steps."""
    ids, logits = tokens(2, 14, seed), []
    with torch.no_grad():
        if form.call == "encoder-decoder":
            encoded = (torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(seed)).to(model.dtype),)
            cache: Any = EncoderDecoderCache(*(StaticCache(config=config, max_cache_len=n) for n in (32, 10)))
        elif form.cache == "dynamic":
            cache = DynamicCache(config=config)
        else:
            cache = StaticCache(config=config, max_cache_len=32)
        for first, last in ((0, 12), (12, 13), (13, 14)):
            part, length = ids[:, first:last], 32 if "whole" in form.cache else last
            if form.call == "encoder-decoder":
                out = model(encoder_outputs=encoded, decoder_input_ids=part, past_key_values=cache)
            else:
                mask = torch.ones(2, length, dtype=torch.long)
                mask[0, : 4 * form.pads_left] = 0
                out = model(part, attention_mask=mask, past_key_values=cache)
            logits.append(out.logits[:, 4:] if first == 0 else out.logits)
    return torch.cat(logits, 1)


def assert_as_good_as_eager(compiled: Any, eager: Any, exact: Any, call: Callable[[Any, int], torch.Tensor]) -> None:
    """The error against ``exact``, in float64, is at most 1.5 times eager's own plus 1e-6, median of three inputs."""
    ours = median_error(lambda seed: call(compiled, seed), lambda seed: call(exact, seed))
    theirs = median_error(lambda seed: call(eager, seed), lambda seed: call(exact, seed))
    assert ours <= 1.5 * theirs + 1e-6, f"error {ours:.3g}, eager's {theirs:.3g}"


def assert_all_sites(road: Road, form: Form, sites: int) -> None:
    assert road.graphs and all(len(graph.regions) == sites for graph in road.graphs), form.name
    declined = [region.reason for region in road.regions if not region.shape]
    assert not declined
    if form.name != "Gemma2":  # on the CPU only a few queries have a kernel with a softcap
        assert "inductor" not in road.kernels, [r.reason for r in road.regions]


@pytest.mark.parametrize("form, attention", forms(_QUICK_FORWARD))
def test_every_site_of_a_model_is_recognised_and_right(form: Form, attention: str) -> None:
    model = form.build(attention)
    compiled, road = compile_road(form.build(attention))
    assert_as_good_as_eager(compiled, model, form.exact(), lambda m, seed: forward(form, m, seed))
    assert_all_sites(road, form, form.sites)


CACHED = [
    case
    for case in forms(_QUICK_DECODE)
    if case.values[0].call in ("decoder", "encoder-decoder") and case.values[0].cache != "none"
]


@pytest.mark.parametrize("form, attention", CACHED)
def test_prefill_and_decode_of_a_model_are_recognised_and_right(form: Form, attention: str) -> None:
    model = form.build(attention)
    compiled, road = compile_road(form.build(attention), dynamic=None)
    assert_as_good_as_eager(compiled, model, form.exact(), lambda m, seed: decode(form, m, model.config, seed))
    assert_all_sites(road, form, form.sites - (2 if form.call == "encoder-decoder" else 0))
    assert len(road.graphs) > 1


def greedy(model: Any, config: Any, steps: int) -> torch.Tensor:
    """Tokens of a prompt of 8 and of ``steps`` more, in a static cache of 40."""
    ids, cache, found = tokens(2, 8, 0), StaticCache(config=config, max_cache_len=40), []
    with torch.no_grad():
        for _ in range(steps):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(ids)
    return torch.cat(found, 1)


def test_a_softcap_runs_in_decode_and_gives_eagers_tokens() -> None:
    (form,) = [form for form in MORE if form.name == "Gemma2"]
    model = form.build("eager")
    compiled, road = compile_road(form.build("eager"), dynamic=None, prefer=["cpu.ranges"])
    assert torch.equal(greedy(compiled, model.config, 24), greedy(model, model.config, 24))
    windowed, whole = road.graphs[-1].regions  # the window's cache is full, so that all of it is seen
    assert (windowed.mask, windowed.kernel) == ("none", "inductor")
    assert whole.mask.startswith("causal(offset=") and whole.kernel == "cpu.ranges"


@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prefix_that_sees_itself_both_ways_is_honoured(spelled: bool, padded: bool) -> None:
    """PaliGemma's mask: causal, and an image's tokens see each other; which tokens are an image's, the run tells."""

    def with_prefix(q, k, v, image, valid):
        index = torch.arange(N)
        both = (image[:, None, :, None] == 1) & (image[:, None, None, :] == 1)
        shown = (index[None, :] <= index[:, None]) | both
        if padded:
            shown = shown & valid[:, None, None, :]
        if not spelled:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        return torch.softmax(scores_of(q, k) + torch.where(shown, 0.0, LEAST), -1) @ v

    compiled, road = compile_road(with_prefix)
    valid = torch.arange(N) >= torch.tensor([[2], [0]])
    for prefixes in ([[3], [5]], [[0], [7]], [[2], [2]]):
        image = (torch.arange(N) < torch.tensor(prefixes)).long()
        expected = with_prefix(*qkv(), image, valid)
        torch.testing.assert_close(compiled(*qkv(), image, valid), expected, atol=2e-6, rtol=1e-5)
    (region,) = road.regions
    assert region.shape and region.kernel != "inductor"
    assert region.mask != "causal" and region.unproved


# -- single spellings -------------------------------------------------------------------------------------------------

LEAST = torch.finfo(torch.float32).min
B, H, KV, M, N, D = 2, 4, 2, 7, 7, 16

Function = Callable[..., torch.Tensor]


def values(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def qkv(kv_heads: int = H, keys: int = N, value_size: int = D) -> list[torch.Tensor]:
    return values((B, H, M, D), (B, kv_heads, keys, D), (B, kv_heads, keys, value_size))


def hidden(m: int = M, n: int = N) -> torch.Tensor:
    """bool [m, n]: keys after the query."""
    return torch.ones(m, n, dtype=torch.bool).triu(1)


def causal_bias() -> torch.Tensor:
    return torch.zeros(M, N).masked_fill(hidden(), torch.finfo(torch.float32).min)


def scores_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) * 0.25


def biased_then_masked(q, k, v, bias):
    return torch.softmax(scores_of(q, k) + bias + causal_bias(), -1) @ v


def masked_then_biased(q, k, v, bias):
    return torch.softmax(scores_of(q, k) + causal_bias() + bias, -1) @ v


def biased_then_filled(q, k, v, bias):
    return torch.softmax((scores_of(q, k) + bias).masked_fill(hidden(), torch.finfo(torch.float32).min), -1) @ v


def filled_with_infinity(q, k, v, bias):
    return torch.softmax((scores_of(q, k) + bias).masked_fill(hidden(), float("-inf")), -1) @ v


def kept_where(q, k, v, bias):
    least = torch.tensor(torch.finfo(torch.float32).min)
    return torch.softmax(torch.where(~hidden(), scores_of(q, k) + bias, least), -1) @ v


def subtracted(q, k, v, bias):
    return torch.softmax(scores_of(q, k) - bias + causal_bias(), -1) @ v


def added_twice(q, k, v, bias):
    return torch.softmax(torch.add(scores_of(q, k), bias, alpha=2.0) + causal_bias(), -1) @ v


def scaled_after_the_bias(q, k, v, bias):
    return torch.softmax((q @ k.transpose(-1, -2) + bias) * 0.25 + causal_bias(), -1) @ v


def written_in_place(q, k, v, bias):
    scores = q @ k.transpose(-1, -2)
    scores /= 4.0
    scores += bias
    scores += causal_bias()
    return torch.softmax(scores, -1) @ v


def stacked_baddbmm(q, k, v, bias):
    q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v))
    alibi = bias.expand(B, H, M, N).reshape(B * H, M, N)[:, :1]
    scores = torch.baddbmm(alibi, q, k.transpose(1, 2), beta=0.5, alpha=0.25).view(B, H, M, N) + causal_bias()
    return torch.bmm(torch.softmax(scores, -1).view(B * H, M, N), v)


def masked_in_a_view_of_more_dimensions(q, k, v, bias):
    q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, M, N) + bias + causal_bias()
    return torch.bmm(torch.softmax(scores.view(B * H, M, N), -1), v)


def reshaped_like_the_scores(q, k, v, bias):
    scores = scores_of(q, k)
    return torch.softmax(scores + bias.expand(B, H, M, N).reshape(B, H, -1).reshape_as(scores), -1) @ v


def capped_then_two_masks(q, k, v, bias):
    scores = torch.tanh(scores_of(q, k) / 5.0) * 5.0
    return torch.softmax(scores + bias + causal_bias(), -1) @ v


def shifted_by_the_largest(q, k, v, bias):
    scores = scores_of(q, k) + bias
    return torch.softmax(scores - scores.amax(-1, keepdim=True).detach(), -1) @ v


SPELLINGS = [
    biased_then_masked,
    masked_then_biased,
    biased_then_filled,
    filled_with_infinity,
    kept_where,
    subtracted,
    added_twice,
    scaled_after_the_bias,
    written_in_place,
    stacked_baddbmm,
    masked_in_a_view_of_more_dimensions,
    reshaped_like_the_scores,
    capped_then_two_masks,
    shifted_by_the_largest,
]


@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda f: f.__name__)
def test_a_bias_and_a_mask_become_one_mask(fn: Function) -> None:
    (bias,) = values((1, H, M, N), seed=5)
    compiled, road = compile_road(fn)
    inputs = qkv()
    torch.testing.assert_close(compiled(*inputs, bias), fn(*inputs, bias), atol=2e-6, rtol=1e-5)
    (region,) = road.regions
    assert region.shape and "additive mask" in region.mask
    assert region.kernel != "inductor" or fn is capped_then_two_masks


def test_layers_that_share_bias_and_mask_share_their_sum() -> None:
    def two_layers(q, k, v, bias):
        mask = causal_bias()
        for _ in range(2):
            q = torch.softmax(scores_of(q, k) + bias + mask, -1) @ v
        return q

    (bias,) = values((1, H, M, N), seed=5)
    compiled, road = compile_road(two_layers)
    torch.testing.assert_close(compiled(*qkv(), bias), two_layers(*qkv(), bias))
    first, second = road.regions
    assert first.mask == second.mask and "additive mask" in first.mask


def test_a_filled_bias_keeps_its_proof() -> None:
    (bias,) = values((1, H, M, N), seed=5)
    compiled, road = compile_road(biased_then_filled)
    compiled(*qkv(), bias)
    assert road.regions[0].mask.startswith("causal & additive mask")


def near_miss(fn: Function, *extra: torch.Tensor) -> Road:
    compiled, road = compile_road(fn)
    torch.testing.assert_close(compiled(*qkv(), *extra), fn(*qkv(), *extra), atol=2e-6, rtol=1e-5)
    return road


def test_a_bias_that_is_written_before_the_softmax_is_declined() -> None:
    def overwritten(q, k, v):
        bias = q.new_ones(M, N).triu()
        scores = scores_of(q, k) + bias
        bias.zero_()
        return torch.softmax(scores + causal_bias() + bias, -1) @ v

    assert near_miss(overwritten).kernels == ["inductor"]


def test_scores_that_others_read_between_two_masks_are_declined() -> None:
    def read(q, k, v):
        scores = scores_of(q, k) + 1.5 * torch.ones(M, N).tril()
        return torch.softmax(scores + causal_bias(), -1) @ v + scores.mean()

    assert near_miss(read).kernels == ["inductor"]


def test_a_softcap_over_a_bias_is_declined() -> None:
    def capped(q, k, v):
        return torch.softmax(torch.tanh((scores_of(q, k) + torch.ones(M, N).triu()) / 5.0) * 5.0, -1) @ v

    assert near_miss(capped).kernels == ["inductor"]


def test_a_scale_after_a_fill_is_declined() -> None:
    def scaled(q, k, v):
        return torch.softmax(scores_of(q, k).masked_fill(hidden(), torch.finfo(torch.float32).min) * 1e-38, -1) @ v

    assert near_miss(scaled).kernels == ["inductor"]


def test_a_bias_with_a_gradient_is_left_to_autograd() -> None:
    (bias,) = values((1, H, M, N), seed=5)
    bias.requires_grad_()
    compiled, road = compile_road(biased_then_masked)
    (got,) = torch.autograd.grad(compiled(*qkv(), bias).sum(), bias)
    (expected,) = torch.autograd.grad(biased_then_masked(*qkv(), bias).sum(), bias)
    torch.testing.assert_close(got, expected)
    assert road.kernels == ["inductor"]


def test_one_key_value_head_is_broadcast_by_sdpa_itself() -> None:
    def multi_query(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden())

    compiled, road = compile_road(multi_query)
    torch.testing.assert_close(compiled(*qkv(1)), multi_query(*qkv(1)), atol=2e-6, rtol=1e-5)
    assert road.regions[0].shape.startswith(f"batch {B}, {H} heads over 1")


def einsum_of_xlnet(q, k, v, bias):
    q, k, v = (x.permute(2, 0, 1, 3).contiguous() for x in (q, k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) * 0.25 - 1e30 * torch.einsum("ij->ij", hidden().float())
    return torch.einsum("bnij,jbnd->ibnd", torch.softmax(scores + bias, 3), v).permute(1, 2, 0, 3)


def einsum_with_heads_inside(q, k, v, bias):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    scores = torch.einsum("bkhd,bqhd->bhqk", k, q) * 0.25 + bias + causal_bias()
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v).transpose(1, 2)


def keys_moved_and_transposed_at_once(q, k, v, bias):
    keys = k.transpose(1, 2).contiguous().permute(0, 2, 3, 1)
    return torch.softmax(q @ keys * 0.25 + bias + causal_bias(), -1) @ v


def temperature_of_heads(q, k, v, bias):
    temperature = torch.linspace(0.5, 2.0, H).reshape(H, 1, 1).clamp(max=1.5).exp()
    return torch.softmax(scores_of(q, k) * temperature + bias + causal_bias(), -1) @ v


def temperature_of_queries(q, k, v, bias):
    return torch.softmax((scores_of(q, k) / (1.5 + bias.amax(-1, keepdim=True).abs())) + bias, -1) @ v


def lifted_to_the_least_number(q, k, v, bias):
    scores = torch.max(scores_of(q, k) + bias + causal_bias(), torch.full((), LEAST))
    return torch.softmax(scores, -1) @ v


def nothing_added(q, k, v, bias):
    return torch.softmax((scores_of(q, k) + 0 + bias).clamp(min=LEAST), -1) @ v


REWRITTEN = [
    einsum_of_xlnet,
    einsum_with_heads_inside,
    keys_moved_and_transposed_at_once,
    temperature_of_heads,
    temperature_of_queries,
    lifted_to_the_least_number,
    nothing_added,
]


@pytest.mark.parametrize("fn", REWRITTEN, ids=lambda f: f.__name__)
def test_a_spelling_that_is_written_anew_is_recognised_and_right(fn: Function) -> None:
    (bias,) = values((1, H, M, N), seed=5)
    compiled, road = compile_road(fn)
    inputs = qkv()
    torch.testing.assert_close(compiled(*inputs, bias), fn(*inputs, bias), atol=2e-6, rtol=1e-5)
    (region,) = road.regions
    assert region.shape.startswith(f"batch {B}, {H} heads over {H}, {M} queries, {N} keys, head size {D}")
    assert "additive mask" in region.mask and region.kernel != "inductor"


@pytest.mark.parametrize("fn", REWRITTEN, ids=lambda f: f.__name__)
def test_gradients_still_flow_where_a_spelling_could_be_written_anew(fn: Function) -> None:
    (bias,) = values((1, H, M, N), seed=5)
    got, expected = ([x.requires_grad_() for x in qkv()] for _ in range(2))
    compiled, road = compile_road(fn)
    compiled(*got, bias).square().sum().backward()
    fn(*expected, bias).square().sum().backward()
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    assert road.kernels == ["inductor"]


@pytest.mark.parametrize("hiding", [-math.inf, LEAST, -1e30], ids=["-inf", "least", "-1e30"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_row_that_sees_nothing_below_a_floor_gives_what_eager_gives(hiding: float, times: int) -> None:
    def lifted(q, k, v, mask):
        scores = scores_of(q, k)
        for _ in range(times):
            scores = scores + mask
        return torch.softmax(torch.max(scores, torch.full((), LEAST)), -1) @ v

    mask = torch.zeros(B, 1, M, N).masked_fill(hidden(), hiding)
    mask[0, :, 2] = hiding
    compiled, road = compile_road(lifted)
    torch.testing.assert_close(compiled(*qkv(), mask), lifted(*qkv(), mask), atol=2e-6, rtol=1e-5)
    assert road.regions[0].shape and "inductor" not in road.kernels


def test_a_proof_survives_a_floor() -> None:
    def lifted(q, k, v):
        return torch.softmax(torch.max(scores_of(q, k) + causal_bias(), torch.full((), LEAST)), -1) @ v

    assert near_miss(lifted).regions[0].mask == "causal"


def floor_that_shows(q, k, v):
    return torch.softmax((scores_of(q, k) + causal_bias()).clamp(min=-1e4), -1) @ v


def ceiling(q, k, v):
    return torch.softmax(scores_of(q, k).clamp(min=LEAST, max=0.1), -1) @ v


def floor_that_broadcasts(q, k, v):
    return torch.softmax(torch.max(scores_of(q[:, :1], k[:, :1]), torch.full((1, H, 1, 1), LEAST)), -1) @ v


def times_a_mask(q, k, v):
    shown = causal_bias().exp()
    return torch.softmax(scores_of(q, k) * shown + -1e4 * (1 - shown) + causal_bias(), -1) @ v


def temperature_of_keys(q, k, v):
    return torch.softmax(scores_of(q, k) * k.mean(-1)[:, :, None], -1) @ v


def temperature_after_a_mask(q, k, v):
    return torch.softmax((scores_of(q, k) + causal_bias()) * q.mean(-1, keepdim=True).exp(), -1) @ v


def divided_by_scores(q, k, v):
    return torch.softmax(q.mean(-1, keepdim=True) / scores_of(q, k), -1) @ v


def einsum_over_heads(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bqhk", q, k)
    return torch.einsum("bqhk,bhkd->bhqd", torch.softmax(scores, -1), v)


def einsum_that_sums_the_keys_heads(q, k, v):
    return torch.einsum("bhqk,bgkd->bhqd", torch.softmax(scores_of(q, k), -1), v)


NEAR_MISSES = [
    floor_that_shows,
    ceiling,
    floor_that_broadcasts,
    times_a_mask,
    temperature_of_keys,
    temperature_after_a_mask,
    divided_by_scores,
    einsum_over_heads,
    einsum_that_sums_the_keys_heads,
]


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda f: f.__name__)
def test_a_spelling_that_only_looks_like_it_is_left_as_it_is(fn: Function) -> None:
    assert set(near_miss(fn).kernels) <= {"inductor"}


def test_scores_times_a_mask_say_why_they_are_left() -> None:
    assert [region.reason for region in near_miss(times_a_mask).regions] == [
        "the scores are multiplied by a tensor that may differ from key to key"
    ]


# -- attention sinks --------------------------------------------------------------------------------------------------


def with_sinks(q, k, v, sinks):
    scores = scores_of(q, k) + causal_bias()
    column = sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1)
    joined = torch.cat([scores, column], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return torch.softmax(joined, -1)[..., :-1] @ v


def with_sinks_unshifted(q, k, v, sinks):
    column = sinks[None, :, None, None].expand(B, H, M, 1)
    return torch.softmax(torch.cat((scores_of(q, k), column), -1), -1)[..., :-1] @ v


@pytest.mark.parametrize("fn", [with_sinks, with_sinks_unshifted], ids=lambda f: f.__name__)
def test_sinks_are_read_and_run_by_a_kernel_that_has_them(fn: Function) -> None:
    (sinks,) = values((H,), seed=3)
    compiled, road = compile_road(fn)
    torch.testing.assert_close(compiled(*qkv(), sinks), fn(*qkv(), sinks), atol=2e-6, rtol=1e-5)
    (region,) = road.regions
    assert region.kernel == "cpu.ranges"
    others = {name: why for name, why in region.rejected.items() if not name.startswith("triton.")}
    assert others and set(others.values()) == {"has no attention sinks"}


def test_every_kernel_that_does_not_declare_sinks_is_refused_a_region_with_one() -> None:
    (sinks,) = values((H,), seed=3)
    compiled, backend = compile_with(cpu.RANGES, with_sinks)
    torch.testing.assert_close(compiled(*qkv(), sinks), with_sinks(*qkv(), sinks), atol=2e-6, rtol=1e-5)
    (region,) = backend.regions
    assert backend.verdicts == [None]

    def takes_all(_: Region) -> None:
        return None

    careless = Kernel("test.careless", "attention", "1", takes_all, lambda *_: region.output)
    assert careless.supports(region) == "has no attention sinks"
    known = {kernel.name for kernel in (cpu.RANGES, SPLIT_KV, TILED)}
    for kernel in kernels():
        if kernel.kind == "attention" and kernel.name not in known:
            assert kernel.supports(region) == "has no attention sinks", kernel.name


def test_a_kernel_with_sinks_qualifies_and_one_that_drops_them_does_not() -> None:
    from lz_compile.lowering.emit import Emitter
    from lz_compile.measure import _emit_mask
    from lz_compile.qualify import Reference, qualify
    from lz_compile.specimen import Specimen

    (sinks,) = values((H,), seed=3)
    none = Kernel("test.none", "attention", "1", lambda _: "looks only", cpu.RANGES.emit, sinks=True)
    compiled, backend = compile_with(none, with_sinks)
    compiled(*qkv(), sinks)
    specimen = Specimen.of(backend.regions[0], copied=True)
    reference = Reference(specimen, specimen.build(_emit_mask, Emitter))
    problem = reference.problem("typical")
    assert reference.error(problem, specimen.as_it_stood()(*problem.inputs)) <= 1
    assert qualify(reference, specimen.build(cpu.RANGES.emit, Emitter)).qualified

    def without(emitter: Emitter, region: Region) -> Any:
        query, key, value = emitter.inputs(region)
        return emitter.call(region.output, torch.ops.lz_compile.attend_cpu_v2.default, query, key, value,
                            *[None] * 5, 0.25, 0.0, 0, 0)  # fmt: skip

    assert not qualify(reference, specimen.build(without, Emitter)).qualified


def sinks_with_values(q, k, v, sinks):
    column = sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1)
    return torch.softmax(torch.cat([scores_of(q, k), column], -1), -1) @ F.pad(v, (0, 0, 0, 1))


def sinks_for_each_query(q, k, v, sinks):
    column = sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1) + torch.arange(M)[:, None]
    return torch.softmax(torch.cat([scores_of(q, k), column], -1), -1)[..., :-1] @ v


def sinks_in_front(q, k, v, sinks):
    column = sinks.reshape(1, -1, 1, 1).expand(B, -1, M, -1)
    return torch.softmax(torch.cat([column, scores_of(q, k)], -1), -1)[..., :-1] @ v


def sinks_of_rows(q, k, v, sinks):
    column = sinks[:M, None].expand(B, H, M, 1)
    return torch.softmax(torch.cat([scores_of(q, k), column], -1), -1)[..., :-1] @ v


@pytest.mark.parametrize("fn", [sinks_with_values, sinks_for_each_query, sinks_in_front, sinks_of_rows])
def test_a_column_that_is_no_sink_of_a_head_is_not_taken_for_one(fn: Function) -> None:
    (sinks,) = values((M if fn is sinks_of_rows else H,), seed=3)
    assert set(near_miss(fn, sinks).kernels) <= {"inductor"}


def test_a_shift_by_another_maximum_is_no_shift() -> None:
    def over_queries(q, k, v):
        scores = scores_of(q, k)
        return torch.softmax(scores - scores.amax(-2, keepdim=True), -1) @ v

    assert set(near_miss(over_queries).kernels) <= {"inductor"}


# -- different head sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "eager"])
def test_values_may_be_narrower_than_keys_and_are_not_copied(spelled: bool) -> None:
    def latent(q, k, k_rope, v):
        k = torch.cat([k, k_rope.expand(B, H, 300, 8)], -1)
        mask = torch.arange(300) < 40
        if spelled:
            scores = (q @ k.transpose(-1, -2) * 0.2).masked_fill(~mask, torch.finfo(torch.float32).min)
            return torch.softmax(scores, -1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 300), scale=0.2)

    inputs = values((B, H, 1, 24), (B, H, 300, 16), (B, 1, 300, 8), (B, H, 300, 16))
    compiled, backend = compile_with(cpu.RANGES, latent)
    torch.testing.assert_close(compiled(*inputs), latent(*inputs), atol=2e-6, rtol=1e-5)
    assert backend.verdicts == [None]
    q, k, v = backend.regions[0].attention.fake()  # type: ignore[union-attr]
    assert (q.shape[3], k.shape[3], v.shape[3]) == (24, 24, 16)


# -- hand-written blocks ----------------------------------------------------------------------------------------------


class NanoGPT(nn.Module):
    """One packed projection split in three, a triangular buffer, fill with -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("past", torch.ones(32, 32).tril().view(1, 1, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, 4, c // 4).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        scores = scores.masked_fill(self.past[:, :, :t, :t] == 0, float("-inf"))
        y = self.dropout(F.softmax(scores, dim=-1)) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class XTransformers(nn.Module):
    """Einsum products, a learned key and value in front, a boolean fill with the least finite number."""

    def __init__(self, talking: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.null_k, self.null_v = (nn.Parameter(torch.randn(4, 1, 16)) for _ in range(2))
        self.mix = nn.Parameter(torch.randn(4, 4)) if talking else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 16).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        k, v = (torch.cat([p.expand(b, -1, -1, -1), y], -2) for p, y in ((self.null_k, k), (self.null_v, v)))
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 16**-0.5
        if self.mix is not None:
            scores = torch.einsum("b h i j, h g -> b g i j", scores, self.mix)
        i, j = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(i, j, dtype=torch.bool).triu(j - i + 1), -torch.finfo(scores.dtype).max)
        out = torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v)
        return out.permute(0, 2, 1, 3).reshape(b, n, -1)


class TorchTitan(nn.Module):
    """Grouped heads repeated by expand and reshape, SDPA with is_causal."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, 16)
        k, v = self.kv(x).view(b, n, -1, 16).chunk(2, dim=2)
        k, v = (y.unsqueeze(3).expand(b, n, 2, 2, 16).reshape(b, n, 4, 16).transpose(1, 2) for y in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        return out.transpose(1, 2).contiguous().view(b, n, -1)


class VisionBlock(nn.Module):
    """timm's block: packed projection as [3, B, H, N, D], norms of queries and keys, scaled queries."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv = fused, nn.Linear(64, 192)
        self.norm_q, self.norm_k = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm_q(q), self.norm_k(k)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q * 0.25) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return out.transpose(1, 2).reshape(b, n, c)


class DiT(nn.Module):
    """A diffusion block: the normalised input is shifted and scaled, attention is gated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 192)
        self.attention = VisionBlock(fused=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(F.silu(x.mean(1))).unsqueeze(1).chunk(3, dim=2)
        return x + gate * self.attention(self.norm(x) * (1 + scale) + shift)


def multihead(**keywords: Any) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, x, x, need_weights=False, **keywords)[0]

    return Wrapped()


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "nanoGPT": NanoGPT,
    "x-transformers": XTransformers,
    "torchtitan": TorchTitan,
    "timm": lambda: VisionBlock(fused=False),
    "timm fused": lambda: VisionBlock(fused=True),
    "DiT": DiT,
    "nn.MultiheadAttention": multihead,
    "nn.MultiheadAttention with padding": lambda: multihead(
        key_padding_mask=torch.tensor([[False] * 9, [False] * 6 + [True] * 3])
    ),
    "nn.MultiheadAttention with a mask": lambda: multihead(attn_mask=hidden(9, 9)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_hand_written_block_is_recognised_and_right(name: str) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name]().train(name.startswith("nn.")).requires_grad_(False)
    if name == "nanoGPT":
        block.eval()
    compiled, road = compile_road(block)
    (x,) = values((2, 9, 64), seed=1)
    torch.testing.assert_close(compiled(x), block(x), atol=2e-6, rtol=1e-5)
    (region,) = road.regions
    assert region.shape and region.kernel != "inductor", region.reason


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_of_pytorch_is_recognised_with_its_padding(padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).requires_grad_(False)
    padding_mask = torch.tensor([[False] * 9, [False] * 6 + [True] * 3]) if padded else None
    compiled, road = compile_road(encoder)
    (x,) = values((2, 9, 64), seed=1)
    got, expected = (f(x, src_key_padding_mask=padding_mask) for f in (compiled, encoder))
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=1e-5)
    assert len(road.regions) == 2 and "inductor" not in road.kernels
    assert not padded or all("key padding" in region.mask for region in road.regions)


def test_heads_that_talk_before_the_softmax_are_declined() -> None:
    block = XTransformers(talking=True).requires_grad_(False)
    compiled, road = compile_road(block)
    (x,) = values((2, 9, 64), seed=1)
    torch.testing.assert_close(compiled(x), block(x), atol=2e-6, rtol=1e-5)
    assert set(road.kernels) <= {"inductor"}
