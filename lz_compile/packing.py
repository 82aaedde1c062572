"""Parameters side by side in one storage, and compiled functions that read them as one.

Enters: the graph inputs of a compile, and which of them a rewritten graph wants as one tensor.  Leaves: parameters that
are views of a packed storage (``parameter.data`` changes, the :class:`~torch.nn.Parameter` stays), and a function that
hands the packed tensor to the compiled graph in place of the first parameter.

Nothing of the packing is kept but addresses.  At each call the parameters that arrive are looked at: where they lie at
the known addresses, side by side, the packed tensor is an alias of their memory, whoever owns it, and memory is freed
when the parameters let go of it.  Otherwise their memory was replaced (``.to()``, ``parameter.data = ...``,
``load_state_dict(assign=True)``): they are packed anew, or where that may not be the unpacked graph runs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _disable_current_modes

from lz_compile.measure import apart

log = logging.getLogger("lz_compile")

# Every parameter starts at a multiple of so many bytes, as it did in memory of its own: kernels that were compiled for
# the parameters apart rely on it.
_ALIGNMENT = 64
# Parameters that move more often than this (offloading does it at every call) are left where they are.
_MOVES = 4

_lock = threading.Lock()
# Compiled functions that run in some thread: weights do not move under them.
_running = 0


def why_not_packed(tensors: Sequence[Any]) -> str:
    """Why these graph inputs may not move into one storage; empty when they may.

    Each has to be a plain, contiguous parameter ``[N_i, ...]`` that owns its memory alone.
    """
    first = tensors[0]
    for tensor in tensors:
        if type(tensor) is not torch.nn.Parameter or type(tensor.data) is not torch.Tensor:
            return f"a {type(tensor).__name__} is no plain parameter (quantised, sharded?)"
        if tensor.is_inference():
            return "parameters made in inference mode do not move"
        if tensor.device.type not in ("cpu", "cuda") or tensor.layout != torch.strided:
            return f"parameters are on {tensor.device} (offloaded?)"
        if (tensor.dtype, tensor.device, tensor.shape[1:]) != (first.dtype, first.device, first.shape[1:]):
            return "parameters differ in dtype, device or width"
        if not tensor.is_contiguous() or tensor._is_view():
            return "a parameter is a view already, or not contiguous"
        if tensor.numel() * tensor.itemsize % _ALIGNMENT or not tensor.numel():
            return f"a parameter is no multiple of {_ALIGNMENT} bytes"
    return _why_not_owned(tensors)


def _why_not_owned(tensors: Sequence[torch.Tensor]) -> str:
    """Other owners of the memory would no longer see what is written to the parameters."""
    owners: dict[int, int] = {}
    for tensor in tensors:
        key = tensor.untyped_storage()._cdata
        owners[key] = owners.get(key, 0) + 1
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if not storage.resizable() or storage.filename is not None:
            return "a parameter's memory is not PyTorch's own (memory-mapped, or another library's)"
        if tensor.device.type == "cpu" and (storage.is_shared() or tensor.is_pinned()):
            return "a parameter's memory is shared with other processes, or pinned"
        # One for each parameter, one for the variable here.
        if torch._C._storage_Use_Count(storage._cdata) != owners[storage._cdata] + 1:
            return "a parameter shares its memory with another tensor"
    if len({tensor.data_ptr() for tensor in tensors}) != len(tensors):
        return "parameters share their memory"
    return ""


def lie_side_by_side(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each tensor starts where the one before ends in the same storage, all contiguous and of one width."""
    first = tensors[0]
    address, storage = first.data_ptr(), first.untyped_storage()._cdata
    for tensor in tensors:
        alike = (tensor.dtype, tensor.device, tensor.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        if not alike or not tensor.is_contiguous() or tensor.data_ptr() != address:
            return False
        if tensor.untyped_storage()._cdata != storage:
            return False
        address += tensor.numel() * tensor.itemsize
    return True


def memory_order(tensors: Sequence[Any]) -> list[int]:
    """The order in which tensors lie side by side already (another graph packed them), else the one they have."""
    order = list(range(len(tensors)))
    if all(type(tensor) is torch.nn.Parameter and tensor.layout == torch.strided for tensor in tensors):
        by_address = sorted(order, key=lambda i: tensors[i].data_ptr())
        if lie_side_by_side([tensors[i] for i in by_address]):
            return by_address
    return order


def _move(tensors: Sequence[torch.nn.Parameter]) -> None:
    """Copies the parameters into one new storage and makes them views of it; their old memory is freed."""
    device = tensors[0].device
    with torch.inference_mode(False), apart(device):  # gives memory back at its end
        rows = sum(tensor.shape[0] for tensor in tensors)
        packed = torch.empty((rows, *tensors[0].shape[1:]), dtype=tensors[0].dtype, device=device)
        parts = packed.split([tensor.shape[0] for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            part.copy_(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams may still read the old memory
        for tensor, part in zip(tensors, parts):
            tensor.data = part


def _alias(first: torch.Tensor, rows: int) -> torch.Tensor:
    """The ``rows`` from the first row of ``first`` on, as a tensor that does not own its memory."""
    shape = (rows, *first.shape[1:])
    count = rows * (first.numel() // first.shape[0])
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        storage = torch._C._construct_storage_from_data_pointer(first.data_ptr(), first.device, count * first.itemsize)
        return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, 0, shape, _row_major(shape))


def _row_major(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


class Pack:
    """Graph inputs at ``positions`` that a graph reads as one tensor, in this order."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = tuple(positions)
        self.moves = 0
        self.reason = ""
        # Addresses and the alias that they stand for, replaced together.
        self.state: tuple[list[int], torch.Tensor | None] = ([], None)

    def follow(self, tensors: Sequence[Any], running: int) -> str:
        """Finds the parameters where they lie, packing them where need be; why not, when they may not move.

        ``running`` compiled functions of the caller's own are under way.
        """
        with _lock:
            if not lie_side_by_side(tensors):
                reason = why_not_packed(tensors)
                if not reason and self.moves >= _MOVES:
                    reason = "its parameters move again and again (offloaded?)"
                if not reason and _running > running:
                    reason = "another thread runs a compiled function"
                if not reason and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
                    reason = "a CUDA graph is being captured"
                if reason:
                    return reason
                self.moves += 1
                _move(tensors)
            rows = sum(tensor.shape[0] for tensor in tensors)
            self.state = ([tensor.data_ptr() for tensor in tensors], _alias(tensors[0], rows))
        return ""


class Packing:
    """The packs of one compiled graph; ``inputs`` are the inputs of the compile."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.inputs = list(inputs)
        self.packs: list[Pack] = []
        self.moved: set[int] = set()

    def why_not(self, groups: Sequence[Sequence[int]]) -> str:
        """Why the inputs at these groups of positions may not be packed; empty when they may."""
        for positions in groups:
            tensors = [self.inputs[i] for i in positions]
            plain = all(type(tensor) is torch.nn.Parameter for tensor in tensors)
            reason = "" if plain and lie_side_by_side(tensors) else why_not_packed(tensors)
            if reason:
                return reason
        return ""

    def pack(self, groups: Sequence[Sequence[int]]) -> str:
        """Packs the inputs at each group of positions; why not, when some group may not be packed."""
        packs = []
        for positions in groups:
            pack = Pack(positions)
            try:
                reason = pack.follow([self.inputs[i] for i in positions], running=0)
            except torch.OutOfMemoryError:
                reason = "too little memory is free to lay the parameters side by side"
            if reason:
                return reason
            self.moved.update(positions)
            packs.append(pack)
        self.packs += packs
        return ""

    def example_inputs(self) -> list[Any]:
        """The inputs of the rewritten graph."""
        inputs = list(self.inputs)
        for pack in self.packs:
            assert pack.state[1] is not None
            inputs[pack.positions[0]] = pack.state[1]
        return self._fakes(inputs)

    def unpacked_inputs(self) -> list[Any]:
        """The inputs of a graph that takes every parameter by itself."""
        self.packs.clear()
        return self._fakes(list(self.inputs))

    def _fakes(self, inputs: list[Any]) -> list[Any]:
        """Fake tensors for what moved: Dynamo saw other offsets, and of a packed tensor nothing."""
        fake_mode = detect_fake_mode(inputs)
        if fake_mode is not None:
            for position in self.moved:
                value = inputs[position]
                inputs[position] = fake_mode.from_tensor(value.detach(), static_shapes=True)
        return inputs

    def bind(self, compiled: Callable[..., Any], unpacked: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """A function of the original inputs; ``unpacked`` takes those calls whose parameters may not be packed.

        Graphs without packs are bound too: weights do not move while they run.
        """
        packs = self.packs
        warned: list[str] = []

        def run(*args: Any) -> Any:
            global _running
            with _lock:
                _running += 1
            try:
                values = list(args)
                for pack in packs:
                    addresses, alias = pack.state
                    if [args[i].data_ptr() for i in pack.positions] != addresses:
                        reason = pack.follow([args[i] for i in pack.positions], running=1)
                        if reason:
                            assert unpacked is not None
                            if not warned:
                                warned.append(reason)
                                log.warning("lz-compile runs a graph without packed weights: %s", reason)
                            return unpacked(*args)
                        alias = pack.state[1]
                    values[pack.positions[0]] = alias
                return compiled(*values)
            finally:
                with _lock:
                    _running -= 1

        self.inputs = []
        return run
