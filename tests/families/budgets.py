"""The launch budgets of whole blocks, and the calls that they are about: upstream's modules, at any size.

Q-Former forward 80, InstructBLIP's with text 95 (transformers with SDPA: 190 and 318)
Flamingo's gated block 5 in a decode step, 6 where it meets new images (30 and 31)
a layer of the Perceiver resampler 6 (22), a layer of BLIP's text decoder in a decode step 10 (28)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    BlipTextConfig,
    BlipTextModel,
    DynamicCache,
    EncoderDecoderCache,
    IdeficsConfig,
    IdeficsModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from tests.families.builders import GatedCrossAttentionBlock, PerceiverResampler

Call = Callable[[], Tensor]
# Makes a tensor of a shape: random numbers, or nothing but the shape.
Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """Widths and lengths: those of a published model, or small ones with the same number of layers.

    Attributes:
        dim, heads, ffn: of the Q-Former and BLIP's text model; `image`: width of image features, `tokens` of an image.
        batch, queries, words: rows.
        text, media, latents: widths of Flamingo's language model and resampler, and its latents.
        length: text of a prompt.
    """

    dim: int = 768
    heads: int = 12
    ffn: int = 3072
    image: int = 1408
    tokens: int = 257
    batch: int = 1
    queries: int = 32
    words: int = 32
    text: int = 2048
    media: int = 1024
    inner: int = 64
    latents: int = 64
    length: int = 96


PUBLISHED = Sizes()
SMALL = Sizes(
    dim=16, heads=1, ffn=16, image=16, tokens=4, batch=2, queries=3, words=2, text=32, media=24, inner=16, latents=3,
    length=5,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A budget.

    Attributes:
        name: for people.
        budget: launches of the last call, divided by `layers`.
        build: upstream's module.
        calls: the calls to make one after the other, of which the last is counted; from a module and the sizes.
        layers: what the budget is per.
        first_runs: whether the calls before must compute, because the last reads what they leave behind.
        batches: published batch sizes that it holds for. Prompts of hundreds of rows are left to the vendor's GEMM, and
            then norm and activation are launches of their own.
    """

    name: str
    budget: int
    build: Callable[[Sizes], nn.Module]
    calls: Callable[[nn.Module, Sizes, Make], list[Call]]
    layers: int = 1
    first_runs: bool = True
    batches: tuple[int, ...] = (1, 8)

    def __str__(self) -> str:
        return self.name


def _qformer_config(s: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": s.dim,
        "num_attention_heads": s.heads,
        "intermediate_size": s.ffn,
        "encoder_hidden_size": s.image,
    }


def _qformer(s: Sizes) -> nn.Module:
    return Blip2QFormerModel._from_config(Blip2QFormerConfig(use_qformer_text_input=False, **_qformer_config(s)))


def _qformer_calls(model: nn.Module, s: Sizes, make: Make) -> list[Call]:
    inputs = {
        "query_embeds": make(1, s.queries, s.dim).expand(s.batch, -1, -1),
        "encoder_hidden_states": make(s.batch, s.tokens, s.image),
    }
    return [lambda: model(**inputs).last_hidden_state] * 2


def _instructblip(s: Sizes) -> nn.Module:
    return InstructBlipQFormerModel._from_config(InstructBlipQFormerConfig(vocab_size=50, **_qformer_config(s)))


def _instructblip_calls(model: nn.Module, s: Sizes, make: Make) -> list[Call]:
    inputs = {
        "input_ids": make(s.batch, s.words, dtype=torch.long),
        "attention_mask": make(s.batch, s.queries + s.words, dtype=torch.long),
        "query_embeds": make(1, s.queries, s.dim).expand(s.batch, -1, -1),
        "encoder_hidden_states": make(s.batch, s.tokens, s.image),
    }
    return [lambda: model(**inputs).last_hidden_state] * 2


def _block(s: Sizes) -> nn.Module:
    return GatedCrossAttentionBlock(dim=s.text, dim_visual=s.media, dim_head=s.inner, heads=2 if s.inner < 64 else 8)


