"""An fx graph as readable Python that runs.

Enters: a graph with fake values in ``meta["val"]`` (or Dynamo's ``meta["example_value"]``).  Leaves: the text of a
function, what it imports, the constants that it reads, and why it does not run where it cannot be written.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import keyword
import math
import ntpath
import operator
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from lz_compile.normalize import module_path, readable_input
from lz_compile.specimen import hint

# Constants of more elements than this are described, not written.
MAX_CONSTANT = 256

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
    operator.and_: "&",
    operator.or_: "|",
    operator.xor: "^",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


# What they do to a forward pass is to call the subgraph.
_CHECKPOINTS = {"tag_activation_checkpoint", "wrap_activation_checkpoint"}


@dataclass
class Source:
    """``text`` defines ``graph``; files that hold it have to import ``imports`` and to define ``constants`` (name to
    expression).  ``problems`` say why it does not run, empty when it does; ``notes`` what is not as it was."""

    text: str
    imports: set[str] = field(default_factory=set)
    constants: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def source_of(
    module: fx.GraphModule,
    marks: Mapping[fx.Node, Sequence[str]] | None = None,
    numbers: Collection[fx.Node] = (),
) -> Source:
    """The graph as a function called ``graph``.  ``marks`` are comments in front of nodes; ``numbers`` are inputs that
    the function takes as Python numbers."""
    writer = _Writer(marks or {}, numbers)
    body = writer.function(module, "graph", "")
    text = "\n\n\n".join([*writer.nested, body]) + "\n"
    return Source(text, writer.imports, writer.constants, writer.problems, writer.notes)


def value_of(node: fx.Node) -> Any:
    """The fake value of a node of either graph."""
    return node.meta.get("val", node.meta.get("example_value"))


def identifier(name: str) -> str:
    """``model.layers.0.weight`` -> ``model_layers_0_weight``."""
    name = re.sub(r"\W+", "_", name).strip("_") or "value"
    return f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


def layout_text(value: torch.Tensor) -> str:
    """Shape, strides, dtype and device as arguments; symbolic sizes as they were in the call that was compiled."""
    shape, strides = (tuple(map(hint, sizes)) for sizes in (value.shape, value.stride()))
    return f'{shape}, {strides}, {value.dtype}, "{value.device}"'


class _Unwritable(Exception):
    """The message says what has no text."""


class _Writer:
    """Writes functions one after the other; what they share is collected."""

    def __init__(self, marks: Mapping[fx.Node, Sequence[str]], numbers: Collection[fx.Node]) -> None:
        self.marks, self.numbers = marks, numbers
        self.imports: set[str] = {"torch"}
        self.constants: dict[str, str] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.nested: list[str] = []
        self._graphs: dict[int, str] = {}

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def function(self, module: fx.GraphModule, name: str, indent: str) -> str:
        """``def name(...)`` with its body.  With an indent it is a method."""
        names = _Names(module.graph)
        lines = [f"{indent}def {name}("]
        lines += [f"{indent}    self,"] if indent else []
        for node in module.graph.find_nodes(op="placeholder"):
            lines.append(f"{indent}    {names[node]},{_comment(_annotation(value_of(node)))}")
        lines.append(f"{indent}):")
        body = _Body(self, module, names)
        lines += [f"{indent}    {line}".rstrip() for line in body.lines()]
        return "\n".join(lines)

    def class_of(self, graph: fx.GraphModule, name: str) -> str:
        """A subgraph as a module class; equal objects share one."""
        if id(graph) not in self._graphs:
            taken = set(self._graphs.values())
            base = f"Subgraph_{identifier(name)}"
            unique = next(n for n in (base, *(f"{base}_{i}" for i in range(len(taken) + 1))) if n not in taken)
            self._graphs[id(graph)] = unique
            text = self.function(graph, "forward", "    ")
            self.nested.append(f"class {unique}(torch.nn.Module):\n{text}")
        return self._graphs[id(graph)]

    def constant(self, name: str, value: torch.Tensor, is_weight: bool = False) -> str:
        """The name under which a file defines a tensor that the graph holds."""
        name = base = f"constant_{identifier(name).strip('_')}"
        text = _constant_text(name, value, is_weight)
        count = 0
        while self.constants.get(name, text) != text:
            count += 1
            name = f"{base}_{count}"
            text = _constant_text(name, value, is_weight)
        self.constants[name] = text
        return name

    def reference(self, value: Any) -> str:
        """A function, class or enum member as the expression that finds it."""
        if isinstance(value, torch._ops.OpOverload):
            return self._operator(value, str(value), value._schema.name)
        if isinstance(value, torch._ops.OpOverloadPacket):
            name = str(value).replace("::", ".")
            return self._operator(value, name, f"{name.replace('.', '::')}")
        if isinstance(value, torch._ops.HigherOrderOperator):
            if value.name().startswith("triton_kernel_wrapper"):
                raise _Unwritable("a Triton kernel of the program")
            self.imports.add(type(value).__module__)
            return f"torch.ops.higher_order.{value.name()}"
        if isinstance(value, enum.Enum):
            return f"{self.reference(type(value))}.{value.name}"
        for path in _paths(value):
            found, module = _resolve(path)
            if module and (found is value or (found == value and type(found) is type(value))):
                if module == "builtins":
                    return path.removeprefix("builtins.")
                if not module.startswith(("torch._C", "torch.nn")):  # torch brings them
                    self.imports.add(module)
                return path
        raise _Unwritable(
            f"{getattr(value, '__qualname__', None) or type(value).__qualname__}, which nothing can import"
        )

    def _operator(self, value: Any, name: str, qualified: str) -> str:
        namespace = qualified.partition("::")[0]
        if namespace not in ("aten", "prims", "prim", "quantized"):
            module = _registrar(value, qualified)
            if module == "__main__":
                raise _Unwritable(f"operator {name}, which a script defines")
            if module:
                self.imports.add(module)
        return f"torch.ops.{name}"


class _Names:
    """A Python name for each node: inputs as their user knows them."""

    def __init__(self, graph: fx.Graph) -> None:
        self._names: dict[fx.Node, str] = {}
        taken = {"self", "graph", "tensor", "parameter", "buffer", "inputs", "context", "main"}
        taken |= {"torch", "operator", "math", "builtins", "transformers", "lz_compile"}
        for node in graph.nodes:
            name = base = identifier(_input_name(node) if node.op == "placeholder" else node.name)
            count = 0
            while name in taken:
                count += 1
                name = f"{base}_{count}"
            taken.add(name)
            self._names[node] = name

    def __getitem__(self, node: fx.Node) -> str:
        return self._names[node]


def _input_name(node: fx.Node) -> str:
    value = value_of(node)
    if isinstance(value, torch.SymInt) and re.fullmatch(r"\w+", str(value)):
        return str(value)
    return readable_name(node)


def readable_name(node: fx.Node) -> str:
    """An input as its user knows it: ``model.embed_tokens.weight``."""
    return str(node.meta.get("lz_name") or readable_input(node))


class _Body:
    """The statements of one graph."""

    def __init__(self, writer: _Writer, module: fx.GraphModule, names: _Names) -> None:
        self.writer, self.module, self.names = writer, module, names
        self._dying = _last_uses(module.graph)

    def lines(self) -> list[str]:
        result: list[str] = []
        where = place = ""
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                continue
            path = module_path(node)
            if path != where and node.op not in ("output", "get_attr"):
                result += ["", f"# {path or '(top level)'}"]
                where = path
            result += [f"# {line}" for line in self.writer.marks.get(node, ())]
            try:
                line = self._statement(node)
            except _Unwritable as reason:
                problem = f"{node.name}: {reason}"
                self.writer.problems.append(problem)
                result.append(f"raise NotImplementedError({problem!r})")
                continue
            if line is None:
                continue
            dead = [self.names[other] for other in self._dying.get(node, ())]
            line += f"; del {', '.join(dead)}" if dead and node.op != "output" else ""
            here = _place(node)
            notes = [_annotation(value_of(node)) if node.users else "", here if here != place else ""]
            place = here or place
            result.append(line + _comment("  ".join(note for note in notes if note)))
        return result

    def _statement(self, node: fx.Node) -> str | None:
        name = self.names[node]
        if node.op == "output":
            return f"return {self.text(node.args[0])}"
        if node.op == "get_attr":
            return f"{name} = {self._attribute(str(node.target))}"
        if node.args and node.args[0] in self.writer.numbers:
            value = f"float({self.text(node.args[0])})"  # of what the program gave as a number
        elif node.op == "call_function":
            value = self._call(node)
        elif node.op == "call_method":
            receiver, *rest = node.args
            value = f"{self.text(receiver)}.{node.target}({self._arguments(rest, node.kwargs)})"
        elif node.op == "call_module":
            value = f"{self._attribute(str(node.target))}({self._arguments(node.args, node.kwargs)})"
        else:
            raise _Unwritable(f"a node of kind {node.op}")
        return f"{name} = {value}" if node.users else value

    def _call(self, node: fx.Node) -> str:
        target: Any = node.target
        if not node.kwargs and len(node.args) == 2 and target in _INFIX:
            left, right = map(self.text, node.args)
            return f"{f'({left})' if left.startswith('-') else left} {_INFIX[target]} {right}"
        if target is operator.getitem:
            return f"{self.text(node.args[0])}[{self._index(node.args[1])}]"
        if target is operator.setitem and not node.users:
            return f"{self.text(node.args[0])}[{self._index(node.args[1])}] = {self.text(node.args[2])}"
        if target is torch.tensor and _size(node.args[0]) > MAX_CONSTANT:
            value = value_of(node)
            if isinstance(value, torch.Tensor):
                return f"{self.writer.constant(node.name, value)}.clone()"
        if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _CHECKPOINTS:
            self.writer.note("activation checkpointing is left out")
            return f"{self.text(node.args[0])}({self._arguments(node.args[1:], {})})"
        return f"{self.writer.reference(target)}({self._arguments(node.args, node.kwargs)})"

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        parts = [self.text(arg) for arg in args]
        return ", ".join(parts + [f"{key}={self.text(value)}" for key, value in kwargs.items()])

    def _index(self, index: Any) -> str:
        items = index if isinstance(index, tuple) and index else (index,)
        text = ", ".join(self._slice(item) for item in items)
        return text + ("," if isinstance(index, tuple) and len(index) == 1 else "")

    def _slice(self, item: Any) -> str:
        if not isinstance(item, slice):
            return self.text(item)
        start, stop, step = ("" if part is None else self.text(part) for part in (item.start, item.stop, item.step))
        return f"{start}:{stop}" + (f":{step}" if step else "")

    def _attribute(self, path: str) -> str:
        value = operator.attrgetter(path)(self.module)
        if isinstance(value, fx.GraphModule):
            return f"{self.writer.class_of(value, path)}()"
        if isinstance(value, torch.Tensor):
            # Only tracers' own constants are written: a parameter or a buffer has the name that the model gave it.
            is_weight = isinstance(value, torch.nn.Parameter) or not re.fullmatch(r"_tensor_constant\d+", path)
            return self.writer.constant(path, value, is_weight)
        if isinstance(value, torch.nn.Module):
            raise _Unwritable(f"module {path} ({type(value).__name__}) that holds its own parameters")
        return self.text(value)

    def text(self, value: Any) -> str:
        """An argument as an expression."""
        if isinstance(value, fx.Node):
            return self.names[value]
        if value is None or value is Ellipsis or isinstance(value, (bool, str, bytes)):
            return "..." if value is Ellipsis else repr(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbol(value)
        if isinstance(value, enum.Enum):
            return self.writer.reference(value)
        if isinstance(value, (int, float)):
            number = float(value) if isinstance(value, float) else int(value)  # NumPy's print otherwise
            return repr(number) if math.isfinite(number) else f'float("{number}")'
        if isinstance(value, complex):
            return f"complex({self.text(value.real)}, {self.text(value.imag)})"
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if isinstance(value, torch.device):
            return f"torch.{value!r}"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        if isinstance(value, range):
            return repr(value)
        return self._container(value)

    def _container(self, value: Any) -> str:
        if isinstance(value, tuple):
            items = ", ".join(map(self.text, value))
            if hasattr(value, "_fields"):
                return f"{self.writer.reference(type(value))}({items})"
            return f"({items},)" if len(value) == 1 else f"({items})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.text, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.text(key)}: {self.text(item)}' for key, item in value.items())}}}"
        if isinstance(value, torch.Tensor):
            return self.writer.constant("tensor", value, is_weight=True)
        if callable(value):
            return self.writer.reference(value)
        raise _Unwritable(f"an argument of type {type(value).__qualname__}")

    def _symbol(self, value: Any) -> str:
        known = value.node.hint
        if known is None:
            raise _Unwritable(f"the size {value}, which is not known while compiling")
        self.writer.note("symbolic sizes that no input gives are written as their values")
        return repr(known)


def _size(value: Any) -> int:
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 1


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """After which node each value can go; inputs and what nobody reads are not among them."""
    seen: set[fx.Node] = set()
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for read in node.all_input_nodes:
            if read not in seen:
                seen.add(read)
                if read.op != "placeholder":
                    result.setdefault(node, []).append(read)
    return result


def _annotation(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return f"{value}, here {value.node.hint}" if value.node.hint is not None else str(value)
    return ""


def _comment(text: str) -> str:
    return f"  # {text}" if text else ""


def _place(node: fx.Node) -> str:
    """``modeling_llama.py:72``: the innermost line of the program; neither its text nor its folder."""
    found = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{ntpath.basename(found[-1][0])}:{found[-1][1]}" if found else ""


def _constant_text(name: str, value: torch.Tensor, is_weight: bool) -> str:
    if not is_weight and value.numel() <= MAX_CONSTANT and type(value) is torch.Tensor and not value.is_quantized:
        text = re.sub(r"(?<![\w.])(-?inf|nan)\b", r'float("\1")', repr(value.tolist()))
        return f'torch.tensor({text}, dtype={value.dtype}, device="{value.device}")'
    if value.dtype == torch.bool:
        fill = '"ones"'
    elif value.dtype.is_floating_point or value.dtype.is_complex:
        fill = '"normal", 1.0'
    else:
        fill = '"zeros"'
    return f'tensor("{name}", {layout_text(value)}, {fill})'


def _paths(value: Any) -> list[str]:
    """Dotted paths under which a function or class may be found."""
    paths: list[str] = []
    module, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    owner = getattr(value, "__objclass__", None)
    if module == "_operator":
        paths.append(f"operator.{qualified}")
    if owner is torch._C.TensorBase:
        paths.append(f"torch.Tensor.{value.__name__}")
    with contextlib.suppress(Exception):  # the other spellings may do
        paths.append(torch.fx.node._get_qualified_name(value))
    if module and qualified:
        paths.append(f"{module}.{qualified}")
    if qualified:
        paths += [f"torch.{qualified}", f"math.{qualified}"]
    return [path for path in paths if "<" not in path and not path.startswith("__main__.")]


def _resolve(path: str) -> tuple[Any, str]:
    """What a dotted path means and the module to import for it; no module where it means nothing."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        try:
            found = sys.modules.get(module) or importlib.import_module(module)
            return operator.attrgetter(".".join(parts[count:]))(found), module
        except (ImportError, AttributeError):
            continue
    return None, ""


def _registrar(value: Any, qualified: str) -> str:
    """The module that registers a custom operator; empty when nobody says."""
    from torch._library.custom_ops import OPDEFS

    known: Callable[..., Any] | None = getattr(OPDEFS.get(qualified), "_init_fn", None)
    if known is not None:
        return str(known.__module__)
    overload = value if isinstance(value, torch._ops.OpOverload) else getattr(value, value.overloads()[0])
    name = qualified + (f".{overload._overloadname}" if overload._overloadname != "default" else "")
    found = re.search(r"^debug: registered at (.*):\d+$", torch._C._dispatch_dump(name), re.MULTILINE)
    if found:
        for module, loaded in list(sys.modules.items()):
            if getattr(loaded, "__file__", None) == found[1]:
                return module
    namespace = qualified.partition("::")[0]
    return namespace if namespace in sys.modules else ""
