"""PyTorch's own channels: TORCH_LOGS, the real tlparse, counters, names in Inductor's output, the
settings in words."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from blocks import Blocks, without_inductor
from lz_compile import channels, config
from lz_compile.normalize import module_path
from lz_compile.report import GraphReport, Receipt, RegionReport
from lz_compile.settings import settings
from road import compile_road

REGION = RegionReport("attention", "m.layers.0.attn", "sdpa", "batch 1", "causal", "", "cpu.ranges", "reads fewer keys")

CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
from blocks import Blocks, without_inductor
"""


def child(code: str, **environment: str) -> str:
    """stderr of a process that ran ``code``."""
    code = CHILD.format(tests=str(Path(__file__).parent)) + textwrap.dedent(code)
    settings = {"LZ_COMPILE_MEASURE": "off", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def region(**changes: Any) -> RegionReport:
    return replace(REGION, **changes)


# -- TORCH_LOGS


def test_torch_logs_shows_32_layers_on_one_screen_under_the_compile_id() -> None:
    text = child(
        """
        with without_inductor(), torch.no_grad():
            torch.compile(Blocks(32), backend="layerzero")(torch.randn(1, 16, 32))
        """,
        TORCH_LOGS="lz_compile",
    )
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) <= 40 and max(map(len, lines)) <= 120, text
    assert "layerzero [0/0]: graph rewritten, 32 of" in lines[0]
    (attention,) = (line for line in lines if line.startswith("  attention"))
    assert re.match(r"  attention +aten\.sdpa +layers\.0-31 \(32 sites\): causal; ", attention)


@pytest.mark.slow
def test_nothing_is_printed_until_set_logs_turns_it_on() -> None:
    text = child(
        """
        import logging
        x = torch.randn(1, 16, 32)
        with torch.no_grad():
            with without_inductor():
                torch.compile(Blocks(1), backend="layerzero")(x)
            from torch._dynamo.utils import counters
            assert counters["layerzero"]["graphs"] == 1
            print("now", file=sys.stderr)
            torch._logging.set_logs(modules={"lz_compile": logging.INFO})
            with without_inductor():
                torch.compile(Blocks(2), backend="layerzero")(x)
        """,
    )
    before, _, after = text.partition("now")
    assert "layerzero" not in before and "sdpa" not in before
    assert "graph rewritten, 2 of" in after


def test_a_plus_prints_the_whole_report(caplog: pytest.LogCaptureFixture) -> None:
    report = GraphReport("3/1", "default", {}, regions=[REGION])
    with caplog.at_level(logging.DEBUG, "lz_compile"):
        channels.tell(report)
    assert "graph 1 of 1 [3/1]" in caplog.text and "    mask    causal" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "lz_compile"):
        channels.tell(report)
    assert "graph 1 of 1" not in caplog.text and "layerzero [3/1]" in caplog.text


def test_a_screen_never_grows_beyond_its_lines_and_columns_and_says_what_it_cut() -> None:
    regions = [region(module=f"m.part{i}", kernel="inductor", reason="x\ny" * 90) for i in range(200)]
    report = GraphReport("0/0", "default", {}, regions=[*regions, REGION], reason="r" * 300, trimmed="t" * 300)
    report.receipts = [Receipt(f"step {i}", i / 10) for i in range(30)]
    report.cuda_graphs = ["why " * 60] * 9
    lines = channels.screen(report).splitlines()
    assert len(lines) == 40 and max(map(len, lines)) == 120
    # What was replaced comes first.
    assert re.match(r"  attention  cpu\.ranges +m\.layers\.0\.attn: causal; reads", lines[3])
    left = sum("m.part" in line for line in lines)
    assert any(f"and {200 - left} more kinds of sites" in line for line in lines)
    assert "step 29 2.90 s, step 28" in lines[-1]


