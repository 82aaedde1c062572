"""Which values of a graph would carry gradients: fake values in ``meta["val"]`` are detached and do not tell."""

from __future__ import annotations

import torch
import torch.fx as fx

from lz_compile.aliasing import storage_key, written_arguments

_STOPS = {torch.ops.aten.detach.default}
META = "lz_needs_gradient"


def mark_gradients(graph: fx.Graph, inputs: dict[fx.Node, bool]) -> None:
    """Sets ``meta["lz_needs_gradient"]`` on every node that autograd would record in training.

    ``inputs`` says which placeholders require gradients.  Writing such a value into a tensor marks all values that
    share its memory.
    """
    enabled = torch.is_grad_enabled()
    storages: set[int] = set()
    for node in graph.nodes:
        needs = False
        if node.op == "placeholder":
            needs = enabled and inputs.get(node, False)
        elif node.op == "get_attr":
            value = getattr(graph.owning_module, str(node.target), None)
            needs = enabled and isinstance(value, torch.Tensor) and value.requires_grad
        elif node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif node.op == "call_function" and node.target not in _STOPS:
            value = node.meta.get("val")
            floating = not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
            needs = enabled and floating and any(_marked(a, storages) for a in node.all_input_nodes)
        if needs:
            node.meta[META] = True
            for written in written_arguments(node):
                value = written.meta.get("val")
                if isinstance(value, torch.Tensor):
                    storages.add(storage_key(value))


def _marked(node: fx.Node, storages: set[int]) -> bool:
    if node.meta.get(META):
        return True
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and bool(storages) and storage_key(value) in storages


def needs_gradient(node: fx.Node) -> bool:
    """True when a gradient would flow through this value."""
    return bool(node.meta.get(META))
