"""The gated blocks of the three systems behind one call, for tests of what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.builders import MEDIA_DIM, TEXT_DIM, idefics, luc_block, of_block

TOKENS = 4  # of one image


@dataclass(frozen=True)
class BlockKind:
    """One upstream's gated block: how to build it, its widths, and the names of its projections."""

    name: str
    build: Callable[..., nn.Module]
    media_dim: int
    kv_width: int  # outputs of the K and V projections together
    query: str
    key_value: tuple[str, ...]
    output: str
    feed_forward: str
    norm: str
    has_decode: bool

    def __str__(self) -> str:
        return self.name

    def call(self, block: nn.Module, x: Tensor, media: Tensor, locations: Tensor, *, decode: bool = False) -> Tensor:
        """The block on text [B, S, 64] and media [B, I, n, media_dim]; decode: all tokens follow the last location."""
        if self.name == "idefics":
            return block(x, None, media.flatten(1, 2), **image_masks(locations, media, x, decode))
        if self.name == "open_flamingo":
            return block(x, media, media_locations=locations, use_cached_media=decode)
        assert not decode
        return block(x, media, media_locations=locations)

    def inputs(
        self, batch: int = 2, length: int = 9, images: int = 2, *, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(text, media, locations): row 0 names every image, two tokens apart; the other rows name the first only."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, length, TEXT_DIM, generator=generator)
        media = torch.randn(batch, images, TOKENS, self.media_dim, generator=generator)
        locations = torch.zeros(batch, length, dtype=torch.bool)
        locations[0, 1 : 1 + 2 * images : 2] = True
        locations[1:, 3] = True
        return x, media, locations

    def media_work(self, batch: int, images: int) -> int:
        """Output elements of one projection of K and V of all images."""
        return batch * images * TOKENS * self.kv_width


def image_masks(locations: Tensor, media: Tensor, x: Tensor, decode: bool) -> dict[str, Tensor]:
    """idefics' additive mask and gate for the visibility that `locations` mean to the other two systems."""
    index = locations.cumsum(-1)
    if decode:
        index = index[:, -1:].expand(-1, x.shape[1])
    seen = index[..., None] == torch.arange(1, media.shape[1] + 1)
    mask = torch.zeros(*seen.shape, media.shape[2], dtype=x.dtype).masked_fill(
        ~seen[..., None], torch.finfo(x.dtype).min
    )
    return {"image_attention_mask": mask.flatten(2)[:, None], "cross_attention_gate": seen.any(-1).to(x.dtype)}


def _idefics_layer(seed: int = 0, **options: Any) -> nn.Module:
    return idefics(seed=seed, **options).model.gated_cross_attn_layers[0]


_FLAMINGO: dict[str, Any] = {
    "kv_width": 2 * 32,
    "query": "attn.to_q",
    "key_value": ("attn.to_kv",),
    "output": "attn.to_out",
    "feed_forward": "ff.1",
    "norm": "attn.norm",
}

_IDEFICS: dict[str, Any] = {
    "kv_width": 2 * TEXT_DIM,
    "query": "cross_attn.q_proj",
    "key_value": ("cross_attn.k_proj", "cross_attn.v_proj"),
    "output": "cross_attn.o_proj",
    "feed_forward": "mlp.up_proj",
    "norm": "input_layernorm",
}
KINDS = [
    BlockKind("open_flamingo", of_block, MEDIA_DIM, has_decode=True, **_FLAMINGO),
    BlockKind("flamingo_pytorch", luc_block, TEXT_DIM, has_decode=False, **_FLAMINGO),
    BlockKind("idefics", _idefics_layer, MEDIA_DIM, has_decode=True, **_IDEFICS),
]
