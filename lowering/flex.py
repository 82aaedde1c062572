"""PyTorch's flex_attention for masks that were proved, as the higher-order operator that Dynamo itself emits.

Enters: a region with its :class:`~lz_compile.mask.MaskForm`.  Leaves: one ``flex_attention`` node whose ``mask_mod`` is
the form, term by term, and whose block lists are computed on the device from that same ``mask_mod``.  Inductor then
generates the kernel: a block of 128 x 128 scores that the mask hides is skipped, one that it shows whole runs without
it (Dong et al., "Flex Attention", 2024).  Nothing is read on the host, so CUDA graphs may capture it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from lz_compile.lowering import tables  # noqa: F401  (defines lz_compile::stored)
from lz_compile.lowering.aten import every_row_sees_a_key
from lz_compile.lowering.emit import Emitter, MaskArguments
from lz_compile.lowering.semantic import CHUNK_ORIGIN, CHUNK_SHIFT, LOWER, START, STOP, UPPER
from lz_compile.lowering.work import attention_work
from lz_compile.mask import Bound, MaskForm, Read
from lz_compile.region import Kernel, Provider, Region, Verdict, Work

aten = torch.ops.aten

VERSION = "1"
BLOCK = 128
# Below this the decoding variant of flex_attention would run; split-KV kernels are made for that.
_LEAST_QUERIES = {"cuda": BLOCK, "cpu": 17}

_HOP = torch.ops.higher_order.flex_attention

MaskMod = Callable[..., torch.Tensor]


def _supports(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    q, k, v = a.fake()
    device = q.device.type
    if device not in _LEAST_QUERIES:
        return "runs on CUDA and on the CPU"
    if any(not isinstance(size, int) for x in (q, k, v) for size in x.shape):
        return "takes sizes that are known when it is compiled"
    if not a.mask.proved:
        return f"the mask is not proved: {a.mask.unproved}"
    if a.mask.is_trivial:
        return "there is no mask that hides blocks"
    if len(a.mask.documents) > 1:
        return "takes one document term"
    if a.queries < _LEAST_QUERIES[device]:
        return f"is for {_LEAST_QUERIES[device]} queries or more"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the head dimension is strided"
    if a.mask.empty_row != "zero" and not every_row_sees_a_key(a.mask, a.queries, a.keys):
        return f"gives zeros for a row without visible keys, not {a.mask.empty_row!r}"
    return _supports_cuda(q, v) if device == "cuda" else _supports_cpu(q)


def _supports_cuda(query: torch.Tensor, value: torch.Tensor) -> Verdict:
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"does not take {query.dtype} on CUDA"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs compute capability 8.0"
    for size in (query.shape[-1], value.shape[-1]):
        if size & (size - 1) or not 16 <= size <= 256:
            return f"head size {size} is not a power of two from 16 to 256"
    return None


def _supports_cpu(query: torch.Tensor) -> Verdict:
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"does not take {query.dtype} on the CPU"
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs AVX2 on Linux"
    if torch.__version__ < (2, 13):
        return "PyTorch before 2.13 reads inputs that share memory at wrong places on the CPU"
    return None


# -- the mask as a function of (b, h, q, k)


@dataclass(frozen=True)
class _Mask:
    """``form`` as ``mask_mod(b, h, q, k, *tensors)``; ``tensors`` start with a batch dimension when ``per_row``."""

    form: MaskForm
    tensors: dict[str, fx.Node]
    per_row: bool

    def mod(self, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *values: Any) -> torch.Tensor:
        """True where ``q`` sees ``k``; index tensors may be 0-d or broadcast against each other."""
        form = self.form
        named = dict(zip(self.tensors, values))

        def read(name: str, *index: torch.Tensor) -> torch.Tensor:
            where = [b, *index] if self.per_row else list(index)
            return aten.index.Tensor(named[name], where) if where else named[name]

        def bound(name: str, bounds: tuple[Bound, ...], tightest: Callable[..., int]) -> Any:
            return read(name) if name in named else tightest(x.const for x in bounds)

        visible = (q >= 0) & (k >= 0)
        if form.upper:
            visible = visible & (k <= q + bound("upper", form.upper, min))
        if form.lower:
            visible = visible & (k >= q + bound("lower", form.lower, max))
        if form.start:
            visible = visible & (k >= bound("start", form.start, max))
        if form.stop:
            visible = visible & (k < bound("stop", form.stop, min))
        if form.chunk:
            shift, origin = bound("shift", (form.chunk.offset,), min), bound("origin", (form.chunk.origin,), min)
            visible = visible & ((k - origin) // form.chunk.size == (q + shift - origin) // form.chunk.size)
        if "keys" in named:
            visible = visible & read("keys", k)
        if form.documents:
            visible = visible & (read("query documents", q) == read("key documents", k))
        return visible


def _mask_of(emitter: Emitter, region: Region, arguments: MaskArguments) -> _Mask:
    """What is static becomes a number in the generated kernel; the rest is read from the arguments' tensors."""
    a = region.attention
    assert a is not None and arguments.bounds is not None
    form = a.mask
    columns: dict[str, tuple[int, tuple[Bound, ...]]] = {
        "upper": (UPPER, form.upper),
        "lower": (LOWER, form.lower),
        "start": (START, form.start),
        "stop": (STOP, form.stop),
    }
    if form.chunk:
        columns |= {"shift": (CHUNK_SHIFT, (form.chunk.offset,)), "origin": (CHUNK_ORIGIN, (form.chunk.origin,))}
    tensors: dict[str, fx.Node] = {}
    for name, (column, bounds) in columns.items():
        if not all(bound.is_static for bound in bounds):
            tensors[name] = emitter.call(region.output, aten.select.int, arguments.bounds, 1, column)
    rows = {"keys": arguments.key_mask, "query documents": arguments.query_documents}
    rows["key documents"] = arguments.key_documents
    tensors |= {name: node for name, node in rows.items() if node is not None}
    per_row = a.batch > 1 and any("b" in read.axes for read in _reads(form))
    if not per_row:
        tensors = {name: emitter.call(region.output, aten.select.int, node, 0, 0) for name, node in tensors.items()}
    # The CPU's generated kernel reads nothing but tensors in memory: no views, nothing that Inductor would still fuse.
    stored = torch.ops.lz_compile.stored.default
    tensors = {name: emitter.call(region.output, stored, node) for name, node in tensors.items()}
    return _Mask(form, tensors, per_row)


