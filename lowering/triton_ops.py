"""The Triton kernels as functions and as ``torch.library.triton_op`` ops, with the calling convention of ``attend``.

``split_kv`` and ``tiled`` launch at once; ``split_kv_v2`` and ``tiled_v3`` are ops that make_fx, AOTAutograd and
Inductor trace through, so that a compiled graph launches the kernels itself.  Both ways share the ``_run_*`` functions,
which read sizes, strides and dtypes only: grids never depend on values, as CUDA graphs need.
Forward only.  Importing this module works without Triton; ``available`` says what is missing.
"""

from typing import Any, NamedTuple

import torch
from torch.library import triton_op, wrap_triton

from .launch import dot_precision, multiprocessors, power_of_two
from .semantic import EMPTY_ROW, attend_output

try:
    # By name: torch finds the kernels of a triton_op in this module's names and puts their sources in its cache keys.
    from .triton_kernels import combine_kernel, empty_rows_kernel, split_kernel, tiled_kernel
except ImportError as error:
    _missing: str | None = f"triton cannot be imported: {error}"
else:
    _missing = None

LOG2E = 1.4426950408889634
MAX_HEAD_SIZE = 256
MAX_SPLITS = 64

# Heads a program of ``empty_rows_kernel`` looks at.
FILL_HEADS = 4
# Modes in which a row without visible keys attends to all of them.
FILLED_EMPTY_ROWS = (EMPTY_ROW["mean"], EMPTY_ROW["safe mean"], EMPTY_ROW["unmasked"])

Launcher = Any


class TileConfig(NamedTuple):
    """Launch parameters of ``tiled``; ``one_loop`` as ONE_LOOP of ``tiled_kernel``."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    one_loop: bool = False


class SplitConfig(NamedTuple):
    """Launch parameters of ``split_kv``; ``splits`` 0 leaves their number to :func:`split_count`."""

    block_n: int
    splits: int
    num_warps: int
    num_stages: int


def available() -> str | None:
    """None when the kernels can be launched, else the reason why not."""
    return _missing


def tile_config(
    dtype: torch.dtype, head_size: int, queries: int | torch.SymInt, reads_mask: bool = False
) -> TileConfig:
    """Tile sizes of ``tiled`` for a head size (the larger one of keys and values).

    Query, accumulator and scores of a block live in registers and K/V of each stage in shared memory (227 KiB on an
    H200): 128 query rows over 8 warps are two Hopper warp groups, and larger heads leave room for fewer keys.
    Up to 1024 queries smaller blocks fill the machine more evenly, and 64 x 32 is the largest tile of which three
    programs fit on an SM (``python benchmarks/kernels.py --dry``), whose products and exponentials then overlap: 203 us
    for B=8, S=1024, H=32, D=128 on an H200 against 210 for 64 x 64 and 233 for 128 x 128.  Heads of 64 take half the
    memory of 128: 64 x 64 in one loop is 79 us for B=32, S=512, H=16 with a mean of half the keys padded (64 x 32: 81
    in one loop, 88 in three) and 109 without padding (132 for 64 x 32 in three loops).
    Float32 runs without tensor cores, where small tiles avoid spills.  A symbolic number of queries gets the tile of
    a long prefill: choosing by it would add a guard.  Tiles of a mask tensor take shared memory as well.
    """
    block = power_of_two(head_size)
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 2 if block <= 64 else 1)
    if isinstance(queries, int) and queries <= 1024:
        if block <= 64 and not reads_mask:
            return TileConfig(64, 64, 4, 3, one_loop=True)
        return TileConfig(64, 32, 4, 3) if block <= 128 else TileConfig(64, 64, 4, 2)
    if reads_mask:
        return TileConfig(128, 64, 8, 2) if block <= 128 else TileConfig(64, 64, 4, 2)
    if block <= 128:
        return TileConfig(128, 128, 8, 3)
    return TileConfig(128, 64, 8, 2)


def fill_config(dtype: torch.dtype) -> TileConfig:
    """Tile sizes of ``empty_rows_kernel``: small ones, so that many programs fit on an SM and find out together that
    there is nothing to do."""
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 1)
    return TileConfig(64, 32, 4, 2)


def split_config(dtype: torch.dtype, head_size: int) -> SplitConfig:
    """Tile sizes of ``split_kv``: about 64 KiB to 96 KiB of keys and values in flight, so that two programs fit on
    one SM and hide each other's prologue; decode only waits for memory."""
    block = power_of_two(head_size)
    if block > MAX_HEAD_SIZE:
        return SplitConfig(16, 0, 8, 1) if dtype == torch.float32 else SplitConfig(32, 0, 8, 2)
    if dtype == torch.float32:
        return SplitConfig(32 if block <= 128 else 16, 0, 8, 2)
    return SplitConfig(64 if block <= 128 else 32, 0, 4, 3)


