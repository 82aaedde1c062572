"""Times functions on a device side by side: what they take on the device itself, once running.

The functions take turns in rounds, so that drift of clocks and of other load hits all alike.  Inputs rotate through
several copies, together larger than the last-level cache where memory allows: a layer of a model finds its inputs cold.
On CUDA calls are captured in a CUDA graph and replayed, which leaves out the host; what cannot be captured is called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Call = Callable[[int], Any]

# One sample lasts at least this long: many times the resolution of CUDA events and of the clock.
_SAMPLE = {"cuda": 4e-4, "cpu": 1e-3}
ROUNDS = 12
# What takes so many times as long as the fastest will not be chosen, whatever its spread.
_HOPELESS = 8


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples, and their variance (s^2)."""

    median: float
    variance: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        spread = statistics.pvariance(samples) if len(samples) > 1 else 0.0
        return cls(statistics.median(samples), spread, len(samples))


def copies_for(bytes_of_one: int, device: torch.device) -> int:
    """How many copies of the inputs are needed so that a call finds none of its own in the cache."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        free = torch.cuda.mem_get_info(device)[0]
    else:
        cache, free = 32 << 20, 2 << 30
    wanted = 1 + -(-2 * cache // max(bytes_of_one, 1))
    return max(1, min(wanted, 8, free // 4 // max(bytes_of_one, 1)))


def time_together(calls: Mapping[Name, Call], copies: int, device: torch.device, seconds: float) -> dict[Name, Timing]:
    """Times each ``call(copy)``, ``copy`` in ``range(copies)``, in rounds that take about ``seconds`` in all.

    Functions must have run before (compiled, warmed up).  Those that raise are left out of the result.  One that takes
    ``_HOPELESS`` times as long as the fastest is called no more: what was seen of it is its result.
    """
    started = time.perf_counter()
    samplers: dict[Name, Callable[[], float]] = {}
    samples: dict[Name, list[float]] = {}
    cost: dict[Name, float] = {}

    def sample(name: Name, take: Callable[[], float]) -> None:
        try:
            samples[name].append(take())
        except Exception:
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # what it ran out of is there for the others
            samples.pop(name, None)
            samplers.pop(name, None)

    for name, call in calls.items():
        samples[name] = []
        maker = _cuda_sampler if device.type == "cuda" else _cpu_sampler

        def first(name: Name = name, call: Call = call, maker: Any = maker) -> float:
            samplers[name], cost[name], once = maker(call, copies)
            # A long call needs no second look before its turn comes.
            return once if cost[name] > seconds / 4 else samplers[name]()

        sample(name, first)
    fastest = min((values[0] for values in samples.values()), default=0.0)
    for name in [name for name in samplers if samples[name][0] > _HOPELESS * fastest]:
        del samplers[name]
    left = max(seconds - (time.perf_counter() - started), seconds / 2)
    rounds = max(2, min(ROUNDS, int(left / max(sum(cost[name] for name in samplers), 1e-9))))
    for _ in range(rounds):
        for name in list(samplers):
            sample(name, samplers[name])
    return {name: Timing.of(values[1:] or values) for name, values in samples.items()}


def _cpu_sampler(call: Call, copies: int) -> tuple[Callable[[], float], float, float]:
    """A function that takes one sample, the seconds that this lasts, and the seconds of a first call."""
    once = _clocked(call, 0, 1)
    repeats = max(1, round(_SAMPLE["cpu"] / max(once, 1e-7)))

    def sample(state: list[int] = [0]) -> float:  # noqa: B006 - the position in the rotation
        first = state[0]
        state[0] = (first + repeats) % copies
        return _clocked(call, first, repeats, copies) / repeats

    return sample, once * repeats, once


def _clocked(call: Call, first: int, repeats: int, copies: int = 1) -> float:
    begin = time.perf_counter()
    for i in range(repeats):
        call((first + i) % copies)
    return time.perf_counter() - begin


def _cuda_sampler(call: Call, copies: int) -> tuple[Callable[[], float], float, float]:
    """See :func:`_cpu_sampler`."""
    once = _event_time(lambda: [call(i) for i in range(copies)]) / copies
    repeats = copies * max(1, round(_SAMPLE["cuda"] / max(once, 1e-6) / copies))
    replay = _captured(call, copies, repeats)

    def run() -> None:
        if replay is not None:
            replay()
        else:
            for i in range(repeats):
                call(i % copies)

    run()
    return lambda: _event_time(run) / repeats, once * repeats, once


def _captured(call: Call, copies: int, repeats: int) -> Callable[[], None] | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for i in range(repeats):
                call(i % copies)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _event_time(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
