"""The command ``lz-compile``: what works here, which kernels there are, measuring ahead, the database, policies.

Enters: the command line.  Leaves: text for people on stdout (with ``--json`` one JSON document and nothing else),
errors of one line on stderr, and the exit code: 0 all is well, 1 something is not, 2 the command line is wrong, 130
``tune`` was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from lz_compile.database import Database, Record
    from lz_compile.doctor import Check
    from lz_compile.tune import Row, Tuned, Workload

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="torch.compile(model, backend='layerzero'): what works on this machine, and what was measured on it.",
)
database_app = typer.Typer(no_args_is_help=True, help="What was measured: show, export, import, prune.")
policy_app = typer.Typer(no_args_is_help=True, help="Rules that lock, allow, deny or boost kernels.")
app.add_typer(database_app, name="db")
app.add_typer(policy_app, name="policy")

Device = Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda if it is there]", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

# Columns of a table that is not shown in a terminal.
_WIDTH = 160


def main() -> None:
    """The console script: whatever goes wrong is one line on stderr (``LZ_COMPILE_TRACEBACK=1`` raises it)."""
    try:
        app(prog_name="lz-compile")
    except Exception as error:
        if os.environ.get("LZ_COMPILE_TRACEBACK"):
            raise
        text = str(error).strip().splitlines()
        _complain(f"{type(error).__name__}: {text[0] if text else 'no reason given'}")
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        import lz_compile

        typer.echo(f"lz-compile {lz_compile.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# -- doctor ------------------------------------------------------------------------------------------------------------


@app.command()
def doctor(
    again: Annotated[bool, typer.Option("--again", help="Try every library anew instead of remembering.")] = False,
    as_json: AsJson = False,
) -> None:
    """What is installed, whether it works, and why not.  Exit code 1 when something installed is broken."""
    from lz_compile.doctor import examine

    with _json_only(as_json), _quiet():
        checks = examine(again)
    healthy = all(check.state != "broken" for check in checks)
    if as_json:
        _print_json({"healthy": healthy, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        _show_checks(checks, healthy)
    raise typer.Exit(0 if healthy else 1)


def _show_checks(checks: list[Check], healthy: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    mark = {"ok": ("ok", "green"), "absent": ("-", "dim"), "broken": ("broken", "bold red")}
    for check in checks:
        text, style = mark[check.state]
        value = check.value + (f"\n{check.advice}" if check.advice else "")
        table.add_row(Text(text, style), check.name, Text(value))
    console = _console()
    console.print(table)
    console.print("all that is installed works" if healthy else Text("something that is installed is broken", "red"))


# -- config ------------------------------------------------------------------------------------------------------------


@app.command("config")
def show_config(as_json: AsJson = False) -> None:
    """Every setting, its value for a new process in this environment, where that comes from, and what it does."""
    from lz_compile.settings import as_text, settings

    if as_json:
        _print_json([dataclasses.asdict(setting) for setting in settings()])
    else:
        typer.echo(as_text())


# -- kernels -----------------------------------------------------------------------------------------------------------


@app.command()
def kernels(
    glob: Annotated[str, typer.Argument(help="Kernels or providers, such as 'triton.*' or flash_attn.")] = "*",
    device: Annotated[
        str, typer.Option(help="Where the regions are: cpu or cuda.  [default: cuda if it is there]")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Every kernel, whether its library works here, and which kinds of attention it takes."""
    from lz_compile import canonical
    from lz_compile.lowering.kernels import status

    with _json_only(as_json), _quiet():
        place = _device(device)
        pairs = [(entry, kernel) for entry in status() if entry.provider for kernel in entry.provider.kernels]
        pairs = [
            (entry, kernel)
            for entry, kernel in pairs
            if fnmatchcase(kernel.name, glob) or fnmatchcase(kernel.provider, glob)
        ]
        if not pairs:
            from lz_compile.policy import nearest

            names = [kernel.name for entry in status() if entry.provider for kernel in entry.provider.kernels]
            _fail(f"no kernel is called {glob}{nearest(glob, names)}")
        regions = canonical.regions(place)
        found = [_kernel_facts(entry, kernel, regions) for entry, kernel in pairs]
    if as_json:
        _print_json({"device": str(place), "cases": list(regions), "kernels": found})
    else:
        _show_kernels(found, place)


