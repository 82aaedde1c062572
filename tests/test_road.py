"""The road as users meet it: found by name, modes and options, reports, fallbacks, training."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

import lz_compile
from lz_compile.region import Kernel
from road import compile_road
from tiny import DECODERS, tokens

LLAMA = DECODERS[0]


class Block(torch.nn.Module):
    """One grouped-query attention over a causal mask that the graph builds."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 4, 16)[:, :, :2].transpose(1, 2), None, None
        k = self.project(x).view(batch, length, 4, 16)[:, :, 2:3].transpose(1, 2)
        v = self.project(x).view(batch, length, 4, 16)[:, :, 3:].transpose(1, 2)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        k = k[:, :, None].expand(batch, 1, 2, length, 16).reshape(batch, 2, length, 16)
        v = v[:, :, None].expand(batch, 1, 2, length, 16).reshape(batch, 2, length, 16)
        return F.scaled_dot_product_attention(q, k, v, mask)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_python(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_process_that_never_imports_us_compiles_with_every_mode() -> None:
    out = run_python("""
        import sys, torch, torch.nn.functional as F
        def f(q, k, v):
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
            return F.scaled_dot_product_attention(q, k, v, mask)
        x = torch.randn(1, 2, 8, 16)
        assert "lz_compile" not in sys.modules
        for mode in [None, "default", *torch._inductor.list_mode_options()]:
            torch._dynamo.reset()
            got = torch.compile(f, backend="layerzero", mode=mode)(x, x, x)
            torch.testing.assert_close(got, f(x, x, x))
        import lz_compile
        kernels = [region.kernel for report in lz_compile.reports() for region in report.regions]
        modes = [graph.mode for report in lz_compile.reports() for graph in report.graphs]
        assert set(kernels) == {"aten.sdpa"} and len(kernels) == len(modes)
        assert set(modes) == {"default", *torch._inductor.list_mode_options()}
        print("modes:", len(modes))
    """)
    assert "modes: " in out


def test_generate_takes_the_backend_through_compile_config() -> None:
    out = run_python("""
        import torch
        from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(3, 128, (2, 8))
        settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, cache_implementation="static")
        expected = model.generate(ids, **settings, disable_compile=True)
        compile_config = CompileConfig(backend="layerzero", fullgraph=True)
        compile_config._compile_all_devices = True
        got = model.generate(ids, **settings, compile_config=compile_config)
        assert torch.equal(got, expected), (got, expected)
        import lz_compile
        regions = [region for report in lz_compile.reports() for region in report.regions]
        print([(region.kernel, region.mask) for region in regions])
    """)
    assert out.count("cpu.ranges") >= 2
    assert "key padding" in out


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"options": {"strct": True}}, "did you mean 'strict'"),
        ({"options": {"max_autotun": True}}, "did you mean 'max_autotune'"),
        ({"options": {"strict": "yes"}}, "takes a bool"),
        ({"mode": "reduce-overheads"}, "did you mean 'reduce-overhead'"),
    ],
)
def test_an_unknown_option_or_mode_raises_and_names_the_nearest(keywords: dict[str, Any], expected: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=expected):
        torch.compile(lambda x: x + 1, backend="layerzero", **keywords)(torch.ones(2))


def test_options_of_inductor_pass_through() -> None:
    seen = {}

    def pre_grad(graph: torch.fx.Graph) -> None:
        seen["called"] = True

    options = {"strict": True, "pre_grad_custom_pass": pre_grad}
    torch.compile(lambda x: x + 1, backend="layerzero", options=options)(torch.ones(2))
    assert seen


