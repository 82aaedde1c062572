"""The normal form of an attention mask: what a kernel may rely on.

A mask is a predicate over ``(b, h, q, k)``: batch row, head, query index and key index, all counted from zero in the
tensors that attention sees.  ``patterns.masks`` brings the mask of a graph into a :class:`MaskForm`; the kernels in
``lowering`` read only this form, so that a kernel that drops the mask does so because of a proof.

A key ``k`` is visible to query ``q`` of batch row ``b`` when *all* terms of the form allow it::

    k <= q + upper      k >= q + lower      start <= k < stop
    (k - origin) // size == (q + offset - origin) // size         (chunk)
    key_padding[b, k]    not key_hidden[b, k]    ids_q[b, q] == ids_k[b, k]    dense[b, h, q, k]

Terms hold :class:`Bound` values: integers that are known only when the graph runs (a cache position, for example).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch.fx as fx

Axis = Literal["b", "h", "q", "k"]
EmptyRow = Literal["zero", "mean", "nan", "safe mean", "unmasked"]


@dataclass(frozen=True)
class EmptyRows:
    """What a program gives for a row in which no key is visible, by the kind of its mask (see MaskForm.empty_row).

    ``boolean``: a boolean mask; ``infinite`` and ``finite``: an additive mask that hides with -inf, or with the least
    finite number of its dtype; ``bias``: an additive mask of which nothing is known.
    """

    boolean: EmptyRow
    infinite: EmptyRow
    finite: EmptyRow
    bias: EmptyRow


# A softmax written out: NaN over -inf, the mean of all values over one finite number.
EMPTY_ROWS_OF_SOFTMAX = EmptyRows(boolean="nan", infinite="nan", finite="mean", bias="mean")


@dataclass(frozen=True)
class Index:
    """One index of a :class:`Read`: ``axis + shift``, or the constant ``shift`` when ``axis`` is None."""

    axis: Axis | None
    shift: int = 0

    def __str__(self) -> str:
        if self.axis is None:
            return str(self.shift)
        return self.axis if not self.shift else f"{self.axis}{self.shift:+d}"


@dataclass(frozen=True)
class Read:
    """An element of a graph value: ``node[index]`` as it stood when ``reader`` ran.

    ``node`` is a tensor, or a SymInt (then ``index`` is empty).  ``version`` counts the writes to the node's storage
    before ``reader``; a value that is written later must be copied before ``reader`` if it is to be read afterwards.
    ``reader`` takes no part in equality.
    """

    node: fx.Node
    index: tuple[Index, ...] = ()
    version: int = 0
    reader: fx.Node | None = field(default=None, compare=False, hash=False)

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(i.axis for i in self.index if i.axis)

    def __str__(self) -> str:
        name = readable_name(self.node)
        return f"{name}[{', '.join(map(str, self.index))}]" if self.index else name


@dataclass(frozen=True)
class Bound:
    """An integer ``const + sum(coefficient * read)``; the reads depend on the batch row at most."""

    const: int = 0
    reads: tuple[tuple[int, Read], ...] = ()

    @property
    def is_static(self) -> bool:
        return not self.reads

    def __str__(self) -> str:
        parts = []
        for coefficient, read in self.reads:
            sign = "-" if coefficient < 0 else "+"
            times = "" if abs(coefficient) == 1 else f"{abs(coefficient)}*"
            parts.append(f"{sign} {times}{read}")
        if self.const or not parts:
            parts.append(f"{'-' if self.const < 0 else '+'} {abs(self.const)}")
        text = " ".join(parts)
        return text[2:] if text.startswith("+ ") else text.replace("- ", "-", 1)


@dataclass(frozen=True)
class Chunk:
    """``(k - origin) // size == (q + offset - origin) // size``."""

    size: int
    offset: Bound = Bound()
    origin: Bound = Bound()


@dataclass(frozen=True)
class Documents:
    """``queries[b, q] == keys[b, k]``: packed sequences that do not see each other."""

    queries: Read
    keys: Read


