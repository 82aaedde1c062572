"""RMSNorm sites: PyTorch's own call, and the spellings of model code.

Enters: a normalised graph.  Leaves: one :class:`~lz_compile.region.Region` a site with an
:class:`~lz_compile.pointwise.RmsNorm`, in graph order; a site that may not be replaced carries the reason.

A spelled-out site is anchored at the ``rsqrt`` of "mean of squares plus eps".  It reads backwards to the value that was
squared and forwards through the product of that very value, at most one cast, one weight ``[D]`` and one cast again.
Which casts there are decides the meaning, so each is kept where it stood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.patterns.replaceable import Declined, only_user, own
from lz_compile.patterns.walk import CASTS, arguments, aten, fake, same, same_shape, scalar, target
from lz_compile.pointwise import Cast, RmsNorm
from lz_compile.region import Region

_ADDS = {aten.add.Tensor, aten.add.Scalar}


def find_rms_norms(graph: fx.Graph, aliases: Aliases, module_of: Callable[[fx.Node], str]) -> list[Region]:
    """All RMSNorm sites of a graph.  ``module_of(node)`` gives the module path of a node."""
    regions: list[Region] = []
    for node in graph.nodes:
        if target(node) is aten.rms_norm.default:
            site = None
            region = Region("rms_norm", "torch", node, module_of(node))
        elif target(node) is aten.rsqrt.default:
            site = _outline(node, aliases)
            if site is None:
                continue
            region = Region("rms_norm", "spelled out", site.product, module_of(site.product))
        else:
            continue
        try:
            if site is None:
                _read_call(region, aliases)
            else:
                _read_site(region, site, aliases)
        except Declined as reason:
            region.declined = str(reason)
        regions.append(region)
    return regions


def _precision(dtype: torch.dtype) -> torch.dtype:
    """What a norm of ``dtype`` computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# -- PyTorch's own call ----------------------------------------------------------------------------------------------


def _read_call(region: Region, aliases: Aliases) -> None:
    known = arguments(region.output)
    x, weight = known["input"], known["weight"]
    value = fake(x)
    assert value is not None
    if not value.is_floating_point():
        raise Declined(f"the input has dtype {value.dtype}")
    if len(known["normalized_shape"]) != 1:
        raise Declined("normalises over several dimensions")
    compute = _precision(value.dtype)
    eps = torch.finfo(compute).eps if known["eps"] is None else scalar(known["eps"], aliases)
    if eps is None:
        raise Declined("eps is known only at run time")
    if weight is not None and torch.promote_types(fake(weight).dtype, compute) != compute:  # type: ignore[union-attr]
        raise Declined("the weight has a wider dtype than the computation")
    region.op = RmsNorm(x, weight, eps, "after weight")
    region.inputs = (x,) if weight is None else (x, weight)
    own(region, [region.output], [], aliases)


# -- spelled out -----------------------------------------------------------------------------------------------------


@dataclass
class _Site:
    """From the squared value to the product with the root.

    ``origins`` are the values that the square and the product both come from through casts that lose nothing, nearest
    first; ``edges`` are these casts.
    """

    product: fx.Node
    core: list[fx.Node]
    origins: list[fx.Node]
    edges: list[fx.Node]
    eps: float | None


@dataclass
class _Tail:
    """From the product on: its cast and its weight, for results of one dtype."""

    output: fx.Node
    cast: Cast
    core: list[fx.Node]
    weight: fx.Node | None = None
    offset: float = 0.0
    edges: list[fx.Node] = field(default_factory=list)


def _outline(rsqrt: fx.Node, aliases: Aliases) -> _Site | None:
    """The norm around a root, or None when it is no norm's."""
    total = rsqrt.args[0]
    if target(total) not in _ADDS:
        return None
    assert isinstance(total, fx.Node)
    mean, eps = _operands(total, lambda x: target(x) is aten.mean.dim)
    squared = _squared(mean)
    if squared is None or mean is None or not same(_elements(eps), 1):
        return None
    origins = _through_casts(squared)
    for user in rsqrt.users:
        if target(user) is not aten.mul.Tensor:
            continue
        factor, _ = _operands(user, lambda x: x is not rsqrt)
        behind = _through_casts(factor) if isinstance(factor, fx.Node) else []
        common = [node for node in origins if node in behind]
        if common:
            edges = [node for node in (*origins, *behind) if target(node) in CASTS]
            core: list[fx.Node] = [mean.args[0], mean, total, rsqrt, user]  # type: ignore[list-item]
            return _Site(user, core, common, edges, scalar(eps, aliases))
    return None


def _operands(node: fx.Node, is_first: Callable[[Any], bool]) -> tuple[fx.Node | None, Any]:
    """The two operands of a sum or product, the one that ``is_first`` in front; None when neither is."""
    known = arguments(node)
    a, b = known["self"], known["other"]
    if known.get("alpha", 1) != 1:
        return None, None
    if is_first(a):
        return a, b
    return (b, a) if is_first(b) else (None, None)


def _elements(value: Any) -> Any:
    tensor = fake(value)
    return 1 if tensor is None else tensor.numel()


