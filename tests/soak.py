"""Many models in one process: what lz-compile remembers of each may not add up.

    python tests/soak.py --models 200 [--backend inductor] [--seed 0] [--json FILE]

Enters: a number of seeds.  For each a tiny random model is built (a written transformer block, or one of ``tiny.py``'s
architectures with random sizes: norms, feed-forward, heads, attention implementation, mask, cache), compiled, compared
with eager, and dropped after ``torch._dynamo.reset()``.  Leaves: a table of marks, a verdict in one line, and exit
status 1 where something of ours grew or an answer was wrong.

PyTorch grows by itself: every graph that Inductor compiles for a CPU is a shared library that stays loaded.  So memory
is judged by what can be told apart:

* ``held``: graphs, nodes, graph modules and tensors that can be reached from the module-level containers and function
  caches of lz-compile.  None may be, however many models ran.
* ``ours``: live instances of lz-compile's classes, without what the reports hold, of which the newest 1024 are kept,
  and without the newest 4096 measurements, which a process remembers.
* ``entries``: lengths of those containers and caches, without the reports.
* ``graphs``, ``models``: live ``fx.Graph`` and models in the process, whoever holds them.
* RSS, printed for every backend and judged by nobody: compare the same seeds with ``--backend inductor``, which runs
  without lz-compile, and with ``--backend road``, which is
  layerzero with Inductor's part left out: it compiles no library.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import random
import sys
import time
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from lz_compile.database import Database
from tiny import BERT, DECODERS, VIT, WHISPER, padding, tokens

BACKENDS = ("layerzero", "inductor", "road")
_REPORTS = {"lz_compile.report._published"}
_GRAPHS = (fx.Graph, fx.Node, fx.GraphModule)

# -- random models


class Block(nn.Module):
    """One random pre-norm transformer block ``[B, M, D] -> [B, M, D]``, with a static cache of keys or without."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.kv_heads, self.group = choose.choice([1, 2]), choose.choice([1, 2, 3])
        self.heads, self.size = self.kv_heads * self.group, choose.choice([8, 16, 24])
        width, inner = self.heads * self.size, 8 * choose.randint(2, 6)
        self.form = choose.choice(["sdpa", "written", "softcap"])
        self.mask = choose.choice(["none", "causal", "padding", "window"])
        self.rope, self.cached = choose.random() < 0.5, choose.random() < 0.4
        self.activation = choose.choice([F.silu, F.gelu, F.relu])
        self.gated = choose.random() < 0.6
        norm = choose.choice([nn.LayerNorm, nn.RMSNorm])
        self.first, self.second = norm(width), norm(width)
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, self.kv_heads * self.size) for _ in range(2))
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        if self.cached:
            for name in ("keys", "values"):
                self.register_buffer(name, torch.zeros(2, self.kv_heads, 32, self.size))
        self.width = width

    def forward(self, x: torch.Tensor, start: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.first(x)
        q, k, v = (part(y).view(batch, length, -1, self.size).transpose(1, 2) for part in (self.q, self.k, self.v))
        position = torch.arange(length) + start
        if self.rope:
            q, k = self._rotated(q, position), self._rotated(k, position)
        if self.cached:
            k = self.keys.index_copy_(2, position, k)
            v = self.values.index_copy_(2, position, v)
        visible = self._visible(position, torch.arange(k.shape[2]), valid)
        k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        out = self._attention(q, k, v, visible).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.o(out)
        y = self.second(x)
        inner = self.activation(self.gate(y)) * self.up(y) if self.gated else self.activation(self.up(y))
        return x + self.down(inner)

    def _rotated(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        half = self.size // 2
        angle = position[:, None] * (10000.0 ** (-torch.arange(half) / half))
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def _visible(self, query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor) -> torch.Tensor | None:
        if self.mask == "none" and not self.cached:
            return None
        visible = key[None] <= query[:, None]
        if self.mask == "window":
            visible = visible & (key[None] > query[:, None] - 5)
        if self.mask == "padding":
            return (visible & valid[:, None, : key.shape[0]])[:, None]
        return visible[None, None]

    def _attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None
    ) -> torch.Tensor:
        if self.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, visible)
        scores = q @ k.transpose(2, 3) * self.size**-0.5
        if self.form == "softcap":
            scores = 5.0 * torch.tanh(scores / 5.0)
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v


