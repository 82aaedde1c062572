"""Leaving a region to Inductor: always possible, and what every kernel competes with."""

from __future__ import annotations

import dataclasses

from lz_compile.lowering.pointwise import pointwise_work
from lz_compile.lowering.projections import projections_work
from lz_compile.lowering.sampling import sampling_as_it_stood
from lz_compile.lowering.work import attention_work, moe_work, sdpa_planning
from lz_compile.mask import MaskForm
from lz_compile.moe import Moe
from lz_compile.projections import Projections
from lz_compile.region import Region, Work
from lz_compile.sampling import Sampling


def as_it_stood(region: Region) -> Work:
    """What Inductor does for a region that is left alone."""
    if region.attention is not None:
        return attention_as_it_stood(region)
    if isinstance(region.op, Moe):
        return moe_as_it_stood(region)
    if isinstance(region.op, Sampling):
        return sampling_as_it_stood(region)
    if isinstance(region.op, Projections):
        return projections_work(region, len(region.op.members))
    if region.op is not None:
        return pointwise_work(region, 0.8)
    return Work(0.0, 0.0)


def attention_as_it_stood(region: Region) -> Work:
    """Attention as Inductor runs it: every key is read, repeated heads and a materialised mask go through memory.

    A mask takes the fast backends of SDPA away; spelled out, the scores are stored and read in the softmax as well.
    """
    a = region.attention
    assert a is not None
    plain = a.mask.is_trivial or a.mask.is_causal
    form = a.mask if plain and region.pattern == "sdpa" else MaskForm()
    whole = attention_work(dataclasses.replace(region, attention=dataclasses.replace(a, mask=form)), 1.0)
    group = a.query_heads // a.kv_heads
    moved = whole.bytes * (1 + 2 * (group > 1))
    efficiency = 0.5 if plain else 0.2
    efficiency = efficiency if region.pattern == "sdpa" else 0.1
    return Work(whole.flops, moved, efficiency, launches=2, planning=sdpa_planning(region))


def moe_as_it_stood(region: Region) -> Work:
    """Experts as Inductor runs them: pairs are sorted by expert for a grouped product, or each pair's weights gathered.

    A grouped product of a few rows an expert reaches a third of the bandwidth: about 250 us for 8 experts of GPT-OSS's
    size in bfloat16 on an H200, against 83 us for reading their weights.
    """
    gathers = region.op.implementation == "batched_mm"
    return moe_work(region, efficiency=0.8 if gathers else 0.35, launches=8 if gathers else 16, copies_weights=gathers)
