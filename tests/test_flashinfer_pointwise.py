"""FlashInfer's norms and gated units: what reaches the library, what is declined, and the answers.

The stand-in does what the library's kernels do with memory: rows at one stride or heads at two, a packed projection
that is contiguous whatever its strides say, a weight of the dtype of ``x``, vectors at aligned addresses, one rounding.
The tests at the end run the library.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lz_compile.lowering import flashinfer, pointwise
from lz_compile.lowering import flashinfer_pointwise as provider
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.flashinfer_jit import JIT_SECONDS
from lz_compile.pointwise_specimen import PointwiseReference, PointwiseSpecimen
from lz_compile.qualify import qualify
from lz_compile.region import Kernel
from swap import Swap, swap

KERNELS = [provider.RMS_NORM, provider.GLU]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
Function = Callable[..., torch.Tensor]


class Library:
    """Installs modules named as the library's; ``built`` lists the modules that were asked for, ``calls`` the calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.built: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.on_disk: set[str] = set()
        act_and_mul = {f"{name}_and_mul": self.act_and_mul(name) for name in ("silu", "gelu", "gelu_tanh")}
        parts: dict[str, dict[str, Any]] = {
            "flashinfer": {"__path__": []},
            "flashinfer.norm": {
                "rmsnorm": self.norm(0.0, (2, 3)),
                "gemma_rmsnorm": self.norm(1.0, (2,)),
                "get_norm_module": lambda: self.built.append("norm"),
            },
            "flashinfer.activation": {"get_act_and_mul_module": self.built.append, **act_and_mul},
            "flashinfer.jit": {"__path__": []},
            "flashinfer.jit.norm": {"gen_norm_module": lambda: self.spec("norm")},
            "flashinfer.jit.activation": {"gen_act_and_mul_module": self.spec},
        }
        for name, content in parts.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        parent = sys.modules["flashinfer"]
        parent.norm, parent.activation = (sys.modules[f"flashinfer.{x}"] for x in ("norm", "activation"))  # type: ignore[attr-defined]

    def spec(self, name: str) -> Any:
        return SimpleNamespace(is_compiled=name in self.on_disk)

    def norm(self, offset: float, dims: tuple[int, ...]) -> Function:
        def run(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, enable_pdl: bool) -> torch.Tensor:
            assert x.dim() in dims and out.shape == x.shape and x.numel() and not enable_pdl
            assert x.dtype in (torch.float16, torch.bfloat16) and x.dtype == weight.dtype == out.dtype
            assert x.stride(-1) == weight.stride(-1) == out.stride(-1) == 1 and weight.dim() == 1
            unit = math.gcd(8, x.shape[-1])
            for value in (x, weight, out):
                assert value.data_ptr() % (2 * unit) == 0
                strides = zip(value.shape[:-1], value.stride()[:-1])
                assert all(size == 1 or stride % unit == 0 for size, stride in strides)
            self.calls.append({"shape": tuple(x.shape), "pointer": x.data_ptr(), "gemma": bool(offset), "out": out})
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
            return out.copy_(y * (offset + weight.float()))

        return run

    def act_and_mul(self, name: str) -> Function:
        def run(packed: torch.Tensor, out: torch.Tensor, enable_pdl: bool) -> torch.Tensor:
            size = out.shape[-1]
            assert packed.shape == (*out.shape[:-1], 2 * size) and out.numel() and not enable_pdl
            assert packed.dtype in (torch.float16, torch.bfloat16) and packed.dtype == out.dtype
            assert size % 8 == 0 and packed.data_ptr() % 16 == 0 and out.is_contiguous()
            self.calls.append({"name": name, "pointer": packed.data_ptr(), "out": out})
            rows = packed.as_strided((out.numel() // size, 2 * size), (2 * size, 1)).float()
            gate, up = rows.chunk(2, -1)
            return out.copy_((ACTIVATIONS[name](gate) * up).view(out.shape))

        return run


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The stand-in, on a CPU that says it is a Hopper."""
    monkeypatch.setattr(provider, "capability", lambda device: (9, 0))
    return Library(monkeypatch)


def norm(x: torch.Tensor, w: torch.Tensor, cast: str = "before weight", offset: float = 0.0) -> torch.Tensor:
    """The spellings of Llama, OLMo 2 and Gemma."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    if cast == "before weight":
        return w * y.to(x.dtype)
    return (y * (offset + w.float() if offset else w)).to(x.dtype)


def gemma(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return norm(x, w, "after weight", 1.0)


def unit(activation: str) -> Function:
    def fn(packed: torch.Tensor) -> torch.Tensor:
        gate, up = packed.chunk(2, -1)
        return ACTIVATIONS[activation](gate) * up

    return fn


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def check(fn: Function, *inputs: torch.Tensor) -> Swap:
    """Runs ``fn`` with its region replaced: the right answer, in the strides that eager gives."""
    compiled, backend = swap(fn, KERNELS)
    got, expected = compiled(*inputs), fn(*inputs)
    assert backend.verdicts == [None] and backend.replaced == 1
    assert got.dtype == expected.dtype and got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, atol=1.6e-2, rtol=1.6e-2)
    return backend


# -- norms


@pytest.mark.parametrize("cast, offset", [("before weight", 0.0), ("after weight", 0.0), ("after weight", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_meaning_of_rmsnorm_gets_its_function(
    library: Library, dtype: torch.dtype, cast: str, offset: float
) -> None:
    inputs = random(2, 5, 320, dtype=dtype), random(320, dtype=dtype)
    check(lambda x, w: norm(x, w, cast, offset), *inputs)
    (call,) = library.calls
    assert call["gemma"] == (offset == 1.0) and call["shape"] == (10, 320)
    assert call["pointer"] == inputs[0].data_ptr()


def test_the_result_is_written_where_it_stays(library: Library) -> None:
    ops = torch.ops.lz_compile
    out = ops.flashinfer_rms_norm_v1(random(2, 5, 320), random(320), 1e-5, False)
    assert library.calls[0]["out"].data_ptr() == out.data_ptr() and out.is_contiguous()
    out = ops.flashinfer_glu_v1(random(2, 5, 64), "silu")
    assert library.calls[1]["out"].data_ptr() == out.data_ptr() and out.is_contiguous()


def test_a_norm_is_no_further_from_float64_than_the_models_own(library: Library) -> None:
    x, w = random(64, 320), random(320)
    exact = pointwise.rms_norm(x.double(), w.double(), 1e-5)
    ours = torch.ops.lz_compile.flashinfer_rms_norm_v1(x, w, 1e-5, False)
    assert (ours.double() - exact).abs().mean() <= (norm(x, w).double() - exact).abs().mean()


HEADS: dict[str, tuple[Function, tuple[int, int, int]]] = {
    "all heads": (lambda p, w: norm(p.view(2, 5, 6, 16), w), (60, 1, 16)),
    "all heads, transposed": (lambda p, w: norm(p.view(2, 5, 6, 16).transpose(1, 2), w), (60, 1, 16)),
    "some heads": (lambda p, w: norm(p.view(2, 5, 6, 16)[:, :, :4], w), (10, 4, 16)),
    "some heads, transposed": (lambda p, w: norm(p.view(2, 5, 6, 16)[:, :, :4].transpose(1, 2), w), (10, 4, 16)),
    "part of a row": (lambda p, w: norm(p[..., :16], w), (10, 1, 16)),
    "some rows": (lambda p, w: norm(p.view(2, 30, 16)[:, 1:25], w), (2, 24, 16)),
}


@pytest.mark.parametrize("name", list(HEADS))
def test_heads_of_a_packed_projection_are_normalised_where_they_lie(library: Library, name: str) -> None:
    fn, shape = HEADS[name]
    projection = random(2, 5, 6 * 16)
    backend = check(fn, projection, random(16))
    (call,) = library.calls
    offset = 16 if name == "some rows" else 0
    assert call["shape"] == shape and call["pointer"] == projection.data_ptr() + offset * 2
    assert torch.ops.aten.clone.default not in backend.targets()


@pytest.mark.parametrize("fn", [norm, gemma], ids=["llama", "gemma"])
def test_wide_and_gemmas_rows_may_lie_at_one_larger_stride(library: Library, fn: Function) -> None:
    projection = random(2, 5, 640)
    check(lambda p, w: fn(p[..., 320:], w), projection, random(320))
    (call,) = library.calls
    assert call["shape"] == (10, 320) and call["pointer"] == projection.data_ptr() + 640


@pytest.mark.parametrize("layout", ["wide", "heads", "packed"])
def test_a_token_count_that_varies_needs_no_other_graph(library: Library, layout: str) -> None:
    fn: Function = {
        "wide": norm,
        "heads": lambda p, w: norm(p.unflatten(-1, (20, 16))[:, :, :8].transpose(1, 2), w[:16]),
        "packed": lambda p, w: unit("silu")(p),
    }[layout]
    compiled, backend = swap(fn, KERNELS, dynamic=None)
    for tokens in (5, 9, 3):
        x, w = random(2, tokens, 320, seed=tokens), random(320)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x, w), fn(x, w), atol=1.6e-2, rtol=1.6e-2)
        assert library.calls[-1]["pointer"] == x.data_ptr()
    assert backend.verdicts == [None] and len(library.calls) == 3


@pytest.mark.parametrize(
    ("x", "weight"), [(random(37, 320), 320), (random(4, 9, 3, 16)[:, :, :2], 16), (random(3, 50, 16), 16)]
)
def test_tensors_past_32_bit_offsets_are_cut(
    library: Library, monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, weight: int
) -> None:
    monkeypatch.setattr(provider, "_MOST_ELEMENTS", 1000)
    w = random(weight)
    got = torch.ops.lz_compile.flashinfer_rms_norm_v1(x, w, 1e-5, False)
    torch.testing.assert_close(got, norm(x, w), atol=1.6e-2, rtol=1.6e-2)
    assert len(library.calls) > 1 and all(math.prod(call["shape"]) <= 1000 for call in library.calls)


def test_what_lies_otherwise_than_promised_is_copied(library: Library) -> None:
    ops, w = torch.ops.lz_compile, random(321)[1:]
    for x in (random(3201)[1:].view(10, 320), random(320, 10).t(), random(10, 323)[:, :320]):
        got = ops.flashinfer_rms_norm_v1(x, w, 1e-5, False)
        torch.testing.assert_close(got, norm(x, w), atol=1.6e-2, rtol=1.6e-2)
    for packed in (random(641)[1:].view(10, 64), random(64, 10).t(), random(10, 128)[:, :64]):
        got = ops.flashinfer_glu_v1(packed, "silu")
        torch.testing.assert_close(got, unit("silu")(packed), atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize(
    ("fn", "inputs", "reason"),
    [
        (norm, (random(5, 32, dtype=torch.float32), random(32, dtype=torch.float32)), "does not take torch.float32"),
        (lambda x: F.rms_norm(x, (32,), None, 1e-5), (random(5, 32),), "takes no norm without a weight"),
        (
            lambda x, w: norm(x, w, "after weight"),
            (random(5, 32), random(32, dtype=torch.float32)),
            "takes no weight of torch.float32 beside torch.bfloat16",
        ),
        (lambda x, w: norm(x[..., ::2], w), (random(5, 64), random(32)), "the last dimension is strided"),
        (lambda x, w: norm(x, w[::2]), (random(5, 32), random(64)), "the last dimension is strided"),
        (lambda x, w: norm(x[:, :32], w), (random(5, 36), random(32)), "a stride is not a multiple of 16 bytes"),
        (lambda x, w: norm(x[:, 4:], w), (random(5, 40)[:, :36], random(32)), "is not aligned to 16 bytes"),
        (lambda x, w: norm(x, w[1:]), (random(5, 32), random(33)), "is not aligned to 16 bytes"),
        (lambda x, w: norm(x[:, 1:], w), (random(2, 5, 320), random(320)), "rows do not lie at one stride"),
        (lambda x, w: gemma(x[:, 1:], w), (random(2, 5, 32), random(32)), "rows do not lie at one stride"),
        (lambda x, w: norm(x[:, 1:, 1:], w), (random(2, 5, 6, 32), random(32)), "rows do not lie at one stride"),
    ],
)
def test_norms_that_do_not_fit_say_why(
    library: Library, fn: Function, inputs: tuple[torch.Tensor, ...], reason: str
) -> None:
    compiled, backend = swap(fn, KERNELS)
    torch.testing.assert_close(compiled(*inputs), fn(*inputs))
    (verdict,) = backend.verdicts
    assert verdict is not None and reason in verdict, verdict
    assert backend.replaced == 0 and not library.calls and not library.built


# -- gated units


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_packed_projection_is_read_where_it_lies(library: Library, dtype: torch.dtype, activation: str) -> None:
    packed = random(2, 5, 96, dtype=dtype)
    check(unit(activation), packed)
    (call,) = library.calls
    assert (call["name"], call["pointer"]) == (activation, packed.data_ptr())


def swapped_halves(packed: torch.Tensor) -> torch.Tensor:
    up, gate = packed.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    ("fn", "inputs", "reason"),
    [
        (unit("silu"), (random(5, 64, dtype=torch.float32),), "does not take torch.float32"),
        (unit("relu"), (random(5, 64),), "has no kernel for relu"),
        (lambda a, b: F.silu(a) * b, (random(5, 64), random(5, 64)), "halves of one tensor only"),
        (swapped_halves, (random(5, 64),), "halves of one tensor only"),
        (unit("silu"), (random(5, 24),), "a half of 12 is no multiple of 8"),
        (lambda x: unit("silu")(x[..., :64]), (random(5, 96),), "the packed tensor is not contiguous"),
        (lambda x: unit("silu")(x.transpose(0, 1)), (random(5, 2, 64),), "the packed tensor is not contiguous"),
        (lambda x: unit("silu")(x[4:].view(5, 64)), (random(324),), "is not aligned to 16 bytes"),
    ],
)
def test_units_that_do_not_fit_say_why(
    library: Library, fn: Function, inputs: tuple[torch.Tensor, ...], reason: str
) -> None:
    compiled, backend = swap(fn, KERNELS)
    torch.testing.assert_close(compiled(*inputs), fn(*inputs))
    (verdict,) = backend.verdicts
    assert verdict is not None and reason in verdict, verdict
    assert backend.replaced == 0 and not library.calls and not library.built


# -- the ops, compilation, the provider


def test_fakes_have_the_strides_of_the_results(library: Library) -> None:
    ops = torch.ops.lz_compile
    x = random(2, 4, 5, 16).transpose(1, 2)
    for op, args in (
        (ops.flashinfer_rms_norm_v1, (x, random(16), 1e-5, False)),
        (ops.flashinfer_rms_norm_v1, (random(2, 0, 16), random(16), 1e-5, True)),
        (ops.flashinfer_glu_v1, (random(2, 5, 64), "gelu")),
        (ops.flashinfer_glu_v1, (random(0, 64), "silu")),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
        real, fake = op(*args), op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        assert real.shape == fake.shape and real.stride() == fake.stride() and real.is_contiguous()


@pytest.mark.parametrize(
    ("fn", "inputs", "module"),
    [
        (norm, (random(5, 32), random(32)), "norm"),
        (gemma, (random(5, 32), random(32)), "norm"),
        (unit("gelu_tanh"), (random(5, 64),), "gelu_tanh"),
    ],
)
def test_modules_are_compiled_when_the_call_is_inserted_and_that_is_known_before(
    library: Library, fn: Function, inputs: tuple[torch.Tensor, ...], module: str
) -> None:
    backend = check(fn, *inputs)
    assert library.built == [module]
    (region,) = backend.regions
    kernel = provider.GLU if region.kind == "glu" else provider.RMS_NORM
    assert kernel.first_call is not None and kernel.first_call(region) == JIT_SECONDS
    library.on_disk.add(module)
    assert kernel.first_call(region) == 0.0


@pytest.mark.parametrize(
    ("kernel", "fn", "inputs"),
    [
        (provider.RMS_NORM, norm, (random(2, 5, 320), random(320))),
        (provider.RMS_NORM, gemma, (random(2, 5, 320), random(320))),
        (provider.RMS_NORM, HEADS["some heads, transposed"][0], (random(2, 5, 96), random(16))),
        (provider.GLU, unit("gelu_tanh"), (random(2, 5, 96),)),
    ],
)
def test_fewer_roundings_qualify_against_float64(
    library: Library, kernel: Kernel, fn: Function, inputs: tuple[torch.Tensor, ...]
) -> None:
    compiled, backend = swap(fn, [])
    compiled(*inputs)
    (region,) = backend.regions
    specimen = PointwiseSpecimen.of(region, False)
    module = specimen.build(kernel.emit, Emitter)
    verdict = qualify(PointwiseReference(specimen, pointwise.meaning(region)), module)  # type: ignore[arg-type]
    assert verdict.qualified, verdict.reason
    assert len(library.calls) == 2 and 0 < verdict.error <= 0.5


def test_a_module_that_does_not_compile_leaves_the_region(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> None:
        raise RuntimeError("ninja failed")

    monkeypatch.setattr(sys.modules["flashinfer.norm"], "get_norm_module", no_compiler)
    compiled, backend = swap(norm, KERNELS)
    x, w = random(5, 32), random(32)
    torch.testing.assert_close(compiled(x, w), norm(x, w), atol=0, rtol=0)
    assert backend.verdicts == [None] and not library.calls
    assert torch.ops.lz_compile.flashinfer_rms_norm_v1.default not in backend.targets()


def test_the_estimate_counts_every_byte_once(library: Library) -> None:
    (region,) = check(norm, random(2, 5, 320), random(320)).regions
    assert provider.RMS_NORM.work is not None
    assert provider.RMS_NORM.work(region).bytes == 2 * (2 * 10 * 320 + 320)


@pytest.mark.parametrize(("device", "reason"), [(None, "runs on CUDA"), ((7, 5), "needs compute capability 8.0")])
def test_other_devices_are_declined(
    library: Library, monkeypatch: pytest.MonkeyPatch, device: tuple[int, int] | None, reason: str
) -> None:
    monkeypatch.setattr(provider, "capability", lambda _: device)
    for fn, inputs in ((norm, (random(5, 32), random(32))), (unit("silu"), (random(5, 64),))):
        compiled, backend = swap(fn, KERNELS)
        compiled(*inputs)
        assert backend.verdicts == [reason]


def test_the_provider_offers_them_beside_attention() -> None:
    names = {kernel.name: kernel.kind for kernel in flashinfer.PROVIDER.kernels}
    assert names["flashinfer.rms_norm"] == "rms_norm" and names["flashinfer.glu"] == "glu"
    assert len(names) == 4 and all(name.startswith("flashinfer.") for name in names)


# -- the library itself: the module of norms, and that of one activation


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within two roundings of the row's largest value."""
    allowed = 2 * torch.finfo(got.dtype).eps * expected.abs().amax(-1, keepdim=True)
    assert bool(((got.double() - expected).abs() <= allowed).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("is_gemma", [False, True], ids=["llama", "gemma"])
    @pytest.mark.parametrize("size", [12, 64, 128, 256, 4096, 5120, 16384])
    def test_norms_mean_what_the_regions_mean(self, size: int, is_gemma: bool, dtype: torch.dtype) -> None:
        w = random(size, dtype=dtype, device="cuda")
        wide = random(3, 7, 2 * size, dtype=dtype, device="cuda")
        cases = [random(3, 7, size, dtype=dtype, device="cuda"), wide[..., size:], wide[:1, :1, :size]]
        for x in cases:
            got = torch.ops.lz_compile.flashinfer_rms_norm_v1(x, w, 1e-6, is_gemma)
            assert got.is_contiguous() and got.dtype == dtype
            offset = 1.0 if is_gemma else 0.0
            _close(got, pointwise.rms_norm(x.double(), w.double(), 1e-6, "after weight", offset))

    def test_some_heads_of_a_packed_projection_are_read_at_two_strides(self) -> None:
        heads = random(2, 33, 48, 128, device="cuda")[:, :, 32:40]
        w = random(128, device="cuda")
        got = torch.ops.lz_compile.flashinfer_rms_norm_v1(heads, w, 1e-6, False)
        _close(got, pointwise.rms_norm(heads.double(), w.double(), 1e-6))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("size", [8, 1000, 8192, 14336])
    def test_a_packed_swiglu_means_what_the_region_means(self, size: int, dtype: torch.dtype) -> None:
        packed = random(3, 7, 2 * size, dtype=dtype, device="cuda")
        got = torch.ops.lz_compile.flashinfer_glu_v1(packed, "silu")
        assert got.is_contiguous() and got.dtype == dtype
        _close(got, pointwise.glu_packed(packed.double(), "silu"))

    def test_nothing_is_allocated_but_the_output(self) -> None:
        x, w, packed = (random(*shape, device="cuda") for shape in ((512, 4096), (4096,), (512, 8192)))
        ops = torch.ops.lz_compile
        calls: list[Callable[[], torch.Tensor]] = [
            lambda: ops.flashinfer_rms_norm_v1(x, w, 1e-5, False),
            lambda: ops.flashinfer_glu_v1(packed, "silu"),
        ]
        for call in calls:
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = call()
            torch.cuda.synchronize()
            assert torch.cuda.max_memory_allocated() - before == out.untyped_storage().nbytes()
            del out

    def test_a_captured_graph_follows_its_inputs(self) -> None:
        x, w, packed = (random(*shape, device="cuda") for shape in ((64, 4096), (4096,), (64, 8192)))
        heads, head_weight = random(2, 33, 8, 128, device="cuda"), random(128, device="cuda")
        ops = torch.ops.lz_compile

        def run() -> tuple[torch.Tensor, ...]:
            return (
                ops.flashinfer_rms_norm_v1(x, w, 1e-5, False),
                ops.flashinfer_rms_norm_v1(x, w, 1e-5, True),
                ops.flashinfer_rms_norm_v1(heads, head_weight, 1e-5, False),
                ops.flashinfer_glu_v1(packed, "silu"),
            )

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        for value in (x, heads, packed):
            value.copy_(random(*value.shape, device="cuda", seed=5))
        graph.replay()
        for a, b in zip(got, run()):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
