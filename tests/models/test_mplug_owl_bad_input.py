"""mPLUG-Owl says in one line what does not fit: images, masks, configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mllm_fast.models.mplug_owl import MplugOwlForConditionalGeneration
from tests.families.instruments import fused
from tests.models.mplug_owl_models import QUERIES, ROWS, TEXT, VISION, config, inputs, owl


@pytest.mark.parametrize("wrap", [lambda m: m, fused], ids=["unfused", "fused"])
def test_bad_input(wrap: Any) -> None:
    model, given = wrap(owl()), inputs()
    ids, pixels = given["input_ids"], given["pixel_values"]
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match=r"hold 12 image tokens \(id -1; row by row: 8, 4, 0\), but 2 images need 4"
        ):
            call(ids, pixels[:2])
        with pytest.raises(ValueError, match="but 0 images need 4"):
            call(ids)
    broken = ids.clone()
    broken[0, 2] = 5
    with pytest.raises(ValueError, match=r"row by row: 7, 4, 0\), but 3 images"):
        model(broken, pixels)
    with pytest.raises(ValueError, match="both pixel_values and image_features"):
        model(ids, pixels, image_features=torch.randn(3, ROWS, TEXT))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=pixels)
    embeddings = model.embed_prompt(ids, pixels)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="images were given without input_ids"):
            call(inputs_embeds=embeddings, pixel_values=pixels)
    with pytest.raises(ValueError, match=r"has shape \(3, 3, 42, 28\); expected \[images, 3, 28, 28\]"):
        model(ids, torch.randn(3, 3, 42, 28))


def test_bad_queries_and_masks() -> None:
    ours = fused(owl())
    with pytest.raises(ValueError, match=r"queries have shape \(2, 3, 32\); expected \[3, n, D\] for 3 images"):
        ours.abstractor(torch.randn(2, QUERIES, VISION), torch.randn(3, 5, VISION))
    with pytest.raises(ValueError, match=r"the image mask has shape \(3, 4\); expected \(3, 5\)"):
        ours.abstractor(torch.randn(3, QUERIES, VISION), torch.randn(3, 5, VISION), torch.ones(3, 4))


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="T5Config, of an encoder-decoder model; expected a decoder-only"):
        type(config())(text_config={"model_type": "t5"})
    with pytest.raises(ValueError, match="all three must be equal"):
        type(config())(vision_config={"hidden_size": 64})
    changed = config()
    changed.vision_config.num_attention_heads = 5
    with pytest.raises(ValueError, match="5 heads do not divide hidden_size 32"):
        MplugOwlForConditionalGeneration(changed)
