"""Liger Kernel: which regions fit, what reaches the library (with a stand-in where it is missing), and its own kernels
in Triton's interpreter or on a GPU where it is installed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lz_compile.lowering import liger, pointwise
from swap import swap

KERNELS = liger.PROVIDER.kernels
OPS = {"rms_norm", "swiglu", "geglu", "swiglu_packed"}

# What the library's functions document, in plain PyTorch.  Like its kernels, those that take gate and up apart walk
# both, and the result, with the result's row stride.
STAND_IN = {
    "rms_norm": """
import torch

CALLS = []


def rms_norm_forward(X, W, eps, offset, casting_mode, row_mode):
    CALLS.append(dict(pointer=X.data_ptr(), shape=tuple(X.shape), casting=casting_mode, offset=offset))
    assert X.dim() == 2 and X.stride(1) == 1 and (W is None or W.stride(0) == 1)
    x = X.float()
    root = torch.rsqrt((x * x).mean(-1) + eps)
    y = x * root[:, None]
    if casting_mode == "llama":
        y = y.to(X.dtype)
    else:
        assert casting_mode == "gemma"
        W = W.float() if W is not None else None
    y = y if W is None else y * (offset + W.float())
    return y.to(X.dtype), X, root, 0, 0, casting_mode
""",
    "swiglu": """
import torch

CALLS = []


def walked(x, c):
    assert x.shape == c.shape
    return x.view(c.shape).as_strided(c.shape, (c.stride(0), 1))


def swiglu_forward(a, b, gate_multiplier=1.0):
    CALLS.append("apart")
    c = torch.empty_like(a.view(-1, a.shape[-1]))
    x, y = (walked(part.view(c.shape), c) for part in (a, b))
    c.copy_(torch.nn.functional.silu(x.float()).to(y.dtype) * y)
    return a, b, c.view(a.shape)


def swiglu_fused_gate_up_forward(y):
    CALLS.append(y.data_ptr())
    gate, up = y.view(-1, y.shape[-1]).chunk(2, -1)
    return y, (torch.nn.functional.silu(gate.float()).to(up.dtype) * up).view(*y.shape[:-1], -1)
""",
    "geglu": """
import torch
from .swiglu import walked


def geglu_forward(a, b):
    c = torch.empty_like(a.view(-1, a.shape[-1]))
    x, y = (walked(part.view(c.shape), c) for part in (a, b))
    c.copy_(torch.nn.functional.gelu(x.float(), approximate="tanh").to(y.dtype) * y)
    return a, b, c.view(a.shape)
""",
}


@pytest.fixture(scope="module")
def _on_the_cpu() -> Iterator[None]:
    library = torch.library.Library("lz_compile", "FRAGMENT")
    for name in OPS:
        library.impl(f"liger_{name}_v1", getattr(liger, name), "CPU")
    yield
    library._destroy()


def _forget() -> None:
    liger.installed.cache_clear()
    liger._function.cache_clear()
    for name in [name for name in sys.modules if name == "liger_kernel" or name.startswith("liger_kernel.")]:
        del sys.modules[name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _on_the_cpu: None) -> Iterator[None]:
    ops = tmp_path / "liger_kernel" / "ops"
    ops.mkdir(parents=True)
    for place in (ops.parent, ops):
        (place / "__init__.py").write_text("")
    for name, text in STAND_IN.items():
        (ops / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(liger, "capability", lambda device: (9, 0))
    _forget()
    yield
    _forget()


def calls(module: str) -> list[Any]:
    return sys.modules[f"liger_kernel.ops.{module}"].CALLS  # type: ignore[attr-defined]


def norm(x: torch.Tensor, w: torch.Tensor, cast: str = "before weight", offset: float = 0.0) -> torch.Tensor:
    """The spellings of Llama, OLMo 2 and Gemma."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    if cast == "before weight":
        return w * y.to(x.dtype)
    return (y * (offset + w.float() if offset else w)).to(x.dtype)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


