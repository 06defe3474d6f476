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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import GatedCrossAttentionBlock, PerceiverResampler
from ..modules.gated_cross_attention import media_keys_values
from ..modules.media_context import MediaContext
from ..modules.state import readable_on_host
from .bridge_file import DamagedBridgeError, read_bridge_config, read_bridge_weights, write_bridge
from .conditioning import (
    Channel,
    Conditioning,
    DecoderHook,
    LayerHook,
    base_model,
    conditioned,
    decoder,
    device_of,
    recompute_contexts,
    text_width,
)
from .flamingo_index import image_index, real_images, up_to
from .flamingo_options import LATER, FlamingoConfig

__all__ = ["Flamingo", "FlamingoConfig"]


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
            max_frames=config.max_frames,
            max_images=config.max_images,
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
        self.places = tuple(places)
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

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for hook in self._layer_hooks:
            hook.checkpoint = False
        base_model(self.lm).gradient_checkpointing_disable()

    def gradient_checkpointing_enable(self) -> None:
        """Recompute gated blocks and decoder layers in backward instead of keeping their activations."""
        for hook in self._layer_hooks:
            hook.checkpoint = True
        arguments = {"use_reentrant": False, "context_fn": recompute_contexts}
        enable = getattr(self.lm, "activation_checkpointing_enable", None) or self.lm.gradient_checkpointing_enable
        enable(arguments)

    def encode_images(self, images: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Images or videos to media tokens: vision encoder, then resampler.

        Args:
            images: [B, I, C, H, W], or videos [B, I, F, C, H, W]; an image beside videos is a video of one frame.
            image_mask: [B, I] bool, True for a real image, or [B, I, F] for the real frames, which come before the padding.
                Default: all real. Padding is not visible, and where the mask is on the CPU not encoded either; a mask on a
                GPU is not waited for.

        Returns:
            [B, I, n, D]; zeros where there is no image.

        Raises:
            ValueError: shapes that do not fit, padding before frames, or more frames or images than the embeddings are for.
        """
        if images.ndim not in (5, 6):
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected [samples, images, channels, height, width], "
                "or videos with their frames before the channels"
            )
        samples, count = images.shape[:2]
        limit = self.config.max_images
        if limit is not None and count > limit:
            raise ValueError(f"got {count} images a sample; the resampler has embeddings for {limit} (max_images)")
        if image_mask is None:
            numbers = None if limit is None else torch.arange(count, device=images.device).repeat(samples)
            return self._encode(images.flatten(0, 1), None, numbers).unflatten(0, (samples, count))
        shapes = [(samples, count), tuple(images.shape[: images.ndim - 3])]
        if tuple(image_mask.shape) not in shapes:
            raise ValueError(f"image_mask has shape {tuple(image_mask.shape)}; expected {shapes[0]}, as images has")
        frames = image_mask.bool().sum(dim=2).flatten() if image_mask.ndim == 3 else None
        real = real_images(image_mask)
        numbers = None if limit is None else real.cumsum(dim=1).sub(1).clamp(min=0).flatten()
        if not readable_on_host(image_mask):
            # A video of no frames is padding, and its keys may not be empty: it counts as one frame, and is zeroed.
            parts = (None if frames is None else frames.clamp(min=1), numbers)
            encoded = self._encode(images.flatten(0, 1), *parts).unflatten(0, (samples, count))
            return torch.where(real.to(encoded.device)[:, :, None, None], encoded, 0)
        if image_mask.ndim == 3 and bool((image_mask[..., 1:].bool() & ~image_mask[..., :-1].bool()).any()):
            raise ValueError("image_mask has padding before a frame; put the frames of each video first")
        kept = real.flatten().nonzero().squeeze(1)
        if kept.numel() == 0:
            return self._no_media(samples, count, images.device)
        chosen = [None if t is None else t[kept] for t in (frames, numbers)]
        kept = kept.to(images.device)
        encoded = self._encode(images.flatten(0, 1)[kept], *chosen)
        kept = kept.to(encoded.device)
        media = encoded.new_zeros(samples * count, *encoded.shape[1:])
        return media.index_copy(0, kept, encoded).unflatten(0, (samples, count))

    def _no_media(self, samples: int, count: int, device: torch.device) -> Tensor:
        latents = self.resampler.latents
        device = device if latents.is_meta else latents.device
        return latents.new_zeros(samples, count, self.config.latents, self.config.vision_dim, device=device)

    def _encode(self, images: Tensor, frames: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        """Images [N, C, H, W] or videos [N, F, C, H, W] to [N, n, D].

        Args:
            frames: [N] how many frames of each video are real; None: all.
            numbers: [N] which of its sample's images each one is, where the resampler has embeddings for that.
        """
        video = images.ndim == 5
        trained = any(parameter.requires_grad for parameter in self.vision_encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            patches = self.vision_encoder(images.flatten(0, 1) if video else images)
        patches = getattr(patches, "last_hidden_state", patches)
        if patches.ndim != 3 or patches.shape[-1] != self.config.vision_dim:
            raise ValueError(
                f"the vision encoder returned shape {tuple(patches.shape)}; "
                f"expected [images, patches, vision_dim={self.config.vision_dim}]"
            )
        patches = patches.unflatten(0, (-1, images.shape[1] if video else 1))
        if frames is None and self.config.max_frames is None:
            patches = patches.flatten(1, 2)
        frames, numbers = (None if t is None else t.to(patches.device) for t in (frames, numbers))
        return self.resampler(patches, frames=frames, numbers=numbers)

    def image_index(
        self,
        input_ids: Tensor,
        images: int,
        image_mask: Tensor | None = None,
        *,
        next_image: Tensor | bool = False,
    ) -> Tensor:
        """Which image each token sees: the last one whose media token is not after it (phi of the paper).

        The paper trains with the next image in half of the samples (p_next): pass these as `next_image` [B] bool, and the
        result as `image_index` to `forward`. See `flamingo_index.image_index`.

        Returns:
            [B, S] int64; -1 where a token sees none.
        """
        return image_index(input_ids, self.config.media_token_id, images, image_mask, next_image)

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
            images: [B, I, C, H, W] or videos [B, I, F, C, H, W], or `media` in their place: [B, I, n, D] as `encode_images`
                gives it. A batch of 1 serves every row. Neither: text alone.
            image_mask: [B, I] or [B, I, F] bool, True for a real image or frame; samples may have different numbers.
            image_index: [B, S] int64, the image each token sees (-1: none), in place of the rule "last image before it"; or
                [B, S, I] bool, any set of images.
            attention_mask: [B, S] (with the length of the cache added, where there is one); padding may be on either side.
            labels: [B, S], -100 where no loss is wanted; the language model shifts them.
            **lm_kwargs: passed on to the language model.

        Returns:
            the language model's output (`loss`, `logits`, ...).

        Raises:
            ValueError: more media tokens than images, or a filled cache without `image_index`.
        """
        past = lm_kwargs.get("past_key_values")
        # A static cache that was used counts its tokens on its device, where they are not asked for.
        offset = 0 if past is None else past.get_seq_length()
        if image_index is None and (isinstance(offset, Tensor) or offset):
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
        for block in self.blocks:
            state = block._mllm_fast
            held = conditioning.media_on(device_of(block, conditioning.media.device))
            conditioning.keys_values[id(state)] = media_keys_values(block, block.spec, state, held)
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
        else:
            _check_index(index, input_ids, count)
        if media is None or count == 0:
            # One image that no token sees: text alone takes the same path as text before its first image.
            media = self._no_media(1, 1, input_ids.device)
            return Conditioning(self._channel, media, torch.full_like(input_ids, -1), offset)
        previous = self.config.previous_images and index.dtype != torch.bool
        if previous and image_mask is not None:
            index, previous = up_to(index, image_mask), False
        return Conditioning(self._channel, media, index, offset, previous)

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
        weights = read_bridge_weights(Path(path), own, dataclasses.asdict(self.config), LATER)
        self.load_state_dict(weights, strict=False)

    @classmethod
    def from_bridge(cls, path: str | Path, lm: nn.Module, vision_encoder: nn.Module) -> Flamingo:
        """Build the model that the bridge at `path` was saved from, over `lm` and `vision_encoder`, and load it."""
        given = read_bridge_config(Path(path))
        try:
            config = FlamingoConfig(**given)
        except TypeError as error:  # options that are missing, or that no version has
            raise DamagedBridgeError(f"the configuration in {path} is not that of a bridge: {error}") from error
        model = cls(lm, vision_encoder, config)
        model.load_bridge(path)
        return model


def _check_index(index: Tensor, input_ids: Tensor, images: int) -> None:
    """Raise ValueError unless the index says for each token which image, or which set of images, it sees."""
    if index.dtype == torch.bool:
        if tuple(index.shape) != (*input_ids.shape, images):
            raise ValueError(
                f"image_index has shape {tuple(index.shape)}; expected {(*input_ids.shape, images)}, a flag for each "
                "token and image"
            )
    elif index.shape != input_ids.shape or (readable_on_host(index) and bool((index >= images).any())):
        raise ValueError(
            f"image_index has shape {tuple(index.shape)} and largest entry {int(index.max())}; "
            f"expected shape {tuple(input_ids.shape)} and entries -1 to {images - 1}"
        )
