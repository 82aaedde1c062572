"""The command ``lz-compile``: its answers, its JSON, its exit codes, and tuning that goes on where it stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="lz-compile was not installed by pip")

from typer.testing import CliRunner

from lz_compile import canonical, doctor, measure, tune
from lz_compile.cli import app
from lz_compile.database import Database, Key, Record, default
from lz_compile.lowering import kernels as registry
from lz_compile.machine import Machine
from lz_compile.region import Kernel, Provider, Region
from lz_compile.report import GraphReport, RegionReport
from lz_compile.signature import signature_of

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
SHAPE = ["--dtype", "float32", "--sequence", "16", "--cache", "32", "--position", "8", "--device", "cpu"]
GENERATED = "decode as generate() compiles it"
LLAMA = ["tune", "LlamaConfig", *(part for k, v in TINY.items() for part in ("--set", f"{k}={v}")), *SHAPE]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(folder))
    monkeypatch.delenv("LZ_COMPILE_POLICY", raising=False)
    return folder


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def run_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def complaint(*arguments: str, code: int = 1) -> str:
    """The one line on stderr of a command that fails, without anything on stdout."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("lz-compile: ")
    return line.removeprefix("lz-compile: ")


def record(kernel: str = "aten.flash", seconds: float = 1e-5, created: float = 1000.0, **facts: Any) -> Record:
    key = Key(kernel, "1", '{"kind":"attention"}', Machine.of(torch.device("cpu")))
    return Record(key, seconds, 0.0, 12, 1.0, True, created=created, **facts)


# -- the command itself


def test_the_version_is_the_packages() -> None:
    import lz_compile

    assert run("--version").stdout == f"lz-compile {lz_compile.__version__}\n"


def test_an_unknown_command_is_a_usage_error_that_names_the_nearest() -> None:
    assert "doctor" in run("dokter", code=2).stderr


