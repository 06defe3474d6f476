"""`fuse(prepack=True)`: the same results from packed weights, which follow the weights and stay out of training."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from tests.families.builders import idefics, idefics_inputs, of_block, of_inputs, of_model, of_resampler


def packed_count(module: nn.Module) -> int:
    """How many packed weights the module keeps."""
    states = [m.__dict__["_mllm_fast"] for m in module.modules() if "_mllm_fast" in m.__dict__]
    return sum(isinstance(key, tuple) and key[0] == "packed" for state in states for key in state.derived._entries)


def block_call(block: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 64, generator=generator).to(dtype)
    media = torch.randn(2, 2, 4, 48, generator=generator).to(dtype)
    locations = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]]).bool()
    return block(x, media, media_locations=locations)


def assert_close_in_bf16(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.float().abs().max()
    assert (ours.float() - theirs.float()).abs().max() <= 0.02 * scale


def test_block() -> None:
    upstream = of_block().bfloat16()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, prepack=True)
    with torch.no_grad():
        assert_close_in_bf16(block_call(fused), block_call(upstream))
        assert packed_count(fused) == 4  # queries, output, and both of the feed-forward network
        for block in (fused, upstream):
            block.ff[1].weight.mul_(-2)
        assert_close_in_bf16(block_call(fused), block_call(upstream))
        assert packed_count(fused) == 4


def test_resampler() -> None:
    upstream = of_resampler().bfloat16()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, prepack=True)
    x = torch.randn(2, 2, 1, 9, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        assert_close_in_bf16(fused(x), upstream(x))
    assert packed_count(fused) == 1 + 4 * len(upstream.layers)


@pytest.mark.parametrize("system", ["open_flamingo", "idefics"])
def test_generation(system: str) -> None:
    model, inputs = (of_model(), of_inputs()) if system == "open_flamingo" else (idefics().eval(), idefics_inputs())
    fused = copy.deepcopy(model)
    mllm_fast.fuse(fused, prepack=True)
    arguments: dict[str, Any] = {**inputs, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(fused.generate(**arguments), model.generate(**arguments))
    assert packed_count(fused) > 0


def test_training_does_not_use_it() -> None:
    upstream = of_block()
    fused = copy.deepcopy(upstream)
    mllm_fast.fuse(fused, prepack=True)
    for block in (fused, upstream):
        block_call(block, torch.float32).square().sum().backward()
    assert packed_count(fused) == 0
    for (name, ours), theirs in zip(fused.named_parameters(), upstream.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_copies_and_pickles_leave_it_behind() -> None:
    fused = of_block().bfloat16()
    mllm_fast.fuse(fused, prepack=True)
    with torch.no_grad():
        expected = block_call(fused)
        for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert packed_count(again) == 0
            assert torch.equal(block_call(again), expected)
    assert list(fused.state_dict()) == list(of_block().state_dict())