def test_as_many_sites_as_fit_are_not_cut() -> None:
    report = GraphReport("", "default", {}, regions=[region(module=f"m.part{i}") for i in range(38)])
    assert len(channels.screen(report).splitlines()) == 40 and "more kinds" not in channels.screen(report)
    report.regions.append(region(module="m.last"))
    assert len(channels.screen(report).splitlines()) == 40 and "and 2 more kinds" in channels.screen(report)


# -- counters


def test_counters_tell_graphs_regions_and_what_became_of_them() -> None:
    counters["layerzero"].clear()
    with without_inductor(), torch.no_grad():
        torch.compile(Blocks(3), backend="layerzero")(torch.randn(1, 16, 32))
        torch._dynamo.reset()
        torch.compile(Blocks(2), backend="layerzero", options={"disable": ["*"]})(torch.randn(1, 16, 32))
    assert {key: n for key, n in counters["layerzero"].items() if "graph" in key or "attention" in key} == {
        "graphs": 2,
        "graphs rewritten": 1,
        "graphs unchanged": 1,
        "attention regions": 5,
        "attention by aten.sdpa": 3,
        "attention left: overruled": 2,
    }


# -- tlparse


def parsed(traces: Path, out: Path) -> Path:
    """The folder that the real tlparse makes of a trace."""
    tlparse = shutil.which("tlparse") or shutil.which("tlparse", path=str(Path(sys.executable).parent))
    if tlparse is None:
        pytest.skip("tlparse is not installed")
    (log,) = traces.glob("*.log")
    subprocess.run([tlparse, str(log), "-o", str(out), "--no-browser"], check=True, capture_output=True)
    return out


def test_the_real_tlparse_lists_our_artifacts_for_each_compile_id(tmp_path: Path) -> None:
    child(
        """
        with without_inductor(), torch.no_grad():
            run, other = (torch.compile(Blocks(n), backend="layerzero") for n in (1, 2))
            run(torch.randn(1, 16, 32))
            run(torch.randn(1, 24, 32))
            other(torch.randn(1, 16, 32))
        """,
        TORCH_TRACE=str(tmp_path / "traces"),
    )
    out = parsed(tmp_path / "traces", tmp_path / "out")
    index = (out / "index.html").read_text()
    directory = json.loads((out / "compile_directory.json").read_text())
    ids = ["-_0_0_0", "-_0_1_0", "-_0_2_0"]
    assert [path.name for path in sorted(out.glob("-_0_*"))] == ids
    for compile_id in ids:
        files = {re.sub(r"_\d+\.", ".", path.name): path for path in (out / compile_id).glob("layerzero_*")}
        assert sorted(files) == ["layerzero_graph.txt", "layerzero_report.json", "layerzero_report.txt"]
        for path in files.values():
            assert f"{compile_id}/{path.name}" in index and path.name in json.dumps(directory)
        (graph,) = json.loads(files["layerzero_report.json"].read_text())["graphs"]
        name = graph["compile_id"]
        assert compile_id == f"-_{name.replace('/', '_')}_0"
        assert graph["regions"][0]["kernel"] == "aten.sdpa" and "cost" in graph
        assert {"candidates", "rejected", "mask", "reason"} <= set(graph["regions"][0])
        sites = 1 + (compile_id == ids[2])
        assert f"[{name}]: {sites} of {sites} attention sites" in files["layerzero_report.txt"].read_text()
        assert files["layerzero_graph.txt"].read_text().count("lz_attention_layers") >= sites


# -- the settings in words


