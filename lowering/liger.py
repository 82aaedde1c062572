"""Liger Kernel's Triton kernels, forward only: RMSNorm and gated linear units.

RMSNorm has one kernel with three ways to round, of which two are meanings of :class:`~lz_compile.pointwise.RmsNorm`
exactly: ``llama`` casts before the weight, ``gemma`` after it.  (``none`` computes in the input's dtype, as no model
here does.)  SwiGLU takes gate and up apart, or packed in one tensor; GEGLU, with the tanh approximation, only apart.
Gate and up are walked with one stride, so halves of a packed tensor must not reach the kernels that take them apart.

Its rotary embedding is left out: that kernel rotates queries and keys where they lie.  As a function it would copy
them first, which moves twice the bytes that Inductor's own kernel moves, and its tables must have equal halves, which
a graph does not tell.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lz_compile.lowering import pointwise
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.fit import capability
from lz_compile.lowering.pointwise import as_rows, has_rows, pointwise_work
from lz_compile.pointwise import Glu, RmsNorm
from lz_compile.region import Kernel, Provider, Region, Verdict, Work

aten = torch.ops.aten

VERSION = "1"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A row is one block of a program.
_WIDEST = 65536

_library = torch.library.Library("lz_compile", "FRAGMENT")
_library.define("liger_rms_norm_v1(Tensor x, Tensor? weight, float eps, float offset, str casting) -> Tensor")
_library.define("liger_swiglu_v1(Tensor gate, Tensor up) -> Tensor")
_library.define("liger_geglu_v1(Tensor gate, Tensor up) -> Tensor")
_library.define("liger_swiglu_packed_v1(Tensor packed) -> Tensor")


@functools.cache
def installed() -> bool:
    """Whether Liger Kernel can be found; it is not imported."""
    return importlib.util.find_spec("liger_kernel") is not None


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


# -- the ops


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, casting: str) -> torch.Tensor:
    """RMSNorm of ``x`` ``[..., D]`` with ``weight`` ``[D]``; contiguous.

    ``casting`` is ``"llama"`` (to the dtype of ``x`` before the weight) or ``"gemma"`` (after it).  The library also
    writes a float32 ``[rows]`` that only a backward would read.
    """
    forward = _function("rms_norm", "rms_norm_forward")
    weight = weight.contiguous() if weight is not None else None
    return forward(as_rows(x), weight, eps, offset, casting, None)[0].view(x.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of one shape; contiguous."""
    return _function("swiglu", "swiglu_forward")(gate.contiguous(), up.contiguous())[2]


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up`` of one shape, with the tanh approximation; contiguous."""
    return _function("geglu", "geglu_forward")(gate.contiguous(), up.contiguous())[2]


def swiglu_packed(packed: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``packed`` ``[..., 2 * F]``, gate first; contiguous ``[..., F]``."""
    out = _function("swiglu", "swiglu_fused_gate_up_forward")(as_rows(packed))[1]
    return out.view(*packed.shape[:-1], packed.shape[-1] // 2)


for _name, _run in {
    "liger_rms_norm_v1": rms_norm,
    "liger_swiglu_v1": swiglu,
    "liger_geglu_v1": geglu,
    "liger_swiglu_packed_v1": swiglu_packed,
}.items():
    _library.impl(_name, _run, "CUDA")


@torch.library.register_fake("lz_compile::liger_rms_norm_v1")
@torch.library.register_fake("lz_compile::liger_swiglu_v1")
@torch.library.register_fake("lz_compile::liger_geglu_v1")
def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("lz_compile::liger_swiglu_packed_v1")
def _fake_packed(packed: torch.Tensor) -> torch.Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


# -- what fits


def _verdict(value: torch.Tensor, columns: Any) -> Verdict:
    if capability(value.device) is None:
        return "runs on CUDA"
    if not installed():
        return "Liger Kernel is not installed"
    if value.dtype not in _DTYPES:
        return f"does not take {value.dtype}"
    if not isinstance(columns, int) or columns > _WIDEST:
        return f"does not take rows of {columns}"
    return None


def _supports_rms_norm(region: Region) -> Verdict:
    op = region.op
    assert isinstance(op, RmsNorm)
    x = op.x.meta["val"]
    why_not = _verdict(x, x.shape[-1])
    if why_not:
        return why_not
    if op.weight is not None:
        weight = op.weight.meta["val"]
        if weight.dtype not in _DTYPES:
            return f"takes no weight of {weight.dtype}"
        if not statically_known_true(weight.stride(0) == 1):
            return "the weight is strided"
        if op.offset and op.cast == "before weight":
            return "adds to the weight in float32 only"
    return None if _swapped(x) is not None else "rows do not lie at one stride"


def _swapped(x: torch.Tensor) -> bool | None:
    """False when ``x`` has rows as it is, True when ``x.transpose(1, 2)`` has (heads of a projection), else None."""
    if has_rows(x):
        return False
    return True if x.dim() == 4 and has_rows(x.transpose(1, 2)) else None


def _supports_glu(region: Region) -> Verdict:
    op = region.op
    assert isinstance(op, Glu)
    gate, up = op.gate.meta["val"], op.up.meta["val"]
    why_not = _verdict(gate, gate.shape[-1])
    if why_not:
        return why_not
    if op.activation not in ("silu", "gelu_tanh"):
        return f"has no kernel for {op.activation}"
    if _is_packed(op):
        return None if has_rows(op.packed.meta["val"]) else "rows do not lie at one stride"  # type: ignore[union-attr]
    if not (gate.is_contiguous() and up.is_contiguous()):
        return "gate and up are not contiguous"
    return None


def _is_packed(op: Glu) -> bool:
    return op.packed is not None and op.activation == "silu"


# -- emission


def _emit_rms_norm(emitter: Emitter, region: Region) -> fx.Node:
    op, anchor = region.op, region.output
    assert isinstance(op, RmsNorm)
    casting = "llama" if op.cast == "before weight" else "gemma"
    swapped = _swapped(op.x.meta["val"])
    x = emitter.call(anchor, aten.transpose.int, op.x, 1, 2) if swapped else op.x
    kernel = torch.ops.lz_compile.liger_rms_norm_v1.default
    out = emitter.call(anchor, kernel, x, op.weight, float(op.eps), float(op.offset), casting)
    return emitter.call(anchor, aten.transpose.int, out, 1, 2) if swapped else out


def _emit_glu(emitter: Emitter, region: Region) -> fx.Node:
    op = region.op
    assert isinstance(op, Glu)
    ops = torch.ops.lz_compile
    if _is_packed(op):
        return emitter.call(region.output, ops.liger_swiglu_packed_v1.default, op.packed)
    kernel = ops.liger_swiglu_v1.default if op.activation == "silu" else ops.liger_geglu_v1.default
    return emitter.call(region.output, kernel, op.gate, op.up)


def _work(region: Region) -> Work:
    return pointwise_work(region, efficiency=0.7)


def _installed_version() -> str:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "0"


RMS_NORM = Kernel(
    name="liger.rms_norm",
    kind="rms_norm",
    version=f"{VERSION}+{_installed_version()}",
    supports=_supports_rms_norm,
    emit=_emit_rms_norm,
    cuda_graphs="reads tensors on the device only, the grid depends on shapes",
    summary="Liger's RMSNorm: one row a program, rounded where the model rounds",
    work=_work,
)

GLU = Kernel(
    name="liger.glu",
    kind="glu",
    version=f"{VERSION}+{_installed_version()}",
    supports=_supports_glu,
    emit=_emit_glu,
    cuda_graphs="reads tensors on the device only, the grid depends on shapes",
    summary="Liger's SwiGLU and GEGLU: one row a program",
    work=_work,
)


# -- the probe


def probe() -> dict[str, str]:
    """One small call of each kernel against its meaning.

    Raises:
        RuntimeError: a result is wrong; or what the library raises.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA device")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    ops = torch.ops.lz_compile
    x, w, gate, up, packed = random(5, 96), random(96), random(5, 96), random(5, 96), random(5, 192)
    pairs = {
        "rms_norm (llama)": (
            ops.liger_rms_norm_v1(x, w, 1e-6, 0.0, "llama"),
            pointwise.rms_norm(x, w, 1e-6, "before weight"),
        ),
        "rms_norm (gemma)": (
            ops.liger_rms_norm_v1(x, w, 1e-6, 1.0, "gemma"),
            pointwise.rms_norm(x, w, 1e-6, "after weight", 1.0),
        ),
        "SwiGLU": (ops.liger_swiglu_v1(gate, up), pointwise.glu(gate, up, "silu")),
        "GEGLU": (ops.liger_geglu_v1(gate, up), pointwise.glu(gate, up, "gelu_tanh")),
        "packed SwiGLU": (ops.liger_swiglu_packed_v1(packed), pointwise.glu_packed(packed, "silu")),
    }
    for name, (got, expected) in pairs.items():
        error = (got.float() - expected.float()).abs().max().item()
        if not error <= 2e-2 * expected.float().abs().max().item():
            raise RuntimeError(f"{name} is off by {error}")
    version = _installed_version()
    return {"rms_norm": version, "glu": version}


PROVIDER = Provider(
    name="liger",
    kernels=(RMS_NORM, GLU),
    distributions=("liger-kernel",),
    probe="lz_compile.lowering.liger:probe",
)