def _reads(form: MaskForm) -> list[Read]:
    bounds = [*form.upper, *form.lower, *form.start, *form.stop]
    if form.chunk:
        bounds += [form.chunk.offset, form.chunk.origin]
    reads = [read for bound in bounds for _, read in bound.reads]
    for documents in form.documents:
        reads += [documents.queries, documents.keys]
    return [*reads, *form.key_padding, *form.key_hidden]


# -- which blocks the kernel visits


def block_lists(
    mask_mod: MaskMod, rows: int, queries: int, keys: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """For each block of queries, the blocks of keys that it sees in part and those that it sees whole.

    Returns:
        Counts int32 [rows, 1, Mb] and indices int32 [rows, 1, Mb, Nb] of the partly visible blocks, then of the wholly
        visible ones.  Of each row of indices the first ``count`` hold, in ascending order.  A block that reaches over
        the end of the queries or keys is never whole.
    """
    b = torch.arange(rows, dtype=torch.int32, device=device)[:, None, None]
    q = torch.arange(queries + -queries % BLOCK, dtype=torch.int32, device=device)[None, :, None]
    k = torch.arange(keys + -keys % BLOCK, dtype=torch.int32, device=device)[None, None, :]
    # Not padded afterwards: the CPU's code for a fused pad of booleans does not compile (PyTorch 2.13).
    visible = mask_mod(b, torch.zeros_like(b), q.clamp(max=queries - 1), k.clamp(max=keys - 1))
    visible = visible & (q < queries) & (k < keys)
    blocks = visible.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    count = blocks.sum((2, 4), dtype=torch.int32)[:, None].expand(rows, -1, -1, -1)
    whole = count == BLOCK * BLOCK
    return *_listed((count > 0) & ~whole), *_listed(whole)


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = chosen.sum(-1, dtype=torch.int32)
    order = torch.argsort(chosen.to(torch.int32), dim=-1, descending=True, stable=True)
    return count, order.to(torch.int32)


# -- emission


def _emit(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    arguments = emitter.mask_arguments(region)
    key = ("flex", arguments, a.mask, a.batch, a.queries, a.keys)
    block_mask, tensors = emitter.shared(key, lambda: _block_mask(emitter, region, arguments))
    score_mod = emitter.shared(("flex scores", a.softcap), lambda: _score_mod(emitter, region))
    options = {
        "BACKEND": "AUTO",
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": False,
        "OUTPUT_MAX": False,
    }
    operands = (*emitter.inputs(region), score_mod, block_mask, float(a.scale), options, (), tensors)
    out = emitter.call(region.output, _HOP, *operands)
    return emitter.result(region, emitter.call(region.output, operator.getitem, out, 0))


def _score_mod(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    softcap = a.softcap

    def score_mod(score: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap) if softcap else score

    device = a.query.meta["val"].device
    with _fake_mode(a.query):
        score = torch.zeros((), device=device)
        return _submodule(emitter, region, "flex_score", _traced(score_mod, score, *_indices(device)))


def _block_mask(
    emitter: Emitter, region: Region, arguments: MaskArguments
) -> tuple[tuple[Any, ...], tuple[fx.Node, ...]]:
    """The block mask as the operator takes it, over graph nodes, and the tensors that its ``mask_mod`` reads."""
    from torch.nn.attention.flex_attention import BlockMask

    a = region.attention
    assert a is not None
    mask = _mask_of(emitter, region, arguments)
    tensors = tuple(mask.tensors.values())
    device = a.query.meta["val"].device
    rows, queries, keys = a.batch if mask.per_row else 1, a.queries, a.keys

    def lists(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return block_lists(lambda *index: mask.mod(*index, *values), rows, queries, keys, device)

    with _fake_mode(a.query):
        values = [node.meta["val"] for node in tensors]
        mask_mod = _submodule(emitter, region, "flex_mask", _traced(mask.mod, *_indices(device), *values))
        nodes = _inlined(emitter, region, _traced(lists, *values), tensors)
        blocks = BlockMask.from_kv_blocks(
            *(node.meta["val"] for node in nodes),
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod.meta["val"],
            seq_lengths=(queries, keys),
            compute_q_blocks=False,
        )
    node_of = {id(node.meta["val"]): node for node in (*nodes, mask_mod)}
    # The order of the operator's tuple differs between versions; BlockMask knows it.
    return tuple(node_of.get(id(part), part) for part in blocks.as_tuple()), tensors


def _fake_mode(node: fx.Node) -> Any:
    return node.meta["val"].fake_mode


def _indices(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Stand-ins for (b, h, q, k)."""
    return tuple(torch.zeros((), dtype=torch.int32, device=device) for _ in range(4))


def _traced(function: Callable[..., Any], *values: torch.Tensor) -> fx.GraphModule:
    # Without annotations: AOTAutograd's cache cannot write those that are strings into its keys.
    plain = lambda *inputs: function(*inputs)  # noqa: E731
    with torch.no_grad():
        return make_fx(plain, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*values)


def _submodule(emitter: Emitter, region: Region, name: str, module: fx.GraphModule) -> fx.Node:
    root = emitter.graph.owning_module
    if root is None:
        raise NotImplementedError("the graph has no module that could hold the mask's subgraph")
    number = 0
    while hasattr(root, f"{name}_{number}"):
        number += 1
    root.add_module(f"{name}_{number}", module)
    with emitter.graph.inserting_before(region.output):
        node = emitter.graph.get_attr(f"{name}_{number}")
    node.meta["val"] = module
    return node


def _inlined(
    emitter: Emitter, region: Region, module: fx.GraphModule, inputs: tuple[fx.Node, ...]
) -> tuple[fx.Node, ...]:
    """The calls of a traced function in front of the region; returns what it returned."""
    known: dict[fx.Node, fx.Node] = dict(zip(module.graph.find_nodes(op="placeholder"), inputs))
    for node in module.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
        if node.op == "call_function":
            known[node] = emitter.call(region.output, node.target, *args, **kwargs)
        elif node.op == "output":
            return tuple(args[0])
        elif node.op != "placeholder":
            raise NotImplementedError(f"a traced mask with {node.op} {node.target}")
    raise AssertionError("a graph without output")


def _work(region: Region) -> Work:
    return attention_work(region, 0.45)


def _first_call(region: Region) -> float:
    """Inductor generates the kernel and the block lists; most of the time goes into the kernel's machine code."""
    return 30.0


ATTENTION = Kernel(
    name="flex.attention",
    kind="attention",
    version=f"{VERSION}, torch {torch.__version__}",
    supports=_supports,
    emit=_emit,
    cuda_graphs="block lists are computed on the device, shapes alone decide the launch",
    summary="flex_attention generated for the proved mask: hidden blocks are skipped",
    work=_work,
    first_call=_first_call,
)

PROVIDER = Provider("flex", (ATTENTION,))
