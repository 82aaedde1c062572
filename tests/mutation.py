"""Does every guard of the patterns matter to some test?  Each is taken away in turn, and some test must fail.

    make mutate                                   # both steps; the second goes on where it stopped
    python tests/mutation.py trace                # which tests run which lines of patterns/
    python tests/mutation.py trace tests/test_rope.py
    python tests/mutation.py run --jobs 2 --files attention.py --limit 20
    python tests/mutation.py run --again          # those that were not killed, after new tests
    python tests/mutation.py show                 # the share that was killed, and the survivors

A guard is the condition of an ``if`` that ends in return, raise, continue or break; with ``or`` each part is a guard of
its own.  A mutant has one of them replaced by ``False``.  Only tests in which the condition held, which ran what stands
below it, can tell: they run, fastest first, until one fails ("killed") or ``--tests`` of them, and all that are quick,
have passed ("survived").  A guard that held in no test is "never true".  Those of ``EQUIVALENT`` are known to change
nothing and don't run.

A mutant runs in a fork of a process that has PyTorch and transformers imported, and never lz_compile.

``trace`` needs the package ``coverage``; of named files it renews the old trace.  Everything lives in build/mutation/.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "mutation"
TRACE, RESULTS = FOLDER / "trace.json", FOLDER / "results.jsonl"
TRACED = [
    "tests/test_attention_patterns.py",
    "tests/test_attention_parts.py",
    "tests/test_masks.py",
    "tests/test_norms.py",
    "tests/test_glu.py",
    "tests/test_rope.py",
    "tests/test_rope_parts.py",
    "tests/test_rope_tables.py",
    "tests/test_guards.py",
    "tests/test_attention_forms.py",
    "tests/test_einsum.py",
    "tests/test_caches.py",
    "tests/test_models.py",
    "tests/test_cpu_attention.py",
    "tests/test_sdpa_backends.py",
    "tests/test_lengths.py",
    "tests/test_graph_fuzz.py",
    "tests/test_latent.py",
    "tests/test_latent_parts.py",
    "tests/test_moe.py",
    "tests/test_routing.py",
    "tests/test_expert_parts.py",
    "tests/test_packing.py",
    "tests/test_sampling.py",
    "tests/test_sampling_parts.py",
    "tests/test_perturbed.py",
    "tests/test_needed_rows.py",
    "tests/test_road.py",
    "tests/test_gpu.py",
]

# Guards by name that change nothing, and why.
_TENSOR = "the operator takes nothing but tensors there; for the type checker"
_SCALAR = "tracing makes a plain number of this argument"
_DEVICE = "PyTorch refuses tensors of several devices"
_LATER = "a later step declines the same graphs"
_PURE = "saves work only"
_NEXT = "the conditions that follow hold for the same graphs"
EQUIVALENT: dict[str, str] = {
    "sampling.py find_samplings: "
    'not any(graph.find_nodes(op="call_function", target=target, sort=False) for target in _TELLING)': _PURE,
    "norms.py _outline: squared is None": "without a square there is no value that both factors come from",
    "norms.py _outline: mean is None": "nothing is squared without a mean",
    "norms.py _squared: value is None": _TENSOR,
    "norms.py _through_casts: before.device != after.device": _DEVICE,
    "norms.py _is_cast: value is None": _TENSOR,
    "norms.py _is_cast: before is None": _TENSOR,
    "norms.py _other_factor: node is None": _NEXT,
    "norms.py _read_weight: not same_shape(value.shape, fake(node).shape)": "a wider sum is no vector",
    "rope.py _rotated: value is None": _TENSOR,
    'rope.py _rotated: known["dim"] not in (-1, value.dim() - 1)': "halves in another dimension do not fit the sum",
    "rope.py _rounded: fake(total).dtype == dtype": "a cast to the same dtype is the same value",
    "rope.py _rounded: user is None": _NEXT,
    "attention.py _require_stacking: not fits": _NEXT,
    "attention.py _einsum_form: not len(left) == len(right) == len(output) == 4": _NEXT,
    "cache.py _is_last: len(indices) != 3": _NEXT,
    "cache.py _is_last: any(i is not None for i in indices[:2])": _NEXT,
    "heads.py _expand_reshape: outer.dim() != 4": _NEXT,
    "heads.py _expand_reshape: wide.dim() != 5": _NEXT,
    'heads.py _repeat_interleave: known["dim"] is None': "without a dimension the result has one dimension",
    "heads.py one_head: not same(shape.shape[1], 1)": "an expansion of several heads keeps their number",
    "latent.py _joined: aliases.is_written(key)": "who writes a key reads it, which a later step declines",
    "mask_evaluation.py boolean: value is None": _PURE,
    'mask_evaluation.py constant_tensor: node.op != "get_attr"': _NEXT,
    "mask_evaluation.py constant_tensor: not isinstance(tensor, torch.Tensor)": _NEXT,
    "mask_evaluation.py constant_tensor: tensor.dtype == torch.bool": "one and zero are read as booleans",
    "mask_form.py _place_chunk: abs(keys[0][1]) != 1": _NEXT,
    "mask_form.py _place_chunk: self._coefficient(key.value, self.k) != 1": _NEXT,
    "mask_form.py _place_chunk: not self.e.one_query and self._coefficient(query.value, self.q) != 1": _NEXT,
    "mask_form.py _place_chunk: origin is None": "what stands in the origin stands in the offset, too",
    "attention.py _read_sdpa: scale is None": _SCALAR,
    "attention.py _tensors: q is None": _TENSOR,
    "attention.py _tensors: k is None": _TENSOR,
    "attention.py _tensors: v is None": _TENSOR,
    "attention.py _prove: value is None": _TENSOR,
    "attention.py _back_to_product: not isinstance(current, fx.Node)": _TENSOR,
    'attention.py _back_to_product: current.op != "call_function"': "an input has no arguments to follow",
    "attention.py _read_eager: not (q.dtype == k.dtype == v.dtype)": _LATER,
    "attention.py _read_eager: fake(site.output).dtype != q.dtype": "a product has the dtype of its operands",
    "attention.py _require_floating: value is None": _TENSOR,
    "attention.py _read_mask_step: scores is None": _TENSOR,
    "attention.py _mask_of: value.dtype != torch.bool": "PyTorch fills and selects by booleans only",
    "attention.py _untransposed: value is None": _TENSOR,
    "attention.py _require_replaceable: not q.dtype.is_floating_point": "neither softmax nor SDPA takes other dtypes",
    "attention.py _require_replaceable: not (q.device == k.device == v.device)": _DEVICE,
    "attention.py _require_replaceable: out is None": _TENSOR,
    "cache.py _is_dequantised: not isinstance(node.args[0], fx.Node)": _TENSOR,
    "cache.py _is_dequantised: source is None": _TENSOR,
    "cache.py rolled_window: not isinstance(cache, fx.Node)": _TENSOR,
    "cache.py rolled_window: whole is None": _TENSOR,
    "cache.py rolled_window: row is None": _TENSOR,
    "cache.py rolled_window: row.dtype != whole.dtype": "index_put_ takes values of the tensor's dtype only",
    "cache.py _is_last: not isinstance(indices, (list, tuple))": _TENSOR,
    "cache.py _is_last: index is None": "a row was put, so the last index is a tensor",
    "cache.py _is_last: index.dtype.is_floating_point": "no index is a float",
    "cache.py _last_write: not aliases.is_written(base)": _PURE,
    "cache.py _last_write: not aliases.version(base, at)": _PURE,
    "einsum.py _permuted: have == want": _PURE,
    "glu.py _parts: fake(a) is None": _TENSOR,
    "glu.py _parts: left.device != right.device": _DEVICE,
    "expert_activation.py _gated: name is None": "without a name there is no gate either, which has no halves",
    "expert_products.py first_of: node in seen": _PURE,
    "moe.py _site: node in found": _PURE,
    "heads.py _expand_reshape: outer is None": _TENSOR,
    "heads.py _expand_reshape: shape is None": _TENSOR,
    "heads.py _expand_reshape: wide is None": _TENSOR,
    "heads.py _repeat_interleave: shape is None": _TENSOR,
    "heads.py one_head: outer is None": _TENSOR,
    "heads.py one_head: outer.dim() != 4": "an expansion has its base's dimensions at least, a site no more than four",
    "heads.py one_head: shape is None": _TENSOR,
    "mask_evaluation.py _note_source: value in self.sources": "either read holds the value",
    "mask_evaluation.py _note_source: isinstance(value, (Holds, Truth))": _PURE,
    "mask_form.py _replaced: not times": "nothing is replaced no times",
    "mask_operators.py handler: diagonal is None": _SCALAR,
    "mask_operators.py take: any(v.dtype not in (torch.int64, torch.int32) for v in values)": (
        "a boolean index gives a shape that fake tensors refuse"
    ),
    "mask_operators.py take: len(values) != len(used)": _TENSOR,
    "mask_operators.py take: not used": "indexing by nothing is traced as a view",
    "mask_operators.py gather: not isinstance(chosen, fx.Node)": _TENSOR,
    "mask_operators.py concatenate: not isinstance(tensor, fx.Node)": _TENSOR,
    "mask_operators.py adjacent_difference: not isinstance(source, fx.Node)": _TENSOR,
    "mask_operators.py copy_from: not isinstance(source, fx.Node)": _TENSOR,
    'mask_operators.py copy_from: not isinstance(source.meta.get("val"), torch.Tensor)': _TENSOR,
    "mask_operators.py copy_from: value is None": "the value of a tensor is always known, as a read at least",
    "mask_views.py _equal_products: not (inner if total < stride else outer)": "a view has its base's elements",
    "norms.py _read_call: eps is None": _SCALAR,
    "norms.py _through_casts: before is None": _TENSOR,
    "norms.py _through_casts: after is None": _TENSOR,
    "norms.py _other_factor: whole is None": _TENSOR,
    "rope.py _require_whole_heads: not x.device == cos.device == sin.device": _DEVICE,
    "scores.py _step: value is None": _TENSOR,
    "sinks.py sink_column: value is None": _TENSOR,
    "sinks.py drops_last_column: value is None": _TENSOR,
    "sinks.py drops_last_column: source is None": _TENSOR,
}


@dataclass(frozen=True)
class Guard:
    """A condition in a file of patterns/: where it stands, what it reads, and the line that runs when it holds."""

    file: str
    first: tuple[int, int]  # line from 1, column in bytes from 0
    last: tuple[int, int]
    text: str
    function: str
    body: int

    @property
    def name(self) -> str:
        """The guard without its place: what ``EQUIVALENT`` knows it by."""
        return f"{self.file} {self.function}: {self.text}"

    def __str__(self) -> str:
        return f"{self.file}:{self.first[0]}:{self.first[1]} {self.function}: {self.text}"


def guards(path: Path) -> list[Guard]:
    source = path.read_text()
    found = []
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.If) or not isinstance(
            node.body[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)
        ):
            continue
        either = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or)
        for part in node.test.values if either else [node.test]:  # type: ignore[attr-defined]
            text = " ".join((ast.get_source_segment(source, part) or "").split())
            ends = (part.end_lineno or 0, part.end_col_offset or 0)
            around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
            function = max(around, key=lambda f: f.lineno).name if around else ""
            begins = (part.lineno, part.col_offset)
            found.append(Guard(path.name, begins, ends, text, function, node.body[0].lineno))
    return sorted(found, key=lambda g: g.first)


def without(source: str, guard: Guard) -> str:
    """The source with the guard's condition replaced by ``False``; lines keep their numbers."""
    lines = source.encode().splitlines(keepends=True)
    (top, left), (bottom, right) = guard.first, guard.last
    head, tail = lines[top - 1][:left], lines[bottom - 1][right:]
    breaks = b"\n" * (bottom - top)
    if breaks:  # a condition over several lines stands in brackets, but perhaps its own
        lines[top - 1 : bottom] = [head + b"(False" + breaks + b")" + tail]
    else:
        lines[top - 1] = head + b"False" + tail
    changed = b"".join(lines).decode()
    ast.parse(changed)
    return changed