def _squared(mean: fx.Node | None) -> fx.Node | None:
    """``x`` of a mean of ``x^2`` over the last dimension that keeps it."""
    if mean is None:
        return None
    known = arguments(mean)
    square = known["self"]
    value = fake(square)
    if value is None or not known["keepdim"] or known["dim"] not in ([-1], [value.dim() - 1]):
        return None
    if known.get("dtype") not in (None, value.dtype):
        return None
    kind = target(square)
    if kind is aten.pow.Tensor_Scalar and square.args[1] == 2:
        return square.args[0]
    if kind is aten.square.default or (kind is aten.mul.Tensor and square.args[0] is square.args[1]):
        return square.args[0]
    return None


def _through_casts(node: fx.Node) -> list[fx.Node]:
    """``node`` and the values behind it that it represents exactly, in another dtype."""
    chain = [node]
    while target(node) in CASTS:
        before, after = fake(node.args[0]), fake(node)
        if before is None or after is None or before.device != after.device or not before.is_floating_point():
            break
        if torch.promote_types(before.dtype, after.dtype) != after.dtype:
            break
        node = node.args[0]  # type: ignore[assignment]
        chain.append(node)
    return chain


def _read_site(region: Region, site: _Site, aliases: Aliases) -> None:
    if site.eps is None:
        raise Declined("eps is known only at run time")
    x, tail = _fitting(site, aliases)
    region.output = tail.output
    dtype = fake(x).dtype  # type: ignore[union-attr]
    if fake(tail.output).dtype != dtype:  # type: ignore[union-attr]
        raise Declined(f"takes {dtype} and gives {fake(tail.output).dtype}")  # type: ignore[union-attr]
    compute = _precision(dtype)
    for node in (*site.core, *(tail.core[:1] if tail.cast == "after weight" else [])):
        if fake(node).dtype != compute:  # type: ignore[union-attr]
            raise Declined(f"computes in {fake(node).dtype}")  # type: ignore[union-attr]
    region.op = RmsNorm(x, tail.weight, site.eps, tail.cast, tail.offset)
    region.inputs = (x,) if tail.weight is None else (x, tail.weight)
    used = [node for node in site.edges if node is not x and x in _through_casts(node)]
    own(region, [*site.core, *tail.core], [*used, *tail.edges], aliases)


def _fitting(site: _Site, aliases: Aliases) -> tuple[fx.Node, _Tail]:
    """The origin whose dtype the result has, the farthest first; the farthest when none fits."""
    found = []
    for x in reversed(site.origins):
        tail = _tail(site.product, fake(x).dtype, aliases)  # type: ignore[union-attr]
        found.append((x, tail))
        if fake(tail.output).dtype == fake(x).dtype:  # type: ignore[union-attr]
            return x, tail
    return found[0]


def _tail(product: fx.Node, dtype: torch.dtype, aliases: Aliases) -> _Tail:
    """Reads on from the product for a norm that takes and gives ``dtype``.

    Casts that change nothing belong to the site only in front of a weight: at the end they may be the next site's.
    """
    after = only_user(product)
    if after is not None and _is_cast(after, dtype):
        weighted = only_user(after)
        weight = _other_factor(weighted, after)
        if weight is not None:
            assert weighted is not None
            tail = _Tail(weighted, "before weight", [after, weighted], weight)
        elif fake(product).dtype != dtype:  # type: ignore[union-attr]
            tail = _Tail(after, "before weight", [after])
        else:
            tail = _Tail(product, "before weight", [])
    else:
        weight = _other_factor(after, product)
        if weight is None:
            tail = _Tail(product, "before weight", [])
        else:
            assert after is not None
            tail = _Tail(after, "after weight", [after])
            tail.weight, tail.offset, tail.edges = _read_weight(weight, fake(product).dtype, aliases)  # type: ignore[union-attr]
    last = only_user(tail.output)
    if fake(tail.output).dtype != dtype and last is not None and _is_cast(last, dtype):  # type: ignore[union-attr]
        tail.output = last
        tail.core.append(last)
    return tail


def _is_cast(node: fx.Node, dtype: torch.dtype) -> bool:
    value, before = fake(node), fake(node.args[0]) if node.args else None
    if target(node) not in CASTS or value is None or before is None:
        return False
    return value.dtype == dtype and value.device == before.device


def _other_factor(node: fx.Node | None, known: fx.Node) -> fx.Node | None:
    """What ``known`` is multiplied by in ``node`` if that is a vector over the last dimension."""
    if node is None or target(node) is not aten.mul.Tensor:
        return None
    factor, _ = _operands(node, lambda x: x is not known)
    value, whole = fake(factor), fake(known)
    if value is None or whole is None or not same_shape(value.shape, whole.shape[-1:]):
        return None
    return factor if value.is_floating_point() and value.device == whole.device else None


def _read_weight(node: fx.Node, compute: torch.dtype, aliases: Aliases) -> tuple[fx.Node, float, list[fx.Node]]:
    """``(weight, offset, nodes between)`` of a factor that is ``weight`` or ``offset + weight`` in ``compute``."""
    if target(node) in _ADDS and fake(node).dtype == compute:  # type: ignore[union-attr]
        known = arguments(node)
        for term, number in ((known["self"], known["other"]), (known["other"], known["self"])):
            offset = scalar(number, aliases)
            value = fake(term)
            if offset is not None and known["alpha"] == 1 and value is not None and value.dtype == compute:
                if not same_shape(value.shape, fake(node).shape):  # type: ignore[union-attr]
                    break
                chain = _through_casts(term)
                return chain[-1], offset, [node, *chain[:-1]]
    chain = _through_casts(node)
    return chain[-1], 0.0, chain[:-1]