def test_explain_reports_and_does_not_compile_a_second_time() -> None:
    model = LLAMA.build("sdpa")
    compiled = torch.compile(model, backend="layerzero")
    ids = tokens(2, 12, 0)
    with torch.no_grad():
        compiled(ids, use_cache=False)
        before = len(lz_compile.reports())
        report = lz_compile.explain(compiled, ids, use_cache=False)
    assert len(lz_compile.reports()) == before
    sites = [region for region in report.regions if region.kind == "attention"]
    assert [region.module for region in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {region.kernel for region in sites} == {"aten.sdpa"}
    assert {region.mask for region in sites} == {"causal"}
    assert "model.layers.0-1.self_attn (2 sites)" in str(report)
    assert json.loads(report.to_json())["graphs"][0]["regions"][0]["kernel"] == "aten.sdpa"
    assert all(receipt.seconds > 0 for receipt in report.graphs[0].receipts)


def test_explain_compiles_an_eager_function_once() -> None:
    block = Block().eval()
    x = torch.randn(1, 8, 32)
    with torch.no_grad():
        first = lz_compile.explain(block, x)
        count = len(lz_compile.reports())
        second = lz_compile.explain(block, x)
    assert len(lz_compile.reports()) == count
    assert first.regions == second.regions != []


def test_a_disabled_kernel_is_not_used_and_the_report_says_so() -> None:
    block = Block().eval()
    with torch.no_grad():
        compiled, road = compile_road(block, disable=["aten.sdpa"])
        x = torch.randn(1, 8, 32)
        torch.testing.assert_close(compiled(x), block(x))
    (region,) = road.regions
    assert region.kernel != "aten.sdpa"
    assert region.rejected["aten.sdpa"] == "disabled by option"


def test_prefer_changes_the_order() -> None:
    block = Block().eval()
    with torch.no_grad():
        compiled, road = compile_road(block, prefer=["aten.sdpa_masked"])
        x = torch.randn(1, 8, 32)
        torch.testing.assert_close(compiled(x), block(x))
    assert road.kernels == ["aten.sdpa_masked"]


def test_with_everything_disabled_the_graph_goes_to_inductor_untouched() -> None:
    block = Block().eval()
    with torch.no_grad():
        compiled, road = compile_road(block, disable=["*"])
        x = torch.randn(1, 8, 32)
        torch.testing.assert_close(compiled(x), block(x))
    assert road.kernels == ["inductor"]
    assert not road.modules


def test_training_gives_inductors_loss_and_gradients_and_says_why() -> None:
    ids = tokens(2, 12, 0)

    def step(backend: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch._dynamo.reset()
        model = LLAMA.build("sdpa")
        loss = torch.compile(model, backend=backend)(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    before = len(lz_compile.reports())
    loss, gradients = step("layerzero")
    expected_loss, expected_gradients = step("inductor")
    assert torch.equal(loss, expected_loss)
    assert len(gradients) == len(expected_gradients) > 10
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients))
    regions = [region for report in lz_compile.reports()[before:] for region in report.regions]
    assert [r.kind for r in regions].count("attention") == 2
    assert all(r.kernel == "inductor" and "needs gradient" in r.reason for r in regions)


@pytest.mark.slow
def test_dynamic_shapes_agree_with_eager_without_a_compile_per_length() -> None:
    model = LLAMA.build("sdpa")
    before = len(lz_compile.reports())
    compiled = torch.compile(model, backend="layerzero", dynamic=True, options={"strict": True})
    with torch.no_grad():
        for length in (9, 17, 23):
            ids = tokens(2, length, length)
            torch.testing.assert_close(
                compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-4
            )
    graphs = [graph for report in lz_compile.reports()[before:] for graph in report.graphs]
    assert len(graphs) == 1
    assert {region.kernel for region in graphs[0].regions} == {"aten.sdpa"}


def test_automatic_dynamic_shapes_agree_with_eager() -> None:
    model = LLAMA.build("eager")
    compiled, road = compile_road(model, dynamic=None)
    with torch.no_grad():
        for length in (9, 17, 23, 30):
            ids = tokens(2, length, length)
            torch.testing.assert_close(
                compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-4
            )
    assert len(road.graphs) == 2
    assert "inductor" not in road.kernels


def test_a_restart_of_dynamo_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """A number that Inductor needs as a constant makes Dynamo trace the frame again."""

    def attend(x: torch.Tensor, scale: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x * scale, x, scale=scale)

    before = len(lz_compile.reports())
    compiled = torch.compile(attend, backend="layerzero", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=False):
        for scale in (0.5, 0.75):
            x = torch.randn(1, 2, 8, 16)
            torch.testing.assert_close(compiled(x, scale), attend(x, scale), atol=1e-5, rtol=1e-4)
    assert not [record for record in caplog.records if record.name == "lz_compile"]
    regions = [region for report in lz_compile.reports()[before:] for region in report.regions]
    assert regions and all(region.kernel != "inductor" for region in regions)


def test_autocast_outside_and_inside_agrees_with_eager_and_is_left_alone() -> None:
    block = Block().eval()
    x = torch.randn(1, 8, 32)

    def inside(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    with torch.no_grad():
        compiled = torch.compile(inside, backend="layerzero")
        torch.testing.assert_close(compiled(x), inside(x), atol=2e-2, rtol=2e-2)
        assert "autocast" in lz_compile.reports()[-1].graphs[0].reason
        outside = torch.compile(block, backend="layerzero")
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(outside(x), block(x), atol=2e-2, rtol=2e-2)
        assert "autocast" in lz_compile.reports()[-1].graphs[0].reason


@pytest.mark.slow
def test_a_graph_with_flex_attention_compiles_and_says_why_it_was_left_alone() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flex_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)

    with torch.no_grad():
        for got, expected in zip(torch.compile(f, backend="layerzero")(q, k, v), f(q, k, v)):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert "flex_attention" in lz_compile.reports()[-1].graphs[0].reason


@pytest.mark.slow
def test_gradient_checkpointing_agrees_with_eager() -> None:
    from torch.utils.checkpoint import checkpoint

    block = Block()

    def f(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False).sum()

    x = torch.randn(1, 8, 32)
    torch.compile(f, backend="layerzero")(x).backward()
    got = block.project.weight.grad.clone()
    block.zero_grad()
    f(x).backward()
    torch.testing.assert_close(got, block.project.weight.grad)
    assert "checkpoint" in lz_compile.reports()[-1].graphs[0].reason


def _broken(emitter: Any, region: Any) -> Any:
    raise RuntimeError("no such luck")


def test_a_kernel_that_fails_to_emit_leaves_a_correct_model_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lz_compile.lowering import kernels

    bad = Kernel("bad.kernel", "attention", "1", lambda region: None, _broken)
    monkeypatch.setattr(kernels, "KERNELS", [bad])
    block = Block().eval()
    x = torch.randn(1, 8, 32)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "lz_compile"):
        torch.testing.assert_close(torch.compile(block, backend="layerzero")(x), block(x))
    region = next(r for r in lz_compile.reports()[-1].regions if r.kind == "attention")
    assert region.kernel == "inductor" and "no such luck" in region.reason
    assert len([record for record in caplog.records if record.name == "lz_compile"]) == 1
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="no such luck"):
        torch.compile(block, backend="layerzero", options={"strict": True})(x)


