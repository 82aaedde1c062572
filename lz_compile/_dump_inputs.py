"""What every dumped graph carries: its inputs, made of metadata.

:mod:`lz_compile.dump` copies the text below this docstring's imports into the files that it writes, so that each runs
on its own; nothing here may need lz_compile.
"""

import math
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import torch

# -- copied from here on


def tensor(
    name: str,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: str,
    values: str,
    number: float = 0,
    grad: bool = False,
) -> torch.Tensor:
    """A tensor of this layout with made-up values: the same ones in every run, seeded by its name.

    ``values``: "normal" (times ``number``), "near one" (0.5 to 1.5), "zeros", "ones" (True), "all" (``number``),
    "below" (random integers from 0 on that are less than ``number``), "steps" (``number``, ``number`` + 1, ... along
    the last dimension), or "weights.pt": as stored beside this file.
    """
    if values == "weights.pt":
        stored = torch.load(pathlib.Path(__file__).with_name(values), weights_only=True, mmap=True)[name]
        return stored.to(device).requires_grad_(grad)
    size = 1 + sum((n - 1) * step for n, step in zip(shape, strides)) if math.prod(shape) else 0
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    if values == "normal":
        flat = number * torch.randn(size, generator=generator, device=device)
    elif values == "near one":
        flat = 0.5 + torch.rand(size, generator=generator, device=device)
    elif values == "below":
        flat = torch.randint(int(number), (size,), generator=generator, device=device)
    else:
        flat = torch.full((size,), {"ones": 1, "all": int(number)}.get(values, 0), device=device)
    flat = flat.to(dtype)
    if values == "steps":
        rows = [1 if step == 0 else n for n, step in zip(shape, strides)]  # what is expanded is written once
        steps = torch.arange(rows[-1] if rows else 1, device=device) + int(number)
        flat.as_strided(rows, strides).copy_(steps if rows else steps[0])
    return flat.as_strided(shape, strides).requires_grad_(grad)


def parameter(*layout: Any, grad: bool = False) -> torch.Tensor:
    """A model's parameter."""
    return torch.nn.Parameter(tensor(*layout), requires_grad=grad)


def buffer(*layout: Any, grad: bool = False) -> torch.Tensor:
    """A model's buffer."""
    return torch.nn.Buffer(tensor(*layout).requires_grad_(grad))


def described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
