"""64 greedy tokens in float32 equal eager's, over architectures whose attention is not Llama's.

Llama, Qwen3, Mistral, Phi3, GPT-NeoX and Whisper are in ``test_models.py``; models with a sliding window, and what
happens when they cross it, in ``test_caches.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from road import compile_road
from test_attention_forms import FORMS, MORE, Form
from tiny import tokens

STEPS, PROMPT = 64, 6
LENGTH = STEPS + PROMPT
NAMES = [
    "BLOOM",
    "Falcon with ALiBi",
    "Falcon with one K/V head",
    "T5",
    "DeepSeek-V2",
    "DeepSeek-V3",
    "Qwen3-MoE",
    "MPT",
]
QUICK = {("DeepSeek-V3", "sdpa")}


def longer(form: Form) -> Form:
    """The form with room for all positions."""
    limits = {name: 2 * LENGTH for name in ("max_position_embeddings", "max_seq_len") if name in form.settings}
    return replace(form, settings={**form.settings, **limits})


def cases() -> list[Any]:
    by_name = {form.name: form for form in FORMS + MORE}
    found = []
    for name in NAMES:
        for attention in by_name[name].attention:
            marks = [] if (name, attention) in QUICK else [pytest.mark.slow]
            found.append(pytest.param(longer(by_name[name]), attention, id=f"{name}-{attention}", marks=marks))
    return found


def greedy(form: Form, model: Any, config: Any) -> torch.Tensor:
    """The tokens that follow a prompt, as its row 0 is padded on the left where the form has that."""
    ids, found = tokens(2, PROMPT, 0), []
    static = "static" in form.cache

    def cache(length: int) -> Any:
        return StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)

    with torch.no_grad():
        if form.call == "encoder-decoder":
            caches: Any = EncoderDecoderCache(cache(LENGTH), cache(10))
            encoded = (torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(1)),)
        else:
            caches = cache(LENGTH)
        for step in range(STEPS):
            if form.call == "encoder-decoder":
                out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=caches)
            else:
                mask = torch.ones(2, LENGTH if "whole" in form.cache else PROMPT + step, dtype=torch.long)
                mask[0, : 2 * form.pads_left] = 0
                out = model(ids, attention_mask=mask, past_key_values=caches)
            ids = out.logits[:, -1:].argmax(-1)
            found.append(ids)
    return torch.cat(found, 1)


@pytest.mark.parametrize("form, attention", cases())
def test_greedy_tokens_equal_eagers_over_64_steps(form: Form, attention: str) -> None:
    model = form.build(attention)
    compiled, road = compile_road(form.build(attention), dynamic=None)
    assert torch.equal(greedy(form, compiled, model.config), greedy(form, model, model.config))
    sites = form.sites - (2 if form.call == "encoder-decoder" else 0)
    assert all(len(graph.regions) == sites for graph in road.graphs) and "inductor" not in road.kernels