def test_a_failure_of_the_matcher_leaves_a_correct_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from lz_compile.patterns import attention

    def fail(*_: Any) -> Any:
        raise RuntimeError("lost the thread")

    monkeypatch.setattr(attention, "find_attention", fail)
    block = Block().eval()
    x = torch.randn(1, 8, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, backend="layerzero")(x), block(x))
    assert "lost the thread" in lz_compile.reports()[-1].graphs[0].reason


def test_a_failure_while_a_rewritten_graph_is_finished_leaves_the_graph_as_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lz_compile import backend

    def fail(*_: Any) -> Any:
        raise RuntimeError("no words for it")

    monkeypatch.setattr(backend, "spell_out_constants", fail)
    x = torch.randn(1, 8, 32)
    block = Block().eval()
    compiled, road = compile_road(block, strict=False)
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
    assert not road.modules and road.kernels == ["inductor"]
    assert "no words for it" in road.graphs[0].reason


def test_weights_that_nobody_reads_do_not_stop_a_site() -> None:
    attention = torch.nn.MultiheadAttention(32, 2, batch_first=True).train()  # in eval mode it is one operator
    x = torch.randn(2, 8, 32)
    compiled, road = compile_road(lambda x: attention(x, x, x)[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), attention(x, x, x)[0])
    assert len(road.regions) == 1 and "inductor" not in road.kernels
    compiled, road = compile_road(lambda x: attention(x, x, x))
    with torch.no_grad():
        compiled(x)
    assert [region.reason for region in road.regions] == ["attention weights are used elsewhere"]


def test_a_result_keeps_the_memory_order_that_eager_gives_it() -> None:
    """Queries that come sequence first give results that do, too, which a view may rely on."""

    def attend(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = x.view(9, 2, 4, 48).permute(1, 2, 0, 3).chunk(3, -1)
        query = query.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return out.permute(2, 0, 1, 3).contiguous().view(18, 64)

    x, mask = torch.randn(9, 2, 192), torch.arange(9) < torch.tensor([[9], [5]])
    compiled, road = compile_road(attend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, mask), attend(x, mask))
    assert len(road.regions) == 1 and "inductor" not in road.kernels


def test_a_graph_whose_values_tracing_loses_is_left_alone() -> None:
    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.vmap(lambda row: row.cumsum(0))(x), F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 2, 8, 8)
    compiled, road = compile_road(program)
    with torch.no_grad():
        for got, expected in zip(compiled(x), program(x)):
            torch.testing.assert_close(got, expected)
    assert "vmap" in road.graphs[0].reason and not road.regions


WARM = """
    import json, torch, sys
    from torch._dynamo.utils import counters
    from transformers import LlamaConfig, LlamaForCausalLM
    import lz_compile
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    model = LlamaForCausalLM(config).eval()
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    ids = torch.arange(3, 19).view(1, 16)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        torch.compile(model, backend="layerzero", options=OPTIONS)(ids, attention_mask=mask, use_cache=False)
    print(json.dumps({
        "fx": [counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]],
        "aot": [counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]],
        "regions": [r.kernel for report in lz_compile.reports() for r in report.regions
                    if r.kind == "attention"]}))
"""


@pytest.mark.slow
def test_a_second_process_hits_both_caches_and_another_plan_misses_them(tmp_path: Any) -> None:
    def run(options: str) -> dict[str, Any]:
        code = textwrap.dedent(WARM).replace("OPTIONS", options)
        return json.loads(run_python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).splitlines()[-1])

    cold, warm = run("None"), run("None")
    assert cold["fx"] == [0, 1] and cold["aot"] == [0, 1]
    # AOTAutograd's hit loads the Inductor graph through its own entry; a miss of either would be counted.
    assert warm["aot"] == [1, 0] and warm["fx"][1] == 0 and warm["fx"][0] == 1
    assert warm["regions"] == cold["regions"] == ["cpu.ranges"] * 2
    other = run('{"disable": ["cpu.*"]}')
    assert other["aot"] == [0, 1] and other["fx"] == [0, 1]
    assert "cpu.ranges" not in other["regions"]
