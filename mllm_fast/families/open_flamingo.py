"""OpenFlamingo 2.0.1 (github.com/mlfoundations/open_flamingo): resampler, gated blocks, and the model around them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from open_flamingo.src.flamingo import Flamingo
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.helpers import GatedCrossAttentionBlock, PerceiverResampler
from torch import Tensor, nn
from transformers import GenerationMixin

from ..modules.gated_cross_attention import (
    broadcast_text,
    flamingo_visibility,
    gated_attention,
    gated_ffn,
)
from ..modules.graphs import replayed
from ..modules.media_context import MediaContext, one_row_each
from ..modules.perceiver_resampler import resample
from ..modules.state import FusedState, Options, plain_state, readable_on_host
from . import named_like_upstream
from ._ahead import KEYS_VALUES, project_ahead, taken
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

    @replayed
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
        vision_x, state = vision_x[:: self._mllm_fast.extra["copies"]], self._mllm_fast
        if state.graphs is None or vision_x.ndim != 6 or vision_x.shape[2] != 1:
            super()._encode_vision_x(vision_x)  # which says what is wrong with the shape
            return
        parts = (self.vision_encoder, self.perceiver)
        media = state.graphs.call(state.shared.capture, parts, self._media, (vision_x,))
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(media)

    def _media(self, vision_x: Tensor) -> Tensor:
        """Images [B, I, 1, C, H, W] to media tokens [B, I, n, D]: what upstream does, in one piece."""
        with torch.no_grad():
            features = self.vision_encoder(vision_x.flatten(0, 2))[1]
        return self.perceiver(features.unflatten(0, vision_x.shape[:3]))


@named_like_upstream
class FusedFlamingoLMMixin(FlamingoLMMixin):
    """Drop-in for the language model that `FlamingoLMMixin` extended.

    It lets `generate` of transformers 5 drop an all-ones attention mask, and with the fix "generated_image_tokens" an
    image token that is fed during generation moves only its own row on to the next image. Upstream asks at every step
    whether any token is an image token; on a device or in a trace, where the answer would have to be waited for, what
    follows from it is computed there.
    """

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        layers, fixed = self._get_decoder_layers(), self._mllm_fast.fixes("generated_image_tokens")
        with taken(self._mllm_fast, self._blocks() or (), kwargs.pop(KEYS_VALUES, None)):
            if not (self._use_cached_vision_x and self.is_conditioned()):
                return super().forward(input_ids, attention_mask, **kwargs)
            if not readable_on_host(input_ids):
                return self._continue(layers, fixed, input_ids, attention_mask, **kwargs)
            if not fixed or not bool((input_ids == self.media_token_id).any()):
                return super().forward(input_ids, attention_mask, **kwargs)
            with Appending(layers, layers[0].media_locations):
                return super().forward(input_ids, attention_mask, **kwargs)

    def _continue(self, layers: nn.ModuleList, fixed: bool, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A pass over tokens that follow the conditioning's."""
        new = input_ids == self.media_token_id
        earlier = one_row_each(layers[0].media_locations, new.shape[0])
        # As many image tokens as there were before, put at the first new token: blocks sum them up from there.
        past = F.pad(torch.count_nonzero(earlier, dim=1).unsqueeze(1), (0, new.shape[1] - 1))
        if fixed:
            locations, after = past + new, torch.cat((earlier, new), dim=1)
        else:  # any image token, in whichever row, makes upstream forget the earlier ones of all rows
            width, forget = max(earlier.shape[1], new.shape[1]), new.any()
            locations = torch.where(forget, new, past)
            after = torch.where(forget, *(F.pad(x, (0, width - x.shape[1])) for x in (new, earlier)))
        for layer in layers:
            layer.condition_media_locations(locations)
            layer.condition_use_cached_media(False)
        try:
            # Past upstream's mixin, whose part was just done, to the language model's own forward.
            return super(FlamingoLMMixin, self).forward(input_ids, *args, **kwargs)
        finally:
            for layer in layers:
                layer.condition_media_locations(after)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if blocks := self._blocks():
            project_ahead(self._mllm_fast, blocks, self._get_decoder_layers()[0].vis_x, inputs)
        return inputs

    def _blocks(self) -> list[nn.Module] | None:
        """The gated blocks, where all of them are ours and none sits inside a wrapper."""
        blocks = [layer.gated_cross_attn_layer for layer in self._get_decoder_layers()]
        blocks = [block for block in blocks if block is not None]
        return blocks if all(isinstance(block, FusedGatedCrossAttentionBlock) for block in blocks) else None


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
