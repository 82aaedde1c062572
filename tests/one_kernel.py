"""Test helper: a Dynamo backend that gives every attention region to one kernel, or says why it does not take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.lowering.emit import Emitter
from lz_compile.normalize import module_path, normalize
from lz_compile.patterns.attention import find_attention
from lz_compile.region import Kernel, Region


class OneKernel:
    """``verdicts`` holds what ``kernel.supports`` said of each region, in the order of compilation."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.verdicts: list[str | None] = []
        self.regions: list[Region] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        normal = normalize(module)
        aliases = Aliases(normal.graph)
        emitter = Emitter(normal.graph, aliases)
        for region in find_attention(normal.graph, aliases, module_path):
            assert not region.declined, region.declined
            self.regions.append(region)
            self.verdicts.append(self.kernel.supports(region))
            if self.verdicts[-1] is None:
                region.output.replace_all_uses_with(self.kernel.emit(emitter, region))
        normal.graph.eliminate_dead_code()
        normal.graph.lint()
        normal.recompile()
        return normal.forward


def compile_with(kernel: Kernel, fn: Any, dynamic: bool | None = False) -> tuple[Any, OneKernel]:
    """``fn`` compiled with nothing but ``kernel``, and the backend that shows what happened."""
    torch._dynamo.reset()
    backend = OneKernel(kernel)
    return torch.compile(fn, backend=backend, dynamic=dynamic), backend
