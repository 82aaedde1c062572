"""What :class:`lz_compile.sampling.Sampling` computes, as plain torch code: meaning, test oracle, and a kernel.

``lz_compile::filter_scores_v1`` runs that code as one operator which Inductor does not look into.  Its results are
eager's to the bit.  It is there for CUDA, where Inductor of PyTorch 2.11 fails on the cumulative sum of a top-p filter
(a TypeError in the code generation of split scans).

FlashInfer's filters are no candidates: its pivots come from sums in an order of its own, and ties with the last kept
probability all stay, so that the set it keeps is not always the warper's.  ``benchmarks/sampling.py`` times them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from lz_compile.compat import scans_long_rows
from lz_compile.lowering.emit import Emitter
from lz_compile.region import Kernel, Region, Verdict, Work
from lz_compile.sampling import Filter, Sampling

# Filters that one pass of a pointwise kernel computes, which Inductor fuses with what stands around them.
ELEMENTWISE = frozenset({"temperature", "repetition_penalty"})
# Filters that order their row.
ORDERING = frozenset({"top_p", "typical"})


@dataclass(frozen=True)
class Step:
    """A :class:`~lz_compile.sampling.Filter` of tensors."""

    kind: str
    value: Any
    keep: int = 1
    fill: float = -torch.inf
    ids: torch.Tensor | None = None


def filter_scores(scores: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
    """The filters in their order over ``scores`` ``[B, V]``; the same shape and dtype, contiguous.

    Bit for bit what the warpers of Transformers give for scores of the same dtype on the same device.
    """
    for step in steps:
        scores = FILTERS[step.kind](scores, step)
    return scores.contiguous()


def _temperature(scores: torch.Tensor, step: Step) -> torch.Tensor:
    return scores / step.value


def _repetition_penalty(scores: torch.Tensor, step: Step) -> torch.Tensor:
    assert step.ids is not None
    size = scores.shape[-1]
    ids = step.ids.clamp(max=size)
    padded = torch.nn.functional.pad(scores, (0, 1))
    seen = padded.gather(1, ids)
    seen = torch.where(seen < 0, seen * step.value, seen / step.value)
    return padded.scatter(1, ids, seen)[:, :size]


def _top_k(scores: torch.Tensor, step: Step) -> torch.Tensor:
    least = scores.topk(int(step.value))[0][:, -1:]
    return scores.masked_fill(scores < least, step.fill)


def _top_p(scores: torch.Tensor, step: Step) -> torch.Tensor:
    ascending, order = scores.sort()
    removed = ascending.softmax(-1).cumsum(-1) <= step.value
    removed[:, -step.keep :] = False
    return scores.masked_fill(removed.scatter(1, order, removed), step.fill)


def _min_p(scores: torch.Tensor, step: Step) -> torch.Tensor:
    weights = scores.softmax(-1)
    removed = weights < weights.amax(-1, keepdim=True) * step.value
    removed.scatter_(1, weights.topk(step.keep)[1], False)
    return scores.masked_fill(removed, step.fill)


def _epsilon(scores: torch.Tensor, step: Step) -> torch.Tensor:
    removed = (scores.softmax(-1) < step.value) & (scores < scores.topk(step.keep)[0][:, -1:])
    return scores.masked_fill(removed, step.fill)


def distance_from_entropy(scores: torch.Tensor) -> torch.Tensor:
    """How far the information of each score is from its row's entropy, ``[B, V]``."""
    logs = scores.log_softmax(-1)
    return (-logs - -(logs * logs.exp()).nansum(-1, keepdim=True)).abs()


def _typical(scores: torch.Tensor, step: Step) -> torch.Tensor:
    nearest, order = distance_from_entropy(scores).sort()
    below = (scores.gather(1, order).softmax(-1).cumsum(-1) < step.value).sum(1, keepdim=True)
    removed = nearest > nearest.gather(1, below.clamp_(max=scores.shape[1] - 1))
    removed[:, : step.keep] = False
    return scores.masked_fill(removed.scatter(1, order, removed), step.fill)


FILTERS: dict[str, Callable[[torch.Tensor, Step], torch.Tensor]] = {
    "temperature": _temperature,
    "repetition_penalty": _repetition_penalty,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "epsilon": _epsilon,
    "typical": _typical,
}