def test_help_imports_nothing_heavy_beyond_the_package() -> None:
    code = """
        import sys, time
        import lz_compile
        begin = time.process_time()
        from typer.testing import CliRunner
        from lz_compile.cli import app
        result = CliRunner().invoke(app, ["--help"])
        assert result.exit_code == 0 and "doctor" in result.stdout
        for heavy in ("transformers", "sqlite3", "pydantic", "torch._inductor.compile_fx", "lz_compile.backend"):
            assert heavy not in sys.modules, heavy
        print(time.process_time() - begin)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0  # 0.3 s on a quiet core


def test_an_error_nobody_expected_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    from lz_compile import cli

    def fail(again: bool) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "examine", fail)
    monkeypatch.setattr(sys, "argv", ["lz-compile", "doctor"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert capfd.readouterr() == ("", "lz-compile: RuntimeError: first line\n")


# -- doctor


def checks(*arguments: str, code: int = 0) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in run_json("doctor", *arguments, code=code)["checks"]}


def test_the_doctor_finds_a_sound_installation(cache: Path) -> None:
    found = checks()
    assert {"python", "torch", "cpu", "triton", "backend", "cache", "database", "provider aten"} <= set(found)
    assert found["cache"]["value"] == str(cache)
    assert found["database"]["value"] == "0 records for this machine, 0 for others"
    assert "all that is installed works" in run("doctor").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the records are the CPU's")
def test_the_doctor_counts_this_machines_records() -> None:
    other = Key("aten.flash", "1", "{}", Machine("another", "1", "", "", "2"))
    default().store([record(), Record(other, 1.0, 0.0, 1, 0.0, True)])
    assert checks()["database"]["value"] == "1 records for this machine, 1 for others"


BROKEN = Provider("broken", (Kernel("broken.k", "attention", "1", lambda r: None, lambda e, r: r.output),), (), "")


def test_a_provider_that_fails_makes_the_doctor_exit_1_with_reason_and_advice() -> None:
    with registry.registered(Provider("broken", BROKEN.kernels, (), "no_such_module_anywhere:probe")):
        check = checks(code=1)["provider broken"]
        text = run("doctor", code=1).stdout
    assert check["state"] == "broken" and "no_such_module_anywhere" in check["value"]
    assert "doctor --again" in check["advice"] and "LZ_COMPILE_PROVIDERS=-broken" in check["advice"]
    assert "no_such_module_anywhere" in text and "something that is installed is broken" in text


def test_a_library_that_is_not_installed_is_no_reason_to_fail() -> None:
    with registry.registered(Provider("absent", (), ("no-such-distribution",), "no_such_module:probe")):
        check = checks()["provider absent"]
    assert (check["state"], check["advice"]) == ("absent", "pip install no-such-distribution")


def test_a_cache_that_cannot_be_written_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert checks(code=1)["cache"]["state"] == "broken"


def test_a_policy_that_cannot_be_read_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LZ_COMPILE_POLICY", str(tmp_path / "none.yaml"))
    assert "no such file" in checks(code=1)["policy"]["value"]


def test_again_forgets_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from lz_compile import discovery

    forgotten = []
    monkeypatch.setattr(discovery, "forget", lambda: forgotten.append(True))
    checks()
    assert not forgotten
    checks("--again")
    assert forgotten


# -- kernels

MASKS = {
    "decode": "causal(offset=mask_1)",
    "decode, mask as input": "key padding(mask_1)",
    "prefill, causal": "causal",
    "prefill, window": "causal & window(k >= q + -127)",
    "prefill, padding": "causal & key padding(mask_1)",
    "prefill, packed": "causal & documents(mask_1)",
    "no mask": "none",
    "dense mask": "dense mask(mask_1)",
    "additive mask": "additive mask(mask_1)",
    "softcap": "causal",
}


def test_every_canonical_case_is_recognised_as_what_its_name_says() -> None:
    regions = canonical.regions(torch.device("cpu"))
    assert len(regions) == len(canonical.CASES)
    for case in canonical.CASES:
        attention = regions[case.name].attention
        assert attention is not None
        q, _, v = attention.fake()
        assert str(attention.mask) == MASKS.get(case.name, "causal"), case.name
        assert (q.shape[2], q.shape[3], v.shape[3], q.dtype) == (
            *(case.queries, case.head_size, case.value_head_size),
            case.dtype,
        )
        assert attention.softcap == (30.0 if case.name == "softcap" else 0.0)


def test_kernels_lists_the_registry_with_what_each_supports() -> None:
    document = run_json("kernels", "--device", "cpu")
    found = {kernel["name"]: kernel for kernel in document["kernels"]}
    assert set(found) == {k.name for e in registry.status() if e.provider for k in e.provider.kernels}
    for kernel in found.values():
        if kernel["takes"] is not None:
            assert set(kernel["takes"]) | set(kernel["refuses"]) == set(document["cases"])
    assert "dense mask" in found["aten.math"]["takes"]
    assert "decode" in found["cpu.ranges"]["takes"] and "no mask" in found["cpu.ranges"]["refuses"]
    assert "head size 64" in found["aten.flash_cpu"]["takes"]
    assert "one head size" in found["aten.flash_cpu"]["refuses"]["value head size 128 of 192"]
    assert found["table.stored"]["takes"] is None


def test_a_glob_picks_kernels_by_name_or_by_provider() -> None:
    def names(glob: str) -> set[str]:
        return {kernel["name"] for kernel in run_json("kernels", glob, "--device", "cpu")["kernels"]}

    assert names("cpu") == {"cpu.ranges", "cpu.filters"}
    assert names("*.sdpa") == {"aten.sdpa"}
    assert "did you mean 'cpu.ranges'" in complaint("kernels", "cpu.range")


def test_a_kernel_that_fails_to_answer_refuses_with_the_reason() -> None:
    def supports(region: Region) -> None:
        raise KeyError("oops")

    kernel = Kernel("mine.k", "attention", "1", supports, lambda e, r: r.output, summary="mine")
    with registry.registered(Provider("mine", (kernel,))):
        result = run("kernels", "mine", "--device", "cpu")
    assert "takes   none of the cases on cpu" in result.stdout
    assert "any: failed: KeyError: 'oops'" in result.stdout


def test_a_kernel_of_a_library_that_does_not_work_is_listed_and_not_asked() -> None:
    def supports(region: Region) -> None:
        raise AssertionError("asked")

    kernel = Kernel("broken.k", "attention", "1", supports, lambda e, r: r.output)
    with registry.registered(Provider("broken", (kernel,), (), "no_such_module_anywhere:probe")):
        (facts,) = run_json("kernels", "broken", "--device", "cpu")["kernels"]
    assert not facts["works"] and facts["takes"] is None and "no_such_module_anywhere" in facts["why_not"]


# -- tune


@pytest.mark.slow
def test_a_tuned_model_is_remembered_and_measured_no_second_time() -> None:
    first = run_json(*LLAMA, "--phase", "prefill", "--cache", "0")
    assert first["measured"] >= 4 and first["remembered"] == 0 and not first["failed"]
    assert sum(region["sites"] for region in first["regions"]) == 2
    (region,) = (r for r in first["regions"] if "16 queries, 16 keys" in r["signature"])
    kernels = {c["kernel"]: c for c in region["candidates"]}
    assert {"aten.sdpa", "aten.math", "inductor"} <= set(kernels)
    assert all(c["source"] == "measured" for c in kernels.values())
    assert kernels["aten.math"]["error"] <= 1.0
    assert [c["kernel"] for c in kernels.values() if c["chosen"]] == [region["chosen"]]
    assert len(default().records(kernel="aten.*")) >= 3

    again = run(*LLAMA, "--phase", "prefill", "--cache", "0")
    assert "0 measured" in again.stdout and "remembered" in again.stdout
    assert region["chosen"] in again.stdout


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_stored_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the second region is measured."""
    calls = []
    run_bench = measure._Bench.run

    def interrupted(bench: measure._Bench) -> Any:
        calls.append(bench.group.signature)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_bench(bench)

    monkeypatch.setattr(measure._Bench, "run", interrupted)
    result = run(*LLAMA, "--phase", "prefill", "--json", code=130)
    document = json.loads(result.stdout)
    assert document["interrupted"] and document["measured"] >= 4
    assert "interrupted" in result.stderr and "run it again" in result.stderr
    assert len({r.key.signature for r in default().records()} & set(calls)) == 1

    again = run_json(*LLAMA, "--phase", "prefill")
    assert calls[1] in calls[2:] and calls[0] not in calls[2:]
    assert again["measured"] >= 4 and again["remembered"] >= 4
    assert {len(region["candidates"]) > 2 for region in again["regions"]} == {True}
    assert run_json(*LLAMA, "--phase", "prefill")["measured"] == 0


