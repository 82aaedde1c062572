"""``lz-compile coverage``: sites are counted, misses named, wrong results seen, and no child takes it down."""

from __future__ import annotations

import json
import os
import signal
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer", reason="lz-compile was not installed by pip")
pytest.importorskip("transformers")

from typer.testing import CliRunner

import kernels_for_tests as planted
from lz_compile import config, coverage
from lz_compile.cli import app
from lz_compile.coverage import Limits, Plan, cover, read_rows, select
from lz_compile.coverage_child import CallRow, Miss, Row, examine
from lz_compile.coverage_table import markdown, picture, summary
from lz_compile.lowering.kernels import registered
from lz_compile.tiny_models import Architecture, tiny_config


def command(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["coverage", *arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_architectures_are_covered_and_a_second_run_takes_them_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "pages" / "coverage")
    arguments = ("llama", "bert", "vit", "--no-inductor", "--jobs", "2", "--output", output, "--json")
    document = json.loads(command(*arguments).stdout)
    calls = {f"{row['name']} {call['name']}": call for row in document["rows"] for call in row["calls"]}
    assert {name: (call["recognised"], call["sites"]) for name, call in calls.items()} == {
        "llama forward": (2, 2),
        "llama decode": (2, 2),
        "bert forward": (2, 2),
        "vit forward": (2, 2),
    }
    assert calls["llama forward"]["masks"] == {"proved": 2} and calls["vit forward"]["masks"] == {"none": 2}
    assert calls["llama forward"]["regions"] == {"norm": 5, "mlp": 2, "rope": 4, "moe": 0}
    assert all(0 < call["error"] <= 1.5 * call["eager_error"] + 1e-6 for call in calls.values())
    assert all(call["reference"] == "float64" for call in calls.values())
    assert document["summary"]["share"] == 1.0 and document["summary"]["wrong"] == 0

    def never(*_: Any) -> None:
        raise AssertionError("it was done before")

    monkeypatch.setattr(coverage, "_start", never)
    assert json.loads(command(*arguments).stdout) == document
    assert json.loads(Path(f"{output}.json").read_text()) == document
    assert "| llama (sdpa) | decode | 2/2 |" in Path(f"{output}.md").read_text()
    with pytest.raises(AssertionError, match="done before"):
        cover(select(["llama"]), Plan("eager", False), Limits(), Path(f"{output}.jsonl"))


def test_a_model_type_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    result = command("lama", "--output", str(tmp_path / "coverage"), code=2)
    assert "no model type lama" in result.stderr and not list(tmp_path.iterdir())


def misbehave(architecture: Architecture, attention: str, with_inductor: bool) -> Row:
    """Runs in the child."""
    if architecture.name == "hangs":
        time.sleep(600)
    if architecture.name == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if architecture.name == "leaves":
        os._exit(3)
    if architecture.name == "eats":
        bytearray(2 << 30)
    if architecture.name == "raises":
        raise ValueError("of its own")
    return Row(architecture.name, architecture.model, attention, calls=[CallRow("forward", 1, 1)])


@pytest.mark.slow
def test_a_child_that_hangs_or_dies_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    names = ["hangs", "dies", "leaves", "eats", "raises", "works"]
    file = tmp_path / "rows.jsonl"
    plan = Plan(with_inductor=False, examine=misbehave)
    rows = cover([Architecture(n, n) for n in names], plan, Limits(seconds=8, gigabytes=1.5, jobs=6), file)
    assert [row.problem for row in rows] == [
        "took more than 8 s",
        "died: SIGSEGV",
        "died: exit code 3",
        "took more than 1.5 GB",
        "failed: ValueError: of its own",
        "",
    ]
    assert sorted(row.name for row in read_rows(file)) == sorted(names)


def test_a_line_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = Row("a", "A", calls=[CallRow("forward", 2, 1, misses=[Miss("x", "why", "node")])])
    line = json.dumps(coverage.asdict(row))
    file.write_text(f"{line}\n{line[:40]}")
    assert read_rows(file) == [row]


# -- one model, in this process ----------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, spelled_oddly: bool) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.spelled_oddly = spelled_oddly

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        scores = query @ key.transpose(-1, -2) * 0.3
        if self.spelled_oddly:
            scores = scores.cumsum(-1)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)


