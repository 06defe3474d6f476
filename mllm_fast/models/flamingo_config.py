"""Configuration of a whole Flamingo (Alayrac et al. 2022, arXiv 2204.14198): language model, vision model and bridge."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .flamingo_options import FlamingoConfig


class FlamingoModelConfig(PreTrainedConfig):
    """A whole Flamingo.

    Args:
        vision_config: of any vision model of transformers that reads images of one size into `last_hidden_state`
            [N, tokens, hidden_size] (not those for images of any size, as Siglip2 and Pixtral), a configuration or its
            dict, which is CLIP's unless its `model_type` says otherwise; None: CLIP ViT-L/14.
        text_config: of any decoder-only language model of transformers, likewise; Llama's by default.
        image_token_id: the token that stands for an image in the text. It is in the language model's vocabulary.
        every, latents, resampler_depth, resampler_heads, resampler_head_dim, resampler_ffn_dim, heads, head_dim, ffn_dim,
            activation, gate, train_vision, max_frames, max_images, previous_images: as in `FlamingoConfig`.
        vision_tokens: "patches" leaves out what comes before the patches (class token, registers), as OpenFlamingo and Otter
            do; "all" reads them too, as idefics does.
        vision_layer: which of the vision model's `hidden_states` is read; -1: its `last_hidden_state`.
        p_next: in training, the share of samples whose text reads the image after it (1/2 in the paper).

    Raises:
        ValueError: an encoder-decoder language model, a vision model of unknown width, or options that do not go together.
    """

    model_type = "flamingo"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012  # read from the class

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        image_token_id: int = 32000,
        every: int = 4,
        latents: int = 64,
        resampler_depth: int = 6,
        resampler_heads: int = 8,
        resampler_head_dim: int = 64,
        resampler_ffn_dim: int | None = None,
        heads: int = 8,
        head_dim: int = 64,
        ffn_dim: int | None = None,
        activation: str = "gelu",
        gate: Literal["scalar", "vector"] = "scalar",
        train_vision: bool = False,
        max_frames: int | None = None,
        max_images: int | None = None,
        previous_images: bool = False,
        vision_tokens: Literal["patches", "all"] = "patches",
        vision_layer: int = -1,
        p_next: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config, "clip_vision_model", _CLIP_L)
        self.text_config = _sub_config(text_config, "llama", {})
        for name in ("is_encoder_decoder", "tie_word_embeddings"):  # they follow from the language model
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.image_token_id = image_token_id
        self.every = every
        self.latents = latents
        self.resampler_depth = resampler_depth
        self.resampler_heads = resampler_heads
        self.resampler_head_dim = resampler_head_dim
        self.resampler_ffn_dim = resampler_ffn_dim
        self.heads = heads
        self.head_dim = head_dim
        self.ffn_dim = ffn_dim
        self.activation = activation
        self.gate = gate
        self.train_vision = train_vision
        self.max_frames = max_frames
        self.max_images = max_images
        self.previous_images = previous_images
        self.vision_tokens = vision_tokens
        self.vision_layer = vision_layer
        self.p_next = p_next
        self.initializer_range = initializer_range
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        self._check()

    @property
    def bridge(self) -> FlamingoConfig:
        """The shape of the resampler and the gated blocks."""
        given = {"media_token_id": self.image_token_id, "vision_dim": self.vision_config.hidden_size}
        shared = (field.name for field in fields(FlamingoConfig) if field.name not in given)
        return FlamingoConfig(**given, **{name: getattr(self, name) for name in shared})

    def _check(self) -> None:
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f"text_config is a {type(self.text_config).__name__}, of an encoder-decoder model; expected a decoder-only "
                "language model such as LlamaConfig"
            )
        if not isinstance(getattr(self.vision_config, "hidden_size", None), int):
            raise ValueError(
                f"vision_config is a {type(self.vision_config).__name__} without a hidden_size; expected that of a vision "
                "transformer such as CLIPVisionConfig (of CLIP or SigLIP: its vision_config)"
            )
        if self.vision_tokens not in ("patches", "all"):
            raise ValueError(f"vision_tokens is {self.vision_tokens!r}; choose 'patches' or 'all'")
        if not 0 <= self.p_next <= 1:
            raise ValueError(f"p_next is {self.p_next}; expected a probability")
        if self.p_next and self.previous_images:
            raise ValueError("p_next asks for the next image, previous_images for all before; choose one of them")


_CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip


def _sub_config(given: dict[str, Any] | PreTrainedConfig | None, model_type: str, default: dict[str, Any]) -> Any:
    if isinstance(given, PreTrainedConfig):
        return given
    options = dict(default if given is None else given)
    return CONFIG_MAPPING[options.pop("model_type", model_type)](**options)