@pytest.mark.slow
def test_decoding_is_tuned_with_the_mask_in_the_graph_and_as_generate_compiles_it() -> None:
    document = run_json(*LLAMA)
    assert not document["failed"]
    signatures = [region["signature"] for region in document["regions"]]
    masks = [text.partition("mask ")[2] for text in signatures if "1 queries, 32 keys" in text]
    assert {"causal", "key padding"} <= {mask.partition("(")[0] for mask in masks}
    assert [graph["regions"] for graph in document["graphs"]] == [2, 2, 2, 2]


@pytest.mark.slow
def test_ctrl_c_ends_the_command_with_130_and_the_database_keeps_what_was_measured() -> None:
    command = [sys.executable, "-m", "lz_compile.cli", *LLAMA]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not default().records(kernel="aten.*") and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert re.search(r"interrupted: [1-9]\d* measured", errors.splitlines()[-1]) and "Traceback" not in errors
    assert default().records(kernel="aten.*")


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_asked_about_cuda_and_tuned_under_cuda_graphs() -> None:
    found = {kernel["name"]: kernel for kernel in run_json("kernels")["kernels"]}
    assert {"decode", "decode, mask as input"} <= set(found["triton.split_kv"]["takes"])
    assert {"prefill, causal", "head size 64"} <= set(found["aten.flash"]["takes"])
    settings = [part for k, v in {**TINY, "hidden_size": 256}.items() for part in ("--set", f"{k}={v}")]
    shape = ["--sequence", "128", "--cache", "256", "--position", "100"]
    command = ["tune", "llama", *settings, *shape, "--mode", "reduce-overhead"]
    document = run_json(*command)
    assert not document["failed"] and document["measured"] > 8
    decoding = [region for region in document["regions"] if "1 queries, 256 keys" in region["signature"]]
    assert decoding and all(region["mode"] == "reduce-overhead" for region in decoding)
    measured = [c for region in decoding for c in region["candidates"] if c["kernel"] != "inductor"]
    assert measured and all(c["graph_safe"] for c in measured)
    assert run_json(*command)["measured"] == 0


