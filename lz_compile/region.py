"""A recognised subgraph and what it means: the vocabulary between patterns, planner, kernels and reports."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.fx as fx

from lz_compile.mask import MaskForm


@dataclass
class Attention:
    """``softmax(softcap(scale * query @ key^T) + mask) @ value`` over graph values.  ``Dk`` and ``Dv`` may differ.

    ``query`` is ``[B, Hq, M, Dk]``, ``key`` ``[B, Hkv, N, Dk]``, ``value`` ``[B, Hkv, N, Dv]``; ``Hq`` is a multiple of
    ``Hkv`` and query head ``h`` uses key/value head ``h // (Hq / Hkv)``.  All have one floating dtype, and strides as
    their fake values say.  The result is ``[B, Hq, M, Dv]`` in the same dtype.

    ``mask_node`` is the mask as the graph had it (bool, True = visible, or float to be added; broadcastable to
    ``[B, Hq, M, N]``), None when there was none or when it is not a value on its own; ``mask`` is what was proved.
    ``softcap`` is 0.0 when there is none; else scores become ``softcap * tanh(scores / softcap)`` before the mask.

    ``stacked`` is None for 4-d values.  For batched products of 3-d values ``[B * H, M, D]`` it is ``H``, or 0 when the
    graph does not tell ``B`` from ``H``: then the whole first dimension counts as heads of one batch row.

    ``sink`` is a floating ``[Hq]`` value, None when there is none: one more logit a head in the softmax's denominator,
    with no value (the attention sinks of GPT-OSS).  A row without visible keys then gives zeros.

    ``plans_sizes`` says that what PyTorch runs for the call as the program has it, cuDNN, makes a plan for each
    combination of sizes.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: MaskForm
    mask_node: fx.Node | None = None
    softcap: float = 0.0
    stacked: int | None = None
    sink: fx.Node | None = None
    plans_sizes: bool = False

    def fake(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The fake query, key and value, 4-d."""
        return self._fake(self.query), self._fake(self.key), self._fake(self.value)

    def _fake(self, node: fx.Node) -> torch.Tensor:
        value = node.meta["val"]
        if self.stacked is None:
            return value
        return value.unflatten(0, (-1, self.stacked)) if self.stacked else value.unsqueeze(0)

    @property
    def batch(self) -> int:
        return self.fake()[0].shape[0]

    @property
    def query_heads(self) -> int:
        return self.fake()[0].shape[1]

    @property
    def kv_heads(self) -> int:
        return self.fake()[1].shape[1]

    @property
    def queries(self) -> int:
        """Query length M."""
        return self.query.meta["val"].shape[-2]

    @property
    def keys(self) -> int:
        """Key length N."""
        return self.key.meta["val"].shape[-2]


@dataclass
class CacheWrite:
    """The in-place write that put this step's keys (or values) into the tensor that attention reads."""

    cache: fx.Node
    write: fx.Node
    kind: str


@dataclass
class Region:
    """One site: the nodes that a kernel would replace, and their meaning.

    ``output`` is the node whose value the kernel gives; ``nodes`` are those that no one else uses, in graph order.
    ``module`` is the module path, such as ``model.layers.0.self_attn``.  ``declined`` is set when the site was seen but
    may not be replaced, with the reason.  ``op`` says what a region without
    ``attention`` means (:mod:`lz_compile.pointwise`) and ``inputs`` are the values that enter it.
    ``stopped`` is the last node that was read of a declined site that was not read to its end.
    ``covers`` are smaller regions of the same graph that this one spans: it runs by one kernel, or they run apart.
    """

    kind: str
    pattern: str
    output: fx.Node
    module: str
    nodes: list[fx.Node] = field(default_factory=list)
    attention: Attention | None = None
    key_cache: CacheWrite | None = None
    value_cache: CacheWrite | None = None
    declined: str = ""
    stopped: fx.Node | None = None
    op: Any = None
    inputs: tuple[fx.Node, ...] = ()
    covers: tuple[Region, ...] = ()


# What stands for a kernel's name where a region is left as it is.
INDUCTOR = "inductor"

# Why a region runs no kernel of its own, for those who count: reasons in words name shapes and times.
Cause = Literal[
    "",
    "declined",  # no kernel may replace it
    "no kernel fits",
    "not measured",
    "not qualified",  # what fits is wrong or unsafe
    "overruled",  # by an option or the policy
    "slower",  # than what Inductor makes of it
    "covered",  # by the kernel of a neighbour: not a fallback
    "weights stay",
    "failed",
]


def microseconds(seconds: float) -> str:
    """``12.61 us``, ``34,550 us``."""
    amount = 1e6 * seconds
    return f"{amount:,.0f} us" if abs(amount) >= 1000 else f"{amount:.4g} us"


def describe_node(node: fx.Node) -> str:
    """``div_3 = aten.div.Tensor [2, 4, 24, 24]``."""
    value = node.meta.get("val")
    shape = f" {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{node.name} = {node.target}{shape}"


# Why a kernel cannot take a region, or None when it can.
Verdict = str | None


def _without_sinks(supports: Callable[[Region], Verdict]) -> Callable[[Region], Verdict]:
    @functools.wraps(supports)
    def guarded(region: Region) -> Verdict:
        if region.attention is not None and region.attention.sink is not None:
            return "has no attention sinks"
        return supports(region)

    return guarded


@dataclass(frozen=True)
class Work:
    """What a kernel has to do for a region, for the roofline estimate that stands in for a measurement.

    ``flops`` and ``bytes`` are what the kernel executes and moves (not the least that any kernel must); ``efficiency``
    is the share of the machine's peak that such kernels are known to reach, ``launches`` how many kernels start.
    ``planning`` is what the host spends on a call of new sizes, in seconds, where sizes are symbolic; it counts beside
    a measured time, too, for which all calls have the same sizes.
    """

    flops: float
    bytes: float
    efficiency: float = 0.5
    launches: int = 1
    planning: float = 0.0


@dataclass(frozen=True)
class Kernel:
    """One way to run one kind of region.

    ``name`` is ``provider.kernel``; ``version`` changes whenever its results or its speed may.  ``supports`` answers
    why it does not fit this region (dtype, shape, mask, the device's capability), or None; whether the provider's
    package works on this machine is asked before, of the :class:`Provider`.  ``emit`` inserts the call in front of
    ``region.output`` through the :class:`~lz_compile.lowering.emit.Emitter` it is given and returns the node that
    replaces it.  ``backward`` says whether gradients flow through it.  ``cuda_graphs`` says what makes it safe to
    capture, empty when it is not.  ``work`` feeds the estimate of its time where nothing was measured; ``first_call``
    says for how many seconds the first call may compile (0 when it did already), which measuring has to afford.
    ``sinks`` declares that it computes :attr:`Attention.sink`; to any other kernel such a region is refused here, so
    that a kernel which never heard of sinks cannot drop one.  ``devices`` are the device types it runs on, empty when
    ``supports`` alone tells: a kind of region that no kernel could take on a graph's devices is not looked for.
    """

    name: str
    kind: str
    version: str
    supports: Callable[[Region], Verdict]
    emit: Callable[..., fx.Node]
    backward: bool = False
    cuda_graphs: str = ""
    summary: str = ""
    work: Callable[[Region], Work] | None = None
    first_call: Callable[[Region], float] | None = None
    sinks: bool = False
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.sinks:
            object.__setattr__(self, "supports", _without_sinks(self.supports))

    @property
    def provider(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Provider:
    """The kernels of one library.

    ``distributions`` are the names under which package indexes know the library; empty for what comes with PyTorch or
    with us.  ``probe`` is ``"module:function"``: a function without arguments that imports the library, makes one tiny
    call and raises when that fails; it may return a mapping whose keys are the kernels that work, by the last part of
    their names.  It runs in a child process (:mod:`lz_compile.discovery`), so it may crash or hang.
    """

    name: str
    kernels: tuple[Kernel, ...]
    distributions: tuple[str, ...] = ()
    probe: str = ""
