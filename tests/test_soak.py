"""Many models in one process: what we remember of each may not add up, and the check of it can fail."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.fx as fx

import lz_compile
import lz_compile.backend
import lz_compile.lowering.lengths
import lz_compile.policy
import soak


def _quiet(line: str) -> None:
    pass


@pytest.mark.slow
def test_a_few_models_leave_nothing_behind() -> None:
    # Five written blocks and an architecture; Inductor's code generation, most of the time, is left to the slow test.
    good, line, marks = soak.soak(6, "road", seed=25, warm_up=2, every=2, say=_quiet)
    assert good, line
    assert marks[-1].reports >= 6, "the models did not reach the backend"


@pytest.mark.slow
def test_two_hundred_models_leave_nothing_behind() -> None:
    good, line, _ = soak.soak(200, "layerzero")
    assert good, line


# A planted leak shows without compiled libraries, and in models that are written here (these seeds draw blocks).
_MODELS: dict[str, Any] = {"models": 2, "backend": "road", "seed": 27, "warm_up": 1, "say": _quiet}


@pytest.mark.slow
def test_weak_keys_whose_values_hold_them_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak that this check was written for: a table from a graph to something that names its nodes."""
    table: weakref.WeakKeyDictionary[fx.Graph, Any] = weakref.WeakKeyDictionary()
    monkeypatch.setattr(lz_compile.lowering.lengths, "_planted", table, raising=False)
    transform = lz_compile.backend._transform

    def remembering(normal: fx.GraphModule, *rest: Any) -> bool:
        table[normal.graph] = list(normal.graph.nodes)
        return transform(normal, *rest)

    monkeypatch.setattr(lz_compile.backend, "_transform", remembering)
    good, line, marks = soak.soak(**_MODELS)
    assert not good
    assert "lz_compile.lowering.lengths._planted holds" in line
    assert marks[-1].graphs > marks[0].graphs


@pytest.mark.slow
def test_instances_of_ours_that_something_else_keeps_are_detected() -> None:
    kept: list[Any] = []  # not a container of ours: only the instances show
    good, line, _ = soak.soak(**_MODELS, after_each=lambda: kept.append(lz_compile.policy.Policy()))
    assert not good
    assert "more instances of Policy" in line
    kept.clear()


@pytest.mark.slow
def test_entries_that_hold_no_graph_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    monkeypatch.setattr(lz_compile.policy, "_planted", names, raising=False)
    good, line, _ = soak.soak(**_MODELS, after_each=lambda: names.add(f"model {len(names)}"))
    assert not good
    assert "more entries in lz_compile.policy._planted" in line


@pytest.mark.slow
def test_a_model_that_is_kept_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    build = soak.draw

    def keeping(seed: int) -> Any:
        kept.append(build(seed))
        return kept[-1]

    monkeypatch.setattr(soak, "draw", keeping)
    good, line, _ = soak.soak(**_MODELS)
    assert not good
    assert "dropped models are alive" in line


@pytest.mark.slow
def test_a_wrong_answer_is_no_flat_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    build = soak.draw

    def wrong(seed: int) -> Any:
        model, ask = build(seed)
        return model, lambda run: [answer + (run is not model) for answer in ask(run)]

    monkeypatch.setattr(soak, "draw", wrong)
    good, line, _ = soak.soak(**_MODELS)
    assert not good
    assert "seed 27 is wrong" in line


def test_what_explain_compiled_dies_with_its_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    with torch.no_grad():
        reports = [lz_compile.explain(model, torch.ones(2, 8)) for _ in range(2)]
    assert [len(report.graphs) for report in reports] == [1, 1]
    dead = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert dead() is None
