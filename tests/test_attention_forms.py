"""Attention in all its forms: models of Hugging Face, hand-written blocks, single spellings, and what must not match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from lz_compile.lowering import cpu, triton_ops
from lz_compile.lowering.kernels import kernels
from lz_compile.lowering.semantic import EMPTY_ROW, attend
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
    Form("DeepSeek-V3", "DeepseekV3Config", "DeepseekV3ForCausalLM", {**_DECODER, **_LATENT, "first_k_dense_replace": 1}),
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


def forms() -> list[Any]:
    """Each form with each implementation of attention; the second group in the sweep."""
    found = []
    for form in FORMS + MORE:
        for attention in form.attention:
            slow = form in MORE or (attention == "sdpa" and len(form.attention) == 2 and form.call == "vision")
            marks = [pytest.mark.slow] if slow else []
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
    if form.name != "Gemma2":  # on the CPU no kernel has a softcap
        assert "inductor" not in road.kernels, [r.reason for r in road.regions]


@pytest.mark.parametrize("form, attention", forms())
def test_every_site_of_a_model_is_recognised_and_right(form: Form, attention: str) -> None:
    model = form.build(attention)
    compiled, road = compile_road(form.build(attention))
    assert_as_good_as_eager(compiled, model, form.exact(), lambda m, seed: forward(form, m, seed))
    assert_all_sites(road, form, form.sites)


CACHED = [p for p in forms() if p.values[0].call in ("decoder", "encoder-decoder") and p.values[0].cache != "none"]


@pytest.mark.parametrize("form, attention", CACHED)
def test_prefill_and_decode_of_a_model_are_recognised_and_right(form: Form, attention: str) -> None:
    model = form.build(attention)
    compiled, road = compile_road(form.build(attention), dynamic=None)
    assert_as_good_as_eager(compiled, model, form.exact(), lambda m, seed: decode(form, m, model.config, seed))
    assert_all_sites(road, form, form.sites - (2 if form.call == "encoder-decoder" else 0))
    assert len(road.graphs) > 1
