"""Measure a block of your own shape beside upstream's: time, memory, launches and error, the peers in turns.

    python examples/benchmark_block.py --width 768 --vision-width 1408 --layers 12 --batch 8

Here the Q-Former of BLIP-2 (those are its published sizes). `mllm-fast bench` measures the blocks of published models, and
docs/benchmarking.md says how to read the columns. Run it in a checkout: the benchmarks are not installed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import Blip2QFormerConfig, Blip2QFormerModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench

import mllm_fast
from bench import report
from bench.measure import QUICK, Plan, machine_limits
from bench.registry import OURS, Case, Workload, run
from bench.workloads.flamingo import randomise


def main() -> None:
    """Build the block, fuse a copy, measure both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 96), ("vision-width", 160), ("layers", 2), ("batch", 4), ("patches", 65)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--thorough", action="store_true", help="enough samples for a number that counts")
    args = parser.parse_args()
    heads = max(1, args.width // 64)
    config = Blip2QFormerConfig(
        hidden_size=args.width, intermediate_size=4 * args.width, num_attention_heads=heads,
        num_hidden_layers=args.layers, encoder_hidden_size=args.vision_width,
    )  # fmt: skip
    upstream = randomise(Blip2QFormerModel._from_config(config))

    def build(device: torch.device) -> Case:
        block = upstream.to(device)
        fused, exact = copy.deepcopy(block), copy.deepcopy(block).double()
        mllm_fast.fuse(fused)
        queries = torch.randn(1, 32, args.width, device=device).expand(args.batch, -1, -1)
        image = torch.randn(args.batch, args.patches, args.vision_width, device=device)
        return Case(
            peers={
                "transformers sdpa": [lambda: block(queries, encoder_hidden_states=image).last_hidden_state],
                OURS: [lambda: fused(queries, encoder_hidden_states=image).last_hidden_state],
            },
            exact=lambda: exact(queries.double(), encoder_hidden_states=image.double()).last_hidden_state,
        )

    # The least that must be read and computed: every weight once, and 32 rows a sample through it.
    weights = sum(p.numel() for p in upstream.parameters())
    workload = Workload(
        name=f"qformer.{args.width}x{args.layers}.batch_{args.batch}", block="Q-Former", model="your own",
        shape={"width": args.width, "batch": args.batch}, dtype=torch.float32, direction="forward", build=build,
        nbytes=4 * weights, flops=2 * weights * 32 * args.batch,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = run(workload, device, Plan() if args.thorough else QUICK)
    limits = machine_limits(device, workload.dtype, seconds=5.0 if args.thorough else 0.2)
    Console(width=160).print(report.table([report.row(result, limits)]))


if __name__ == "__main__":
    main()
