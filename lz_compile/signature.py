"""What a measurement of a region holds for: every region with the same text may use it.

Batch, heads and head sizes count exactly.  Lengths are put in buckets, four an octave, so that a prompt of 1010 tokens
uses what was measured for 1024.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from lz_compile.mask import Bound, MaskForm, Read
from lz_compile.pointwise_specimen import PointwiseSpecimen
from lz_compile.qualify import uses_tf32
from lz_compile.region import Region
from lz_compile.specimen import Layout, NoSpecimen, Specimen, hint


def bucket(length: int) -> int:
    """``length`` up to 16, else the next of 2^n * (1, 1.25, 1.5, 1.75)."""
    if length <= 16:
        return length
    step = 1 << (length - 1).bit_length() - 3
    return -(-length // step) * step


def signature(specimen: Specimen) -> str:
    """The region as canonical JSON text, without names of graph values."""
    region, a = specimen.region, specimen.attention
    batch, query_heads, kv_heads, queries, keys = specimen.sizes
    facts: dict[str, Any] = {
        "kind": region.kind,
        "batch": batch,
        "heads": [query_heads, kv_heads],
        "queries": bucket(queries),
        "keys": bucket(keys),
        "head_size": [hint(a.query.meta["val"].shape[-1]), hint(a.value.meta["val"].shape[-1])],
        "dtype": str(a.query.meta["val"].dtype).removeprefix("torch."),
        "layouts": [_layout_text(Layout.of(n.meta["val"])) for n in (a.query, a.key, a.value)],
        "output": "any" if specimen.copied else _layout_text(specimen.output),
        "stacked": a.stacked is not None,
        "softcap": bool(a.softcap),
        "positive_scale": a.scale > 0,
        "mask": _mask_facts(a.mask),
        "device": specimen.device.type,
    }
    if uses_tf32(a.query.meta["val"].dtype, specimen.device):
        facts["tf32"] = True  # other products, and another tolerance
    if a.sink is not None:
        facts["sink"] = True
    if a.mask_node is not None:
        facts["mask_tensor"] = _tensor_facts(a.mask_node)
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def signature_of(region: Region, copied: bool) -> str | None:
    """The signature of a region, or None when it cannot be run on its own."""
    try:
        if region.attention is not None:
            return signature(Specimen.of(region, copied))
        return _pointwise_signature(PointwiseSpecimen.of(region, copied))
    except NoSpecimen:
        return None


def _pointwise_signature(specimen: PointwiseSpecimen) -> str:
    """The region as canonical JSON text; all dimensions but the last are put in buckets."""
    region = specimen.region
    numbers = {
        item.name: value
        for item in dataclasses.fields(region.op)
        if isinstance(value := getattr(region.op, item.name), (str, int, float, bool)) and item.name != "eps"
    }
    tensors = []
    for node in specimen.sources:
        layout = specimen.layouts[node]
        assert isinstance(layout, Layout)
        sizes = [*map(bucket, layout.sizes[:-1]), *layout.sizes[-1:]]
        tensors.append([str(layout.dtype).removeprefix("torch."), sizes, _layout_text(layout)])
    facts = {
        "kind": region.kind,
        "op": numbers,
        "inputs": [specimen.sources.index(node) for node in region.inputs],
        "tensors": tensors,
        "output": "any" if specimen.copied else _layout_text(specimen.output),
        "device": specimen.device.type,
    }
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def _layout_text(layout: Layout) -> str:
    """The dimensions from the outermost to the innermost in memory, ``0213`` for a transposed [B, M, H, D]; with a
    dash where memory is skipped, such as in a slice of a packed projection, and ``x`` for an expanded dimension."""
    order = sorted(range(len(layout.sizes)), key=lambda d: (-layout.strides[d], d))
    text, expected = "", 1
    for dim in reversed(order):
        size, stride = layout.sizes[dim], layout.strides[dim]
        if size == 1:
            text = "1" + text
            continue
        gap = "x" if stride == 0 else "-" if stride != expected else ""
        text = f"{'abcdefgh'[dim]}{gap}" + text
        expected = stride * size
    return text


def _tensor_facts(node: Any) -> list[Any]:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return ["number"]
    return [str(value.dtype).removeprefix("torch."), [1 if hint(size) == 1 else 0 for size in value.shape]]


def _mask_facts(form: MaskForm) -> dict[str, Any]:
    facts: dict[str, Any] = {"empty_row": form.empty_row}
    for name in ("upper", "lower", "start", "stop"):
        bounds = [_bound_facts(bound) for bound in getattr(form, name)]
        if bounds:
            facts[name] = bounds
    if form.chunk is not None:
        facts["chunk"] = [bucket(form.chunk.size), _bound_facts(form.chunk.offset), _bound_facts(form.chunk.origin)]
    for name in ("key_padding", "key_hidden"):
        reads = [_read_facts(read) for read in getattr(form, name)]
        if reads:
            facts[name] = reads
    if form.documents:
        facts["documents"] = [[_read_facts(d.queries), _read_facts(d.keys)] for d in form.documents]
    for name in ("dense", "bias"):
        if getattr(form, name) is not None:
            facts[name] = _tensor_facts(getattr(form, name))
    return facts


def _bound_facts(bound: Bound) -> Any:
    if bound.is_static:
        return bucket(bound.const) if bound.const >= 0 else -bucket(-bound.const)
    return [[coefficient, _read_facts(read)] for coefficient, read in bound.reads]


def _read_facts(read: Read) -> str:
    return "[" + ",".join(str(index.axis or "") for index in read.index) + "]"
