"""Values that stand in for the inputs of a dumped graph.

Enters: a graph whose inputs nobody may write down.  Leaves: for each input how values are made up that the graph
accepts: token ids below the vocabulary, positions that fit a cache, masks that hide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from lz_compile.compat import source_name
from lz_compile.graph_source import readable_name, value_of
from lz_compile.specimen import hint

# Operators that hand the integers of their first argument on.
_PASS = {
    *("view", "reshape", "expand", "unsqueeze", "squeeze", "slice", "select", "transpose", "permute", "contiguous"),
    *("clone", "to", "_to_copy", "long", "int", "flatten", "repeat", "expand_as", "detach", "alias", "view_as"),
    *("getitem", "chunk", "split", "roll", "cpu", "cuda", "unflatten"),
}
_ADD = {"add", "add_", "iadd"}
# Operators that take indices as a whole: where they stand, and those that write there.
_INDEXING = {
    *("index_select", "gather", "index_copy", "index_copy_", "index_add", "index_add_", "index_fill", "index_fill_"),
    *("scatter", "scatter_", "scatter_add", "scatter_add_", "take_along_dim"),
}
_BY_TUPLE = {"getitem", "setitem", "index", "index_put", "index_put_"}
_WRITING = {"index_copy", "index_copy_", "index_put", "index_put_", "setitem", "scatter", "scatter_"}


@dataclass(frozen=True)
class Values:
    """``word`` and ``number`` as the dumped ``tensor()`` takes them; ``kind`` is parameter, buffer or input."""

    kind: str
    word: str
    number: float = 0

    def __str__(self) -> str:
        return f'"{self.word}"' + (f", {self.number:.6g}" if self.word in ("normal", "below", "steps", "all") else "")


def made_up(node: fx.Node) -> Values:
    """Values for an input of a graph that it accepts."""
    value, kind, name = value_of(node), kind_of(node), readable_name(node).lower()
    if value.dtype == torch.bool:
        return Values(kind, "ones")
    if value.dtype.is_floating_point or value.dtype.is_complex:
        if kind == "input":
            return Values(kind, "zeros") if "mask" in name else Values(kind, "normal", 1.0)
        if value.dim() >= 2:
            return Values(kind, "normal", max(hint(value.shape[-1]), 1) ** -0.5)
        return Values(kind, "normal", 0.02) if name.endswith("bias") else Values(kind, "near one")
    if values := _of_block_mask(node, kind):
        return values
    uses = list(_index_uses(node, 0, set()))
    length = hint(value.shape[-1]) if value.dim() else 1
    if not uses:
        return Values(kind, "steps", 0) if "position" in name else Values(kind, "ones")
    if any(use.last is None for use in uses):
        return Values(kind, "zeros")
    last = max(min(use.last for use in uses if use.last is not None), 0)
    if (any(use.writes for use in uses) or "position" in name) and length <= last + 1:
        return Values(kind, "steps", last + 1 - length)
    return Values(kind, "below", last + 1)


def is_number(node: fx.Node) -> bool:
    """Whether an input is a Python number that Dynamo hands over as a tensor and reads by ``item()``."""
    wrapped = bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))
    return wrapped and all(_name(user) == "item" for user in node.users)


def kind_of(node: fx.Node) -> str:
    source = source_name(getattr(node, "_dynamo_source", None))
    example = getattr(node.meta.get("grapharg"), "_example", None)
    if isinstance(example, torch.nn.Parameter) or isinstance(value_of(node), torch.nn.Parameter):
        return "parameter"
    return "parameter" if "._parameters[" in source else "buffer" if "._buffers[" in source else "input"


def _of_block_mask(node: fx.Node, kind: str) -> Values | None:
    """A part of flex_attention's block mask: every block is looked at through the mask function, none is taken whole.

    The mask holds pairs of tensors, block counts and block numbers: for queries and then for keys those of partly
    masked blocks, each followed by those of whole blocks where such exist.
    """
    for user in node.users:
        if _name(user) != "flex_attention":
            continue
        for arg in user.args:
            parts = [p for p in arg if isinstance(p, fx.Node) and _sizes(p)] if isinstance(arg, tuple) else []
            if node not in parts or len(parts) not in (4, 8):
                continue
            i = parts.index(node)
            if len(parts) == 8 and i % 4 >= 2:
                return Values(kind, "zeros")
            return Values(kind, "steps", 0) if i % 2 else Values(kind, "all", _sizes(parts[i + 1])[-1])
    return None


@dataclass(frozen=True)
class _Use:
    """Someone indexes with a value: its greatest number that is in range, None where that is not known."""

    last: int | None
    writes: bool


def _index_uses(node: fx.Node, added: int | None, seen: set[fx.Node]) -> Iterator[_Use]:
    """Uses of a node as an index; ``added`` is what was added to the input on the way, at most."""
    if node in seen:
        return
    seen.add(node)
    for user in node.users:
        name = _name(user)
        size = _indexed_size(user, node, name)
        if size is not None:
            yield _Use(None if added is None else size - 1 - added, name in _WRITING)
        elif name in _PASS and user.args and user.args[0] is node:
            yield from _index_uses(user, added, seen)
        elif name in _ADD and len(user.args) == 2:
            other = user.args[1] if user.args[0] is node else user.args[0]
            more = _greatest(other)
            yield from _index_uses(user, None if added is None or more is None else added + more, seen)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def _indexed_size(user: fx.Node, node: fx.Node, name: str) -> int | None:
    """The size of the dimension that ``user`` indexes by ``node``; None where it does not."""
    args = (*user.args, *user.kwargs.values())
    if name == "embedding" and len(args) >= 2:
        table = args[1] if args[0] is node else args[0]
        return _sizes(table)[0] if isinstance(table, fx.Node) else None
    if name == "one_hot" and len(args) >= 2 and isinstance(args[1], int) and args[0] is node:
        return args[1] if args[1] > 0 else None
    if name in ("cross_entropy", "nll_loss") and len(args) >= 2 and args[1] is node:
        classes = _sizes(args[0])
        return classes[1 if len(classes) > 1 else 0]
    if name in _INDEXING and node in args[1:]:
        numbers = [arg for arg in args[1:] if isinstance(arg, int)]
        sizes = _sizes(args[0])
        return sizes[numbers[0]] if numbers and sizes else None
    if name in _BY_TUPLE and len(args) >= 2 and args[0] is not node:
        index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        sizes = _sizes(args[0])
        for i, item in enumerate(index):
            if item is node and sizes:
                plain = not any(other is None or other is Ellipsis for other in index[:i])
                return sizes[i] if plain else min(sizes)
    return None


def _sizes(node: Any) -> list[int]:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return [hint(size) for size in value.shape] if isinstance(value, torch.Tensor) else []


def _greatest(value: Any) -> int | None:
    """The greatest number of a value that depends on no input; None where that is not known."""
    if isinstance(value, (int, torch.SymInt)):
        return max(hint(value), 0)
    while isinstance(value, fx.Node) and _name(value) in _PASS:
        value = value.args[0]
    if not isinstance(value, fx.Node):
        return None
    if isinstance(value_of(value), torch.SymInt):
        return max(hint(value_of(value)), 0)
    if _name(value) != "arange":
        return None
    bounds = [_number(arg) for arg in value.args]
    start = bounds[0] if len(bounds) > 1 else 0
    sizes = _sizes(value)
    return start + sizes[0] - 1 if start is not None and sizes else None


def _number(arg: Any) -> int | None:
    value = value_of(arg) if isinstance(arg, fx.Node) else arg
    return hint(value) if isinstance(value, (int, torch.SymInt)) else None
