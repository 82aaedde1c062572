"""Each SDPA backend as a kernel of its own: what it takes, what it gives, and that its fake result has real strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import lz_compile
from lz_compile.aliasing import Aliases
from lz_compile.lowering import aten
from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.semantic import EMPTY_ROW, NO_LOWER, attend, visible_keys
from lz_compile.mask import Bound, EmptyRow, MaskForm, Read
from lz_compile.region import Attention, Kernel, Region

CUDA = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
CPU_KERNELS = [aten.FLASH_CPU, aten.MATH]
CUDA_KERNELS = [aten.FLASH, aten.CUDNN, aten.EFFICIENT, aten.MATH]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NO_MASK = MaskForm()
CAUSAL = MaskForm(upper=(Bound(0),))


class Site:
    """One attention in a graph of its own: inputs query, key, value and, where there is one, the mask."""

    def __init__(
        self,
        tensors: tuple[torch.Tensor, ...],
        form: MaskForm = NO_MASK,
        mask: torch.Tensor | None = None,
        scale: float = 0.25,
        **attention: Any,
    ) -> None:
        self.mode = FakeTensorMode()
        self.graph = fx.Graph()
        self.inputs = [*tensors, *([mask] if mask is not None else [])]
        nodes = [self._input(name, value) for name, value in zip("qkvm", self.inputs)]
        anchor = self.graph.call_function(torch.ops.aten.clone.default, (nodes[0],))
        anchor.meta["val"] = nodes[0].meta["val"]
        a = Attention(*nodes[:3], scale, form, nodes[3] if mask is not None else None, **attention)
        self.region = Region("attention", "sdpa", anchor, "", attention=a)

    def _input(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(value)
        return node

    def run(self, kernel: Kernel) -> torch.Tensor:
        """The result of the kernel's nodes; its strides are those of the fake."""
        result = kernel.emit(Emitter(self.graph, Aliases(self.graph)), self.region)
        self.graph.output(result)
        out = fx.GraphModule(torch.nn.Module(), self.graph)(*self.inputs)
        fake = result.meta["val"]
        assert (out.shape, _strides(out), out.dtype) == (fake.shape, _strides(fake), fake.dtype)
        return out


def _strides(value: torch.Tensor) -> list[int]:
    """Strides that say where elements are: not those of dimensions of size one."""
    return [stride for size, stride in zip(value.shape, value.stride()) if size != 1]


def why_not(kernel: Kernel, *arguments: Any, pattern: str = "sdpa", **keywords: Any) -> str | None:
    site = Site(*arguments, **keywords)
    site.region.pattern = pattern
    return kernel.supports(site.region)


