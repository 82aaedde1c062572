"""Filters of next-token scores on the CPU, without a sort of indices.

``lz_compile::filter_scores_cpu_v1`` gives what :func:`lz_compile.lowering.sampling.filter_scores` gives, to the bit.
A filter that orders its row needs two things of the order: the values in it, whose softmax and cumulative sum PyTorch
computes as eager does, and the value at the boundary, which a comparison with the unsorted row turns into the kept set.
The sort of values alone is NumPy's, vectorised; -inf, which an earlier filter may have left nearly everywhere, is put
in front unsorted.  Of ties with the boundary a stable sort keeps the last ones, or for ``typical`` all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.fx as fx

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.sampling import (
    FILTERS,
    SCHEMA,
    Step,
    arguments_of,
    distance_from_entropy,
    fake_scores,
    filters_verdict,
    sampling_work,
    steps_of,
)
from lz_compile.region import Kernel, Region, Verdict, Work

try:
    import numpy as np
except ImportError:
    _missing: str | None = "NumPy is not installed"
else:
    _missing = None

_DTYPES = (torch.float32, torch.float64)


def filter_scores_cpu(
    scores: torch.Tensor,
    ids: Sequence[torch.Tensor],
    kinds: Sequence[str],
    values: Sequence[float],
    keeps: Sequence[int],
    fills: Sequence[float],
) -> torch.Tensor:
    """The filters over ``scores`` ``[B, V]``, float32 or float64."""
    out = scores
    for step in steps_of(ids, kinds, values, keeps, fills):
        out = _FILTERS.get(step.kind, FILTERS[step.kind])(out, step)
    return out.clone(memory_format=torch.contiguous_format) if out is scores else out.contiguous()


def _top_k(scores: torch.Tensor, step: Step) -> torch.Tensor:
    return _without(scores, scores < scores.topk(int(step.value))[0][:, -1:], step)


def _without(scores: torch.Tensor, removed: torch.Tensor, step: Step) -> torch.Tensor:
    return torch.where(removed, step.fill, scores)


def _top_p(scores: torch.Tensor, step: Step) -> torch.Tensor:
    ascending = _ascending(scores)
    count = _reached(ascending, step.value, right=True).clamp_(max=max(scores.shape[1] - step.keep, 0))
    least = ascending.gather(1, count)
    removed = scores < least
    ties = torch.where(count > 0, count - torch.searchsorted(ascending, least), 0)
    for row in ties.squeeze(1).nonzero().squeeze(1).tolist():
        equal = (scores[row] == least[row]).nonzero().squeeze(1)
        removed[row, equal[: int(ties[row])]] = True
    return _without(scores, removed, step)


def _reached(ordered: torch.Tensor, limit: float, right: bool) -> torch.Tensor:
    """How many cumulative probabilities of each row are below ``limit``, or with ``right`` at most that: ``[B, 1]``.

    They never fall, because PyTorch adds them in double precision from left to right; or all are NaN.
    """
    sums = ordered.softmax(-1).cumsum(-1)
    count = torch.searchsorted(sums, torch.full((len(sums), 1), limit, dtype=sums.dtype), right=right)
    return count.masked_fill_(sums[:, -1:].isnan(), 0)


def _ascending(scores: torch.Tensor) -> torch.Tensor:
    """Each row's values in ascending order, NaN last."""
    out = torch.empty(scores.shape, dtype=scores.dtype)
    _each(_sort_row, zip(scores.numpy(), out.numpy()))
    return out


def _sort_row(rows: tuple[Any, Any]) -> None:
    row, into = rows
    finite = row[row != -np.inf]
    finite.sort()
    start = len(row) - len(finite)
    into[:start] = -np.inf
    into[start:] = finite


def _each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """``work`` of each item, on as many threads as PyTorch uses: NumPy sorts without the interpreter's lock."""
    threads = torch.get_num_threads()
    if threads == 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, items))


def _min_p(scores: torch.Tensor, step: Step) -> torch.Tensor:
    weights = scores.softmax(-1)
    removed = weights < weights.amax(-1, keepdim=True) * step.value
    if step.keep > 1 or not 0 <= step.value <= 1:  # else the likeliest is never less likely than the limit
        removed.scatter_(1, weights.topk(step.keep)[1], False)
    return _without(scores, removed, step)


def _epsilon(scores: torch.Tensor, step: Step) -> torch.Tensor:
    least = scores.amax(-1, keepdim=True) if step.keep == 1 else scores.topk(step.keep)[0][:, -1:]
    return _without(scores, (scores.softmax(-1) < step.value) & (scores < least), step)


def _typical(scores: torch.Tensor, step: Step) -> torch.Tensor:
    distance = distance_from_entropy(scores)
    order = _order(distance)
    below = _reached(scores.gather(1, order), step.value, right=False)
    last = order.gather(1, below.clamp_(max=scores.shape[1] - 1))
    removed = distance > distance.gather(1, last)
    if step.keep > 1:
        removed.scatter_(1, order[:, : step.keep], False)
    return _without(scores, removed, step)


def _order(distance: torch.Tensor) -> torch.Tensor:
    """The indices that sort each row of float32 without negative numbers, ties in order of their indices, NaN last.

    Such numbers order as their bits do: a vectorised sort of bits and index in one integer is a stable sort.
    """
    size = distance.shape[1]
    keys = distance.numpy().view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(size, dtype=np.uint64)
    _each(lambda row: row.sort(), keys)
    return torch.from_numpy((keys & np.uint64(0xFFFFFFFF)).astype(np.int64))


_FILTERS: dict[str, Callable[[torch.Tensor, Step], torch.Tensor]] = {
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "epsilon": _epsilon,
    "typical": _typical,
}

_library = torch.library.Library("lz_compile", "FRAGMENT")
_library.define("filter_scores_cpu_v1" + SCHEMA)
_library.impl("filter_scores_cpu_v1", filter_scores_cpu, "CPU")
torch.library.register_fake("lz_compile::filter_scores_cpu_v1", fake_scores)


def _supports(region: Region) -> Verdict:
    value: Any = region.output.meta["val"]
    if value.device.type != "cpu":
        return "runs on the CPU"
    if _missing:
        return _missing
    if value.dtype not in _DTYPES:
        return f"does not take {value.dtype}"
    if value.dtype != torch.float32 and any(item.kind == "typical" for item in region.op.filters):
        return "orders distances from the entropy in float32"
    return filters_verdict(region)


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    return emitter.call(region.output, torch.ops.lz_compile.filter_scores_cpu_v1.default, *arguments_of(region.op))


def _work(region: Region) -> Work:
    return sampling_work(region, 0.3, passes=8 * len(region.op.filters), launches=4)


FILTERED = Kernel(
    name="cpu.filters",
    kind="sampling",
    version="1",
    supports=_supports,
    emit=_emit,
    summary="sorts values without their indices and finds the kept set by comparison; eager's sums to the bit",
    work=_work,
    devices=("cpu",),
)
