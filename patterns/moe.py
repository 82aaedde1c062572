"""Mixtures of experts behind their router, from the tokens of each pair to the weighted sum over a token's experts.

Enters: a normalised graph.  Leaves: one :class:`~lz_compile.region.Region` a block with a :class:`~lz_compile.moe.Moe`,
in graph order; a block that may not be replaced carries the reason and the node at which reading stopped.

A block is anchored at two products per expert of which one leads to the other.  The first is read backwards to tokens
and choice, the second forwards to the sum.  Index vectors are proved by :mod:`lz_compile.patterns.routing`, so that a
gather, a sort, the way back from it and the share of each expert may be spelled in several ways.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.fx as fx

from lz_compile.aliasing import Aliases, written_arguments
from lz_compile.moe import Moe
from lz_compile.patterns.expert_activation import activation_of
from lz_compile.patterns.expert_products import VIEWS, Product, first_of, product_of
from lz_compile.patterns.replaceable import Declined, only_user, own
from lz_compile.patterns.router import router_of
from lz_compile.patterns.routing import ARANGES, KEEPS_ORDER, Routing, Rows, behind_order, taken
from lz_compile.patterns.walk import CASTS, arguments, aten, fake, same, same_shape, target, tensor
from lz_compile.region import Region, describe_node

_ENDS = {aten.index_add.default, aten.index_add_.default}
_NAMES = {"silu": "SwiGLU", "gelu": "GEGLU", "gelu_tanh": "GEGLU (tanh)", "relu": "ReGLU"}


def find_moes(graph: fx.Graph, aliases: Aliases, module_of: Callable[[fx.Node], str]) -> list[Region]:
    """All mixtures of experts of a graph.  ``module_of(node)`` gives the module path of a node."""
    products = {product.node: product for node in graph.nodes if (product := product_of(node)) is not None}
    regions: list[Region] = []
    for last in products.values():
        first = first_of(last, products)
        if first is None:
            continue
        region = Region("moe", last.implementation, last.node, module_of(last.node))
        try:
            _Reader(region, first, last, aliases).read()
        except Declined as reason:
            region.declined = str(reason)
        regions.append(region)
    return regions


class _Reader:
    """Reads one block and writes what it found into its region."""

    def __init__(self, region: Region, first: Product, last: Product, aliases: Aliases) -> None:
        self.region, self.first, self.last, self.aliases = region, first, last, aliases
        self.routing: Routing
        self.dtype: torch.dtype = tensor(first.node).dtype

    def read(self) -> None:
        first, last = self.first, self.last
        if first.implementation != last.implementation:
            raise Declined("the two products are made in different ways")
        experts = tensor(first.weight).shape[0]
        if not isinstance(experts, int) or not same(tensor(last.weight).shape[0], experts):
            raise Declined("the two products have different numbers of experts")
        chosen = self._choice(first.by, experts)
        self.routing = Routing(chosen, experts, self.aliases)
        if not isinstance(self.routing.top_k, int):
            raise Declined("the number of experts a token has is not a number")
        hidden, order = self._tokens(first.rows)
        for product in (first, last):
            self._is_by_expert(product, order, experts)
        act = activation_of(last.rows, self.aliases)
        if act is None:
            self._stop(behind_order(last.rows)[-1], "the activation is not known")
        if act.gated and not self._holds_rows(act.y):
            self._stop(act.y, "gate and up are not parts of a row")
        gate_up_bias = self._first_bias(act.y, order)
        output, weights, down_bias = self._to_the_sum(order, hidden)
        x, y = tensor(hidden), tensor(output)
        if (x.dtype, x.device) != (y.dtype, y.device) or not same_shape(x.shape, y.shape):
            self._stop(output, "the result is not like the tokens")
        width = tensor(last.weight).shape[2 if last.layout == "out, in" else 1]
        region = self.region
        region.output = output
        region.op = Moe(
            hidden,
            weights,
            chosen,
            first.weight,
            last.weight,
            gate_up_bias,
            down_bias,
            experts,
            self.routing.top_k,
            width,
            act.activation,
            act.gated,
            act.interleaved,
            act.alpha,
            act.limit,
            act.up_offset,
            first.layout,
            last.layout,
            first.implementation,
            router_of(weights, self.aliases),
        )
        name = _NAMES[act.activation] if act.gated else act.activation
        region.pattern = f"{first.implementation}, {name}, top {self.routing.top_k} of {experts}"
        inputs = (hidden, weights, chosen, first.weight, last.weight, gate_up_bias, down_bias)
        region.inputs = tuple(node for node in inputs if node is not None)
        self._own()

    def _stop(self, node: fx.Node, why: str) -> NoReturn:
        self.region.stopped = node
        raise Declined(f"{why}: {describe_node(node)}")

    # -- who goes where

    def _choice(self, by: fx.Node, experts: int) -> fx.Node:
        """The indices ``[T, K]`` behind a vector that was made of them."""
        node: Any = by
        for _ in range(16):
            value = fake(node)
            if (
                value is not None
                and value.dim() == 2
                and not value.is_floating_point()
                and self._is_top_k(node, experts)
            ):
                return node
            kind, found = target(node), taken(node)
            if found is not None:
                node = found[0]
            elif kind is operator.getitem or (kind is not None and node.args):
                node = node.args[0]
            else:
                break
        self._stop(by, "the experts are not the choice of a top-k over all of them")

    def _is_top_k(self, node: fx.Node, experts: int) -> bool:
        """Whether ``node`` are the indices of a top-k along a last dimension of as many as there are experts."""
        base = behind_order(node)[-1]
        while target(base) in CASTS and tensor(base).dtype in (torch.int32, torch.int64):
            base = behind_order(base.args[0])[-1]
        if base.target is not operator.getitem or base.args[1] != 1 or target(base.args[0]) is not aten.topk.default:
            return False
        known = arguments(base.args[0])  # type: ignore[arg-type]
        scores = fake(known["self"])
        last = tensor(base).shape[-1]
        return (
            scores is not None
            and known["dim"] in (-1, scores.dim() - 1)
            and same(scores.shape[-1], experts)
            and same(tensor(node).shape[-1], last)
        )

    def _tokens(self, rows: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The tokens ``[T, H]`` and the order in which the rows of the first product hold them."""
        node: Any = rows
        order: fx.Node | None = None
        while True:
            node = self.routing.behind(node)
            found = taken(node)
            if target(node) in CASTS and tensor(node).dtype == self.dtype:
                node = node.args[0]
            elif found is not None:
                held = self.routing.rows(found[1])
                if held is None or (held.what == "pair" and order is not None):
                    self._stop(node, "tokens are gathered by something else")
                if held.what == "token":
                    if order is not None and held.order is not None:
                        self._stop(node, "tokens are gathered by something else")
                    return self._hidden(found[0]), order if order is not None else held.order
                if held.what != "pair" or not same_shape(tensor(found[0]).shape, tensor(node).shape):
                    self._stop(node, "tokens are gathered by something else")
                order, node = held.order, found[0]
            elif target(node) in (aten.expand.default, aten.repeat_interleave.self_int) and self.routing.repeats(node):
                source = node.args[0]
                return self._hidden(source.args[0] if target(source) is aten.unsqueeze.default else source), order
            else:
                self._stop(node, "tokens are not gathered for each expert")

    def _hidden(self, node: fx.Node) -> fx.Node:
        value = fake(node)
        if value is None or value.dim() != 2 or not same(value.shape[0], self.routing.tokens):
            self._stop(node, "these are not the tokens of the router")
        return node

    def _is_by_expert(self, product: Product, order: fx.Node | None, experts: int) -> None:
        if not same(tensor(product.rows).shape[0], self.routing.pairs):
            self._stop(product.node, "not one row for each pair")
        if product.implementation == "grouped_mm":
            if order is None:
                self._stop(product.node, "rows are not sorted by expert")
            if not self.routing.counts_experts(product.by, experts):
                self._stop(product.by, "the shares of the experts are not counted")
        elif self.routing.rows(product.by) != Rows("expert", order):
            self._stop(product.node, "a row does not meet its expert")

    # -- from the first product to the second

    def _holds_rows(self, y: fx.Node) -> bool:
        """Whether the last dimension of a value is a whole row of the first product."""
        weight, value = fake(self.first.weight), fake(y)
        assert weight is not None and value is not None
        width = weight.shape[1 if self.first.layout == "out, in" else 2]
        return same(value.shape[0], self.routing.pairs) and same(value.shape[-1], width)

    def _first_bias(self, y: fx.Node, order: fx.Node | None) -> fx.Node | None:
        node = self.routing.behind(y)
        if node is self.first.node:
            return None
        if target(node) is aten.add.Tensor:
            for part, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
                bias = self._bias(node, part, other, order)
                if bias is not None and self.routing.behind(part) is self.first.node:
                    return bias
        self._stop(node, "between the products is something else")

    def _bias(self, add: fx.Node, rows: Any, other: Any, order: fx.Node | None) -> fx.Node | None:
        """``[E, N]`` of which an addition to rows ``[T * K, N]`` takes each row's expert's."""
        found = taken(other)
        if found is None or arguments(add)["alpha"] != 1:
            return None
        source = tensor(found[0])
        if source.dim() != 2 or self.routing.rows(found[1]) != Rows("expert", order):
            return None
        values, shape = (fake(rows), fake(other)), tensor(add).shape
        if any(v is None or not same_shape(v.shape, shape) for v in values) or source.dtype != self.dtype:
            return None
        return found[0] if same(source.shape[0], tensor(self.first.weight).shape[0]) else None

    # -- from the second product to the sum

    def _to_the_sum(self, order: fx.Node | None, hidden: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """The sum, the weights ``[T, K]`` and the bias of the second product."""
        node = self.last.node
        weights: fx.Node | None = None
        bias: fx.Node | None = None
        routing = self.routing
        width = tensor(hidden).shape[-1]
        rounded = False
        for _ in range(16):
            user = only_user(node)
            if user is None:
                self._stop(node, "an inner value is used elsewhere")
            kind, value, found = target(user), fake(node), taken(user)
            assert value is not None
            if kind in _ENDS or (kind is aten.sum.dim_IntList and not rounded):
                if weights is None:
                    self._stop(user, "the weights are not applied")
                if not (self._adds_up(user, node, order) if kind in _ENDS else self._sums(user, node, order)):
                    self._stop(user, "it does not sum over the experts of a token")
                return self._cast_back(user, hidden), weights, bias
            if kind in CASTS and tensor(user).dtype != value.dtype:
                if weights is None or tensor(user).dtype != tensor(hidden).dtype:
                    self._stop(user, "rounds between products and sum")
                rounded = True
            elif kind in KEEPS_ORDER | CASTS or routing.fills_nothing(user):
                pass
            elif rounded:
                self._stop(user, "rounds between products and sum")
            elif kind is aten.add.Tensor and weights is None and bias is None:
                other = next((x for x in user.args[:2] if x is not node), None)
                bias = self._bias(user, node, other, order)
                if bias is None:
                    self._stop(user, "what is added is not the bias of a row's expert")
            elif kind is aten.mul.Tensor:
                if weights is not None:
                    self._stop(user, "the weights are applied twice")
                other = next((x for x in user.args[:2] if x is not node), None)
                weights = self._weights(other, value, order, width)
                if weights is None:
                    self._stop(user, "the factor is not the weight of a row's expert")
            elif found is not None and found[0] is node:
                back = order is not None and routing.rows(found[1]) == Rows("place", of=order)
                if not back or not same_shape(value.shape, (routing.pairs, width)):
                    self._stop(user, "the rows do not go back to where they came from")
                order = None
            else:
                self._stop(user, "between products and sum is something else")
            node = user
        self._stop(node, "between products and sum is something else")

    def _cast_back(self, end: fx.Node, hidden: fx.Node) -> fx.Node:
        """The sum, or the cast of it to the dtype of the tokens where that is its only use."""
        user, wanted = only_user(end), tensor(hidden).dtype
        if user is not None and target(user) in CASTS and tensor(user).dtype == wanted != tensor(end).dtype:
            return user
        return end

    def _weights(self, other: Any, value: torch.Tensor, order: fx.Node | None, width: Any) -> fx.Node | None:
        """The weights ``[T, K]`` of which ``other`` holds one for each row of ``value``."""
        routing, factor = self.routing, fake(other)
        if factor is None or not factor.is_floating_point():
            return None
        flat = same_shape(value.shape, (routing.pairs, width)) and same_shape(factor.shape, (routing.pairs, 1))
        shape = (routing.tokens, routing.top_k)
        stacked = same_shape(value.shape, (*shape, width)) and same_shape(factor.shape, (*shape, 1))
        if not flat and not stacked:
            return None
        found = taken(behind_order(other)[-1])
        held = routing.rows(found[1]) if found is not None else None
        if found is not None and held is not None and held.what == "pair":
            if held.order is not order:
                return None
            other = found[0]
        elif order is not None:
            return None
        return next((node for node in behind_order(other) if same_shape(tensor(node).shape, shape)), None)

    def _sums(self, node: fx.Node, rows: fx.Node, order: fx.Node | None) -> bool:
        known, value = arguments(node), fake(rows)
        assert value is not None
        shape = (self.routing.tokens, self.routing.top_k)
        return (
            order is None
            and value.dim() == 3
            and same_shape(value.shape[:2], shape)
            and list(known["dim"]) in ([1], [-2])
            and not known["keepdim"]
            and known["dtype"] in (None, value.dtype, torch.float32)
        )

    def _adds_up(self, node: fx.Node, rows: fx.Node, order: fx.Node | None) -> bool:
        """``zeros.index_add(0, tokens, rows)``."""
        known = arguments(node)
        into, value = known["self"], fake(rows)
        zeros = target(into) in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
        return (
            zeros
            and known["source"] is rows
            and known["dim"] == 0
            and known["alpha"] == 1
            and self.routing.rows(known["index"]) == Rows("token", order)
            and value is not None
            and value.dim() == 2
        )

    # -- may it be replaced?

    def _own(self) -> None:
        region = self.region
        site = self._site()
        edges = self._edges(site)
        self._reads_what_was_written(site)
        own(region, [node for node in site if node not in edges], edges, self.aliases)

    def _site(self) -> list[fx.Node]:
        """Everything between the inputs and the output, in graph order."""
        region = self.region
        found: set[fx.Node] = set()
        waiting = [region.output]
        while waiting:
            node = waiting.pop()
            if (
                node in found
                or node in region.inputs
                or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
            ):
                continue
            if node.op != "call_function":
                self._stop(node, "it reads something else too")
            found.add(node)
            waiting += node.all_input_nodes
            # Clamped in place for whoever reads the experts from here on, of which there may be nobody.
            waiting += [user for user in node.users if not user.users and self.routing.clamps_nothing(user)]
        return sorted(found, key=self.aliases.position)

    def _edges(self, site: list[fx.Node]) -> list[fx.Node]:
        """Views and casts of the inputs, and counters, which others may read."""
        edges: set[fx.Node] = set()
        for node in site:
            sources = [x for x in node.all_input_nodes if fake(x) is not None]
            outer = all(x in self.region.inputs or x in edges for x in sources)
            if outer and target(node) in VIEWS | ARANGES:
                edges.add(node)
        return [node for node in site if node in edges]

    def _reads_what_was_written(self, site: list[fx.Node]) -> None:
        """A value that a write inside the block changed may only be read through the result of the write."""
        position = self.aliases.position
        for write in site:
            for written in written_arguments(write):
                for node in site:
                    if position(node) >= position(write) or not self.aliases.same_storage(node, written):
                        continue
                    if any(position(user) > position(write) for user in node.users):
                        self._stop(write, "a value is read after it was written")