def randn(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "", device: str = "cpu", seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    b, h, n, d = shape
    if layout == "heads inside":
        return torch.randn(b, n, h, d, generator=generator).to(device, dtype).transpose(1, 2)
    if layout == "part of a cache":
        return torch.randn(b, h, n + 8, d + 8, generator=generator).to(device, dtype)[:, :, 3 : n + 3, :d]
    if layout == "packed with others":
        return torch.randn(b, n, 3 * h, d, generator=generator).to(device, dtype)[:, :, h : 2 * h].transpose(1, 2)
    return torch.randn(shape, generator=generator).to(device, dtype)


LAYOUTS = ["", "heads inside", "part of a cache", "packed with others"]


def qkv(
    queries: int = 9,
    keys: int = 12,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    value_size: int | None = None,
    batch: int = 2,
    **keywords: Any,
) -> tuple[torch.Tensor, ...]:
    shapes = [(batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, value_size or size)]
    return tuple(randn(shape, seed=seed, **keywords) for seed, shape in enumerate(shapes))


def exact(
    tensors: tuple[torch.Tensor, ...],
    form: MaskForm = NO_MASK,
    mask: torch.Tensor | None = None,
    scale: float = 0.25,
    empty_row: EmptyRow = "zero",
) -> torch.Tensor:
    """The meaning in float64: causal by the form, else by the mask."""
    bounds = None
    if form.is_causal:
        row = [0, NO_LOWER, 0, tensors[1].shape[2], 0, 0, 0, 0]
        bounds = torch.tensor([row] * tensors[0].shape[0], dtype=torch.int32, device=tensors[0].device)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double().masked_fill(mask == torch.finfo(mask.dtype).min, torch.finfo(torch.float64).min)
    wide = [x.double() for x in tensors]
    return attend(*wide, bounds, mask=mask, scale=scale, empty_row=EMPTY_ROW[empty_row])


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def some_mask(shape: tuple[int, ...], kind: str, dtype: torch.dtype, hides_rows: bool, device: str) -> torch.Tensor:
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6
    visible[..., 0] = True
    if hides_rows:
        visible[..., shape[-2] // 2, :] = False
    visible = visible.to(device)
    if kind == "bool":
        return visible
    hidden = -math.inf if kind == "-inf" else torch.finfo(dtype).min
    return torch.zeros(shape, dtype=dtype, device=device).masked_fill(~visible, hidden)


# -- what is computed, on the CPU


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_backends_of_the_cpu_give_the_oracles_answer_with_the_strides_of_the_fake(data: st.DataObject) -> None:
    kernel = data.draw(st.sampled_from(CPU_KERNELS))
    batch, kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    queries, keys = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    size = data.draw(st.sampled_from([8, 12, 16]))
    shapes = [(batch, kv_heads * group, queries, size), *2 * [(batch, kv_heads, keys, size)]]
    tensors = tuple(randn(shape, dtype, data.draw(st.sampled_from(LAYOUTS)), seed=i) for i, shape in enumerate(shapes))
    form, mask, empty_row = MaskForm(), None, "zero"
    kind = data.draw(st.sampled_from(["none", "causal", "bool", "-inf", "finite"]))
    if kind == "causal":
        form = CAUSAL
    elif kind != "none":
        full = (batch, kv_heads * group, queries, keys)
        shape = tuple(n if data.draw(st.booleans()) else 1 for n in full)[data.draw(st.integers(0, 2)) :]
        assume(shape[-1] > 1 or kind == "bool")
        mask = some_mask(shape, kind, dtype, data.draw(st.booleans()), "cpu")
        if kind == "finite":
            empty_row = "mean" if dtype != torch.float16 else "unmasked"
        form = MaskForm(dense=fx.Graph().placeholder("m"), empty_row=empty_row)  # type: ignore[arg-type]
    site = Site(tensors, form, mask)
    assert kernel.supports(site.region) is None
    assert_close(site.run(kernel), exact(tensors, form, mask, empty_row=empty_row))  # type: ignore[arg-type]


def test_spelled_out_attention_takes_any_scale_and_unequal_head_sizes() -> None:
    tensors = qkv(value_size=24)
    for scale in (-0.5, 0.0, 0.5):
        assert_close(Site(tensors, CAUSAL, scale=scale).run(aten.MATH), exact(tensors, CAUSAL, scale=scale))


def test_a_mask_is_made_additive_once_for_layers_that_share_it() -> None:
    mask = some_mask((2, 1, 9, 12), "bool", torch.float32, True, "cpu")
    site = Site(qkv(), MaskForm(dense=fx.Graph().placeholder("m")), mask)
    emitter = Emitter(site.graph, Aliases(site.graph))
    for _ in range(3):
        aten.FLASH_CPU.emit(emitter, site.region)
    targets = [node.target for node in site.graph.nodes]
    assert targets.count(torch.ops.aten.where.ScalarOther) == 1
    assert targets.count(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default) == 3


def test_three_dimensional_values_are_heads_of_one_row() -> None:
    tensors = tuple(x[0] for x in qkv(kv_heads=4))
    site = Site(tensors, CAUSAL, stacked=0)
    assert_close(site.run(aten.FLASH_CPU), exact(tuple(x[None] for x in tensors), CAUSAL)[0])


# -- what is declined


@pytest.mark.parametrize("kernel", [*CPU_KERNELS, *CUDA_KERNELS])
def test_no_backend_has_a_softcap(kernel: Kernel) -> None:
    assert "softcap" in (why_not(kernel, qkv(), softcap=3.0) or "")


@pytest.mark.parametrize("kernel", [aten.FLASH, aten.CUDNN, aten.EFFICIENT])
def test_backends_of_cuda_decline_the_cpu(kernel: Kernel) -> None:
    assert why_not(kernel, qkv()) == "runs on CUDA"


def test_the_flash_backend_of_the_cpu_declines_what_it_would_refuse_or_misread() -> None:
    assert "one head size" in (why_not(aten.FLASH_CPU, qkv(value_size=24)) or "")
    assert "positive scale" in (why_not(aten.FLASH_CPU, qkv(), scale=-1.0) or "")
    assert "positive scale" in (why_not(aten.FLASH_CPU, qkv(), CAUSAL, scale=0.0) or "")
    strided = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv())
    assert "strided" in (why_not(aten.FLASH_CPU, strided) or "")
    mask = torch.ones(9, 12, dtype=torch.float64)
    assert "dtype" in (why_not(aten.FLASH_CPU, qkv(), MaskForm(bias=fx.Graph().placeholder("m")), mask) or "")
    window = MaskForm(lower=(Bound(-3),))
    assert "not a tensor" in (why_not(aten.FLASH_CPU, qkv(), window) or "")


def test_what_the_user_switched_off_is_declined() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "switched off" in (why_not(aten.FLASH_CPU, qkv()) or "")
        assert why_not(aten.MATH, qkv()) is None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert "switched off" in (why_not(aten.MATH, qkv()) or "")


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_a_row_without_keys_must_be_answered_as_the_program_does(kernel: Kernel) -> None:
    mask = some_mask((9, 12), "bool", torch.float32, True, "cpu")
    dense = fx.Graph().placeholder("m")
    for empty_row in ("mean", "nan", "safe mean", "unmasked"):
        assert empty_row in (why_not(kernel, qkv(), MaskForm(dense=dense, empty_row=empty_row), mask) or "")
    assert why_not(kernel, qkv(), MaskForm(dense=dense), mask) is None
    assert why_not(kernel, qkv(), MaskForm(dense=dense), mask, pattern="eager") is not None
    # Constant diagonals that leave every row a key are the same under any rule.
    window = MaskForm(upper=(Bound(0),), lower=(Bound(-4),), empty_row="mean")
    assert why_not(kernel, qkv(), window, mask, pattern="eager") is None


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.data()
)
def test_certainty_about_rows_is_never_wrong_and_complete_for_diagonals(
    queries: int, keys: int, upper: int | None, lower: int | None, data: st.DataObject
) -> None:
    form = MaskForm(
        upper=() if upper is None else (Bound(upper), Bound(upper + data.draw(st.integers(0, 3)))),
        lower=() if lower is None else (Bound(lower), Bound(lower - data.draw(st.integers(0, 3)))),
    )
    row = [1 << 30 if upper is None else upper, -(1 << 30) if lower is None else lower, 0, keys, 0, 0, 0, 0]
    visible = visible_keys(
        torch.tensor([row], dtype=torch.int32), None, None, None, None, 0, 1, queries, keys, torch.device("cpu")
    )
    assert aten.every_row_sees_a_key(form, queries, keys) == bool(visible.any(-1).all())


