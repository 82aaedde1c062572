"""The cheapest choice of one label per variable when neighbouring choices cost something together.

Enters: a :class:`Problem`, that is costs of labels, costs of pairs of labels along edges, and classes of variables that
must agree.  Leaves: a :class:`Solution` of least total cost, with the width that makes the search exact and the cost of
choosing greedily for comparison.

Method: bucket elimination (Dechter, "Bucket elimination: a unifying framework for reasoning", 1999), which is dynamic
programming over a tree decomposition (Bodlaender, "Dynamic programming on graphs with bounded treewidth", 1988).  Time
and memory grow as labels ** (width + 1), linearly in the number of variables.  Ties are broken in the join tree of
optimal labellings with semijoins (Yannakakis, "Algorithms for acyclic database schemes", 1981).

Arithmetic: costs above their table's minimum are rounded to whole quanta, at least 2**51 of which make the largest sum
that can matter; so sums are exact in float64, whatever the order of the terms.  Costs that are multiples of one power
of two, such as integers, are not rounded at all as long as the ranges of all tables add up to less than 2**52 of it.
Otherwise the labelling found lies above the optimum by at most n * 2**-41 of its own distance from the sum of the
tables' minima, n being the number of tables.  (Costs of one class, and of parallel edges, are first added as floats.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]

LARGEST_TABLE = 2**22
"""Entries of one table: 32 MiB of float64."""
ALL_TABLES = 2**26
"""Entries of all tables together: 64 MiB of bool, which is what outlives the elimination of a variable."""
LARGEST_COST = 1e300
"""Beyond it sums could overflow."""


class Infeasible(ValueError):
    """Every labelling costs infinity."""


class TooWide(ValueError):
    """The tables of exact elimination would exceed ``LARGEST_TABLE`` or ``ALL_TABLES``."""


@dataclass(frozen=True)
class Problem:
    """Variables are 0, 1, ... in the order of ``costs``.

    ``costs[v][a]`` is the cost of label ``a`` at ``v``; ``edges[u, v][a][b]`` that of ``a`` at ``u`` with ``b`` at
    ``v``.  ``math.inf`` forbids a label or a pair, finite costs may be negative; all have one unit, the caller's.  If
    both ``(u, v)`` and ``(v, u)`` are given, both count.  Variables with equal ``classes[v]`` take the same label.
    """

    costs: Sequence[Sequence[float]]
    edges: Mapping[tuple[int, int], Sequence[Sequence[float]]]
    classes: Sequence[Hashable] | None = None


@dataclass(frozen=True)
class Solution:
    """``labels`` cost ``cost``, and nothing that respects the classes costs less.

    ``width`` is that of the tree decomposition that was searched, one variable a class; variables with one allowed
    label and edges of constant cost are not in its graph.  ``bound`` is the least cost when variables of a class may
    differ (the sum of the tables' minima where that problem is too wide), so ``cost - bound`` is what tying costs.
    ``greedy`` gives each variable its own cheapest label, ties to the lowest, seeing neither edges nor classes.
    """

    labels: tuple[int, ...]
    cost: float
    width: int
    bound: float
    greedy_cost: float
    greedy: tuple[int, ...]


def solve(problem: Problem) -> Solution:
    """An optimal labelling; among those of equal cost (in the module's arithmetic) the lexicographically smallest.

    The order in which ``problem.edges`` lists its edges has no influence.  Raises :class:`Infeasible` if no labelling
    has finite cost, :class:`TooWide` if exact search would need too much memory, and ``ValueError`` for an edge that
    is a loop, names no variable or has the wrong shape, for costs that are NaN, -inf or beyond ``LARGEST_COST``, and
    for classes that are not one per variable or whose variables differ in their number of labels.
    """
    graph = _read(problem)
    _require_labels(graph)
    greedy = tuple(int(costs.argmin()) for costs in graph.costs)
    if problem.classes is None or len(set(problem.classes)) == len(problem.classes) == len(problem.costs):
        labels, width = _minimise(graph)
        bound = cost = total_cost(problem, labels)
    else:
        quotient, class_of = _quotient(graph, problem.classes)
        tied, width = _minimise(quotient)
        labels = tuple(tied[c] for c in class_of)
        cost = total_cost(problem, labels)
        bound = min(cost, _untied_bound(problem, graph))
    return Solution(labels, cost, width, bound, total_cost(problem, greedy), greedy)


def total_cost(problem: Problem, labels: Sequence[int]) -> float:
    """The costs of the labels and of the pairs along edges, summed exactly and rounded once; inf if one is forbidden.

    Classes are not looked at.  Raises ``ValueError`` unless ``labels`` has one label in range for each variable.
    """
    if len(labels) != len(problem.costs):
        raise ValueError(f"{len(labels)} labels for {len(problem.costs)} variables")
    for v, (label, costs) in enumerate(zip(labels, problem.costs)):
        if not 0 <= label < len(costs):
            raise ValueError(f"variable {v} has no label {label}")
    terms = [float(costs[label]) for label, costs in zip(labels, problem.costs)]
    terms += [float(table[labels[u]][labels[v]]) for (u, v), table in problem.edges.items()]
    return math.fsum(terms)


@dataclass(frozen=True)
class _Graph:
    """A checked problem without classes; ``edges[u, v]`` has u < v, and keys are in ascending order."""

    names: list[str]
    costs: list[Table]
    edges: dict[tuple[int, int], Table]


def _read(problem: Problem) -> _Graph:
    costs = [_table(row, (len(row),), f"the costs of variable {v}") for v, row in enumerate(problem.costs)]
    edges: dict[tuple[int, int], Table] = {}
    for (u, v), rows in problem.edges.items():
        if u == v:
            raise ValueError(f"edge {u, v} is a loop; its costs belong to the variable")
        if not (0 <= u < len(costs) and 0 <= v < len(costs)):
            raise ValueError(f"edge {u, v} names a variable that does not exist; there are {len(costs)}")
        table = _table(rows, (len(costs[u]), len(costs[v])), f"the costs of edge {u, v}")
        _add(edges, u, v, table)
    return _Graph([f"variable {v}" for v in range(len(costs))], costs, dict(sorted(edges.items())))


def _table(values: Sequence[float] | Sequence[Sequence[float]], shape: tuple[int, ...], what: str) -> Table:
    table = np.asarray(values, dtype=np.float64)
    if table.shape != shape:
        raise ValueError(f"{what} have shape {table.shape}, not {shape}")
    if not ((np.abs(table) <= LARGEST_COST) | (table == np.inf)).all():
        raise ValueError(f"{what} hold NaN, -inf or a finite cost beyond {LARGEST_COST:g}")
    return table


def _add(edges: dict[tuple[int, int], Table], u: int, v: int, table: Table) -> None:
    if u > v:
        u, v, table = v, u, table.T
    known = edges.get((u, v))
    edges[u, v] = table if known is None else known + table


def _quotient(graph: _Graph, classes: Sequence[Hashable]) -> tuple[_Graph, list[int]]:
    """One variable a class, numbered by first appearance, and the class of each variable of ``graph``."""
    if len(classes) != len(graph.costs):
        raise ValueError(f"{len(classes)} classes for {len(graph.costs)} variables")
    number: dict[Hashable, int] = {}
    class_of = [number.setdefault(name, len(number)) for name in classes]
    costs: list[Table] = []
    for v, (name, c) in enumerate(zip(classes, class_of)):
        if c == len(costs):
            costs.append(graph.costs[v])
        elif len(costs[c]) != len(graph.costs[v]):
            raise ValueError(
                f"class {name!r} has variables with {len(costs[c])} and (variable {v}) {len(graph.costs[v])} labels"
            )
        else:
            costs[c] = costs[c] + graph.costs[v]
    edges: dict[tuple[int, int], Table] = {}
    for (u, v), table in graph.edges.items():
        c, d = class_of[u], class_of[v]
        if c == d:
            costs[c] = costs[c] + table.diagonal()
        else:
            _add(edges, c, d, table)
    quotient = _Graph([f"class {name!r}" for name in number], costs, dict(sorted(edges.items())))
    _require_labels(quotient)
    return quotient, class_of


def _require_labels(graph: _Graph) -> None:
    for name, costs in zip(graph.names, graph.costs):
        if not np.isfinite(costs).any():
            raise Infeasible(f"{name} has no label of finite cost")


def _untied_bound(problem: Problem, graph: _Graph) -> float:
    try:
        labels, _ = _minimise(graph)
    except TooWide:
        return math.fsum(float(table.min()) for table in [*graph.costs, *graph.edges.values()])
    return total_cost(problem, labels)


def _minimise(graph: _Graph) -> tuple[tuple[int, ...], int]:
    """The smallest optimal labelling and the width of its decomposition."""
    reduced, allowed = _reduce(graph)
    open_ = [v for v, keep in enumerate(allowed) if len(keep) > 1]
    bags = _bags(reduced, {v: len(allowed[v]) for v in open_})
    width = max((len(bag.scope) for bag in bags), default=0)
    labels = [0] * len(allowed)
    scale = math.fsum(_largest(table) for table in [*reduced.costs, *reduced.edges.values()])
    # A few huge costs that the optimum avoids would make the rounding coarse: then again, with a scale that fits.
    while True:
        _eliminate(bags, _round(reduced, scale))
        for v, label in _first(bags).items():
            labels[v] = label
        terms = [costs[labels[v]] for v, costs in enumerate(reduced.costs)]
        terms += [table[labels[u], labels[v]] for (u, v), table in reduced.edges.items()]
        above_minima = math.fsum(terms)
        if above_minima == 0 or above_minima >= scale / 1024:
            return tuple(int(keep[label]) for keep, label in zip(allowed, labels)), width
        scale = 2 * above_minima


def _reduce(graph: _Graph) -> tuple[_Graph, list[npt.NDArray[np.intp]]]:
    """The same problem over the labels that are allowed, which are the second result, each table above its minimum.

    Edges at a variable with one allowed label become costs of the other end; edges of constant cost are dropped.
    """
    allowed = [np.flatnonzero(np.isfinite(costs)) for costs in graph.costs]
    costs = [_above_minimum(table[keep]) for table, keep in zip(graph.costs, allowed)]
    edges: dict[tuple[int, int], Table] = {}
    for (u, v), table in graph.edges.items():
        table = table[allowed[u]][:, allowed[v]]
        if table.min() == np.inf:
            raise Infeasible(f"no pair of allowed labels of {graph.names[u]} and {graph.names[v]} has finite cost")
        table = _above_minimum(table)
        if len(allowed[v]) == 1:
            costs[u] = costs[u] + table[:, 0]
        elif len(allowed[u]) == 1:
            costs[v] = costs[v] + table[0]
        elif table.any():
            edges[u, v] = table
    for name, table in zip(graph.names, costs):
        if table.min() == np.inf:
            raise Infeasible(f"{name} has no label that its neighbours with one allowed label leave a finite cost")
    return _Graph(graph.names, [_above_minimum(table) for table in costs], edges), allowed


def _above_minimum(table: Table) -> Table:
    return table - table.min()


def _largest(table: Table) -> float:
    return float(table.max(initial=0.0, where=table < np.inf))


def _round(graph: _Graph, scale: float) -> _Graph:
    """Costs as whole numbers of quanta, 2**51 to 2**52 for ``scale``; a single cost beyond ``scale`` is forbidden."""
    exponent = 52 - math.frexp(scale)[1]

    def quanta(table: Table) -> Table:
        return np.rint(np.ldexp(np.where(table <= scale, table, np.inf), exponent))

    edges = {edge: quanta(table) for edge, table in graph.edges.items()}
    return _Graph(graph.names, [quanta(table) for table in graph.costs], edges)


@dataclass
class _Bag:
    """A variable and the later variables it meets when it is eliminated.

    Tables of the bag have one axis for ``variable``, then one for each of ``scope`` in order of elimination.  The
    parent is the bag of the first variable of the scope, and holds the rest of the scope too.
    """

    variable: int
    scope: tuple[int, ...]
    shape: tuple[int, ...]
    parent: _Bag | None = field(default=None, repr=False)
    children: list[_Bag] = field(default_factory=list, repr=False)
    # Where the scope stands in the parent's tables: its shape there, and the parent's axes that it lacks.
    in_parent: tuple[int, ...] = ()
    not_in_scope: tuple[int, ...] = ()
    # [variable, *scope]: the choices that some optimal labelling makes, given the scope (after _eliminate), at all
    # (during _first).
    optimal: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_), repr=False)

    def view(self, variables: Sequence[int]) -> tuple[int, ...]:
        """The shape that aligns a table over some of the bag's variables, in its order, with the bag's tables."""
        return tuple(n if v in variables else 1 for v, n in zip((self.variable, *self.scope), self.shape))


def _bags(graph: _Graph, sizes: Mapping[int, int]) -> list[_Bag]:
    """A tree decomposition over the variables of ``sizes``, in order of elimination: children before parents.

    Min-fill: the next variable is the one whose elimination joins the fewest pairs of its neighbours, then the one
    with the smallest table, then the lowest.  networkx has the heuristic, but without table sizes, so it can neither
    break ties by them nor stop where a dense graph gets too wide, and scans all variables at each step.
    """
    neighbours: dict[int, set[int]] = {v: set() for v in sizes}
    for u, v in graph.edges:
        neighbours[u].add(v)
        neighbours[v].add(u)

    def priority(v: int) -> tuple[float, int]:
        near = neighbours[v]
        entries = sizes[v] * math.prod(sizes[w] for w in near)
        if entries > LARGEST_TABLE:
            return math.inf, entries
        return sum(len(near - neighbours[w]) - 1 for w in near) // 2, entries

    current = {v: priority(v) for v in sizes}
    queue = [(*current[v], v) for v in sizes]
    heapq.heapify(queue)
    order: list[tuple[int, set[int]]] = []
    total = 0
    while queue:
        *seen, v = heapq.heappop(queue)
        if current.get(v) != tuple(seen):
            continue
        fill, entries = current.pop(v)
        total += entries
        if entries > LARGEST_TABLE or total > ALL_TABLES:
            raise TooWide(
                f"eliminating {graph.names[v]} with {len(neighbours[v])} neighbours takes a table of {_count(entries)} "
                f"entries and {_count(total)} in all; the limits are {LARGEST_TABLE} and {ALL_TABLES}"
            )
        near = neighbours.pop(v)
        order.append((v, near))
        stale = set(near)
        for a in near:
            neighbours[a].discard(v)
        for a in near if fill else ():
            for b in near - neighbours[a] - {a}:
                stale |= neighbours[a] & neighbours[b]
                neighbours[a].add(b)
                neighbours[b].add(a)
        for w in stale:
            current[w] = priority(w)
            heapq.heappush(queue, (*current[w], w))
    return _join_tree(order, sizes)


def _count(entries: int) -> str:
    return str(entries) if entries < 2**53 else f"2**{entries.bit_length() - 1}"


def _join_tree(order: Sequence[tuple[int, set[int]]], sizes: Mapping[int, int]) -> list[_Bag]:
    position = {v: i for i, (v, _) in enumerate(order)}
    bags: list[_Bag] = []
    for v, near in order:
        scope = tuple(sorted(near, key=position.__getitem__))
        bags.append(_Bag(v, scope, tuple(sizes[w] for w in (v, *scope))))
    for bag in bags:
        if bag.scope:
            parent = bags[position[bag.scope[0]]]
            parent.children.append(bag)
            bag.parent, bag.in_parent = parent, parent.view(bag.scope)
            bag.not_in_scope = tuple(i for i, w in enumerate(parent.scope, 1) if w not in bag.scope)
    return bags


def _eliminate(bags: Sequence[_Bag], graph: _Graph) -> None:
    """Sets ``optimal`` of each bag: the labels of its variable that are best below it, for each labelling of its scope.

    A labelling costs more than the optimum by the sum, over bags, of what its choice there lies above the best one; so
    the optimal labellings are those that take a best choice in every bag.
    """
    bag_of = {bag.variable: bag for bag in bags}
    position = {bag.variable: i for i, bag in enumerate(bags)}
    inbox: dict[int, list[Table]] = {v: [graph.costs[v].reshape(bag.view((v,)))] for v, bag in bag_of.items()}
    for (u, v), table in graph.edges.items():
        if position[u] > position[v]:
            u, v, table = v, u, table.T
        inbox[u].append(table.reshape(bag_of[u].view((u, v))))
    for bag in bags:
        table = np.zeros(bag.shape)
        for part in inbox.pop(bag.variable):
            table += part
        best = np.asarray(table.min(axis=0))
        bag.optimal = (table == best) & (best < np.inf)
        if bag.parent is not None:
            inbox[bag.parent.variable].append(best.reshape(bag.in_parent))
        elif best == np.inf:
            raise Infeasible("no labelling has finite cost: the forbidden pairs leave nothing")


def _first(bags: Sequence[_Bag]) -> dict[int, int]:
    """The lexicographically smallest labelling that is optimal in every bag; consumes ``optimal``."""
    for bag in reversed(bags):
        if bag.parent is not None:
            bag.optimal &= bag.parent.optimal.any(axis=bag.not_in_scope).reshape(bag.shape[1:])
    labels: dict[int, int] = {}
    for bag in sorted(bags, key=lambda bag: bag.variable):
        left = np.flatnonzero(bag.optimal.any(axis=tuple(range(1, bag.optimal.ndim))))
        labels[bag.variable] = int(left[0])
        if len(left) > 1:
            bag.optimal[left[0] + 1 :] = False
            _propagate(bag)
    return labels


def _propagate(start: _Bag) -> None:
    """Restores, after ``start.optimal`` has shrunk, that each choice marked optimal is part of an optimal labelling."""
    changed: list[tuple[_Bag, _Bag | None]] = [(start, None)]
    while changed:
        bag, source = changed.pop()
        for near in bag.children if bag.parent is None else [bag.parent, *bag.children]:
            if near is source:
                continue
            if near is bag.parent:
                agree = bag.optimal.any(axis=0).reshape(bag.in_parent)
            else:
                agree = bag.optimal.any(axis=near.not_in_scope).reshape(near.shape[1:])
            optimal = near.optimal & agree
            if np.count_nonzero(optimal) < np.count_nonzero(near.optimal):
                near.optimal = optimal
                changed.append((near, bag))
