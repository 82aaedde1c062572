"""Top-k and top-p filters by threshold search, as ``torch.library.triton_op`` ops.

``filter_top_k_v1`` and ``filter_top_p_v1`` launch the kernels of ``lowering.sampling_kernels``: one that finds each
row's largest score, eight passes that narrow the range of its boundary down to one value, and one that writes the
result.  They read sizes, strides and dtypes only, as CUDA graphs need.  Forward only.  Importing this module works
without Triton; ``available`` says what is missing.

**Which set is kept.**  Top-k compares bits: its set is always the warper's.  Top-p compares a sum with a limit, and the
warper's sum is rounded in float32 after every step of a sort, a softmax and a scan.  Ours is exact up to the roundings
of the exponentials; both leave out the same scores unless the limit falls between the two sums.  ``filter_top_p_v1``
says for each row whether that is possible: whether one of the two sums next to the boundary is nearer to the limit than
``DOUBT`` times the limit.  That is five standard deviations of a scan of 128 blocks, each of which rounds once
(``sqrt(128 / 3) * 2 ** -24`` of the limit at most).  ``settle_top_p_v1`` runs the warper itself for those rows.
"""

import itertools
from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from .launch import multiprocessors, power_of_two

try:
    # By name: torch finds the kernels of a triton_op in this module's names and puts their sources in its cache keys.
    from .sampling_kernels import apply_kernel, largest_kernel, pass_kernel
except ImportError as error:
    _missing: str | None = f"triton cannot be imported: {error}"
else:
    _missing = None

# Bits below those that each pass finds: 16 parts a pass, of 2 ** 32 values.
SHIFTS = (28, 24, 20, 16, 12, 8, 4, 0)
# Numbers that a pass leaves for each program; see ``sampling_kernels.STATE``.
_STATE = 18
# The most scores that a program looks at in one step, and the fewest.
_OUTER = 1024
_LEAST_OUTER = 128
_MOST_SPLITS = 64

Launchers = tuple[Any, Any, Any]


def available() -> str | None:
    """None when the kernels can be launched, else the reason why not."""
    return _missing


def splits_of(rows: int, size: int, processors: int) -> int:
    """Programs a row: a power of two, for about four programs of eight warps an SM."""
    splits = 1
    while splits < _MOST_SPLITS and rows * splits <= 2 * processors and size > 2 * splits * _LEAST_OUTER:
        splits *= 2
    return splits


@triton_op("lz_compile::filter_top_k_v1", mutates_args={})
def filter_top_k_v1(scores: torch.Tensor, top_k: int, fill: float) -> torch.Tensor:
    """``scores`` ``[B, V]`` in float32, last stride 1, without what is less than the ``top_k``-th largest of its row;
    the same shape, contiguous."""
    return _run(_wrapped(), scores, False, 0.0, scores.shape[1] - top_k, fill)[0]


@triton_op("lz_compile::filter_top_p_v1", mutates_args={})
def filter_top_p_v1(scores: torch.Tensor, share: float, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``scores`` ``[B, V]`` in float32, last stride 1, without the lowest of its row that have a cumulative probability
    of ``share`` or less, in (0, 1); the same shape, contiguous.

    And ``[B]`` in int32: 1 where the warper may keep one more or one less.
    """
    return _run(_wrapped(), scores, True, share, 0, fill)


def _wrapped() -> Launchers:
    return wrap_triton(largest_kernel), wrap_triton(pass_kernel), wrap_triton(apply_kernel)


@filter_top_k_v1.register_fake
def _fake_top_k(scores: torch.Tensor, top_k: int, fill: float) -> torch.Tensor:
    """The result's memory alone: Triton's interpreter, which tests use, could not run on fake tensors."""
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@filter_top_p_v1.register_fake
def _fake_top_p(scores: torch.Tensor, share: float, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    return out, scores.new_empty(scores.shape[0], dtype=torch.int32)


def _run(
    launchers: Launchers,
    scores: torch.Tensor,
    weighted: bool,
    share: float,
    fewer: int,
    fill: float,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``splits`` programs a row, by default as many as the device likes."""
    rows, size = scores.shape
    if splits is None:
        splits = splits_of(rows, size, multiprocessors(scores.device))
    grid = (splits, rows)
    find_largest, narrow, apply = launchers
    outer = min(_OUTER, power_of_two(-(-size // splits), _LEAST_OUTER))
    chunk = -(-size // (splits * outer)) * outer
    layout = {"CHUNK": chunk, "OUTER": outer, "SPLITS": splits, "num_warps": 8}
    facts = {"size": size, "stride": scores.stride(0), "share": share, "fewer": fewer, "WEIGHTED": weighted}
    largest = scores.new_empty((rows, splits))
    find_largest[grid](scores=scores, out=largest, size=size, stride=scores.stride(0), **layout)
    sums = torch.zeros((rows, splits, _STATE), device=scores.device, dtype=torch.float64)
    lows = torch.zeros(rows, device=scores.device, dtype=torch.int64)
    for wide, shift in itertools.pairwise((32, *SHIFTS)):
        new_sums, new_lows = torch.empty_like(sums), torch.empty_like(lows)
        narrow[grid](
            scores=scores,
            largest=largest,
            sums=sums,
            lows=lows,
            new_sums=new_sums,
            new_lows=new_lows,
            wide=wide,
            shift=shift,
            **facts,
            **layout,
        )
        sums, lows = new_sums, new_lows
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    doubts = torch.zeros(rows, device=scores.device, dtype=torch.int32)
    apply[grid](
        scores=scores,
        largest=largest,
        sums=sums,
        lows=lows,
        out=out,
        doubts=doubts,
        fill=fill,
        **facts,
        **layout,
    )
    return out, doubts


_library = torch.library.Library("lz_compile", "FRAGMENT")
_library.define("settle_top_p_v1(Tensor scores, Tensor out, Tensor doubts, float share, float fill) -> Tensor")


def settle_top_p(
    scores: torch.Tensor, out: torch.Tensor, doubts: torch.Tensor, share: float, fill: float
) -> torch.Tensor:
    """``out``, in doubtful rows as the warper has it; asks the device, so it is not for CUDA graphs."""
    rows = doubts.nonzero().squeeze(1)
    if not len(rows):
        return out.clone()
    # The sums of a row depend on how many rows there are: only the sort, which costs most, runs on the doubtful alone.
    ascending, order = scores[rows].sort()
    every = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    every[rows] = ascending
    removed = every.softmax(-1).cumsum(-1)[rows] <= share
    removed[:, -1:] = False
    settled = out.clone()
    settled[rows] = scores[rows].masked_fill(removed.scatter(1, order, removed), fill)
    return settled


_library.impl("settle_top_p_v1", settle_top_p, "CompositeExplicitAutograd")


@torch.library.register_fake("lz_compile::settle_top_p_v1")
def _fake_settled(scores: torch.Tensor, out: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)
