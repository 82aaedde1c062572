"""Attention on the CPU that never touches a key that no query may see.

``lz_compile::attend_cpu_v2`` takes the arguments of :func:`lz_compile.lowering.semantic.attend`, reads the bounds on
the host (which costs nothing on the CPU), cuts keys and values to the visible range, and runs PyTorch's flash
attention on what is left: grouped queries share their keys, causal and fully visible ranges need no mask, rows of
different length run one by one, long queries with a window run block by block. An attention sink needs the sums of
exponentials, which only the flash operator gives: with it each row is scaled by ``1 / (1 + exp(sink - logsumexp))``.
No such operator caps scores: for a few queries a softcap runs as two products and a softmax over the visible range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.fx as fx
import torch.nn.functional as F

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.semantic import (
    CHUNK_ORIGIN,
    CHUNK_SHIFT,
    EMPTY_ROW,
    HOLES,
    LOWER,
    START,
    STOP,
    UPPER,
    attend_output,
    visible_keys,
)
from lz_compile.region import Kernel, Region, Verdict

VERSION = "2"
# Queries that a block of a windowed attention holds: enough to keep the matrix units busy, few enough to skip keys.
_BLOCK = 256
# Running rows one by one pays when it leaves out at least this share of the keys.
_WORTH_SPLITTING = 0.2
# Queries that a decode step has at most, with drafted tokens.
_FEW = 16

_library = torch.library.Library("lz_compile", "FRAGMENT")
_library.define(
    "attend_cpu_v2(Tensor query, Tensor key, Tensor value, Tensor? bounds, Tensor? key_mask, Tensor? query_documents, "
    "Tensor? key_documents, Tensor? mask, float scale, float softcap, int chunk, int empty_row, Tensor? sink=None) "
    "-> Tensor"
)


@dataclass(frozen=True)
class _Logits:
    """What becomes of the products of queries and keys, and the logit that joins them."""

    scale: float
    softcap: float = 0.0
    sink: torch.Tensor | None = None


@dataclass(frozen=True)
class _Job:
    """One call: rows [first, last) of the batch, queries [query, query_end), and the mask beside the bounds."""

    rows: slice
    queries: slice


def attend_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    query_documents: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    chunk: int,
    empty_row: int,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`lz_compile.lowering.semantic.attend`."""
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    limits = bounds.tolist() if bounds is not None else [[1 << 30, -(1 << 30), 0, keys, 0, 0, 0, 0]] * batch
    out = attend_output(query, value)
    if not out.numel():
        return out
    if sink is not None:
        empty_row = EMPTY_ROW["zero"]
    logits = _Logits(scale, softcap, sink)
    everything = _Mask(limits, key_mask, query_documents, key_documents, mask, chunk)
    for job in _jobs(limits, batch, queries, keys, chunk):
        _run(query, key, value, out, everything, job, logits, empty_row)
    return out


def _jobs(limits: list[list[int]], batch: int, queries: int, keys: int, chunk: int) -> list[_Job]:
    """Cuts the work so that few keys are read in vain."""
    whole = slice(0, queries)
    ranges = [_key_range(row, whole, keys, chunk) for row in limits]
    together = max(r[1] for r in ranges) - min(r[0] for r in ranges)
    apart = sum(max(0, last - first) for first, last in ranges)
    windowed = queries > _BLOCK and any(row[LOWER] > -queries or chunk for row in limits)
    same = all(row == limits[0] for row in limits)
    if same or apart >= (1 - _WORTH_SPLITTING) * together * batch:
        groups = [slice(0, batch)]
    else:
        groups = [slice(row, row + 1) for row in range(batch)]
    if queries > 1 and not same and all(not row[HOLES] for row in limits):
        groups = [slice(row, row + 1) for row in range(batch)]
    blocks = [whole]
    if windowed:
        blocks = [slice(first, min(queries, first + _BLOCK)) for first in range(0, queries, _BLOCK)]
    return [_Job(rows, block) for rows in groups for block in blocks]


