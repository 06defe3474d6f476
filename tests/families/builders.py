"""Tiny models of the three Flamingo systems, with nothing left at a value that hides errors.

Upstream initialisers make wrong code look right: gates start at 0 (each block is the identity), norms at 1 and 0.
`randomise` therefore draws every parameter. Dimensions are chosen so that a GEMM can be recognised by its contraction
length alone: media features have width 48 (`MEDIA_DIM`), text has width 64, and nothing else has either length.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from flamingo_pytorch import GatedCrossAttentionBlock as LucGatedCrossAttentionBlock
from flamingo_pytorch import PerceiverResampler as LucPerceiverResampler
from flamingo_pytorch.flamingo_palm import FlamingoPaLM
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

# open_flamingo imports open_clip for its factory only; the classes under test do not need it.
sys.modules.setdefault("open_clip", types.ModuleType("open_clip"))

from open_flamingo.src.factory import _infer_decoder_layers_attr_name  # noqa: E402
from open_flamingo.src.flamingo import Flamingo  # noqa: E402
from open_flamingo.src.flamingo_lm import FlamingoLMMixin  # noqa: E402
from open_flamingo.src.helpers import GatedCrossAttentionBlock, PerceiverResampler  # noqa: E402
from open_flamingo.src.utils import extend_instance  # noqa: E402

TEXT_DIM, MEDIA_DIM = 64, 48
IMAGE_TOKEN, END_OF_CHUNK, PAD = 90, 91, 0
VOCABULARY = 96

__all__ = ["Flamingo", "FlamingoPaLM", "GatedCrossAttentionBlock", "PerceiverResampler"]


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter: matrices of gain 1.5 (attention is peaked), affines around 1, gates of either sign."""
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator, dtype=torch.float64)

    for name, p in module.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if "gate" in last or "alpha" in last:
            drawn = torch.sign(normal(p)) * (0.4 + 0.8 * torch.rand(p.shape, generator=generator, dtype=torch.float64))
        elif "emb" in name or "latents" in last or last in ("class_embedding",):
            drawn = normal(p)
        elif p.ndim >= 2:
            drawn = normal(p) * 1.5 / p[0].numel() ** 0.5
        else:
            drawn = 0.3 * normal(p) + (0.0 if last == "bias" else 1.0)
        p.copy_(drawn)
    return module


def of_block(immediate: bool = True, *, seed: int = 0, **options: Any) -> GatedCrossAttentionBlock:
    """A bare open_flamingo gated block: text 64, media 48, two heads of 16."""
    sizes = {"dim": TEXT_DIM, "dim_visual": MEDIA_DIM, "dim_head": 16, "heads": 2} | options
    return randomise(GatedCrossAttentionBlock(only_attend_immediate_media=immediate, **sizes), seed)


def luc_block(immediate: bool = True, *, seed: int = 0, **options: Any) -> LucGatedCrossAttentionBlock:
    """A bare flamingo-pytorch gated block, whose media have the width of the text."""
    sizes = {"dim": TEXT_DIM, "dim_head": 16, "heads": 2} | options
    return randomise(LucGatedCrossAttentionBlock(only_attend_immediate_media=immediate, **sizes), seed)


def of_resampler(*, seed: int = 0, **options: Any) -> PerceiverResampler:
    """A bare open_flamingo resampler of width 48, whose inner width (32) differs from it, as in released models."""
    sizes = {"dim": MEDIA_DIM, "depth": 3, "dim_head": 16, "heads": 2, "num_latents": 5} | options
    return randomise(PerceiverResampler(**sizes), seed)


def luc_resampler(*, seed: int = 0, **options: Any) -> LucPerceiverResampler:
    """A bare flamingo-pytorch resampler (adds `media_pos_emb`, takes 3-D input)."""
    sizes = {"dim": MEDIA_DIM, "depth": 3, "dim_head": 16, "heads": 2, "num_latents": 5} | options
    return randomise(LucPerceiverResampler(**sizes), seed)


