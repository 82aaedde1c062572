"""Graph dumps: every file runs on its own, computes what the graph computed, and holds no weight."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import lz_compile
from lz_compile import dump as dump_module
from lz_compile.graph_source import MAX_CONSTANT
from lz_compile.input_values import made_up
from tiny import BERT, DECODERS, Architecture, padding, tokens

GRAPHS = ("01_dynamo.py", "02_normalised.py", "03_regions.py", "04_rewritten.py")
OTHERS = ("README.md", "plan.json", "report.txt", "repro.py", "timings.json")
GEMMA2 = Architecture(
    "gemma2",
    "Gemma2Config",
    "Gemma2ForCausalLM",
    {**DECODERS[0].settings, "head_dim": 16, "sliding_window": 4},
    "decoder",
)
MODELS = {
    "llama": lambda: (DECODERS[0].build("sdpa"), tokens(2, 8, 0), padding(2, 8, "left")),
    "bert": lambda: (BERT.build("eager"), tokens(2, 8, 0), padding(2, 8, "right")),
    "gemma2": lambda: (GEMMA2.build("eager"), tokens(2, 8, 0), padding(2, 8, "left")),
}


class Dumped:
    """What ran and where it was dumped; ``outputs`` are the results of each graph as the files print them."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self.outputs: list[list[str]] = []

    def compile_fx(self, module: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        """Stands in for Inductor's: the graph runs as it is."""

        def run(*args: Any) -> Any:
            result = module.forward(*args)
            self.outputs.append([described(value) for value in tree_leaves(result)])
            return result

        return run

    @property
    def folders(self) -> list[Path]:
        return sorted(self.parent.iterdir(), key=lambda folder: folder.name)

    @property
    def folder(self) -> Path:
        (folder,) = self.folders
        return folder

    def run(self, fn: Any, *args: Any, dynamic: bool | None = None, grad: bool = False, **kwargs: Any) -> Any:
        options = {"dump": self.parent, "strict": True, **kwargs.pop("options", {})}
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            return torch.compile(fn, backend="layerzero", dynamic=dynamic, options=options)(*args, **kwargs)


def described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"


@pytest.fixture
def dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dumped:
    result = Dumped(tmp_path / "dumps")
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", result.compile_fx)
    return result


def printed(path: Path, *arguments: str) -> str:
    """What a dumped file prints when it runs with nothing but itself."""
    out, before = io.StringIO(), sys.argv
    sys.argv = [str(path), *arguments]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    return out.getvalue()


def results(path: Path) -> list[Any]:
    """What the graph of a dumped file returns for its inputs."""
    names = runpy.run_path(str(path))
    with names["context"]():
        return tree_leaves(names["graph"](*names["inputs"]()))


def assert_runs(folder: Path, outputs: list[str], files: tuple[str, ...] = GRAPHS) -> None:
    """Each file gives the shapes that the graph had, and all of them compute the same values."""
    assert printed(folder / files[-1]).splitlines() == [f"output {i}: {text}" for i, text in enumerate(outputs)]
    want = results(folder / files[0])
    for name in files:
        got = results(folder / name)
        assert list(map(described, got)) == outputs, name
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def repro(folder: Path, backends: str) -> dict[str, dict[str, Any]]:
    """The rows of its comparison; layerzero has to find the kernels that the dump says it found."""
    text = printed(folder / "repro.py", "--backends", backends, "--seconds", "0.01", "--json")
    rows: dict[str, dict[str, Any]] = json.loads(text)["backends"]
    assert list(rows) == backends.split(",")
    if "layerzero" in rows:
        plan = json.loads((folder / "plan.json").read_text())
        assert rows["layerzero"]["kernels"] == [region["kernel"] for region in plan["regions"]]
    return rows


def attend(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Masked attention: ``mask`` is ``[batch, keys]``."""
    visible = None if mask is None else mask[:, None, None, :].to(torch.bool)
    return F.scaled_dot_product_attention(q, k, k, attn_mask=visible) + 1


def queries_and_keys(length: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    return torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16), mask


def written(parent: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(parent.rglob("*")) if path.is_file())


@pytest.mark.parametrize("name", MODELS)
def test_every_dumped_file_of_a_model_runs_and_computes_the_same(name: str, dumped: Dumped) -> None:
    model, ids, mask = MODELS[name]()
    dumped.run(model, ids, attention_mask=mask)
    assert sorted(path.name for path in dumped.folder.iterdir()) == sorted([*GRAPHS, *OTHERS])
    assert_runs(dumped.folder, dumped.outputs[0])
    plan = json.loads((dumped.folder / "plan.json").read_text())
    sites = [region for region in plan["regions"] if region["kind"] == "attention"]
    marked = (dumped.folder / "03_regions.py").read_text()
    assert len(sites) == 2 and not plan["left_to_inductor"]
    for i, region in enumerate(plan["regions"]):
        assert f"# region {i}: {region['kind']} ({region['pattern']})" in marked
        assert region["kernel"] in marked and region["nodes"] and region["reason"]
        assert all(f"{node} = " in marked for node in region["nodes"])
    assert all(site["mask"] in marked and site["mask"] and site["candidates"] for site in sites)
    steps = {step["step"] for step in json.loads((dumped.folder / "timings.json").read_text())}
    assert {"normalise", "match", "plan", "rewrite", "Inductor"} <= steps
    assert (dumped.folder / "README.md").read_text().count("runs |") == 4


def test_repro_compares_backends_with_float64_and_finds_the_same_kernels(dumped: Dumped) -> None:
    dumped.run(attend, *queries_and_keys())
    rows = repro(dumped.folder, "eager,layerzero")
    assert all(0 < row["error"] < 1e-6 and row["milliseconds"] > 0 for row in rows.values())
    assert rows["eager"]["ratio"] == 1.0 and rows["layerzero"]["kernels"][0] != "inductor"
    lines = printed(dumped.folder / "repro.py", "--backends", "eager,layerzero", "--seconds", "0.01").splitlines()
    assert [line.split()[0] for line in lines] == ["backend", "eager", "layerzero"]


def test_repro_sees_a_wrong_result(dumped: Dumped, monkeypatch: pytest.MonkeyPatch) -> None:
    dumped.run(attend, *queries_and_keys())

    def wrong(module: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        return lambda *args: tuple(1.01 * value for value in module.forward(*args))

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", wrong)
    rows = repro(dumped.folder, "eager,layerzero")
    assert rows["eager"]["error"] < 1e-6 and 0.005 < rows["layerzero"]["error"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_repro_runs_with_inductor(name: str, tmp_path: Path) -> None:
    model, ids, mask = MODELS[name]()
    dump = Dumped(tmp_path / "dumps")
    dump.run(model, ids, attention_mask=mask)
    plan = json.loads((dump.folder / "plan.json").read_text())
    done = subprocess.run(
        [sys.executable, str(dump.folder / "repro.py"), "--json"], capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)["backends"]
    assert list(rows) == ["eager", "inductor", "layerzero"]
    assert all(0 < row["error"] < 1e-5 and row["ratio"] > 0 for row in rows.values())
    assert rows["layerzero"]["kernels"] == [region["kernel"] for region in plan["regions"]]


def test_a_mask_that_is_a_graph_input_is_made_up_as_hiding_nothing(dumped: Dumped) -> None:
    def masked(q: torch.Tensor, mask: torch.Tensor, bias_mask: torch.Tensor) -> torch.Tensor:
        first = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return F.scaled_dot_product_attention(first, q, q, attn_mask=bias_mask)

    q, mask = torch.randn(2, 2, 8, 16), torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    dumped.run(masked, q, mask, torch.zeros(2, 1, 8, 8))
    assert_runs(dumped.folder, dumped.outputs[0])
    _, bools, floats = runpy.run_path(str(dumped.folder / "01_dynamo.py"))["inputs"]()
    assert bools.all() and not floats.any()
    repro(dumped.folder, "eager,layerzero")


def test_dynamic_shapes_run_at_the_sizes_of_the_compile_and_repro_keeps_them_symbolic(dumped: Dumped) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = torch.nn.Linear(16, 16), 0.25  # with dynamic=True a float is symbolic, too

        def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return attend(self.linear(q) * self.scale, k, mask)

    dumped.run(Scaled(), *queries_and_keys(9), dynamic=True)
    assert_runs(dumped.folder, dumped.outputs[0])
    text = (dumped.folder / "01_dynamo.py").read_text()
    assert ", here 9" in text and 'float("0.25"),  # scale' in text
    rows = repro(dumped.folder, "eager,layerzero")
    assert all(0 < row["error"] < 1e-6 for row in rows.values())
    first, again = (report.regions[0].rejected for report in lz_compile.reports()[-2:])
    assert first == again and "known when it is compiled" in str(first)


def test_the_graphs_of_generate_get_folders_of_their_own(dumped: Dumped) -> None:
    model = DECODERS[0].build("sdpa")
    torch._dynamo.reset()
    options = {"dump": str(dumped.parent), "strict": True}
    model.forward = torch.compile(model.forward, backend="layerzero", options=options)
    ids, mask = tokens(2, 8, 0), padding(2, 8, "left")
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    model.generate(ids, attention_mask=mask, **settings)
    prefill, decode = dumped.folders
    assert_runs(prefill, dumped.outputs[0])
    assert_runs(decode, dumped.outputs[1])
    # The caches are filled to their end, and no further.
    values = runpy.run_path(str(decode / "01_dynamo.py"))["inputs"]()
    lengths = [value for value in values if described(value).startswith("int64[]")]
    assert lengths and all(length == 10 for length in lengths)
    # Timing steps the length of the cache again and again.
    repro(decode, "eager")


def test_a_later_dump_leaves_earlier_ones_alone(dumped: Dumped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump_module, "_numbers", iter(range(10)))
    dumped.run(lambda x: x + 1, torch.randn(3))
    before = {path: path.read_bytes() for path in dumped.folder.iterdir()}
    monkeypatch.setattr(dump_module, "_numbers", iter(range(10)))  # as in a later process of the same id
    dumped.run(lambda x: x + 1, torch.randn(3))
    assert len(dumped.folders) == 2
    assert all(path.read_bytes() == text for path, text in before.items())


def test_a_file_imports_lz_compile_only_for_its_operators(dumped: Dumped) -> None:
    dumped.run(attend, *queries_and_keys(), options={"prefer": ["cpu.ranges"]})
    rewritten = dumped.folder / "04_rewritten.py"
    assert "import lz_compile.lowering.cpu\n" in rewritten.read_text()
    assert "torch.ops.lz_compile.attend_cpu" in rewritten.read_text()
    for name in GRAPHS[:3]:
        assert "import lz_compile" not in (dumped.folder / name).read_text()
    done = subprocess.run([sys.executable, str(rewritten)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"output {i}: {text}" for i, text in enumerate(dumped.outputs[0])]


class Marked(torch.nn.Module):
    """Every parameter and buffer holds nothing but the marker, a single-element one too."""

    MARKER = 0.7231945

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.ones(1))
        for value in [*self.parameters(), *self.buffers()]:
            torch.nn.init.constant_(value, self.MARKER)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + self.offset


@pytest.mark.parametrize("inlined", [True, False])
def test_no_weight_and_no_input_is_written(inlined: bool, dumped: Dumped) -> None:
    model, x = Marked(), torch.full((2, 8), Marked.MARKER)
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=inlined):
        dumped.run(model, x)
    assert not any(path.suffix == ".pt" for path in dumped.folder.iterdir())
    text = written(dumped.parent)
    assert b"0.72319" not in text
    assert torch.tensor(Marked.MARKER).numpy().tobytes() not in text


def test_weights_are_stored_when_asked_for(dumped: Dumped) -> None:
    model, x = Marked(), torch.full((2, 8), 0.5)
    dumped.run(model, x, options={"dump_weights": True})
    names = runpy.run_path(str(dumped.folder / "01_dynamo.py"))
    values = names["inputs"]()
    held = [value for value in values if isinstance(value, (torch.nn.Parameter, torch.nn.Buffer))]
    assert len(held) == 4 and all((value == Marked.MARKER).all() for value in held)
    (given,) = (value for value in values if not isinstance(value, (torch.nn.Parameter, torch.nn.Buffer)))
    torch.testing.assert_close(tree_leaves(names["graph"](*values))[0], model(given))


def test_small_constants_are_written_and_large_ones_made_up(dumped: Dumped) -> None:
    small, large = [1.5, float("inf"), float("nan")], [0.6180339] * (MAX_CONSTANT + 1)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x[:, :3] * torch.tensor(small)).sum() + x * torch.tensor(large)

    dumped.run(fn, torch.randn(2, MAX_CONSTANT + 1), options={"kinds": []})
    assert_runs(dumped.folder, dumped.outputs[0], GRAPHS[:2])
    assert b"0.61803" not in written(dumped.parent)
    for name in GRAPHS[:2]:
        text = (dumped.folder / name).read_text()
        assert '[1.5, float("inf"), float("nan")]' in text
        assert f'({MAX_CONSTANT + 1},), (1,), torch.float32, "cpu"' in text


def flex(q: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cpu")
    return flex_attention(q, q, q, block_mask=mask)


def checkpointed(q: torch.Tensor) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: x.exp().relu(), q, use_reentrant=False)


def branching(q: torch.Tensor) -> torch.Tensor:
    return torch.cond(q.sum() > 0, lambda x: x + 1, lambda x: x - 1, (q,))


def mapped(q: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda x: (x @ x.mT).softmax(-1) @ x)(q)


def casting(q: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return q @ q.mT


@pytest.mark.parametrize("fn", [flex, checkpointed, branching, mapped, casting], ids=lambda fn: fn.__name__)
def test_a_graph_that_is_left_to_inductor_runs_from_its_dump(fn: Any, dumped: Dumped) -> None:
    dumped.run(fn, torch.randn(1, 2, 256, 16), grad=fn is checkpointed)
    assert_runs(dumped.folder, dumped.outputs[-1], GRAPHS[:1])
    readme = (dumped.folder / "README.md").read_text()
    reason = json.loads((dumped.folder / "plan.json").read_text())["left_to_inductor"]
    assert reason and reason in readme and "`02_normalised.py` | not written" in readme
    repro(dumped.folder, "eager")


def test_packed_parameters_run_from_the_rewritten_graph(dumped: Dumped) -> None:
    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = torch.nn.Linear(64, 512, bias=False), torch.nn.Linear(64, 512, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.silu(self.gate(x)) * self.up(x)

    options = {"pack_devices": ["cpu"], "kinds": ["projections"], "prefer": ["aten.packed"]}
    dumped.run(Gate(), torch.randn(4, 64), options=options)
    rewritten = dumped.folder / "04_rewritten.py"
    assert "(1024, 64)" in rewritten.read_text()
    assert printed(rewritten) == f"output 0: {dumped.outputs[0][0]}\n"


def test_a_graph_that_cannot_be_written_says_so_and_the_others_run(dumped: Dumped) -> None:
    @torch._dynamo.allow_in_graph
    def local(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.randn(3)
    torch.testing.assert_close(dumped.run(lambda x: local(x) + 1, x), 2 * x + 1)
    header = (dumped.folder / "01_dynamo.py").read_text().split('"""')[1]
    assert "DOES NOT RUN" in header and "local" in header
    readme = (dumped.folder / "README.md").read_text()
    assert "`01_dynamo.py` | the graph as Dynamo handed it over; does not run" in readme
    with pytest.raises(NotImplementedError, match="local"):
        printed(dumped.folder / "01_dynamo.py")
    assert printed(dumped.folder / "02_normalised.py") == "output 0: float32[3] on cpu\n"


@pytest.mark.parametrize("strict", [False, True])
def test_a_folder_that_cannot_be_written_costs_one_warning(
    strict: bool, dumped: Dumped, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    inputs = queries_and_keys()
    options = {"dump": tmp_path / "file" / "dumps", "strict": strict}
    if strict:
        with pytest.raises(Exception, match="Not a directory"):
            dumped.run(attend, *inputs, options=options)
        return
    torch.testing.assert_close(dumped.run(attend, *inputs, options=options), attend(*inputs))
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "lz_compile")
    assert "could not dump" in warning and lz_compile.reports()[-1].regions[0].kernel != "inductor"


def test_a_part_that_fails_costs_only_itself(
    dumped: Dumped, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no regions today")

    monkeypatch.setattr(dump_module.Dump, "_write_regions", broken)
    dumped.run(attend, *queries_and_keys(), options={"strict": False})
    assert_runs(dumped.folder, dumped.outputs[0], (*GRAPHS[:2], GRAPHS[3]))
    assert "no regions today" in (dumped.folder / "README.md").read_text()
    assert caplog.text.count("no regions today") == 1


def test_a_dump_survives_a_compile_that_fails(dumped: Dumped, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("codegen")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", fails)
    with pytest.raises(Exception, match="codegen"):
        dumped.run(lambda x: x + 1, torch.randn(3))
    assert {"01_dynamo.py", "02_normalised.py", "repro.py", "plan.json"} <= {p.name for p in dumped.folder.iterdir()}


def test_without_the_option_nothing_is_imported_or_written(
    dumped: Dumped, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "lz_compile.dump")
    monkeypatch.chdir(tmp_path)
    dumped.run(lambda x: x + 1, torch.randn(3), options={"dump": ""})
    assert "lz_compile.dump" not in sys.modules and not list(tmp_path.iterdir())


def test_the_environment_names_the_folder(tmp_path: Path) -> None:
    program = "from lz_compile import config; print(config.dump)"
    environment = {**os.environ, "LZ_COMPILE_DUMP": "somewhere"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "somewhere\n"


def values_for(fn: Any, *args: torch.Tensor) -> list[str]:
    """How the integer inputs of a function are made up."""
    found: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs):
            if not value.dtype.is_floating_point:
                found.append(str(made_up(node)))
        return module.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=False)(*args)
    return found


def test_integers_are_made_up_as_the_graph_takes_them() -> None:
    table, cache, rows = torch.randn(50, 8), torch.zeros(2, 16, 4), torch.ones(2, 3, 4)
    i, start, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor(0), torch.ones(2, 3, dtype=torch.long)
    assert values_for(lambda i, t: F.embedding(i, t), i, table) == ['"below", 50']
    assert values_for(lambda i, t: t[i.view(-1)], i, table) == ['"below", 50']
    assert values_for(lambda i, t: F.embedding(i + 2, t), i, table) == ['"below", 48']
    assert values_for(lambda position_ids, t: F.embedding(position_ids, t), i, table) == ['"steps", 47']
    assert values_for(lambda s, c, r: c.index_copy_(1, s + torch.arange(3), r), start, cache, rows) == ['"steps", 13']
    assert values_for(lambda m, x: x.masked_fill(m[:, None] == 0, -1.0), mask, torch.zeros(2, 5, 3)) == ['"ones"']
    # An unknown amount is added on the way to the index: only zeros are safe.
    summed = values_for(lambda i, j, t: F.embedding(i + j.cumsum(-1), t), i, i.clone(), table)
    assert sorted(summed) == ['"ones"', '"zeros"']
