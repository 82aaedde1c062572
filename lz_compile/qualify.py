"""A kernel qualifies before it may win: its numbers against float64, its strides, its behaviour in a CUDA graph.

Enters: a specimen of a region and a kernel's module on it.  Leaves: a :class:`Verdict` with the evidence.

**Tolerance.**  With weights ``p`` and values ``v``, every way of computing ``sum(p v)`` in a dtype of unit roundoff
``u`` rounds each weight, each product's sum and the result: the error is at most a small multiple of ``u * sum(p |v|)``
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, ch. 3).  ``sum(p |v|)`` is computed in float64, for every
element.  The multiple is 4 for half precision (weights, result, and a query that was rounded after it was scaled), and
64 for float32, where no step is rounded further but exponentials of scores are only as exact as the scores' own
roundoff.  Inputs are normal with scores of deviation one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from lz_compile.specimen import NoSpecimen, Specimen

_UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_MULTIPLE = {torch.float16: 4.0, torch.bfloat16: 4.0, torch.float32: 64.0, torch.float64: 64.0}
# A float32 product on tensor cores, where the user allows it (torch.set_float32_matmul_precision): its factors have ten
# bits behind the point, as half precision has.
_TF32_ROUNDOFF = 2.0**-11
# Query rows of a batch row that are compared: blocks at the start, at the end and in between, unless all fit.
_BLOCK = 64
_BLOCKS = 4
# Products of queries and keys that one comparison may cost in float64.
_MOST_SCORES = {"cuda": 1 << 31, "cpu": 1 << 24}


@dataclass(frozen=True)
class Verdict:
    """``error`` is the largest error over its tolerance: at most 1.0 in a qualified kernel; NaN when it did not run.

    ``graph_safe`` is None when CUDA graphs were not asked for.  ``reason`` says why a kernel did not qualify.
    """

    qualified: bool
    reason: str = ""
    error: float = math.nan
    graph_safe: bool | None = None
    pool_bytes: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Inputs of a specimen with the mask that they mean, as the arguments of ``semantic.attend``."""

    inputs: list[Any]
    mask: tuple[torch.Tensor | None, ...]
    draw: tuple[str, int]


@dataclass(frozen=True)
class _Answer:
    """Part of the right result, queries ``first`` to ``last`` of a batch row: ``expected`` [1, Hq, last - first, Dv] in
    float64, and ``scale``, which is ``sum(p |v|)`` of each element."""

    row: int
    first: int
    last: int
    expected: torch.Tensor
    scale: torch.Tensor


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """The multiple of the unit roundoff that a result may be off by, relative to the sum of its terms' magnitudes."""
    if uses_tf32(dtype, device):
        return _MULTIPLE[torch.float16] * _TF32_ROUNDOFF
    return _MULTIPLE[dtype] * _UNIT_ROUNDOFF[dtype]


def largest_excess(
    got: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype | None = None
) -> float:
    """The largest error over its tolerance; infinity where NaN stands on one side only.

    ``expected`` and ``scale``, the sum of each element's terms by magnitude, are float64.  The tolerance is that of
    ``dtype``, by default the result's own.
    """
    dtype = dtype or got.dtype
    got = got.double()
    if not torch.equal(got.isnan(), expected.isnan()):
        return math.inf
    allowed = tolerance_of(dtype, got.device) * scale + torch.finfo(dtype).smallest_normal
    excess = ((got - expected).abs() / allowed).nan_to_num(nan=0.0, posinf=math.inf)
    return float(excess.max()) if excess.numel() else 0.0