SCRIPT = """
    import os, sys, torch, torch.nn.functional as F

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    print("hello from", __name__, *sys.argv[1:])
    os.write(1, b"past sys.stdout\\n")
    x = torch.randn(1, 2, 24, 16)
    torch.compile(attend, backend="layerzero")(x, x, x)
    FAIL
"""


def script(tmp_path: Path, fail: str = "") -> str:
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(SCRIPT).replace("FAIL", fail))
    return str(path)


@pytest.mark.slow
def test_what_a_script_compiles_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    import setuptools  # noqa: F401 - Inductor imports it for its first compile, and it adds to the path

    argv, path = list(sys.argv), list(sys.path)
    result = run("tune", script(tmp_path), "--json", "--", "--batch", "4")
    document = json.loads(result.stdout)
    assert "hello from __main__ --batch 4" in result.stderr
    assert document["measured"] >= 3 and document["graphs"][0]["regions"] == 1
    assert (sys.argv, sys.path) == (argv, path)


def test_a_script_that_fails_says_where_and_keeps_what_was_measured(tmp_path: Path) -> None:
    torch._dynamo.reset()
    result = run("tune", script(tmp_path, "raise ValueError('no such model')"), code=1)
    assert result.stderr.splitlines()[-1].endswith("program.py: line 11: ValueError: no such model")
    assert " measured" in result.stdout
    assert default().records(kernel="aten.sdpa")


