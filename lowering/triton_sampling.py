"""Our own Triton kernels of top-k and top-p filters as candidates, on CUDA.

The other filters of a chain run as eager runs them, by ``lz_compile::filter_scores_v1``.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
import torch.fx as fx

from lz_compile import config
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.sampling import arguments_of, filters_verdict, sampling_work
from lz_compile.region import Kernel, Region, Verdict, Work
from lz_compile.sampling import Filter, Sampling

VERSION = "1"
_SEARCHED = ("top_k", "top_p")
# A limit nearer to 0 or 1 is decided by roundings alone.
_LEAST_SHARE = 1e-5
_MOST_SHARE = 0.9999


def _supports(region: Region) -> Verdict:
    op: Sampling = region.op
    value: Any = region.output.meta["val"]
    if value.device.type != "cuda":
        return "runs on CUDA"
    from lz_compile.lowering import sampling_ops

    if missing := sampling_ops.available():
        return missing
    if value.dtype != torch.float32:
        return f"does not take {value.dtype}"
    scores = op.scores.meta["val"]
    if not all(isinstance(number, int) for number in (*scores.shape, *scores.stride())):
        return "takes static shapes"
    if scores.stride(1) != 1:
        return "the vocabulary is strided"
    if value.numel() >= 1 << 31:
        return "the scores span 2^31 elements"
    searched = [item for item in op.filters if item.kind in _SEARCHED]
    if not searched:
        return "searches the boundary of top-k and top-p"
    if why := filters_verdict(region):
        return why
    for item in searched:
        assert isinstance(item.value, float)
        if item.kind == "top_p" and not _LEAST_SHARE <= item.value <= _MOST_SHARE:
            return f"leaves out a share of {_LEAST_SHARE} to {_MOST_SHARE}"
        if item.kind == "top_p" and item.keep != 1:
            return "keeps one token at least"
    return None


def _supports_settled(region: Region) -> Verdict:
    if all(item.kind != "top_p" for item in region.op.filters):
        return "there is nothing to settle: triton.filters_unsettled is exact"
    return _supports(region)


def _supports_unsettled(region: Region) -> Verdict:
    exact = all(item.kind != "top_p" for item in region.op.filters)
    if not exact and not config.rounded_filters:
        return "may keep one token more or less than the warper; options={'rounded_filters': True} allows it"
    return _supports(region)


def _filtered(emitter: Emitter, region: Region, settled: bool) -> fx.Node:
    op: Sampling = region.op
    lz = torch.ops.lz_compile
    scores = op.scores
    for searched, group in itertools.groupby(op.filters, lambda item: item.kind in _SEARCHED):
        if not searched:
            part = Sampling(scores, tuple(group), "")
            scores = emitter.call(region.output, lz.filter_scores_v1.default, *arguments_of(part))
            continue
        for item in group:
            scores = _search(emitter, region.output, scores, item, settled)
    return scores


def _search(emitter: Emitter, anchor: fx.Node, scores: fx.Node, item: Filter, settled: bool) -> fx.Node:
    lz = torch.ops.lz_compile
    assert isinstance(item.value, float)
    if item.kind == "top_k":
        return emitter.call(anchor, lz.filter_top_k_v1.default, scores, int(item.value), item.fill)
    share = float(torch.tensor(item.value, dtype=torch.float32))  # as eager compares
    both = emitter.call(anchor, lz.filter_top_p_v1.default, scores, share, item.fill)
    out, doubts = (emitter.call(anchor, operator.getitem, both, i) for i in range(2))
    if not settled:
        return out
    return emitter.call(anchor, lz.settle_top_p_v1.default, scores, out, doubts, share, item.fill)


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    return _filtered(emitter, region, settled=True)


def _emit_unsettled(emitter: Emitter, region: Region) -> fx.Node:
    return _filtered(emitter, region, settled=False)


def _work(region: Region) -> Work:
    return sampling_work(region, 0.5, passes=11 * len(region.op.filters), launches=9 * len(region.op.filters))


def _first_call(region: Region) -> float:
    """Five kernels to compile, at one to two seconds each."""
    return 8.0


FILTERS = Kernel(
    name="triton.filters",
    kind="sampling",
    version=VERSION,
    supports=_supports_settled,
    emit=_emit,
    summary="searches the boundary of top-k and top-p, nothing is sorted; rows that rounding decides run as in eager",
    work=_work,
    first_call=_first_call,
    devices=("cuda",),
)

UNSETTLED = Kernel(
    name="triton.filters_unsettled",
    kind="sampling",
    version=VERSION,
    supports=_supports_unsettled,
    emit=_emit_unsettled,
    cuda_graphs="the grids depend on shapes only, boundaries stay on the device",
    summary="searches the boundary of top-k and top-p, nothing is sorted and nothing is read on the host",
    work=_work,
    first_call=_first_call,
    devices=("cuda",),
)
