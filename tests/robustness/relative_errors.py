"""Errors of a drawn model in a dtype, beside those that upstream makes in it."""

from __future__ import annotations

import copy
from typing import Any

import torch

import mllm_fast
from tests.families.instruments import Results
from tests.robustness.drawn_models import Drawn

# A gradient that is 0 but for rounding is no measure, nor is a single number, which can be right by luck.
SMALLEST = 1e-6


def relative(found: Results, exact: Results) -> float:
    """RMS over all results of their RMS errors, each against the size of what it should be, and 1 at most."""
    errors = []
    for name, reference in exact.items():
        size = reference.double().square().mean().sqrt().item() if reference.numel() else 0.0
        if size > SMALLEST and reference.numel() > 1:
            assert found[name].isfinite().all(), f"{name} is not finite"
            error = (found[name].double() - reference.double()).square().mean().sqrt().item()
            errors.append(min(error / size, 1.0) ** 2)
    assert errors, "there is nothing to compare"
    return (sum(errors) / len(errors)) ** 0.5


def ratio(drawn: Drawn, dtype: torch.dtype, **options: Any) -> float:
    """Our error over upstream's, in `dtype`, both against upstream in fp64 with the same weights."""
    upstream = copy.deepcopy(drawn.model).to(dtype)
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, **drawn.options, **options)
    exact = drawn.results(copy.deepcopy(upstream).double())
    theirs, ours = (relative(drawn.results(model), exact) for model in (upstream, fused))
    unit = torch.finfo(dtype).eps / 16  # where upstream hits the exact result by luck
    return (ours + unit) / (theirs + unit)
