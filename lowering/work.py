"""What kernels of attention and of experts execute and move, for the roofline estimate."""

from __future__ import annotations

from typing import Any

from lz_compile.mask import Bound, MaskForm
from lz_compile.moe import Moe
from lz_compile.region import Attention, Region, Work


def attention_work(region: Region, efficiency: float, launches: int = 1) -> Work:
    """Floating-point operations and bytes of a kernel that reads each visible key once per key/value head.

    Both products count, over the (query, key) pairs that static limits leave; a limit known at run time only is taken
    as half the keys.  Symbolic sizes count as their hints, without a guard.
    """
    a = region.attention
    assert a is not None
    query, _, value = a.fake()
    batch, heads, kv_heads = _size(query.shape[0]), _size(query.shape[1]), _size(value.shape[1])
    queries, keys = _size(query.shape[2]), _size(value.shape[2])
    sizes = _size(query.shape[3]) + _size(value.shape[3])
    pairs, touched = visible_pairs(a.mask, queries, keys)
    flops = 2.0 * batch * heads * pairs * sizes
    elements = batch * sizes * (heads * queries + kv_heads * touched)
    return Work(flops, float(elements * query.dtype.itemsize), efficiency, launches)


# cuDNN makes a plan for each combination of sizes: 10 to 20 ms, which the layers of a model share.
_PLAN = 5e-4


def sdpa_planning(region: Region, cudnn: bool = False) -> float:
    """:attr:`~lz_compile.region.Work.planning` of SDPA, which ``cudnn`` runs, or else what PyTorch picks."""
    a = region.attention
    assert a is not None
    return _PLAN if (cudnn or a.plans_sizes) and has_symbolic_sizes(a) else 0.0


def has_symbolic_sizes(a: Attention) -> bool:
    query, key, _ = a.fake()
    return any(not isinstance(size, int) for size in (*query.shape[:3], key.shape[2]))


def moe_work(region: Region, efficiency: float, launches: int, copies_weights: bool = False) -> Work:
    """Operations of all pairs of token and expert, and bytes of a mixture of experts that reads each expert's weights
    once, of at most as many experts as there are pairs.

    With ``copies_weights`` those of every pair are read, stored and read again.
    """
    op: Moe = region.op
    hidden, gate_up, down = (node.meta["val"] for node in (op.hidden, op.gate_up, op.down))
    tokens = _size(hidden.shape[0])
    pairs = tokens * op.top_k
    elements = sum(_size(weight.shape[1]) * _size(weight.shape[2]) for weight in (gate_up, down))
    read = 3 * pairs if copies_weights else min(op.experts, pairs)
    values = 2 * tokens * _size(hidden.shape[1]) * hidden.dtype.itemsize
    return Work(2.0 * pairs * elements, float(read * elements * gate_up.dtype.itemsize + values), efficiency, launches)


def visible_pairs(mask: MaskForm, queries: int, keys: int) -> tuple[float, float]:
    """How many (query, key) pairs a mask leaves, and how many keys some query sees; of one batch row and head."""
    reach = keys / 2 if any(not bound.is_static for bound in (*mask.upper, *mask.stop)) else float(keys)
    first = max([0, *_static(mask.start)])
    last = min([keys, *_static(mask.stop)])
    upper = min(_static(mask.upper), default=keys)
    lower = max(_static(mask.lower), default=-queries)
    shown = _clamped_sum(upper + 1, queries, first, last) - _clamped_sum(lower, queries, first, last)
    seen = min(last, queries + upper) - max(first, lower)
    return max(shown, 0) * reach / keys if keys else 0.0, max(0.0, min(float(seen), reach))


def _clamped_sum(offset: int, count: int, low: int, high: int) -> int:
    """The sum of ``min(max(q + offset, low), high)`` over ``0 <= q < count``."""
    if high <= low:
        return low * count
    below = min(max(low - offset, 0), count)
    above = min(max(count - (high - offset), 0), count - below)
    between = count - below - above
    return low * below + high * above + between * (below + offset) + between * (between - 1) // 2


def _static(bounds: tuple[Bound, ...]) -> list[int]:
    return [bound.const for bound in bounds if bound.is_static]


def _size(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 1