# Takes the model (or what compiles it) and gives its answers: one for each graph that it asks for.
Ask = Callable[[Any], list[torch.Tensor]]


def draw(seed: int) -> tuple[nn.Module, Ask]:
    """A random model and how it is called."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    return _block(choose) if choose.random() < 0.7 else _architecture(choose, seed)


def _block(choose: random.Random) -> tuple[nn.Module, Ask]:
    model = Block(choose).eval()
    length = choose.randint(3, 12)
    x = torch.randn(2, length, model.width)
    valid = torch.ones(2, 32, dtype=torch.bool)
    valid[0, 1 : choose.randint(1, 3)] = False  # every query sees key 0, also through no window
    if model.mask == "padding":
        valid[1, length:] = False

    def ask(run: Any) -> list[torch.Tensor]:
        if model.cached:
            model.keys.zero_(), model.values.zero_()
        answers = [run(x, torch.tensor(0), valid)]
        if model.cached:
            valid[:, length] = True
            answers.append(run(x[:, -1:], torch.tensor(length), valid))
        return answers

    return model, ask


def _architecture(choose: random.Random, seed: int) -> tuple[nn.Module, Ask]:
    from transformers import StaticCache

    chosen = choose.choice([*DECODERS, BERT, VIT, WHISPER])
    settings = dict(chosen.settings)
    size = choose.choice([32, 48, 64, 80])
    layers = {name: 1 for name in ("num_hidden_layers", "encoder_layers", "decoder_layers") if name in settings}
    widths = {name: size for name in ("hidden_size", "d_model") if name in settings}
    inner = {name: 8 * choose.randint(4, 9) for name in ("intermediate_size",) if name in settings}
    model = dataclasses.replace(chosen, settings=settings | layers | widths | inner).build(
        choose.choice(["sdpa", "eager"]), seed
    )
    batch, length = choose.randint(2, 3), choose.randint(6, 20)
    side, cached = choose.choice(["none", "left", "right"]), choose.random() < 0.4
    ids, mask = tokens(batch, length, seed), padding(batch, length, side)

    def ask(run: Any) -> list[torch.Tensor]:
        if chosen.kind == "vision":
            generator = torch.Generator().manual_seed(seed)
            return [run(pixel_values=torch.randn(batch, 3, 32, 32, generator=generator)).last_hidden_state]
        if chosen.kind == "speech":
            generator = torch.Generator().manual_seed(seed)
            features = torch.randn(batch, 8, 80, generator=generator)
            return [run(input_features=features, decoder_input_ids=ids, use_cache=False).logits]
        if chosen.kind == "encoder":
            out = run(input_ids=ids, attention_mask=mask).last_hidden_state
            return [out if mask is None else out[mask.bool()]]
        if cached:
            cache = StaticCache(config=model.config, max_cache_len=32)
            return [run(ids, past_key_values=cache).logits, run(ids[:, -1:], past_key_values=cache).logits]
        out = run(ids, attention_mask=mask, use_cache=False).logits
        return [out if mask is None else out[mask.bool()]]

    return model, ask


def one_model(seed: int, backend: str) -> weakref.ref[nn.Module]:
    """Builds, compiles, compares and drops the model of a seed; only a weak reference comes back.

    Raises:
        AssertionError: the compiled model answers otherwise than eager.
    """
    model, ask = draw(seed)
    with torch.no_grad():
        expected = ask(model)
        got = _ask_compiled(ask, model, backend)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
    torch._dynamo.reset()
    return weakref.ref(model)


def _ask_compiled(ask: Ask, model: nn.Module, backend: str) -> list[torch.Tensor]:
    if backend != "road":
        return ask(torch.compile(model, backend=backend, dynamic=False))
    with mock.patch("torch._inductor.compile_fx.compile_fx", lambda module, inputs, **_: module.forward):
        return ask(torch.compile(model, backend="layerzero", dynamic=False))


# -- what is still there


def containers() -> dict[str, Any]:
    """The module-level containers and function caches of lz-compile's loaded modules, by full name."""
    found: dict[str, Any] = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.split(".")[0] != "lz_compile" or module is None:
            continue
        for name, value in vars(module).items():
            if name.startswith("__"):
                continue
            if isinstance(value, type) and value.__module__ == module_name:
                for field, inner in vars(value).items():
                    if not field.startswith("__") and _is_container(inner):
                        found[f"{module_name}.{name}.{field}"] = inner
            elif _is_container(value) and id(value) not in {id(other) for other in found.values()}:
                found[f"{module_name}.{name}"] = value
    return found


