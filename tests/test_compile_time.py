"""What the road costs beside Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_inductor_cache
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import lz_compile
from tiny import tokens


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_our_steps_take_at_most_15_percent_of_a_cold_compile_of_32_layers(phase: str, capsys: Any) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).eval()
    cache = StaticCache(config=config, max_cache_len=64)
    torch._dynamo.reset()
    with torch.no_grad(), fresh_inductor_cache():
        if phase == "decode":
            model(tokens(2, 8, 0), past_key_values=cache)
            torch.compile(model, backend="layerzero")(tokens(2, 1, 0), past_key_values=cache)
        else:
            torch.compile(model, backend="layerzero")(tokens(2, 16, 0), use_cache=False)
    graph = lz_compile.reports()[-1].graphs[0]
    inductor = next(receipt.seconds for receipt in graph.receipts if receipt.step == "Inductor")
    with capsys.disabled():
        print(f"\n{phase}: own steps {graph.own_seconds:.2f} s, Inductor {inductor:.2f} s")
    assert len(graph.regions) == 32
    assert graph.own_seconds <= 0.15 * inductor
