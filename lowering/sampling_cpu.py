"""Filters of next-token scores on the CPU, without a sort of indices.

``lz_compile::filter_scores_cpu_v1`` gives what :func:`lz_compile.lowering.sampling.filter_scores` gives, to the bit.
A top-p filter needs two things of its row's order: the values in it, whose softmax and cumulative sum PyTorch computes
as eager does, and the value at the boundary; a comparison with the unsorted row then gives the kept set.  The sort of
values alone is NumPy's, vectorised; -inf, which an earlier filter may have left nearly everywhere, is not sorted.

Which of several scores equal to the boundary go is PyTorch's sort to say, which is not stable on the CPU: such a row is
sorted with its indices, as eager does.  So is a ``typical`` filter's, where equal distances of different scores are
common and change the sums.
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
# A whole number of any vector registers and of any blocks in which PyTorch's softmax adds: that many zeros in front of
# a row leave its sums as they are, to the bit.
_BLOCK = 4096


def filter_scores_cpu(
    scores: torch.Tensor,
    ids: Sequence[torch.Tensor],
    kinds: Sequence[str],
    values: Sequence[float],
    keeps: Sequence[int],
    fills: Sequence[float],
) -> torch.Tensor:
    """The filters over ``scores`` ``[B, V]``, float32 or float64."""
    out = scores = scores.detach()  # NumPy takes no leaf that wants a gradient, whatever the mode
    for step in steps_of(ids, kinds, values, keeps, fills):
        out = _FILTERS.get(step.kind, FILTERS[step.kind])(out, step)
    return out.clone(memory_format=torch.contiguous_format) if out is scores else out.contiguous()


def _top_k(scores: torch.Tensor, step: Step) -> torch.Tensor:
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    least = scores.topk(int(step.value))[0][:, -1].numpy()
    _each(lambda row: _raise_to(scores[row], least[row], step.fill, out[row]), range(len(scores)))
    return out


def _raise_to(row: torch.Tensor, least: Any, fill: float, out: torch.Tensor) -> None:
    """``row`` with what is less than ``least`` replaced; NaN stays, and stays everything where ``least`` is NaN."""
    if least > -np.inf:
        torch.threshold(row, float(np.nextafter(least, least.dtype.type(-np.inf))), fill, out=out)
    else:
        out.copy_(row)


def _top_p(scores: torch.Tensor, step: Step) -> torch.Tensor:
    if step.value < 0:
        return FILTERS["top_p"](scores, step)
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    _each(lambda row: _top_p_row(scores[row], step, out[row]), range(len(scores)))
    return out


def _top_p_row(row: torch.Tensor, step: Step, out: torch.Tensor) -> None:
    values = row.numpy()
    end, hidden = _ascending(values)
    ascending = torch.from_numpy(end)
    sums = ascending.softmax(-1).cumsum(-1)
    # Sums never fall, for PyTorch adds in double precision from left to right; or all are NaN.
    if not len(end) or bool(sums[-1].isnan()):
        out.copy_(row)
        return
    limit = torch.tensor(step.value, dtype=sums.dtype)
    count = min(hidden + int(torch.searchsorted(sums, limit, right=True)), max(len(values) - step.keep, 0))
    least = end[count - hidden] if count >= hidden else end.dtype.type(-np.inf)
    less = hidden + int(np.searchsorted(end, least)) if count >= hidden else 0
    if count > less:
        out.copy_(row)
        out[row.sort()[1][:count]] = step.fill
    else:
        _raise_to(row, least, step.fill, out)


def _ascending(values: Any) -> tuple[Any, int]:
    """A row's values in ascending order, NaN last, without a number of -inf in front, whole blocks; and that number."""
    finite = values[values != -np.inf]
    finite.sort()
    hidden = (len(values) - len(finite)) // _BLOCK * _BLOCK if len(finite) else len(values)
    end = np.full(len(values) - hidden, -np.inf, values.dtype)
    end[len(end) - len(finite) :] = finite
    return end, hidden


def _each(work: Callable[[int], None], rows: Iterable[int]) -> None:
    """``work`` of each row, on as many threads as PyTorch uses: NumPy sorts without the interpreter's lock."""
    threads = torch.get_num_threads()
    if threads == 1:
        for row in rows:
            work(row)
        return
    inference = torch.is_inference_mode_enabled()  # a mode of each thread's own

    def run(row: int) -> None:
        with torch.inference_mode(inference):
            work(row)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, rows))


def _min_p(scores: torch.Tensor, step: Step) -> torch.Tensor:
    weights = scores.softmax(-1)
    removed = weights < weights.amax(-1, keepdim=True) * step.value
    if step.keep > 1 or not 0 <= step.value <= 1:  # else the likeliest is never less likely than the limit
        removed.scatter_(1, weights.topk(step.keep)[1], False)
    return torch.where(removed, step.fill, scores)


def _epsilon(scores: torch.Tensor, step: Step) -> torch.Tensor:
    least = scores.amax(-1, keepdim=True) if step.keep == 1 else scores.topk(step.keep)[0][:, -1:]
    return torch.where((scores.softmax(-1) < step.value) & (scores < least), step.fill, scores)


_FILTERS: dict[str, Callable[[torch.Tensor, Step], torch.Tensor]] = {
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "epsilon": _epsilon,
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