def test_a_script_that_exits_with_0_is_fine_and_with_3_is_not(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text("raise SystemExit(0)")
    assert "nothing was compiled" in run("tune", str(path)).stdout
    path.write_text("raise SystemExit(3)")
    assert "exited with 3" in run("tune", str(path), code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.py"], 2, "missing.py: no such file"),
        (["LlamaConfg"], 1, "no such file, configuration class, model type"),
        (["LamaConfig"], 1, "did you mean LlamaConfig?"),
        (["llama", "--set", "hiden_size=64"], 1, "did you mean hidden_size?"),
        (["llama", "--set", "hidden_size"], 2, "expected NAME=VALUE"),
        (["llama", "--mode", "reduce-overhed"], 2, "did you mean 'reduce-overhead'?"),
        (["llama", "--position", "40", "--cache", "32"], 2, "does not fit into --cache 32"),
        (["llama", "--phase", "decode", "--cache", "0"], 2, "needs a cache"),
        (["llama", "--dtype", "int64", "--layers", "1"], 1, "not a floating dtype"),
        (["llama", "extra"], 2, "are for scripts"),
        (["whisper", "--layers", "1", "--set", "d_model=48"], 1, "tune a script"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments: list[str], code: int, words: str) -> None:
    assert words in complaint("tune", *arguments, "--device", "cpu", code=code)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'lz-compile[examples]'" in complaint("tune", "LlamaConfig", "--device", "cpu")


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_configuration_may_be_a_file_or_its_directory(tmp_path: Path, name: str) -> None:
    import transformers

    transformers.LlamaConfig(**TINY, num_hidden_layers=8).save_pretrained(tmp_path)
    work = tune.Workload(str(tmp_path / name), {"num_key_value_heads": 1}, dtype="float32")
    model = tune.build(work, torch.device("cpu"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (2, 1)
    assert model.config.hidden_size == 64


def test_a_model_keeps_as_many_layers_as_it_has_kinds_of_them() -> None:
    settings = {**TINY, "num_hidden_layers": 12, "head_dim": 16}
    work = tune.Workload("Gemma3TextConfig", settings, layers=2, dtype="float32")
    model = tune.build(work, torch.device("cpu"))
    kinds = model.config.layer_types
    assert len(model.model.layers) == len(kinds) == 7
    assert kinds == ["sliding_attention"] * 5 + ["full_attention"] * 2


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("bert", ["forward"]),
        ("gpt_neox", ["prefill without cache", "prefill into a static cache", "decode", GENERATED]),
    ],
)
def test_an_encoder_has_one_call_and_a_decoder_four(kind: str, calls: list[str]) -> None:
    tiny = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
    work = tune.Workload(kind, tiny, dtype="float32")
    model = tune.build(work, torch.device("cpu"))
    assert [name for name, _ in tune.calls(work, model)] == calls


def test_the_bar_moves_with_each_kernel_of_each_signature() -> None:
    shown: list[tuple[str, int, int]] = []
    counter = tune.Progress({"attention": 3}.get, lambda text, done, total: shown.append((text, done, total)))
    first, second = '{"kind":"attention","a":1}', '{"kind":"attention","a":2}'
    for signature, kernel in [(first, "a"), (first, "b"), (second, "a"), (second, "b"), (second, "inductor")]:
        counter.hear(signature, kernel)
    counter.finish()
    assert [(done, total) for _, done, total in shown] == [(0, 3), (1, 3), (3, 6), (4, 6), (5, 6)]
    assert shown[1][0].startswith("b: ")
    assert counter.done == counter.total == 6


def test_layers_whose_masks_read_their_own_caches_share_a_row() -> None:
    def region(layer: int) -> RegionReport:
        mask = f"causal(offset=cache.layers.{layer}.length)"
        return RegionReport("attention", f"layers.{layer}", "sdpa", "1 queries", mask, "", "aten.math", "")

    graphs = [GraphReport("", mode, {}, [region(0), region(1)]) for mode in ("default", "reduce-overhead")]
    found = [(row.signature, row.mode, row.sites) for row in tune.rows(graphs)]
    signature = "attention (sdpa): 1 queries, mask causal(offset=cache.layers.*.length)"
    assert found == [(signature, "default", 2), (signature, "reduce-overhead", 2)]


def test_listeners_of_measuring_hear_for_the_length_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    listeners: list[Any] = []
    monkeypatch.setattr(measure, "listeners", listeners, raising=False)
    with tune.listening(print) as heard:
        assert heard and listeners == [print]
    assert listeners == []


def test_a_signature_is_described_in_words() -> None:
    case = canonical.region(canonical.CASES[3], torch.device("cpu"))
    assert tune.describe(signature_of(case, copied=False) or "") == (
        "attention batch 2, 8/2 heads, 512 x 512, size 128, bfloat16 cpu, mask lower+upper+tensor"
    )
    assert tune.describe("roof cpu") == "roof cpu"
    assert tune.describe('{"kind":"rms_norm","rows":8,"dtype":"float16"}') == "rms_norm rows 8, dtype float16"


# -- db


def test_show_prints_the_newest_of_each_key_and_the_history_on_demand() -> None:
    default().store([record(created=1000.0, seconds=2e-5), record(created=2000.0), record("triton.tiled", error=0.5)])
    newest = run_json("db", "show")["records"]
    assert {(r["key"]["kernel"], r["seconds"]) for r in newest} == {("aten.flash", 1e-5), ("triton.tiled", 1e-5)}
    assert newest[0]["key"]["signature"] == {"kind": "attention"}
    assert len(run_json("db", "show", "--all")["records"]) == 3
    assert [r["key"]["kernel"] for r in run_json("db", "show", "triton.*")["records"]] == ["triton.tiled"]
    assert run_json("db", "show", "--device", "NVIDIA*")["records"] == []
    text = run("db", "show").stdout
    assert "triton.tiled" in text and "2 records in" in text


def test_a_rejected_kernel_is_shown_with_its_reason_and_an_infinite_error_is_json() -> None:
    key = record().key
    default().store([Record(key, None, 0.0, 0, 0.0, False, reason="wrong in row 3", error=float("inf"), created=1.0)])
    (found,) = run_json("db", "show")["records"]
    assert (found["error"], found["qualified"], found["seconds"]) == ("inf", False, None)
    assert "wrong in row 3" in run("db", "show").stdout


def test_records_travel_by_export_and_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default().store([record(), record("triton.tiled")])
    file = str(tmp_path / "records.jsonl")
    assert run("db", "export", file).stdout == f"2 records exported to {file}\n"
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert run_json("db", "import", file) == {"imported": 2, "file": file}
    assert run("db", "import", file).stdout == f"0 records imported from {file}\n"
    assert len(default().records()) == 2
    piped = run("db", "export", "-")
    assert [json.loads(line)["kernel"] for line in piped.stdout.splitlines()] == ["aten.flash", "triton.tiled"]
    assert piped.stderr == "2 records exported\n"


def test_a_bad_line_is_named_and_nothing_is_imported(tmp_path: Path) -> None:
    default().store([record()])
    file = tmp_path / "records.jsonl"
    run("db", "export", str(file))
    run("db", "prune", "--older-than", "0", "--newest-too")
    file.write_text(file.read_text() + '{"kernel": 3}\n')
    assert "records.jsonl, line 2: " in complaint("db", "import", str(file))
    assert default().records() == []


def test_files_that_cannot_be_read_or_written_are_one_line(tmp_path: Path) -> None:
    assert "No such file" in complaint("db", "import", str(tmp_path / "none"))
    assert "Is a directory" in complaint("db", "export", str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in complaint("db", "import", str(tmp_path / "binary"))


def test_prune_deletes_what_was_replaced_and_the_newest_only_when_asked() -> None:
    default().store([record(created=1000.0, seconds=2e-5), record(created=2000.0)])
    assert run_json("db", "prune") == {"deleted": 1}
    assert run_json("db", "prune", "--older-than", "1") == {"deleted": 0}
    assert "--older-than 0" in complaint("db", "prune", "--newest-too", code=2)
    assert run("db", "prune", "--older-than", "1", "--newest-too").stdout == "1 record deleted\n"


def test_a_database_of_a_newer_version_is_an_error_here(cache: Path) -> None:
    import sqlite3

    Database(cache / "performance.sqlite3").store([record()])
    with sqlite3.connect(cache / "performance.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 99")
    result = run("db", "show", code=1)
    assert result.stdout == "" and "performance.sqlite3" in result.stderr.splitlines()[-1]


# -- policy


def policy(tmp_path: Path, text: str) -> str:
    path = tmp_path / "policy.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_a_sound_policy_is_counted(tmp_path: Path) -> None:
    path = policy(tmp_path, "rules:\n  - deny: triton.*\n  - boost: aten.math\n    by: 2\n")
    assert run("policy", "check", path).stdout == "2 rules, all fine\n"
    assert run_json("policy", "check", path) == {"file": path, "rules": 2, "errors": [], "warnings": []}


def test_a_typo_in_a_policy_names_line_and_nearest_word(tmp_path: Path) -> None:
    path = policy(tmp_path, "rules:\n  - deny: triton.*\n    when: {querys: 1}\n")
    result = run("policy", "check", path, code=1)
    assert result.stdout == f"{path}:3: unknown fact 'querys'; did you mean 'queries'?\n"
    assert run_json("policy", "check", path, code=1)["errors"] == result.stdout.splitlines()


def test_a_kernel_that_does_not_exist_is_a_warning_only(tmp_path: Path) -> None:
    path = policy(tmp_path, "rules:\n  - deny: triton.tilde\n  - deny: aten.*\n    when: {op: atention}\n")
    document = run_json("policy", "check", path)
    assert document["rules"] == 2 and not document["errors"]
    assert ["triton.tiled" in w or "'attention'" in w for w in document["warnings"]] == [True, True]
    assert run("policy", "check", path).stdout.endswith("2 rules, 2 warnings\n")


def test_a_kernel_of_a_library_that_is_not_installed_is_known(tmp_path: Path) -> None:
    path = policy(tmp_path, "rules:\n  - deny: xformers.*\n")
    assert run("policy", "check", path).stdout == "1 rule, all fine\n"


def test_a_policy_that_is_missing_is_an_error(tmp_path: Path) -> None:
    assert "no such file" in run("policy", "check", str(tmp_path / "none.yaml"), code=1).stdout
