"""Which vision models of transformers a Flamingo is built over, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    Idefics2VisionConfig,
    PixtralVisionConfig,
    PixtralVisionModel,
    PreTrainedConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from mllm_fast.models import FlamingoForConditionalGeneration, FlamingoModelConfig
from tests.models.flamingo_models import IMAGE, TEXTS, VISION, VISIONS, flamingo, prompts

_SIZES: dict[str, Any] = {"hidden_size": VISION, "intermediate_size": 40, "num_hidden_layers": 1, "patch_size": 8,
                          "num_attention_heads": 2}  # fmt: skip
SEVERAL_SIZES: dict[type[PreTrainedConfig], tuple[Any, str]] = {
    Siglip2VisionConfig: (Siglip2VisionModel, "pixel_attention_mask, spatial_shapes"),
    PixtralVisionConfig: (PixtralVisionModel, "image_sizes"),
}


@pytest.mark.parametrize("vision", VISIONS)
def test_towers_that_are_served(tmp_path: Path, vision: str) -> None:
    """Built from a configuration, over a model, and loaded again: the patches are the last of the tower's own rows."""
    model, inputs = flamingo(vision=vision), prompts()
    pixels = inputs["pixel_values"].flatten(0, 1)
    tower = model.model.vision_encoder.tower
    own = tower(pixel_values=pixels).last_hidden_state[:, -4:]
    assert torch.equal(model.model.vision_encoder(pixels), own)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded.model.vision_encoder.tower) is type(tower)
    torch.testing.assert_close(loaded(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
    parts = FlamingoForConditionalGeneration.from_parts(model.model.lm, tower, image_token_id=IMAGE, every=2)
    assert torch.equal(parts.model.vision_encoder(pixels), own)


@pytest.mark.parametrize("config", SEVERAL_SIZES, ids=lambda config: config.model_type)
def test_images_of_several_sizes_are_refused_at_once(config: type[PreTrainedConfig]) -> None:
    cls, takes = SEVERAL_SIZES[config]
    message = (
        rf"a {cls.__name__}, which takes {takes} beside the pixels.*\[images, patches, width\], such as CLIPVisionM"
    )
    with pytest.raises(ValueError, match=message):
        FlamingoForConditionalGeneration(FlamingoModelConfig(config(**_SIZES), TEXTS["llama"]()))
    with pytest.raises(ValueError, match=message):
        FlamingoForConditionalGeneration.from_parts(flamingo().model.lm, cls(config(**_SIZES)), image_token_id=IMAGE)


def test_what_is_no_tower() -> None:
    with pytest.raises(ValueError, match=r"no vision model can be built from a Idefics2VisionConfig; expected one"):
        FlamingoForConditionalGeneration(FlamingoModelConfig(Idefics2VisionConfig(**_SIZES), TEXTS["llama"]()))
    with pytest.raises(ValueError, match=r"a LlamaModel, which takes no pixel_values; expected one"):
        FlamingoForConditionalGeneration(FlamingoModelConfig(TEXTS["llama"](), TEXTS["llama"]()))
