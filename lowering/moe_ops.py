"""The fused mixture of experts for few tokens, as a function and as a ``torch.library.triton_op``.

``experts`` launches at once; ``moe_v1`` is an op that make_fx, AOTAutograd and Inductor trace through.  Both read
sizes, strides and dtypes only: the grids never depend on who chose which expert, as CUDA graphs need.  The sum over a
token's experts is left to the caller, so that Inductor fuses it with what follows.
Forward only.  Importing this module works without Triton; ``available`` says what is missing.
"""

from typing import Any, NamedTuple

import torch
from torch.library import triton_op, wrap_triton

from .launch import dot_precision, multiprocessors, power_of_two

try:
    # By name: torch finds the kernels of a triton_op in this module's names and puts their sources in its cache keys.
    from .moe_kernels import down_kernel, gate_up_kernel
except ImportError as error:
    _missing: str | None = f"triton cannot be imported: {error}"
else:
    _missing = None

# All tokens are rows of each expert's products: more of them are better sorted by expert.
MAX_TOKENS = 64
# Terms of a sum up to which Inductor writes it out and fuses it with anything (its ``unroll_reductions_threshold``).
_UNROLLED = 8
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_WHOLE, _HALVES, _INTERLEAVED = 1, 2, 3

Launcher = Any


class ProductConfig(NamedTuple):
    """Launch parameters of one of the products; ``columns`` of its weight make a tile, gate and up together."""

    columns: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def available() -> str | None:
    """None when the kernels can be launched, else the reason why not."""
    return _missing