def _kernel_facts(entry: Any, kernel: Any, regions: dict[str, Any]) -> dict[str, Any]:
    from lz_compile import canonical

    works = kernel in entry.kernels
    facts = {
        "name": kernel.name,
        "provider": entry.name,
        "origin": entry.origin,
        "kind": kernel.kind,
        "version": kernel.version,
        "summary": kernel.summary,
        "cuda_graphs": kernel.cuda_graphs,
        "backward": kernel.backward,
        "works": works,
        "why_not": "" if works else _why_unusable(entry),
        "takes": None,
        "refuses": None,
    }
    # A library that does not work is not asked: the answer may need an import that harms this process.
    if works and kernel.kind == "attention":
        support = canonical.support(kernel, regions)
        facts |= {"takes": support.takes, "refuses": support.refuses}
    return facts


def _why_unusable(entry: Any) -> str:
    found = entry.finding
    if found.usable:
        return "the probe of its provider did not vouch for it"
    return f"{found.state}: {found.detail}" if found.detail else found.state


def _show_kernels(found: list[dict[str, Any]], place: torch.device) -> None:
    from rich.text import Text

    console = _console()
    for facts in found:
        state = Text("works", "green") if facts["works"] else Text(facts["why_not"], "yellow")
        console.print(Text.assemble((facts["name"], "bold"), f"  {facts['kind']}, version {facts['version']}, ", state))
        lines = [("", facts["summary"]), ("graphs", facts["cuda_graphs"] or "not safe under CUDA graphs")]
        if facts["takes"] is not None:
            lines.append(("takes", "; ".join(facts["takes"]) or f"none of the cases on {place}"))
            reasons: dict[str, list[str]] = {}
            for case, why in facts["refuses"].items():
                reasons.setdefault(why, []).append(case)
            everything = len(reasons) == 1 and not facts["takes"]
            lines += [("not", f"{'any' if everything else '; '.join(c)}: {why}") for why, c in reasons.items()]
        for label, text in lines:
            if text:
                _print_indented(console, label, text)


def _print_indented(console: Console, label: str, text: str) -> None:
    from rich.text import Text

    width = 10
    head = f"  {label}".ljust(width)
    wrapped = Text(text).wrap(console, max(20, console.width - width))
    for number, line in enumerate(wrapped):
        console.print(Text.assemble((head if number == 0 else " " * width, "dim"), line))


# -- tune --------------------------------------------------------------------------------------------------------------


