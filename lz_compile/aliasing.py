"""Who shares memory with whom in a graph that still holds in-place operations, and when memory is written.

Enters: a pre-dispatch ATen graph whose nodes carry fake values in ``meta["val"]``.  Leaves: :class:`Aliases`, which
answers "are these two values one storage?" and "was this value written between these two points?".
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

import torch
import torch.fx as fx

# Changes what autograd knows, not the values.
_WRITES_NOTHING = {torch.ops.aten.detach_.default}


class Aliases:
    """Storages and writes of one graph, by position in its node list.

    The graph may grow afterwards (nodes inserted between others keep the order of the old ones); positions of nodes
    that did not exist at construction are unknown and raise KeyError, until :meth:`renew`.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.renew(graph)

    def renew(self, graph: fx.Graph) -> None:
        """Looks at the graph again, after nodes came or went."""
        self._position: dict[fx.Node, int] = {}
        self._storage: dict[fx.Node, int] = {}
        self._writes: dict[int, list[int]] = defaultdict(list)
        for position, node in enumerate(graph.nodes):
            self._position[node] = position
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                self._storage[node] = storage_key(value)
        for node, position in self._position.items():
            for written in written_arguments(node):
                if written in self._storage:
                    self._writes[self._storage[written]].append(position)

    def position(self, node: fx.Node) -> int:
        return self._position[node]

    def same_storage(self, a: fx.Node, b: fx.Node) -> bool:
        return a in self._storage and self._storage.get(a) == self._storage.get(b)

    def version(self, node: fx.Node, at: fx.Node) -> int:
        """How many writes to the storage of ``node`` run before ``at``."""
        writes = self._writes.get(self._storage.get(node, -1), [])
        return bisect_left(writes, self._position[at])

    def written_after(self, node: fx.Node, version: int) -> bool:
        """True when the storage of ``node`` is written once ``version`` writes to it have run."""
        return len(self._writes.get(self._storage.get(node, -1), [])) > version

    def is_written(self, node: fx.Node) -> bool:
        """True when the storage of ``node`` is written anywhere in the graph."""
        return bool(self._writes.get(self._storage.get(node, -1)))

    def written_between(self, node: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """True when the storage of ``node`` is written after ``first`` ran and before ``last`` runs."""
        writes = self._writes.get(self._storage.get(node, -1), [])
        after = bisect_left(writes, self._position[first] + 1)
        return after < len(writes) and writes[after] < self._position[last]


def storage_key(value: torch.Tensor) -> int:
    """Identity of the (fake) storage under a tensor; equal for views of one tensor."""
    return value.untyped_storage()._cdata


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that an ATen call writes to, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable or node.target in _WRITES_NOTHING:
        return []
    written: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        written += [v for v in values if isinstance(v, fx.Node)]
    return written