def stage(folder: Path) -> Path:
    """A copy of the package in its installed shape."""
    tree = folder / "tree"
    subprocess.run(["make", "-s", "stage", "VENV=none", f"TREE={tree}"], cwd=ROOT, check=True)
    return tree


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder / "tree"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path, "LZ_COMPILE_CACHE_DIR": str(folder / "cache")}


# -- which tests run which lines


def trace(arguments: argparse.Namespace) -> None:
    """Runs the tests in ``--jobs`` processes, each with its share of every file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    tree = stage(FOLDER)
    files = [name for name in arguments.tests_of or TRACED if (ROOT / name.partition("::")[0]).exists()]
    parts = [FOLDER / f"trace{i}.json" for i in range(arguments.jobs)]
    plugin = ["-p", "mutation", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu and (not slow or perturbed)"]
    env = environment(FOLDER) | {"LZ_MUTATION_TRACE": str(tree / "lz_compile" / "patterns")}
    env["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")

    def one(share: int) -> int:
        command = [sys.executable, "-m", "pytest", "-q", *plugin, *files]
        own = env | {"LZ_MUTATION_PART": str(parts[share]), "LZ_MUTATION_SHARE": f"{share}/{arguments.jobs}"}
        own["LZ_COMPILE_CACHE_DIR"] = str(parts[share].with_suffix(""))
        return subprocess.run(command, cwd=ROOT, env=own).returncode

    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes = list(pool.map(one, range(arguments.jobs)))
    traced: dict[str, Any] = {"seconds": {}, "lines": {}}
    if arguments.tests_of and TRACE.exists():
        old = json.loads(TRACE.read_text())
        renewed = tuple(files)
        traced["seconds"] = {test: cost for test, cost in old["seconds"].items() if not test.startswith(renewed)}
        for name, by_test in old["lines"].items():
            traced["lines"][name] = {test: ran for test, ran in by_test.items() if not test.startswith(renewed)}
    for part in filter(Path.exists, parts):
        found = json.loads(part.read_text())
        traced["seconds"] |= found["seconds"]
        for name, by_test in found["lines"].items():
            traced["lines"].setdefault(name, {}).update(by_test)
        part.unlink()
    TRACE.write_text(json.dumps(traced))
    sys.exit(max(codes, default=0))


if "LZ_MUTATION_TRACE" in os.environ:  # as a plugin of pytest
    import coverage
    import pytest

    _coverage = coverage.Coverage(data_file=None, include=[os.environ["LZ_MUTATION_TRACE"] + "/*"])
    _seconds: dict[str, float] = {}

    def pytest_configure() -> None:
        _coverage.start()

    def pytest_collection_modifyitems(items: list[Any]) -> None:
        share, shares = map(int, os.environ["LZ_MUTATION_SHARE"].split("/"))
        items[:] = items[share::shares]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(item: Any) -> Any:
        _coverage.switch_context(item.nodeid)
        begin = time.perf_counter()
        try:
            result = yield
            _seconds[item.nodeid] = time.perf_counter() - begin  # not of a test that fails or skips: it tells nothing
            return result
        finally:
            _coverage.switch_context("")

    def pytest_sessionfinish() -> None:
        _coverage.stop()
        data = _coverage.get_data()
        lines: dict[str, dict[str, list[int]]] = {}
        for path in data.measured_files():
            by_test: dict[str, list[int]] = defaultdict(list)
            for line, contexts in data.contexts_by_lineno(path).items():
                for context in contexts:
                    if context in _seconds:
                        by_test[context].append(line)
            lines[Path(path).name] = by_test
        Path(os.environ["LZ_MUTATION_PART"]).write_text(json.dumps({"seconds": _seconds, "lines": lines}))


# -- mutants


# Imported before the forks; conftest first, it says how Triton is to be imported.
_IMPORTED = [
    "conftest",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.fx.experimental.proxy_tensor",
    "transformers.models.llama.modeling_llama",
    "hypothesis.strategies",
    "pytest",
]
_QUICK = 0.5  # seconds, under coverage
_FORKS = multiprocessing.get_context("forkserver")


def every_guard() -> list[Guard]:
    return [guard for path in sorted((ROOT / "patterns").glob("*.py")) for guard in guards(path)]


def run(arguments: argparse.Namespace) -> None:
    traced = json.loads(TRACE.read_text())
    verdicts = {record["guard"]: record["verdict"] for record in results()}
    todo = [guard for guard in every_guard() if guard.name not in EQUIVALENT]
    todo = [g for g in todo if str(g) not in verdicts or (arguments.again and verdicts[str(g)] != "killed")]
    todo = [g for g in todo if not arguments.files or g.file in arguments.files]
    todo = todo[:: max(1, len(todo) // arguments.limit)] if arguments.limit else todo
    folders = [FOLDER / f"job{i}" for i in range(arguments.jobs)]
    for folder in folders:
        stage(folder)
    free = list(folders)
    os.environ |= environment(FOLDER)
    sys.path.insert(0, str(ROOT / "tests"))
    _FORKS.set_forkserver_preload(_IMPORTED)

    def one(guard: Guard) -> None:
        folder = free.pop()
        try:
            record = examine(guard, traced, folder, arguments.tests, arguments.seconds)
        finally:
            free.append(folder)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{record['verdict']:10} {guard}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, todo))
    show(arguments)


def examine(guard: Guard, traced: dict[str, Any], folder: Path, most: int, seconds: float) -> dict[str, Any]:
    by_test, cost = traced["lines"].get(guard.file, {}), traced["seconds"]
    reached = [test for test, lines in by_test.items() if guard.body in lines]
    # All quick tests, others up to a number: of one that is parametrised a few cases, the rest of them rarely see more.
    families: Counter[str] = Counter()
    chosen, slow = [], []
    for test in sorted(reached, key=lambda test: cost.get(test, 9.0)):
        family = test.partition("[")[0]
        families[family] += 1
        if cost.get(test, 9.0) < _QUICK:
            chosen.append(test)
        elif families[family] <= 12:
            slow.append(test)
    chosen += slow[:most]
    record = {"guard": str(guard), "tests": len(chosen), "reached": len(reached)}
    if not chosen:
        return record | {"verdict": "never true"}
    source = ROOT / "patterns" / guard.file
    target = folder / "tree" / "lz_compile" / "patterns" / guard.file
    target.write_text(without(source.read_text(), guard))
    mine, theirs = _FORKS.Pipe(duplex=False)
    child = _FORKS.Process(target=_run_tests, args=(folder, chosen, theirs), daemon=False)
    try:
        child.start()
        theirs.close()
        if not mine.poll(seconds):
            return record | {"verdict": "killed", "by": f"ran longer than {seconds:g} s"}
        try:
            code, by = mine.recv()
        except EOFError:
            code, by = -1, "the process died"
        return record | {"verdict": {0: "survived", 1: "killed"}.get(code, "broken"), "by": by}
    finally:
        child.kill()
        child.join()
        target.write_text(source.read_text())


def _run_tests(folder: Path, tests: list[str], answer: Any) -> None:
    """In a fork: runs tests until one fails; sends pytest's exit code and the test that failed."""
    import pytest

    class Failures:
        def __init__(self) -> None:
            self.first = ""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                self.first = self.first or report.nodeid

    os.environ |= environment(folder)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    sys.path[:0] = environment(folder)["PYTHONPATH"].split(os.pathsep)
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    failures = Failures()
    quiet = [
        "-q",
        "-x",
        "--no-header",
        "--tb=short",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--hypothesis-seed=0",
    ]
    code = pytest.main([*quiet, *tests], plugins=[failures])
    answer.send((int(code), failures.first))


