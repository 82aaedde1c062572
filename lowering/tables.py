"""Tables written to memory once, where Inductor would compute them again in every reader."""

from __future__ import annotations

import torch
import torch.fx as fx

from lz_compile.lowering.emit import Emitter
from lz_compile.region import Kernel, Region, Verdict

_library = torch.library.Library("lz_compile", "FRAGMENT")
_library.define("stored(Tensor table) -> Tensor")


def stored(table: torch.Tensor) -> torch.Tensor:
    """A contiguous copy; opaque to Inductor, so that readers load it instead of computing it."""
    return table.clone(memory_format=torch.contiguous_format)


_library.impl("stored", stored, "CompositeExplicitAutograd")


@torch.library.register_fake("lz_compile::stored")
def _fake(table: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(table, memory_format=torch.contiguous_format)


def _supports(region: Region) -> Verdict:
    device = region.output.meta["val"].device.type
    return None if device == "cuda" else "pays on CUDA only"


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    return emitter.call(region.output.next, torch.ops.lz_compile.stored.default, region.output)


STORED = Kernel(
    name="table.stored",
    kind="rope_table",
    version="1",
    supports=_supports,
    emit=_emit,
    cuda_graphs="a copy",
    summary="cosines and sines are stored once instead of computed again for every head of every layer",
)
