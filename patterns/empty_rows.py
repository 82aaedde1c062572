"""What PyTorch's SDPA gives for a query that sees no key: it depends on the backend that PyTorch picks.

Measured on an H200 with torch 2.11; ``tests/test_gpu.py`` compares compiled models with eager there, and
``tests/test_attention_patterns.py`` on the CPU:

==================  ===========  =========  ==========================  ====================
backend             bool mask    -inf mask  least finite number (bf16)  least finite (fp16)
==================  ===========  =========  ==========================  ====================
cuDNN               unmasked     zeros      zeros                       unmasked
memory-efficient    zeros        zeros      zeros                       unmasked
math, CPU flash     zeros        zeros      mean of all values          unmasked
==================  ===========  =========  ==========================  ====================
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import TorchDispatchMode

from lz_compile.mask import EmptyRow, EmptyRows
from lz_compile.patterns.walk import aten, fake

_CUDNN = "_scaled_dot_product_cudnn_attention"
_EFFICIENT = "_scaled_dot_product_efficient_attention"


class BackendsOfSdpa:
    """Answers for the SDPA calls of one graph, once for each combination of shapes, strides and dtypes."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}

    def empty_rows(self, node: fx.Node) -> EmptyRows:
        query = fake(node.args[0])
        assert query is not None
        return _rows_of(self._backend(node), query)

    def plans_sizes(self, node: fx.Node) -> bool:
        """Whether the backend makes a plan, on the host, for each combination of sizes."""
        return self._backend(node) == _CUDNN

    def _backend(self, node: fx.Node) -> str:
        tensors = [fake(argument) for argument in node.args[:4]]
        query = tensors[0]
        assert query is not None
        key = str([(t.dtype, t.shape, t.stride(), t.device) if t is not None else None for t in tensors]) + str(
            node.kwargs
        )
        if key not in self._known:
            self._known[key] = _backend_of(node) if query.is_cuda else ""
        return self._known[key]


def _rows_of(backend: str, query: torch.Tensor) -> EmptyRows:
    finite: EmptyRow = "zero" if backend in (_CUDNN, _EFFICIENT) else "mean"
    bias: EmptyRow = "zero" if finite == "zero" else "safe mean"
    if query.dtype == torch.float16:  # its least finite number does not drown a score
        finite, bias = "unmasked", "safe mean"
    return EmptyRows("unmasked" if backend == _CUDNN else "zero", infinite="zero", finite=finite, bias=bias)


def _backend_of(node: fx.Node) -> str:
    """The name of the operator that SDPA becomes below autograd for these arguments."""

    class Recorder(TorchDispatchMode):
        seen = ""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func._schema.name).removeprefix("aten::")
            if name.startswith("_scaled_dot_product"):
                self.seen = self.seen or name
            return func(*args, **(kwargs or {}))

    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    query = fake(node.args[0])
    assert query is not None
    recorder = Recorder()
    with torch.no_grad(), query.fake_mode, recorder:  # type: ignore[attr-defined]
        aten.scaled_dot_product_attention.default(*args, **kwargs)
    return recorder.seen