class Reference:
    """What a specimen's outputs should be.  ``mask_module`` maps its inputs to (bounds, key mask, query documents, key
    documents, mask), see :func:`lz_compile.lowering.semantic.attend`."""

    def __init__(self, specimen: Specimen, mask_module: Callable[..., tuple[torch.Tensor | None, ...]]) -> None:
        self.specimen = specimen
        self.mask_module = mask_module
        self._answers: dict[tuple[str, int], list[_Answer]] = {}

    def problem(self, kind: Any, seed: int = 0) -> Problem:
        """Fresh inputs of a draw: what a kernel did to those of another call does not matter.

        Raises:
            NoSpecimen: inputs cannot be drawn, or the reference does not run on them.
        """
        inputs = self.specimen.draw(kind, self.visible, seed)
        try:
            problem = Problem(inputs, self.mask_module(*inputs), (kind, seed))
            if problem.draw not in self._answers:
                self._answers[problem.draw] = [self._part(problem, *part) for part in self._parts()]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NoSpecimen(f"the reference does not run: {one_line(error)}") from error
        return problem

    def visible(self, inputs: list[Any]) -> torch.Tensor:
        """The boolean mask [B, H or 1, M, N] of these inputs, by the mask's normal form."""
        from lz_compile.lowering.semantic import visible_keys

        batch, _, _, queries, keys = self.specimen.sizes
        chunk = self.specimen.attention.mask.chunk
        size = chunk.size if chunk is not None else 0
        bounds, key_mask, query_documents, key_documents, mask = self.mask_module(*inputs)
        hidden = (bounds, key_mask, query_documents, key_documents, mask, size)
        return visible_keys(*hidden, batch, queries, keys, self.specimen.device)

    def error(self, problem: Problem, output: torch.Tensor) -> float:
        """The largest error of an output over its tolerance; infinity where NaN stands on one side only."""
        worst = 0.0
        for answer in self._answers[problem.draw]:
            got = self._unstacked(output)[answer.row : answer.row + 1, :, answer.first : answer.last]
            worst = max(worst, largest_excess(got, answer.expected, answer.scale))
        return worst

    def _unstacked(self, value: torch.Tensor) -> torch.Tensor:
        stacked = self.specimen.attention.stacked
        if stacked is None:
            return value
        return value.unflatten(0, (-1, stacked)) if stacked else value.unsqueeze(0)

    def _parts(self) -> list[tuple[int, int, int]]:
        """(batch row, first query, last query + 1) of the parts that are compared; the ends are among them."""
        batch, heads, _, queries, keys = self.specimen.sizes
        block = min(_BLOCK, max(queries, 1))
        if queries <= block * _BLOCKS:
            starts = list(range(0, queries, block))
        else:
            starts = [0, (queries // 3) | 1, (2 * queries // 3) // block * block, queries - block]
        parts = [(row, s, min(s + block, queries)) for row in range(batch) for s in starts]
        affordable = max(_MOST_SCORES.get(self.specimen.device.type, 1 << 24) // max(heads * keys * block, 1), 4)
        if len(parts) > affordable:
            step = (len(parts) - 1) / (affordable - 1)
            parts = [parts[round(i * step)] for i in range(affordable)]
        return parts

    def _part(self, problem: Problem, row: int, first: int, last: int) -> _Answer:
        from lz_compile.lowering.semantic import CHUNK_SHIFT, LOWER, UPPER, attend

        a = self.specimen.attention
        query, key, value = (
            self._unstacked(problem.inputs[self.specimen.sources.index(node)]) for node in (a.query, a.key, a.value)
        )
        bounds, key_mask, query_documents, key_documents, mask = problem.mask
        rows, queries = slice(row, row + 1), slice(first, last)
        if bounds is not None:
            bounds = bounds[rows].clone()
            for column in (UPPER, LOWER, CHUNK_SHIFT):
                bounds[:, column] = (bounds[:, column].long() + first).clamp(-(1 << 30), 1 << 30).int()
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
            mask = mask[rows] if mask.shape[0] != 1 else mask
            mask = mask[:, :, queries] if mask.shape[2] != 1 else mask
            mask = mask if mask.dtype == torch.bool else _wide_bias(mask)
        arguments: tuple[Any, ...] = (
            bounds,
            key_mask[rows] if key_mask is not None else None,
            query_documents[rows, queries] if query_documents is not None else None,
            key_documents[rows] if key_documents is not None else None,
            mask,
            a.scale,
            a.softcap,
            a.mask.chunk.size if a.mask.chunk is not None else 0,
            _empty_row_code(a.mask.empty_row),
            problem.inputs[self.specimen.sources.index(a.sink)].double() if a.sink is not None else None,
        )
        q, k, v = (tensor[rows].double() for tensor in (query[:, :, queries], key, value))
        both = attend(q, k, torch.cat([v, v.abs()], -1), *arguments)
        expected, scale = both.tensor_split(2, -1)
        return _Answer(row, first, last, expected, scale)


def _wide_bias(mask: torch.Tensor) -> torch.Tensor:
    """An additive mask in float64, in which the least number of its dtype is the least number still."""
    least = mask == torch.finfo(mask.dtype).min
    return mask.double().masked_fill(least, torch.finfo(torch.float64).min)


def _empty_row_code(empty_row: str) -> int:
    from lz_compile.lowering.semantic import EMPTY_ROW

    return EMPTY_ROW[empty_row]


def uses_tf32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the user allows products of float32 to be rounded to TF32.

    ``torch.get_float32_matmul_precision`` raises where the newer setting was used.
    """
    return dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def qualify(reference: Reference, module: fx.GraphModule) -> Verdict:
    """Runs a kernel's module on two sets of inputs and compares strides and numbers.

    Errors of the kernel become a verdict, except ``torch.OutOfMemoryError``, which says nothing about it.

    Raises:
        NoSpecimen: the reference fails.
    """
    evidence: dict[str, Any] = {}
    worst = 0.0
    for kind in ("typical", "other"):
        problem = reference.problem(kind)
        try:
            output = module(*problem.inputs)
            if reference.specimen.device.type == "cuda":
                torch.cuda.synchronize()  # an error that comes late is the kernel's all the same
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            return Verdict(False, f"failed when called: {one_line(failure)}")
        wrong = _layout_error(module, output)
        if wrong:
            return Verdict(False, wrong)
        error = reference.error(problem, output)
        evidence[f"error {kind}"] = error
        worst = max(worst, error)
        if not error <= 1.0:
            return Verdict(False, _numerics_text(error, kind), error, evidence=evidence)
        if kind == "other" and _changed(problem, reference.problem(kind)):
            return Verdict(False, "writes into its inputs", error, evidence=evidence)
    return Verdict(True, error=worst, evidence=evidence)


def _changed(used: Problem, fresh: Problem) -> bool:
    pairs = [(a, b) for a, b in zip(used.inputs, fresh.inputs) if isinstance(a, torch.Tensor)]
    return not all(torch.equal(a, b) for a, b in pairs)


def _numerics_text(error: float, kind: str) -> str:
    amount = (
        "NaN or infinity where the reference has none, or the reverse"
        if math.isinf(error)
        else f"{error:.3g} times the tolerance"
    )
    return f"wrong result: {amount} ({kind} inputs, against float64)"


def _layout_error(module: fx.GraphModule, output: Any) -> str:
    """Whether the result has the strides that the fake kernel promises: Inductor builds on them."""
    promised = module.graph.output_node().args[0].meta["val"]  # type: ignore[union-attr]
    if not isinstance(output, torch.Tensor):
        return f"returned a {type(output).__name__} instead of a tensor"
    if output.shape != promised.shape or output.dtype != promised.dtype:
        return f"returned {output.dtype} {list(output.shape)}, its fake {promised.dtype} {list(promised.shape)}"
    strides = [(a, b) for size, a, b in zip(output.shape, output.stride(), promised.stride()) if size != 1]
    if output.numel() and any(a != b for a, b in strides):
        return f"returned strides {list(output.stride())}, its fake promises {list(promised.stride())}"
    return ""


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
