"""Attention as models commonly ask for it, as regions without data: what ``lz-compile kernels`` asks kernels about.

Enters: a device.  Leaves: for each :class:`Case` of :data:`CASES` the region that the patterns find in a small function
of fake tensors, so that ``Kernel.supports`` answers as it does while a model is compiled.  Nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lz_compile.region import Kernel, Region, Verdict

BATCH, HEADS, KV_HEADS, LENGTH = 2, 8, 2, 512
WINDOW = 128


@dataclass(frozen=True)
class Case:
    """One way to use attention: ``queries`` rows against :data:`LENGTH` keys in ``[B, N, H, D]`` memory.

    ``kind`` says which mask :func:`_attend` builds; ``extra`` is the shape and dtype of the value that the mask reads.
    """

    name: str
    kind: str = "causal"
    queries: int = LENGTH
    dtype: torch.dtype = torch.bfloat16
    head_size: int = 128
    value_head_size: int = 128
    kv_heads: int = KV_HEADS
    extra: tuple[tuple[int, ...], torch.dtype] | None = None


def _head_size(size: int) -> Case:
    return Case(f"head size {size}", head_size=size, value_head_size=size)


CASES: tuple[Case, ...] = (
    Case("decode", "length", queries=1, extra=((), torch.int64)),
    Case("decode, mask as input", "given", queries=1, extra=((BATCH, 1, 1, LENGTH), torch.bool)),
    Case("prefill, causal"),
    Case("prefill, window", "window"),
    Case("prefill, padding", "padding", extra=((BATCH, LENGTH), torch.bool)),
    Case("prefill, packed", "documents", extra=((BATCH, LENGTH), torch.int64)),
    Case("no mask", "none"),
    Case("dense mask", "given", extra=((BATCH, 1, LENGTH, LENGTH), torch.bool)),
    Case("additive mask", "given", extra=((BATCH, HEADS, LENGTH, LENGTH), torch.bfloat16)),
    Case("softcap", "softcap", kv_heads=HEADS),
    Case("float32", dtype=torch.float32),
    Case("float16", dtype=torch.float16),
    _head_size(64),
    _head_size(96),
    _head_size(256),
    Case("value head size 128 of 192", head_size=192, value_head_size=128, kv_heads=HEADS),
)


def region(case: Case, device: torch.device) -> Region:
    """The attention region of a case.

    Raises:
        RuntimeError: the patterns do not find it, or may not replace it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from lz_compile.aliasing import Aliases
    from lz_compile.normalize import module_path
    from lz_compile.patterns.attention import find_attention

    # Two functions, since kernels' reasons name the arguments.
    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _attend(case.kind, query, key, value)

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _attend(case.kind, query, key, value, mask)

    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((BATCH, case.queries, HEADS, case.head_size), case.dtype),
        ((BATCH, LENGTH, case.kv_heads, case.head_size), case.dtype),
        ((BATCH, LENGTH, case.kv_heads, case.value_head_size), case.dtype),
    ]
    shapes += [case.extra] if case.extra is not None else []
    with torch.no_grad(), FakeTensorMode():
        values = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        module = make_fx(masked if case.extra else plain, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    found = find_attention(module.graph, Aliases(module.graph), module_path)
    if len(found) != 1 or found[0].declined:
        raise RuntimeError(f"{case.name}: {found[0].declined if found else 'not recognised as attention'}")
    return found[0]


def _attend(kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
    """Attention over ``q`` ``[B, M, Hq, Dk]``, ``k`` ``[B, N, Hkv, Dk]``, ``v`` ``[B, N, Hkv, Dv]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    column = torch.arange(k.shape[2], device=q.device)[None]
    causal = column <= row
    if kind == "softcap":
        scores = 30.0 * torch.tanh(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 / 30.0)
        return scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
    grouped = q.shape[1] != k.shape[1]
    if kind in ("causal", "none"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=kind == "causal", enable_gqa=grouped)
    masks: dict[str, Callable[[], torch.Tensor]] = {
        "length": lambda: (column <= extra[0])[None, None],
        "given": lambda: extra[0],
        "window": lambda: causal & (column > row - WINDOW),
        "padding": lambda: causal & extra[0][:, None, None, :],
        "documents": lambda: causal & (extra[0][:, None, :, None] == extra[0][:, None, None, :]),
    }
    return F.scaled_dot_product_attention(q, k, v, masks[kind](), enable_gqa=grouped)


@dataclass(frozen=True)
class Support:
    """What a kernel says of the cases: ``takes`` are names, ``refuses`` maps the other names to the reason."""

    takes: list[str] = field(default_factory=list)
    refuses: dict[str, str] = field(default_factory=dict)


def regions(device: torch.device, cases: Sequence[Case] = CASES) -> dict[str, Region]:
    """The region of each case, by name."""
    return {case.name: region(case, device) for case in cases}


def support(kernel: Kernel, cases: dict[str, Region]) -> Support:
    """What a kernel for attention takes; a kernel that fails to answer refuses."""
    result = Support()
    for name, case in cases.items():
        why_not = _ask(kernel, case)
        if why_not is None:
            result.takes.append(name)
        else:
            result.refuses[name] = why_not
    return result


def _ask(kernel: Kernel, case: Region) -> Verdict:
    try:
        return kernel.supports(case)
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}".splitlines()[0]
