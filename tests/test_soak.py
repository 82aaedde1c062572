"""Many models in one process: what we remember of each may not add up."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache

import lz_compile
from road import compile_road
from tiny import padding, tokens

MODELS, WARM_UP = 200, 50


def resident() -> float:
    """MiB of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def one_model(seed: int) -> None:
    """Builds a random small decoder, compiles its prefill and a decode step, and drops it."""
    choose = random.Random(seed)
    kv_heads, group, size = choose.choice([1, 2]), choose.choice([1, 2, 3]), choose.choice([8, 16])
    heads = kv_heads * group
    sizes = {
        "vocab_size": 128,
        "hidden_size": heads * size,
        "intermediate_size": 8 * choose.randint(2, 6),
        "num_hidden_layers": choose.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(seed)
    if choose.random() < 0.5:
        config, kind = LlamaConfig(**sizes), LlamaForCausalLM
    else:
        config, kind = MistralConfig(**sizes, sliding_window=choose.choice([4, 8, 100])), MistralForCausalLM
    config._attn_implementation = choose.choice(["sdpa", "eager"])
    model = kind(config).eval()
    batch, length = choose.randint(1, 3), choose.randint(3, 20)
    mask = padding(batch, length, choose.choice(["none", "left", "right"]))
    compiled, road = compile_road(model)
    with torch.no_grad():
        ids = tokens(batch, length, seed)
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        got = compiled(ids, attention_mask=mask, use_cache=False).logits
        cache = StaticCache(config=config, max_cache_len=32)
        compiled(ids, past_key_values=cache)
    valid = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(got[valid], expected[valid], atol=1e-4, rtol=1e-4)
    assert len(road.graphs) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_hundred_models_in_one_process_leave_nothing_behind() -> None:
    marks = []
    for seed in range(MODELS):
        one_model(seed)
        torch._dynamo.reset()
        if seed + 1 >= WARM_UP and (seed + 1) % 25 == 0:
            marks.append(resident())
            print(f"{seed + 1} models: {marks[-1]:.0f} MiB, {len(lz_compile.reports())} reports")
    assert marks[-1] - marks[0] < 40, marks  # the 150 models of a MiB or so each, and their graphs, would be far more
