"""Random attention programs, and programs that once gave wrong answers, against eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from road import Road, compile_road

FAST = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
SWEEP = settings(FAST, max_examples=3000)
MIN = torch.finfo(torch.float32).min
TOLERANCE = {
    torch.float32: {"atol": 5e-6, "rtol": 2e-5},
    # Eager rounds scores of about ten and weights to bfloat16.
    torch.bfloat16: {"atol": 0.15, "rtol": 0.15},
    torch.float64: {"atol": 1e-6, "rtol": 1e-6},
}


def assert_same(fn: Any, make: Callable[[int], tuple[Any, ...]], runs: int = 2, dynamic: bool | None = False) -> Road:
    """Eager and compiled give the same results, the same memory layouts, and leave their inputs in the same state."""
    compiled, road = compile_road(fn, dynamic=dynamic)
    with torch.no_grad():
        for seed in range(runs):
            ours, theirs = make(seed), make(seed)
            tolerance = TOLERANCE.get(ours[0].dtype, TOLERANCE[torch.bfloat16])
            expected, got = fn(*theirs), compiled(*ours)
            torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)
            torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
            for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)):
                if isinstance(a, torch.Tensor):
                    assert a.is_contiguous() == b.is_contiguous()
    return road


# -- random programs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """One attention program: every field is a choice that some real program makes."""

    spelling: str
    mask: str
    mask_shape: str
    repeat: str
    layout: str
    write: str
    extra: str
    dtype: torch.dtype
    batch: int
    kv_heads: int
    group: int
    queries: int
    past: int
    size: int
    value_size: int
    scale: float | None
    sites: int

    @property
    def keys(self) -> int:
        return self.past + self.queries + 3

    def inputs(self, seed: int) -> tuple[torch.Tensor, ...]:
        """Query, the new keys and values, their caches, padding, documents, position, and a free mask."""
        generator = torch.Generator().manual_seed(seed)
        b, h, m, n = self.batch, self.kv_heads, self.queries, self.keys

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        padding = torch.rand(b, n, generator=generator) < 0.8
        documents = torch.randint(0, 2, (b, n), generator=generator).cumsum(-1) // 2
        free = torch.rand(b, 1, m, n, generator=generator) < 0.7
        return (
            randn(b, h * self.group, m, self.size),
            randn(b, h, m, self.size),
            randn(b, h, m, self.value_size),
            randn(b, h, n, self.size),
            randn(b, h, n, self.value_size),
            padding,
            documents,
            torch.tensor([self.past + seed % 2]),
            free,
        )

    def __call__(self, q: Any, k: Any, v: Any, keys: Any, values: Any, pad: Any, docs: Any, pos: Any, free: Any) -> Any:
        if self.layout == "heads inside":
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        elif self.layout == "strided":
            q = q.transpose(2, 3).contiguous().transpose(2, 3)
        where = pos + torch.arange(q.shape[2])
        if self.write == "slice":
            keys[:, :, self.past : self.past + q.shape[2]] = k
            values[:, :, self.past : self.past + q.shape[2]] = v
        else:
            keys.index_copy_(2, where, k)
            values.index_copy_(2, where, v)
        mask = self.visible(where, pad, docs, free, keys.shape[2])
        if self.write == "mask later" and mask is not None:
            mask = mask.clone()
            mask[..., 0] = True
        if self.write == "padding later":
            pad.logical_not_()
            pos.add_(1)
        outs = []
        for site in range(self.sites):
            outs.append(self.attend(q * (1 + site), keys, values, mask))
            if self.write == "padding between":
                pad.zero_()
                docs.zero_()
                free.logical_not_()
                pos.add_(1)
            elif self.write == "cache between":
                keys.mul_(0.5)
                values.select(2, 0).zero_()
        return outs

    def visible(self, where: Any, pad: Any, docs: Any, free: Any, length: int) -> Any:
        index = torch.arange(length)
        if self.mask == "none":
            return None
        visible = index[None, :] <= where[:, None]
        if self.mask == "window":
            visible = visible & (index[None, :] > where[:, None] - 4)
        elif self.mask == "chunk":
            visible = visible & (index[None, :] // 4 == where[:, None] // 4)
        elif self.mask == "padding":
            visible = visible & pad[:, None, None, :]
        elif self.mask == "only padding":
            visible = pad[:, None, None, :]
        elif self.mask == "length":
            visible = index[None, None, None, :] < pad.sum(-1)[:, None, None, None]
        elif self.mask == "documents":
            visible = visible & (
                docs[:, None, None, :] == docs.gather(1, where[None].expand(len(docs), -1))[:, None, :, None]
            )
        elif self.mask == "free":
            visible = free
        elif self.mask == "free and causal":
            visible = visible & free
        elif self.mask == "nothing":
            visible = visible & (index < 0)
        if self.mask_shape == "expanded" and self.write != "mask after":
            visible = visible.expand(self.batch, 1, where.shape[0], length)
        return visible

    def attend(self, q: Any, k: Any, v: Any, visible: Any) -> Any:
        scale = self.scale if self.scale is not None else 1 / math.sqrt(q.shape[-1])
        gqa = {}
        if self.repeat == "gqa" and self.spelling.startswith("sdpa"):
            gqa = {"enable_gqa": True}
        else:
            k, v = self.repeated(k), self.repeated(v)
        if self.write == "repeated later" and (self.kv_heads > 1 or self.group == 1):
            k[:, :, -1:] = 0
        fill = -math.inf if self.spelling.endswith("inf") else torch.finfo(q.dtype).min
        if self.spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, **gqa)
        if self.spelling == "sdpa causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, **gqa)
        additive = None
        if visible is not None:
            additive = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, fill)
        if self.spelling.startswith("sdpa add"):
            return F.scaled_dot_product_attention(q, k, v, additive, scale=scale, **gqa)
        if self.spelling.startswith("einsum"):
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        else:
            scores = q @ k.transpose(-1, -2) * scale
        if self.extra == "scores used":
            scores = scores + 0 * scores.sum()
        if visible is None:
            pass
        elif self.spelling.startswith("fill"):
            scores = scores.masked_fill(~visible, fill)
        elif self.spelling.startswith("where"):
            scores = torch.where(visible, scores, torch.tensor(fill, dtype=scores.dtype))
        elif self.spelling.startswith("in place"):
            scores += additive
        else:
            scores = scores + additive
        if self.write == "mask after" and visible is not None and self.mask not in ("free", "free and causal"):
            visible[..., -1:] = True
        weights = torch.softmax(scores, -1, dtype=torch.float32 if self.extra == "float32" else None).to(q.dtype)
        if self.spelling.startswith("einsum"):
            out = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        else:
            out = weights @ v
        if self.extra == "view":
            return out.view(-1, *out.shape[2:])
        if self.extra == "weights used":
            return out, weights
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1) if self.extra == "transpose" else out

    def repeated(self, x: Any) -> Any:
        if self.group == 1:
            return x
        if self.repeat == "interleave":
            return x.repeat_interleave(self.group, dim=1)
        b, h, n, d = x.shape
        return x[:, :, None, :, :].expand(b, h, self.group, n, d).reshape(b, h * self.group, n, d)


PROGRAMS = st.builds(
    Program,
    spelling=st.sampled_from(
        [
            "sdpa",
            "sdpa",
            "sdpa causal",
            "sdpa add",
            "sdpa add inf",
            "add",
            "add inf",
            "fill",
            "fill inf",
            "where",
            "where inf",
            "in place",
            "in place inf",
            "einsum",
            "einsum inf",
        ]
    ),
    mask=st.sampled_from(
        [
            "none",
            "causal",
            "window",
            "chunk",
            "padding",
            "only padding",
            "length",
            "documents",
            "free",
            "free and causal",
            "nothing",
        ]
    ),
    mask_shape=st.sampled_from(["least", "expanded"]),
    repeat=st.sampled_from(["gqa", "interleave", "expand"]),
    layout=st.sampled_from(["contiguous", "heads inside", "strided"]),
    write=st.sampled_from(
        [
            "index_copy",
            "slice",
            "mask later",
            "padding later",
            "padding between",
            "cache between",
            "mask after",
            "repeated later",
        ]
    ),
    extra=st.sampled_from(["", "", "view", "transpose", "float32", "scores used", "weights used"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3]),
    queries=st.one_of(st.just(1), st.integers(1, 20)),
    past=st.integers(0, 6),
    size=st.sampled_from([8, 16]),
    value_size=st.sampled_from([8, 16]),
    scale=st.sampled_from([None, 1.0, 0.3, -0.5]),
    sites=st.integers(1, 3),
)


@FAST
@given(PROGRAMS, st.sampled_from([False, False, None, True]))
def test_a_random_program_gives_eagers_answer(program: Program, dynamic: bool | None) -> None:
    assert_same(program, program.inputs, dynamic=dynamic)


@pytest.mark.slow
@SWEEP
@given(PROGRAMS, st.sampled_from([False, False, None, True]))
def test_many_random_programs_give_eagers_answer(program: Program, dynamic: bool | None) -> None:
    assert_same(program, program.inputs, runs=3, dynamic=dynamic)


# -- programs that once gave wrong answers or failed ------------------------------------------------------------------

B, H, KV, M, D = 2, 4, 2, 10, 16
Make = Callable[[int], tuple[Any, ...]]
ONCE_WRONG: list[Any] = []


def qkv(
    seed: int, kv: int = H, m: int = M, n: int = M, b: int = B, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, H, m, D), (b, kv, n, D), (b, kv, n, D)]
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def tril(length: int = M) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def repeat_kv(x: torch.Tensor) -> torch.Tensor:
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)


def once_wrong(make: Make = qkv) -> Callable[[Any], Any]:
    """Registers a program and what makes its inputs from a seed."""

    def register(fn: Any) -> Any:
        ONCE_WRONG.append(pytest.param(fn, make, id=fn.__name__))
        return fn

    return register


@once_wrong(lambda s: qkv(s, KV))
def write_into_repeated(q, k, v):
    w = repeat_kv(k)
    w[:, :, 0] = 0
    return F.scaled_dot_product_attention(q, w, repeat_kv(v))


@once_wrong()
def write_into_transposed_copy(q, k, v):
    kt = k.transpose(2, 3).contiguous()
    kt[..., 0] = 0
    return torch.softmax(q @ kt * 0.25, -1) @ v


@once_wrong()
def clone_then_detach(q, k, v):
    k = k.clone()
    kt = k.transpose(2, 3).clone()
    k.zero_()
    return torch.softmax(q @ kt.detach() * 0.25, -1) @ v


@once_wrong()
def full_scale_written(q, k, v):
    s = torch.full((M, M), 1.0)
    s[0] = 5
    return torch.softmax(q @ k.mT * s, -1) @ v


@once_wrong()
def int_cast(q, k, v):
    return torch.softmax((q @ k.mT).to(torch.int32).to(torch.float32), -1) @ v


@once_wrong()
def nan_fill(q, k, v):
    return torch.softmax((q @ k.mT).masked_fill(~tril(), math.nan), -1) @ v


@once_wrong(lambda s: qkv(s, b=1))
def mask_broadcasts_batch(q, k, v):
    m = torch.zeros(3, 1, M, M)
    return torch.softmax(q @ k.mT + m, -1) @ v


@once_wrong(lambda s: qkv(s, m=1))
def mask_broadcasts_queries(q, k, v):
    m = torch.where(tril(), 0.0, MIN)
    return torch.softmax(q @ k.mT + m, -1) @ v


@once_wrong(lambda s: qkv(s, b=1)[:1] + qkv(s)[1:])
def sdpa_batch_broadcast_q(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, tril())


@once_wrong(lambda s: qkv(s)[:1] + qkv(s, b=1)[1:])
def sdpa_batch_broadcast_k(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, tril())


@once_wrong()
def stacked_mask_before_view(q, k, v):
    q, k, v = (x.reshape(B * H, M, D) for x in (q, k, v))
    m = torch.where(tril(), 0.0, MIN)[None] * torch.arange(B * H)[:, None, None].clamp(max=1)
    s = (torch.bmm(q, k.transpose(1, 2)) + m).view(B, H, M, M)
    return torch.bmm(torch.softmax(s, -1).view(B * H, M, M), v)


@once_wrong()
def baddbmm_softcap(q, k, v):
    q, k, v = (x.reshape(B * H, M, D) for x in (q, k, v))
    m = torch.where(tril(), 0.0, -3.0).expand(B * H, M, M)
    s = torch.tanh(torch.baddbmm(m, q, k.transpose(1, 2)) / 5.0) * 5.0
    return torch.bmm(torch.softmax(s, -1), v)


@once_wrong(lambda s: [*qkv(s), uniform(s, B, H, M, M)])
def mask_inplace_target_input(q, k, v, mask):
    mask.add_(q @ k.mT)
    return torch.softmax(mask, -1) @ v


@once_wrong()
def chained(q, k, v):
    o = F.scaled_dot_product_attention(q, k, v, tril())
    return F.scaled_dot_product_attention(o, k, v, tril())


@once_wrong()
def chained_eager(q, k, v):
    o = torch.softmax(q @ k.mT * 0.25, -1) @ v
    o = torch.softmax(o @ o.mT * 0.25, -1) @ o
    return F.scaled_dot_product_attention(o, o, o, tril())


@once_wrong()
def view_after(q, k, v):
    return (torch.softmax((q @ k.mT * 0.25).masked_fill(~tril().flip(0), -math.inf), -1) @ v).view(B * H, M, D)


@once_wrong()
def out_strides_mask(q, k, v):
    return (
        torch.softmax(
            (q @ k.mT * 0.25).masked_fill(torch.arange(M)[None] > torch.arange(M)[:, None] + 2, -math.inf), -1
        )
        @ v
    )


@once_wrong(lambda s: [*[x[:, :, :1] if i == 0 else x for i, x in enumerate(qkv(s))], uniform(s, B, H, 1, M) < 0.5])
def hide_dense_written_later(q, k, v, m):
    s = (q @ k.mT).masked_fill(m, MIN)
    m.zero_()
    return torch.softmax(s, -1) @ v


@once_wrong(lambda s: [*[x[:, :, :1] if i == 0 else x for i, x in enumerate(qkv(s))], uniform(s, B, H, 1, M) < 0.5])
def shared_dense_written_between(q, k, v, m):
    a = F.scaled_dot_product_attention(q, k, v, m)
    m[..., 3:] = True
    return a, F.scaled_dot_product_attention(q * 2, k, v, m)


@once_wrong(lambda s: [*qkv(s), uniform(s, B, M) < 0.5])
def shared_padding_written_between(q, k, v, p):
    m = tril() & p[:, None, None, :]
    a = F.scaled_dot_product_attention(q, k, v, m)
    p.zero_()
    return a, F.scaled_dot_product_attention(q * 2, k, v, m)


@once_wrong(lambda s: [*qkv(s), (3 * uniform(s, B, M)).long()])
def shared_documents_written_between(q, k, v, p):
    m = tril() & (p[:, None, None, :] == p[:, None, :, None])
    a = F.scaled_dot_product_attention(q, k, v, m)
    p.zero_()
    return a, F.scaled_dot_product_attention(q * 2, k, v, m)


@once_wrong(lambda s: [*qkv(s), torch.tensor([3 + s])])
def position_incremented(q, k, v, p):
    m = torch.arange(M)[None, None, None] <= (torch.arange(M) - 5 + p)[:, None]
    a = F.scaled_dot_product_attention(q, k, v, m)
    p.add_(1)
    m2 = torch.arange(M)[None, None, None] <= (torch.arange(M) - 5 + p)[:, None]
    p.add_(1)
    return a, F.scaled_dot_product_attention(q * 2, k, v, m), F.scaled_dot_product_attention(q * 2, k, v, m2)


@once_wrong(lambda s: [*qkv(s), torch.tensor([3, 2**40])])
def huge_lengths(q, k, v, p):
    m = torch.arange(M)[None, None, None] < p[:, None, None, None]
    return F.scaled_dot_product_attention(q, k, v, m)


@once_wrong(lambda s: [*qkv(s), torch.arange(2, 7)])
def lengths_sliced(q, k, v, p):
    m = torch.arange(M)[None, None, None] < p[:B][:, None, None, None]
    m2 = torch.arange(M)[None, None, None] < p[2 : 2 + B][:, None, None, None]
    return F.scaled_dot_product_attention(q, k, v, m), F.scaled_dot_product_attention(q, k, v, m2)


@once_wrong()
def huge_window(q, k, v):
    i = torch.arange(M)
    m = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 10**12)
    return F.scaled_dot_product_attention(q, k, v, m)


@once_wrong(lambda s: [*qkv(s, n=0), torch.ones(B, 0, dtype=torch.bool)])
def no_keys_padding(q, k, v, p):
    return torch.softmax((q @ k.mT).masked_fill(~p[:, None, None], MIN), -1) @ v


@once_wrong(lambda s: [*qkv(s, b=0), torch.ones(0, M, dtype=torch.bool)])
def no_batch(q, k, v, p):
    return F.scaled_dot_product_attention(q, k, v, p[:, None, None])


@once_wrong(lambda s: [*qkv(s, m=0), torch.ones(B, M, dtype=torch.bool)])
def no_queries(q, k, v, p):
    return F.scaled_dot_product_attention(q, k, v, p[:, None, None])


@once_wrong(lambda s: [x.to(torch.float16) for x in qkv(s)])
def half_eager_min_empty(q, k, v):
    m = tril().clone()
    m[:3] = False
    mm = torch.where(m, 0.0, torch.finfo(torch.float16).min).to(torch.float16)
    return torch.softmax(q @ k.mT * 4 + mm, -1) @ v


@once_wrong(
    lambda s: [
        *[x.to(torch.bfloat16)[:, :, :1] if i == 0 else x.to(torch.bfloat16) for i, x in enumerate(qkv(s))],
        uniform(s, B, H, 1, M) * 200,
    ]
)
def bf16_with_f32_bias(q, k, v, b):
    return torch.softmax(q @ k.mT * 0.25 + b, -1).to(torch.bfloat16) @ v


@once_wrong()
def scale_zero_div(q, k, v):
    return torch.softmax(q @ k.mT / 0.0, -1) @ v


@once_wrong()
def scale_negative(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, tril().roll(1, 0), scale=-0.5), F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.0
    )


@once_wrong()
def scalar_cast(q, k, v):
    s = torch.full((), 2.7).to(torch.int64)
    return torch.softmax(q @ k.mT * s, -1) @ v


@once_wrong()
def double_scale_tensor(q, k, v):
    s = torch.tensor(0.5)
    s[...] = 3.0
    return torch.softmax(q @ k.mT * s, -1) @ v


@once_wrong()
def attn_out_inplace(q, k, v):
    o = torch.softmax(q @ k.mT, -1) @ v
    r = o.reshape(B * H, M, D)
    r.mul_(2)
    return o, o.stride()


@once_wrong()
def causal_with_a_negative_scale(q, k, v):
    return torch.softmax((q @ k.mT * -0.5).masked_fill(~tril(), -math.inf), -1) @ v


@once_wrong(lambda s: [*qkv(s, b=1, m=1), uniform(s, 1, M) < 0.5, torch.tensor([[True]])])
def a_key_mask_of_one_element(q, k, v, p, one):
    return F.scaled_dot_product_attention(q, k, v, p[:, None, None] & one[:, None, None])


@pytest.mark.parametrize(("fn", "make"), ONCE_WRONG)
def test_a_program_that_was_once_wrong_gives_eagers_answer(fn: Any, make: Make) -> None:
    assert_same(fn, lambda seed: tuple(make(seed)))


def test_gradients_reach_keys_that_were_written_into_a_cache_through_a_view() -> None:
    def step(q, k, v, keys):
        keys = keys.clone()
        keys[:, :, 2:8] = k[:, :, 2:8]
        window = torch.arange(M)[None] <= torch.arange(M)[:, None] + 2
        return F.scaled_dot_product_attention(q, keys, v, window)

    gradients = []
    for fn in (step, compile_road(step)[0]):
        q, k, v = qkv(0)
        k.requires_grad_()
        fn(q, k, v, torch.ones_like(k)).square().sum().backward()
        gradients.append(k.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_constants_of_the_program_reach_inductor(factor: float) -> None:
    """One cache key for both factors would give the first one's answer twice."""

    def scaled(q, k, v):
        weights = torch.tensor([factor, 2.0, 1.0, -1.0])
        infinite = torch.tensor(-math.inf)
        mask = torch.where(torch.arange(M)[None] <= torch.arange(M)[:, None] + 2, 0.0, infinite)
        return F.scaled_dot_product_attention(q * weights[:, None, None], k, v, mask)

    torch._dynamo.reset()
    compiled = torch.compile(scaled, backend="layerzero", options={"strict": True})
    for seed in range(2):
        torch.testing.assert_close(compiled(*qkv(seed)), scaled(*qkv(seed)), atol=2e-6, rtol=1e-5)


def test_a_graph_that_holds_parameters_itself_is_left_alone() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(D, D)

        def forward(self, x):
            return F.scaled_dot_product_attention(self.project(x), x, x, tril())

    torch._dynamo.reset()
    block, x = Block().eval(), qkv(0)[0]
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=False), torch.no_grad():
        compiled = torch.compile(block, backend="layerzero", options={"strict": True})
        torch.testing.assert_close(compiled(x), block(x), atol=2e-6, rtol=1e-5)
