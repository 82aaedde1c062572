"""What foreign CUDA kernels ask of devices and memory layouts, and how an op meets it when it runs."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile.region import Verdict

# Bytes that a vector load or a TMA descriptor takes for granted: of addresses, and of every stride but the last.
ALIGNMENT = 16


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, None for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def layout_verdict(*tensors: torch.Tensor) -> Verdict:
    """Why 4-d fakes can't be read in place: last stride not 1, others not whole 16 bytes, or expanded."""
    for tensor in tensors:
        unit = ALIGNMENT // tensor.dtype.itemsize
        if not statically_known_true(tensor.stride(-1) == 1):
            return "the head dimension is strided"
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
            if statically_known_true(size == 1):
                continue
            if statically_known_true(stride == 0):
                return "reads no expanded tensor"
            if not statically_known_true(stride % unit == 0):
                return f"a stride is not a multiple of {ALIGNMENT} bytes"
        if not statically_known_true(tensor.storage_offset() % unit == 0):
            return f"the first element is not aligned to {ALIGNMENT} bytes"
    return None


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, strides of its dimensions of size one made harmless; a copy only where its address or
    strides are not what :func:`layout_verdict` was told when the graph was compiled."""
    unit = ALIGNMENT // tensor.dtype.itemsize
    sizes, strides = tensor.shape, tensor.stride()
    odd = [stride % unit != 0 or stride == 0 for stride in strides[:-1]]
    if tensor.data_ptr() % ALIGNMENT or strides[-1] != 1 or any(o and n != 1 for o, n in zip(odd, sizes)):
        return tensor.clone(memory_format=torch.contiguous_format)
    if not any(odd):
        return tensor
    harmless = [sizes[-1] if o else stride for o, stride in zip(odd, strides[:-1])]
    return tensor.as_strided(sizes, [*harmless, 1])
