"""Measure one op against what you would write instead, at any shape.

    python examples/microbenchmark_op.py --queries 64 --keys 2304 --heads 8 --head-dim 64

Here attention over two key sources (the images' tokens and the latents of a resampler), which torch's SDPA needs concatenated.
Run it in a checkout: the benchmarks are not installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench

from bench.measure import QUICK, Plan, count_launches, peak_memory, time_peers
from mllm_fast import ops


def main() -> None:
    """Check that both compute the same, then time them in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 2), ("queries", 64), ("keys", 256), ("heads", 8), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--thorough", action="store_true", help="enough samples for a number that counts")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (args.heads, args.head_dim)
    q = torch.randn(args.batch, args.queries, *shape, device=device)
    k, v = (torch.randn(args.batch, args.keys, *shape, device=device) for _ in "kv")
    extra_k, extra_v = (torch.randn(args.batch, args.queries, *shape, device=device) for _ in "kv")

    def ours() -> Tensor:
        return ops.attention(q, k, v, extra_k=extra_k, extra_v=extra_v)

    def sdpa() -> Tensor:
        keys, values = torch.cat((k, extra_k), 1), torch.cat((v, extra_v), 1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return out.transpose(1, 2)

    peers = {"torch sdpa": sdpa, "mllm_fast": ours}
    with torch.no_grad():
        torch.testing.assert_close(ours(), sdpa(), rtol=1e-4, atol=1e-4)
        timings = time_peers({name: [call] for name, call in peers.items()}, Plan() if args.thorough else QUICK, device)
        for name, call in peers.items():
            t, memory, launches = timings[name], peak_memory(call, device).peak / 2**20, count_launches(call, device)
            spread = f"{t.low_ms:.3f} to {t.high_ms:.3f}{'' if t.reliable else ', noisy'}"
            print(f"{name:12} {t.median_ms:8.3f} ms ({spread})  {memory:7.2f} MiB  {launches} launches")


if __name__ == "__main__":
    main()
