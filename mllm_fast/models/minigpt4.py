"""MiniGPT-4: a frozen vision model and Q-Former, a projection that is trained, and a frozen language model.

Zhu et al. 2023 (arXiv 2304.10592). An image becomes 32 rows of the language model: BLIP-2's queries that read it, projected
to its width. In the variant over LLaMA-2 (and in MiniGPT-v2) there is no Q-Former, and each row is the projection of four
neighbouring patches. The rows stand where `input_ids` hold the image token (the processor writes them).

The parts are transformers' own (`Blip2VisionModel`, `Blip2QFormerModel`, any decoder-only language model), so `fuse` serves
them; `minigpt4_checkpoint` reads and writes the original's files.

What differs from the original: placeholders without an image are an error in training too (there it leaves them out), and
prompts are not cut at 2000 or 3800 rows, where it would cut through images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2QFormerModel,
    Blip2VisionModel,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .image_rows import ImageRows
from .minigpt4_checkpoint import from_original, load_original, save_original
from .minigpt4_config import MiniGPT4Config
from .minigpt4_processing import MiniGPT4Processor

__all__ = [
    "MiniGPT4Config",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4Processor",
    "MiniGPT4Projection",
    "load_original",
    "save_original",
]


class MiniGPT4Projection(nn.Module):
    """Image features to rows of the language model: one linear layer, of each query or of neighbouring patches together.

    Args:
        config: of the whole model.
        width: of the language model's embeddings.
    """

    def __init__(self, config: MiniGPT4Config, width: int) -> None:
        super().__init__()
        self.merged_patches = 0 if config.has_qformer else config.merged_patches
        self.linear = nn.Linear(config.projected_size, width)

    def rows(self, features: Tensor) -> Tensor:
        """What becomes a row each: queries [N, R, D] as they are, or patches [N, 1 + R * m, D] as [N, R, m * D].

        The first of the patches is the class token, which is left out.
        """
        if not self.merged_patches:
            return features
        return features[:, 1:].unflatten(1, (-1, self.merged_patches)).flatten(2)

    def forward(self, features: Tensor) -> Tensor:
        """Queries [N, R, D], or class token and patches [N, 1 + R * m, D], to [N, R, D_language]."""
        return self.linear(self.rows(features))


class MiniGPT4ForConditionalGeneration(ImageRows, PreTrainedModel, GenerationMixin):
    """The whole model.

    Args:
        config: `text_config` may be that of any decoder-only language model of transformers.

    Shapes: as in `ImageRows`; images are [N, 3, image_size, image_size].
    """

    config_class = MiniGPT4Config
    base_model_prefix = "minigpt4"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False  # because BLIP-2's Q-Former does not
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The parts add their own layers; a projection is small.
    _no_split_modules = ["MiniGPT4Projection"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Only where the rest is fp16, as in the original, whose Q-Former has fp32 weights.
    _keep_in_fp32_modules = ["query_tokens", "qformer"]  # noqa: RUF012

    def __init__(self, config: MiniGPT4Config) -> None:
        super().__init__(config)
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.vision_model.post_layernorm.eps = config.vision_norm_eps
        if config.has_qformer:
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
            self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        width = self.language_model.get_input_embeddings().embedding_dim
        self.language_projection = MiniGPT4Projection(config, width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MiniGPT4ForConditionalGeneration) and module.config.has_qformer:
            init.normal_(module.query_tokens, std=module.config.qformer_config.initializer_range)

    def train(self, mode: bool = True) -> MiniGPT4ForConditionalGeneration:
        """As every module's, but a frozen vision model and Q-Former stay in evaluation, without dropout."""
        super().train(mode)
        if self.config.freeze_vision:
            self.vision_model.eval()
        if self.config.freeze_qformer and self.config.has_qformer:
            self.qformer.eval()
        return self

    def freeze(self) -> MiniGPT4ForConditionalGeneration:
        """Leave to training what the original trains: the projection, and what the config does not freeze."""
        self.requires_grad_(False)
        self.language_projection.requires_grad_(True)
        self.vision_model.requires_grad_(not self.config.freeze_vision)
        if self.config.has_qformer:
            self.qformer.requires_grad_(not self.config.freeze_qformer)
            self.query_tokens.requires_grad_(not self.config.freeze_qformer)
        return self

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Images [N, 3, H, W], through the vision model, the Q-Former where there is one, and the projection.

        Returns:
            the vision model's output, and as its `pooler_output` the rows of the language model [N, R, D].

        Raises:
            ValueError: images of another size than the positions are made for.
        """
        size = self.config.vision_config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected [images, 3, {size}, {size}], the size that "
                "the vision model's positions are made for"
            )
        vision = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        features = vision.last_hidden_state
        if self.config.has_qformer:
            # One row in memory however many images: a fused Q-Former does once what is the same for all.
            queries = self.query_tokens.to(features.device).expand(features.shape[0], -1, -1)
            out = self.qformer(query_embeds=queries, encoder_hidden_states=features, return_dict=True)
            features = out.last_hidden_state.to(features.dtype)
        vision.pooler_output = self.language_projection(features)
        return vision

    @classmethod
    def from_original(
        cls,
        *,
        vision: str | Path,
        language_model: str | Path | PreTrainedModel,
        projection: str | Path,
        qformer: str | Path | None = None,
        **kwargs: Any,
    ) -> MiniGPT4ForConditionalGeneration:
        """The model in the original's files: see `minigpt4_checkpoint.from_original`, which has more arguments."""
        return from_original(
            cls, vision=vision, language_model=language_model, projection=projection, qformer=qformer, **kwargs
        )


AutoConfig.register(MiniGPT4Config.model_type, MiniGPT4Config, exist_ok=True)
AutoModel.register(MiniGPT4Config, MiniGPT4ForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(MiniGPT4Config, MiniGPT4ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MiniGPT4Config, MiniGPT4Processor, exist_ok=True)