@pytest.mark.parametrize(
    "cast, offset, casting",
    [("before weight", 0.0, "llama"), ("after weight", 0.0, "gemma"), ("after weight", 1.0, "gemma")],
)
def test_each_meaning_of_rmsnorm_gets_its_casting_mode(stand_in: None, cast: str, offset: float, casting: str) -> None:
    x, w = random(2, 5, 32), random(32)
    compiled, backend = swap(lambda x, w: norm(x, w, cast, offset), KERNELS)
    got = compiled(x, w)
    assert backend.verdicts == [None] and backend.replaced == 1
    torch.testing.assert_close(got, norm(x, w, cast, offset), atol=0, rtol=0)
    (call,) = calls("rms_norm")
    assert (call["casting"], call["offset"], call["shape"]) == (casting, offset, (10, 32))


def test_heads_of_a_projection_are_normalised_where_they_lie(stand_in: None) -> None:
    projection, w = random(2, 5, 4 * 16), random(16)
    for fn in (
        lambda p, w: norm(p.view(2, 5, 4, 16).transpose(1, 2), w),
        lambda p, w: norm(p.view(2, 5, 4, 16), w),
    ):
        compiled, backend = swap(fn, KERNELS)
        got, expected = compiled(projection, w), fn(projection, w)
        assert backend.verdicts == [None] and calls("rms_norm")[-1]["pointer"] == projection.data_ptr()
        torch.testing.assert_close(got, expected, atol=0, rtol=0)
        assert got.stride() == expected.stride()
        assert torch.ops.aten.clone.default not in backend.targets()


def test_a_slice_of_a_packed_projection_is_normalised_where_it_lies(stand_in: None) -> None:
    def fn(p, w):
        return norm(p[..., 64:96], w)

    p, w = random(2, 5, 128), random(32)
    compiled, backend = swap(fn, KERNELS)
    torch.testing.assert_close(compiled(p, w), fn(p, w), atol=0, rtol=0)
    assert backend.verdicts == [None]
    assert calls("rms_norm")[-1]["pointer"] == p.data_ptr() + 64 * p.itemsize


@pytest.mark.parametrize(
    "fn, verdict",
    [
        (lambda x, w: F.rms_norm(x.double(), (32,), w.double(), 1e-5), "does not take torch.float64"),
        (lambda x, w: norm(x.permute(2, 1, 0), w[:2]), "rows do not lie at one stride"),
        (lambda x, w: norm(x[..., ::2], w[:16]), "rows do not lie at one stride"),
        (lambda x, w: norm(x[..., :16], w[::2]), "the weight is strided"),
    ],
)
def test_norms_that_do_not_fit_say_why(stand_in: None, fn: Callable[..., Any], verdict: str) -> None:
    x, w = random(2, 5, 32), random(32)
    compiled, backend = swap(fn, KERNELS)
    torch.testing.assert_close(compiled(x, w), fn(x, w))
    assert backend.verdicts == [verdict] and backend.replaced == 0


UNITS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda a, b: F.silu(a) * b,
    "gelu_tanh": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "gelu": lambda a, b: F.gelu(a) * b,
    "relu": lambda a, b: b * F.relu(a),
}


@pytest.mark.parametrize("name", list(UNITS))
def test_gate_and_up_apart_fit_silu_and_the_tanh_gelu(stand_in: None, name: str) -> None:
    a, b = random(2, 5, 32), random(2, 5, 32, seed=1)
    compiled, backend = swap(UNITS[name], KERNELS)
    torch.testing.assert_close(compiled(a, b), UNITS[name](a, b), atol=2e-2, rtol=2e-2)
    expected = None if name in ("silu", "gelu_tanh") else f"has no kernel for {name}"
    assert backend.verdicts == [expected]


def test_a_packed_projection_is_read_where_it_lies_by_swiglu_only(stand_in: None) -> None:
    packed = random(2, 5, 64)
    for name, verdict in (("silu", None), ("gelu_tanh", "gate and up are not contiguous")):
        fn = lambda x, unit=UNITS[name]: unit(*x.chunk(2, -1))  # noqa: E731
        compiled, backend = swap(fn, KERNELS)
        torch.testing.assert_close(compiled(packed), fn(packed), atol=2e-2, rtol=2e-2)
        assert backend.verdicts == [verdict]
    assert calls("swiglu") == [packed.data_ptr()]


def test_halves_in_the_other_order_are_not_walked_with_a_wrong_stride(stand_in: None) -> None:
    def fn(x):
        up, gate = x.chunk(2, -1)
        return F.silu(gate) * up

    compiled, backend = swap(fn, KERNELS)
    x = random(2, 5, 64)
    torch.testing.assert_close(compiled(x), fn(x))
    assert backend.verdicts == ["gate and up are not contiguous"]


