"""Tiny models of real architectures, built from their Hugging Face config classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

_DECODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_ENCODER = {**_DECODER, "type_vocab_size": 2}


@dataclass(frozen=True)
class Architecture:
    """A config class with its model class, and how many attention sites one forward pass has."""

    name: str
    config: str
    model: str
    settings: dict[str, Any]
    kind: str
    sites: int = 2
    extra: dict[str, Any] = field(default_factory=dict)

    def build(self, attention: str, seed: int = 0) -> Any:
        """The float32 model in eval mode; parameters hold values that bfloat16 represents."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.settings)
        config._attn_implementation = attention
        model = getattr(transformers, self.model)(config).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        return model


DECODERS = [
    Architecture("llama", "LlamaConfig", "LlamaForCausalLM", _GROUPED, "decoder"),
    Architecture("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}, "decoder"),
    Architecture("mistral", "MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 8}, "decoder"),
    Architecture("phi3", "Phi3Config", "Phi3ForCausalLM", _GROUPED, "decoder"),
    Architecture("gpt-neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", _DECODER, "decoder"),
]
BERT = Architecture("bert", "BertConfig", "BertModel", _ENCODER, "encoder")
VIT = Architecture(
    "vit",
    "ViTConfig",
    "ViTModel",
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
    "vision",
)
WHISPER = Architecture(
    "whisper",
    "WhisperConfig",
    "WhisperForConditionalGeneration",
    {
        "vocab_size": 128,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_source_positions": 40,
        "max_target_positions": 96,
        "num_mel_bins": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "speech",
    sites=6,
)


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, length), generator=generator)


def padding(batch: int, length: int, side: str) -> torch.Tensor | None:
    """A 2-D attention mask: row 0 loses a third of its tokens, row 1 none; None for ``side="none"``."""
    if side == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    cut = length // 3
    if side == "left":
        mask[0, :cut] = 0
    else:
        mask[0, -cut:] = 0
    return mask


Call = Callable[[Any], torch.Tensor]