@app.command()
def tune(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_CONFIG_OR_SCRIPT",
            help="A Python script, or a model: LlamaConfig, a config.json or its directory, a model type.",
        ),
    ],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the script, after --.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A field of the configuration.")
    ] = None,
    layers: Annotated[int, typer.Option(min=0, help="Layers to build: one like all, and the last.  0: all.")] = 2,
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    phase: Annotated[Literal["decode", "prefill", "both"], typer.Option()] = "both",
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 2048,
    cache: Annotated[int, typer.Option(min=0, help="Slots of the static cache.  0: none, and no decoding.")] = 4096,
    position: Annotated[int, typer.Option(min=0, help="Tokens in the cache when one is decoded.")] = 1000,
    mode: Annotated[str, typer.Option(help="Mode of torch.compile: default, reduce-overhead, ...")] = "default",
    budget: Annotated[float, typer.Option(min=0, help="Seconds to measure, for each graph.")] = 600.0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Qualify and time every kernel for every region, so that later compiles only look it up.

    What is in the database is not measured again: run it again after Ctrl-C and it goes on.  The policy of
    LZ_COMPILE_POLICY holds: what it denies is not measured.  A script runs as it is, with its own modes and devices.
    """
    from lz_compile.tune import Interrupted, TuneError, Workload, tune_model, tune_script

    script = Path(target).suffix == ".py"
    if script and not Path(target).is_file():
        _fail(f"{target}: no such file", 2)
    if not script and arguments:
        _fail(f"arguments after {target} are for scripts: {' '.join(arguments)}", 2)
    interrupted = False
    with _json_only(as_json):
        try:
            if script:
                with _progress(as_json, "running the script"):
                    tuned = tune_script(target, arguments or [], budget)
            else:
                settings = dict(_assignment(change) for change in changes or [])
                shape = (layers, dtype, batch, phase, sequence, cache, position, mode)
                work = Workload(target, settings, *shape, device=str(_device(device)))
                _require_sound(work)
                with _progress(as_json, target) as on_call:
                    tuned = tune_model(work, budget, on_call)
        except TuneError as error:
            _fail(str(error))
        except Interrupted as stop:
            tuned, interrupted = stop.tuned, True
    _show_tuned(tuned, as_json, interrupted)
    if interrupted:
        _complain(f"interrupted: {_counts(tuned)}; what was stored is kept, run it again to go on")
        raise typer.Exit(130)
    for what, why in tuned.failed.items():
        _complain(f"{what}: {why}")
    raise typer.Exit(1 if tuned.failed else 0)


def _require_sound(work: Workload) -> None:
    from lz_compile.options import OptionError, split_options

    try:
        split_options(work.mode, None)
    except OptionError as error:
        _fail(f"--mode: {error}", 2)
    if work.phase != "prefill" and work.cache and work.position >= work.cache:
        _fail(f"--position {work.position} does not fit into --cache {work.cache}", 2)
    if work.phase == "decode" and not work.cache:
        _fail("--phase decode needs a cache", 2)


def _assignment(text: str) -> tuple[str, Any]:
    """``hidden_size=64``: the value is JSON (``true``, ``[1, 2]``, ``null``), else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        _fail(f"--set {text}: expected NAME=VALUE", 2)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


