"""HF BLIP (transformers.models.blip.modeling_blip): image-text retrieval and the vision model's attention.

Captioning and question answering need no drop-in of their own: what they do is done by their text models (`blip_text`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.blip.modeling_blip import BlipAttention, BlipForImageTextRetrieval

from .. import ops
from ..modules import children
from ..modules.state import FusedState, plain_state
from . import named_like_upstream
from ._transformers import asked_for, hooked, model_dropin
from .blip_text import KEEP, ROWS


@model_dropin
class FusedBlipForImageTextRetrieval(BlipForImageTextRetrieval):
    """Drop-in for `BlipForImageTextRetrieval`: matches many texts with one image without copying the image."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def itm_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        image_embeds: Tensor,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Image-text matching scores alone: what `forward(...).itm_score` holds, for features computed before.

        Where `forward` hands out the states of all tokens, this computes only what the score reads of the last layer. The
        image's keys and values are projected once for as long as `image_embeds` lives: score candidates in as many calls
        as memory needs, with the same tensor.

        Args:
            input_ids, attention_mask: [B, L] texts.
            image_embeds: [B_image, T, D_image], the vision model's last hidden state. Text row b reads image row
                b // (B / B_image): one image and all its candidates, or k consecutive candidates for each image.
            image_index: [B] int64, the image row of each text instead: any pairs of an image and a text.

        Returns:
            [B, 2] logits, the second of them for "they match".

        Raises:
            ValueError: text and image batches that do not fit.
        """
        extra: dict[str, Any] = {"image_index": image_index}
        if not asked_for("output_hidden_states", self.text_encoder, {}):
            extra |= {ROWS: slice(0, 1), KEEP: True}
        outputs = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_embeds,
            return_dict=True,
            **extra,
        )
        return children.norm_linear(outputs.last_hidden_state[:, 0], None, self.itm_head)


@named_like_upstream
class FusedBlipAttention(BlipAttention):
    """Drop-in for `BlipAttention`, the vision model's attention."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As upstream: [B, L, D] -> [B, L, D], and the probabilities where they are asked for, else None."""
        if asked_for("output_attentions", self, kwargs) or hooked(self.dropout):
            return super().forward(hidden_states, **kwargs)
        packs = self._mllm_fast.packs
        qkv = children.norm_linear(hidden_states, None, self.qkv, packs=packs)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        attended = ops.attention(q, k, v, scale=self.scale, dropout_p=dropout_p).flatten(-2)
        return children.norm_linear(attended, None, self.projection, packs=packs), None