def test_strided_tensors_that_reach_an_op_are_copied_before_the_library_walks_them(stand_in: None) -> None:
    """Strides may differ from what was promised when the graph was compiled."""
    gate, up = random(10, 64).chunk(2, -1)
    got = torch.ops.lz_compile.liger_swiglu_v1(gate, up)
    torch.testing.assert_close(got, UNITS["silu"](gate, up), atol=2e-2, rtol=2e-2)
    x = random(32, 10).t()
    torch.testing.assert_close(torch.ops.lz_compile.liger_rms_norm_v1(x, None, 1e-5, 0.0, "llama"), norm(x, 1))


def test_fakes_have_the_strides_of_the_results(stand_in: None) -> None:
    ops = torch.ops.lz_compile
    x, packed = random(2, 4, 5, 16).transpose(1, 2), random(2, 5, 64)
    for op, args in (
        (ops.liger_rms_norm_v1, (x, random(16), 1e-5, 0.0, "llama")),
        (ops.liger_swiglu_v1, (x, x)),
        (ops.liger_geglu_v1, (x, x)),
        (ops.liger_swiglu_packed_v1, (packed,)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
        real, fake = op(*args), op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        assert real.shape == fake.shape and real.stride() == fake.stride()


def test_on_the_cpu_no_region_fits() -> None:
    compiled, backend = swap(lambda x, w: norm(x, w), KERNELS)
    compiled(random(4, 32), random(32))
    assert backend.verdicts == ["runs on CUDA"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_the_probe_fails() -> None:
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        liger.probe()


# -- the library's own kernels


def _interpreter_runs_the_library() -> bool:
    return liger.installed() and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter has no libdevice, and leaves Python floats as they are."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            handle = interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    norms, units = (importlib.import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "geglu"))
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(units, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def _compare(dtype: torch.dtype, device: str, tolerance: float) -> None:
    x, w, up = (random(*shape, dtype=dtype, device=device) for shape in ((6, 96), (96,), (6, 96)))
    packed = random(6, 192, dtype=dtype, device=device)
    wide = random(6, 200, dtype=dtype, device=device)[:, :96]
    pairs = []
    for casting, cast, offset in (
        ("llama", "before weight", 0.0),
        ("gemma", "after weight", 0.0),
        ("gemma", "after weight", 1.0),
    ):
        for value, weight in ((x, w), (x, None), (wide, w)):
            expected = pointwise.rms_norm(value, weight, 1e-5, cast, offset)  # type: ignore[arg-type]
            pairs.append((liger.rms_norm(value, weight, 1e-5, offset, casting), expected))
    pairs.append((liger.swiglu(x, up), pointwise.glu(x, up, "silu")))
    pairs.append((liger.geglu(x, up), pointwise.glu(x, up, "gelu_tanh")))
    pairs.append((liger.swiglu_packed(packed), pointwise.glu_packed(packed, "silu")))
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not _interpreter_runs_the_library(), reason="needs liger_kernel and Triton's interpreter")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 1e-3)])
def test_the_librarys_kernels_compute_what_the_ops_mean(interpreted: None, dtype: Any, tolerance: float) -> None:
    _compare(dtype, "cpu", tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not liger.installed(), reason="needs liger_kernel on CUDA")
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=str
)
def test_on_a_gpu_the_kernels_compute_what_the_ops_mean(dtype: Any, tolerance: float) -> None:
    _compare(dtype, "cuda", tolerance)
    assert set(liger.probe()) == {"rms_norm", "glu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not liger.installed(), reason="needs liger_kernel on CUDA")
def test_on_a_gpu_a_captured_graph_follows_its_inputs() -> None:
    x, w, packed = (random(*shape, device="cuda") for shape in ((64, 4096), (4096,), (64, 8192)))
    ops = torch.ops.lz_compile

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.liger_rms_norm_v1(x, w, 1e-5, 0.0, "llama"), ops.liger_swiglu_packed_v1(packed)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    x.copy_(random(64, 4096, device="cuda", seed=5))
    packed.copy_(random(64, 8192, device="cuda", seed=5))
    graph.replay()
    for a, b in zip(got, run()):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
