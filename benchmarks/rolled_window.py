"""One decode step of a full sliding cache on a GPU: what moving the window costs beside the attention.

``python -m benchmarks.rolled_window [--batch 8] [--window 4096]``; shapes of Mistral-7B (H=32, Hkv=8, D=128) unless
told otherwise.  On the same tensors: attention alone, the step as transformers spells it compiled by Inductor, and by
layerzero without and with the ``rolled_window`` kind; after a step the state must be eager's, bit for bit.  (Attention
alone leaves the state as it was.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

Step = Callable[..., torch.Tensor]


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """``query`` [B, H, 1, D] over a window [B, Hkv, W, D]; the new row is not looked at."""
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def step(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The same after the window has given up its first row for ``key`` and ``value`` [B, Hkv, 1, D]."""
    moved_keys, moved_values = keys.roll(-1, dims=-2), values.roll(-1, dims=-2)
    index = torch.tensor([-1], dtype=torch.int64, device=keys.device)
    moved_keys[:, :, index] = key
    moved_values[:, :, index] = value
    keys.copy_(moved_keys)
    values.copy_(moved_values)
    return attend(query, keys, values, key, value)


def microseconds(run: Step, tensors: list[torch.Tensor], repeats: int = 100) -> float:
    """The median of ``repeats`` calls."""
    times = []
    for _ in range(10 + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(*tensors)
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return sorted(times[10:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"batch": 8, "window": 4096, "heads": 32, "kv-heads": 8, "size": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    window = (chosen.batch, chosen.kv_heads, chosen.window, chosen.size)
    row = (chosen.batch, chosen.kv_heads, 1, chosen.size)
    shapes = [(chosen.batch, chosen.heads, 1, chosen.size), window, window, row, row]
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    moves = {"kinds": ["attention", "rolled_window"]}
    programs: dict[str, Step] = {
        "attention alone, Inductor": torch.compile(attend),
        "step, Inductor": torch.compile(step),
        "step, layerzero, window copied": torch.compile(step, backend="layerzero"),
        "step, layerzero, window in place": torch.compile(step, backend="layerzero", options=moves),
    }
    expected = [tensor.clone() for tensor in tensors]
    step(*expected)
    for name, program in programs.items():
        torch._dynamo.reset()
        own = [tensor.clone() for tensor in tensors]
        program(*own)
        same = all(torch.equal(own[i], expected[i]) for i in (1, 2))
        state = "eager's state" if same else "another state"
        print(f"{name:34} {microseconds(program, own):9.1f} us   {state}")


if __name__ == "__main__":
    main()
