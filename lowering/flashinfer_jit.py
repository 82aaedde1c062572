"""What all kernels of FlashInfer share: the library's version, the cost of compiling a module, the current device."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

import torch

# What compiling one module took at most, measured on an H200 machine (16 to 81 s).
JIT_SECONDS = 81.0


def kernel_version(revision: str) -> str:
    """Our revision of a wrapper with the library's version behind it; alone where the library is missing."""
    try:
        return f"{revision} ({importlib.metadata.version('flashinfer-python')})"
    except importlib.metadata.PackageNotFoundError:
        return revision


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device the current one for a block, and the old one afterwards."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
