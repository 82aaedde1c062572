"""First step of the road: Dynamo's graph becomes a pre-dispatch ATen graph.

Enters: the GraphModule that Dynamo hands to a backend.  Leaves: a GraphModule over ATen operators with the same inputs
and outputs, the same order of in-place operations, fake values in ``meta["val"]`` and module paths in
``meta["nn_module_stack"]``; or :class:`LeftAlone` with the reason why the graph goes to Inductor as it came.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lz_compile.compat import fake_mode_of, is_higher_order, source_name
from lz_compile.gradients import mark_gradients


class LeftAlone(Exception):
    """The graph is left to Inductor unchanged; the message says why."""


def normalize(dynamo: fx.GraphModule) -> fx.GraphModule:
    """The pre-dispatch ATen form of a Dynamo graph.

    Raises:
        LeftAlone: the graph holds something that this form cannot carry.
    """
    placeholders = [node for node in dynamo.graph.nodes if node.op == "placeholder"]
    _require_traceable(dynamo, placeholders)
    values = [node.meta["example_value"] for node in placeholders]
    fake_mode = fake_mode_of(values)
    if fake_mode is None:
        raise LeftAlone("no tensor enters the graph")

    def interpret(*args: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(dynamo).run(*args)

    with fake_mode:
        aten = make_fx(interpret, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    _carry_dynamo_facts(dynamo, aten)
    # What nobody reads is no other user of a site's values: weights that a caller dropped, say.
    aten.graph.eliminate_dead_code()
    _require_known_constants(aten)
    inputs = [node for node in aten.graph.nodes if node.op == "placeholder"]
    mark_gradients(aten.graph, {n: isinstance(v, torch.Tensor) and v.requires_grad for n, v in zip(inputs, values)})
    return aten


def _require_traceable(dynamo: fx.GraphModule, placeholders: list[fx.Node]) -> None:
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise LeftAlone("autocast is active: dtypes are decided after this step")
    for node in dynamo.graph.nodes:
        if is_higher_order(node):
            raise LeftAlone(f"higher-order operator {node.target}")
    for node in dynamo.graph.nodes:
        if node.op == "call_function" and node.target is torch.amp.autocast_mode._enter_autocast and node.args[2]:
            raise LeftAlone("autocast inside the graph: dtypes are decided after this step")
        if node.op == "call_module":
            raise LeftAlone("the graph calls modules that hold their own parameters")
        if node.op == "get_attr":
            value = getattr(dynamo, str(node.target), None)
            if isinstance(value, fx.GraphModule):
                raise LeftAlone("the graph holds subgraphs")
            if isinstance(value, torch.Tensor):
                raise LeftAlone(f"the graph holds the tensor {node.target} itself (is inline_inbuilt_nn_modules off?)")
    for node in placeholders:
        value = node.meta.get("example_value")
        if value is None:
            raise LeftAlone(f"input {node.name} has no example value")
        if is_traceable_wrapper_subclass(value):
            raise LeftAlone(f"input {node.name} is a {type(value).__name__} (tensor subclass)")


def _require_known_constants(aten: fx.GraphModule) -> None:
    """A fake constant stands for a value that was computed and lost: what left a vmap, for one.

    Until torch 2.11 a vmap leaves its batched tensors in the graph instead.
    """
    for node in aten.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise LeftAlone("a vmap (or grad) is traced with the tensors inside it")
    for node in aten.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(aten, str(node.target), None), torch._subclasses.FakeTensor):
            raise LeftAlone("tracing lost a value that the graph computes (under vmap?)")


def spell_out_constants(module: fx.GraphModule) -> None:
    """Turns the constants that tracing made of ``torch.tensor(...)`` back into such calls, as Dynamo's graph had them.

    Tracing keeps them as buffers.  AOTAutograd takes each buffer of a Dynamo graph for one that Dynamo knows the source
    of, and its cache tells constants apart by shape only, not by value.
    """
    for node in list(module.graph.find_nodes(op="get_attr")):
        value = getattr(module, str(node.target), None)
        if not isinstance(value, torch.Tensor):
            continue
        for user in list(node.users):
            if user.target is torch.ops.aten.lift_fresh_copy.default:
                user.replace_all_uses_with(_literal(module.graph, user, value))
                module.graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(_literal(module.graph, node, value))
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    for name, _ in list(module.named_buffers()):
        delattr(module, name)
    module.recompile()


def _literal(graph: fx.Graph, at: fx.Node, value: torch.Tensor) -> fx.Node:
    with graph.inserting_before(at):
        node = graph.call_function(torch.tensor, (value.tolist(),), {"dtype": value.dtype, "device": value.device})
    node.meta = dict(at.meta)
    return node


def _carry_dynamo_facts(dynamo: fx.GraphModule, aten: fx.GraphModule) -> None:
    """What Dynamo hung on its graph moves along: names, sources, static-address marks.

    Without them Inductor takes parameters and caches for ordinary inputs and skips CUDA graphs.
    """
    old = [node for node in dynamo.graph.nodes if node.op == "placeholder"]
    new = [node for node in aten.graph.nodes if node.op == "placeholder"]
    assert len(old) == len(new), "tracing changed the inputs of the graph"
    for before, after in zip(old, new):
        after.meta = {**before.meta, "val": after.meta.get("val"), "lz_name": readable_input(before)}
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    for key, value in dynamo.meta.items():
        aten.meta.setdefault(key, value)
    if hasattr(dynamo, "_param_name_to_source"):
        aten._param_name_to_source = dynamo._param_name_to_source


def readable_input(node: fx.Node) -> str:
    """A graph input as its user knows it: ``past_key_values.layers[0].keys`` or ``attention_mask``."""
    source = getattr(node, "_dynamo_source", None)
    name = source_name(source) if source is not None else ""
    if not name:
        grapharg = node.meta.get("grapharg")
        name = source_name(grapharg.source) if getattr(grapharg, "source", None) is not None else node.name
    return readable_source(name)


def readable_source(name: str) -> str:
    """``L['self']._modules['model']._modules['layers']._modules['0']`` -> ``model.layers.0``."""
    name = re.sub(r"\._(modules|parameters|buffers)\['([^']*)'\]", r".\2", name)
    # Behind a decorator the module is the first of *args.
    name = re.sub(r"^L\['args'\]\[0\](?=\.)", "", name)
    name = re.sub(r"^L\['(self|kwargs)'\]", "", name)
    name = re.sub(r"^L\['([^']*)'\]", r"\1", name)
    name = re.sub(r"\['([^']*)'\]", r".\1", name)
    name = re.sub(r"\[(\d+)\]", r".\1", name)
    return name.lstrip(".")


def module_path(node: fx.Node) -> str:
    """The innermost module that a node was traced in, such as ``model.layers.0.self_attn``; empty at top level."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return readable_source(path)
