"""OpenFlamingo 2.0.1 (github.com/mlfoundations/open_flamingo): resampler, gated blocks, and the model around them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from open_flamingo.src.flamingo import Flamingo
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.helpers import GatedCrossAttentionBlock, PerceiverResampler
from torch import Tensor, nn

from ..modules.gated_cross_attention import (
    broadcast_text,
    flamingo_visibility,
    gated_attention,
    gated_ffn,
    one_row_each,
)
from ..modules.media_context import MediaContext
from ..modules.perceiver_resampler import resample
from ..modules.state import FusedState, Options
from . import named_like_upstream
from ._flamingo_style import block_hooked, block_spec, resampler_hooked, resampler_spec


@named_like_upstream
class FusedGatedCrossAttentionBlock(GatedCrossAttentionBlock):
    """Drop-in for `open_flamingo.src.helpers.GatedCrossAttentionBlock`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, block_spec(module), context)

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool | None = False,
    ) -> Tensor:
        """As upstream: x [B, S, D], media [B_media, images, tokens, D_media], media_locations [B, S] bool.

        Beyond upstream, B may be a multiple of B_media: text row b reads media row b // (B / B_media).
        """
        if block_hooked(self):
            return super().forward(x, one_row_each(media, x.shape[0]), media_locations, use_cached_media)
        state = self._mllm_fast
        x = broadcast_text(x, media)
        if media_locations is None:
            if not use_cached_media and not state.fixes("missing_media_locations"):
                raise ValueError(
                    "media_locations is None: pass a [batch, length] bool tensor that is True at image tokens, or fuse "
                    'with fixes=("missing_media_locations",) to let every token see every image (upstream raises '
                    "AttributeError here)"
                )
            visibility = None
        else:
            cached = bool(use_cached_media)
            exact = media_locations.shape[1] == x.shape[1] or state.fixes("generated_image_tokens")
            if not cached and not exact:
                raise ValueError(
                    f"media_locations is {tuple(media_locations.shape)} but the text is {tuple(x.shape)}: pass one flag "
                    "per text token, or use_cached_media=True"
                )
            visibility = flamingo_visibility(
                state.shared,
                state.options,
                media_locations,
                media,
                x.shape[1],
                immediate=self.attn.only_attend_immediate_media,
                cached=cached,
            )
        x = gated_attention(self, state.spec, state, x, media, visibility)
        return gated_ffn(self, state.spec, state, x)


@named_like_upstream
class FusedPerceiverResampler(PerceiverResampler):
    """Drop-in for `open_flamingo.src.helpers.PerceiverResampler`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, resampler_spec(module), context)

    def forward(self, x: Tensor) -> Tensor:
        """As upstream: x [B, images, frames, tokens, D] -> [B, images, latents, D]."""
        if resampler_hooked(self):
            return super().forward(x)
        if x.ndim != 5:
            raise ValueError(f"image features must be [batch, images, frames, tokens, dim], got {tuple(x.shape)}")
        batch, images, frames = x.shape[:3]
        if self.frame_embs is not None:
            x = x + _first(self.frame_embs, frames, "frames").unsqueeze(1)
        x = x.flatten(2, 3)
        if self.media_time_embs is not None:
            x = x + _first(self.media_time_embs, images, "images")
        state = self._mllm_fast
        return resample(self, state.spec, state, x.flatten(0, 1)).unflatten(0, (batch, images))


def _first(embeddings: Tensor, count: int, what: str) -> Tensor:
    if count > embeddings.shape[0] > 1:
        raise ValueError(f"got {count} {what} but the resampler has embeddings for {embeddings.shape[0]}")
    return embeddings[:count]


@named_like_upstream
class FusedFlamingo(Flamingo):
    """Drop-in for `open_flamingo.src.flamingo.Flamingo`: beams share the images of their sample."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, None, context, extra={"copies": 1})

    @functools.wraps(Flamingo.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if not self.lang_encoder.is_conditioned():
            self._mllm_fast.shared.clear()
        return output

    def generate(self, vision_x: Tensor, lang_x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As upstream; `num_return_sequences` beyond `num_beams` needs fixes=("num_return_sequences",)."""
        state, beams = self._mllm_fast, kwargs.get("num_beams", 1)
        sequences = kwargs.get("num_return_sequences") or 1
        if sequences > beams and vision_x.shape[0] > 1 and not state.fixes("num_return_sequences"):
            raise ValueError(
                f"num_return_sequences={sequences} with a batch of {vision_x.shape[0]} fails upstream; fuse with "
                'fixes=("num_return_sequences",) to let the returned sequences share their sample\'s images'
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(lang_x)
        # Upstream repeats the pixels for every beam before encoding; `_encode_vision_x` takes one copy of each.
        state.extra["copies"] = beams if self._all_blocks_fused() else 1
        try:
            return super().generate(vision_x, lang_x, attention_mask, **kwargs)
        finally:
            state.extra["copies"] = 1
            state.shared.clear()
            if self.lang_encoder._use_cached_vision_x:  # an error inside: leave no conditioning behind
                self.uncache_media()

    def _all_blocks_fused(self) -> bool:
        """Only our blocks let text rows share media rows; each may sit inside a wrapper."""
        blocks = [layer.gated_cross_attn_layer for layer in self.lang_encoder._get_decoder_layers()]
        return all(
            any(isinstance(m, FusedGatedCrossAttentionBlock) for m in block.modules())
            for block in blocks
            if block is not None
        )

    def _encode_vision_x(self, vision_x: Tensor) -> None:
        super()._encode_vision_x(vision_x[:: self._mllm_fast.extra["copies"]])


@named_like_upstream
class FusedFlamingoLMMixin(FlamingoLMMixin):
    """Drop-in for the language model that `FlamingoLMMixin` extended.

    It lets `generate` of transformers 5 drop an all-ones attention mask, and with the fix "generated_image_tokens" an
    image token that is fed during generation moves only its own row on to the next image.
    """

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, None, context)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        continuing = (
            self._mllm_fast.fixes("generated_image_tokens")
            and self._use_cached_vision_x
            and self.is_conditioned()
            and bool((input_ids == self.media_token_id).any())
        )
        if not continuing:
            return super().forward(input_ids, attention_mask, **kwargs)
        layers = self._get_decoder_layers()
        earlier = layers[0].media_locations
        with Appending(layers, earlier):
            return super().forward(input_ids, attention_mask, **kwargs)


class Appending:
    """While it lasts, conditioning the layers on locations puts the earlier ones in front instead of dropping them."""

    def __init__(self, layers: nn.ModuleList, earlier: Tensor) -> None:
        self.layers, self.earlier = layers, earlier
        self.joined: Tensor | None = None

    def condition(self, layer: nn.Module, locations: Tensor) -> None:
        if self.joined is None:
            rows = locations.shape[0] // self.earlier.shape[0]
            self.joined = torch.cat((self.earlier.repeat_interleave(rows, 0), locations), dim=1)
        layer.media_locations = self.joined

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.__dict__["condition_media_locations"] = functools.partial(self.condition, layer)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.__dict__["condition_media_locations"]
