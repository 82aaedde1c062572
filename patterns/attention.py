"""Attention sites: PyTorch's SDPA call, and attention spelled out as matmul, softmax, matmul.

Enters: a normalised graph.  Leaves: one :class:`~lz_compile.region.Region` a site, in graph order; a site that may not
be replaced carries the reason in ``declined``.

An eager site is anchored at its softmax.  Backwards it reads: the largest score subtracted, a column of attention sinks
(``sinks``), casts, at most one mask (added, filled or selected; ``scores`` has made one of several), an optional logit
softcap, scales, and a product of queries and transposed keys; forwards: the sinks' column dropped, casts, an inactive
dropout, and a product with the values.  Nothing in between may be used by anyone else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases
from lz_compile.gradients import needs_gradient
from lz_compile.mask import EMPTY_ROWS_OF_SOFTMAX, Bound, EmptyRow, EmptyRows, MaskForm
from lz_compile.patterns.cache import find_cache_write
from lz_compile.patterns.empty_rows import BackendsOfSdpa
from lz_compile.patterns.heads import ungroup
from lz_compile.patterns.masks import MaskProver
from lz_compile.patterns.scores import ScoreWriter
from lz_compile.patterns.sinks import drops_last_column, sink_column, without_shift
from lz_compile.patterns.steps import (
    FILLS,
    PRODUCTS,
    SCALES,
    WHERE,
    adds_nothing,
    is_product,
    leads_to_product,
    scale_factor,
    softcap_of,
)
from lz_compile.patterns.walk import (
    CASTS,
    COPIES,
    FUNCTIONAL,
    RESHAPES,
    agree,
    arguments,
    aten,
    fake,
    same,
    same_shape,
    scalar,
    target,
)
from lz_compile.region import Attention, Region

_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten.special_softmax.default}


class Declined(Exception):
    """An attention site that may not be replaced; the message says why."""


def find_attention(graph: fx.Graph, aliases: Aliases, module_of: Any) -> list[Region]:
    """All attention sites of a graph.  ``module_of(node)`` gives the module path of a node.

    Scores that are spelled out may be brought into one shape first, which changes the graph and renews ``aliases``.
    """
    left = _unify_scores(graph, aliases)
    prover = MaskProver(graph, aliases)
    backends = BackendsOfSdpa()
    regions: list[Region] = []
    for node in list(graph.nodes):
        if target(node) is aten.scaled_dot_product_attention.default:
            site = _Site("sdpa", node, aliases)
            read = _read_sdpa
        elif target(node) in _SOFTMAX:
            outline = _outline_eager(node, aliases)
            if outline is None:
                continue
            site = outline
            site.left = left.get(site.scores, "") if site.scores is not None else ""
            read = _read_eager
        else:
            continue
        region = Region("attention", site.pattern, site.output, module_of(site.output))
        try:
            region.attention = read(site, prover, backends)
            region.nodes = sorted(site.nodes, key=aliases.position)
            _require_replaceable(region, site, aliases)
            region.key_cache = find_cache_write(region.attention.key, site.output, aliases)
            region.value_cache = find_cache_write(region.attention.value, site.output, aliases)
        except Declined as reason:
            region.declined = str(reason)
            if region.attention is None:
                region.stopped = site.nodes[-1] if site.nodes else site.output
        regions.append(region)
    return regions


def _unify_scores(graph: fx.Graph, aliases: Aliases) -> dict[fx.Node, str]:
    """Brings spelled-out scores into one shape; says why not, by the node that the softmax reads."""
    writer = ScoreWriter(graph, aliases)
    if writer.spell_shapes():
        aliases.renew(graph)
    softmaxes = [node for node in graph.nodes if target(node) in _SOFTMAX]
    outlines = [_outline_eager(node, aliases) for node in softmaxes]
    sites = [site for site in outlines if site is not None and site.product is not None]
    products = dict.fromkeys(site.product for site in sites)
    outputs = dict.fromkeys(site.output for site in sites)
    if writer.spell_products(products, outputs):  # type: ignore[arg-type]
        aliases.renew(graph)
        outlines = [_outline_eager(node, aliases) for node in softmaxes]
    written = [writer.unify(site.scores) for site in outlines if site is not None and site.scores is not None]
    if any(node is not None for node in written):
        aliases.renew(graph)
    return writer.reasons


@dataclass
class _Site:
    """What is known of a site while it is read: its output, the nodes that belong to it alone, for each outside value
    the node that consumes it first, and the copies of outside values that the kernel will do without.

    ``scores`` are those of an eager site before sinks join them, ``sink`` the sinks' logits, ``left`` says why the
    scores were not brought into one shape.
    """

    pattern: str
    output: fx.Node
    aliases: Aliases
    softmax: fx.Node | None = None
    product: fx.Node | None = None
    scores: fx.Node | None = None
    sink: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    readers: dict[fx.Node, fx.Node] = field(default_factory=dict)
    skipped: list[fx.Node] = field(default_factory=list)
    stacked: int | None = None
    left: str = ""

    def reads(self, value: fx.Node, through: list[fx.Node], consumer: fx.Node) -> None:
        """Notes who consumed ``value`` first on its way into the site; ``through`` are views and copies of it."""
        self.readers.setdefault(value, through[0] if through else consumer)
        self.skipped += through

    def number(self, value: Any) -> float | None:
        return scalar(value, self.aliases)


# -- PyTorch's own call ----------------------------------------------------------------------------------------------


def _read_sdpa(site: _Site, prover: MaskProver, backends: BackendsOfSdpa) -> Attention:
    node = site.output
    site.nodes = [node]
    known = arguments(node)
    query, key, value, mask = known["query"], known["key"], known["value"], known["attn_mask"]
    if known["dropout_p"]:
        raise Declined("dropout is active")
    q, k, v = _tensors(query, key, value)
    if q.dim() == 3:
        site.stacked = 0
    scale = known.get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    scale = site.number(scale)
    if scale is None:
        raise Declined("the scale is known only at run time")
    if not known.get("enable_gqa"):
        key, value = _ungroup_both(site, key, value)
        one_head = q.dim() == 4 and same(k.shape[1], 1) and same(v.shape[1], 1)  # SDPA broadcasts it
        if not one_head and not same(q.shape[-3], k.shape[-3]):
            raise Declined("heads of query and key differ")
    form, mask_node = MaskForm(), None
    if mask is not None:
        site.reads(mask, [], node)
        if known["is_causal"]:
            raise Declined("both a mask and is_causal")
        form, mask_node = _prove(prover, mask, _scores_shape(site, query, key), node, backends.empty_rows(node)), mask
    elif known["is_causal"]:
        form = MaskForm(upper=(Bound(0),))
    plans_sizes = backends.plans_sizes(node)
    return Attention(query, key, value, scale, form, mask_node, stacked=site.stacked, plans_sizes=plans_sizes)


def _tensors(query: fx.Node, key: fx.Node, value: fx.Node) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fake query, key and value: all 4-d, or all 3-d with heads and batch in one dimension."""
    q, k, v = fake(query), fake(key), fake(value)
    if q is None or k is None or v is None or not q.dim() == k.dim() == v.dim() or q.dim() not in (3, 4):
        raise Declined("query, key and value are not all 4-d")
    return q, k, v


