"""Whatever is still matched in a graph with one thing changed means what that graph computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.generation import logits_process as warpers
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lz_compile.patterns.attention import find_attention
from lz_compile.patterns.glu import find_glus
from lz_compile.patterns.norms import find_rms_norms
from lz_compile.patterns.rope import find_ropes
from lz_compile.patterns.sampling import find_samplings
from perturbation import Program, is_matched, perturbed, trace, wrong_attentions, wrong_meanings

pytestmark = pytest.mark.perturbed

# All sizes are equal where they may be: shapes alone do not tell one dimension from another.
SIZE = 6


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- filters

FILTERS: dict[str, Any] = {
    "top-k": warpers.TopKLogitsWarper(5),
    "top-p": warpers.TopPLogitsWarper(0.7),
    "top-p, 3": warpers.TopPLogitsWarper(0.4, min_tokens_to_keep=3),
    "min-p": warpers.MinPLogitsWarper(0.1),
    "min-p, 3": warpers.MinPLogitsWarper(0.3, min_tokens_to_keep=3),
    "epsilon": warpers.EpsilonLogitsWarper(0.02),
    "typical": warpers.TypicalLogitsWarper(0.6),
    "typical, 3": warpers.TypicalLogitsWarper(0.4, min_tokens_to_keep=3),
    "repetition": warpers.RepetitionPenaltyLogitsProcessor(1.3),
}


def _filtered(name: str, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A filter between two others, whose values it may be confused with."""
    scores = warpers.TemperatureLogitsWarper(0.8)(ids, scores)
    scores = FILTERS[name](ids, scores)
    return warpers.TopKLogitsWarper(9)(ids, scores)


def _filter(name: str) -> Program:
    ids = torch.randint(0, 12, (12, 12), generator=torch.Generator().manual_seed(0))
    return trace(functools.partial(_filtered, name), ids, 2 * randn(12, 12))


# -- norms, gated units, rotations


def _norm(kind: Any, dtype: torch.dtype) -> Program:
    module = kind(SIZE).to(dtype)
    module.weight.data = randn(SIZE, seed=1, dtype=dtype)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,)) + x

    return trace(run, randn(SIZE, SIZE, SIZE, dtype=dtype), module.weight.data)


def _glu(activation: Callable[..., torch.Tensor], packed: bool) -> Program:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gate, up = torch.cat([x, y], -1).chunk(2, -1) if packed else (x, y)
        return activation(gate) * up

    return trace(run, randn(2, SIZE, SIZE), randn(2, SIZE, SIZE, seed=1))