def test_bounds_known_at_run_time_leave_rows_uncertain() -> None:
    read = Read(fx.Graph().placeholder("position"))
    assert not aten.every_row_sees_a_key(MaskForm(upper=(Bound(0, ((1, read),)),)), 4, 9)
    assert not aten.every_row_sees_a_key(MaskForm(stop=(Bound(5),)), 4, 9)
    assert not aten.every_row_sees_a_key(MaskForm(key_padding=(read,)), 4, 9)


def test_work_counts_a_mask_and_what_is_written_between_two_products() -> None:
    tensors = qkv(64, 64)
    causal = Site(tensors, CAUSAL).region
    masked = Site(tensors, MaskForm(dense=fx.Graph().placeholder("m")), torch.ones(64, 64, dtype=torch.bool)).region
    work: Callable[[Kernel, Region], Any] = lambda kernel, region: kernel.work(region)  # type: ignore[misc]  # noqa: E731
    assert work(aten.FLASH_CPU, causal).flops < 0.6 * work(aten.FLASH_CPU, masked).flops
    assert work(aten.FLASH_CPU, masked).bytes - work(aten.FLASH_CPU, causal).bytes >= 2 * 4 * 64 * 64 * 4
    assert work(aten.MATH, causal).bytes > work(aten.FLASH_CPU, masked).bytes
    assert work(aten.EFFICIENT, causal).bytes > work(aten.CUDNN, causal).bytes


# -- through torch.compile


