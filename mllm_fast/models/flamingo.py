"""Flamingo over any Hugging Face decoder-only language model, which stays frozen and keeps its own class.

Alayrac et al. 2022 (arXiv:2204.14198): a vision encoder and a Perceiver resampler turn every image into a fixed number of
media tokens, and gated cross-attention blocks between the layers of a frozen language model let each text token read the
last image before it. The blocks run as forward pre-hooks of the decoder layers, so nothing in the language model is
replaced: called by itself, it is the text model it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import GatedCrossAttentionBlock, PerceiverResampler
from ..modules.media_context import MediaContext
from .bridge_file import read_bridge_config, read_bridge_weights, write_bridge
from .conditioning import (
    Channel,
    Conditioning,
    DecoderHook,
    LayerHook,
    base_model,
    conditioned,
    decoder,
    recompute_contexts,
    text_width,
)


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


class Flamingo(nn.Module):
    """A frozen language model that reads images through trained gated cross-attention.

    Args:
        lm: a Hugging Face decoder-only language model (Llama, Mistral, Qwen, OPT, GPT-2, GPT-J, GPT-NeoX, MPT, ...). It is
            frozen, and hooks are put on it; its class, parameters and state dict stay as they are.
        vision_encoder: maps images [N, C, H, W] to patches [N, patches, vision_dim] (a tensor, or a Hugging Face output
            with `last_hidden_state`).
        config: see `FlamingoConfig`.

    Shapes: B samples, I images a sample (padded; see `image_mask`), n = config.latents, D = config.vision_dim, S text tokens.

    Raises:
        ValueError: the decoder layers were not found, or `every` leaves no place for a block.
    """

    def __init__(self, lm: nn.Module, vision_encoder: nn.Module, config: FlamingoConfig) -> None:
        super().__init__()
        self.config = config
        holder, layers = decoder(lm)
        places = range(config.every - 1, len(layers), config.every) if config.every > 0 else range(0)
        if not places:
            raise ValueError(
                f"every={config.every} leaves no gated block; choose 1 to {len(layers)} (the decoder layers)"
            )
        self.lm = lm.requires_grad_(False)
        self.vision_encoder = vision_encoder.requires_grad_(config.train_vision)
        self.resampler = PerceiverResampler(
            config.vision_dim,
            depth=config.resampler_depth,
            heads=config.resampler_heads,
            head_dim=config.resampler_head_dim,
            latents=config.latents,
            ffn_dim=config.resampler_ffn_dim,
            activation=config.activation,
        )
        self.blocks = nn.ModuleList(
            GatedCrossAttentionBlock(
                text_width(lm),
                config.vision_dim,
                heads=config.heads,
                head_dim=config.head_dim,
                ffn_dim=config.ffn_dim,
                activation=config.activation,
                gate=config.gate,
            )
            for _ in places
        )
        self._media_context = MediaContext()
        for block in self.blocks:
            block.share(self._media_context)
        self._takes_positions = "position_ids" in inspect.signature(base_model(lm).forward).parameters
        self._channel = Channel()
        self._layer_hooks = [LayerHook(self._channel, block) for block in self.blocks]
        self._handles = [holder.register_forward_pre_hook(DecoderHook(self._channel), with_kwargs=True)]
        self._handles += [
            layers[place].register_forward_pre_hook(hook, with_kwargs=True)
            for place, hook in zip(places, self._layer_hooks, strict=True)
        ]

    def detach_language_model(self) -> nn.Module:
        """Take the hooks off the language model, for good, and return it."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.lm

    def gradient_checkpointing_enable(self) -> None:
        """Recompute gated blocks and decoder layers in backward instead of keeping their activations."""
        for hook in self._layer_hooks:
            hook.checkpoint = True
        arguments = {"use_reentrant": False, "context_fn": recompute_contexts}
        enable = getattr(self.lm, "activation_checkpointing_enable", None) or self.lm.gradient_checkpointing_enable
        enable(arguments)

    def encode_images(self, images: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Images to media tokens: vision encoder, then resampler, over the real images only.

        Args:
            images: [B, I, C, H, W].
            image_mask: [B, I] bool, True for a real image; padding is neither encoded nor visible. Default: all real.

        Returns:
            [B, I, n, D]; zeros where there is no image.
        """
        if images.ndim != 5:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected [samples, images, channels, height, width]"
            )
        samples, count = images.shape[:2]
        if image_mask is None:
            return self._encode(images.flatten(0, 1)).unflatten(0, (samples, count))
        if image_mask.shape != (samples, count):
            raise ValueError(
                f"image_mask has shape {tuple(image_mask.shape)}; expected {(samples, count)}, as images has"
            )
        if not bool(image_mask.any()):
            return self.resampler.latents.new_zeros(samples, count, self.config.latents, self.config.vision_dim)
        encoded = self._encode(images[image_mask.bool()])
        media = encoded.new_zeros(samples, count, *encoded.shape[1:])
        return media.masked_scatter(image_mask.bool()[:, :, None, None], encoded)

    def _encode(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_vision):
            patches = self.vision_encoder(images)
        patches = getattr(patches, "last_hidden_state", patches)
        if patches.ndim != 3 or patches.shape[-1] != self.config.vision_dim:
            raise ValueError(
                f"the vision encoder returned shape {tuple(patches.shape)}; "
                f"expected [images, patches, vision_dim={self.config.vision_dim}]"
            )
        return self.resampler(patches)

    def image_index(self, input_ids: Tensor, images: int, image_mask: Tensor | None = None) -> Tensor:
        """Which image each token sees: the last one whose media token is not after it (phi of the paper).

        Returns:
            [B, S] int64; -1 before the first media token.

        Raises:
            ValueError: a sample has more media tokens than images.
        """
        ordinal = (input_ids == self.config.media_token_id).cumsum(dim=1)
        needed = ordinal[:, -1]
        real = needed.new_full(needed.shape, images) if image_mask is None else image_mask.sum(dim=1).expand_as(needed)
        if bool((needed > real).any()):
            row = int((needed > real).nonzero()[0])
            raise ValueError(
                f"sample {row} has {int(needed[row])} media tokens (id {self.config.media_token_id}) "
                f"but {int(real[row])} images; pass one image for each media token"
            )
        if image_mask is None or images == 0:
            return ordinal - 1
        # The k-th media token means the k-th real image, wherever padding stands between them.
        slots = (~image_mask.bool()).int().argsort(dim=1, stable=True).expand(input_ids.shape[0], -1)
        return torch.where(ordinal > 0, slots.gather(1, (ordinal - 1).clamp(min=0)), -1)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        *,
        media: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **lm_kwargs: Any,
    ) -> Any:
        """One pass of the language model over text with images.

        Args:
            input_ids: [B, S] int64.
            images: [B, I, C, H, W], or `media` in their place: [B, I, n, D] as `encode_images` gives it. A batch of 1 serves
                every row. Neither: text alone.
            image_mask: [B, I] bool, True for a real image; samples may have different numbers of images.
            image_index: [B, S] int64, the image each token sees (-1: none), in place of the rule "last image before it".
            attention_mask: [B, S] (with the length of the cache added, where there is one); padding may be on either side.
            labels: [B, S], -100 where no loss is wanted; the language model shifts them.
            **lm_kwargs: passed on to the language model.

        Returns:
            the language model's output (`loss`, `logits`, ...).

        Raises:
            ValueError: more media tokens than images, or a filled cache without `image_index`.
        """
        past = lm_kwargs.get("past_key_values")
        offset = 0 if past is None else int(past.get_seq_length())
        if offset and image_index is None:
            raise ValueError(
                f"the cache holds {offset} tokens whose images are unknown here; pass image_index for the new tokens, "
                "or use generate()"
            )
        conditioning = self._conditioning(input_ids, images, media, image_mask, image_index, offset)
        padded = attention_mask is not None and attention_mask.ndim == 2
        if padded and self._takes_positions and "position_ids" not in lm_kwargs:
            # As generate() counts them, so that left padding changes nothing.
            positions = attention_mask.long().cumsum(dim=1).sub(1).clamp(min=0)
            lm_kwargs["position_ids"] = positions[:, -input_ids.shape[1] :]
        if labels is not None:
            lm_kwargs["labels"] = labels
        with conditioned(conditioning), self._forgetting(media):
            return self.lm(input_ids=input_ids, attention_mask=attention_mask, **lm_kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        *,
        media: Tensor | None = None,
        image_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Continue prompts with the language model's own `generate`: greedy, sampling, beams, several sequences each.

        The images are encoded once, and the media tensor is the same object at every step, so each block projects its keys
        and values once, with one copy a sample however many beams. Generated tokens read the prompt's last image. Pad
        prompts on the left.

        Args:
            input_ids, images, media, image_mask, attention_mask: as in `forward`.
            **generate_kwargs: passed on (`max_new_tokens`, `num_beams`, ...).

        Returns:
            what the language model's `generate` returns: prompt and continuation, [B * sequences, S + new].
        """
        conditioning = self._conditioning(input_ids, images, media, image_mask, None, 0)
        if attention_mask is not None:
            generate_kwargs["attention_mask"] = attention_mask
        with conditioned(conditioning), self._forgetting(media):
            return self.lm.generate(input_ids=input_ids, **generate_kwargs)

    @contextlib.contextmanager
    def _forgetting(self, media: Tensor | None) -> Iterator[None]:
        """Drop the keys and values made inside, unless the caller holds their media and may come back with it."""
        try:
            yield
        finally:
            if media is None:
                self._media_context.clear()

    def _conditioning(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        media: Tensor | None,
        image_mask: Tensor | None,
        index: Tensor | None,
        offset: int,
    ) -> Conditioning:
        if images is not None and media is not None:
            raise ValueError("both images and media were given; pass one of them (media is what encode_images returns)")
        if images is not None:
            media = self.encode_images(images, image_mask)
        count = 0 if media is None else media.shape[1]
        if media is not None and (
            media.ndim != 4 or media.shape[-1] != self.config.vision_dim or input_ids.shape[0] % media.shape[0]
        ):
            raise ValueError(
                f"media has shape {tuple(media.shape)}; expected [samples, images, tokens, {self.config.vision_dim}] "
                f"with {input_ids.shape[0]} samples (or 1 for all), as input_ids has"
            )
        if index is None:
            index = self.image_index(input_ids, count, image_mask)
        elif index.shape != input_ids.shape or bool((index >= count).any()):
            raise ValueError(
                f"image_index has shape {tuple(index.shape)} and largest entry {int(index.max())}; "
                f"expected shape {tuple(input_ids.shape)} and entries -1 to {count - 1}"
            )
        if media is None or count == 0:
            # One image that no token sees: text alone takes the same path as text before its first image.
            media = self.resampler.latents.new_zeros(1, 1, self.config.latents, self.config.vision_dim)
        return Conditioning(self._channel, media, index, offset)

    def bridge_state_dict(self) -> dict[str, Tensor]:
        """Only what is trained: resampler, gated blocks, and the vision encoder where it is part of the bridge."""
        parts = ("resampler.", "blocks.") + (("vision_encoder.",) if self.config.train_vision else ())
        return {name: value for name, value in self.state_dict().items() if name.startswith(parts)}

    def save_bridge(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write `bridge.safetensors` and `bridge.json` into the folder `path`, each atomically.

        Raises:
            FileExistsError: the folder already holds a bridge, and `overwrite` is False.
        """
        return write_bridge(Path(path), self.bridge_state_dict(), dataclasses.asdict(self.config), overwrite=overwrite)

    def load_bridge(self, path: str | Path) -> None:
        """Load what `save_bridge` wrote into this model, strictly: either everything fits, or nothing is changed.

        Raises:
            FileNotFoundError: there is no bridge at `path`.
            BridgeMismatchError: another configuration, or missing, unexpected or misshapen tensors; all are listed.
        """
        own = self.bridge_state_dict()
        weights = read_bridge_weights(Path(path), own, dataclasses.asdict(self.config))
        self.load_state_dict(weights, strict=False)

    @classmethod
    def from_bridge(cls, path: str | Path, lm: nn.Module, vision_encoder: nn.Module) -> Flamingo:
        """Build the model that the bridge at `path` was saved from, over `lm` and `vision_encoder`, and load it."""
        model = cls(lm, vision_encoder, FlamingoConfig(**read_bridge_config(Path(path))))
        model.load_bridge(path)
        return model
