"""PyTorch's scaled_dot_product_attention with the arguments that a proof allows: no mask, ``is_causal``, grouped heads.

For ``aten.sdpa`` and ``aten.sdpa_masked`` the backend (flash, cuDNN, efficient, math) is PyTorch's choice inside
AOTAutograd.  Each backend is a kernel of its own, too, so that they compete by measurement: those call the operator
that SDPA would become, and take what PyTorch itself says the backend takes on this device.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile.gradients import needs_gradient
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.work import attention_work, sdpa_planning
from lz_compile.mask import MaskForm
from lz_compile.region import Attention, Kernel, Provider, Region, Verdict, Work

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


def _grouped(attention: Attention) -> bool:
    return attention.query_heads != attention.kv_heads


def takes_groups(device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Whether a fused backend of SDPA reads grouped heads itself.

    On CUDA flash does without a mask and, on Hopper, cuDNN with one, both in half precision; the memory-efficient
    backend does not, and for ``enable_gqa`` PyTorch would fall back to the unfused math.
    """
    if device.type != "cuda":
        return True
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    return not masked or torch.cuda.get_device_capability(device) >= (9, 0)


def _call(emitter: Emitter, region: Region, mask: fx.Node | None, is_causal: bool) -> fx.Node:
    a = region.attention
    assert a is not None
    query, key, value = emitter.inputs(region)
    tensor = query.meta["val"]
    extra = {}
    if _grouped(a):
        if takes_groups(tensor.device, tensor.dtype, mask is not None):
            extra["enable_gqa"] = True
        else:
            key, value = (_repeated(emitter, region, node) for node in (key, value))
    return emitter.call(region.output, _SDPA, query, key, value, mask, 0.0, is_causal, scale=float(a.scale), **extra)


def _repeated(emitter: Emitter, region: Region, node: fx.Node) -> fx.Node:
    """Keys or values with each head repeated for the query heads of its group."""
    a = region.attention
    assert a is not None
    group = a.query_heads // a.kv_heads
    wide = emitter.call(region.output, aten.unsqueeze.default, node, 2)
    wide = emitter.call(region.output, aten.expand.default, wide, [-1, -1, group, -1, -1])
    return emitter.call(region.output, aten.flatten.using_ints, wide, 1, 2)


