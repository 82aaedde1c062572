"""Marks of tests for what a version of PyTorch lacks."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

needs_wrapped_interpreter = pytest.mark.skipif(
    not torch.cuda.is_available() and Version(torch.__version__) < Version("2.12"),
    reason="wrap_triton refuses kernels of Triton's interpreter until PyTorch 2.12",
)