def _key_range(row: list[int], queries: slice, keys: int, chunk: int) -> tuple[int, int]:
    """First and one past the last key that queries [start, stop) of a row may see; empty when first >= last."""
    first = max(0, row[START], queries.start + row[LOWER])
    last = min(keys, row[STOP], queries.stop + row[UPPER])
    if chunk:
        origin, shift = row[CHUNK_ORIGIN], row[CHUNK_SHIFT]
        first = max(first, (queries.start + shift - origin) // chunk * chunk + origin)
        last = min(last, ((queries.stop - 1 + shift - origin) // chunk + 1) * chunk + origin)
    return first, last


@dataclass(frozen=True)
class _Mask:
    """Everything that hides keys."""

    limits: list[list[int]]
    key_mask: torch.Tensor | None
    query_documents: torch.Tensor | None
    key_documents: torch.Tensor | None
    mask: torch.Tensor | None
    chunk: int

    def has_tensors(self, rows: slice) -> bool:
        """Whether anything beside the bounds hides keys of these rows."""
        holes = self.key_mask is not None and any(row[HOLES] for row in self.limits[rows])
        return holes or self.query_documents is not None or self.mask is not None

    def visible(self, rows: slice, queries: slice, keys: slice, device: torch.device) -> torch.Tensor:
        """bool [rows, H or 1, queries, keys]."""
        limits = torch.tensor(self.limits[rows], dtype=torch.int32, device=device)
        limits[:, UPPER] = (limits[:, UPPER].to(torch.int64) + queries.start - keys.start).clamp(max=1 << 30)
        limits[:, LOWER] = (limits[:, LOWER].to(torch.int64) + queries.start - keys.start).clamp(min=-(1 << 30))
        limits[:, START] -= keys.start
        limits[:, STOP] -= keys.start
        limits[:, CHUNK_SHIFT] += queries.start - keys.start
        limits[:, CHUNK_ORIGIN] -= keys.start
        return visible_keys(
            limits,
            self.key_mask[rows, keys] if self.key_mask is not None else None,
            self.query_documents[rows, queries] if self.query_documents is not None else None,
            self.key_documents[rows, keys] if self.key_documents is not None else None,
            self.cut(rows, queries, keys),
            self.chunk,
            rows.stop - rows.start,
            queries.stop - queries.start,
            keys.stop - keys.start,
            device,
        )

    def cut(self, rows: slice, queries: slice, keys: slice) -> torch.Tensor | None:
        """The dense mask's part, dimensions of size one kept."""
        if self.mask is None:
            return None
        part = self.mask
        while part.dim() < 4:
            part = part.unsqueeze(0)
        part = part[rows] if part.shape[0] != 1 else part
        part = part[:, :, queries] if part.shape[2] != 1 else part
        return part[:, :, :, keys] if part.shape[3] != 1 else part.expand(-1, -1, -1, keys.stop - keys.start)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    hidden: _Mask,
    job: _Job,
    logits: _Logits,
    empty_row: int,
) -> None:
    rows, queries = job.rows, job.queries
    keys_total = key.shape[2]
    ranges = [_key_range(row, queries, keys_total, hidden.chunk) for row in hidden.limits[rows]]
    first, last = min(r[0] for r in ranges), max(r[1] for r in ranges)
    if first >= last:
        _fill_empty(query, key, value, out, hidden, rows, queries, logits, empty_row)
        return
    plain = not hidden.has_tensors(rows) and all(row == hidden.limits[rows][0] for row in hidden.limits[rows])
    if plain:
        row = hidden.limits[rows][0]
        queries = _trim(query, key, value, out, hidden, job, row, first, logits, empty_row)
        first, last = _key_range(row, queries, keys_total, hidden.chunk)
        if first >= last:
            _fill_empty(query, key, value, out, hidden, rows, queries, logits, empty_row)
            return
        kind = _simple_kind(row, queries, first, last, hidden.chunk)
        if kind is False or (kind and logits.scale > 0):  # SDPA scales the -inf of its causal mask, too
            part = slice(first, last)
            result = _sdpa(query[rows, :, queries], key[rows, :, part], value[rows, :, part], None, kind, logits)
            out[rows, :, queries] = result
            return
    keys = slice(first, last)
    visible = hidden.visible(rows, queries, keys, query.device)
    parts = (query[rows, :, queries], key[rows, :, keys], value[rows, :, keys])
    mask = visible
    if hidden.mask is not None and hidden.mask.dtype != torch.bool:
        bias = hidden.cut(rows, queries, keys)
        assert bias is not None
        # A bias of higher precision keeps it: 200.5 in bfloat16 is 200.
        wide = torch.promote_types(bias.dtype, query.dtype)
        parts = tuple(part.to(wide) for part in parts)  # type: ignore[assignment]
        mask = torch.where(visible, bias.to(wide), torch.tensor(float("-inf"), dtype=wide))
    out[rows, :, queries] = _sdpa(*parts, mask, False, logits)
    empty = ~visible.any(-1)
    if empty_row and bool(empty.any()):
        fallback = _empty_rows(query, key, value, hidden, rows, queries, logits, empty_row)
        out[rows, :, queries] = torch.where(empty[..., None], fallback, out[rows, :, queries])


def _trim(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    hidden: _Mask,
    job: _Job,
    row: list[int],
    first: int,
    logits: _Logits,
    empty_row: int,
) -> slice:
    """Queries in front of the first visible key see nothing: they are filled here, the others are returned."""
    blind = min(job.queries.stop, first - row[UPPER])
    if blind <= job.queries.start:
        return job.queries
    _fill_empty(query, key, value, out, hidden, job.rows, slice(job.queries.start, blind), logits, empty_row)
    return slice(blind, job.queries.stop)


def _simple_kind(row: list[int], queries: slice, first: int, last: int, chunk: int) -> bool | None:
    """False when every query sees [first, last), True when that is causal from ``first``, None when it is neither."""
    if queries.stop <= queries.start or (chunk and queries.stop - queries.start > 1):
        return None
    if queries.stop - 1 + row[LOWER] > first:
        return None
    if queries.start + row[UPPER] >= last - 1:
        return False
    return True if queries.start + row[UPPER] == first else None


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    logits: _Logits,
) -> torch.Tensor:
    """PyTorch's SDPA with grouped heads; for one query the group's heads become queries of one head."""
    if logits.softcap:
        return _spelled_out(query, key, value, mask, is_causal, logits)
    if logits.sink is not None:
        return _with_sink(query, key, value, mask, is_causal, logits)
    scale = logits.scale
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads == kv_heads:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    if query.shape[2] == 1 and (mask is None or mask.shape[1] == 1):
        batch, _, _, size = query.shape
        packed = query.reshape(batch, kv_heads, heads // kv_heads, size)
        result = F.scaled_dot_product_attention(packed, key, value, mask, scale=scale)
        return result.reshape(batch, heads, 1, value.shape[-1])
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True)


def _with_sink(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    logits: _Logits,
) -> torch.Tensor:
    """As :func:`_sdpa`, with one more logit for each head in the denominator."""
    if query.shape[-1] != value.shape[-1] or any(part.stride(-1) != 1 for part in (query, key, value)):
        return _spelled_out(query, key, value, mask, is_causal, logits)
    assert logits.sink is not None
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype).masked_fill(~mask, float("-inf"))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    result, sums = flash(query, key, value, 0.0, is_causal, attn_mask=mask, scale=logits.scale)
    sink = logits.sink.to(torch.promote_types(query.dtype, torch.float32))[None, :, None]
    return (result * torch.sigmoid(sums - sink)[..., None]).to(query.dtype)


