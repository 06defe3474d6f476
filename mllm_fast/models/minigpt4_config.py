"""Configuration of MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592), with and without a Q-Former."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, Blip2QFormerConfig, Blip2VisionConfig, PreTrainedConfig


class MiniGPT4Config(PreTrainedConfig):
    """A whole MiniGPT-4.

    Args:
        vision_config: EVA ViT-g as BLIP-2 has it, a configuration or its dict; None: that of the released model.
        qformer_config: BLIP-2's Q-Former without text, likewise. Unused without a Q-Former.
        text_config: of any decoder-only language model of transformers, a configuration or its dict, which is a Llama's
            unless its `model_type` says otherwise; None: LLaMA-7B.
        has_qformer: False: the variant over LLaMA-2, whose projection reads `merged_patches` patches at a time.
        num_query_tokens: rows of the language model that an image becomes with a Q-Former.
        merged_patches: neighbours in reading order whose features are concatenated to one row without a Q-Former.
        image_token_id: what `input_ids` hold in the places of an image. The default is outside any vocabulary: the original
            has no such token, and cuts prompts where images stand.
        vision_norm_eps: of the norm after the vision model (`ln_vision`); its other norms have `vision_config`'s.
        freeze_vision, freeze_qformer: as in the original these parts are not trained, nor do they drop anything out while
            the rest is (`MiniGPT4ForConditionalGeneration.train`).

    Raises:
        ValueError: an encoder-decoder language model, or patches that do not divide into rows.
    """

    model_type = "minigpt4"
    sub_configs = {  # noqa: RUF012  # transformers reads it from the class
        "vision_config": Blip2VisionConfig,
        "qformer_config": Blip2QFormerConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        qformer_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        has_qformer: bool = True,
        num_query_tokens: int = 32,
        merged_patches: int = 4,
        image_token_id: int = -1,
        vision_norm_eps: float = 1e-5,
        freeze_vision: bool = True,
        freeze_qformer: bool = True,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(Blip2VisionConfig, vision_config)
        self.qformer_config = _sub_config(Blip2QFormerConfig, qformer_config)
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        if not isinstance(text_config, PreTrainedConfig):
            text = {} if text_config is None else dict(text_config)
            text_config = CONFIG_MAPPING[text.pop("model_type", "llama")](**text)
        self.text_config = text_config
        for name in ("is_encoder_decoder", "tie_word_embeddings"):  # they follow from the language model
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.has_qformer = has_qformer
        self.num_query_tokens = num_query_tokens
        self.merged_patches = merged_patches
        self.image_token_id = image_token_id
        self.vision_norm_eps = vision_norm_eps
        self.freeze_vision = freeze_vision
        self.freeze_qformer = freeze_qformer
        self.initializer_range = initializer_range
        self.tie_word_embeddings = getattr(text_config, "tie_word_embeddings", False)
        self._check()

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return int(self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def rows_per_image(self) -> int:
        """Rows of the language model that one image fills."""
        return int(self.num_query_tokens if self.has_qformer else self.patches // self.merged_patches)

    @property
    def projected_size(self) -> int:
        """Width of what the projection reads."""
        if self.has_qformer:
            return int(self.qformer_config.hidden_size)
        return int(self.merged_patches * self.vision_config.hidden_size)

    def _check(self) -> None:
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f"text_config is a {type(self.text_config).__name__}, of an encoder-decoder model; expected a decoder-only "
                "language model such as LlamaConfig"
            )
        if not self.has_qformer and (self.merged_patches < 1 or self.patches % self.merged_patches):
            raise ValueError(
                f"an image of {self.vision_config.image_size} pixels has {self.patches} patches, which do not divide into "
                f"rows of {self.merged_patches}; choose another image_size or merged_patches"
            )


def _sub_config(cls: type[PreTrainedConfig], given: dict[str, Any] | PreTrainedConfig | None) -> Any:
    return given if isinstance(given, PreTrainedConfig) else cls(**(given or {}))
