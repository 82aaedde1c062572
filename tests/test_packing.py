"""Packed projections: parameters become views of one storage, and nobody else notices."""

from __future__ import annotations

import copy
import gc
import io
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lz_compile.packing
from lz_compile import config
from lz_compile.backend import improve
from lz_compile.packing import Packing
from lz_compile.report import GraphReport, RegionReport
from swap import _GROUPED, _HEADS
from tiny import DECODERS, WHISPER, Architecture, tokens

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def on_a_cpu_too() -> Iterator[None]:
    with config.patch(pack_devices=["cpu", "cuda"]):
        yield


class PackedRoad:
    """A Dynamo backend that does all that "layerzero" does but Inductor."""

    def __init__(self, **settings: Any) -> None:
        self.settings = {"strict": True, **settings}
        self.graphs: list[GraphReport] = []
        self.modules: list[fx.GraphModule] = []
        self.packings: list[Packing] = []
        self.unpacked_calls = 0

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        packing = Packing(inputs)
        with config.patch(self.settings):
            report = GraphReport.start(None, None)
            rewritten = improve(module, report, None, packing)
        self.graphs.append(report)
        self.packings.append(packing)
        packing.example_inputs()

        def unpacked(*args: Any) -> Any:
            self.unpacked_calls += 1
            return module.forward(*args)

        if rewritten is None:
            packing.packs.clear()
            return packing.bind(module.forward, unpacked)
        rewritten.graph.lint()
        self.modules.append(rewritten)
        return packing.bind(rewritten.forward, unpacked)

    @property
    def groups(self) -> list[RegionReport]:
        return [r for graph in self.graphs for r in graph.regions if r.kind == "projections"]

    @property
    def packed(self) -> int:
        return sum(region.kernel == "aten.packed" for region in self.groups)

    def linears(self) -> int:
        return sum(n.target is aten.linear.default for module in self.modules for n in module.graph.nodes)