class Router(nn.Module):
    """Weighs two projections by a softmax that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_router, self.wide = nn.Linear(16, 2), nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.wide(x).unflatten(-1, (2, 16)) * self.attention_router(x).softmax(-1)[..., None]).sum(-2)


class RouterAttention(Router):
    """The same under a name that promises attention."""


class Planted(nn.Module):
    """A model that looks like one of transformers, as far as coverage asks."""

    main_input_name = "input_ids"
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.embed = nn.Embedding(128, 16)
        self.plain, self.odd = Attention(False), Attention(True)
        self.router, self.routed = Router(), RouterAttention()

    def can_generate(self) -> bool:
        return False

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.routed(self.router(self.odd(self.plain(self.embed(input_ids)))))


class PlantedArchitecture(Architecture):
    def build(self, attention: str) -> Any:
        torch.manual_seed(0)
        return Planted().eval()


def test_a_planted_site_that_is_not_recognised_is_listed_with_the_node_that_stopped_reading() -> None:
    (call,) = examine(PlantedArchitecture("planted", "Planted"), "sdpa", False).calls
    assert (call.recognised, call.sites, call.wrong) == (1, 2, "")
    (miss,) = call.misses
    assert miss.module == "odd" and "cumsum" in miss.reason
    assert miss.node.startswith("cumsum") and "[2, 2, 24, 24]" in miss.node
    assert call.other_softmax == 1


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_planted_wrong_kernel_shows_as_wrong_and_a_right_one_does_not(right: bool) -> None:
    kernel = planted.make("planted.kernel", planted.right if right else planted.ignores_the_mask)
    (bert,) = select(["bert"])
    with registered(planted.provider(kernel)), config.patch(prefer=["planted.*"]):
        (call,) = examine(bert, "sdpa", False).calls
    assert call.kernels == {"planted.kernel": 2}
    assert bool(call.wrong) != right


# -- configurations and pages ------------------------------------------------------------------------------------------


def test_a_configuration_is_small_and_keeps_what_makes_it_special() -> None:
    gemma = tiny_config("gemma2")
    assert gemma.hidden_size == 64 and gemma.sliding_window == 8 and gemma.attn_logit_softcapping == 50.0
    assert set(gemma.layer_types) == {"sliding_attention", "full_attention"}
    assert gemma.num_attention_heads == 2 * gemma.num_key_value_heads
    assert tiny_config("falcon").multi_query and tiny_config("deepseek_v3").kv_lora_rank == 16


def test_pages_list_every_miss_and_draw_every_row() -> None:
    miss = Miss("h.0.attn", "before the softmax comes aten.cumsum", "cumsum = aten.cumsum [2, 4]")
    bad = CallRow(
        "forward", 3, 2, {"proved": 2}, {"aten.sdpa": 2}, [miss], error=0.5, eager_error=1e-7, wrong="error 0.5"
    )
    good = CallRow("forward", 2, 2, error=2e-7, eager_error=1e-7, seconds=3.0, inductor_seconds=2.0)
    rows = [
        Row("a", "A", "sdpa", calls=[bad]),
        Row("b<", "B", "eager", calls=[good]),
        Row("c", "C", problem="no model"),
    ]
    facts = summary(rows)
    assert (facts["sites"], facts["recognised"], facts["wrong"], facts["compile_ratio"]) == (5, 4, 1, 1.5)
    assert (facts["architectures"], facts["not_run"]) == (2, 1)
    page = markdown(rows, "lz-compile coverage", "coverage.svg")
    assert "first in `h.0.attn`, stopped at `cumsum = aten.cumsum [2, 4]`" in page
    assert "- a forward: error 0.5" in page and "- c: no model" in page and "4 of 5" in page
    drawn = ElementTree.fromstring(picture(rows))
    titles = [title.text or "" for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert [t.partition(":")[0] for t in titles if "forward 2" in t or "no model" in t] == ["b<", "a", "c"]
    assert sum(title.startswith("a forward") for title in titles) == 1
