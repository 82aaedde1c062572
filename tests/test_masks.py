"""Masks are proved exactly or not at all: forms evaluated on real inputs equal the masks that the graph builds."""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis.strategies as st
import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lz_compile.aliasing import Aliases
from lz_compile.mask import EMPTY_ROWS_OF_SOFTMAX, Bound, EmptyRows, Index, MaskForm, Read
from lz_compile.patterns.masks import MaskProver
from lz_compile.patterns.symbolic_numbers import round_to

Build = Callable[..., torch.Tensor]
LEAST = {d: torch.finfo(d).min for d in (torch.float32, torch.bfloat16, torch.float16)}
EMPTY_ROWS_OF_SDPA = EmptyRows(boolean="zero", infinite="zero", finite="mean", bias="safe mean")


# -- From a function that builds a mask to its form, and back ---------------------------------------------------------


def trace(build: Build, *inputs: torch.Tensor) -> fx.GraphModule:
    """The pre-dispatch graph of ``build`` on fake inputs of these shapes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(t) for t in inputs]
    with torch.no_grad(), mode:
        return make_fx(build, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)


def trace_dynamic(build: Build, *inputs: Any) -> fx.GraphModule:
    """The same with symbolic sizes; ints become SymInts."""
    with torch.no_grad():
        return make_fx(build, pre_dispatch=True, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)


def returned(module: fx.GraphModule) -> tuple[fx.Node, fx.Node]:
    """The mask and the node that reads it (the graph's output)."""
    output = next(iter(reversed(module.graph.nodes)))
    mask = output.args[0]
    return (mask[0] if isinstance(mask, (list, tuple)) else mask), output


def prove(
    module: fx.GraphModule, shape: tuple[Any, ...], kind: str = "keep", empty: EmptyRows = EMPTY_ROWS_OF_SDPA
) -> MaskForm:
    mask, at = returned(module)
    return ask(MaskProver(module.graph, Aliases(module.graph)), kind, mask, shape, at, empty)


def ask(
    prover: MaskProver, kind: str, mask: fx.Node, shape: tuple[Any, ...], at: fx.Node, empty: EmptyRows
) -> MaskForm:
    if kind == "add":
        return prover.add(mask, shape, at, empty)
    return (prover.keep if kind == "keep" else prover.hide)(mask, shape, at, empty.boolean)


def reads_of(form: MaskForm) -> list[Read]:
    bounds = [*form.upper, *form.lower, *form.start, *form.stop]
    if form.chunk:
        bounds += [form.chunk.offset, form.chunk.origin]
    found = [read for bound in bounds for _, read in bound.reads]
    return [
        *found,
        *form.key_padding,
        *form.key_hidden,
        *(side for d in form.documents for side in (d.queries, d.keys)),
    ]


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what each read of a form finds, at the time of its reader."""

    def __init__(self, module: fx.GraphModule, form: MaskForm) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.reads = reads_of(form)
        self.found: dict[Read, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        for read in self.reads:
            if read.reader is n:
                value = self.env[read.node]
                self.found[read] = value.clone() if isinstance(value, torch.Tensor) else value
        return super().run_node(n)


def visible(form: MaskForm, found: dict[Read, Any], shape: tuple[int, int, int, int]) -> torch.Tensor:
    """The boolean mask [B, H, M, N] that the terms of a form describe."""
    axes = dict(zip("bhqk", torch.meshgrid(*map(torch.arange, shape), indexing="ij")))
    b, q, k = axes["b"], axes["q"], axes["k"]

    def value(read: Read) -> Any:
        tensor = found[read]
        if not read.index:
            return tensor
        return tensor[tuple((axes[i.axis] if i.axis else torch.zeros_like(b)) + i.shift for i in read.index)]

    def at(bound: Bound) -> Any:
        return bound.const + sum((c * value(read) for c, read in bound.reads), torch.zeros_like(b))

    out = torch.ones(shape, dtype=torch.bool)
    for bound in form.upper:
        out &= k <= q + at(bound)
    for bound in form.lower:
        out &= k >= q + at(bound)
    for bound in form.start:
        out &= k >= at(bound)
    for bound in form.stop:
        out &= k < at(bound)
    if form.chunk:
        origin, offset = at(form.chunk.origin), at(form.chunk.offset)
        out &= (k - origin) // form.chunk.size == (q + offset - origin) // form.chunk.size
    for read in form.key_padding:
        out &= value(read)
    for read in form.key_hidden:
        out &= ~value(read)
    for document in form.documents:
        out &= value(document.queries) == value(document.keys)
    return out


def shown(mask: torch.Tensor, kind: str) -> torch.Tensor:
    """What a concrete mask shows."""
    if kind == "add":
        return mask > torch.finfo(mask.dtype).min
    return mask if kind == "keep" else ~mask


def check(
    module: fx.GraphModule, form: MaskForm, shape: tuple[int, int, int, int], inputs: tuple[Any, ...], kind: str
) -> None:
    """The form's terms equal the mask when it is proved, and hide nothing that the mask shows otherwise."""
    recorder = Recorder(module, form)
    result = recorder.run(*(i.clone() if isinstance(i, torch.Tensor) else i for i in inputs))
    expected = shown(result[0] if isinstance(result, (list, tuple)) else result, kind).expand(shape)
    actual = visible(form, recorder.found, shape)
    if form.proved:
        assert torch.equal(actual, expected), f"{form}\n{module.code}"
    else:
        assert not (expected & ~actual).any(), f"{form}\n{module.code}"


def prove_and_check(
    build: Build,
    shape: tuple[int, int, int, int],
    *inputs: torch.Tensor,
    kind: str = "keep",
    empty: EmptyRows = EMPTY_ROWS_OF_SDPA,
) -> MaskForm:
    module = trace(build, *inputs)
    form = prove(module, shape, kind, empty)
    check(module, form, shape, inputs, kind)
    return form


# -- Many spellings of every family ----------------------------------------------------------------------------------


class Case:
    """One combination of sizes, constants and spellings, chosen by a seed."""

    def __init__(self, seed: int, families: tuple[str, ...]) -> None:
        self.random = random.Random(seed)
        pick = self.random.choice
        self.batch, self.heads, self.queries = pick((1, 2, 3)), pick((1, 2)), pick((1, 2, 4, 7))
        self.keys = pick((2, 5, 8, 11))
        self.shape = (self.batch, self.heads, self.queries, self.keys)
        self.offset, self.window, self.chunk = pick((0, 1, 3, -1)), pick((1, 2, 4)), pick((2, 3, 4))
        self.position = pick(("int", "tensor", "row", "add_"))
        self.dtype = pick(tuple(LEAST))
        self.spelling = {family: pick(SPELLINGS[family]) for family in families}
        self.combine = [pick(COMBINATIONS) for _ in families]
        self.kind, self.finish = pick(FINISHES)

    def inputs(self, seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=g)

        b, m, n = self.batch, self.queries, self.keys
        padding = integers(0, 2, b, n)
        position = integers(0, n, b) if self.position == "row" else integers(0, n, 1)[0]
        short = integers(0, 2, b, max(1, n - 2)).bool()
        return (
            padding,
            padding.bool(),
            short,
            position,
            integers(0, n + 1, b),
            integers(0, 3, b, m),
            integers(0, 3, b, n),
        )

    def build(self, *tensors: torch.Tensor) -> torch.Tensor:
        t = Tensors(self, *tensors)
        mask: torch.Tensor | None = None
        for spell, combine in zip(self.spelling.values(), self.combine):
            term = spell(t)
            mask = term if mask is None else combine(mask, term)
        assert mask is not None
        return self.finish(mask, self.dtype)


class Tensors:
    """The graph inputs of a case and the indices made from them."""

    def __init__(
        self,
        case: Case,
        padding_int: torch.Tensor,
        padding: torch.Tensor,
        short: torch.Tensor,
        position: torch.Tensor,
        lengths: torch.Tensor,
        query_ids: torch.Tensor,
        key_ids: torch.Tensor,
    ) -> None:
        self.case, self.padding_int, self.padding, self.short = case, padding_int, padding, short
        self.lengths, self.query_ids, self.key_ids = lengths, query_ids, key_ids
        self.k = torch.arange(case.keys)[None, None, None, :]
        q = torch.arange(case.queries)
        if case.position == "int":
            self.q = (q + case.offset)[None, None, :, None]
        elif case.position == "tensor":
            self.q = (q + position)[None, None, :, None]
        elif case.position == "row":
            self.q = (q[None] + position[:, None])[:, None, :, None]
        else:  # as in a static cache: the position is read, then moved on in place
            self.q = (q + position)[None, None, :, None]
            position.add_(case.queries)
        self.b = torch.arange(case.batch)[:, None, None, None]


def spelled_tril(t: Tensors) -> torch.Tensor:
    return torch.ones(t.case.queries, t.case.keys, dtype=torch.bool).tril(t.case.offset)[None, None]


def spelled_triu(t: Tensors) -> torch.Tensor:
    return ~torch.ones(t.case.queries, t.case.keys).triu(t.case.offset + 1).bool()


def spelled_bart(t: Tensors) -> torch.Tensor:
    mask = torch.full((t.case.queries, t.case.keys), -math.inf)
    condition = torch.arange(t.case.keys)
    mask.masked_fill_(condition < (torch.arange(t.case.queries) + 1).view(t.case.queries, 1), 0)
    return mask == 0


def spelled_segments(t: Tensors) -> torch.Tensor:
    return t.query_ids[t.b, torch.arange(t.case.queries)[:, None]] == t.key_ids[t.b, t.k]


Spelling = Callable[[Tensors], torch.Tensor]
SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "causal": (
        lambda t: t.k <= t.q,
        lambda t: t.q >= t.k,
        lambda t: ~(t.k > t.q),
        lambda t: (t.q - t.k) >= 0,
        lambda t: torch.logical_not(t.q < t.k),
        lambda t: t.k < t.q + 1,
        lambda t: torch.le(t.k.float(), t.q) if t.case.position == "int" else t.k.le(t.q),
        lambda t: t.q.expand(-1, -1, -1, t.case.keys).ge(t.k.expand(1, 1, t.case.queries, t.case.keys)),
        lambda t: torch.maximum(t.k, t.q) == t.q,
        lambda t: (t.k - t.q).clamp(min=0) == 0,
        lambda t: 2 * t.k <= 2 * t.q + 1,
        spelled_tril,
        spelled_triu,
        spelled_bart,
    ),
    "window": (
        lambda t: t.k > t.q - t.case.window,
        lambda t: (t.q - t.k) < t.case.window,
        lambda t: (t.q - t.k).abs() <= t.case.window,
        lambda t: torch.abs(t.k - t.q) < t.case.window + 1,
        lambda t: ~((t.q - t.k) >= t.case.window),
        lambda t: torch.ones(t.case.queries, t.case.keys).triu(-t.case.window).bool(),
        lambda t: (t.k >= t.q - t.case.window) & (t.k <= t.q + t.case.window),
    ),
    "length": (
        lambda t: t.k < t.lengths[:, None, None, None],
        lambda t: (t.lengths.view(-1, 1) > torch.arange(t.case.keys))[:, None, None],
        lambda t: t.k >= t.lengths.reshape(t.case.batch, 1, 1, 1) - 2,
        lambda t: t.k < t.case.window + 1,
        lambda t: ~(t.k == 0),
        lambda t: t.k + t.lengths.clamp(max=3)[:, None, None, None] >= 4,
    ),
    "padding": (
        lambda t: t.padding[:, None, None, :],
        lambda t: t.padding_int[:, None, None, :].to(torch.bool),
        lambda t: t.padding_int[:, None, None, :] != 0,
        lambda t: t.padding_int[:, None, None].eq(1),
        lambda t: ~(t.padding_int == 0)[:, None, None, :].expand(-1, -1, t.case.queries, -1),
        lambda t: t.padding[t.b, t.k],
        lambda t: F.pad(t.short, (0, t.case.keys - t.short.shape[1]))[t.b, t.k],
        lambda t: torch.cat([t.short, t.padding[:, t.short.shape[1] :]], -1).unsqueeze(1).unsqueeze(2),
        lambda t: t.padding.view(t.case.batch, 1, 1, t.case.keys).repeat(1, 1, t.case.queries, 1),
        lambda t: (1.0 - t.padding[:, None, None, :].to(torch.float32)) == 0.0,
        lambda t: (t.padding_int > 0).unsqueeze(-1).transpose(-1, -2)[:, None],
        lambda t: t.padding[:, None, None, :] | (t.padding_int == 7)[:, None, None, :],
    ),
    "documents": (
        lambda t: t.query_ids[:, None, :, None] == t.key_ids[:, None, None, :],
        lambda t: (t.query_ids.unsqueeze(-1) - t.key_ids.unsqueeze(-2)).unsqueeze(1) == 0,
        lambda t: ~(t.key_ids[:, None, None, :] != t.query_ids[:, None, :, None]),
        spelled_segments,
    ),
    "chunk": (
        lambda t: t.k // t.case.chunk == t.q // t.case.chunk,
        lambda t: t.q.div(t.case.chunk, rounding_mode="floor") == t.k.div(t.case.chunk, rounding_mode="floor"),
        lambda t: (t.k - t.lengths[t.b]) // t.case.chunk == (t.q - t.lengths[t.b]) // t.case.chunk,
        lambda t: (t.k - t.k % t.case.chunk) == (t.q - t.q % t.case.chunk),
    ),
}  # fmt: skip