def pack(fn: Any, dynamic: bool | None = False, **settings: Any) -> tuple[Any, PackedRoad]:
    torch._dynamo.reset()
    road = PackedRoad(**settings)
    return torch.compile(fn, backend=road, dynamic=dynamic), road


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Mlp(nn.Module):
    """Gate, up and down, with 16 or 32 features."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 32, bias)
        self.up = nn.Linear(16, 32, bias)
        self.down = nn.Linear(32, 16, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def shares_storage(*parameters: torch.Tensor) -> bool:
    return len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1


def assert_like_eager(compiled: Any, model: Any, x: torch.Tensor = X) -> None:
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


# -- what is packed

_QWEN2 = Architecture("qwen2", "Qwen2Config", "Qwen2ForCausalLM", _GROUPED, "decoder")
_GEMMA2 = Architecture("gemma2", "Gemma2Config", "Gemma2ForCausalLM", _HEADS, "decoder")
_LLAMA, _, _, _PHI3, _ = DECODERS


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [(_LLAMA, 4), (_QWEN2, 4), (_GEMMA2, 4), (_PHI3, 0)],  # Phi-3's layers are packed by its authors
    ids=lambda value: getattr(value, "name", None),
)
def test_a_layer_has_two_groups_and_gives_what_eager_gives(architecture: Architecture, groups: int) -> None:
    model = architecture.build("sdpa" if architecture is not _GEMMA2 else "eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(tokens(2, 8, 0), use_cache=False).logits
    run, road = pack(model)
    got = run(tokens(2, 8, 0), use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert road.packed == len(road.groups) == groups
    assert len({id(r) for r in road.groups if r.module.endswith((".self_attn", ".mlp"))}) == groups
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_bias_and_no_bias_are_packed_apart() -> None:
    """Whisper's keys have no bias: queries and values are packed, or keys and values are not."""
    model = WHISPER.build("sdpa")
    attention = model.model.encoder.layers[0].self_attn
    run, road = pack(lambda x: attention(x)[0])
    x = torch.randn(1, 8, 64)
    torch.testing.assert_close(run(x), attention(x)[0], atol=1e-5, rtol=1e-5)
    assert [region.pattern for region in road.groups] == ["2 linear layers"] and road.packed == 1
    assert shares_storage(attention.q_proj.weight, attention.v_proj.weight)
    assert shares_storage(attention.q_proj.bias, attention.v_proj.bias)
    assert not shares_storage(attention.q_proj.weight, attention.k_proj.weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_may_be_symbolic(dynamic: bool) -> None:
    model = Mlp(bias=True)
    run, road = pack(model, dynamic=dynamic)
    for rows in (3, 5):
        assert_like_eager(run, model, torch.randn(rows, 16))
    assert len(road.graphs) == (1 if dynamic else 2) and road.packed == len(road.groups)


def test_the_option_the_kinds_and_the_policy_turn_it_off() -> None:
    off = [
        {"pack_weights": False},
        {"kinds": ["attention"]},
        {"disable": ["aten.packed"]},
        {"policy": "version: 1\nrules:\n  - deny: '*'\n"},
    ]
    for chosen in off:
        model = Mlp()
        run, road = pack(model, **chosen)
        assert_like_eager(run, model)
        assert road.packed == 0 and not shares_storage(model.gate.weight, model.up.weight)


# -- what is refused


class Tied(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.gate(x * 2).sum()


class Written(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        gate = self.gate(x)
        x[0].mul_(2)
        return self.down(F.silu(gate) * self.up(x))


class WrittenWeight(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate(x)
        self.up.weight[0].mul_(0.5)
        return self.down(F.silu(gate) * self.up(x))


class WrittenResult(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(x).mul_(2) * self.up(x))


class Returned(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.gate(x).sum(), self.up(x).sum()]), self.up(x).T  # type: ignore[return-value]


class Strided(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(x).as_strided((3, 32), (32, 1)) * self.up(x))


class OtherInput(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x + 1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Tied, "used elsewhere"),
        (Written, "their input is written"),
        (WrittenWeight, "used elsewhere"),
        (WrittenResult, "is written in place"),
        (Strided, "by their place in memory"),
        (OtherInput, None),
    ],
)
def test_near_misses_are_left_alone(kind: type[Mlp], reason: str | None) -> None:
    model, other = kind(), kind()
    other.load_state_dict(model.state_dict())
    run, road = pack(model)
    assert_like_eager(run, other)
    assert road.packed == 0 and not shares_storage(model.gate.weight, model.up.weight)
    assert [reason in region.reason for region in road.groups] == [True] * (reason is not None)  # type: ignore[operator]


def test_a_result_whose_memory_the_caller_gets_keeps_its_layout() -> None:
    model = Returned()
    run, _ = pack(model)
    (sums, view), (expected, plain) = run(X), model(X)
    torch.testing.assert_close((sums, view), (expected, plain))
    assert view.stride() == plain.stride() and view.untyped_storage().nbytes() == plain.untyped_storage().nbytes()


def _expand(model: Mlp) -> None:
    model.up.weight.data = model.gate.weight.data


def _transposed(model: Mlp) -> None:
    model.up.weight.data = torch.randn(16, 32).T


def _numpy(model: Mlp) -> None:
    model.keep = torch.randn(32, 16).numpy()  # type: ignore[assignment]
    model.up.weight.data = torch.from_numpy(model.keep)


def _seen(model: Mlp) -> None:
    model.keep = model.up.weight.detach()  # type: ignore[assignment]


def _half(model: Mlp) -> None:
    model.whole = torch.randn(64, 16)  # type: ignore[assignment]
    model.up.weight.data = model.whole[1:33]  # type: ignore[index]


def _subclass(model: Mlp) -> None:
    class Quantised(nn.Parameter):
        pass

    model.up.weight = Quantised(model.up.weight.data)


def _inference_tensor(model: Mlp) -> None:
    with torch.inference_mode():
        model.up.weight = nn.Parameter(torch.randn(32, 16), requires_grad=False)


def _shared_memory(model: Mlp) -> None:
    model.share_memory()


def _odd(model: Mlp) -> None:
    model.up = nn.Linear(16, 31, dtype=torch.float32)
    model.gate = nn.Linear(16, 31, dtype=torch.float32)
    model.down = nn.Linear(31, 16, dtype=torch.float32)
    for layer in (model.up, model.gate):
        layer.weight.data = layer.weight.data.clone()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_expand, "shares its memory|share their memory"),
        (_transposed, "not contiguous"),
        (_numpy, "not PyTorch's own"),
        (_seen, "shares its memory with another"),
        (_half, "shares its memory with another"),
        (_subclass, "no plain parameter"),
        (_inference_tensor, "inference mode"),
        (_shared_memory, "other processes|not PyTorch's own"),
        (_odd, "multiple of 64 bytes"),
    ],
)
def test_parameters_that_may_not_move_stay(change: Callable[[Mlp], None], reason: str) -> None:
    import re

    model = Mlp(bias=change is _odd)
    change(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    run, road = pack(model)
    assert_like_eager(run, model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert road.packed == 0
    assert all(re.search(reason, region.reason) for region in road.groups), road.groups


def test_training_is_left_alone_and_gradients_flow() -> None:
    with torch.enable_grad():
        model = Mlp()
        run, road = pack(model)
        run(X).sum().backward()
        assert road.packed == 0 and [region.reason for region in road.groups] == ["needs gradient"]
        assert model.gate.weight.grad is not None and not shares_storage(model.gate.weight, model.up.weight)


# -- what goes on working


@pytest.fixture
def packed() -> tuple[Any, Mlp, PackedRoad]:
    model = Mlp(bias=True)
    run, road = pack(model)
    run(X)
    assert road.packed == 1 and shares_storage(model.gate.weight, model.up.weight)
    return run, model, road


def test_weights_that_are_written_in_place_are_read(packed: tuple[Any, Mlp, PackedRoad]) -> None:
    run, model, road = packed
    model.load_state_dict(Mlp(bias=True).state_dict())
    assert_like_eager(run, model)
    model.up.weight += 0.1 * torch.randn(32, 2) @ torch.randn(2, 16)  # a LoRA merge
    model.gate.weight.data += 0.1 * torch.randn(32, 2) @ torch.randn(2, 16)
    assert_like_eager(run, model)
    model.up.weight[3] = 0
    model.gate.bias.zero_()
    assert_like_eager(run, model)
    assert road.packings[0].packs[0].moves == 1 and len(road.graphs) == 1 and not road.unpacked_calls


def _assign(model: Mlp) -> None:
    model.load_state_dict({name: value.clone() for name, value in Mlp(bias=True).state_dict().items()}, assign=True)


def _data(model: Mlp) -> None:
    model.up.weight.data = torch.randn(32, 16)


def _to(model: Mlp) -> None:
    model.double().float()


def _parameter(model: Mlp) -> None:
    model.gate.weight = nn.Parameter(torch.randn(32, 16))


@pytest.mark.parametrize("change", [_assign, _data, _to, _parameter])
def test_weights_whose_memory_was_replaced_are_packed_again(
    packed: tuple[Any, Mlp, PackedRoad], change: Callable[[Mlp], None]
) -> None:
    run, model, road = packed
    change(model)
    assert not shares_storage(model.gate.weight, model.up.weight)
    expected = model(X)
    torch.testing.assert_close(run(X), expected, atol=1e-5, rtol=1e-5)
    assert shares_storage(model.gate.weight, model.up.weight) and not road.unpacked_calls
    assert_like_eager(run, model)


def test_weights_that_may_not_move_any_more_run_unpacked(
    packed: tuple[Any, Mlp, PackedRoad], caplog: pytest.LogCaptureFixture
) -> None:
    run, model, road = packed
    other = torch.randn(32, 16)
    model.up.weight.data = other
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            other.mul_(2)
            assert_like_eager(run, model)
    assert road.unpacked_calls == 2 and model.up.weight.data_ptr() == other.data_ptr()
    assert len([r for r in caplog.records if "without packed weights" in r.message]) == 1


def test_weights_that_move_at_every_call_stop_being_packed(packed: tuple[Any, Mlp, PackedRoad]) -> None:
    run, model, road = packed
    for _ in range(8):
        _data(model)
        assert_like_eager(run, model)
    assert road.packings[0].packs[0].moves == 4 and road.unpacked_calls == 5


def test_another_dtype_is_another_graph(packed: tuple[Any, Mlp, PackedRoad]) -> None:
    run, model, road = packed
    model.double()
    assert_like_eager(run, model, X.double())
    assert len(road.graphs) == 2 and road.packed == 2


def test_a_second_graph_uses_what_the_first_packed(packed: tuple[Any, Mlp, PackedRoad]) -> None:
    run, model, road = packed
    address = model.gate.weight.data_ptr()
    assert_like_eager(run, model, torch.randn(1, 16))
    other = torch.compile(lambda x: model.down(model.up(x) * model.gate(x)), backend=road)  # the other order
    torch.testing.assert_close(other(X), model.down(model.up(X) * model.gate(X)))
    assert road.packed == 3 and model.gate.weight.data_ptr() == address
    assert [pack.moves for packing in road.packings for pack in packing.packs] == [1, 1, 0, 0, 0, 0]


def test_memory_is_freed_with_the_model_and_not_with_the_compiled_function(
    packed: tuple[Any, Mlp, PackedRoad],
) -> None:
    run, model, road = packed
    graph = road.packings[0].packs[0]
    storage = torch.multiprocessing.reductions.StorageWeakRef(model.gate.weight.untyped_storage())
    expected = model(X)
    del run
    torch._dynamo.reset()
    gc.collect()
    torch.testing.assert_close(model(X), expected)
    model.gate.weight.data, model.up.weight.data = torch.zeros(32, 16), torch.zeros(32, 16)
    assert graph.state[1] is not None and storage.expired()


def test_a_packed_model_is_saved_copied_and_pickled(packed: tuple[Any, Mlp, PackedRoad]) -> None:
    run, model, _ = packed
    plain = Mlp(bias=True)
    sizes = []
    for each in (plain, model):
        file = io.BytesIO()
        torch.save(each.state_dict(), file)
        sizes.append(file.tell())
        file.seek(0)
        loaded = Mlp(bias=True)
        loaded.load_state_dict(torch.load(file))
        torch.testing.assert_close(loaded(X), each(X))
    assert sizes[1] <= sizes[0]
    twin = copy.deepcopy(model)
    assert not shares_storage(twin.gate.weight, twin.up.weight)
    twin.gate.weight.zero_()
    assert_like_eager(run, model)
    assert float(model.gate.weight.abs().sum()) > 0


def test_a_packed_model_is_saved_as_safetensors(packed: tuple[Any, Mlp, PackedRoad], tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    _, model, _ = packed
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = Mlp(bias=True)
    loaded.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(loaded(X), model(X))


def test_a_packed_model_can_be_trained(packed: tuple[Any, Mlp, PackedRoad]) -> None:
    run, model, road = packed
    twin = copy.deepcopy(model)
    with torch.enable_grad():
        for each in (model, twin):
            optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
            for _ in range(3):
                optimizer.zero_grad()
                (run if each is model else each)(X).pow(2).sum().backward()
                optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert_like_eager(run, model)
    assert shares_storage(model.gate.weight, model.up.weight) and road.packed == 1


def test_weights_do_not_move_while_another_thread_runs(packed: tuple[Any, Mlp, PackedRoad]) -> None:
    """A compiled function that is under way reads the weights where they were."""
    inside, go_on = threading.Event(), threading.Event()
    holder = Packing([])

    def slow(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert go_on.wait(30)
        return x

    thread = threading.Thread(target=holder.bind(slow, slow), args=(X,))
    thread.start()
    assert inside.wait(30)
    run, model, road = packed
    try:
        _data(model)
        address = model.up.weight.data_ptr()
        assert_like_eager(run, model)
        assert model.up.weight.data_ptr() == address and road.unpacked_calls == 1
    finally:
        go_on.set()
        thread.join()
    assert_like_eager(run, model)
    assert shares_storage(model.gate.weight, model.up.weight)


def test_inference_mode_packs_ordinary_tensors() -> None:
    model = Mlp()
    run, road = pack(model)
    with torch.inference_mode():
        assert_like_eager(run, model)
    assert road.packed == 1 and not model.gate.weight.is_inference()
    _data(model)
    with torch.inference_mode():
        assert_like_eager(run, model)
    assert not model.up.weight.is_inference() and shares_storage(model.gate.weight, model.up.weight)
    with torch.enable_grad():
        model(X).sum().backward()
    assert model.up.weight.grad is not None


def test_one_group_moves_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a group has moved its old memory is free and the model holds as much as before."""
    model = nn.ModuleList([Mlp() for _ in range(3)])
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    held: list[int] = []
    move = lz_compile.packing._move

    def watched(tensors: Any) -> None:
        old = [torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        move(tensors)
        assert all(reference.expired() for reference in old)
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        held.append(sum(storages.values()))

    monkeypatch.setattr(lz_compile.packing, "_move", watched)
    run, road = pack(lambda x: model[2](model[1](model[0](x))))
    assert_like_eager(run, lambda x: model[2](model[1](model[0](x))))
    assert road.packed == 3 and held == [size] * 3


class Several(nn.Module):
    def __init__(self, sizes: list[int], bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, size, bias, dtype=dtype) for size in sizes])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x).tanh().flatten(0, -2) * (i + 1) for i, layer in enumerate(self.layers)]


@given(
    sizes=st.lists(st.sampled_from([16, 32, 96]), min_size=2, max_size=4),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=8)
def test_any_linear_layers_give_what_they_gave(
    sizes: list[int], shape: list[int], bias: bool, dtype: torch.dtype, order: Any
) -> None:
    model = Several(sizes, bias, dtype)
    run, road = pack(model)
    x = torch.randn(*shape, 32, dtype=dtype)
    for _ in range(2):
        for got, expected in zip(run(x), model(x)):
            assert got.stride() == expected.stride()
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        layer = order.choice(model.layers)
        layer.weight.data = torch.randn_like(layer.weight)
    assert road.packed == 1 and road.linears() == 1 and not road.unpacked_calls


# -- with Inductor


def test_inductor_reads_the_packed_weight_and_follows_new_ones() -> None:
    model = Mlp(bias=True)
    torch._dynamo.reset()
    run = torch.compile(model, backend="layerzero", dynamic=True, options={"strict": True})
    for rows in (3, 5):
        assert_like_eager(run, model, torch.randn(rows, 16))
    packed = [r for r in lz_compile.reports()[-1].regions if r.kind == "projections"]
    assert [region.kernel for region in packed] == ["aten.packed"]
    assert shares_storage(model.gate.weight, model.up.weight)
    _assign(model)
    assert_like_eager(run, model)
    assert shares_storage(model.gate.weight, model.up.weight)
    keep = model.up.weight.detach()
    model.gate.weight.data = torch.randn(32, 16)
    assert_like_eager(run, model)
    assert keep.data_ptr() == model.up.weight.data_ptr()


def test_measuring_compares_one_product_to_several(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LZ_COMPILE_CACHE_DIR", str(tmp_path))
    model = Mlp()
    run, road = pack(model, measure="auto")
    assert_like_eager(run, model)
    (region,) = road.groups
    assert {candidate.kernel for candidate in region.candidates} == {"aten.packed", "inductor"}
    assert all(candidate.source in ("measured", "remembered") for candidate in region.candidates)
    assert (region.kernel == "aten.packed") == shares_storage(model.gate.weight, model.up.weight)
