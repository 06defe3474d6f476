"""A tiny mPLUG-Owl, and the original's equations for its parameters.

The original's code does not import on today's transformers, so the reference is derived again from its equations, on a
plain mapping of parameters by the original's names: one head, one layer and one sample at a time, with nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
)

from mllm_fast.models.mplug_owl import MplugOwlConfig, MplugOwlForConditionalGeneration
from tests.families.builders import randomise

# Widths and lengths that all differ, so that GEMMs can be told apart by what they contract over.
VISION, VISION_FFN, PATCHES, ABSTRACTOR_FFN, TEXT = 32, 56, 4, 40, 48
HEADS, QUERIES, LAYERS, VOCABULARY, IMAGE, PAD = 4, 3, 3, 60, -1, 0
ROWS = QUERIES + 1
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}

TEXTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(hidden_size=TEXT, intermediate_size=64, num_key_value_heads=2, **_SIZES, **_IDS),
    "gpt2": lambda: GPT2Config(n_embd=TEXT, n_layer=2, n_head=4, **_IDS),
    "opt": lambda: OPTConfig(hidden_size=TEXT, ffn_dim=64, word_embed_proj_dim=16, **_SIZES, **_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(hidden_size=TEXT, intermediate_size=64, **_SIZES, **_IDS),
    "mpt": lambda: MptConfig(d_model=TEXT, n_layers=2, n_heads=4, expansion_ratio=2, **_IDS),
}


def config(text: str = "llama", *, width: int = VISION, image_size: int = 28, **changes: Any) -> MplugOwlConfig:
    """Two vision layers, three layers of the abstractor, four rows an image."""
    vision = {
        "hidden_size": width, "intermediate_size": VISION_FFN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "image_size": image_size, "patch_size": 14,
    }  # fmt: skip
    abstractor = {
        "hidden_size": width, "encoder_hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": ABSTRACTOR_FFN,
    }  # fmt: skip
    return MplugOwlConfig(vision, abstractor, TEXTS[text](), **{"num_query_tokens": QUERIES, **changes})


def owl(text: str = "llama", seed: int = 0, gain: float = 1.5, **changes: Any) -> MplugOwlForConditionalGeneration:
    """With every parameter drawn, in evaluation; matrices of gain `gain`."""
    torch.manual_seed(seed)
    model = MplugOwlForConditionalGeneration(config(text, **changes)).eval()
    randomise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(gain / 1.5)
        # Of the order of the embeddings, or the images would hardly matter.
        model.query_tokens.normal_()
        model.abstractor.vit_eos.normal_()
    return model


def inputs() -> dict[str, Tensor]:
    """Three samples, padded left: two images, one after another; one; none at all."""
    image = [IMAGE] * ROWS
    ids = [[1, *image, 5, *image, 6, 7], [1, 8, *image, 9, 10, 11], [1, 12, 13]]
    length = max(map(len, ids))
    input_ids = torch.tensor([[PAD] * (length - len(row)) + row for row in ids])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "pixel_values": torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(7)),
    }


# the original's equations


def _norm(w: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].mT + w[f"{name}.bias"]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head: [N, L, d] x [N, K, d]."""
    scores = torch.einsum("nld,nkd->nlk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nlk,nkd->nld", scores.softmax(dim=-1), v)


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    size = q.shape[-1] // HEADS
    parts = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
    return torch.cat([_softmax_attention(q[..., part], k[..., part], v[..., part]) for part in parts], dim=-1)


def original_vision(w: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """CLIP's ViT with qkv interleaved by head, a norm before and one after, eps 1e-6: [N, C, H, W] -> [N, L, D]."""
    at = "vision_model.embeddings."
    patches = F.conv2d(pixels, w[f"{at}patch_embed.weight"], stride=14).flatten(2).mT
    first = w[f"{at}cls_token"].expand(len(pixels), 1, -1)
    x = _norm(w, f"{at}pre_layernorm", torch.cat([first, patches], dim=1) + w[f"{at}position_embedding"], 1e-6)
    size = x.shape[-1] // HEADS
    for layer in range(2):
        at = f"vision_model.encoder.layers.{layer}."
        mixed = _linear(w, f"{at}self_attn.query_key_value", _norm(w, f"{at}input_layernorm", x, 1e-6))
        attended = []
        for head in range(HEADS):
            q, k, v = (mixed[..., (3 * head + j) * size : (3 * head + j + 1) * size] for j in range(3))
            attended.append(_softmax_attention(q, k, v))
        x = x + _linear(w, f"{at}self_attn.dense", torch.cat(attended, dim=-1))
        hidden = _linear(w, f"{at}mlp.fc1", _norm(w, f"{at}post_attention_layernorm", x, 1e-6))
        x = x + _linear(w, f"{at}mlp.fc2", hidden * torch.sigmoid(1.702 * hidden))
    return _norm(w, "vision_model.post_layernorm", x, 1e-6)


def original_abstractor(w: Mapping[str, Tensor], image: Tensor, seen: Tensor | None = None) -> Tensor:
    """[N, M, D] -> [N, queries + 1, D_language]; norms of eps 1e-5 but 1e-6 inside the network, residual on norm1(h)."""
    h = w["query_tokens"].expand(len(image), -1, -1)
    for layer in range(LAYERS):
        at = f"abstractor.encoder.layers.{layer}.crossattention."
        x, e = _norm(w, f"{at}norm1", h, 1e-5), _norm(w, f"{at}normk", image, 1e-5)
        rows = []
        for n in range(len(image)):
            visible = e[n] if seen is None else e[n][seen[n].bool()]
            keys = torch.cat([x[n], visible])[None]
            q = _linear(w, f"{at}attention.query", x[n])[None]
            rows.append(_heads(q, *(_linear(w, f"{at}attention.{part}", keys) for part in ("key", "value"))))
        y = x + _linear(w, f"{at}output.out_proj", torch.cat(rows))
        normed = _norm(w, f"{at}output.norm2", y, 1e-5)
        gate, up = (_linear(w, f"{at}output.mlp.{part}", normed) for part in ("w1", "w3"))
        inner = _norm(w, f"{at}output.mlp.ffn_ln", gate * torch.sigmoid(gate) * up, 1e-6)
        h = y + _linear(w, f"{at}output.mlp.w2", inner)
    rows = _linear(w, "abstractor.visual_fc", h)
    return torch.cat([rows, w["abstractor.vit_eos"].expand(len(image), 1, -1)], dim=1)


def original_embeddings(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """The language model's input, put together as the original does: sample by sample, piece by piece."""
    w = dict(model.named_parameters())
    features = iter(original_abstractor(w, original_vision(w, given["pixel_values"])))
    words = model.get_input_embeddings().weight
    samples = []
    for ids in given["input_ids"]:
        pieces, position = [], 0
        while position < len(ids):
            if ids[position] == IMAGE:
                pieces.append(next(features))
                position += ROWS
            else:
                pieces.append(words[ids[position]][None])
                position += 1
        samples.append(torch.cat(pieces))
    return torch.stack(samples)