COMBINATIONS: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (
    lambda a, b: a & b,
    torch.logical_and,
    lambda a, b: a * b,
    lambda a, b: ~(~a | ~b),
    lambda a, b: torch.where(a, b, False),
    lambda a, b: b.masked_fill(~a, False) if a.dim() <= b.dim() else a & b,
    lambda a, b: a.__and__(b),
)


def finish_bart(m: torch.Tensor, d: torch.dtype) -> torch.Tensor:
    inverted = 1.0 - m.to(d)
    return inverted.masked_fill(inverted.to(torch.bool), LEAST[d])


FINISHES: tuple[tuple[str, Callable[[torch.Tensor, torch.dtype], torch.Tensor]], ...] = (
    ("keep", lambda m, d: m),
    ("keep", lambda m, d: m.clone().contiguous()),
    ("keep", lambda m, d: m.to(d) > 0.5),
    ("hide", lambda m, d: ~m),
    ("hide", lambda m, d: m == 0),
    ("hide", lambda m, d: m.logical_not()),
    ("add", lambda m, d: torch.where(m, torch.zeros((), dtype=d), LEAST[d])),
    ("add", lambda m, d: torch.where(~m, -math.inf, 0.0).to(d)),
    ("add", lambda m, d: (1.0 - m.to(d)) * LEAST[d]),
    ("add", lambda m, d: torch.zeros(m.shape, dtype=d).masked_fill(~m, LEAST[d])),
    ("add", lambda m, d: torch.full(m.shape, LEAST[d], dtype=d).masked_fill(m, 0)),
    ("add", lambda m, d: m.new_zeros(m.shape, dtype=d).masked_fill_(m.logical_not(), float("-inf"))),
    ("add", finish_bart),
)