def product_config(
    dtype: torch.dtype,
    tokens: int,
    columns: int,
    depth: int,
    along_k: bool,
    slots: int,
    multiprocessors: int,
    most_splits: int = 1,
) -> ProductConfig:
    """Tile sizes of a product with ``slots`` weights ``[depth, columns]``, which lie along k or along the columns.

    The weights stream through shared memory: a stage holds 16 KiB of them, four stages of up to three programs keep
    about 150 KiB in flight on an SM, several times what bandwidth times latency asks for (some 30 KiB on an H200).  A
    tile is twice as long in the direction in which memory runs, 256 bytes, as in the other.  Where that gives less than
    two programs an SM, tiles become narrower and deeper; the second product may be cut along its depth as well, which
    costs a float32 row a split but keeps long runs.  Many tokens take shared memory for their own rows: a stage less,
    and tiles less deep.  Float32 multiplies without tensor cores, where small tiles avoid spills.
    """
    if dtype == torch.float32:
        wide, block_k, stages = 32, 32, 3
        elements = wide * block_k
    else:
        wide, block_k = (64, 128) if along_k else (128, 64)
        stages = 4 if tokens <= 32 else 3
        elements = wide * block_k
    splits = 1

    def programs() -> int:
        return -(-columns // wide) * splits * slots

    while programs() < 2 * multiprocessors:
        if wide > 64:
            wide //= 2
        elif splits * 2 <= most_splits and depth >= splits * 2 * 4 * (elements // wide):
            splits *= 2
        elif wide > 32:
            wide //= 2
        else:
            break
    deepest = 256 if tokens <= 16 else 128
    return ProductConfig(wide, min(elements // wide, deepest, power_of_two(depth)), 4, stages, splits)


def experts(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_along_k: bool,
    down_along_k: bool,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    configs: tuple[ProductConfig, ProductConfig] | None = None,
) -> torch.Tensor:
    """What each expert of a token adds to its row; the sum over dimension 1 is :func:`lz_compile.lowering.moe.moe`.

    Args:
        hidden: [T, H], T at most :data:`MAX_TOKENS`; cast to the dtype of the expert weights.
        weights: [T, K], floating; applied in float32.
        indices: [T, K], integers in [0, experts) that differ within a row.
        gate_up: [E, 2F, H] where ``gate_up_along_k``, else [E, H, 2F]; F in place of 2F without a gate.
        down: [E, H, F] where ``down_along_k``, else [E, F, H].
        gate_up_bias, down_bias: [E, 2F] and [E, H], or None.
        activation ... up_offset: as in :class:`lz_compile.moe.Moe`.
        configs: launch parameters of the two products.

    Any strides; float32, float16 or bfloat16, the expert weights and biases of one dtype.

    Returns:
        [T, K * splits, H] contiguous in float32, ``splits`` chosen by shapes.
    """
    launchers = (gate_up_kernel, down_kernel)
    tensors = (hidden, weights, indices, gate_up, down, gate_up_bias, down_bias)
    facts = (gate_up_along_k, down_along_k, activation, gated, interleaved, alpha, limit, up_offset)
    return _run(launchers, tensors, facts, configs)


@triton_op("lz_compile::moe_v1", mutates_args={})
def moe_v1(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_along_k: bool,
    down_along_k: bool,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """:func:`experts` as an op."""
    launchers = (wrap_triton(gate_up_kernel), wrap_triton(down_kernel))
    tensors = (hidden, weights, indices, gate_up, down, gate_up_bias, down_bias)
    facts = (gate_up_along_k, down_along_k, activation, gated, interleaved, alpha, limit, up_offset)
    return _run(launchers, tensors, facts, None)


@moe_v1.register_fake
def _fake(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_along_k: bool,
    down_along_k: bool,
    *_: Any,
) -> torch.Tensor:
    """The result's memory alone: Triton's interpreter, which tests use, could not run on fake tensors."""
    _, second = _configs(hidden, indices, gate_up, down, gate_up_along_k, down_along_k)
    return _terms(hidden, indices, second)


def _configs(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_along_k: bool,
    down_along_k: bool,
) -> tuple[ProductConfig, ProductConfig]:
    """Launch parameters of both products for these shapes."""
    tokens, top_k = indices.shape
    slots = min(gate_up.shape[0], tokens * top_k)
    processors = multiprocessors(hidden.device)
    columns = gate_up.shape[1 if gate_up_along_k else 2]
    width, size = down.shape[2 if down_along_k else 1], hidden.shape[1]
    lies_along_k = [w.stride(2 if k else 1) == 1 for w, k in ((gate_up, gate_up_along_k), (down, down_along_k))]
    return (
        product_config(gate_up.dtype, tokens, columns, size, lies_along_k[0], slots, processors),
        product_config(
            down.dtype, tokens, size, width, lies_along_k[1], slots, processors, max(1, _UNROLLED // int(top_k))
        ),
    )


def _terms(hidden: torch.Tensor, indices: torch.Tensor, second: ProductConfig) -> torch.Tensor:
    tokens, top_k = indices.shape
    return hidden.new_empty((tokens, top_k * second.splits, hidden.shape[1]), dtype=torch.float32)


def _run(
    launchers: tuple[Launcher, Launcher],
    tensors: tuple[Any, ...],
    facts: tuple[Any, ...],
    configs: tuple[ProductConfig, ProductConfig] | None,
) -> torch.Tensor:
    hidden, weights, indices, gate_up, down, gate_up_bias, down_bias = tensors
    gate_up_along_k, down_along_k, activation, gated, interleaved, alpha, limit, up_offset = facts
    first, second = configs or _configs(hidden, indices, gate_up, down, gate_up_along_k, down_along_k)
    tokens, top_k = indices.shape
    count, width, size = gate_up.shape[0], down.shape[2 if down_along_k else 1], hidden.shape[1]
    slots = min(count, tokens * top_k)
    act = hidden.new_empty((tokens * top_k, width), dtype=down.dtype)
    out = _terms(hidden, indices, second)
    shared: dict[str, Any] = {
        "indices": indices,
        "TOKENS": tokens,
        "TOP_K": top_k,
        "HIDDEN": size,
        "WIDTH": width,
        "BY_PAIR": slots < count,
        "ROWS": power_of_two(tokens),
        "CHOICES": power_of_two(top_k, 1),
        "PRECISION": dot_precision(gate_up.dtype),
        "STRIDE_IT": indices.stride(0),
        "STRIDE_IK": indices.stride(1),
    }
    gate_up_launcher, down_launcher = launchers
    units = first.columns // 2 if gated else first.columns
    gate_up_launcher[(-(-width // units), slots)](
        hidden=hidden,
        **_expert_arguments(gate_up, gate_up_along_k, gate_up_bias, first),
        out=act,
        alpha=alpha,
        limit=0.0 if limit is None else limit,
        up_offset=up_offset,
        PARTS=(_INTERLEAVED if interleaved else _HALVES) if gated else _WHOLE,
        ACTIVATION=_ACTIVATIONS[activation],
        HAS_LIMIT=limit is not None,
        STRIDE_XT=hidden.stride(0),
        STRIDE_XK=hidden.stride(1),
        **shared,
    )
    down_launcher[(-(-size // second.columns) * second.splits, slots)](
        act=act,
        weights=weights,
        **_expert_arguments(down, down_along_k, down_bias, second),
        out=out,
        SPLITS=second.splits,
        STRIDE_RT=weights.stride(0),
        STRIDE_RK=weights.stride(1),
        **shared,
    )
    return out


def _expert_arguments(
    weight: torch.Tensor, along_k: bool, bias: torch.Tensor | None, config: ProductConfig
) -> dict[str, Any]:
    return {
        "weight": weight,
        "bias": weight if bias is None else bias,
        "HAS_BIAS": bias is not None,
        "COLUMNS": config.columns,
        "BLOCK_K": config.block_k,
        "STRIDE_WE": weight.stride(0),
        "STRIDE_WK": weight.stride(2 if along_k else 1),
        "STRIDE_WN": weight.stride(1 if along_k else 2),
        "STRIDE_BE": 0 if bias is None else bias.stride(0),
        "STRIDE_BN": 0 if bias is None else bias.stride(1),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
