"""Whether a kernel, and a whole graph, can live in a CUDA graph.

A kernel is captured, its inputs are changed, the graph is replayed and the result compared: that catches lengths that
were read on the host, tables that were planned from old values, and buffers that were freed.  Its memory must come from
the graph's own pool, or the next replay writes into memory that belongs to someone else by then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import storage_key, written_arguments
from lz_compile.qualify import Problem, Reference, Verdict, one_line
from lz_compile.specimen import copy_of, fill

_WARM_UP = 3
# Another process may allocate on the device while one capture runs, hardly in each of several.
_ATTEMPTS = 3


def static_reason(module: fx.GraphModule, cuda_graphs: str) -> str:
    """Why a kernel's module is unsafe to capture by rules alone; empty when the rules let it pass."""
    if not cuda_graphs:
        return "its record does not say that it is safe under CUDA graphs"
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        tags = getattr(node.target, "tags", ())
        if torch.Tag.cudagraph_unsafe in tags:
            return f"{node.target} is tagged cudagraph_unsafe"
        if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
            return f"{node.target} reads values on the host"
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            return "it reads a CPU tensor"
    return ""


def replay_follows(reference: Reference, module: fx.GraphModule, cuda_graphs: str, verdict: Verdict) -> Verdict:
    """Captures the module, changes the inputs, replays, compares.

    ``cuda_graphs`` is what the kernel's record says makes it safe, ``verdict`` what is known of the kernel so far.
    """

    def unsafe(reason: str, pool_bytes: int | None = None) -> Verdict:
        text = f"not safe under CUDA graphs: {reason}"
        return replace(verdict, qualified=False, reason=text, graph_safe=False, pool_bytes=pool_bytes)

    reason = static_reason(module, cuda_graphs)
    if reason:
        return unsafe(reason)
    typical, other = reference.problem("typical", seed=1), reference.problem("other", seed=1)
    inputs = [copy_of(value) for value in typical.inputs]
    try:
        # First in the mode that lets allocations outside the pool happen, so that they are seen; then as Inductor does.
        for _ in range(_ATTEMPTS):
            graph, output, outside, pool_bytes = _capture(module, inputs, "relaxed")
            if not outside:
                graph, output, outside, pool_bytes = _capture(module, inputs, "thread_local")
                break
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        torch.cuda.synchronize()
        return unsafe(f"capture failed: {one_line(failure)}")
    if outside:
        return unsafe(f"{outside} bytes allocated outside the graph's pool", pool_bytes)
    for name, problem in (("as captured", typical), ("changed", other)):
        _fill(inputs, problem)
        graph.replay()
        torch.cuda.synchronize()
        error = reference.error(problem, output)
        if not error <= 1.0:
            text = f"a replay with inputs {name} gives {error:.3g} times the tolerance"
            return unsafe(f"{text} (are lengths read on the host?)", pool_bytes)
    return replace(verdict, graph_safe=True, pool_bytes=pool_bytes)


def _fill(inputs: list[Any], problem: Problem) -> None:
    for target, source in zip(inputs, problem.inputs):
        if isinstance(target, torch.Tensor):
            fill(target, source)


def _capture(
    module: fx.GraphModule, inputs: list[Any], mode: str
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, int, int]:
    """The graph, its output, bytes that were allocated elsewhere and stayed, and bytes of its private pool."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    foreign_before = _foreign_bytes()
    with _allocation_trace() as trace:
        # Both modes let other threads of the user's go on meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
            first = len(trace())  # the capture itself may have taken a few bytes
            output = module(*inputs)
        torch.cuda.synchronize()
        allocated = [entry for entry in trace()[first:] if entry["action"] == "alloc"]
    pool = tuple(graph.pool())
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", ())) == pool]
    outside = sum(
        entry["size"]
        for entry in allocated
        if not any(s["address"] <= entry["addr"] < s["address"] + s["total_size"] for s in segments)
    )
    # The driver rounds what others take to its own pages: a few MiB are no allocation of the kernel's.
    foreign = _foreign_bytes() - foreign_before
    return graph, output, outside + (foreign if foreign > 8 << 20 else 0), sum(s["total_size"] for s in segments)


@contextlib.contextmanager
def _allocation_trace() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What PyTorch's allocator does meanwhile, as a function that gives the events so far."""
    device = torch.cuda.current_device()
    recorded_by_user = torch._C._cuda_isHistoryEnabled()
    if not recorded_by_user:
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=100_000)
    try:
        yield lambda: torch.cuda.memory._snapshot()["device_traces"][device]
    finally:
        if not recorded_by_user:
            torch.cuda.memory._record_memory_history(None)


def _foreign_bytes() -> int:
    """Device memory in use that PyTorch's allocator does not know of."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def skipped_reasons(graph: fx.Graph) -> list[str]:
    """What in a whole graph will make Inductor skip CUDA graphs, each as a line for the report."""
    reasons = []
    owners: dict[int, list[fx.Node]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        name = node.meta.get("lz_name", node.name)
        if not isinstance(value, torch.Tensor):
            continue
        owners.setdefault(storage_key(value), []).append(node)
        if value.device.type == "cpu" and value.dim():
            reasons.append(f"the input {name} is on the CPU")
        if any(isinstance(size, torch.SymInt) for size in value.shape):
            reasons.append(f"the input {name} has a dynamic shape: each new size is captured anew, many are skipped")
    for node in graph.nodes:
        if torch.Tag.cudagraph_unsafe in getattr(node.target, "tags", ()):
            reasons.append(f"{node.target} is tagged cudagraph_unsafe")
        for argument in written_arguments(node):
            value = argument.meta.get("val")
            if isinstance(value, torch.Tensor):
                reasons += [
                    f"the input {owner.meta.get('lz_name', owner.name)} is written and its address is not static"
                    for owner in owners.get(storage_key(value), [])
                    if not _static(owner)
                ]
    return list(dict.fromkeys(reasons))


def _static(node: fx.Node) -> bool:
    """Parameters, buffers and what ``mark_static_address`` marked (a static cache)."""
    facts = node.meta.get("tensor_dict") or {}
    return "_dynamo_static_input_type" in facts or isinstance(node.meta.get("example_value"), torch.nn.Parameter)