@dataclass(frozen=True)
class MaskForm:
    """A conjunction of terms, and what a row without any visible key gives.

    ``upper``, ``lower``, ``start`` and ``stop`` hold several bounds when the graph states several (a causal mask and a
    bidirectional window, say); all of them hold.  ``key_padding`` are boolean reads indexed by ``b`` and ``k`` (some
    may ignore ``b``), ``key_hidden`` the same with True for hidden keys.  ``dense`` is the part that was not proved:
    the whole boolean mask, to be read by the kernel (with ``dense_hides`` it is True where a key is hidden).
    ``bias`` is an additive float mask that was not proved to be a mask.  Terms that were proved beside a ``dense``
    or ``bias`` part stand, so a kernel may narrow its range by them.

    ``empty_row`` says what the eager program computes for a row in which no key is visible:

    - ``"zero"``: zeros (PyTorch's SDPA with a boolean or -inf mask);
    - ``"mean"``: the softmax over all keys of the additive mask, which for one finite fill value weighs every key the
      same; NaN where the mask is -inf throughout (a softmax over finite fills);
    - ``"nan"``: NaN (a softmax over -inf);
    - ``"safe mean"``: as ``"mean"``, but zeros instead of that NaN (SDPA with an arbitrary additive mask);
    - ``"unmasked"``: attention over all keys as if there were no mask (cuDNN with a boolean mask).

    ``unproved`` says where the proof stopped, for the report.
    """

    upper: tuple[Bound, ...] = ()
    lower: tuple[Bound, ...] = ()
    start: tuple[Bound, ...] = ()
    stop: tuple[Bound, ...] = ()
    chunk: Chunk | None = None
    key_padding: tuple[Read, ...] = ()
    key_hidden: tuple[Read, ...] = ()
    documents: tuple[Documents, ...] = ()
    dense: fx.Node | None = None
    dense_hides: bool = False
    bias: fx.Node | None = None
    empty_row: EmptyRow = "zero"
    unproved: str = ""

    @property
    def proved(self) -> bool:
        return self.dense is None and self.bias is None

    @property
    def is_trivial(self) -> bool:
        """True when every key is visible to every query."""
        return replace(self, empty_row="zero", unproved="") == MaskForm()

    @property
    def is_causal(self) -> bool:
        """True when the mask is exactly ``k <= q`` (SDPA's ``is_causal``, aligned top left)."""
        return replace(self, empty_row="zero", unproved="") == MaskForm(upper=(Bound(0),))

    def __str__(self) -> str:
        parts: list[str] = []
        for bound in self.upper:
            if bound == Bound(0):
                parts.append("causal")
            else:
                parts.append(f"causal(offset={bound})")
        for bound in self.lower:
            parts.append(f"window(k >= q + {bound})")
        for bound in self.start:
            parts.append(f"keys from {bound}")
        for bound in self.stop:
            parts.append(f"keys below {bound}")
        if self.chunk:
            parts.append(f"chunk(size={self.chunk.size})")
        parts += [f"key padding({readable_name(read.node)})" for read in self.key_padding]
        parts += [f"key padding(not {readable_name(read.node)})" for read in self.key_hidden]
        parts += [f"documents({readable_name(d.keys.node)})" for d in self.documents]
        if self.dense is not None:
            parts.append(f"dense mask({readable_name(self.dense)})")
        if self.bias is not None:
            parts.append(f"additive mask({readable_name(self.bias)})")
        return " & ".join(parts) if parts else "none"


def readable_name(node: fx.Node) -> str:
    """The user's name of a graph value where Dynamo knows one (``attention_mask``, also behind casts and pads of it),
    else the node's name."""
    source = node
    for _ in range(4):
        if "lz_name" in source.meta:
            return str(source.meta["lz_name"])
        if source.op != "call_function" or len(source.all_input_nodes) != 1:
            break
        source = source.all_input_nodes[0]
    return node.name
