"""What launching our Triton kernels asks for: block sizes, the number of SMs, the precision of products."""

from __future__ import annotations

import torch


def multiprocessors(device: torch.device) -> int:
    """The SM count; a constant under tracing.  An H200's where there is no GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(size: int, least: int = 16) -> int:
    """The next power of two, at least 16: the smallest side that ``tl.dot`` takes."""
    result = least
    while result < size:
        result *= 2
    return result


def dot_precision(dtype: torch.dtype) -> str:
    """Float32 inputs get float32 products, not TF32's; for other dtypes the setting says nothing."""
    return "ieee" if dtype == torch.float32 else "tf32"