def _spelled_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    logits: _Logits,
) -> torch.Tensor:
    """As :func:`_sdpa`, as two products and a softmax in float32 at least; a group's heads share their keys."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    compute = torch.promote_types(query.dtype, torch.float32)
    q = query.to(compute) * (logits.scale / logits.softcap if logits.softcap else logits.scale)
    q = q.reshape(batch, kv_heads, heads // kv_heads * queries, query.shape[-1])
    scores = (q @ key.to(compute).transpose(-1, -2)).view(batch, heads, queries, keys)
    if logits.softcap:
        scores = scores.tanh_().mul_(logits.softcap)
    if is_causal:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    empty = None
    if mask is not None and mask.dtype == torch.bool:
        scores, empty = scores.masked_fill_(~mask, float("-inf")), ~mask.any(-1, keepdim=True)
    elif mask is not None:
        scores, empty = scores.add_(mask), (mask == float("-inf")).all(-1, keepdim=True)
    if logits.sink is not None:
        column = logits.sink.to(compute)[None, :, None, None].expand(batch, heads, queries, 1)
        weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
        weights = weights if empty is None else weights.masked_fill_(empty, 0.0)
    weights = weights.reshape(batch, kv_heads, -1, keys)
    return (weights @ value.to(compute)).view(batch, heads, queries, value.shape[-1]).to(query.dtype)


def _fill_empty(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    hidden: _Mask,
    rows: slice,
    queries: slice,
    logits: _Logits,
    empty_row: int,
) -> None:
    if queries.stop > queries.start:
        out[rows, :, queries] = _empty_rows(query, key, value, hidden, rows, queries, logits, empty_row)


def _empty_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: _Mask,
    rows: slice,
    queries: slice,
    logits: _Logits,
    empty_row: int,
) -> torch.Tensor | float:
    """What queries that see no key give (see ``empty_row`` of :func:`lz_compile.lowering.semantic.attend`)."""
    if empty_row == EMPTY_ROW["zero"]:
        return torch.zeros((), dtype=query.dtype)
    if empty_row == EMPTY_ROW["nan"]:
        return torch.full((), float("nan"), dtype=query.dtype)
    if empty_row == EMPTY_ROW["unmasked"]:
        return _sdpa(query[rows, :, queries], key[rows], value[rows], None, False, replace(logits, sink=None))
    group = query.shape[1] // value.shape[1]
    compute = torch.promote_types(query.dtype, torch.float32)
    if hidden.mask is not None and hidden.mask.dtype != torch.bool:
        bias = hidden.cut(rows, queries, slice(0, key.shape[2]))
        assert bias is not None
        k = key[rows].to(compute).repeat_interleave(group, 1)
        scores = query[rows, :, queries].to(compute) @ k.transpose(-1, -2) * logits.scale
        if logits.softcap:
            scores = torch.tanh(scores / logits.softcap) * logits.softcap
        scores = scores + bias.to(compute)
        weights = torch.softmax(scores, -1)
        if empty_row == EMPTY_ROW["safe mean"]:
            weights = weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
        return (weights @ value[rows].to(compute).repeat_interleave(group, 1)).to(query.dtype)
    mean = value[rows].to(compute).mean(2, keepdim=True).to(query.dtype)
    return mean.repeat_interleave(group, 1)


_library.impl("attend_cpu_v2", attend_cpu, "CPU")


@torch.library.register_fake("lz_compile::attend_cpu_v2")
def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return attend_output(query, value)


def _supports(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.query.meta["val"].device.type != "cpu":
        return "runs on the CPU"
    if a.softcap and not _few_queries(region):
        return f"caps the scores of up to {_FEW} queries"
    if a.sink is None and (a.mask.is_trivial or a.mask.is_causal):
        return "there is nothing to skip"
    if not a.mask.proved and not _few_queries(region):  # those learn from any mask which keys no row may see
        return f"the mask is not proved: {a.mask.unproved}"
    if len(a.mask.documents) > 1:
        return "takes one document term"
    return None


def _few_queries(region: Region) -> bool:
    a = region.attention
    assert a is not None
    return isinstance(a.queries, int) and a.queries <= _FEW


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    return emitter.attend(region, torch.ops.lz_compile.attend_cpu_v2.default)


RANGES = Kernel(
    name="cpu.ranges",
    kind="attention",
    version=VERSION,
    supports=_supports,
    emit=_emit,
    summary="reads only keys that some query may see; grouped heads share them",
    sinks=True,
)