@contextlib.contextmanager
def _progress(as_json: bool, title: str) -> Iterator[Callable[[str], None]]:
    """A bar on stderr that moves with each kernel of each region signature; gives the callback for calls."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from lz_compile import tune as tuning
    from lz_compile.lowering.kernels import kernels as working

    console = _console(stderr=True)
    if as_json or not console.is_terminal:
        yield lambda name: None
        return
    with _quiet():
        kinds = [kernel.kind for kernel in working()]
    columns = (
        SpinnerColumn(),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # What a script prints goes around the bar, but not from stdout to stderr when one of them is a file.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(title, total=None)

        def show(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        counter = tuning.Progress(lambda kind: kinds.count(kind) + 1, show)
        with tuning.listening(counter.hear):
            yield lambda name: bar.update(task, description=name)


def _counts(tuned: Tuned) -> str:
    parts = [f"{tuned.measured} measured", f"{tuned.remembered} remembered"]
    parts += [f"{tuned.rejected} did not qualify"] if tuned.rejected else []
    return f"{', '.join(parts)} in {tuned.seconds:.1f} s"


def _show_tuned(tuned: Tuned, as_json: bool, interrupted: bool) -> None:
    from lz_compile.tune import rows

    found = rows(tuned.graphs)
    if as_json:
        _print_json(
            {
                "measured": tuned.measured,
                "remembered": tuned.remembered,
                "rejected": tuned.rejected,
                "seconds": round(tuned.seconds, 3),
                "interrupted": interrupted,
                "failed": tuned.failed,
                "graphs": [{"mode": g.mode, "regions": len(g.regions), "reason": g.reason} for g in tuned.graphs],
                "regions": [dataclasses.asdict(row) for row in found],
            }
        )
        return
    console = _console()
    for row in found:
        _show_row(console, row)
    empty = [graph.reason for graph in tuned.graphs if not graph.regions]
    for reason in dict.fromkeys(empty):
        count = empty.count(reason)
        console.print(f"{count} graph{'s' * (count != 1)} without regions: {reason or 'nothing to replace'}")
    if not tuned.graphs and not interrupted:
        console.print("nothing was compiled with backend 'layerzero'")
    if not interrupted:
        console.print(_counts(tuned))


def _show_row(console: Console, row: Row) -> None:
    from rich.table import Table
    from rich.text import Text

    sites = f" ({row.sites} sites)" if row.sites > 1 else ""
    console.print(Text.assemble((row.signature, "bold"), f"{sites}, mode {row.mode}"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, side in (("", "left"), ("kernel", "left"), ("us", "right"), ("+-", "right"), ("error", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    table.add_column("source")
    for candidate in row.candidates:
        chosen = candidate["kernel"] == row.chosen
        error = candidate["error"]
        table.add_row(
            "  ->" if chosen else "",
            Text(candidate["kernel"], "green" if chosen else ""),
            f"{candidate['microseconds']:.4g}",
            "" if candidate["source"] == "estimated" else f"{candidate['spread']:.2g}",
            "" if error is None else f"{error:.2g}",
            candidate["source"],
        )
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for kernel, why in row.rejected.items():
        reasons.setdefault(why, []).append(kernel)
    for why, names in reasons.items():
        _print_indented(console, "not", f"{', '.join(names)}: {why}")


# -- coverage ----------------------------------------------------------------------------------------------------------


@app.command()
def coverage(
    names: Annotated[list[str] | None, typer.Argument(help="Model types or globs, such as 'qwen*'.")] = None,
    attention: Annotated[
        Literal["sdpa", "eager"], typer.Option("--attn", help="Where the class supports it, else the other.")
    ] = "sdpa",
    inductor: Annotated[
        bool, typer.Option(help="Generate code and time both compilers; else the rewritten graphs run as they are.")
    ] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each architecture.")] = 600.0,
    memory: Annotated[float, typer.Option(min=0.5, help="Gigabytes for each architecture.")] = 4.0,
    output: Annotated[Path, typer.Option(help="Where to write: this path with .md, .json, .svg and .jsonl.")] = Path(
        "coverage"
    ),
    again: Annotated[bool, typer.Option("--again", help="Forget what an earlier run left in the .jsonl file.")] = False,
    as_json: AsJson = False,
) -> None:
    """What is recognised in tiny random models of every architecture that transformers knows.

    Exit code 1 when a result is wrong, or a compile fails where Inductor's does not.  Interrupted, it goes on where it
    stopped when it is run again.
    """
    with _json_only(as_json):
        try:
            from lz_compile.coverage import Limits, Plan, cover, select
        except ImportError as error:
            _fail(f"coverage needs transformers ({error}): pip install 'lz-compile[examples]'")
        from lz_compile.coverage_table import markdown, picture, sentence, summary

        try:
            wanted = select(names or [])
        except KeyError as unknown:
            _fail(f"transformers has no model type {unknown.args[0]}", 2)
        lines, page, image = (output.with_name(f"{output.name}{end}") for end in (".jsonl", ".md", ".svg"))
        output.parent.mkdir(parents=True, exist_ok=True)
        if again:
            lines.unlink(missing_ok=True)
        with _row_by_row(as_json, len(wanted)) as on_row:
            rows = cover(wanted, Plan(attention, inductor), Limits(timeout, memory, jobs), lines, on_row)
        facts = summary(rows)
        document = {"summary": facts, "rows": [dataclasses.asdict(row) for row in rows]}
        told = names if names and len(names) <= 6 else [f"({len(names)} model types)"] if names else []
        command = " ".join(["lz-compile coverage", *told, *(["--attn eager"] if attention == "eager" else [])])
        page.write_text(markdown(rows, command + ("" if inductor else " --no-inductor"), image.name), encoding="utf-8")
        image.write_text(picture(rows), encoding="utf-8")
        output.with_name(f"{output.name}.json").write_text(_finite_json(document), encoding="utf-8")
    if as_json:
        typer.echo(_finite_json(document))
    else:
        typer.echo(f"{sentence(facts)}\n{page}")
    raise typer.Exit(1 if facts["wrong"] or facts["failed"] else 0)


@contextlib.contextmanager
def _row_by_row(as_json: bool, total: int) -> Iterator[Callable[[Any], None]]:
    """Gives the callback for rows: a line each on stdout, and a bar on stderr in a terminal."""
    from rich.progress import Progress

    console = _console(stderr=True)
    with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def show(row: Any) -> None:
            bar.update(task, advance=1, description=row.name)
            told = row.problem or ", ".join(
                f"{call.name} {call.recognised}/{call.sites}"
                + "".join(f" {what}" for what in (call.not_called, call.failed, call.wrong) if what)
                for call in row.calls
            )
            if not as_json:
                typer.echo(f"{row.name}: {told}")

        yield show


def _finite_json(document: Any) -> str:
    """JSON in which a number that is not finite is text (``"inf"``)."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {name: finite(inner) for name, inner in value.items()}
        return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(finite(document), indent=2, allow_nan=False)


