"""Near misses by the hundred: a graph with one thing changed, and whether what is matched in it means what it computes.

:func:`perturbed` changes one argument of one operator of a traced graph at a time: a number, a dtype, an operand, the
operator itself; or it writes into a value.  What a pattern still matches in such a graph must mean what the graph
computes: :func:`wrong_meanings` runs both.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lz_compile.aliasing import Aliases
from lz_compile.lowering import semantic
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.pointwise import meaning
from lz_compile.region import Kernel, Region
from lz_compile.rewrite import rewrite

aten = torch.ops.aten
Find = Callable[[fx.Graph, Aliases, Callable[[fx.Node], Any]], list[Region]]

# What an operator is confused with.
_LIKE: dict[Any, tuple[Any, ...]] = {
    aten.lt.Tensor: (aten.le.Tensor, aten.gt.Tensor),
    aten.le.Tensor: (aten.lt.Tensor,),
    aten.gt.Tensor: (aten.ge.Tensor, aten.lt.Tensor),
    aten.ge.Tensor: (aten.gt.Tensor,),
    aten.lt.Scalar: (aten.le.Scalar, aten.gt.Scalar),
    aten.le.Scalar: (aten.lt.Scalar,),
    aten.gt.Scalar: (aten.ge.Scalar,),
    aten.ge.Scalar: (aten.gt.Scalar,),
    aten.eq.Tensor: (aten.ne.Tensor,),
    aten.eq.Scalar: (aten.ne.Scalar,),
    aten.ne.Scalar: (aten.eq.Scalar,),
    aten.mul.Tensor: (aten.add.Tensor, aten.div.Tensor),
    aten.div.Tensor: (aten.mul.Tensor,),
    aten.add.Tensor: (aten.mul.Tensor, aten.sub.Tensor),
    aten.sub.Tensor: (aten.add.Tensor,),
    aten.mul.Scalar: (aten.add.Scalar,),
    aten.cos.default: (aten.sin.default,),
    aten.sin.default: (aten.cos.default,),
    aten.amax.default: (aten.amin.default,),
    aten.tril.default: (aten.triu.default,),
    aten.triu.default: (aten.tril.default,),
    aten.silu.default: (aten.sigmoid.default, aten.relu.default),
    aten.rsqrt.default: (aten.sqrt.default,),
    aten.exp.default: (aten.sigmoid.default,),
    aten.tanh.default: (aten.sigmoid.default,),
    aten.softmax.int: (aten.log_softmax.int,),
    aten.log_softmax.int: (aten.softmax.int,),
    aten.maximum.default: (aten.minimum.default,),
    aten.__and__.Tensor: (aten.__or__.Tensor,),
    aten.__or__.Tensor: (aten.__and__.Tensor,),
    aten.bitwise_and.Tensor: (aten.bitwise_or.Tensor,),
    aten.bitwise_or.Tensor: (aten.bitwise_and.Tensor,),
    aten.logical_and.default: (aten.logical_or.default,),
    aten.neg.default: (aten.abs.default,),
    aten.abs.default: (aten.neg.default,),
}
# Arguments that say where and how a result lies in memory.
_NOT_VALUES = frozenset({"memory_format", "layout", "device", "pin_memory", "generator"})
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32)


@dataclass
class Program:
    """A traced function with inputs to run it on."""

    module: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    mode: FakeTensorMode


def trace(fn: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor) for tensor in inputs]
    with mode, torch.no_grad():
        module = make_fx(fn, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    module.graph.eliminate_dead_code()
    return Program(module, inputs, mode)


def perturbed(program: Program, only: Callable[[fx.Node], bool] = lambda node: True) -> Iterator[tuple[str, Program]]:
    """All changes of one thing, each with a text that says which; those that do not run are left out."""
    for index, node in enumerate(program.module.graph.nodes):
        if node.op == "output" or not only(node):
            continue
        for text, change in _changes(node):
            changed = _changed(program, index, change)
            if changed is not None:
                yield f"{node.name}: {text}", changed


Change = Callable[[fx.Node], None]


def _changes(node: fx.Node) -> Iterator[tuple[str, Change]]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        yield "written after it", lambda n: _write(n, n.next)
        yield "written before the end", lambda n: _write(n, n.graph.output_node().prev)
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        yield "turned over after it", lambda n: _write(n, n.next, aten.logical_not_.default)
    if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
        yield "nothing after it", lambda n: _write(n, n.next, aten.zero_.default)
    if node.target is operator.getitem:
        yield "is another result", lambda n: setattr(n, "args", (n.args[0], 1 - n.args[1]))
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    for other in _LIKE.get(node.target, ()):
        yield f"is {other}", lambda n, other=other: setattr(n, "target", other)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name in _NOT_VALUES:
            continue
        given = (
            node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        )
        for text, new in _others(node, given, str(argument.type)):
            yield f"{argument.name} is {text}", lambda n, p=position, a=argument, new=new: _set(n, p, a, new(n))
    if len(node.all_input_nodes) == 2 and all(isinstance(argument, fx.Node) for argument in node.args[:2]):
        yield "operands change places", lambda n: setattr(n, "args", (n.args[1], n.args[0], *n.args[2:]))


def _others(node: fx.Node, given: Any, kind: str) -> Iterator[tuple[str, Callable[[fx.Node], Any]]]:
    """Other values for an argument."""
    if isinstance(given, fx.Node):
        value = given.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return
        for far in (True, False):
            found = _like(node, given, far)
            if found is not None:
                yield f"{found}", lambda n, name=found: next(m for m in n.graph.nodes if m.name == name)
        if value.dtype.is_floating_point:
            yield "changed", lambda n, g=given.name: _insert(n, aten.mul.Scalar, _named(n, g), 1.25)
        elif value.dtype == torch.bool:
            yield "turned over", lambda n, g=given.name: _insert(n, aten.logical_not.default, _named(n, g))
        elif value.dtype in (torch.int64, torch.int32):
            yield "one more", lambda n, g=given.name: _insert(n, aten.add.Scalar, _named(n, g), 1)
        if value.dim() >= 2:
            yield "rolled", lambda n, g=given.name: _insert(n, aten.roll.default, _named(n, g), [1], [-1])
            yield "rolled by rows", lambda n, g=given.name: _insert(n, aten.roll.default, _named(n, g), [1], [-2])
        return
    if isinstance(given, bool):
        yield str(not given), lambda n: not given
    elif isinstance(given, torch.dtype) or (given is None and "ScalarType" in kind):
        for dtype in _DTYPES:
            if dtype != given:
                yield str(dtype), lambda n, dtype=dtype: dtype
    elif isinstance(given, int):
        for other in {given + 1, given - 1, 0} - {given}:
            yield str(other), lambda n, other=other: other
    elif isinstance(given, float):
        yield str(given * 1.5), lambda n: given * 1.5
    elif isinstance(given, (list, tuple)) and all(isinstance(item, int) for item in given):
        for i in range(len(given)):
            for step in (1, -1):
                changed = [*given[:i], given[i] + step, *given[i + 1 :]]
                yield str(changed), lambda n, changed=changed: changed
        if len(set(given)) > 1:
            yield "in reverse", lambda n: [*given][::-1]
        yield "one longer", lambda n: [*given, 0]
    elif given is None and kind in ("Optional[int]", "Optional[number]", "Optional[float]"):
        yield "1", lambda n: 1


def _like(node: fx.Node, given: fx.Node, far: bool) -> str | None:
    """A value in front of ``node`` that could stand in for one of its operands: the farthest, or the nearest."""
    value = given.meta["val"]
    found = None
    for other in node.graph.nodes:
        if other is node:
            break
        candidate = other.meta.get("val")
        if other is given or not isinstance(candidate, torch.Tensor) or candidate.dtype != value.dtype:
            continue
        if candidate.shape == value.shape:
            found = other.name
            if far:
                break
    return found


def _named(node: fx.Node, name: str) -> fx.Node:
    return next(other for other in node.graph.nodes if other.name == name)


def _insert(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        return node.graph.call_function(target, args)


def _write(node: fx.Node, at: fx.Node, target: Any = aten.mul_.Scalar) -> None:
    while at.op == "placeholder":
        at = at.next
    with at.graph.inserting_before(at):
        at.graph.call_function(target, (node, 1.25) if target is aten.mul_.Scalar else (node,))


def _set(node: fx.Node, position: int, argument: Any, value: Any) -> None:
    if argument.kwarg_only or (position >= len(node.args) and argument.name in node.kwargs):
        node.kwargs = {**node.kwargs, argument.name: value}
        return
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    args = list(node.args) + [schema[i].default_value for i in range(len(node.args), position)]
    args[position : position + 1] = [value]
    node.args = tuple(args)


def _changed(program: Program, index: int, change: Change) -> Program | None:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.module.graph, {}))
    nodes = list(graph.nodes)
    before = set(nodes)
    try:
        change(nodes[index])
    except (StopIteration, RuntimeError, TypeError):
        return None
    stale = {nodes[index]} if nodes[index].op != "placeholder" else set()
    with program.mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "output" or node.op == "placeholder":
                continue
            if node in before and node not in stale and not any(n in stale for n in node.all_input_nodes):
                continue
            stale.add(node)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            try:
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
            except Exception:
                return None
    try:
        graph.lint()
        return Program(fx.GraphModule(program.module, graph), program.inputs, program.mode)
    except RuntimeError:
        return None


def is_matched(program: Program, find: Find) -> bool:
    graph = program.module.graph
    return any(not region.declined for region in find(graph, Aliases(graph), lambda node: ""))


def wrong_meanings(program: Program, find: Find) -> list[str]:
    """Regions whose inputs, put into their meaning where they stand in the graph, do not give their output."""
    graph = program.module.graph
    regions = [region for region in find(graph, Aliases(graph), lambda node: "") if not region.declined]
    by_output = {region.output: region for region in regions}
    seen: list[tuple[Region, list[Any], torch.Tensor]] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            region = by_output.get(n)
            given = [_copy(self.env[node]) for node in region.inputs] if region is not None else []
            result = super().run_node(n)
            if region is not None:
                seen.append((region, given, _copy(result)))
            return result

    with torch.no_grad():
        try:
            Watch(program.module, garbage_collect_values=False).run(*[tensor.clone() for tensor in program.inputs])
        except (RuntimeError, IndexError, TypeError):  # it does not run on real values
            return []
        return [f"{r.kind} {r.pattern}" for r, given, expected in seen if not _same(meaning(r)(*given), expected)]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _same(got: torch.Tensor, expected: torch.Tensor, coarse: bool = False) -> bool:
    """What is NaN does not count: a mask of NaN is nobody's."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    coarse = coarse or got.dtype not in (torch.float64, torch.float32)
    number = ~expected.isnan()
    tolerance = 2e-2 if coarse else 1e-5
    return torch.allclose(got.double()[number], expected.double()[number], atol=tolerance, rtol=tolerance)