def _prove(prover: MaskProver, mask: fx.Node, shape: tuple[Any, ...], at: fx.Node, empty: EmptyRows) -> MaskForm:
    """A mask argument: boolean (True = visible) or float (added)."""
    value = fake(mask)
    if value is None:
        raise Declined("the mask is not a tensor")
    if needs_gradient(mask):
        raise Declined("needs gradient (of the mask)")
    if value.dtype == torch.bool:
        return prover.keep(mask, shape, at, empty.boolean)
    if value.dtype.is_floating_point:
        return prover.add(mask, shape, at, empty)
    raise Declined(f"the mask has dtype {value.dtype}")


def _ungroup_both(
    site: _Site, key: fx.Node, value: fx.Node, transposed: list[fx.Node] | None = None
) -> tuple[fx.Node, fx.Node]:
    """The key and value before their heads were repeated; ``transposed`` leads from ``key`` to the product."""
    base_key, through_key = ungroup(key)
    base_value, through_value = ungroup(value)
    k, v = fake(base_key), fake(base_value)
    assert k is not None and v is not None
    if not same(k.shape[-3], v.shape[-3]):
        base_key, base_value, through_key, through_value = key, value, [], []
    site.reads(base_key, [*through_key, *(transposed or [])], site.product or site.output)
    site.reads(base_value, through_value, site.output)
    return base_key, base_value


