"""Every drop-in in fp64 against upstream, on drawn sizes, masks and options: outputs and all gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import mllm_fast
from tests.families.instruments import assert_same
from tests.robustness.drawn_models import MODELS

# A model with a language model takes longer than a block.
# RMS norms of transformers compute in fp32 whatever the dtype.
IN_FP32 = ("idefics", "open_flamingo", "llava", "mllama", "mplug_owl")
EXAMPLES = {name: 15 if "of " in name else 3 if name == "open_flamingo" else 5 for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_same_as_upstream(name: str) -> None:
    @settings(max_examples=EXAMPLES[name], phases=(Phase.generate,))  # a model says little by being smaller
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(0)
        drawn = data.draw(MODELS[name])
        fused = copy.deepcopy(drawn.model)
        mllm_fast.fuse(fused, level=data.draw(st.sampled_from([0, 1, 2]), label="level"))
        tolerance = 1e-5 if name.removeprefix("gated layer of ").startswith(IN_FP32) else 1e-9
        assert_same(drawn.results(fused), drawn.results(drawn.model), tolerance)

    check()
