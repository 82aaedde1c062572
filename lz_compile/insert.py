"""One call put into a graph, with the fake value that later readers of the graph expect."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher


def insert_call(fake_mode: Any, anchor: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """One call in front of ``anchor``; its fake value comes from running ``target`` on fake values, and it counts to
    the module of ``anchor``."""
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(target, args, kwargs)
    values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    # Operators made of others are taken apart in Python: in C++ some ask symbolic shapes for numbers (linear in 2.11).
    with fake_mode, torch.no_grad(), enable_python_dispatcher():
        node.meta["val"] = target(*values[0], **values[1])
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in anchor.meta:
            node.meta[key] = anchor.meta[key]
    return node