def split_count(
    batch: int | torch.SymInt, programs: int, keys: int | torch.SymInt, block_n: int, multiprocessors: int
) -> int:
    """How many splits ``split_kv`` makes: about four programs an SM, which evens out rows of unequal length.

    ``programs`` is the number of programs of one batch row and one split.  The kernel rounds a split up to whole
    tiles, so too many splits cost only empty programs; therefore a symbolic batch counts as one row and a symbolic
    number of keys as many, without a guard.
    """
    rows = batch if isinstance(batch, int) else 1
    wanted = _ceil_div(4 * multiprocessors, max(rows * programs, 1))
    if isinstance(keys, int):
        wanted = min(wanted, _ceil_div(keys, block_n))
    return max(1, min(wanted, MAX_SPLITS))


def split_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk: int = 0,
    empty_row: int = 0,
    sink: torch.Tensor | None = None,
    config: SplitConfig | None = None,
) -> torch.Tensor:
    """``attend`` for few queries, without documents: the keys that ``bounds`` leave are split over many programs.

    Takes any strides with the last one of query, key and value 1; float32, float16, bfloat16; head sizes up to 576 of
    keys and 512 of values.
    """
    launchers = (split_kernel, combine_kernel)
    numbers = (scale, softcap, chunk, empty_row)
    return _run_split_kv(launchers, query, key, value, bounds, key_mask, mask, *numbers, sink, config)


def tiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk: int = 0,
    empty_row: int = 0,
    sink: torch.Tensor | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """``attend`` for any number of queries; strides, dtypes and head sizes as for :func:`split_kv`."""
    return _run_tiled(
        (tiled_kernel, empty_rows_kernel),
        query,
        key,
        value,
        bounds,
        key_mask,
        query_documents,
        key_documents,
        mask,
        scale,
        softcap,
        chunk,
        empty_row,
        sink,
        config,
    )


@triton_op("lz_compile::split_kv_v2", mutates_args={})
def split_kv_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk: int = 0,
    empty_row: int = 0,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`split_kv` as an op, with the signature of ``attend``; refuses documents."""
    if query_documents is not None or key_documents is not None:
        raise NotImplementedError("split_kv_v2 takes no documents")
    launchers = (wrap_triton(split_kernel), wrap_triton(combine_kernel))
    return _run_split_kv(launchers, query, key, value, bounds, key_mask, mask, scale, softcap, chunk, empty_row, sink)


@triton_op("lz_compile::tiled_v3", mutates_args={})
def tiled_v3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk: int = 0,
    empty_row: int = 0,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`tiled` as an op, with the signature of ``attend``."""
    return _run_tiled(
        (wrap_triton(tiled_kernel), wrap_triton(empty_rows_kernel)),
        query,
        key,
        value,
        bounds,
        key_mask,
        query_documents,
        key_documents,
        mask,
        scale,
        softcap,
        chunk,
        empty_row,
        sink,
    )


