"""Norms, gated units and rotations on their own: the specimens of regions without attention.

Enters: a region with ``op`` and ``inputs``.  Leaves: a :class:`PointwiseSpecimen`, which builds and draws as
:class:`~lz_compile.specimen.Specimen` does, and a :class:`PointwiseReference`, which judges as
:class:`~lz_compile.qualify.Reference` does: by the region's meaning in float64.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from lz_compile import config
from lz_compile.aliasing import Aliases
from lz_compile.moe import Moe
from lz_compile.normalize import spell_out_constants
from lz_compile.projections import Projections
from lz_compile.qualify import Problem, largest_excess
from lz_compile.region import Region
from lz_compile.sampling import Sampling
from lz_compile.specimen import (
    Draw,
    Emit,
    Layout,
    NoSpecimen,
    Specimen,
    between,
    emitted,
    fill,
    moved,
    nodes_of,
    nothing,
)


class PointwiseSpecimen(Specimen):
    """A region whose inputs are ``region.inputs``; the sources are these, each once."""

    @classmethod
    def of(cls, region: Region, copied: bool) -> PointwiseSpecimen:
        """Raises :class:`NoSpecimen` for a region that does not say what enters it."""
        if region.op is None or not region.inputs:
            raise NoSpecimen(f"regions of kind {region.kind} are not run on their own")
        specimen = cls(region, copied)
        for node in region.inputs:
            if not isinstance(node.meta["val"], torch.Tensor):
                raise NoSpecimen(f"{node.name} is a number that is known only at run time")
            if node not in specimen.layouts:
                specimen.sources.append(node)
                specimen.layouts[node] = Layout.of(node.meta["val"])
        return specimen

    @property
    def roots(self) -> list[int]:
        return list(range(len(self.sources)))

    def build(self, emit: Emit, make_emitter: Callable[[fx.Graph, Aliases], Any]) -> fx.GraphModule:
        module, inputs = self._inputs()
        graph = module.graph
        mapping = dict(zip(self.sources, inputs))
        with inputs[0].meta["val"].fake_mode:
            for node in nodes_of(self.region.op):  # halves of a packed input are views inside the region
                for inner in between(set(mapping), node) if node not in mapping else []:
                    new = mapping[inner] = graph.node_copy(inner, lambda n: mapping[n])
                    args, kwargs = fx.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
                    new.meta["val"] = new.target(*args, **kwargs)  # type: ignore[operator]
            anchor = graph.call_function(nothing, (inputs[0],))
            anchor.meta["val"] = self._result()
        own = tuple(mapping[node] for node in self.region.inputs)
        op = moved(self.region.op, mapping)
        region = dataclasses.replace(self.region, output=anchor, nodes=[], op=op, inputs=own)
        return emitted(module, emit, make_emitter, region)

    def _result(self) -> torch.Tensor:
        return self.output.empty()

    def as_it_stood(self) -> fx.GraphModule:
        """The region's own nodes from its inputs to its output, with what they write in place, and constants."""
        module, inputs = self._inputs()
        mapping = dict(zip(self.sources, inputs))
        # What is written in place is not behind the output.
        ends = (self.region.output, *(node for node in self.region.nodes if not node.users))
        wanted = {node for end in ends for node in between(set(self.sources), end, constants=True)}
        for node in self.region.output.graph.nodes:
            if node not in wanted:
                continue
            if node.op == "get_attr":
                setattr(module, str(node.target), getattr(node.graph.owning_module, str(node.target)))
            mapping[node] = module.graph.node_copy(node, lambda n: mapping[n])
        module.graph.output(mapping[self.region.output])
        spell_out_constants(module)
        return module

    def inputs_of(self, kind: Draw, seed: int) -> list[torch.Tensor]:
        """Normal values; ``"other"`` draws are ten times as large and off centre.  Integers are a choice of experts."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{kind} {seed}".encode()))
        result = []
        for node in self.sources:
            layout = self.layouts[node]
            assert isinstance(layout, Layout)
            tensor = layout.empty()
            if isinstance(self.region.op, Sampling):
                fill(tensor, _scored(self.region.op, node, layout, kind, generator))
                result.append(tensor)
                continue
            if isinstance(self.region.op, Moe):
                fill(tensor, _routed(self.region.op, node, layout, kind, generator))
                result.append(tensor)
                continue
            value = torch.randn(layout.sizes, generator=generator, device=layout.device)
            fill(tensor, value if kind == "typical" else 10 * value + 3)
            result.append(tensor)
        return result


class ProjectionsSpecimen(PointwiseSpecimen):
    """Linear layers that read one value: on its own a kernel gives their results in a row, ``[..., sum(N_i)]``.

    Only the input differs from call to call: what a kernel makes of the weights alone is not timed.
    """

    @property
    def roots(self) -> list[int]:
        return [0]

    def as_it_stood(self) -> fx.GraphModule:
        module, inputs = self._inputs()
        graph = module.graph
        mapping = dict(zip(self.sources, inputs))
        graph.output(tuple(graph.node_copy(node, lambda n: mapping[n]) for node in self.region.op.members))
        module.recompile()
        return module

    def _result(self) -> torch.Tensor:
        output = self.output
        sizes = (*output.sizes[:-1], sum(self.region.op.sizes))
        return torch.empty(sizes, dtype=output.dtype, device=output.device)


def _routed(op: Moe, node: fx.Node, layout: Layout, kind: Draw, generator: torch.Generator) -> torch.Tensor:
    """A value for an input of a mixture of experts.

    Every token chooses among all experts, or in ``"other"`` draws only among as many as it needs, so that the rest have
    none.  Products of normal tokens have deviation one: expert weights are scaled by their input's width.
    """
    normal = torch.randn(layout.sizes, generator=generator, device=layout.device)
    if node is op.indices:
        among = op.experts if kind == "typical" else op.top_k
        scores = torch.rand((layout.sizes[0], among), generator=generator, device=layout.device)
        return scores.argsort(-1)[:, : op.top_k] + (op.experts - among)
    if node is op.weights:
        return normal.softmax(-1)
    for weight, order in ((op.gate_up, op.gate_up_layout), (op.down, op.down_layout)):
        if node is weight:
            return normal.div_(layout.sizes[2 if order == "out, in" else 1] ** 0.5)
    return normal if kind == "typical" else 3 * normal + 1


def _scored(op: Sampling, node: fx.Node, layout: Layout, kind: Draw, generator: torch.Generator) -> torch.Tensor:
    """A value for an input of a chain of filters: scores, ids of seen tokens, or a parameter.

    ``"other"`` scores are whole numbers, so that there are ties everywhere, and one in eight is -inf.
    """
    if any(node is item.ids for item in op.filters):
        most = op.scores.meta["val"].shape[-1]
        return torch.randint(0, most, layout.sizes, generator=generator, device=layout.device)
    if node is not op.scores:
        return torch.full(layout.sizes, 0.5, device=layout.device)
    scores = 3 * torch.randn(layout.sizes, generator=generator, device=layout.device)
    if kind == "typical":
        return scores
    hidden = torch.rand(layout.sizes, generator=generator, device=layout.device) < 0.125
    return scores.round().masked_fill(hidden, -torch.inf)


def _filter_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """0 for equal scores.  Where it is allowed that rounding decides, one row in four, or one, may differ in one."""
    if torch.equal(output, expected):
        return 0.0
    different = (output != expected).sum(-1)
    rows = int((different > 0).sum())
    allowed = config.rounded_filters and int(different.max()) == 1 and rows <= max(1, len(different) // 4)
    return 1.0 if allowed else math.inf


class PointwiseReference:
    """What a pointwise specimen's outputs should be; ``meaning`` maps ``region.inputs`` to the result.

    An element may be off by a small multiple of the unit roundoff of its row's largest value: a rotation subtracts
    products of that size, a norm and a gated unit round each factor.
    """

    def __init__(self, specimen: PointwiseSpecimen, meaning: Callable[..., torch.Tensor]) -> None:
        self.specimen = specimen
        self.meaning = meaning
        self._answers: dict[tuple[str, int], torch.Tensor] = {}

    def problem(self, kind: Draw, seed: int = 0) -> Problem:
        inputs = self.specimen.inputs_of(kind, seed)
        problem = Problem(inputs, (), (kind, seed))
        if problem.draw not in self._answers:
            by_node = dict(zip(self.specimen.sources, inputs))
            try:
                values = [self._wide(node, by_node[node]) for node in self.specimen.region.inputs]
                self._answers[problem.draw] = self.meaning(*values)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise NoSpecimen(f"the reference does not run: {type(error).__name__}: {error}") from error
        return problem

    def error(self, problem: Problem, output: torch.Tensor) -> float:
        expected, op = self._answers[problem.draw], self.specimen.region.op
        if isinstance(op, Sampling):
            return _filter_error(output, expected)
        dtypes = [output.dtype]
        if isinstance(op, Moe):  # products of experts run in the dtype of their weights
            dtypes.append(op.gate_up.meta["val"].dtype)
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return largest_excess(output, expected, expected.abs().amax(-1, keepdim=True), coarsest)

    def _wide(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """In float64, except weights, which may fill a device: their meaning widens them in parts; and except scores,
        of which filters keep those that their own rounding leaves."""
        op = self.specimen.region.op
        is_large = (isinstance(op, Moe) and node in (op.gate_up, op.down)) or (
            isinstance(op, Projections) and node is not op.input
        )
        as_it_is = is_large or isinstance(op, Sampling)
        return value.double() if value.is_floating_point() and not as_it_is else value
