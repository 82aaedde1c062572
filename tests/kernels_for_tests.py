"""Attention kernels that are wrong, each in its own way, and right ones: what qualification has to tell apart.

All are plain torch behind ``torch.library`` operators with the arguments of ``semantic.attend``, on any device.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from lz_compile.lowering.semantic import CHUNK_ORIGIN, STOP, UPPER, attend, attend_output
from lz_compile.region import Kernel, Provider, Region, Work

Run = Callable[..., torch.Tensor]
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? bounds, Tensor? key_mask, Tensor? query_documents, "
    "Tensor? key_documents, Tensor? mask, float scale, float softcap, int chunk, int empty_row) -> Tensor"
)
_library = torch.library.Library("lz_compile_tests", "FRAGMENT")
_numbers = itertools.count()
# How often the operators ran, by kernel name.
calls: dict[str, int] = {}


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return attend_output(query, value)


def make(
    name: str,
    run: Run,
    *,
    version: str = "1",
    fake: Run = _fake,
    seconds: float | None = 1e-9,
    first_call: float = 0.0,
    cuda_graphs: str = "reads lengths on the device",
    supports: Callable[[Region], str | None] = lambda region: None,
) -> Kernel:
    """A kernel ``name`` that computes ``run(*arguments)``; ``seconds`` is what it claims to take (None: it does not
    say), so that it wins wherever nothing is measured."""
    op_name = f"{name.replace('.', '_')}_{next(_numbers)}"
    _library.define(op_name + _SCHEMA)

    def counted(*arguments: Any) -> torch.Tensor:
        calls[name] = calls.get(name, 0) + 1
        return run(*arguments)

    for key in ("CPU", "CUDA"):
        _library.impl(op_name, counted, key)
    torch.library.register_fake(f"lz_compile_tests::{op_name}", fake)
    op = getattr(torch.ops.lz_compile_tests, op_name).default

    def emit(emitter: Any, region: Region) -> fx.Node:
        return emitter.attend(region, op)

    def work(region: Region) -> Work:
        assert seconds is not None
        return Work(0.0, 0.0, 1.0, 0)

    return Kernel(
        name,
        "attention",
        version,
        supports,
        emit,
        cuda_graphs=cuda_graphs,
        summary="for tests",
        work=None if seconds is None else work,
        first_call=(lambda region: first_call) if first_call else None,
    )


def provider(*kernels: Kernel, third_party: bool = False) -> Provider:
    """The provider of kernels that share the first part of their names."""
    distributions = ("lz-compile-tests",) if third_party else ()
    return Provider(kernels[0].provider, kernels, distributions)


def right(*arguments: Any) -> torch.Tensor:
    return attend(*arguments)


def wrong_in_one_of_10000(*arguments: Any) -> torch.Tensor:
    out = attend(*arguments)
    flat = out.transpose(1, 2).reshape(-1)
    flat[7::10_000] += 0.25
    return flat.view_as(out.transpose(1, 2)).transpose(1, 2)


def remembers_the_first_length() -> Run:
    """Reads the lengths on the host once and uses them from then on, as a plan made on the host does."""
    seen: list[torch.Tensor] = []

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Any, *rest: Any) -> torch.Tensor:
        if bounds is not None:
            if not seen:
                seen.append(bounds[:, UPPER : STOP + 1].cpu())
            bounds = bounds.clone()
            bounds[:, UPPER : STOP + 1] = seen[0].to(bounds.device)
        return attend(query, key, value, bounds, *rest)

    return run


def plans_on_the_host() -> Run:
    """Right in every eager call; a captured graph keeps the lengths of the capture, as a wrapper with a plan does.

    The lengths are read while nothing is captured, and a capture uses the numbers of the call before it.
    """
    planned: list[list[int]] = []

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Any, *rest: Any) -> torch.Tensor:
        if bounds is not None:
            if not (bounds.is_cuda and torch.cuda.is_current_stream_capturing()):
                planned[:] = bounds.tolist()
            fixed = bounds.clone()
            for row, numbers in enumerate(planned):
                for column, number in enumerate(numbers[: CHUNK_ORIGIN + 1]):
                    fixed[row, column].fill_(number)
            bounds = fixed
        return attend(query, key, value, bounds, *rest)

    return run


def allocates_outside_the_pool() -> Run:
    """Takes its scratch on a stream of its own, which the capture does not follow."""
    streams: list[Any] = []

    def run(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        if query.is_cuda:
            if not streams:
                streams.append(torch.cuda.Stream())
            with torch.cuda.stream(streams[0]):
                scratch = torch.empty(4 << 20, dtype=torch.uint8, device=query.device)
            scratch.zero_()
        return attend(query, *rest)

    return run


def contiguous_without_saying_so(*arguments: Any) -> torch.Tensor:
    """Its fake promises the memory of [B, M, H, D]."""
    return attend(*arguments).contiguous()


def nan_in_rows_without_keys(*arguments: Any) -> torch.Tensor:
    return attend(*arguments[:-1], 2)


def ignores_the_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    return attend(query, key, value, None, None, None, None, None, *rest[5:])


def raises(*arguments: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nsecond line")


def returns_the_wrong_dtype(*arguments: Any) -> torch.Tensor:
    return attend(*arguments).double()


def scales_its_query_in_place(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = attend(query, *rest)
    query.mul_(0.5)
    return out


def sleeps(seconds: float) -> Run:
    def run(*arguments: Any) -> torch.Tensor:
        time.sleep(seconds)
        return attend(*arguments)

    return run


def runs_out_of_memory(*arguments: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("tried to allocate 80 GiB")
