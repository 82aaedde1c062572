"""A service that compiles with layerzero and answers Prometheus: counts, times, kernels, fallbacks.

    pip install 'lz-compile[metrics]'
    python examples/metrics_endpoint.py --port 9464 --serve    # then: curl localhost:9464/metrics

Without ``--serve`` it scrapes itself once and prints what Prometheus would read.
"""

from __future__ import annotations

import argparse
import threading
import urllib.request

import torch
from prometheus_client import CollectorRegistry, start_http_server

from lz_compile import metrics


class Attention(torch.nn.Module):
    def __init__(self, size: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=9464, help="0 takes a free one")
    parser.add_argument("--serve", action="store_true", help="keep serving until interrupted")
    options = parser.parse_args(arguments)

    registry = CollectorRegistry()  # a service registers with prometheus_client.REGISTRY: metrics.prometheus()
    metrics.prometheus(registry)
    server, _ = start_http_server(options.port, addr="127.0.0.1", registry=registry)

    model = torch.compile(torch.nn.Sequential(Attention(), Attention()).eval(), backend="layerzero")
    with torch.inference_mode():
        model(torch.randn(1, 16, 64))

    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
        print(answer.read().decode())
    if options.serve:
        threading.Event().wait()
    server.shutdown()


if __name__ == "__main__":
    main()