def _supports_flags(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.softcap:
        return "has no softcap"
    if a.mask.is_causal and not a.scale > 0:
        return "the CPU's causal SDPA scales the -inf of its mask, too: NaN without a positive scale"
    if a.mask.is_trivial or a.mask.is_causal:
        return None
    if not a.mask.proved:
        return f"the mask is not proved: {a.mask.unproved}"
    return "takes no mask but causal from key 0"


def _emit_flags(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    return emitter.result(region, _call(emitter, region, None, a.mask.is_causal))


def _supports_mask(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.softcap:
        return "has no softcap"
    if a.mask_node is None:
        return "the mask is not a tensor of its own"
    mask = a.mask_node.meta["val"]
    if mask.dtype != torch.bool and mask.dtype != a.query.meta["val"].dtype:
        return f"the mask's dtype {mask.dtype} is not the query's"
    if region.pattern != "sdpa" and mask.is_cuda:
        return "on CUDA it gives zeros, not the softmax over the fill value, for a row without visible keys"
    return None


def _emit_mask(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None and a.mask_node is not None
    out = _call(emitter, region, a.mask_node, False)
    if region.pattern != "sdpa" and _may_be_infinite(a):
        out = _nan_where_empty(emitter, region, a.mask_node, out)
    return emitter.result(region, out)


def _may_be_infinite(a: Attention) -> bool:
    """Whether a row of the additive mask may be -inf throughout: the softmax then gives NaN where SDPA gives zeros."""
    return not a.mask.proved or a.mask.empty_row == "nan"


def _nan_where_empty(emitter: Emitter, region: Region, mask: fx.Node, out: fx.Node) -> fx.Node:
    def build() -> fx.Node:
        infinite = emitter.call(region.output, aten.eq.Scalar, mask, -math.inf)
        return emitter.call(region.output, aten.all.dim, infinite, -1, True)

    empty = emitter.shared(("empty rows", mask), build)
    return emitter.call(region.output, aten.masked_fill.Scalar, out, empty, math.nan)


def every_row_sees_a_key(form: MaskForm, queries: int, keys: int) -> bool:
    """Whether it is certain that no query is left without a visible key; False where only the run can tell.

    Decided for masks of constant diagonals alone: query ``q`` sees ``[max(0, q + lower), min(keys - 1, q + upper)]``.
    """
    if not isinstance(queries, int) or not isinstance(keys, int) or keys == 0:
        return False
    if not replace(form, upper=(), lower=()).is_trivial or not all(b.is_static for b in (*form.upper, *form.lower)):
        return False
    upper = min((bound.const for bound in form.upper), default=keys)
    lower = max((bound.const for bound in form.lower), default=-queries)
    return upper >= max(0, lower) and queries - 1 + lower <= keys - 1


# -- one kernel a backend


@dataclass(frozen=True)
class _Backend:
    """An operator behind SDPA.

    ``mask`` is the name of its argument for an additive mask, empty when it has none.  ``groups`` says whether it reads
    grouped heads itself, ``log_sumexp`` whether it has to be told to keep what the backward pass needs.  ``takes``
    answers for the device, dtype, sizes and strides of a call without regard to masks.
    """

    name: str
    operator: str
    takes: Callable[[Region], Verdict]
    mask: str = ""
    groups: bool = True
    log_sumexp: bool = False

    def supports(self, region: Region) -> Verdict:
        a = region.attention
        assert a is not None
        if a.softcap:
            return "has no softcap"
        if not a.scale > 0:  # the math backend takes its square root
            return "takes a positive scale"
        if not (a.mask.is_trivial or a.mask.is_causal):
            why_not = self._supports_mask(region)
            if why_not:
                return why_not
        return self.takes(region)

    def _supports_mask(self, region: Region) -> Verdict:
        a = region.attention
        assert a is not None
        if not self.mask:
            return "takes no mask but causal from key 0"
        if a.mask_node is None:
            return "the mask is not a tensor of its own"
        mask = a.mask_node.meta["val"]
        if mask.dtype not in (torch.bool, a.query.meta["val"].dtype):
            return f"the mask's dtype {mask.dtype} is not the query's"
        if not isinstance(a.keys, int):
            return "aligns a mask for a key length that is known when it is compiled"
        if every_row_sees_a_key(a.mask, a.queries, a.keys) or self._answers_empty_rows(region, mask):
            return None
        return f"does not give {a.mask.empty_row!r} for a row without visible keys, or only the run can tell"

    def _answers_empty_rows(self, region: Region, mask: torch.Tensor) -> bool:
        """Whether a row without visible keys gives what the program gives; see the table in patterns.empty_rows.

        The operator gets a boolean mask as one of -inf, for which every backend gives zeros, and an additive one as it
        is.  Then all agree in float16, and otherwise those whose row in the table is that of the program's backend.
        """
        a = region.attention
        assert a is not None
        wanted = a.mask.empty_row
        if region.pattern != "sdpa":
            return False
        if mask.dtype == torch.bool:
            return wanted == "zero" or (wanted == "unmasked" and self.name == "cudnn")
        if mask.device.type == "cpu" or mask.dtype == torch.float16:
            return True
        return wanted in (("mean", "safe mean") if self.name == "math" else ("zero",))

    def emit(self, emitter: Emitter, region: Region) -> fx.Node:
        a = region.attention
        assert a is not None
        query, key, value = emitter.inputs(region)
        arguments: dict[str, object] = {"is_causal": a.mask.is_causal, "scale": float(a.scale)}
        if self.mask:
            arguments[self.mask] = None if a.mask.is_trivial or a.mask.is_causal else _bias(emitter, region, self.name)
        if self.log_sumexp:
            arguments["compute_log_sumexp"] = needs_gradient(region.output)
        if _grouped(a) and not self.groups:
            key, value = (_repeated(emitter, region, node) for node in (key, value))
        if _grouped(a) and self.name == "math":
            arguments["enable_gqa"] = True
        # By name: positions differ between operators and may between versions.
        results = emitter.call(region.output, getattr(aten, self.operator).default, query, key, value, **arguments)
        return emitter.result(region, emitter.call(region.output, operator.getitem, results, 0))

    def work(self, region: Region, efficiency: float, launches: int) -> Work:
        """With a mask tensor, or spelled out, all pairs are computed; the mask, and scores in float32, are memory."""
        a = region.attention
        assert a is not None
        query, key, value = a.fake()
        batch, heads, queries, keys, item = *map(_hint, (*query.shape[:3], key.shape[2])), query.dtype.itemsize
        scores = batch * heads * queries * keys
        moved = 0
        if not (a.mask.is_trivial or a.mask.is_causal):
            moved += scores * item
        if self.name == "math":
            moved += 6 * scores * torch.float32.itemsize
        if moved:
            region = replace(region, attention=replace(a, mask=MaskForm()))
        if _grouped(a) and not self.groups:
            launches += 2
            moved += 2 * batch * heads * keys * (_hint(key.shape[3]) + _hint(value.shape[3])) * item
        work = attention_work(region, efficiency, launches)
        planning = sdpa_planning(region, cudnn=True) if self.name == "cudnn" else 0.0
        return replace(work, bytes=work.bytes + moved, planning=planning)

    def kernel(self, efficiency: float, launches: int, summary: str) -> Kernel:
        def work(region: Region) -> Work:
            return self.work(region, efficiency, launches)

        return Kernel(
            name=f"aten.{self.name}",
            kind="attention",
            version=torch.__version__,
            supports=self.supports,
            emit=self.emit,
            backward=True,
            cuda_graphs="reads no lengths",
            summary=summary,
            work=work,
        )


# What cuDNN gets for False in a boolean mask until PyTorch 2.11: too little to hide a whole row.
_CUDNN_HIDDEN = -65504.0
# The alignment that the memory-efficient kernel asks of an additive mask's rows, in elements.
_ALIGNMENT = 16


def _bias(emitter: Emitter, region: Region, backend: str) -> fx.Node:
    """The mask as an additive one, 4-d, broadcast as the backend wants it; once for the layers that share it."""
    a = region.attention
    assert a is not None and a.mask_node is not None
    mask = a.mask_node
    hidden = _CUDNN_HIDDEN if backend == "cudnn" and a.mask.empty_row == "unmasked" else -math.inf
    sizes = (str(a.batch), str(a.query_heads), str(a.queries), str(a.keys))
    key = ("bias", mask, emitter.aliases.version(mask, region.output), backend, hidden, sizes)
    return emitter.shared(key, lambda: _build_bias(emitter, region, mask, hidden, backend))


def _build_bias(emitter: Emitter, region: Region, mask: fx.Node, hidden: float, backend: str) -> fx.Node:
    def call(target: object, *args: object, **kwargs: object) -> fx.Node:
        return emitter.call(region.output, target, *args, **kwargs)

    a = region.attention
    assert a is not None
    query = emitter.inputs(region)[0]
    if mask.meta["val"].dtype == torch.bool:
        zero = call(aten.full.default, [], 0.0, dtype=query.meta["val"].dtype, device=query.meta["val"].device)
        mask = call(aten.where.ScalarOther, mask, zero, hidden)
    for _ in range(4 - mask.meta["val"].dim()):
        mask = call(aten.unsqueeze.default, mask, 0)
    if mask.meta["val"].shape[-1] != a.keys:
        mask = call(aten.expand.default, mask, [-1, -1, -1, a.keys])
    if backend not in ("efficient", "cudnn"):
        return mask
    if a.keys % _ALIGNMENT:
        mask = call(aten.constant_pad_nd.default, mask, [0, -a.keys % _ALIGNMENT])
        mask = call(aten.slice.Tensor, mask, 3, 0, a.keys)
    elif not _is_aligned(mask.meta["val"]):
        mask = call(aten.clone.default, mask, memory_format=torch.contiguous_format)
    batch, heads, queries = (_size(emitter, region, query, dim) for dim in range(3))
    return call(aten.expand.default, mask, [batch, heads if backend == "efficient" else -1, queries, -1])


def _is_aligned(mask: torch.Tensor) -> bool:
    *outer, last = mask.stride()
    return statically_known_true(last == 1) and all(statically_known_true(s % _ALIGNMENT == 0) for s in outer)


def _size(emitter: Emitter, region: Region, node: fx.Node, dim: int) -> int | fx.Node:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else emitter.call(region.output, aten.sym_size.int, node, dim)


def _takes_flash(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    q, _, v = a.fake()
    if q.device.type != "cuda":
        return "runs on CUDA"
    for size in (q.shape[-1], v.shape[-1]):
        if not isinstance(size, int) or size % 8:
            return f"head size {size} is not a multiple of 8"
    if a.mask.is_causal and not statically_known_true(a.queries == a.keys):
        return "its causal mask is aligned to the last key: takes as many queries as keys"
    return _ask_pytorch(region, torch.backends.cuda.can_use_flash_attention, grouped=True)


def _takes_cudnn(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.query.meta["val"].device.type != "cuda":
        return "runs on CUDA"
    return _ask_pytorch(region, torch.backends.cuda.can_use_cudnn_attention, grouped=True)


def _takes_efficient(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.query.meta["val"].device.type != "cuda":
        return "runs on CUDA"
    return _ask_pytorch(region, torch.backends.cuda.can_use_efficient_attention, grouped=False)


def _takes_math(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.query.meta["val"].device.type not in ("cuda", "cpu"):
        return "runs on CUDA and on the CPU"
    return None if torch.backends.cuda.math_sdp_enabled() else "switched off in torch.backends.cuda"


def _takes_flash_cpu(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    q, k, v = a.fake()
    if q.device.type != "cpu":
        return "runs on the CPU"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "switched off in torch.backends.cuda"
    if q.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return f"does not take {q.dtype}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return "takes one head size for query, key and value"
    if not all(statically_known_true(x.stride(-1) == 1) for x in (q, k, v)):
        return "the head dimension is strided"
    if any(statically_known_true(size == 0) for x in (q, k) for size in x.shape):
        return "takes no empty tensors"
    return None


def _ask_pytorch(region: Region, can_use: Callable[[torch.backends.cuda.SDPAParams], bool], grouped: bool) -> Verdict:
    """PyTorch's own answer for this device and these sizes, strides and dtypes (and what the user switched off).

    Symbolic sizes count with their value in the call that is being compiled, so that asking adds no guards.
    """
    a = region.attention
    assert a is not None
    query, key, value = a.fake()
    heads = a.kv_heads if grouped else a.query_heads
    masked = not (a.mask.is_trivial or a.mask.is_causal)
    with torch.no_grad(), a.query.meta["val"].fake_mode:
        try:
            q, k, v = (_with_numbers(x) for x in (query, key, value))
        except _Unknown as unknown:
            return str(unknown)
        if not statically_known_true(heads == a.kv_heads):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        bias = q.new_empty(q.shape[0], q.shape[1], q.shape[2], k.shape[2]) if masked else None
        gqa = q.shape[1] != k.shape[1]
        params = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, a.mask.is_causal, gqa)
        # Which device answers: PyTorch asks the current one.
        with torch.cuda.device(q.device):
            return None if can_use(params) else "PyTorch's backend does not take this device, dtype, size or layout"


class _Unknown(Exception):
    """A size without a value while compiling."""


def _with_numbers(value: torch.Tensor) -> torch.Tensor:
    sizes, strides = map(_hint, value.shape), map(_hint, value.stride())
    return torch.empty_strided(tuple(sizes), tuple(strides), dtype=value.dtype, device=value.device)


def _hint(size: int | torch.SymInt) -> int:
    """A size, or stride, as a number: of a symbolic one, what it is in the call that is being compiled."""
    if isinstance(size, int):
        return size
    if size.node.hint is None:
        raise _Unknown(f"the size {size} is not known when it is compiled")
    return int(size.node.hint)


def _work_of_sdpa(region: Region) -> Work:
    return replace(attention_work(region, 0.6), planning=sdpa_planning(region))


_EFFICIENT = _Backend(
    "efficient",
    "_scaled_dot_product_efficient_attention",
    _takes_efficient,
    mask="attn_bias",
    groups=False,
    log_sumexp=True,
)


def _work_of_sdpa_masked(region: Region) -> Work:
    return replace(_EFFICIENT.work(region, 0.2, 1), planning=sdpa_planning(region))


SDPA = Kernel(
    name="aten.sdpa",
    kind="attention",
    version=torch.__version__,
    supports=_supports_flags,
    emit=_emit_flags,
    backward=True,
    cuda_graphs="reads no lengths",
    summary="the proof drops the mask; PyTorch's SDPA reads keys once per head group",
    work=_work_of_sdpa,
)

SDPA_MASKED = Kernel(
    name="aten.sdpa_masked",
    kind="attention",
    version=torch.__version__,
    supports=_supports_mask,
    emit=_emit_mask,
    backward=True,
    cuda_graphs="reads no lengths",
    summary="the mask is honoured as it is, by PyTorch's SDPA",
    work=_work_of_sdpa_masked,
)

CUDNN = _Backend(
    "cudnn", "_scaled_dot_product_cudnn_attention", _takes_cudnn, mask="attn_bias", log_sumexp=True
).kernel(0.6, 1, "cuDNN's fused attention, through PyTorch")

FLASH = _Backend("flash", "_scaled_dot_product_flash_attention", _takes_flash).kernel(
    0.35, 1, "FlashAttention-2, as PyTorch ships it"
)

EFFICIENT = _EFFICIENT.kernel(0.2, 1, "memory-efficient attention, as PyTorch ships it")

FLASH_CPU = _Backend(
    "flash_cpu", "_scaled_dot_product_flash_attention_for_cpu", _takes_flash_cpu, mask="attn_mask"
).kernel(0.35, 1, "PyTorch's flash attention on the CPU")

MATH = _Backend("math", "_scaled_dot_product_attention_math", _takes_math, mask="attn_mask").kernel(
    0.05, 5, "attention spelled out: two products and a softmax"
)

PROVIDER = Provider("aten", (SDPA, CUDNN, FLASH, FLASH_CPU, SDPA_MASKED, EFFICIENT, MATH))