class PatchEncoder(nn.Module):
    """Stands for open_clip's vision tower: returns (pooled, tokens [N, patches, dim]) and counts the images it saw."""

    def __init__(self, dim: int = MEDIA_DIM) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 14, 14)
        self.images_seen = 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.images_seen += images.shape[0]
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return tokens.mean(1), tokens


class _Mixin(FlamingoLMMixin):
    """open_flamingo's mixin as transformers 5 needs it: `generate` drops an all-ones attention mask."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return FlamingoLMMixin.forward(self, input_ids, attention_mask, **kwargs)


def _language_model(kind: str) -> nn.Module:
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    wide = {"hidden_size": TEXT_DIM, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY} | ids
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(intermediate_size=80, num_key_value_heads=2, max_position_embeddings=128, **wide)
        )
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(ffn_dim=80, word_embed_proj_dim=TEXT_DIM, max_position_embeddings=128, **wide))
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=80, max_position_embeddings=128, **wide))
    if kind == "mpt":
        return MptForCausalLM(
            MptConfig(
                d_model=TEXT_DIM, n_heads=4, n_layers=4, expansion_ratio=2, max_seq_len=128, vocab_size=VOCABULARY
            )
        )
    raise ValueError(kind)


def of_model(kind: str = "llama", *, every: int = 2, checkpointing: bool = False, seed: int = 0) -> Flamingo:
    """open_flamingo over a tiny language model of 4 layers: 2 gated blocks, 6-layer resampler with 64 latents."""
    torch.manual_seed(seed)
    language_model = _language_model(kind)
    extend_instance(language_model, _Mixin)
    language_model.set_decoder_layers_attr_name(_infer_decoder_layers_attr_name(language_model))
    vision = types.SimpleNamespace(visual=PatchEncoder())
    model = Flamingo(
        vision,  # type: ignore[arg-type]
        language_model,
        eoc_token_id=END_OF_CHUNK,
        media_token_id=IMAGE_TOKEN,
        vis_dim=MEDIA_DIM,
        cross_attn_every_n_layers=every,
        gradient_checkpointing=checkpointing,
    )
    return randomise(model, seed).eval()


def of_blocks(model: Flamingo) -> list[nn.Module]:
    """The gated blocks of an open_flamingo model, in order."""
    return [block for block in model.lang_encoder.gated_cross_attn_layers if block is not None]


def of_inputs(batch: int = 2, length: int = 10, images: int = 2, *, seed: int = 0) -> dict[str, Tensor]:
    """Images and a prompt in which row 0 names every image, the others only one: arguments of `Flamingo.forward`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 89, (batch, length), generator=generator)
    for i in range(images):
        ids[0, 1 + 3 * i] = IMAGE_TOKEN
    ids[1:, 2] = IMAGE_TOKEN
    pixels = torch.randn(batch, images, 1, 3, 28, 28, generator=generator)
    return {"vision_x": pixels, "lang_x": ids, "attention_mask": torch.ones_like(ids)}


def left_padded(inputs: dict[str, Tensor], row: int = 1, pad: int = 3) -> dict[str, Tensor]:
    """The same prompt with `pad` padding tokens put before `row`, whose last tokens fall off."""
    ids, mask = inputs["lang_x"].clone(), inputs["attention_mask"].clone()
    ids[row] = torch.cat([ids.new_full((pad,), PAD), ids[row, : ids.shape[1] - pad]])
    mask[row, :pad] = 0
    return inputs | {"lang_x": ids, "attention_mask": mask}


