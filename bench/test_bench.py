"""The registry under pytest-benchmark: `pytest bench/ --benchmark-only`, `-k` selects.

pytest-benchmark times one peer after the other. For a comparison that survives a drifting machine use
`python -m bench`, which times the peers in turns.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from bench.registry import OURS, Case, Workload, check, workloads

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)  # the peers of a workload follow each other; only one set of weights is held
def _checked(workload: Workload) -> Case:
    case = workload.build(DEVICE)
    check(case)
    return case


@pytest.mark.parametrize("peer", ["upstream", OURS])
@pytest.mark.parametrize("workload", workloads(), ids=lambda w: w.name)
def test_workload(benchmark, workload, peer):  # type: ignore[no-untyped-def]
    with torch.set_grad_enabled(workload.direction == "backward"):
        case = _checked(workload)
        rotation = itertools.cycle(case.peers[case.baseline if peer == "upstream" else peer])

        def call() -> None:
            next(rotation)()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark.group = workload.name
        benchmark.extra_info.update(block=workload.block, model=workload.model, shape=dict(workload.shape))
        benchmark.pedantic(call, rounds=10, iterations=1, warmup_rounds=3)