def test_the_config_prints_each_setting_its_value_where_that_comes_from_and_what_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LZ_COMPILE_POLICY", raising=False)
    known = config.get_config_copy()
    before = {setting.name: setting for setting in settings()}
    assert {"strict", "measure", "policy", "kinds"} <= set(before) < set(known)
    assert set(known) - set(before) == {"TYPE_CHECKING", "_WORDS"}  # not settings
    assert all(setting.help and setting.source in ("default", "environment") for setting in before.values())
    assert before["measure"].source == "environment"  # conftest.py sets it
    assert before["strict"].help.startswith("Raise where lz-compile would otherwise log a warning")
    with config.patch(strict=True, disable=["triton.*"]):
        monkeypatch.setenv("LZ_COMPILE_POLICY", "rules.yaml")
        text = repr(config)
        assert "  strict = True  (set)\n" in text and "  disable = ['triton.*']  (set)\n" in text
        assert "  policy = 'rules.yaml'  (environment)\n" in text and "  trim_rows = True  (default)\n" in text
    monkeypatch.delenv("LZ_COMPILE_POLICY")
    assert max(map(len, repr(config).splitlines())) <= 120
    assert {setting.name: setting for setting in settings()} == before and config.get_config_copy() == known


def test_the_command_prints_the_settings() -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from lz_compile.cli import app

    assert CliRunner().invoke(app, ["config"]).stdout.startswith("lz_compile.config\n")
    document = json.loads(CliRunner().invoke(app, ["config", "--json"]).stdout)
    assert [entry["name"] for entry in document] == [setting.name for setting in settings()]
    assert all(set(entry) == {"name", "value", "source", "help"} for entry in document)


# -- names in what Inductor prints


def test_a_kernels_call_is_named_after_its_region_with_the_code_it_comes_from() -> None:
    run, road = compile_road(Blocks(3))
    with torch.no_grad():
        run(torch.randn(1, 16, 32))
    (module,) = road.modules
    named = [node for node in module.graph.nodes if node.name.startswith("lz_attention")]
    assert [node.name for node in named] == [f"lz_attention_layers{end}" for end in ("", "_1", "_2")]
    for i, node in enumerate(named):
        assert "heads, is_causal=True" in node.meta["stack_trace"]
        assert module_path(node) == f"layers.{i}"


def test_equal_layers_compiled_one_by_one_stay_equal_graphs() -> None:
    """Inductor's caches know a graph by its code."""
    model = Blocks(2)
    codes = []
    for i in range(2):
        # The layer is reached through the model, so that its number is part of the module's path.
        run, road = compile_road(lambda x, i=i: model.layers[i](x))
        with torch.no_grad():
            run(torch.randn(1, 16, 32))
        assert road.regions[0].module.endswith(f"layers.{i}")
        codes.append(road.modules[0].code)
    assert codes[0] == codes[1] and "lz_attention" in codes[0]


@pytest.mark.slow
def test_inductors_output_code_and_provenance_name_the_region(tmp_path: Path) -> None:
    text = child(
        """
        torch._inductor.config.force_disable_caches = True
        with torch.no_grad():
            torch.compile(Blocks(2), backend="layerzero")(torch.randn(1, 16, 32))
        """,
        TORCH_LOGS="output_code",
        TORCH_TRACE=str(tmp_path / "traces"),
        INDUCTOR_PROVENANCE="1",
    )
    sources = re.findall(r"Source Nodes: \[([^]]*)\]", text)
    for name in ("lz_attention_layers", "lz_attention_layers_1"):
        assert any(name in source.split(", ") for source in sources), text
    folder = parsed(tmp_path / "traces", tmp_path / "out") / "-_0_0_0"
    for name in ("layerzero_graph", "layerzero_report", "inductor_output_code"):
        assert any(path.name.startswith(name) for path in folder.iterdir())
    (mapping,) = folder.glob("inductor_provenance_tracking_node_mappings_*.json")
    assert "lz_attention_layers" in mapping.read_text()
    (stacks,) = folder.glob("inductor_provenance_tracking_kernel_stack_traces_*.json")
    kernels = json.loads(stacks.read_text())
    attention = [trace for kernel, trace in kernels.items() if "attention" in kernel]
    assert len(attention) == 2 and all("heads, is_causal=True" in str(trace) for trace in attention)