def palm(immediate: bool = True, *, seed: int = 0, **options: Any) -> FlamingoPaLM:
    """flamingo-pytorch's whole model: 4 layers, a gated block after every other one; images come as patch features."""
    sizes = {
        "dim": TEXT_DIM, "num_tokens": VOCABULARY, "depth": 4, "dim_head": 16, "heads": 2,
        "media_token_id": IMAGE_TOKEN, "cross_attn_every": 2, "perceiver_num_latents": 5, "perceiver_depth": 2,
        "img_encoder": nn.Linear(20, TEXT_DIM),
    }  # fmt: skip
    model = FlamingoPaLM(only_attend_immediate_media=immediate, **(sizes | options))
    return randomise(model, seed).eval()


def idefics(
    *,
    resampler: bool = True,
    qk_norms: bool = True,
    alpha: str = "vector",
    attention: str = "sdpa",
    dropout: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> IdeficsForVisionText2Text:
    """HF idefics: 4 language layers, 2 gated layers of 4 heads, vision width 48, 8 latents (or 5 tokens an image)."""
    config = IdeficsConfig(
        vocab_size=VOCABULARY, additional_vocab_size=2, hidden_size=TEXT_DIM, intermediate_size=80, num_hidden_layers=4,
        num_attention_heads=4, cross_layer_interval=2, alpha_initializer="ones", alpha_type=alpha,
        qk_layer_norms=qk_norms, use_resampler=resampler, max_position_embeddings=128, dropout=dropout,
        freeze_text_layers=False, freeze_vision_layers=False, freeze_lm_head=False,
        vision_config={
            "embed_dim": MEDIA_DIM, "image_size": 28, "patch_size": 14, "intermediate_size": 72, "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        perceiver_config={
            "use_resampler": resampler, "resampler_n_latents": 8, "resampler_depth": 2, "resampler_n_heads": 4,
            "resampler_head_dim": 16, "qk_layer_norms_perceiver": qk_norms,
        },
        **options,
    )  # fmt: skip
    model = IdeficsForVisionText2Text._from_config(config, attn_implementation=attention)
    return randomise(model, seed).eval()


def idefics_mask(kind: str, batch: int, length: int, images: int) -> Tensor:
    """Visibility [B, S, I] of 0 and 1: "incremental" as the processor builds it, or shapes only other callers use."""
    mask = torch.zeros(batch, length, images, dtype=torch.long)
    if kind == "incremental":
        for b in range(batch):
            for i in range(images - b % 2):
                mask[b, 2 + b + 3 * i :] = 0
                mask[b, 2 + b + 3 * i :, i] = 1
    elif kind == "many":  # several images a token
        for i in range(images):
            mask[:, 1 + 2 * i :, i] = 1
    elif kind == "scattered":  # neither monotone nor contiguous; some rows see nothing
        mask = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(7))
        mask[:, 4] = 0
        mask[0, -1] = 0
    elif kind == "nothing":
        pass
    elif kind == "everything":
        mask.fill_(1)
    else:
        raise ValueError(kind)
    return mask


def idefics_inputs(
    kind: str = "incremental", batch: int = 2, length: int = 10, images: int = 3, *, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of `IdeficsForVisionText2Text.forward` and `.generate`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, images, 3, 28, 28, generator=generator),
        "image_attention_mask": idefics_mask(kind, batch, length, images),
    }


def location_cases() -> Iterator[tuple[str, Tensor, int]]:
    """(name, media_locations [2, 11], images): where the image tokens of an open_flamingo prompt can be."""
    for name, rows, images in (
        ("images_from_the_start", ((0, 5), (0, 3)), 2),
        ("fewer_tokens_than_images", ((0, 5), (2, 3)), 3),
        ("text_before_the_first_image", ((4,), ()), 1),
        ("no_image_token", ((), ()), 2),
        ("more_tokens_than_images", ((0, 3, 6, 8), (1,)), 2),
        ("every_token_is_an_image", (range(11), range(11)), 11),
        ("last_token_is_an_image", ((10,), (2, 10)), 2),
    ):
        locations = torch.zeros(2, 11, dtype=torch.bool)
        for row, positions in enumerate(rows):
            locations[row, list(positions)] = True
        yield name, locations, images
