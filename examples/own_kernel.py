"""A kernel of your own, from outside the package: blockwise attention in plain PyTorch.

This module is what a package of yours would hold.  Run as a script it registers the provider in this process, compiles
a small model with it and prints what the report says about it:

    python examples/own_kernel.py

Installed as a package it needs no registration: an entry point names the provider, and every process that compiles with
``backend="layerzero"`` finds it.

    [project.entry-points."lz_compile.providers"]
    own = "own_kernel:PROVIDER"
"""

from __future__ import annotations

import torch
import torch.fx as fx

from lz_compile.lowering.emit import Emitter
from lz_compile.lowering.semantic import attend_output
from lz_compile.region import Kernel, Provider, Region, Verdict, Work

BLOCK = 128

# 1. The kernel as an operator.  The version is part of its name: Inductor's caches know an operator by its name.
_library = torch.library.Library("own", "FRAGMENT")
_library.define("blockwise_v1(Tensor query, Tensor key, Tensor value, float scale, bool causal) -> Tensor")


def blockwise(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """Attention over blocks of keys with a running softmax (Milakov and Gimelshein 2018).

    Args:
        query, key, value: [B, H, M, D], [B, H, N, D], [B, H, N, Dv]; any strides, float32.
        causal: query q sees the keys up to q.

    Returns:
        [B, H, M, Dv] with the memory of a contiguous [B, M, H, Dv] tensor.
    """
    queries, keys = query.shape[2], key.shape[2]
    position = torch.arange(queries, device=query.device)[:, None]
    highest = query.new_full((*query.shape[:3], 1), float("-inf"))
    total = torch.zeros_like(highest)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for first in range(0, min(keys, queries) if causal else keys, BLOCK):
        part = slice(first, min(first + BLOCK, keys))
        scores = query @ key[:, :, part].transpose(-1, -2) * scale
        if causal:
            scores = scores.masked_fill(torch.arange(part.start, part.stop, device=query.device) > position, -torch.inf)
        new = torch.maximum(highest, scores.amax(-1, keepdim=True))
        weights, correction = torch.exp(scores - new), torch.exp(highest - new)
        total = total * correction + weights.sum(-1, keepdim=True)
        out = out * correction + weights @ value[:, :, part]
        highest = new
    return (out / total).transpose(1, 2).contiguous().transpose(1, 2)


_library.impl("blockwise_v1", blockwise, "CompositeExplicitAutograd")


# 2. Its fake: the shape, dtype and *strides* of the result.
@torch.library.register_fake("own::blockwise_v1")
def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return attend_output(query, value)


# 3. What fits: why it cannot run a region, in words for the report, or None.
def supports(region: Region) -> Verdict:
    a = region.attention
    assert a is not None
    if a.query.meta["val"].dtype != torch.float32:
        return "takes float32"
    if a.query_heads != a.kv_heads:
        return "takes no grouped heads"
    if a.softcap:
        return "has no softcap"
    return None if a.mask.is_trivial or a.mask.is_causal else "takes no mask but causal from key 0"


# 4. How to call it: insert the operator in front of the region's output.
def emit(emitter: Emitter, region: Region) -> fx.Node:
    a = region.attention
    assert a is not None
    operator = torch.ops.own.blockwise_v1.default
    parts = emitter.inputs(region)
    return emitter.result(region, emitter.call(region.output, operator, *parts, float(a.scale), a.mask.is_causal))


# 5. What it takes where nothing may be measured.
def work(region: Region) -> Work:
    a = region.attention
    assert a is not None
    flops = 4.0 * a.batch * a.query_heads * a.queries * a.keys * a.query.meta["val"].shape[-1]
    moved = 4.0 * a.batch * a.query_heads * (a.queries + a.keys) * 2 * a.query.meta["val"].shape[-1]
    return Work(flops, moved, efficiency=0.1, launches=8)


# 6. A tiny call that a child process makes before anyone uses the provider; it raises when something is wrong.
def probe() -> None:
    q = torch.randn(1, 2, 200, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(blockwise(q, q, q, 0.25, True), expected)


PROVIDER = Provider(
    name="own",
    kernels=(
        Kernel(
            name="own.blockwise",
            kind="attention",
            version="1",
            supports=supports,
            emit=emit,
            cuda_graphs="shapes alone decide what runs",
            summary="blockwise attention in plain PyTorch",
            work=work,
        ),
    ),
    probe="own_kernel:probe",
)


def main() -> None:
    import lz_compile
    from lz_compile.lowering.kernels import register

    register(PROVIDER)
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()

    def attend(x: torch.Tensor) -> torch.Tensor:
        q, k, v = torch.nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    x = torch.randn(2, 300, 64)
    with torch.no_grad(), lz_compile.config.patch(prefer=["own.*"]):
        report = lz_compile.explain(attend, x)
        torch.testing.assert_close(torch.compile(attend, backend="layerzero")(x), attend(x), atol=1e-5, rtol=1e-5)
    print(report)


if __name__ == "__main__":
    main()