def _scores_shape(site: _Site, query: fx.Node, key: fx.Node) -> tuple[Any, ...]:
    """[B, Hq, M, N]."""
    q, k = fake(query), fake(key)
    assert q is not None and k is not None
    if site.stacked is None:
        return (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if not site.stacked:
        return (1, q.shape[0], q.shape[1], k.shape[1])
    return (q.shape[0] // site.stacked, site.stacked, q.shape[1], k.shape[1])


# -- attention spelled out -------------------------------------------------------------------------------------------


def _outline_eager(softmax: fx.Node, aliases: Aliases) -> _Site | None:
    """A softmax between two products, or None when this softmax is not an attention's."""
    scores, inside = without_shift(softmax.args[0])
    found = sink_column(scores)
    if found is not None:
        inside.append(scores)
        scores = found[0]
    product = _back_to_product(scores)
    output = _forward_to_product(softmax, found is not None)
    if product is None or output is None:
        return None
    site = _Site("eager", output, aliases, softmax, product, scores, nodes=inside)
    if found is not None:
        site.sink, column = found[1:]
        site.reads(site.sink, column, inside[-1])
    return site


def _back_to_product(node: fx.Node, depth: int = 12) -> fx.Node | None:
    """The product of queries and keys behind scores, through elementwise calls."""
    current: Any = node
    for _ in range(depth):
        if is_product(current):
            return current
        if not isinstance(current, fx.Node) or current.op != "call_function":
            return None
        tensors = [a for a in current.args if isinstance(a, fx.Node) and fake(a) is not None]
        follow = [a for a in tensors if leads_to_product(a)]
        if len(follow) != 1:
            return None
        current = follow[0]
    return None


_SWAPS = {aten.mT.default, aten.adjoint.default}


def _forward_to_product(softmax: fx.Node, has_sink: bool, depth: int = 8) -> fx.Node | None:
    """The product with the values that follows a softmax, through casts and dropout."""
    current = softmax
    for _ in range(depth):
        users = list(current.users)
        products = [user for user in users if target(user) in PRODUCTS]
        if products:
            return products[0]
        passed = CASTS | COPIES | RESHAPES | {aten.dropout.default}
        steps = [user for user in users if target(user) in passed or (has_sink and drops_last_column(user))]
        if len(steps) != 1:
            return None
        current = steps[0]
    return None


def _read_eager(site: _Site, prover: MaskProver, backends: BackendsOfSdpa) -> Attention:
    assert site.softmax is not None
    _read_weights(site)
    value = _value_of(site.output, site.nodes)
    softmax = arguments(site.softmax)
    scores_value = fake(site.softmax)
    assert scores_value is not None
    if softmax["dim"] not in (-1, scores_value.dim() - 1):
        raise Declined("the softmax does not run over the keys")
    site.nodes.append(site.softmax)
    assert site.scores is not None
    steps = _read_scores(site, site.scores)
    query, key = steps.query, steps.key
    q, k, v = _tensors(query, key, value)
    if q.dim() == 3 and site.stacked is None:
        site.stacked = 0
    if not (q.dtype == k.dtype == v.dtype) or fake(site.output).dtype != q.dtype:  # type: ignore[union-attr]
        raise Declined("query, key and value differ in dtype")
    if not (same(q.shape[0], k.shape[0]) and same(q.shape[0], v.shape[0])):
        raise Declined("the product broadcasts over the batch")
    assert site.product is not None
    key, value = _ungroup_both(site, key, value, steps.transposed)
    form = _mask_of(site, steps, prover, _scores_shape(site, query, key))
    if site.sink is not None:
        _require_sinks(site)
        form = replace(form, empty_row="zero")
    return Attention(query, key, value, steps.scale, form, steps.mask_node, steps.softcap, site.stacked, site.sink)


def _require_sinks(site: _Site) -> None:
    assert site.sink is not None
    if site.stacked is not None:
        raise Declined("attention sinks of stacked heads")
    if needs_gradient(site.sink):
        raise Declined("needs gradient (of the sinks)")


def _read_weights(site: _Site) -> None:
    """Collects what stands between the softmax and the product with the values."""
    node: fx.Node = site.output.args[0]  # type: ignore[assignment]
    if target(site.output) is aten.einsum.default:
        node = site.output.args[1][0]  # type: ignore[index, assignment]
    site.nodes.append(site.output)
    dropped = False
    while node is not site.softmax:
        kind = target(node)
        if kind is aten.dropout.default:
            known = arguments(node)
            if known["train"] and known["p"]:
                raise Declined("dropout is active")
        elif kind in RESHAPES:
            _require_stacking(site, node.args[0], node)  # type: ignore[arg-type]
        elif kind in CASTS | COPIES:
            _require_floating(node)
        elif site.sink is not None and not dropped and drops_last_column(node):
            dropped = True
        else:
            raise Declined(f"after the softmax comes {node.target}")
        site.nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if site.sink is not None and not dropped:
        raise Declined("the sinks' column meets the values")


def _value_of(output: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    kind = target(output)
    if kind in (aten.matmul.default, aten.bmm.default):
        return output.args[1]  # type: ignore[return-value]
    if kind is aten.einsum.default:
        equation, operands = output.args[0], output.args[1]
        if _einsum_form(str(equation)) != "weights":
            raise Declined(f"einsum {equation!r} is not weights times values")
        return operands[1]  # type: ignore[index, return-value]
    raise Declined(f"the product with the values is {output.target}")


@dataclass
class _Scores:
    """The scores of an eager site, read from the softmax back to the product."""

    query: fx.Node
    key: fx.Node
    scale: float = 1.0
    scaled: bool = False
    softcap: float = 0.0
    mask: fx.Node | None = None
    how: str = ""
    fill: float = 0.0
    at: fx.Node | None = None
    mask_node: fx.Node | None = None
    transposed: list[fx.Node] = field(default_factory=list)


def _read_scores(site: _Site, node: fx.Node) -> _Scores:
    found = _Scores(node, node)
    while target(node) not in PRODUCTS:
        kind = target(node)
        site.nodes.append(node)
        _require_own_memory(node)
        if kind in CASTS | COPIES:
            _require_floating(node)
            node = node.args[0]  # type: ignore[assignment]
            continue
        if kind in RESHAPES:
            _require_stacking(site, node, node.args[0])  # type: ignore[arg-type]
            node = node.args[0]  # type: ignore[assignment]
        elif adds_nothing(node, site.aliases):
            node = node.args[0]  # type: ignore[assignment]
        elif kind in (aten.add.Tensor, aten.sub.Tensor) or kind in FILLS:
            if _is_stacked(node) and fake(site.softmax).dim() == 4:  # type: ignore[union-attr]
                raise Declined("the mask is applied to stacked heads")
            if found.scaled or found.softcap:
                raise Declined("the scores are scaled after the mask")
            if found.mask is not None:
                raise Declined(site.left or "more than one mask")
            node = _read_mask_step(site, found, node, kind)
        elif kind in SCALES:
            cap = softcap_of(node, site.aliases)
            if cap is not None and not found.scaled and not found.softcap:
                found.softcap, node = cap.cap, cap.scores
                site.nodes += cap.inside
                continue
            factor, node = _factor(site, node)
            found.scale *= factor
            found.scaled = True
        else:
            raise Declined(f"before the softmax comes {node.target if isinstance(node, fx.Node) else node}")
    site.nodes.append(node)
    _read_product(site, found, node)
    return found


def _require_floating(node: fx.Node) -> None:
    value = fake(node)
    if value is None or not value.dtype.is_floating_point:
        raise Declined("scores or weights are rounded to integers")


def _require_own_memory(node: fx.Node) -> None:
    """An in-place step must write to the scores, not add the scores to a tensor of someone else's."""
    if isinstance(node, fx.Node) and node.target in FUNCTIONAL and not leads_to_product(node.args[0]):
        raise Declined("the scores are written into another tensor")


def _is_stacked(node: fx.Node) -> bool:
    value = fake(node)
    return value is not None and value.dim() == 3


def _require_stacking(site: _Site, wide: fx.Node, stacked: fx.Node) -> None:
    """A view between scores ``[B, H, M, N]`` and ``[B * H, M, N]``; notes H."""
    four, three = fake(wide), fake(stacked)
    if four is not None and three is not None and same_shape(four.shape, three.shape):
        return
    if four is not None and three is not None and four.dim() < three.dim():
        four, three = three, four
    fits = four is not None and three is not None and four.dim() == 4 and three.dim() == 3
    if not fits or not same_shape(four.shape[2:], three.shape[1:]) or not isinstance(four.shape[1], int):  # type: ignore[union-attr]
        raise Declined("the scores are reshaped")
    if site.stacked not in (None, four.shape[1]):  # type: ignore[union-attr]
        raise Declined("the scores are reshaped")
    site.stacked = four.shape[1]  # type: ignore[union-attr]


def _factor(site: _Site, node: fx.Node) -> tuple[float, fx.Node]:
    found = scale_factor(node, site.aliases)
    if found is None:
        raise Declined("the scale is known only at run time, or zero")
    return found


def _read_mask_step(site: _Site, found: _Scores, node: fx.Node, kind: Any) -> fx.Node:
    """One mask on the scores; returns the scores under it."""
    found.at = node
    if kind is aten.add.Tensor:
        left, right = node.args[:2]
        if arguments(node)["alpha"] != 1 or not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            raise Declined("a number is added to the scores")
        if leads_to_product(right) and not leads_to_product(left):
            left, right = right, left
        found.mask, found.how = right, "add"
        return left
    if kind in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        fill = site.number(node.args[2])
        found.mask, found.how = node.args[1], "hide"  # type: ignore[assignment]
        inner = node.args[0]
    elif kind in WHERE:
        fill = site.number(node.args[2])
        found.mask, found.how = node.args[0], "keep"  # type: ignore[assignment]
        inner = node.args[1]
    else:
        raise Declined(f"before the softmax comes {node.target}")
    scores = fake(node)
    if fill is None or scores is None or not fill <= torch.finfo(scores.dtype).min:
        raise Declined("masked scores are filled with a number that the softmax may still see")
    found.fill = fill
    return inner  # type: ignore[return-value]


def _mask_of(site: _Site, found: _Scores, prover: MaskProver, shape: tuple[Any, ...]) -> MaskForm:
    if found.mask is None:
        return MaskForm()
    assert found.at is not None
    value = fake(found.mask)
    if value is None:
        raise Declined("the mask is not a tensor")
    if needs_gradient(found.mask):
        raise Declined("needs gradient (of the mask)")
    if value.dim() > 4:
        raise Declined("the mask has more than four dimensions")
    if _range_of(site.softmax) < _range_of(found.at):
        raise Declined("the softmax runs in a dtype that turns the mask's finite numbers into -inf")
    if found.how == "add":
        if not value.dtype.is_floating_point:
            raise Declined(f"the mask has dtype {value.dtype}")
        found.mask_node = found.mask
        site.reads(found.mask, [], found.at)
        form = prover.add(found.mask, shape, found.at, EMPTY_ROWS_OF_SOFTMAX)
        if fake(found.at).dtype == torch.float16 and not _always_sees_a_key(form):  # type: ignore[union-attr]
            raise Declined("rows without visible keys depend on the rounding of float16")
        return form
    if value.dtype != torch.bool:
        raise Declined(f"the mask has dtype {value.dtype}")
    empty: EmptyRow = "nan" if math.isinf(found.fill) else "mean"
    prove = prover.keep if found.how == "keep" else prover.hide
    form = prove(found.mask, shape, found.at, empty)
    if form.dense is not None:
        site.reads(form.dense, [], found.at)
    return form


def _range_of(node: fx.Node | None) -> float:
    """The largest finite number of a node's dtype."""
    value = fake(node)
    assert value is not None
    return torch.finfo(value.dtype).max


def _always_sees_a_key(form: MaskForm) -> bool:
    """True when every query sees at least the first key."""
    causal = all(bound.is_static and bound.const >= 0 for bound in form.upper)
    return causal and replace(form, upper=(), empty_row="zero", unproved="") == MaskForm()


def _read_product(site: _Site, found: _Scores, node: fx.Node) -> None:
    """Queries times transposed keys."""
    kind = target(node)
    if kind is aten.einsum.default:
        if _einsum_form(str(node.args[0])) != "scores":
            raise Declined(f"einsum {node.args[0]!r} is not queries times keys")
        found.query, found.key = node.args[1]  # type: ignore[misc, assignment]
        return
    query, transposed = node.args[:2]
    if kind is aten.baddbmm.default:
        known = arguments(node)
        query, transposed = known["batch1"], known["batch2"]
        found.scale *= known["alpha"]
        if known["beta"]:
            if known["beta"] != 1 or found.mask is not None or found.scaled or found.softcap:
                raise Declined("baddbmm adds to scores that are scaled or masked afterwards")
            if site.stacked:
                raise Declined("the mask is applied to stacked heads")
            found.mask, found.how, found.at = known["self"], "add", node
    steps: list[fx.Node] = []
    key = _untransposed(site, found, transposed, steps)
    if key is None:
        raise Declined("the keys are not transposed by a view of two dimensions")
    found.query, found.key, found.transposed = query, key, steps[::-1]  # type: ignore[assignment]


def _untransposed(site: _Site, found: _Scores, node: Any, steps: list[fx.Node]) -> fx.Node | None:
    """``x`` behind ``x.transpose(-1, -2)``, ``x.permute(..., -1, -2)`` or ``x.mT``, which may be scaled afterwards;
    ``steps`` gets what lies between, last to first."""
    value = fake(node)
    if value is None:
        return None
    rank = value.dim()
    kind = target(node)
    steps.append(node)
    if kind in COPIES:
        return _untransposed(site, found, node.args[0], steps)
    if kind in SCALES and node.target not in FUNCTIONAL:
        factor, keys = _factor(site, node)
        found.scale *= factor
        return _untransposed(site, found, keys, steps)
    if kind is aten.transpose.int and {node.args[1] % rank, node.args[2] % rank} == {rank - 1, rank - 2}:
        return node.args[0]
    if kind is aten.permute.default:
        order = [dim % rank for dim in node.args[1]]
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        return node.args[0] if order == swapped else None
    return node.args[0] if kind in _SWAPS else None


def _einsum_form(equation: str) -> str:
    """``"scores"`` for ``bhqd,bhkd->bhqk``, ``"weights"`` for ``bhqk,bhkd->bhqd``, up to the letters used."""
    try:
        inputs, output = equation.replace(" ", "").split("->")
        left, right = inputs.split(",")
    except ValueError:
        return ""
    if not len(left) == len(right) == len(output) == 4 or left[:2] != right[:2] or left[:2] != output[:2]:
        return ""
    if len({*left, *right}) != 5:
        return ""
    if left[3] == right[3] and output[2:] == left[2] + right[2]:
        return "scores"
    if left[3] == right[2] and output[2:] == left[2] + right[3]:
        return "weights"
    return ""


# -- guards that both patterns share ---------------------------------------------------------------------------------


def _require_replaceable(region: Region, site: _Site, aliases: Aliases) -> None:
    """The site's values are its own, its inputs are still what they were, and no gradient is wanted."""
    attention = region.attention
    assert attention is not None
    inside = set(site.nodes)
    for node in site.nodes:
        if node is not site.output and any(user not in inside for user in node.users):
            raise Declined("attention weights are used elsewhere")
    q, k, v = attention.fake()
    # The output tells of keys that were written into a cache through a view: the cache itself is not marked.
    if any(needs_gradient(x) for x in (attention.query, attention.key, attention.value, site.output)):
        raise Declined("needs gradient")
    if not q.dtype.is_floating_point or not q.dtype == k.dtype == v.dtype:
        raise Declined("query, key and value differ in dtype")
    if not (q.device == k.device == v.device):
        raise Declined("query, key and value are on different devices")
    if not same(q.shape[1] % k.shape[1], 0):
        raise Declined("query heads are not a multiple of key/value heads")
    if attention.stacked == 0 and not same(q.shape[1], k.shape[1]):
        raise Declined("stacked heads of query and key differ")
    if not (same(k.shape[1], v.shape[1]) and agree(k.shape[2], v.shape[2]) and same(q.shape[3], k.shape[3])):
        raise Declined("shapes of query, key and value do not fit")
    if not (same(q.shape[0], k.shape[0]) and same(q.shape[0], v.shape[0])):
        raise Declined("query, key and value broadcast over the batch")
    out = fake(site.output)
    expected = (
        (*q.shape[:3], v.shape[3]) if site.stacked is None else (*attention.query.meta["val"].shape[:2], v.shape[3])
    )
    if out is None or not same_shape(out.shape, expected):
        raise Declined("the mask broadcasts the scores")
    if any(same(size, 0) for size in (*q.shape, *v.shape)):
        raise Declined("there is nothing to compute")
    site.reads(attention.query, [], site.product or site.output)
    for node, reader in site.readers.items():
        if aliases.written_between(node, reader, site.output):
            raise Declined(f"{node.name} is written between its use and the result")
    for node in site.skipped:
        if aliases.written_between(node, node, site.output):
            raise Declined(f"{node.name} is written before it is used")
