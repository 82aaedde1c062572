"""A model of plain attention blocks, and "layerzero" without Inductor's code generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F


class Block(torch.nn.Module):
    """Causal attention over one linear layer's q, k and v, with a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(32)
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


class Blocks(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@contextlib.contextmanager
def without_inductor() -> Iterator[None]:
    """The rewritten graph runs as it is."""
    torch._dynamo.reset()
    with mock.patch("torch._inductor.compile_fx.compile_fx", lambda module, inputs, **_: module.forward):
        yield
