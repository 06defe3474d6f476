"""Flamingo as a model of transformers: saved and loaded whole, over any of its decoder-only language and vision models.

`mllm_fast.models.Flamingo` does the work, over modules that somebody built; here they come from a configuration, or from
pretrained parts (`from_parts`), or from the files of OpenFlamingo and Otter (`from_original`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modules import GatedCrossAttentionBlock, PerceiverResampler
from .conditioning import base_model, recompute_contexts
from .flamingo import Flamingo
from .flamingo_checkpoint import load_original, options_of, read_original, save_original
from .flamingo_config import FlamingoModelConfig
from .flamingo_processing import FlamingoProcessor
from .flamingo_towers import build_tower, check_tower

__all__ = [
    "FlamingoForConditionalGeneration",
    "FlamingoModelConfig",
    "FlamingoProcessor",
    "FlamingoVision",
    "load_original",
    "save_original",
]


class FlamingoVision(nn.Module):
    """A vision model of transformers, and which of its features are read.

    Args:
        tower: returns `last_hidden_state` [N, tokens, D] (and `hidden_states`, for another layer than the last).
        config: `vision_tokens` and `vision_layer` of it.
    """

    def __init__(self, tower: PreTrainedModel, config: FlamingoModelConfig) -> None:
        super().__init__()
        self.tower = tower
        self.patches_only, self.layer = config.vision_tokens == "patches", config.vision_layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images [N, C, H, W] to [N, patches, D], or, with all tokens, [N, prefix + patches, D]."""
        pixel_values = pixel_values.to(self.tower.dtype)
        if self.layer == -1:
            features: Tensor = self.tower(pixel_values=pixel_values, return_dict=True).last_hidden_state
        else:
            out = self.tower(pixel_values=pixel_values, return_dict=True, output_hidden_states=True)
            features = out.hidden_states[self.layer]
        size = getattr(self.tower.config, "patch_size", None)
        if not self.patches_only or size is None:
            return features
        height, width = (size, size) if isinstance(size, int) else size
        patches = (pixel_values.shape[-2] // height) * (pixel_values.shape[-1] // width)
        return features[:, features.shape[1] - patches :]


class FlamingoForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model: `model.lm`, `model.vision_encoder.tower`, `model.resampler`, `model.blocks`.

    The language model is frozen, and so is the vision model unless `config.train_vision`; `requires_grad_` changes that.

    Args:
        config: see `FlamingoModelConfig`.
        language_model, vision_model: pretrained parts to build over, in place of new ones; see `from_parts`.

    Raises:
        ValueError: a vision model that does not read images of one size into patches, or that transformers cannot build.

    Shapes: B samples, I images or videos a sample (padded; see `image_mask`), F frames, S tokens, n = config.latents, D the
    vision model's width.
    """

    config_class = FlamingoModelConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The language and vision models add their own layers.
    _no_split_modules = ["GatedCrossAttentionBlock", "PerceiverResampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        config: FlamingoModelConfig,
        language_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        for part in (language_model, vision_model):
            for module in () if part is None else part.modules():
                module._is_hf_initialized = True  # what post_init leaves as it is
        lm = AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        tower = build_tower(config.vision_config) if vision_model is None else vision_model
        check_tower(tower)
        self.model = Flamingo(lm, FlamingoVision(tower, config), config.bridge)
        _pass_on(self.model.vision_encoder)
        _pass_on(self.model)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As every model's; what is frozen in a new model is frozen in a loaded one."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def freeze(self) -> FlamingoForConditionalGeneration:
        """Leave to training the resampler, the gated blocks, and the vision model where `config.train_vision` says so."""
        self.requires_grad_(False)
        for part in (self.model.resampler, self.model.blocks):
            part.requires_grad_(True)
        self.model.vision_encoder.requires_grad_(self.config.train_vision)
        return self

    @classmethod
    def from_parts(
        cls, language_model: PreTrainedModel, vision_model: PreTrainedModel, **options: Any
    ) -> FlamingoForConditionalGeneration:
        """A new bridge between pretrained models, in their device and dtype; it begins as the language model alone.

        Args:
            language_model: it must know the image token: resize its embeddings to the tokenizer first.
            vision_model: the vision model alone (`CLIPVisionModel`, `SiglipVisionModel`, `ViTModel`, ...).
            **options: of `FlamingoModelConfig`, `image_token_id` among them.
        """
        text, vision = language_model.config, vision_model.config
        kept = text._attn_implementation, vision._attn_implementation
        model = cls(FlamingoModelConfig(vision, text, **options), language_model, vision_model)
        text._attn_implementation, vision._attn_implementation = kept
        model.generation_config = language_model.generation_config
        near = language_model.get_input_embeddings().weight
        for part in (model.model.resampler, model.model.blocks):
            part.to(near.device, language_model.dtype)
        return model

    @classmethod
    def from_original(
        cls,
        path: str | Path,
        language_model: PreTrainedModel,
        vision_model: PreTrainedModel,
        **options: Any,
    ) -> FlamingoForConditionalGeneration:
        """A model with the bridge of OpenFlamingo's or Otter's checkpoint; what its shapes say is read from it.

        Where the file holds the embeddings of more tokens, the language model's are resized.

        Args:
            path: a file or folder; see `flamingo_checkpoint.load_original`.
            language_model, vision_model: as in `from_parts`, and those that the checkpoint was trained with.
            **options: of `FlamingoModelConfig`; `image_token_id` is needed. Default 8 heads, as all released models have.

        Raises:
            CheckpointMismatchError: tensors are missing, unexpected or of another shape; all are listed.
        """
        shapes, rows = options_of(read_original(path, meta=True), language_model, options.get("heads", 8))
        if rows is not None and rows != language_model.get_input_embeddings().weight.shape[0]:
            language_model.resize_token_embeddings(rows)
        model = cls.from_parts(language_model, vision_model, **{**shapes, **options})
        load_original(model, path)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            for own in (module.latents, module.frame_embeddings, module.image_embeddings):
                if own is not None:
                    init.normal_(own, std=self.config.initializer_range)
        elif isinstance(module, GatedCrossAttentionBlock):
            init.zeros_(module.attn_gate)
            init.zeros_(module.ffn_gate)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.model.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's."""
        self.model.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.model.lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.model.lm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> Any:
        """The language model without its head, which sees no images when it is called by itself."""
        return base_model(self.model.lm).get_decoder()

    def train(self, mode: bool = True) -> FlamingoForConditionalGeneration:
        """As every module's, but a frozen vision model stays in evaluation, without dropout."""
        super().train(mode)
        if not self.config.train_vision:
            self.model.vision_encoder.eval()
        return self

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        # Whatever is asked for: recomputed layers have to see the images that they saw in forward.
        run = functools.partial(checkpoint, use_reentrant=False, context_fn=recompute_contexts)
        if args:
            args = (run, *args[1:])
        else:
            kwargs["gradient_checkpointing_func"] = run
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for hook in self.model._layer_hooks:
            hook.checkpoint = enable

    def get_image_features(
        self, pixel_values: Tensor, image_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Images or videos, through the vision model and the resampler.

        Args:
            pixel_values, image_mask: as in `forward`.

        Returns:
            an output whose `pooler_output` are the media tokens [B, I, n, D].
        """
        return BaseModelOutputWithPooling(pooler_output=self.model.encode_images(pixel_values, _flags(image_mask)))

    def supervised_labels(self, labels: Tensor, input_ids: Tensor) -> Tensor:
        """The labels [B, S] that count: image tokens are never predicted."""
        return labels.masked_fill((input_ids == self.config.image_token_id).to(labels.device), -100)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass of the language model over text with images.

        In training, with `config.p_next`, text reads the next image in so large a share of the samples, which are drawn
        with torch's default generator.

        Args:
            input_ids: [B, S]; an image token stands for an image or a video.
            pixel_values: [B, I, C, H, W] or [B, I, F, C, H, W]; None: text alone.
            attention_mask: [B, S] (with the length of the cache added, where there is one); padding on either side.
            image_mask: [B, I] or [B, I, F], not 0 for a real image or frame.
            image_index: [B, S] int64, the image each token sees (-1: none), in place of the last one before it; or
                [B, S, I] bool, any set of images. With a filled cache it is needed.
            image_features: [B, I, n, D] in place of pixel_values, what `get_image_features` gave as `pooler_output`.
            labels: [B, S], -100 where no loss is wanted; never on image tokens. The language model shifts them.
            **kwargs: passed on to the language model.

        Returns:
            the language model's output (`loss`, `logits`, ...).

        Raises:
            ValueError: images that do not match the image tokens.
        """
        images = pixel_values if image_features is None else image_features
        mask = _flags(image_mask)
        if self.training and self.config.p_next and image_index is None and images is not None:
            chosen = torch.rand(input_ids.shape[0]) < self.config.p_next
            image_index = self.model.image_index(input_ids, images.shape[1], mask, next_image=chosen)
        if labels is not None:
            labels = self.supervised_labels(labels, input_ids)
        return self.model(
            input_ids,
            pixel_values,
            media=image_features,
            image_mask=mask,
            image_index=image_index,
            attention_mask=attention_mask,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts: greedy, sampling, beams, several sequences each. Images are encoded once, before the beams.

        Generated tokens read what the last token of their prompt reads. Pad prompts on the left.

        Args:
            input_ids, pixel_values, attention_mask, image_mask, image_features: as in `forward`.
            **kwargs: of transformers' `generate` (`max_new_tokens`, `num_beams`, ...).

        Returns:
            what transformers' `generate` returns: prompt and continuation, [B * sequences, S + new].
        """
        base_model(self.model.lm).generation_config = self.generation_config
        return self.model.generate(
            input_ids,
            pixel_values,
            media=image_features,
            image_mask=_flags(image_mask),
            attention_mask=attention_mask,
            **kwargs,
        )


# What transformers gathers from the children of a model: names that need the child's prefix, and names that do not.
_PREFIXED = ("_keys_to_ignore_on_save",)
_GATHERED = (
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_load_missing",
)


def _pass_on(module: Any) -> None:
    """Let a plain module that holds models answer for them, as `PreTrainedModel.post_init` asks its children only."""
    children = list(module.named_children())
    module.all_tied_weights_keys = {
        f"{name}.{tied}": f"{name}.{source}"
        for name, child in children
        for tied, source in (getattr(child, "all_tied_weights_keys", None) or {}).items()
    }
    for attribute in (*_PREFIXED, *_GATHERED):
        own = {
            f"{name}.{key}" if attribute in _PREFIXED else key
            for name, child in children
            for key in getattr(child, attribute, None) or ()
        }
        setattr(module, attribute, own)


def _flags(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


AutoConfig.register(FlamingoModelConfig.model_type, FlamingoModelConfig, exist_ok=True)
AutoModel.register(FlamingoModelConfig, FlamingoForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(FlamingoModelConfig, FlamingoForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FlamingoModelConfig, FlamingoProcessor, exist_ok=True)
