"""Every drop-in in fp64 against upstream, on drawn sizes, masks and options: outputs and all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import mllm_fast
from mllm_fast.families import REGISTRY, state_of
from tests.families.instruments import assert_same
from tests.robustness.drawn_models import MODELS
from tests.robustness.drawn_systems import SYSTEMS

ALL = MODELS | SYSTEMS
# RMS norms of transformers compute in fp32 whatever the dtype, and so do T5's and PEFT's conversions.
IN_FP32 = (
    "idefics",
    "open_flamingo",
    "llava",
    "mllama",
    "mplug_owl",
    "blip2 and instructblip",
    "minigpt4",
    "decoder layers",
)
# Their scales are in fp32.
QUANTISED = "layers of bitsandbytes"
# A model with a language model takes longer than a block.
EXAMPLES = {name: 30 if "of " in name else 5 if name == "open_flamingo" else 10 for name in ALL}


def tolerance(name: str) -> float:
    if name.startswith(QUANTISED):
        return 1e-6
    return 1e-5 if name.removeprefix("gated layer of ").startswith(IN_FP32) else 1e-9


@pytest.mark.parametrize("name", ALL)
def test_same_as_upstream(name: str) -> None:
    @settings(max_examples=EXAMPLES[name], phases=(Phase.generate,))  # a model says little by being smaller
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(0)
        drawn = data.draw(ALL[name])
        fused = copy.deepcopy(drawn.model)
        mllm_fast.fuse(fused, level=data.draw(st.sampled_from([0, 1, 2]), label="level"), **drawn.options)
        assert_same(drawn.results(fused), drawn.results(drawn.peer or drawn.model), tolerance(name))

    check()


def test_no_dropin_is_left_out() -> None:
    """A dozen draws of each strategy hold every class of the registry, which is then swapped."""
    swapped: set[type] = set()
    for strategy in ALL.values():

        @settings(max_examples=12, phases=(Phase.generate,))
        @given(drawn=strategy)
        def collect(drawn: Any) -> None:
            mllm_fast.fuse(drawn.model, **drawn.options)
            # A drop-in may itself be a base: the language models of open_flamingo get classes as they are met.
            swapped.update(cls for m in drawn.model.modules() if state_of(m) is not None for cls in type(m).__mro__)

        collect()
    # What is there to be captured as a CUDA graph computes nothing of its own.
    missing = [p for p, entry in REGISTRY.items() if entry.graphs != "only" and entry.load() not in swapped]
    assert not missing
