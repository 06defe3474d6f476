"""The shape of a Flamingo bridge."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FlamingoConfig:
    """The shape of the bridge: what a checkpoint must agree on with the model it is loaded into.

    Args:
        media_token_id: the token that stands for an image in the text.
        vision_dim: width D of the vision encoder's patches, and of the media tokens.
        every: a gated block stands before decoder layers `every - 1`, `2 * every - 1`, ... (counted from 0).
        latents: media tokens an image becomes.
        resampler_depth, resampler_heads, resampler_head_dim, resampler_ffn_dim: the resampler (FFN default: 4 * vision_dim).
        heads, head_dim, ffn_dim: the gated blocks (FFN default: 4 * the language model's width).
        activation: of both FFNs.
        gate: "scalar", or "vector" for one gate a channel.
        train_vision: the vision encoder is part of the bridge: trained, and saved with it. Otherwise it is frozen.
        max_frames: learn an embedding for each of up to so many frames of a video; None: frames have no order.
        max_images: learn an embedding for each of up to so many images of a sample.
        previous_images: a token sees all images before it; otherwise the last one.
    """

    media_token_id: int
    vision_dim: int
    every: int = 1
    latents: int = 64
    resampler_depth: int = 6
    resampler_heads: int = 8
    resampler_head_dim: int = 64
    resampler_ffn_dim: int | None = None
    heads: int = 8
    head_dim: int = 64
    ffn_dim: int | None = None
    activation: str = "gelu"
    gate: str = "scalar"
    train_vision: bool = False
    max_frames: int | None = None
    max_images: int | None = None
    previous_images: bool = False


# Options that saved bridges from before them lack, and what these mean.
LATER = {"max_frames": None, "max_images": None, "previous_images": False}