def _is_container(value: Any) -> bool:
    mutable = (dict, list, set, deque, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
    return isinstance(value, (*mutable, functools._lru_cache_wrapper))


def _entries(container: Any) -> int:
    if isinstance(container, functools._lru_cache_wrapper):
        return container.cache_info().currsize
    assert isinstance(container, Sized)
    return len(container)


def held(found: dict[str, Any]) -> Counter[str]:
    """How many graphs, nodes, graph modules and tensors each container keeps alive, by the container's name.

    Modules, classes and functions' globals are no way to go on: all of the process could be reached through them.
    """
    walls = _walls()
    counts: Counter[str] = Counter()
    for name, container in found.items():
        for value in _reachable(container, walls):
            if isinstance(value, (*_GRAPHS, torch.Tensor)):
                counts[name] += 1
    return counts


def _walls() -> set[int]:
    return {id(vars(module)) for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)}


def _reachable(start: Any, walls: set[int]) -> Iterator[Any]:
    stops = (types.ModuleType, type, torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
    seen, waiting = {id(start)}, [start]
    while waiting:
        value = waiting.pop()
        yield value
        if type(value) is functools._lru_cache_wrapper:  # its function leads to all of the module
            following = [other for other in gc.get_referents(value) if not isinstance(other, types.FunctionType)]
        else:
            following = gc.get_referents(value)
        for other in following:
            if id(other) not in seen and id(other) not in walls and not isinstance(other, stops):
                seen.add(id(other))
                waiting.append(other)


@dataclasses.dataclass
class Mark:
    """What the process holds after some models.  ``held`` and ``entries`` are by container."""

    models: int
    seconds: float
    rss: float
    held: dict[str, int]
    ours: dict[str, int]
    entries: dict[str, int]
    graphs: int
    nodes: int
    graph_modules: int
    alive: int
    reports: int


def mark(models: int, began: float, dropped: list[weakref.ref[nn.Module]]) -> Mark:
    gc.collect()
    gc.collect()
    found = containers()
    alive = gc.get_objects()
    kinds: Counter[type] = Counter(type(value) for value in alive)
    walls = _walls()
    reported = {id(one) for name in _REPORTS & found.keys() for one in _reachable(found[name], walls)}
    for database in [value for value in alive if type(value) is Database]:
        reported |= {id(one) for record in database._own.values() for one in (record, record.key)}
    ours = Counter(
        type(value).__name__
        for value in alive
        if str(type(value).__module__).split(".")[0] == "lz_compile" and id(value) not in reported
    )
    del alive
    return Mark(
        models=models,
        seconds=time.perf_counter() - began,
        rss=_resident(),
        held=dict(held(found)),
        ours=dict(ours),
        entries={name: _entries(value) for name, value in found.items() if name not in _REPORTS},
        graphs=sum(count for kind, count in kinds.items() if issubclass(kind, fx.Graph)),
        nodes=sum(count for kind, count in kinds.items() if issubclass(kind, fx.Node)),
        graph_modules=sum(count for kind, count in kinds.items() if issubclass(kind, fx.GraphModule)),
        alive=sum(ref() is not None for ref in dropped),
        reports=sum(_entries(value) for name, value in found.items() if name in _REPORTS),
    )


def _resident() -> float:
    """MiB of this process in memory, 0.0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 2**20


def leaks(marks: list[Mark]) -> list[str]:
    """What of ours grew, as sentences; none when memory is flat.

    The first mark stands after the warm-up.  What settles later (a kernel tried the first time, the word of a new
    architecture) adds an entry or an instance now and then; a leak adds one for each model, or for half of them.
    """
    first, last = marks[0], marks[-1]
    more = max(last.models - first.models, 1)
    found = [
        f"{name} holds {count} graph values or tensors"
        for name, count in last.held.items()
        if count > first.held.get(name, 0)
    ]
    for what, before, after in (("instances of", first.ours, last.ours), ("entries in", first.entries, last.entries)):
        for name, count in after.items():
            grown = count - before.get(name, 0)
            if grown > more / 4:
                found.append(f"{grown} more {what} {name} after {more} more models")
    return found


def verdict(backend: str, marks: list[Mark], wrong: list[str]) -> tuple[bool, str]:
    """Whether all is well, and the line that says so."""
    first, last = marks[0], marks[-1]
    more = max(last.models - first.models, 1)
    found = [*wrong, *leaks(marks)]
    if last.alive > first.alive:
        found.append(f"{last.alive} dropped models are alive")
    state = "FLAT" if not found else "GROWS OR WRONG: " + "; ".join(found)
    return not found, (
        f"{backend}, {last.models} models: {state}. From model {first.models} on: "
        f"{sum(last.held.values()) - sum(first.held.values()):+d} values held by lz-compile, "
        f"{sum(last.ours.values()) - sum(first.ours.values()):+d} instances, "
        f"{sum(last.entries.values()) - sum(first.entries.values()):+d} entries, "
        f"{last.graphs - first.graphs:+d} fx graphs in the process, {last.nodes - first.nodes:+d} nodes, "
        f"RSS {last.rss - first.rss:+.0f} MiB ({(last.rss - first.rss) / more:+.3f} a model)"
    )


def soak(
    models: int,
    backend: str = "layerzero",
    seed: int = 0,
    warm_up: int | None = None,
    every: int = 10,
    say: Callable[[str], None] = print,
    after_each: Callable[[], Any] = lambda: None,
    json_path: Path | None = None,
) -> tuple[bool, str, list[Mark]]:
    """Runs ``models`` models; marks are set from ``warm_up`` (a quarter of them, 20 at most) on, ``every`` so many.

    ``after_each`` runs after each model: tests plant a leak with it.
    """
    warm_up = max(1, min(models // 4, 20)) if warm_up is None else warm_up
    began = time.perf_counter()
    dropped: list[weakref.ref[nn.Module]] = []
    wrong: list[str] = []
    marks: list[Mark] = []
    say(
        f"{'models':>6} {'s':>6} {'RSS MiB':>8} {'held':>5} {'ours':>5} {'entries':>7} "
        f"{'graphs':>6} {'nodes':>6} {'modules':>7} {'alive':>5} {'reports':>7}"
    )
    for number in range(models):
        try:
            dropped.append(one_model(seed + number, backend))
        except AssertionError as error:
            wrong.append(f"seed {seed + number} is wrong: {' '.join(str(error).split())[:120]}")
            torch._dynamo.reset()
        after_each()
        count = number + 1
        if count >= warm_up and ((count - warm_up) % every == 0 or count == models):
            now = mark(count, began, dropped)
            marks.append(now)
            say(
                f"{count:>6} {now.seconds:>6.0f} {now.rss:>8.1f} {sum(now.held.values()):>5} "
                f"{sum(now.ours.values()):>5} {sum(now.entries.values()):>7} {now.graphs:>6} {now.nodes:>6} "
                f"{now.graph_modules:>7} {now.alive:>5} {now.reports:>7}"
            )
            if json_path is not None:
                json_path.write_text(json.dumps([dataclasses.asdict(one) for one in marks], indent=1))
    good, line = verdict(backend, marks, wrong)
    say(line)
    return good, line, marks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--backend", choices=BACKENDS, default="layerzero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    say = functools.partial(print, flush=True)
    good, _, _ = soak(arguments.models, arguments.backend, arguments.seed, say=say, json_path=arguments.json)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
