"""Configurations of mPLUG-Owl, in the layout of the original `config.json` (arXiv 2304.14178, section 3)."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


class MplugOwlVisionConfig(PreTrainedConfig):
    """The vision model: CLIP's ViT-L/14 with all its tokens read, by default."""

    model_type = "mplug_owl_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 14,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range


class MplugOwlVisualAbstractorConfig(PreTrainedConfig):
    """The visual abstractor.

    Args:
        intermediate_size: width of the feed-forward networks. The released weights have 2816, whatever their
            `config.json` says: `MplugOwlForConditionalGeneration.from_original` reads it from the weights.
        layer_norm_eps: of the norm inside the feed-forward networks; all other norms of the layers have 1e-5.
        encoder_hidden_size: width of the vision model, which is the abstractor's own.
    """

    model_type = "mplug_owl_visual_abstract"
    base_config_key = "visual_abstractor_config"

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 16,
        intermediate_size: int = 2816,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-6,
        encoder_hidden_size: int = 1024,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.encoder_hidden_size = encoder_hidden_size
        self.initializer_range = initializer_range


class MplugOwlConfig(PreTrainedConfig):
    """A whole mPLUG-Owl.

    Args:
        vision_config, visual_abstractor_config: a configuration or its dict; None: that of the released model.
        text_config: of any decoder-only language model of transformers, a configuration or its dict, which is a Llama's
            unless its `model_type` says otherwise; None: LLaMA-7B.
        num_query_tokens: learned queries of the abstractor. An image becomes one row more, for the learned end row.
        image_token_id: what `input_ids` hold in the places of an image. The original has -1, outside any vocabulary.

    Raises:
        ValueError: an encoder-decoder language model, or a vision model as wide as no abstractor can read it.
    """

    model_type = "mplug-owl"
    sub_configs = {  # noqa: RUF012  # transformers reads it from the class
        "vision_config": MplugOwlVisionConfig,
        "visual_abstractor_config": MplugOwlVisualAbstractorConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        visual_abstractor_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        num_query_tokens: int = 64,
        image_token_id: int = -1,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(MplugOwlVisionConfig, vision_config)
        self.visual_abstractor_config = _sub_config(MplugOwlVisualAbstractorConfig, visual_abstractor_config)
        if not isinstance(text_config, PreTrainedConfig):
            text = {} if text_config is None else dict(text_config)
            text_config = CONFIG_MAPPING[text.pop("model_type", "llama")](**text)
        self.text_config = text_config
        # Derived by the original, and stored: what it says follows from the parts.
        for name in ("is_encoder_decoder", "tie_word_embeddings", "use_decoder_only_language_model"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.num_query_tokens = num_query_tokens
        self.image_token_id = image_token_id
        self.initializer_range = initializer_range
        self.tie_word_embeddings = getattr(text_config, "tie_word_embeddings", False)
        self._check()

    @property
    def rows_per_image(self) -> int:
        """Rows of the language model that one image fills: its queries and the end row."""
        return self.num_query_tokens + 1

    def _check(self) -> None:
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f"text_config is a {type(self.text_config).__name__}, of an encoder-decoder model; expected a decoder-only "
                "language model such as LlamaConfig"
            )
        vision, abstractor = self.vision_config.hidden_size, self.visual_abstractor_config
        if not vision == abstractor.hidden_size == abstractor.encoder_hidden_size:
            raise ValueError(
                f"vision_config.hidden_size is {vision}, visual_abstractor_config has hidden_size {abstractor.hidden_size} "
                f"and encoder_hidden_size {abstractor.encoder_hidden_size}; the abstractor's keys are its queries and the "
                "image together, so all three must be equal"
            )


def _sub_config(cls: type[PreTrainedConfig], given: dict[str, Any] | PreTrainedConfig | None) -> Any:
    return given if isinstance(given, PreTrainedConfig) else cls(**(given or {}))
