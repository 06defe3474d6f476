"""flamingo-pytorch 0.1.2 (github.com/lucidrains/flamingo-pytorch): resampler and gated blocks."""

from __future__ import annotations

from flamingo_pytorch.flamingo_pytorch import GatedCrossAttentionBlock, PerceiverResampler
from torch import Tensor, nn

from ..modules.gated_cross_attention import (
    broadcast_text,
    flamingo_visibility,
    gated_attention,
    gated_ffn,
)
from ..modules.graphs import replayed
from ..modules.media_context import MediaContext, one_row_each
from ..modules.perceiver_resampler import resample
from ..modules.state import FusedState, Options
from . import named_like_upstream
from ._flamingo_style import block_hooked, block_spec, resampler_hooked, resampler_spec


@named_like_upstream
class FusedGatedCrossAttentionBlock(GatedCrossAttentionBlock):
    """Drop-in for `flamingo_pytorch.GatedCrossAttentionBlock`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, block_spec(module), context)

    def forward(self, x: Tensor, media: Tensor, media_locations: Tensor | None = None) -> Tensor:
        """As upstream: x [B, S, D], media [B_media, images, tokens, D], media_locations [B, S] bool or None (see all)."""
        if block_hooked(self):
            return super().forward(x, one_row_each(media, x.shape[0]), media_locations)
        x = broadcast_text(x, media)
        if media_locations is not None and media_locations.shape[1] != x.shape[1]:
            raise ValueError(
                f"media_locations is {tuple(media_locations.shape)} but the text is {tuple(x.shape)}: pass one flag per "
                "text token"
            )
        state = self._mllm_fast
        visibility = flamingo_visibility(
            state.shared,
            state.options,
            media_locations,
            media,
            x.shape[1],
            immediate=self.attn.only_attend_immediate_media,
        )
        x = gated_attention(self, state.spec, state, x, media, visibility)
        return gated_ffn(self, state.spec, state, x)


@named_like_upstream
class FusedPerceiverResampler(PerceiverResampler):
    """Drop-in for `flamingo_pytorch.PerceiverResampler`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, resampler_spec(module), context)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        """As upstream: x [B, images, tokens, D] or [B, tokens, D] -> [B, images, latents, D]."""
        if resampler_hooked(self):
            return super().forward(x)
        if x.ndim == 3:
            x = x.unsqueeze(1)
        if x.ndim != 4:
            raise ValueError(f"image features must be [batch, (images,) tokens, dim], got {tuple(x.shape)}")
        images = x.shape[1]
        if images > self.media_pos_emb.shape[0] > 1:
            raise ValueError(
                f"got {images} images but the resampler has embeddings for {self.media_pos_emb.shape[0]}; build it with "
                f"num_media_embeds={images}"
            )
        x = x + self.media_pos_emb[:images]
        state = self._mllm_fast
        return resample(self, state.spec, state, x.flatten(0, 1)).unflatten(0, x.shape[:2])