# -- db ----------------------------------------------------------------------------------------------------------------


@database_app.command("show")
def db_show(
    glob: Annotated[str, typer.Argument(help="Kernels, such as 'aten.*'.")] = "*",
    device: Annotated[str, typer.Option(help="Glob over product names, such as '*H200*'.")] = "*",
    everything: Annotated[bool, typer.Option("--all", help="The history too, not only the newest.")] = False,
    as_json: AsJson = False,
) -> None:
    """What is recorded, newest first."""
    database = _database()
    records = database.records(kernel=glob, device=device, newest=not everything)
    _require_readable(database)
    if as_json:
        _print_json({"path": str(database.path), "records": [_record_facts(record) for record in records]})
    else:
        _show_records(records, database)


@database_app.command("export")
def db_export(file: Annotated[str, typer.Argument(help="JSON lines; - is stdout.")], as_json: AsJson = False) -> None:
    """Write all records to a file that `db import` reads, here or on another machine."""
    database = _database()
    if file == "-":
        if as_json:
            _fail("--json and - both want stdout", 2)
        count = database.export(sys.stdout)
        _require_readable(database)
        typer.echo(f"{_records(count)} exported", err=True)
        return
    try:
        count = database.export(file)
    except OSError as error:
        _fail(f"{file}: {error.strerror or error}")
    _require_readable(database)
    _tell(as_json, f"{_records(count)} exported to {file}", exported=count, file=file)


@database_app.command("import")
def db_import(
    file: Annotated[str, typer.Argument(help="What `db export` wrote; - is stdin.")], as_json: AsJson = False
) -> None:
    """Add the records of an exported file, all or none; those that are here already are left out."""
    from lz_compile.database import FormatError

    database = _database()
    try:
        count = database.import_(sys.stdin if file == "-" else file)
    except FormatError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{file}: {error.strerror or error}")
    except UnicodeDecodeError:
        _fail(f"{file}: not UTF-8 text")
    _require_readable(database)
    _tell(as_json, f"{_records(count)} imported from {file}", imported=count, file=file)