def sampling_meaning(region: Region) -> Callable[..., torch.Tensor]:
    """What a region of kind ``sampling`` computes, as a function of the values of ``region.inputs`` in their order."""
    op: Sampling = region.op

    def run(*values: Any) -> torch.Tensor:
        by_node = dict(zip(op.nodes(), values))

        def step(item: Filter) -> Step:
            value = by_node[item.value] if isinstance(item.value, fx.Node) else item.value
            return Step(item.kind, value, item.keep, item.fill, by_node[item.ids] if item.ids is not None else None)

        return filter_scores(values[0], [step(item) for item in op.filters])

    return run


# -- as operators


def arguments_of(op: Sampling) -> tuple[Any, ...]:
    """A chain as arguments of an operator: scores, ids, kinds, values, keeps, fills.  All values are numbers."""
    ids = [item.ids for item in op.filters if item.ids is not None]
    kinds = [str(item.kind) for item in op.filters]
    values = [item.value for item in op.filters]
    return op.scores, ids, kinds, values, [item.keep for item in op.filters], [item.fill for item in op.filters]


SCHEMA = "(Tensor scores, Tensor[] ids, str[] kinds, float[] values, SymInt[] keeps, float[] fills) -> Tensor"


def steps_of(
    ids: Sequence[torch.Tensor],
    kinds: Sequence[str],
    values: Sequence[float],
    keeps: Sequence[int],
    fills: Sequence[float],
) -> list[Step]:
    """The filters of :data:`SCHEMA`."""
    rest = list(ids)
    return [
        Step(kind, value, keep, fill, rest.pop(0) if kind == "repetition_penalty" else None)
        for kind, value, keep, fill in zip(kinds, values, keeps, fills)
    ]


def filter_scores_op(
    scores: torch.Tensor,
    ids: Sequence[torch.Tensor],
    kinds: Sequence[str],
    values: Sequence[float],
    keeps: Sequence[int],
    fills: Sequence[float],
) -> torch.Tensor:
    """:func:`filter_scores` as an operator."""
    out = filter_scores(scores, steps_of(ids, kinds, values, keeps, fills))
    return out.clone() if out is scores else out


def fake_scores(scores: torch.Tensor, *_: object) -> torch.Tensor:
    """Memory for the result: ``[B, V]``, contiguous."""
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


_library = torch.library.Library("lz_compile", "FRAGMENT")
_library.define("filter_scores_v1" + SCHEMA)
_library.impl("filter_scores_v1", filter_scores_op, "CompositeExplicitAutograd")
torch.library.register_fake("lz_compile::filter_scores_v1", fake_scores)


def filters_verdict(region: Region) -> Verdict:
    """What no kernel of ours takes."""
    op: Sampling = region.op
    if op.filters[-1].kind in ELEMENTWISE:
        return "the last filter is pointwise: Inductor fuses it with what follows"
    if any(isinstance(item.value, fx.Node) for item in op.filters):
        return "a filter's parameter is known only at run time"
    return None


def sampling_work(region: Region, efficiency: float, passes: int, launches: int) -> Work:
    """Scores that move ``passes`` times."""
    value = region.output.meta["val"]
    elements = 1
    for size in value.shape:
        elements *= size if isinstance(size, int) else 1
    return Work(10.0 * elements, float(passes * elements * value.dtype.itemsize), efficiency, launches)


def sampling_as_it_stood(region: Region) -> Work:
    """The filters as Inductor runs them: rows are sorted with their indices, by PyTorch's own sort.

    Where it cannot compile them at all, longer than anything.
    """
    value = region.output.meta["val"]
    ordering = [item for item in region.op.filters if item.kind in ORDERING]
    if ordering and not scans_long_rows(value.device):
        return Work(0.0, 1e18)
    return sampling_work(region, 0.5, passes=4 * len(region.op.filters) + 60 * len(ordering), launches=12)


def _supports(region: Region) -> Verdict:
    if region.output.meta["val"].device.type != "cuda":
        return "runs on CUDA"
    return filters_verdict(region)


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    return emitter.call(region.output, torch.ops.lz_compile.filter_scores_v1.default, *arguments_of(region.op))


def _work(region: Region) -> Work:
    return sampling_work(region, 0.4, passes=60, launches=10 * len(region.op.filters))


WARPERS = Kernel(
    name="aten.warpers",
    kind="sampling",
    version="1",
    supports=_supports,
    emit=_emit,
    cuda_graphs="PyTorch's own operators on sizes that the shapes give; nothing is read on the host",
    summary="the filters as eager runs them, in one opaque operator",
    work=_work,
    devices=("cuda",),
)