@pytest.fixture
def _all_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from lz_compile.lowering import kernels

    missing = [kernel for kernel in aten.PROVIDER.kernels if kernel not in kernels.KERNELS]
    monkeypatch.setattr(kernels, "KERNELS", [*kernels.KERNELS, *missing])
    monkeypatch.setattr(kernels, "OPTIONAL", (), raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_all_registered")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_preferred_backend_runs_compiled(dynamic: bool) -> None:
    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q, k, v = (x @ w).unflatten(-1, (8, 16)).transpose(1, 2).split([4, 2, 2], 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    x, w = torch.randn(2, 24, 64), torch.randn(64, 128)
    options = {"prefer": ["aten.flash_cpu"], "strict": True}
    with torch.no_grad():
        compiled = torch.compile(block, backend="layerzero", options=options, dynamic=dynamic)
        torch.testing.assert_close(compiled(x, w), block(x, w), atol=1e-5, rtol=1e-5)
    assert [region.kernel for region in lz_compile.reports()[-1].regions] == ["aten.flash_cpu"]


# -- on CUDA


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("kernel", CUDA_KERNELS, ids=lambda kernel: kernel.name)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("form", [NO_MASK, CAUSAL], ids=["none", "causal"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_each_backend_gives_the_oracles_answer_with_the_strides_of_the_fake(
        self, kernel: Kernel, dtype: torch.dtype, form: MaskForm, layout: str
    ) -> None:
        taken = 0
        for queries, keys, kv_heads in ((200, 200, 8), (200, 200, 2), (72, 200, 2), (200, 136, 8)):
            tensors = qkv(queries, keys, 8, kv_heads, 64, dtype=dtype, layout=layout, device="cuda")
            site = Site(tensors, form)
            if kernel.supports(site.region) is None:
                taken += 1
                assert_close(site.run(kernel), exact(tensors, form))
        half = dtype != torch.float32
        least = {"aten.flash": 2 * half, "aten.cudnn": 2 * half * (torch.cuda.get_device_capability() >= (8, 0))}
        assert taken >= least.get(kernel.name, 4)

    @pytest.mark.parametrize("kernel", [aten.CUDNN, aten.EFFICIENT, aten.MATH], ids=lambda kernel: kernel.name)
    @pytest.mark.parametrize("kind", ["bool", "-inf", "finite"])
    @pytest.mark.parametrize("shape", [(2, 1, 60, 130), (60, 130), (2, 1, 1, 130), (2, 8, 60, 130), (1, 1, 60, 128)])
    def test_masks_are_honoured_and_empty_rows_answered(
        self, kernel: Kernel, kind: str, shape: tuple[int, ...]
    ) -> None:
        tensors = qkv(60, shape[-1], 8, 2, 64, dtype=torch.bfloat16, device="cuda")
        empty_row: EmptyRow = "zero"
        if kind == "finite" and kernel is aten.MATH:
            empty_row = "mean"
        hides_rows = shape[-2] > 1
        mask = some_mask(shape, kind, torch.bfloat16, hides_rows, "cuda")
        form = MaskForm(dense=fx.Graph().placeholder("m"), empty_row=empty_row)
        site = Site(tensors, form, mask)
        reason = kernel.supports(site.region)
        if kernel is aten.MATH and kind == "-inf":
            assert reason is not None
            return
        assert reason is None
        assert_close(site.run(kernel), exact(tensors, form, mask, empty_row=empty_row))

    def test_a_boolean_mask_of_cudnn_leaves_hidden_rows_unmasked_where_the_program_does(self) -> None:
        tensors = qkv(60, 128, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
        mask = some_mask((60, 128), "bool", torch.bfloat16, True, "cuda")
        form = MaskForm(dense=fx.Graph().placeholder("m"), empty_row="unmasked")
        assert_close(Site(tensors, form, mask).run(aten.CUDNN), exact(tensors, form, mask, empty_row="unmasked"))

    def test_sizes_that_a_backend_refuses_are_declined(self) -> None:
        half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        assert why_not(aten.FLASH, qkv(64, 64, size=36, **half)) is not None
        assert why_not(aten.FLASH, qkv(64, 64, size=64, value_size=128, **half)) is not None
        assert why_not(aten.FLASH, qkv(64, 64, size=512, **half)) is not None
        assert why_not(aten.FLASH, qkv(64, 80, size=64, **half), CAUSAL) is not None
        assert why_not(aten.FLASH, qkv(64, 80, size=64, **half)) is None
        assert why_not(aten.CUDNN, qkv(64, 64, size=36, **half)) is not None
        assert why_not(aten.EFFICIENT, qkv(64, 64, size=36, **half)) is not None
        for kernel in (aten.FLASH, aten.CUDNN):
            assert why_not(kernel, qkv(64, 64, size=64, device="cuda")) is not None

    @pytest.mark.usefixtures("_all_registered")
    @pytest.mark.parametrize("kernel", CUDA_KERNELS, ids=lambda kernel: kernel.name)
    def test_each_backend_runs_compiled(self, kernel: Kernel) -> None:
        q, k, v = qkv(128, 128, 8, 8, 64, dtype=torch.bfloat16, layout="heads inside", device="cuda")

        def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) * 2

        options = {"prefer": [kernel.name], "strict": True}
        with torch.no_grad():
            got = torch.compile(block, backend="layerzero", options=options)(q, k, v)
        assert [region.kernel for region in lz_compile.reports()[-1].regions] == [kernel.name]
        expected = exact((q, k, v), CAUSAL, scale=0.125).transpose(1, 2).flatten(2) * 2
        assert_close(got, expected)
