"""What differs between the PyTorch versions that are supported (2.11 to 2.13), in one place."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx


def source_name(source: Any) -> str:
    """The expression of a Dynamo source: a method until 2.11, a property later."""
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def is_higher_order(node: fx.Node) -> bool:
    """True for calls of higher-order operators (flex_attention, activation checkpointing, cond, ...)."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def fake_mode_of(values: list[Any]) -> Any:
    """The fake mode that Dynamo traced a graph with: that of its example values, not the fresh one that it makes for
    the backend (mixing the two fails)."""
    for value in values:
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None


def scans_long_rows(device: torch.device) -> bool:
    """Whether Inductor can compile a cumulative sum over a long row: not on CUDA until 2.11, where its code generation
    of split scans raises a TypeError."""
    return device.type != "cuda" or torch.__version__ >= torch.torch_version.TorchVersion("2.12")
