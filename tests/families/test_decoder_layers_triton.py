"""Decoder layers that are trained through on the Triton kernels, in Triton's interpreter: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm_fast
from tests.families.frozen_decoders import adapted, close, fused, inputs, results
from tests.kernels.triton_device import INTERPRETING, poisoned  # noqa: F401

if not INTERPRETING:
    pytest.skip("test_interpreter.py runs it in Triton's interpreter", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("name", "last", "tolerance"), [("Mistral", "down_proj", 1e-5), ("OPT", "fc2", 2e-5)])
def test_values_and_gradients(name: str, last: str, tolerance: float, kind: str, calls: list[Any]) -> None:
    upstream = adapted(name, kind, targets=("q_proj", "v_proj", last))
    expected = results(upstream, inputs())
    with mllm_fast.backend("triton"):
        found = results(fused(upstream), inputs())
    close(found, expected, tolerance)
    assert len(calls) == 2


def test_dropout_draws_one_pattern(calls: list[Any]) -> None:
    """A function of the seed: equal seeds give equal bits, another seed another result."""
    ours = fused(adapted(targets=("q_proj",), lora_dropout=0.5))
    with mllm_fast.backend("triton"):
        torch.manual_seed(3)
        first = results(ours, inputs())
        torch.manual_seed(3)
        again = results(ours, inputs())
        other = results(ours, inputs())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["y"], other["y"])
    assert len(calls) == 6