def _is_coarse(program: Program) -> bool:
    """Whether some value has half precision, which a kernel may leave out."""
    values = [node.meta.get("val") for node in program.module.graph.nodes]
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in values)


# -- attention: the rewritten graph must give what the graph gave


@torch.library.custom_op("lz_compile_tests::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk: int = 0,
    empty_row: int = 0,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    return semantic.attend(
        query,
        key,
        value,
        bounds,
        key_mask,
        query_documents,
        key_documents,
        mask,
        scale,
        softcap,
        chunk,
        empty_row,
        sink,
    )


@attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


MEANING = Kernel(
    name="meaning.attend",
    kind="attention",
    version="1",
    supports=lambda region: None,
    emit=lambda emitter, region: emitter.attend(region, torch.ops.lz_compile_tests.attend.default),
    sinks=True,
)


def wrong_attentions(program: Program, find: Find) -> list[str]:
    """What differs between a graph and the graph with every attention replaced by its meaning."""

    def results(module: fx.GraphModule) -> tuple[Any, Sequence[torch.Tensor]]:
        inputs = [tensor.clone() for tensor in program.inputs]
        return fx.Interpreter(module).run(*inputs), inputs

    graph = fx.Graph()
    graph.output(graph.graph_copy(program.module.graph, {}))
    module = fx.GraphModule(program.module, graph)
    aliases = Aliases(module.graph)
    regions = [region for region in find(module.graph, aliases, lambda node: "") if not region.declined]
    if not regions:
        return []
    with torch.no_grad():
        try:
            expected = results(program.module)
        except (RuntimeError, IndexError, TypeError):
            return []
        choices = [types.SimpleNamespace(region=r, kernel=MEANING, rejected={}, reason="") for r in regions]
        rewrite(module, aliases, types.SimpleNamespace(choices=choices), Emitter)  # type: ignore[arg-type]
        got = results(module)
    pairs = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected))
    return (
        ["the rewritten graph gives something else"]
        if not all(_same(a, b, _is_coarse(program)) for a, b in pairs)
        else []
    )
