"""Which vision models of transformers a Flamingo is built over: those that read images of one size into patches."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

_SERVED = (
    "expected one that reads images of one size, pixel_values [images, channels, height, width], into [images, patches, "
    "width], such as CLIPVisionModel, SiglipVisionModel, Dinov2Model, ViTModel or Blip2VisionModel"
)
# By `model_type` of their configurations, which AutoModel does not know.
_CLASSES = {
    "blip_vision_model": "BlipVisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
    "instructblip_vision_model": "InstructBlipVisionModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
}
# By one of these arguments, which may be optional, images of several sizes become one row of patches.
_SIZES = {"image_sizes", "spatial_shapes", "grid_thw", "image_grid_thw"}


def build_tower(config: PreTrainedConfig) -> Any:
    """A new vision model.

    Raises:
        ValueError: transformers has no model of this configuration alone.
    """
    if config.model_type in _CLASSES:
        return getattr(transformers, _CLASSES[config.model_type])._from_config(config)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"no vision model can be built from a {type(config).__name__}; {_SERVED}")
    return AutoModel.from_config(config)


def check_tower(tower: PreTrainedModel) -> None:
    """Raise ValueError where the vision model needs more than the pixels, as those of flexible resolution do."""
    parameters = inspect.signature(type(tower).forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if "pixel_values" not in names and all(p.kind is not p.VAR_POSITIONAL for p in parameters):
        raise ValueError(f"vision_model is a {type(tower).__name__}, which takes no pixel_values; {_SERVED}")
    plain = [p for p in parameters if p.name in names and p.name not in ("self", "pixel_values")]
    if needed := [p.name for p in plain if p.default is p.empty or p.name in _SIZES]:
        raise ValueError(
            f"vision_model is a {type(tower).__name__}, which takes {', '.join(needed)} beside the pixels, as models for "
            f"images of any size do; {_SERVED}"
        )