ALL_FAMILIES = tuple(SPELLINGS)
# How many concrete masks each random test of this process compared.
COMPARED: Counter[str] = Counter()


@functools.cache
def proved_case(seed: int, families: tuple[str, ...]) -> tuple[Case, fx.GraphModule, MaskForm]:
    case = Case(seed, families)
    module = trace(case.build, *case.inputs(0))
    return case, module, prove(module, case.shape, case.kind, EMPTY_ROWS_OF_SOFTMAX)


def run_case(seed: int, families: tuple[str, ...], data: int) -> None:
    case, module, form = proved_case(seed, families)
    inputs = [case.inputs(data + i) for i in range(8)]
    assert form.proved or form.unproved == "no key is visible", f"{families}: {form.unproved}\n{form}\n{module.code}"
    for values in inputs:
        check(module, form, case.shape, values, case.kind)
        COMPARED[families[0] if len(families) == 1 else "conjunctions"] += 1


HYPOTHESIS = settings(
    max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@HYPOTHESIS
@given(seed=st.integers(0, 10**6), data=st.integers(0, 10**6))
def test_every_spelling_of_a_family_is_proved_and_exact(family: str, seed: int, data: int) -> None:
    run_case(seed, (family,), data)


@given(
    seed=st.integers(0, 10**6),
    families=st.lists(st.sampled_from(ALL_FAMILIES), min_size=2, max_size=4, unique=True),
    data=st.integers(0, 10**6),
)
@settings(parent=HYPOTHESIS, max_examples=80)
def test_conjunctions_of_families_are_proved_and_exact(seed: int, families: list[str], data: int) -> None:
    run_case(seed, tuple(families), data)


def random_integer(r: random.Random, t: Tensors, depth: int) -> torch.Tensor:
    """Any integer expression over indices and inputs; most are in no normal form."""
    if depth == 0:
        key_ids, query_ids = t.key_ids[:, None, None, :], t.query_ids[:, None, :, None]
        lengths = t.lengths[:, None, None, None]
        return r.choice([t.q, t.k, t.q, t.k, lengths, key_ids, query_ids, torch.arange(t.case.keys).flip(0)])
    x, y = (random_integer(r, t, r.randrange(depth)) for _ in range(2))
    c, condition = r.choice([-3, -1, 0, 1, 2, 4]), random_boolean(r, t, depth - 1)
    return r.choice(
        [
            lambda: x + y, lambda: x - y, lambda: x - y, lambda: x * c, lambda: x + c, lambda: -x,
            lambda: (x - y).abs(), lambda: x // (abs(c) + 1), lambda: x % (abs(c) + 1),
            lambda: torch.maximum(x, y), lambda: torch.minimum(x, y), lambda: x.clamp(c, c + 3),
            lambda: torch.where(condition, x, y),
            lambda: x.masked_fill(condition, c) if condition.dim() == 0 else torch.where(condition, x, c),
            lambda: condition.to(torch.int64) + x, lambda: torch.rsub(x, c), lambda: x.to(torch.int32).to(torch.int64),
            lambda: condition.int().cumsum(-1), lambda: x.diff(dim=-1, prepend=x[..., :1] - 1),
            lambda: x.to(r.choice([torch.float32, torch.bfloat16])).to(torch.int64), lambda: x.to(torch.int8).long(),
        ]
    )()  # fmt: skip


def random_boolean(r: random.Random, t: Tensors, depth: int) -> torch.Tensor:
    """Any boolean expression over indices and inputs, and over memory that is written."""
    if depth <= 0:
        return r.choice([t.padding[:, None, None], t.k <= t.q, t.k > t.q - 2, t.query_ids[:, None, :, None] > 0])
    if r.random() < 0.45:
        x, y = (random_integer(r, t, depth - 1) for _ in range(2))
        c = r.choice([-2, 0, 0, 1, 3, 0.5])
        compare = r.choice([torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne])
        return compare(x, r.choice([y, c])) if r.random() < 0.8 else compare(x.float(), y)
    x, y = (random_boolean(r, t, depth - 1) for _ in range(2))

    def written() -> torch.Tensor:
        made = x & y
        made[..., 0] = r.choice([True, False])
        return made

    def filled() -> torch.Tensor:
        made = torch.zeros(t.case.shape, dtype=torch.bool)
        made |= x
        kept = made.clone() if r.random() < 0.5 else made.view(t.case.shape)
        made.logical_not_()
        return kept

    return r.choice(
        [
            lambda: x & y, lambda: x & y, lambda: x | y, lambda: ~x, lambda: x ^ y, lambda: x == y, lambda: written(),
            lambda: torch.where(x, y, ~y), lambda: (x.float() - y.float()) != 0, lambda: filled(),
            lambda: x.to(torch.int8) > 0,
            lambda: torch.cat([x[..., 1:], x[..., :1]], -1), lambda: F.pad(x, (1, 0))[..., : x.shape[-1]],
            lambda: (x & y).expand(t.case.shape).tril(1), lambda: (x | y).expand(t.case.shape).triu(-1),
            lambda: (x & y).expand(t.case.shape).reshape(-1, t.case.keys).view(t.case.shape),
            lambda: (x & y).expand(t.case.shape).transpose(-1, -2).contiguous().transpose(2, 3),
            lambda: (x & y).expand(t.case.shape)[..., torch.arange(t.case.keys) // 2],
        ]
    )()  # fmt: skip


class RandomCase(Case):
    """A random program instead of a conjunction of known families."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, ())
        self.seed, self.depth = seed, self.random.choice((1, 2, 3))

    def build(self, *tensors: torch.Tensor) -> torch.Tensor:
        mask = random_boolean(random.Random(self.seed), Tensors(self, *tensors), self.depth)
        return self.finish(mask.expand(self.shape).clone(), self.dtype)


@given(seed=st.integers(0, 10**9))
@settings(parent=HYPOTHESIS, max_examples=100)
def test_whatever_is_proved_of_a_random_program_is_true(seed: int) -> None:
    case = RandomCase(seed)
    module = trace(case.build, *case.inputs(0))
    form = prove(module, case.shape, case.kind, EMPTY_ROWS_OF_SOFTMAX)
    for data in range(4):
        check(module, form, case.shape, case.inputs(data), case.kind)
        COMPARED["programs"] += 1


def test_the_random_tests_compared_hundreds_of_masks_each() -> None:
    assert all(compared >= 300 for compared in COMPARED.values()), COMPARED


# -- Sizes known only at run time -------------------------------------------------------------------------------------


DYNAMIC: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "causal": (lambda x, y, n: torch.arange(x.shape[1])[:, None] >= torch.arange(y.shape[1]), "causal"),
    "tril": (lambda x, y, n: torch.ones(x.shape[1], y.shape[1], dtype=torch.bool).tril(), "causal"),
    "bottom right": (
        lambda x, y, n: torch.arange(y.shape[1]) <= torch.arange(x.shape[1])[:, None] + (y.shape[1] - x.shape[1]),
        "causal(offset=",
    ),
    "bottom right tril": (
        lambda x, y, n: torch.ones(x.shape[1], y.shape[1], dtype=torch.bool).tril(y.shape[1] - x.shape[1]),
        "causal(offset=",
    ),
    "scalar": (
        lambda x, y, n: torch.arange(y.shape[1]) <= torch.arange(x.shape[1])[:, None] + (n + 2),
        "causal(offset=",
    ),
    "length": (lambda x, y, n: (torch.arange(y.shape[1]) < n).expand(x.shape[1], -1), "keys below"),
    "padding": (lambda x, y, n: y.bool()[:, None, None, :].expand(-1, -1, x.shape[1], -1), "key padding"),
    "negative slice": (lambda x, y, n: y.bool()[:, None, None, -y.shape[1] :], "key padding"),
    "everything": (lambda x, y, n: torch.arange(x.shape[1])[:, None] - torch.arange(y.shape[1]) < x.shape[1], "none"),
}  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_symbolic_sizes_are_proved_and_exact_at_every_size(name: str) -> None:
    build, text = DYNAMIC[name]
    first = (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64), 4)
    module = trace_dynamic(build, *first)
    x, y, _ = (node.meta["val"] for node in module.graph.nodes if node.op == "placeholder")
    form = prove(module, (x.shape[0], 2, x.shape[1], y.shape[1]))
    assert form.proved and text in str(form), f"{form}: {form.unproved}\n{module.code}"
    for m, n, scalar in itertools.product((2, 4, 7), (3, 8), (2, 5)):
        if "bottom" in name and n < m:
            continue
        inputs = (torch.randint(0, 2, (3, m)), torch.randint(0, 2, (3, n)), scalar)
        check(module, form, (3, 2, m, n), inputs, "keep")


# -- Near misses: declined, or exact in their own right ---------------------------------------------------------------


SQUARE = (2, 2, 6, 6)
INDEX = torch.arange(6)


def bool_input(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) < 0.5


def test_causal_is_recognised_as_such() -> None:
    form = prove_and_check(lambda: torch.ones(6, 6, dtype=torch.bool).tril(), SQUARE)
    assert form.is_causal


def test_a_mask_that_shows_everything_is_trivial() -> None:
    assert prove_and_check(lambda: torch.ones(6, 6).bool(), SQUARE).is_trivial
    assert prove_and_check(lambda: torch.zeros(2, 1, 1, 6), SQUARE, kind="add").is_trivial


def test_the_transposed_comparison_is_a_lower_bound() -> None:
    form = prove_and_check(lambda: torch.arange(6) >= torch.arange(6)[:, None], SQUARE)
    assert form == MaskForm(lower=(Bound(0),))


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_an_off_by_one_diagonal_has_its_own_bound(shift: int) -> None:
    form = prove_and_check(lambda: torch.arange(6) <= torch.arange(6)[:, None] + shift, SQUARE)
    assert form == MaskForm(upper=(Bound(shift),))


@pytest.mark.parametrize("fill", [-1e4, -1e9, -3e38, 1.0, math.nan])
def test_a_fill_value_that_hides_nothing_for_sure_stays_a_bias(fill: float) -> None:
    module = trace(lambda: torch.where(torch.ones(6, 6).tril().bool(), 0.0, fill))
    form = prove(module, SQUARE, "add")
    assert form.bias is not None and not form.upper


def test_a_learned_bias_under_a_causal_mask_keeps_the_bound_beside_it() -> None:
    def build(bias: torch.Tensor) -> torch.Tensor:
        return bias.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)

    module = trace(build, torch.randn(2, 6, 6))
    form = prove(module, SQUARE, "add")
    assert form.bias is not None and form.upper == (Bound(0),)


def test_two_finite_fills_that_may_meet_stay_a_bias_and_two_infinite_ones_do_not() -> None:
    def build(padding: torch.Tensor, fill: float) -> torch.Tensor:
        causal = torch.where(torch.ones(6, 6).tril().bool(), 0.0, fill)
        return causal + torch.where(padding[:, None, None, :], 0.0, fill)

    finite = prove(trace(lambda p: build(p, LEAST[torch.float32]), bool_input(2, 6)), SQUARE, "add")
    assert finite.bias is not None
    infinite = prove_and_check(
        lambda p: build(p, -math.inf), SQUARE, bool_input(2, 6), kind="add", empty=EMPTY_ROWS_OF_SOFTMAX
    )
    assert infinite.proved and infinite.empty_row == "nan" and infinite.upper and infinite.key_padding


@pytest.mark.parametrize("dtype", LEAST)
def test_what_an_empty_row_gives_follows_the_fill_value(dtype: torch.dtype) -> None:
    def form(fill: float) -> MaskForm:
        def build(padding: torch.Tensor) -> torch.Tensor:
            return torch.where(padding[:, None, None], torch.zeros((), dtype=dtype), fill)

        return prove_and_check(build, SQUARE, bool_input(2, 6), kind="add", empty=EMPTY_ROWS_OF_SOFTMAX)

    assert [form(fill).empty_row for fill in (LEAST[dtype], -math.inf)] == ["mean", "nan"]


def test_each_kind_of_mask_has_its_own_answer_for_an_empty_row() -> None:
    rows = EmptyRows(boolean="unmasked", infinite="zero", finite="mean", bias="safe mean")

    def empty_row(kind: str, build: Build) -> str:
        return prove_and_check(build, SQUARE, bool_input(2, 1, 1, 6), kind=kind, empty=rows).empty_row

    assert empty_row("keep", lambda m: m) == empty_row("hide", lambda m: m) == "unmasked"
    assert empty_row("keep", lambda m: m.expand(2, 1, 6, 6).cumsum(2) > 1) == "unmasked"  # not proved
    assert empty_row("add", lambda m: torch.where(m, 0.0, -math.inf)) == "zero"
    assert empty_row("add", lambda m: torch.where(m, 0.0, LEAST[torch.float32])) == "mean"
    assert empty_row("add", lambda m: torch.where(m, 1.0, LEAST[torch.float32])) == "safe mean"


def test_the_least_number_of_another_dtype_is_no_mask() -> None:
    module = trace(lambda: torch.where(torch.ones(6, 6).tril().bool(), 0.0, LEAST[torch.float16]))
    assert prove(module, SQUARE, "add").bias is not None


def test_a_runtime_or_is_dense() -> None:
    def build(image: torch.Tensor) -> torch.Tensor:
        return (torch.arange(6) <= torch.arange(6)[:, None]) | (image[:, None, :, None] & image[:, None, None, :])

    form = prove_and_check(build, SQUARE, bool_input(2, 6))
    assert form.dense is not None and "or" in form.unproved and not form.upper


def test_a_mask_read_per_query_is_dense_and_its_proved_terms_stand() -> None:
    form = prove_and_check(lambda m: m & torch.ones(6, 6).tril().bool(), SQUARE, bool_input(2, 1, 6, 6))
    assert form.dense is not None and form.upper == (Bound(0),)


def test_a_hidden_mask_that_is_not_proved_says_which_way_it_reads() -> None:
    form = prove_and_check(lambda m: ~m, SQUARE, bool_input(2, 1, 6, 6), kind="hide")
    assert form.dense is not None and form.dense_hides


def test_a_per_head_mask_is_dense() -> None:
    form = prove_and_check(lambda m: m[:, :, None, :], SQUARE, bool_input(2, 2, 6))
    assert form.dense is not None


def test_a_query_padding_is_dense() -> None:
    form = prove_and_check(lambda m: m[:, None, :, None].expand(-1, -1, -1, 6), SQUARE, bool_input(2, 6))
    assert form.dense is not None


def test_a_decode_mask_from_outside_the_graph_is_key_padding() -> None:
    form = prove_and_check(lambda m: m[:, :, :, :9], (2, 4, 1, 9), bool_input(2, 1, 1, 16))
    assert form.proved and form.key_padding[0].index == (Index("b"), Index(None), Index(None), Index("k"))


def test_only_booleans_are_kept_or_hidden() -> None:
    form = prove(trace(lambda m: m.to(torch.int8), bool_input(2, 1, 1, 6)), SQUARE)
    assert form.dense is not None and "int8" in form.unproved


def test_int8_positions_may_wrap() -> None:
    def build() -> torch.Tensor:
        k = torch.arange(300).to(torch.int8)
        return k <= torch.arange(300, dtype=torch.int16)[:, None]

    form = prove_and_check(build, (1, 1, 300, 300))
    assert not form.proved


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_positions_are_exact_in_a_narrow_float_only_so_far(dtype: torch.dtype, limit: int) -> None:
    def build(size: int) -> Build:
        return lambda: torch.arange(size).to(dtype) <= torch.arange(4)[:, None].to(dtype) + 1

    assert prove_and_check(build(limit), (1, 1, 4, limit)).proved
    assert not prove_and_check(build(limit + 8), (1, 1, 4, limit + 8)).proved


def test_integers_of_unknown_size_are_not_exact_in_float() -> None:
    def build(position: torch.Tensor) -> torch.Tensor:
        return torch.arange(6).float() <= (torch.arange(6)[:, None] + position).float()

    assert not prove_and_check(build, SQUARE, torch.tensor(2)).proved


def test_a_comparison_of_floats_is_not_one_of_integers() -> None:
    def build(position: torch.Tensor) -> torch.Tensor:
        return torch.arange(6) <= torch.arange(6)[:, None] + position

    assert not prove_and_check(build, SQUARE, torch.tensor(1.5)).proved


def test_a_legacy_extended_mask_of_integers_may_hold_anything() -> None:
    def build(m: torch.Tensor) -> torch.Tensor:
        return (1.0 - m[:, None, None, :].to(torch.float32)) * LEAST[torch.float32]

    assert prove(trace(build, torch.ones(2, 6, dtype=torch.int64)), SQUARE, "add").bias is not None
    form = prove_and_check(build, SQUARE, bool_input(2, 6), kind="add")
    assert form.proved and form.empty_row == "mean"


@pytest.mark.parametrize("sign", [1, -1])
def test_packed_positions_stand_for_indices_only_while_they_count_up(sign: int) -> None:
    def build(x: torch.Tensor) -> torch.Tensor:
        positions = sign * x
        ids = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        return (ids[:, None, :, None] == ids[:, None, None, :]) & (x[:, None, None, :] <= x[:, None, :, None])

    positions = sign * torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    form = prove_and_check(build, SQUARE, positions)
    assert form.documents and bool(form.upper) == (sign == 1)


def test_two_chunkings_are_dense() -> None:
    def build() -> torch.Tensor:
        q, k = torch.arange(6)[:, None], torch.arange(6)
        return (q // 2 == k // 2) & (q // 3 == k // 3)

    form = prove_and_check(build, SQUARE)
    assert form.dense is not None and form.chunk is not None


def test_an_index_that_may_be_negative_is_not_followed() -> None:
    def build(padding: torch.Tensor) -> torch.Tensor:
        return padding[:, torch.arange(6) - 1][:, None, None, :]

    form = prove_and_check(build, SQUARE, bool_input(2, 6))
    assert form.proved and form.key_padding[0].node.target == torch.ops.aten.index.Tensor


# -- Memory that is written -------------------------------------------------------------------------------------------


def test_a_mask_written_after_it_was_built_is_not_proved_from_its_old_definition() -> None:
    def build() -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        mask[:, 0] = False
        return mask

    form = prove_and_check(build, SQUARE)
    assert form.dense is not None and not form.upper


def test_a_write_through_a_view_counts() -> None:
    def build(x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
        view = mask.expand(2, 1, 6, 6)
        mask[:, 0, 0].copy_(x)
        return view

    form = prove_and_check(build, SQUARE, bool_input(2, 6))
    assert form.proved and form.key_padding and form.key_padding[0].version == 1


def test_a_write_of_the_whole_mask_is_followed() -> None:
    def build(m: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool)
        mask.tril_()
        mask &= torch.arange(6) > 0
        return mask & m[:, None, None]

    form = prove_and_check(build, SQUARE, bool_input(2, 6))
    assert form.proved and form.upper == (Bound(0),) and form.start == (Bound(1),)


def test_a_position_that_moves_on_is_read_before_it_moves() -> None:
    def build(position: torch.Tensor) -> torch.Tensor:
        alias = position.to(torch.int64)
        q = torch.arange(6)[:, None] + alias
        alias.add_(6)
        return torch.arange(6) <= q

    module = trace(build, torch.tensor(2))
    form = prove(module, SQUARE)
    ((_, read),) = form.upper[0].reads
    assert read.version == 0 and read.reader is not None and read.reader.name == "add"
    check(module, form, SQUARE, (torch.tensor(2),), "keep")


def test_a_position_read_after_its_write_has_the_new_version() -> None:
    def build(position: torch.Tensor) -> torch.Tensor:
        position.add_(1)
        return torch.arange(6) <= torch.arange(6)[:, None] + position

    form = prove_and_check(build, SQUARE, torch.tensor(2))
    assert form.upper[0].reads[0][1].version == 1


def test_a_copy_keeps_what_it_read() -> None:
    def build(m: torch.Tensor) -> torch.Tensor:
        kept = m.clone()
        m.fill_(False)
        return kept[:, None, None, :]

    form = prove_and_check(build, SQUARE, bool_input(2, 6))
    assert form.proved and form.key_padding[0].version == 0


def test_a_mask_is_proved_once_for_all_layers_until_it_is_written() -> None:
    def build(m: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = x.masked_fill(m, 0.0)
        second = x.masked_fill(m, 1.0)
        m.logical_not_()
        return first, second, x.masked_fill(m, 2.0)

    module = trace(build, bool_input(2, 1, 1, 6), torch.randn(SQUARE))
    prover = MaskProver(module.graph, Aliases(module.graph))
    sites = [n for n in module.graph.nodes if n.target == torch.ops.aten.masked_fill.Scalar]
    forms = [prover.hide(n.args[1], SQUARE, n, "zero") for n in sites]
    assert forms[0] is forms[1]
    assert [form.key_hidden[0].version for form in forms] == [0, 0, 1]


def test_the_order_of_proofs_does_not_move_a_read_behind_its_site() -> None:
    def build(m: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = x.masked_fill(m == 0, 0.0)
        return first, x.masked_fill(m == 0, 1.0)

    module = trace(build, torch.ones(2, 1, 1, 6, dtype=torch.int64), torch.randn(SQUARE))
    aliases = Aliases(module.graph)
    prover = MaskProver(module.graph, aliases)
    sites = [n for n in module.graph.nodes if n.target == torch.ops.aten.masked_fill.Scalar]
    for site in reversed(sites):
        form = prover.hide(site.args[1], SQUARE, site, "zero")
        assert all(aliases.position(read.node) < aliases.position(site) for read in reads_of(form))


# -- Transformers ------------------------------------------------------------------------------------------------------


def hf_mask(
    function: str, *arguments: Any, attention_mask: bool = False, q: int = 7, kv: int = 12, offset: int = 0, **kw: Any
) -> tuple[Build, tuple[int, int, int, int], tuple[torch.Tensor, ...]]:
    masking = pytest.importorskip("transformers.masking_utils")
    made = getattr(masking, function)
    made = made(*arguments) if arguments else made

    def build(padding: torch.Tensor, q_offset: torch.Tensor) -> torch.Tensor:
        return masking.sdpa_mask(
            2, q, kv, q_offset=q_offset if offset < 0 else offset, mask_function=made,
            attention_mask=padding if attention_mask else None, allow_is_causal_skip=False, **kw,
        )  # fmt: skip

    return build, (2, 4, q, kv), (bool_input(2, kv - 2), torch.tensor(3))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("offset", [0, 4, -1])
@pytest.mark.parametrize(
    "function, arguments, field",
    [
        ("causal_mask_function", (), "upper"),
        ("sliding_window_causal_mask_function", (3,), "lower"),
        ("sliding_window_bidirectional_mask_function", (3,), "lower"),
        ("chunked_causal_mask_function", (4, torch.zeros(2, dtype=torch.int64)), "chunk"),
        ("bidirectional_mask_function", (), ""),
    ],
)
def test_the_mask_functions_of_transformers_are_proved(
    function: str, arguments: tuple[Any, ...], field: str, offset: int, padded: bool
) -> None:
    build, shape, inputs = hf_mask(function, *arguments, offset=offset, attention_mask=padded)
    if field == "chunk":  # the constant becomes an input
        chunked, start = function, torch.tensor([0, 2])
        inputs = (*inputs, start)

        def build(padding: torch.Tensor, position: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            inner, _, _ = hf_mask(chunked, 4, start, offset=offset, attention_mask=padded)
            return inner(padding, position)

    form = prove_and_check(build, shape, *inputs)
    if "bidirectional" in function and offset < 0:
        # These masks say ``q_idx >= 0``, which a runtime position could break.
        assert form.dense is not None and "q + q_offset" in form.unproved
        return
    assert form.proved and (not field or getattr(form, field)), f"{form}: {form.unproved}"
    assert bool(form.key_padding) == padded


def captured_graphs(model: Any, **inputs: Any) -> list[fx.GraphModule]:
    """What a backend of torch.compile sees, as the pre-dispatch graph."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        fakes = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        mode = next(v.fake_mode for v in fakes if hasattr(v, "fake_mode"))
        interpret = fx.Interpreter(gm).run
        with torch.no_grad(), mode:
            graphs.append(make_fx(interpret, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    return graphs


def forms_of(module: fx.GraphModule) -> list[MaskForm]:
    prover = MaskProver(module.graph, Aliases(module.graph))
    forms = []
    for node in module.graph.nodes:
        if node.target == torch.ops.aten.scaled_dot_product_attention.default and len(node.args) > 3 and node.args[3]:
            query, key = (a.meta["val"].shape for a in node.args[:2])
            mask = node.args[3]
            kind = "keep" if mask.meta["val"].dtype == torch.bool else "add"
            forms.append(ask(prover, kind, mask, (*query[:3], key[2]), node, EMPTY_ROWS_OF_SDPA))
    return forms


SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.slow_but("padded", "sliding", "static decode")
@pytest.mark.parametrize("case", ["plain", "padded", "packed", "static prefill", "static decode", "sliding"])
def test_masks_inside_compiled_transformers_models_are_proved(case: str) -> None:
    transformers = pytest.importorskip("transformers")
    sliding = {"sliding_window": 3} if case == "sliding" else {}
    family = transformers.MistralForCausalLM if sliding else transformers.LlamaForCausalLM
    model = family(family.config_class(**SMALL, **sliding)).eval()
    ids = torch.randint(0, 50, (2, 8))
    padding = {"attention_mask": torch.tensor([[0] * 3 + [1] * 5, [1] * 8])}
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if case in ("padded", "sliding"):
        inputs |= padding
    if case == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(3), torch.arange(5)])[None].expand(2, -1)
    if "static" in case:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        inputs = {"input_ids": ids, "past_key_values": cache, **padding}
        if case == "static decode":
            with torch.no_grad():
                model(**inputs)
            inputs = {"input_ids": ids[:, :1], "past_key_values": cache}
    expected = {
        "plain": "causal",
        "padded": "causal & key padding",
        "packed": "causal & documents",
        "static prefill": "causal & key padding",
        "static decode": "causal(offset=",
        "sliding": "causal & window(k >= q + -2) & key padding",
    }[case]
    (module,) = captured_graphs(model, **inputs)
    forms = forms_of(module)
    assert len(forms) == 2 and forms[0] is forms[1]
    assert forms[0].proved and str(forms[0]).startswith(expected), f"{forms[0]}: {forms[0].unproved}"


# -- Cost and details -------------------------------------------------------------------------------------------------


def test_a_proof_takes_a_few_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    worst = 0.0
    for seed in range(30):
        case = Case(seed, ("causal", "window", "padding", "documents"))
        module = trace(case.build, *case.inputs(0))
        aliases = Aliases(module.graph)
        mask, at = returned(module)
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            ask(MaskProver(module.graph, aliases), case.kind, mask, case.shape, at, EMPTY_ROWS_OF_SOFTMAX)
            best = min(best, time.process_time() - start)
        worst = max(worst, best)
    with capsys.disabled():
        print(f" [slowest mask of 30: {worst * 1e3:.2f} ms]", end="")
    assert worst < 0.05


def test_a_very_deep_graph_is_declined_without_an_error() -> None:
    def build(x: torch.Tensor) -> torch.Tensor:
        position = torch.arange(6)
        for _ in range(600):
            position = position + 1
        return (position[:, None] - 600 >= torch.arange(6)) & x

    form = prove(trace(build, bool_input(6)), SQUARE)
    assert form.dense is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constants_round_as_in_torch(dtype: torch.dtype) -> None:
    for value in (0.1, -1e4, -1e9, 65519.0, 65520.0, 3.4e38, 3.3961e38, 1 / 3, -2.5e-8, 257.0, 2049.0):
        assert round_to(dtype, value) == torch.tensor(value, dtype=dtype).item()


def test_a_symbolic_scalar_is_read_from_the_input_that_holds_it() -> None:
    module = trace_dynamic(lambda x, n: torch.arange(8) < n + 1, torch.zeros(3), 5)
    ((_, read),) = prove(module, (1, 1, 4, 8)).stop[0].reads
    assert read.node.op == "placeholder" and read.index == ()


def sliding_step(guard: Callable[[int], bool]) -> Callable[..., torch.Tensor]:
    """The mask of one query over a window of 8 behind ``n`` tokens, as transformers makes it for a sliding cache."""

    def build(x: torch.Tensor, n: int) -> torch.Tensor:
        assert guard(n)
        keys = torch.arange(8) + torch.sym_max(n - 7, 0)
        query = n + torch.arange(1)[:, None]
        return (keys > query - 8) & (keys <= query)

    return build


@pytest.mark.parametrize(
    ("guard", "first", "others", "text"),
    [
        (lambda n: n >= 8, 11, (8, 9, 50), "none"),
        (lambda n: n + 1 <= 8, 4, (3, 5, 7), "causal(offset="),
        (lambda n: True, 11, (3, 7, 8, 9, 50), "window("),
    ],
    ids=["full", "filling", "unknown"],
)
def test_the_guard_of_a_sliding_cache_decides_where_its_keys_begin(
    guard: Callable[[int], bool], first: int, others: tuple[int, ...], text: str
) -> None:
    module = trace_dynamic(sliding_step(guard), torch.zeros(3), first)
    form = prove(module, (2, 2, 1, 8))
    assert form.proved and text in str(form) and ("window(" in text or "window(" not in str(form))
    for n in others:
        check(module, form, (2, 2, 1, 8), (torch.zeros(3), n), "keep")


# -- What an operator's meaning does not cover ------------------------------------------------------------------------

QUERY, KEY = (lambda: torch.arange(6)[:, None]), (lambda: torch.arange(6))


def runs(positions: torch.Tensor) -> torch.Tensor:
    """Ids of packed sequences from positions that restart."""
    return (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def same_run(ids: torch.Tensor) -> torch.Tensor:
    return ids[:, None, :, None] == ids[:, None, None, :]


def written_runs(x: torch.Tensor) -> torch.Tensor:
    ids = runs(x)
    ids[:, 2:] = 7
    return same_run(ids) & (x[:, None, None, :] <= x[:, None, :, None])


def shifted_runs(x: torch.Tensor) -> torch.Tensor:
    positions = x + 1
    return same_run(runs(positions)) & (positions[:, None, None, :] <= positions[:, None, :, None])


def doubled_runs(x: torch.Tensor) -> torch.Tensor:
    positions = x + x.flip(0)
    return same_run(runs(positions)) & (positions[:, None, None, :] <= positions[:, None, :, None])


def chosen_runs(x: torch.Tensor) -> torch.Tensor:
    positions = torch.where(KEY() > 2, x, 0)
    return same_run(runs(positions)) & (positions[:, None, None, :] <= positions[:, None, :, None])


def runs_with_a_limit_on_the_query(x: torch.Tensor) -> torch.Tensor:
    return same_run(runs(x)) & (x[:, None, :, None] <= 1)


NEAR_RUNS: dict[str, Build] = {
    "ids that were written": written_runs,
    "positions that are moved": shifted_runs,
    "positions that are added": doubled_runs,
    "positions by cases": chosen_runs,
    "a limit on the query's position": runs_with_a_limit_on_the_query,
    "ids from outside": lambda x: same_run(x) & (x[:, None, None, :] <= x[:, None, :, None]),
    "every other query's id": lambda x: x.repeat(1, 2)[:, None, ::2, None] == x[:, None, None, :],
    "every other key's id": lambda x: x[:, None, :, None] == x.repeat(1, 2)[:, None, None, ::2],
    "ids that differ by one": lambda x: x[:, None, :, None] == x[:, None, None, :] + 1,
    "ids of which one is doubled": lambda x: x[:, None, :, None] == 2 * x[:, None, None, :],
    "ids with the wrong sign": lambda x: x[:, None, :, None] == -x[:, None, None, :],
    "chunks that move with a key": lambda x: (KEY() + x[:, None, None, :]) // 2 == QUERY() // 2,
    "chunks that move with a query": lambda x: KEY() // 2 == (QUERY() + x[:, None, :, None]) // 2,
}


@pytest.mark.parametrize("name", NEAR_RUNS)
def test_near_misses_of_packed_sequences_and_chunks_are_exact_or_dense(name: str) -> None:
    for positions in ([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]], [[3, 1, 2, 0, 0, 2], [2, 1, 0, 3, 3, 1]]):
        prove_and_check(NEAR_RUNS[name], SQUARE, torch.tensor(positions))


NOT_A_NUMBER, HALF = math.nan, 2.5
EDGES: dict[str, tuple[bool, Build]] = {
    "the diagonal": (True, lambda: KEY() == QUERY()),
    "an equation without a solution": (False, lambda: 2 * KEY() == 2 * QUERY() + 1),
    "a limit that moves twice as fast": (False, lambda: KEY() <= 2 * QUERY()),
    "a limit that moves backwards": (False, lambda: KEY() <= 5 - QUERY()),
    "twice a chunk": (False, lambda: 2 * (KEY() // 2) == QUERY() // 2),
    "chunks of two sizes": (False, lambda: QUERY() // 3 == KEY() // 2),
    "chunks of even keys": (False, lambda: 2 * KEY() // 3 == QUERY() // 3),
    "chunks of even queries": (False, lambda: 2 * QUERY() // 5 == KEY() // 5),
    "the larger of two booleans": (False, lambda: torch.maximum(KEY() > QUERY(), KEY() < 3)),
    "a sum of booleans": (False, lambda: torch.add(KEY() > 2, KEY() > 4)),
    "a difference with a factor": (False, lambda: torch.rsub(KEY(), QUERY(), alpha=2) >= 0),
    "bits of integers": (False, lambda: (KEY() & 2) == 0),
    "all bits of an integer": (False, lambda: ~KEY() < -QUERY()),
    "all bits of an integer beside one": (False, lambda: ~KEY() < 1),
    "a number less a factor": (False, lambda: torch.rsub(KEY(), torch.full((6,), 6), alpha=2) >= 0),
    "a second difference beside a limit": (False, lambda: torch.diff(torch.arange(8), n=2) >= KEY()),
    "a padding of ones": (False, lambda: F.pad(torch.ones(1, 1, 4), (1, 1), mode="circular")[0] == 1),
    "a start that is no integer": (False, lambda: torch.arange(0.5, 6.0) <= 3),
    "a step that is no integer": (False, lambda: torch.arange(0, 3, 0.5) <= 1),
    "an index by cases": (False, lambda: (KEY() > 2)[torch.where(KEY() > 3, KEY(), 0)]),
    "a gather of nothing": (False, lambda: torch.gather(torch.ones(()), 0, torch.zeros((), dtype=torch.int64)) > 0),
    "an empty vector in front": (False, lambda: torch.cat([torch.ones(0), torch.ones(6, 6).tril()], 1) > 0),
    "a padding that repeats": (
        False,
        lambda: F.pad(torch.arange(4.0)[None, None], (1, 1), mode="circular")[0] >= QUERY() - 3,
    ),
    "a second difference": (False, lambda: torch.diff(torch.arange(8), n=2) >= QUERY() - 3),
    "a difference with an end": (False, lambda: torch.diff(KEY(), append=torch.zeros(1, dtype=torch.int64)) > 0),
    "a difference with two beginnings": (False, lambda: torch.diff(torch.arange(5), prepend=torch.arange(2)) > 0),
    "a difference of booleans": (False, lambda: torch.diff(torch.arange(7) > 3)),
    "a vector transposed": (True, lambda: KEY().t() <= QUERY()),
    "a slice that begins before the start": (True, lambda: KEY()[-10:] <= QUERY()),
    "a number cut to an integer": (False, lambda: torch.full((6,), HALF).to(torch.int64) < KEY()),
    "complex positions": (False, lambda: KEY().to(torch.complex64) == QUERY()),
    "a complex constant": (False, lambda: torch.tensor(0j) == KEY()),
    "the larger of a number and NaN": (False, lambda: torch.maximum(torch.full((6,), NOT_A_NUMBER), KEY() + 0.5) >= 0),
    "the larger of NaN and a number": (False, lambda: torch.maximum(KEY() + 0.5, torch.full((6,), NOT_A_NUMBER)) >= 0),
    "the larger of two constants": (
        False,
        lambda: torch.maximum(torch.full((6,), HALF), torch.full((6,), NOT_A_NUMBER)) < KEY(),
    ),
    "NaN below": (False, lambda: torch.full((6,), NOT_A_NUMBER) > QUERY()),
    "NaN above": (False, lambda: torch.full((6, 1), NOT_A_NUMBER) < KEY() + 0.5),
    "a constant that is true": (True, lambda: torch.tensor(True) & (KEY() <= QUERY())),
    "constants of several entries": (False, lambda: torch.tensor([True, False, True, True, False, True]) & (KEY() > 1)),
    "too many cases": (False, lambda: sum(torch.where(KEY() > i, 2**i, 0) for i in range(6)) < 9),
}


@pytest.mark.parametrize("name", EDGES)
def test_masks_at_the_edge_of_an_operators_meaning_are_exact(name: str) -> None:
    proved, build = EDGES[name]
    form = prove_and_check(build, SQUARE)
    assert form.proved or not proved


BIASES: dict[str, Build] = {
    "twice a bias": lambda bias: torch.add(torch.zeros(6), bias, alpha=2),
    "a bias between two limits": lambda bias: bias.clamp(-1.0, 0.0),
    "positions up to a limit of run time": lambda bias: KEY().float().clamp(max=bias[0, 0].to(torch.int64)),
    "the larger of a bias and zero": lambda bias: torch.maximum(bias, torch.zeros(6)),
    "the larger of zero and a bias": lambda bias: torch.maximum(torch.zeros(6), bias),
    "a bias joined with integers": lambda bias: torch.cat(
        [torch.zeros(1), bias[0, :2].to(torch.int64), torch.zeros(1), bias[0, 2:4]]
    ),
    "a bias behind a dimension too many": lambda bias: bias.expand(1, 1, 1, 6, 6),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_that_almost_are_masks_stay_biases(name: str) -> None:
    assert prove(trace(BIASES[name], torch.randn(6, 6)), SQUARE, "add").bias is not None


@pytest.mark.parametrize("value", [0.5, 0.0])
def test_a_boolean_mask_filled_with_a_float_of_run_time_is_dense(value: float) -> None:
    def build(fill: torch.Tensor) -> torch.Tensor:
        return (KEY() <= QUERY()).masked_fill(KEY() > 2, fill)

    assert prove_and_check(build, SQUARE, torch.tensor(value)).dense is not None


def test_a_boolean_mask_of_five_dimensions_is_left() -> None:
    form = prove(trace(lambda m: m.expand(1, 1, 1, 6, 6), bool_input(6, 6)), SQUARE)
    assert form.dense is not None and "broadcast" in form.unproved


UNKNOWN_SIZES: dict[str, Build] = {
    "a row of unknown sign": lambda m, n: m[n - 3],
    "rows from an unknown sign on": lambda m, n: m[:, n - 3 :][:, : n // 5],
    "every n-th key": lambda m, n: m[:, ::n],
    "a view of sizes that do not group": lambda m, n: m.flatten()[: n + 1],
    "half a length": lambda m, n: torch.arange(6) <= n / 2,
}


@pytest.mark.parametrize("name", UNKNOWN_SIZES)
def test_sizes_of_run_time_that_are_not_understood_leave_the_mask_as_it_is(name: str) -> None:
    inputs = (bool_input(6, 6), 5)
    module = trace_dynamic(UNKNOWN_SIZES[name], *inputs)
    keys = int(UNKNOWN_SIZES[name](*inputs).shape[-1])
    form = prove(module, (1, 1, 6, keys))
    check(module, form, (1, 1, 6, keys), inputs, "keep")
