"""A user's own provider, registered from outside the package by an entry point: one kernel, one probe."""

from __future__ import annotations

import torch
import torch.fx as fx

from lz_compile.lowering.emit import Emitter
from lz_compile.region import Kernel, Provider, Region, Verdict


def probe() -> None:
    """Imports what the kernel needs and calls it once; raises when that does not work."""
    q = torch.ones(1, 1, 2, 16)
    torch.nn.functional.scaled_dot_product_attention(q, q, q)


def _supports(region: Region) -> Verdict:
    assert region.attention is not None
    return None if region.attention.mask.proved else "takes proved masks only"


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    raise NotImplementedError("the registry's tests run no kernel")


PROVIDER = Provider(
    name="outside",
    kernels=(Kernel(name="outside.sdpa", kind="attention", version="1", supports=_supports, emit=_emit),),
    probe="outside:probe",
)


def provider() -> Provider:
    return PROVIDER