def _rotation(dtype: torch.dtype) -> Program:
    def run(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> Any:
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return apply_rotary_pos_emb(q, k, cos, sin)

    q, k = (randn(SIZE, SIZE, SIZE, SIZE, seed=seed, dtype=dtype) for seed in (0, 1))
    return trace(run, q, k, randn(SIZE, SIZE, SIZE, seed=2))


# -- attention


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(2, 3) * 0.4


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(5)
    return (F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).contiguous()


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x[:, ::3][:, :, None].expand(SIZE, 2, 3, SIZE, SIZE).reshape(SIZE, 6, SIZE, SIZE)

    shown = torch.arange(SIZE)[:, None] >= torch.arange(SIZE)
    scores = _scores(q, repeated(k)).masked_fill(~shown, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ repeated(v)


def _softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(_scores(q, k) / 2.5) * 2.5
    row = torch.arange(SIZE)[:, None]
    column = torch.arange(SIZE)[None]
    shown = (column <= row) & (column > row - 3)
    return (scores + torch.where(shown, 0.0, -math.inf)).softmax(-1) @ v


def _sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    logits = v[0, :, 0, 0].reshape(1, -1, 1, 1).expand(SIZE, -1, SIZE, -1)
    scores = torch.cat([_scores(q, k), logits], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def _biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    slopes = (v[0, :, 0, 0].abs() * -0.5)[None, :, None, None]
    distance = (torch.arange(SIZE)[None] - torch.arange(SIZE)[:, None]).abs()
    shown = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    scores = _scores(q, k) + slopes * distance
    return scores.masked_fill(~shown, -math.inf).softmax(-1) @ v


def _stacked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    a, b, c = (x.reshape(SIZE * SIZE, SIZE, SIZE) for x in (q, k, v))
    bias = torch.zeros(SIZE * SIZE, SIZE, SIZE)
    scores = torch.baddbmm(bias, a, b.transpose(1, 2), beta=1.0, alpha=0.4)
    return torch.bmm(scores.softmax(-1), c).view(SIZE, SIZE, SIZE, SIZE)


def _einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.4
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    length = torch.tensor([3, 4, 5, 6, 6, 2])
    padding = torch.arange(SIZE)[None] < length[:, None]
    causal = torch.arange(SIZE)[:, None] >= torch.arange(SIZE)[None]
    mask = causal[None, None] & padding[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4)


def _documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    ids = (v[:, 0, :, 0] > 0).to(torch.int64).cumsum(-1)
    causal = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & causal
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    row, column = torch.arange(SIZE)[:, None] + 1, torch.arange(SIZE)[None]
    mask = (row // 3 == column // 3) & (row >= column)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "plain": _plain,
    "grouped": _grouped,
    "softcap": _softcap,
    "sink": _sink,
    "biased": _biased,
    "stacked": _stacked,
    "einsum": _einsum,
    "sdpa": _sdpa,
    "documents": _documents,
    "chunks": _chunks,
}


def _attention(fn: Callable[..., torch.Tensor]) -> Program:
    return trace(fn, *(randn(SIZE, SIZE, SIZE, SIZE, seed=seed) for seed in range(3)))


# -- all of them

Wrong = Callable[[Program], list[str]]
MEANINGS: dict[str, tuple[Callable[[], Program], Any]] = {
    **{name: (functools.partial(_filter, name), find_samplings) for name in FILTERS},
    "norm of Llama": (lambda: _norm(LlamaRMSNorm, torch.bfloat16), find_rms_norms),
    "norm of Gemma": (lambda: _norm(Gemma2RMSNorm, torch.bfloat16), find_rms_norms),
    "norm of T5": (lambda: _norm(T5LayerNorm, torch.float32), find_rms_norms),
    "silu": (lambda: _glu(F.silu, False), find_glus),
    "gelu, packed": (lambda: _glu(functools.partial(F.gelu, approximate="tanh"), True), find_glus),
    "rotation": (lambda: _rotation(torch.float32), find_ropes),
    "rotation in bfloat16": (lambda: _rotation(torch.bfloat16), find_ropes),
}


def program_of(name: str) -> tuple[Program, Any, Wrong]:
    """A program, who finds its regions, and what is wrong with those of a program like it."""
    if name in MEANINGS:
        build, find = MEANINGS[name]
        return build(), find, lambda program: wrong_meanings(program, find)
    return _attention(ATTENTIONS[name]), find_attention, lambda program: wrong_attentions(program, find_attention)


# A quick suite has the quick ones; the others are traced by tests/mutation.py all the same.
_SLOW = {"top-p, 3", "min-p, 3", "typical", "typical, 3", "rotation in bfloat16"}
_QUICK = [*(name for name in MEANINGS if name not in _SLOW), "plain", "einsum"]


@pytest.mark.slow_but(*_QUICK)
@pytest.mark.parametrize("name", [*MEANINGS, *ATTENTIONS])
def test_what_is_matched_with_one_thing_changed_means_what_is_computed(name: str) -> None:
    program, find, wrong = program_of(name)
    assert is_matched(program, find) and not wrong(program)
    count = 0
    for text, other in perturbed(program):
        count += 1
        assert not wrong(other), text
    assert count > 10