def _run_split_kv(
    launchers: tuple[Launcher, Launcher],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    chunk: int,
    empty_row: int,
    sink: torch.Tensor | None,
    config: SplitConfig | None = None,
) -> torch.Tensor:
    query, scale = _with_positive_scale(query, scale)
    empty_row = EMPTY_ROW["zero"] if sink is not None else empty_row
    batch, heads, queries, head_size = query.shape
    kv_heads, keys, value_size = int(value.shape[1]), value.shape[2], value.shape[3]
    group = int(heads) // kv_heads
    config = config or split_config(query.dtype, max(head_size, value_size))
    rows = min(power_of_two(group * queries), _split_rows(query.dtype, max(head_size, value_size)))
    block_k, block_tail = _key_blocks(head_size)
    row_blocks = _ceil_div(group * queries, rows)
    splits = config.splits or split_count(
        batch, kv_heads * row_blocks, keys, config.block_n, multiprocessors(query.device)
    )

    out = attend_output(query, value)
    partial_out = query.new_empty((batch, heads, queries, splits, value_size), dtype=torch.float32)
    partial_max = query.new_empty((batch, heads, queries, splits), dtype=torch.float32)
    partial_sum = query.new_empty((batch, heads, queries, splits), dtype=torch.float32)
    mask_kind, mask_strides = _mask_layout(mask, query, keys)
    shared: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "mask": query if mask is None else mask,
        "partial_out": partial_out,
        "partial_max": partial_max,
        "partial_sum": partial_sum,
        **_strides("q", query, "bhm"),
        **_strides("k", key, "bhn"),
        **_strides("v", value, "bhn"),
        **mask_strides,
        "queries": queries,
        "keys": keys,
        "scale": scale,
        "softcap": softcap,
        "SPLITS": splits,
        "GROUP": group,
        "DK": head_size,
        "DV": value_size,
        "BLOCK_DV": power_of_two(value_size),
        "MASK_KIND": mask_kind,
        "SOFTCAP": softcap != 0.0,
    }
    split, combine = launchers
    split[(row_blocks * splits, kv_heads, batch)](
        bounds=query if bounds is None else bounds,
        key_mask=query if key_mask is None else key_mask,
        **_optional_strides("key_mask", key_mask, "bn"),
        factor=_exponent_factor(scale, softcap),
        BLOCK_DK=block_k,
        BLOCK_TAIL=block_tail,
        ROWS=rows,
        BLOCK_N=config.block_n,
        CHUNK=chunk,
        HAS_BOUNDS=bounds is not None,
        HAS_KEY_MASK=key_mask is not None,
        PRECISION=dot_precision(query.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )
    combine[(heads * queries, batch)](
        out=out,
        **_strides("o", out, "bhm"),
        BLOCK_SPLITS=power_of_two(splits, 1),
        HEADS=heads,
        BLOCK_DK=power_of_two(head_size),
        BLOCK_N=32 if head_size <= MAX_HEAD_SIZE else 8,
        EMPTY_ROW=empty_row,
        **_sink_arguments(sink, query),
        num_warps=4,
        **shared,
    )
    return out


def _run_tiled(
    launchers: tuple[Launcher, Launcher],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    query_documents: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    chunk: int,
    empty_row: int,
    sink: torch.Tensor | None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    query, scale = _with_positive_scale(query, scale)
    empty_row = EMPTY_ROW["zero"] if sink is not None else empty_row
    batch, heads, queries, head_size = query.shape
    kv_heads, keys, value_size = int(value.shape[1]), value.shape[2], value.shape[3]
    has_documents = query_documents is not None and key_documents is not None
    if config is None:
        config = tile_config(query.dtype, max(head_size, value_size), queries, mask is not None)
    # The memory of ``attend_output``.  Both kernels write to its owner rather than to a transposed view, so that
    # Inductor need not see through views to let them do so in place.
    out = query.new_empty(batch, queries, heads, value_size)
    fills = empty_row in FILLED_EMPTY_ROWS
    empty_rows = query.new_empty((batch, heads, queries), dtype=torch.int8) if fills else query
    mask_kind, mask_strides = _mask_layout(mask, query, keys)
    shared: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "mask": query if mask is None else mask,
        "out": out,
        "empty_rows": empty_rows,
        **_strides("q", query, "bhm"),
        **_strides("k", key, "bhn"),
        **_strides("v", value, "bhn"),
        **mask_strides,
        **_strides("o", out, "bmh"),
        "queries": queries,
        "keys": keys,
        "scale": scale,
        "softcap": softcap,
        "HEADS": heads,
        "GROUP": int(heads) // kv_heads,
        "DK": head_size,
        "DV": value_size,
        "BLOCK_DK": power_of_two(head_size),
        "BLOCK_DV": power_of_two(value_size),
        "MASK_KIND": mask_kind,
        "SOFTCAP": softcap != 0.0,
        "EMPTY_ROW": empty_row,
        "PRECISION": dot_precision(query.dtype),
    }
    attend_tiles, fill_empty_rows = launchers
    attend_tiles[(_ceil_div(queries, config.block_m) * heads, batch)](
        bounds=query if bounds is None else bounds,
        key_mask=query if key_mask is None else key_mask,
        query_documents=query if query_documents is None else query_documents,
        key_documents=query if key_documents is None else key_documents,
        **_optional_strides("key_mask", key_mask, "bn"),
        **_optional_strides("query_documents", query_documents, "bm"),
        **_optional_strides("key_documents", key_documents, "bn"),
        factor=_exponent_factor(scale, softcap),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        CHUNK=chunk,
        HAS_BOUNDS=bounds is not None,
        HAS_KEY_MASK=key_mask is not None,
        HAS_DOCUMENTS=has_documents,
        ONE_LOOP=config.one_loop,
        **_sink_arguments(sink, query),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared,
    )
    if fills:
        tiles = fill_config(query.dtype)
        head_blocks = _ceil_div(int(heads), FILL_HEADS)
        fill_empty_rows[(_ceil_div(queries, tiles.block_m) * head_blocks, batch)](
            HEADS_PER_PROGRAM=FILL_HEADS,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **shared,
        )
    return out.transpose(1, 2)


def _with_positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The kernels take the maximum of the scores before they scale them, which needs a positive scale."""
    if scale < 0:
        return query.neg(), -scale
    return query, max(scale, 1e-30)


def _exponent_factor(scale: float, softcap: float) -> float:
    """What ``online_softmax`` multiplies ``shape_scores`` with, when there is no additive mask, before exp2."""
    return (softcap or scale) * LOG2E


def _key_blocks(head_size: int) -> tuple[int, int]:
    """The columns of a key as one block, or for wide heads as the largest power of two in them and a block for the
    rest."""
    block = power_of_two(head_size)
    if head_size <= MAX_HEAD_SIZE or block == head_size:
        return block, 0
    return block // 2, power_of_two(head_size - block // 2)


def _split_rows(dtype: torch.dtype, head_size: int) -> int:
    """The most query rows a program of ``split_kv`` takes before its accumulators spill; more rows read K/V again,
    mostly from L2."""
    if dtype == torch.float32:
        return 32 if head_size <= 128 else 16
    return 64 if head_size <= 128 else 32


def _strides(name: str, tensor: torch.Tensor, axes: str) -> dict[str, Any]:
    return {f"stride_{name}{axis}": tensor.stride(i) for i, axis in enumerate(axes)}


def _optional_strides(name: str, tensor: torch.Tensor | None, axes: str) -> dict[str, Any]:
    return {f"stride_{name}_{axis}": 0 if tensor is None else tensor.stride(i) for i, axis in enumerate(axes)}


def _mask_layout(mask: torch.Tensor | None, query: torch.Tensor, keys: int) -> tuple[int, dict[str, Any]]:
    """MASK_KIND of the kernels (0 none, 1 boolean, 2 additive) and the strides of the mask as [B, Hq, M, N]."""
    if mask is None:
        return 0, dict.fromkeys((f"stride_mask_{axis}" for axis in "bhmn"), 0)
    batch, heads, queries, _ = query.shape
    expanded = mask.expand(batch, heads, queries, keys)
    return (1 if mask.dtype == torch.bool else 2), _optional_strides("mask", expanded, "bhmn")


def _sink_arguments(sink: torch.Tensor | None, query: torch.Tensor) -> dict[str, Any]:
    if sink is None:
        return {"sink": query, "stride_sink": 0, "HAS_SINK": False}
    return {"sink": sink, "stride_sink": sink.stride(0), "HAS_SINK": True}


def _ceil_div(a: Any, b: Any) -> Any:
    return -(-a // b)