@database_app.command("prune")
def db_prune(
    older_than: Annotated[float | None, typer.Option(metavar="DAYS", min=0, help="Only what is older.")] = None,
    newest_too: Annotated[
        bool, typer.Option("--newest-too", help="Also the newest record of a key, which compiles still use.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete records that newer ones replaced."""
    if newest_too and older_than is None:
        _fail("--newest-too deletes everything without --older-than; say --older-than 0 if that is meant", 2)
    database = _database()
    count = database.prune(older_than, keep_newest=not newest_too)
    _require_readable(database)
    _tell(as_json, f"{_records(count)} deleted", deleted=count)


def _database() -> Database:
    from lz_compile.database import default

    return default()


def _require_readable(database: Database) -> None:
    """An unusable file cost a warning during a compile; here it is what was asked about."""
    if database.problem:
        _fail(f"{database.path}: {database.problem}")


def _records(count: int) -> str:
    return f"{count} record{'s' * (count != 1)}"


def _record_facts(record: Record) -> dict[str, Any]:
    facts = dataclasses.asdict(record)
    with contextlib.suppress(ValueError):
        facts["key"]["signature"] = json.loads(record.key.signature)
    if record.error is not None and math.isinf(record.error):
        facts["error"] = "inf"
    return facts


def _show_records(records: list[Record], database: Database) -> None:
    from rich.table import Table
    from rich.text import Text

    from lz_compile.tune import describe

    console = _console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("kernel", "version", "region", "us", "+-", "error", "n", "graphs", "device", "age"):
        table.add_column(name, justify="right" if name in ("us", "+-", "error", "n", "age") else "left")
    for record in records:
        timed = record.seconds is not None
        table.add_row(
            record.key.kernel,
            record.key.version,
            Text(describe(record.key.signature) + (f"\n{record.reason}" if record.reason else "")),
            f"{1e6 * record.seconds:.4g}" if record.seconds is not None else "",
            f"{1e6 * record.variance**0.5:.2g}" if timed else "",
            "" if record.error is None else f"{record.error:.2g}",
            str(record.samples) if timed else "",
            "yes" if record.key.graphs else "",
            record.key.machine.device,
            _age(time.time() - record.created),
        )
    if records:
        console.print(table)
    console.print(f"{_records(len(records))} in {database.path}", soft_wrap=True)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


# -- policy ------------------------------------------------------------------------------------------------------------


@policy_app.command("check")
def policy_check(file: Annotated[str, typer.Argument(help="A policy in YAML.")], as_json: AsJson = False) -> None:
    """Everything that is wrong with a policy.  Exit code 1 for errors, 0 for none or warnings."""
    from lz_compile import config
    from lz_compile.lowering.kernels import status
    from lz_compile.patterns.pointwise import POINTWISE
    from lz_compile.policy import Policy, PolicyError, check

    with _json_only(as_json), _quiet():
        known = [kernel for entry in status() if entry.provider for kernel in entry.provider.kernels]
        kinds = list(dict.fromkeys([*config.kinds, *POINTWISE, *(kernel.kind for kernel in known)]))
        problems = check(file, [kernel.name for kernel in known], kinds)
    warnings = [problem for problem in problems if ": warning: " in problem]
    errors = [problem for problem in problems if problem not in warnings]
    count = 0
    if not errors:
        with contextlib.suppress(PolicyError):
            count = len(Policy.load(Path(file)).rules)
    if as_json:
        _print_json({"file": file, "rules": count, "errors": errors, "warnings": warnings})
    else:
        for problem in problems:
            typer.echo(problem)
        if not errors:
            fine = f"{len(warnings)} warning{'s' * (len(warnings) != 1)}" if warnings else "all fine"
            typer.echo(f"{count} rule{'s' * (count != 1)}, {fine}")
    raise typer.Exit(1 if errors else 0)


# -- what commands share -----------------------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        _fail(f"--device {name}: not a device", 2)
    if device.type == "cuda" and not torch.cuda.is_available():
        _fail(f"--device {name}: PyTorch sees no GPU here; `lz-compile doctor` says more")
    return device


def _complain(message: str) -> None:
    typer.echo(f"lz-compile: {message}", err=True)


def _fail(message: str, code: int = 1) -> NoReturn:
    """Ends the command; code 2 where the command line is wrong."""
    _complain(message)
    raise typer.Exit(code)


def _tell(as_json: bool, text: str, **facts: Any) -> None:
    if as_json:
        _print_json(facts)
    else:
        typer.echo(text)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, allow_nan=False, default=str))


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=_WIDTH)
    return console


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The output says what warnings of discovery would say."""
    import logging

    logger = logging.getLogger("lz_compile")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _json_only(as_json: bool) -> Iterator[None]:
    """Sends what anybody prints, children included, to stderr while a document for stdout is made."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


if __name__ == "__main__":
    main()
