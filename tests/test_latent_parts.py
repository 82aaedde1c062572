"""What is read of latent attention, condition by condition, on graphs without a model around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from lz_compile.aliasing import Aliases
from lz_compile.latent import Latent
from lz_compile.patterns.attention import find_attention
from lz_compile.patterns.columns import columns, half
from lz_compile.patterns.latent import find_latents
from lz_compile.region import Region

# As many heads as keys, and as columns of a head: shapes alone do not tell one dimension from another.
BATCH, HEADS, KEYS, PLAIN, VALUES, TURNED, RANK = 2, 12, 12, 5, 7, 4, 6
WIDTH = PLAIN + VALUES
D = PLAIN + TURNED


def _inputs(dtype: torch.dtype = torch.float64, queries: int = 1) -> dict[str, torch.Tensor]:
    shapes = {
        "query": (BATCH, HEADS, queries, D),
        "latents": (BATCH, 1, KEYS, RANK),
        "rotated": (BATCH, 1, KEYS, TURNED),
        "weight": (HEADS * WIDTH, RANK),
    }
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


Values = dict[str, torch.Tensor]


def _heads(kv: torch.Tensor, v: Values) -> torch.Tensor:
    return kv.view(BATCH, KEYS, HEADS, WIDTH).transpose(1, 2)


def _cut(kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return kv.split([PLAIN, VALUES], -1)


def _shared(v: Values) -> torch.Tensor:
    return v["rotated"].expand(-1, HEADS, -1, -1)


def _side_by_side(plain: torch.Tensor, v: Values) -> torch.Tensor:
    return torch.cat([plain, _shared(v)], -1)


def _copied(plain: torch.Tensor, v: Values, start: int = 0, middle: int = PLAIN, end: int = D) -> torch.Tensor:
    key = plain.new_zeros(BATCH, HEADS, KEYS, D)
    key[..., start : start + PLAIN].copy_(plain)
    key[..., middle:end].copy_(_shared(v))
    return key


def attention(
    *,
    expand: Callable[..., Any] = lambda v: F.linear(v["latents"], v["weight"]),
    heads: Callable[..., Any] = _heads,
    cut: Callable[..., Any] = _cut,
    join: Callable[..., Any] = _side_by_side,
    attend: Callable[..., Any] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    queries: int = 1,
    **others: torch.Tensor,
) -> tuple[list[Latent], list[Region], Aliases]:
    """The latents that are read, of ``others`` in place of inputs, in which attentions."""

    def fn(v: Values) -> Any:
        plain, values = cut(heads(expand(v), v))
        key = join(plain, v)  # some change the query
        return attend(v["query"], key, values)

    module = make_fx(fn, pre_dispatch=True, tracing_mode="fake")({**_inputs(queries=queries), **others})
    module.graph.eliminate_dead_code()
    aliases = Aliases(module.graph)
    regions = find_attention(module.graph, aliases, lambda node: "")
    return find_latents(regions, aliases), regions, aliases


def _spelled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


READ: dict[str, dict[str, Any]] = {
    "as it is": {},
    "copied side by side": {"join": _copied},
    "latents without heads": {"latents": torch.randn(BATCH, KEYS, RANK).double()},
    "a reshape": {"heads": lambda kv, v: kv.reshape(BATCH, KEYS, HEADS, WIDTH).transpose(2, 1)},
    "spelled out": {"attend": _spelled},
}


@pytest.mark.parametrize("name", list(READ))
def test_latents_are_read(name: str) -> None:
    (latent,), _, _ = attention(**READ[name])
    assert (latent.keys, latent.values, latent.width) == ((0, PLAIN), (PLAIN, VALUES), WIDTH)


def _strided(kv: torch.Tensor, v: Values) -> torch.Tensor:
    """Heads where tokens are."""
    return torch.as_strided(kv, (BATCH, KEYS, HEADS, WIDTH), (HEADS * KEYS * WIDTH, WIDTH, KEYS * WIDTH, 1)).transpose(
        1, 2
    )


def _twice(kv: torch.Tensor, v: Values) -> torch.Tensor:
    """Columns of every second row."""
    wide = kv.view(BATCH, KEYS, HEADS, WIDTH)
    return torch.cat([wide[:, ::2], wide[:, ::2]], 1).transpose(1, 2)


def _into(make: Callable[..., Any]) -> Callable[..., Any]:
    """Copies into the memory that ``make`` gives for a key."""

    def join(plain: torch.Tensor, v: Values) -> torch.Tensor:
        key = make(plain, v)
        key[..., :PLAIN].copy_(plain)
        key[..., PLAIN:].copy_(_shared(v))
        return key

    return join


def _written(write: Callable[..., Any]) -> Callable[..., Any]:
    """The second part is written by ``write(key, shared)``."""

    def join(plain: torch.Tensor, v: Values) -> torch.Tensor:
        key = plain.new_zeros(BATCH, HEADS, KEYS, D)
        key[..., :PLAIN].copy_(plain)
        write(key, _shared(v))
        return key

    return join


def _into_swapped(plain: torch.Tensor, v: Values) -> torch.Tensor:
    """The heads of one are the tokens of the other."""
    key = plain.new_zeros(BATCH, HEADS, KEYS, D)
    swapped = key.transpose(1, 2)
    swapped[..., :PLAIN].copy_(plain)
    swapped[..., PLAIN:].copy_(_shared(v))
    return key


def _one_part_swapped(plain: torch.Tensor, v: Values) -> torch.Tensor:
    key = plain.new_zeros(BATCH, HEADS, KEYS, D)
    key.transpose(1, 2)[..., :PLAIN].copy_(plain)
    key[..., PLAIN:].copy_(_shared(v))
    return key


def _three_copies(plain: torch.Tensor, v: Values) -> torch.Tensor:
    key = _copied(plain, v)
    key[..., :PLAIN].copy_(plain.flip(2))
    return key


def _a_copy_of_all(plain: torch.Tensor, v: Values) -> torch.Tensor:
    key = plain.new_zeros(BATCH, HEADS, KEYS, D)
    key.view_as(key).copy_(torch.cat([plain, _shared(v)], -1))
    key[..., :PLAIN].copy_(plain)
    return key


def _a_copy_is_read(plain: torch.Tensor, v: Values) -> torch.Tensor:
    key = plain.new_zeros(BATCH, HEADS, KEYS, D)
    part = key[..., :PLAIN].copy_(plain)
    key[..., PLAIN:].copy_(_shared(v))
    v["query"] = v["query"] + part.sum()
    return key


def _a_place_is_read(plain: torch.Tensor, v: Values) -> torch.Tensor:
    key = plain.new_zeros(BATCH, HEADS, KEYS, D)
    place = key[..., :PLAIN]
    v["query"] = v["query"] + place.sum()
    place.copy_(plain)
    key[..., PLAIN:].copy_(_shared(v))
    return key


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.arange(KEYS, device=q.device) > 8
    return (q @ k.mT * 0.3).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


def _written_transposed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    turned = k.transpose(2, 3)
    return (q @ turned.mul_(0.3)).softmax(-1) @ v


def _of_one_head(kv: torch.Tensor, v: Values) -> torch.Tensor:
    v["rotated"], v["query"] = v["rotated"].squeeze(1), v["query"][:, 0]
    return kv.view(BATCH, HEADS * WIDTH, KEYS).transpose(1, 2)


def _stacked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


NOT_READ: dict[str, dict[str, Any]] = {
    "a product by matmul": {"expand": lambda v: torch.matmul(v["latents"], v["weight"].mT)},
    "a bias": {"expand": lambda v: F.linear(v["latents"], v["weight"], v["weight"][:, 0])},
    "an expansion that is more than linear": {"expand": lambda v: F.linear(v["latents"], v["weight"]).relu()},
    "heads by a permutation": {
        "heads": lambda kv, v: kv.view(BATCH, KEYS, HEADS, WIDTH).permute(0, 2, 1, 3),
    },
    "heads in front of tokens": {"heads": lambda kv, v: kv.view(BATCH, HEADS, KEYS, WIDTH)},
    "columns for heads": {"heads": lambda kv, v: kv.view(BATCH, HEADS, WIDTH, KEYS).transpose(2, 3)},
    "columns for tokens": {"heads": lambda kv, v: kv.view(BATCH, WIDTH, HEADS, KEYS).transpose(1, 3)},
    "other strides": {"heads": _strided, "latents": torch.randn(BATCH, KEYS, RANK).double()},
    "rows twice": {"heads": _twice},
    "latents of five dimensions": {"latents": torch.randn(BATCH, 1, 1, KEYS, RANK).double()},
    "values of their own": {"cut": lambda kv: (_cut(kv)[0], _cut(kv)[1].cos())},
    "keys of their own": {"cut": lambda kv: (_cut(kv)[0].cos(), _cut(kv)[1])},
    "values of another expansion": {
        "cut": lambda kv: (_cut(kv)[0], _cut(kv.flip(2).transpose(1, 2).contiguous().transpose(1, 2))[1]),
    },
    "a rotated part for each head": {"rotated": torch.randn(BATCH, HEADS, KEYS, TURNED).double()},
    "one part": {
        "join": lambda plain, v: torch.cat([plain], -1),
        "query": torch.randn(BATCH, HEADS, 1, PLAIN).double(),
    },
    "three parts": {
        "join": lambda plain, v: torch.cat([plain, _shared(v), _shared(v)], -1),
        "query": torch.randn(BATCH, HEADS, 1, D + TURNED).double(),
    },
    "parts one behind the other": {
        "join": lambda plain, v: torch.cat([plain, _shared(v)], 2)[:, :, :KEYS],
        "rotated": torch.randn(BATCH, 1, KEYS, PLAIN).double(),
        "query": torch.randn(BATCH, HEADS, 1, PLAIN).double(),
    },
    "parts in the other order": {"join": lambda plain, v: torch.cat([_shared(v), plain], -1)},
    "a key that is more than joined": {"join": lambda plain, v: _side_by_side(plain, v).sin()},
    "a rotated part in another dtype": {"rotated": torch.randn(BATCH, 1, KEYS, TURNED)},
    "a copy that rounds": {"join": _copied, "rotated": torch.randn(BATCH, 1, KEYS, TURNED)},
    "memory of the caller": {
        "join": _into(lambda plain, v: v["key"]),
        "key": torch.zeros(BATCH, HEADS, KEYS, D).double(),
    },
    "memory that is a copy": {"join": _into(lambda plain, v: torch.cat([plain, _shared(v)], -1).clone())},
    "memory with heads and tokens swapped": {"join": _into_swapped},
    "a part with heads and tokens swapped": {"join": _one_part_swapped},
    "three copies": {"join": _three_copies},
    "a copy of all of it": {"join": _a_copy_of_all},
    "a part that is multiplied": {"join": _written(lambda key, shared: key[..., PLAIN:].mul_(shared))},
    "a part that is added": {"join": _written(lambda key, shared: key[..., PLAIN:].add_(shared))},
    "a first column of zeros": {
        "join": lambda plain, v: _copied(plain, v, start=1, middle=PLAIN),
    },
    "a last column of zeros": {
        "join": lambda plain, v: _copied(plain, v, end=D - 1),
        "rotated": torch.randn(BATCH, 1, KEYS, TURNED - 1).double(),
    },
    "a rotated part for all of a batch": {"join": _copied, "rotated": torch.randn(1, 1, KEYS, TURNED).double()},
    "a rotated part for all tokens": {"join": _copied, "rotated": torch.randn(BATCH, 1, 1, TURNED).double()},
    "a copy that is read": {"join": _a_copy_is_read},
    "a place that is read before": {"join": _a_place_is_read},
    "a causal mask without a tensor": {"attend": _causal, "queries": 2},
    "a mask by a finite number": {"attend": _masked},
    "a key that is written transposed": {"attend": _written_transposed},
    "heads and batch in one dimension": {"attend": _stacked},
    "attention of one head": {
        "latents": torch.randn(BATCH, KEYS, RANK).double(),
        "heads": _of_one_head,
        "cut": lambda kv: (kv[..., :PLAIN], kv[..., PLAIN:]),
        "join": lambda plain, v: torch.cat([plain, v["rotated"]], -1),
    },
    "many queries of large heads": {
        "queries": 17,
        "latents": torch.randn(BATCH, 1, 40, RANK).double(),
        "rotated": torch.randn(BATCH, 1, 40, 80).double(),
        "query": torch.randn(BATCH, HEADS, 17, PLAIN + 80).double(),
        "heads": lambda kv, v: kv.view(BATCH, 40, HEADS, WIDTH).transpose(1, 2),
    },
}


@pytest.mark.parametrize("name", list(NOT_READ))
def test_other_attentions_are_left_alone(name: str) -> None:
    found, regions, _ = attention(**NOT_READ[name])
    assert len(regions) == 1 and found == []


def test_of_large_heads_a_few_queries_read_latents() -> None:
    """The twin of the many queries, which alone are too many."""
    change = {**NOT_READ["many queries of large heads"], "query": torch.randn(BATCH, HEADS, 16, PLAIN + 80).double()}
    assert len(attention(**change)[0]) == 1


@pytest.mark.parametrize(
    "change", [{"sink": True}, {"softcap": 2.0}, {"stacked": 0}, {"declined": "no"}, {"attention": None}]
)
def test_an_attention_of_another_kind_is_left_alone(change: dict[str, Any]) -> None:
    found, (region,), aliases = attention()
    assert len(found) == 1 and region.attention is not None
    if set(change) <= {"declined", "attention"}:
        region = dataclasses.replace(region, **change)
    else:
        change = {name: region.attention.query if value is True else value for name, value in change.items()}
        region = dataclasses.replace(region, attention=dataclasses.replace(region.attention, **change))
    assert find_latents([region], aliases) == []


# -- columns


def _columns(part: Callable[..., torch.Tensor], read: Callable[..., Any], symbolic: bool = False) -> Any:
    """What is read of ``part(x)``, ``x`` being two matrices side by side."""

    def fn(y: torch.Tensor) -> torch.Tensor:
        return part(torch.cat([y, y], -1), y)

    module = make_fx(fn, pre_dispatch=True, tracing_mode="symbolic" if symbolic else "fake")(torch.randn(6, 6))
    return read(module.graph.output_node().args[0])


@pytest.mark.parametrize(
    ("part", "first"),
    [
        (lambda x, y: x[:, 3:5], 3),
        (lambda x, y: x[:, -5:], 7),
        (lambda x, y: x[:, -50:5], 0),
        (lambda x, y: x.narrow(1, 2, 3), 2),
        (lambda x, y: x.narrow(-1, 2, 3), 2),
        (lambda x, y: x.chunk(3, 1)[1], 4),
        (lambda x, y: x.split([2, 3, 7], -1)[2], 5),
        (lambda x, y: x.chunk(2)[1], None),
        (lambda x, y: x[3:], None),
        (lambda x, y: x[:, ::2], None),
        (lambda x, y: x.max(1)[0], None),
        (lambda x, y: x.sort(1)[0], None),
        (lambda x, y: x + 1, None),
    ],
)
def test_columns_begin_where_they_do(part: Callable[..., torch.Tensor], first: int | None) -> None:
    found = _columns(part, columns)
    assert (found and found[1]) == first


@pytest.mark.parametrize(
    ("part", "which"),
    [
        (lambda x, y: x[:, :6], 0),
        (lambda x, y: x[:, 6:], 1),
        (lambda x, y: x.chunk(2, -1)[1], 1),
        (lambda x, y: x.split([3, 3, 6], -1)[2], 1),
        (lambda x, y: x.split([6, 3, 3], -1)[0], 0),
        (lambda x, y: x[:, 3:9], None),
        (lambda x, y: x[:, :5], None),
        (lambda x, y: x.chunk(3, -1)[0], None),
        (lambda x, y: x[:3], None),
    ],
)
def test_halves_are_two(part: Callable[..., torch.Tensor], which: int | None) -> None:
    found = _columns(part, half)
    assert (found and found[1]) == which


def test_halves_of_an_unknown_number_are_two() -> None:
    for part, which in (
        (lambda x, y: x.chunk(2, -1)[0], 0),
        (lambda x, y: x.chunk(2, -1)[1], 1),
        (lambda x, y: x[:, : y.shape[1]], 0),
        (lambda x, y: x[:, 1 : y.shape[1] + 1], None),
        (lambda x, y: x[:, -6:], None),
    ):
        found = _columns(part, half, symbolic=True)
        assert (found and found[1]) == which


def test_what_is_no_tensor_has_no_columns() -> None:
    assert columns(None) is None and half(None) is None  # type: ignore[arg-type]