def results() -> list[dict[str, Any]]:
    """What is known of the guards as they stand, the last verdict of each."""
    current = {str(guard) for guard in every_guard() if guard.name not in EQUIVALENT}
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    last = {record["guard"]: record for record in map(json.loads, lines)}
    return [record for name, record in last.items() if name in current]


def show(arguments: argparse.Namespace) -> None:
    records = results()
    verdicts = Counter(record["verdict"] for record in records)
    for record in records:
        if record["verdict"] != "killed":
            print(f"{record['verdict']:10} {record['guard']} ({record['tests']} of {record['reached']} tests)")
    share = verdicts["killed"] / max(len(records), 1)
    equivalent = sum(guard.name in EQUIVALENT for guard in every_guard())
    print(
        f"{len(records)} of {len(every_guard()) - equivalent} guards: {dict(verdicts)}; killed {share:.1%}; "
        f"{equivalent} more are equivalent"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    tracer = commands.add_parser("trace")
    tracer.add_argument(
        "tests_of", nargs="*", metavar="FILE", help="test files, or tests; default: those that know patterns"
    )
    tracer.add_argument("--jobs", type=int, default=2)
    tracer.set_defaults(function=trace)
    runner = commands.add_parser("run")
    runner.add_argument("--jobs", type=int, default=2)
    runner.add_argument("--files", nargs="*", default=[], help="only guards of these files of patterns/")
    runner.add_argument("--again", action="store_true", help="also those that were not killed the last time")
    runner.add_argument("--limit", type=int, default=0, metavar="N", help="about N guards, spread evenly")
    runner.add_argument("--tests", type=int, default=40, metavar="N", help="tests that a mutant has to survive")
    runner.add_argument("--seconds", type=float, default=240.0, help="after which a mutant counts as killed")
    runner.set_defaults(function=run)
    shower = commands.add_parser("show")
    shower.set_defaults(function=show)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