def _block_calls(block: nn.Module, s: Sizes, make: Make) -> list[Call]:
    # Who sees what is worked out once a forward, for all layers; the first call does it here.
    locations = make(s.batch, s.length, dtype=torch.bool)
    x = make(s.batch, s.length, s.text)
    media = [make(s.batch, 1, s.latents, s.media) for _ in range(2)]
    return [lambda m=m: block(x, m, media_locations=locations) for m in media]


def _block_steps(block: nn.Module, s: Sizes, make: Make) -> list[Call]:
    locations, media = make(s.batch, s.length, dtype=torch.bool), make(s.batch, 1, s.latents, s.media)
    steps = [make(s.batch, length, s.text) for length in (s.length, 1, 1)]
    return [lambda x=x: block(x, media, media_locations=locations, use_cached_media=x.shape[1] == 1) for x in steps]


def _resampler(s: Sizes) -> nn.Module:
    heads = 2 if s.inner < 64 else 8
    return PerceiverResampler(dim=s.media, depth=6, dim_head=s.inner, heads=heads, num_latents=s.latents)


def _resampler_calls(module: nn.Module, s: Sizes, make: Make) -> list[Call]:
    features = make(s.batch, 1, 1, s.tokens, s.media)
    return [lambda: module(features)] * 2


CASES = [
    Case("Q-Former", 80, _qformer, _qformer_calls, first_runs=False),
    Case("Q-Former of InstructBLIP", 95, _instructblip, _instructblip_calls, first_runs=False),
    Case("gated block, new images", 6, _block, _block_calls, batches=(1,)),
    Case("gated block, decode step", 5, _block, _block_steps),
    Case("resampler layer", 6, _resampler, _resampler_calls, layers=6, first_runs=False),
]

# Of BLIP's text decoder and of IDEFICS with normalised queries and keys, in a decode step.
DECODER_LAYER, GATED_LAYER = 10, 5


def text_decoder(s: Sizes, layers: int) -> BlipTextModel:
    """BLIP's text decoder."""
    config = BlipTextConfig(
        vocab_size=50, hidden_size=s.dim, encoder_hidden_size=s.image, intermediate_size=s.ffn, num_hidden_layers=layers,
        num_attention_heads=s.heads, bos_token_id=1, sep_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return BlipTextModel(config)


def decode_calls(model: nn.Module, s: Sizes, make: Make) -> list[Call]:
    """A prompt and two steps after it."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    image = make(s.batch, s.tokens, s.image)

    def call(ids: Tensor, keys: int) -> Tensor:
        mask = ids.new_ones(s.batch, keys)
        out = model(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image, past_key_values=cache, use_cache=True,
            is_decoder=True,
        )  # fmt: skip
        states: Tensor = out.last_hidden_state
        return states

    lengths = (3, 1, 1)
    ids = [make(s.batch, length, dtype=torch.long) for length in lengths]
    return [lambda i=i: call(ids[i], sum(lengths[: i + 1])) for i in range(3)]


def idefics_9b(layers: int, every: int) -> IdeficsModel:
    """IDEFICS-9B with so many layers and a gated one before every `every`-th; no vision encoder to speak of."""
    config = IdeficsConfig(
        vocab_size=50, additional_vocab_size=0, num_hidden_layers=layers, cross_layer_interval=every,
        use_resampler=False, qk_layer_norms=True, vision_config={"embed_dim": 1280, "num_hidden_layers": 1},
        perceiver_config={"use_resampler": False},
    )  # fmt: skip
    return IdeficsModel._from_config(config, attn_implementation="sdpa")


def idefics_calls(model: nn.Module, images: int, make: Make) -> list[Call]:
    """A prompt and two steps after it."""
    cache, media = DynamicCache(), make(1, images, 64, 1280)

    def call(new: int, keys: int) -> Tensor:
        out = model(
            input_ids=make(1, new, dtype=torch.long), attention_mask=make(1, keys, dtype=torch.long),
            image_attention_mask=make(1, new, images, dtype=torch.long), image_encoder_embeddings=media,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        states: Tensor = out.last_hidden_state
        return states

    return [functools.partial(call, new, keys) for new, keys in ((64, 64), (1, 65), (1, 66))]
