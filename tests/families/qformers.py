"""Tiny Q-Formers of the three upstream classes and the models around them, every parameter drawn.

A GEMM is recognised by its contraction length: only image keys and values contract over `IMAGE`, only the second
feed-forward GEMMs over `FFN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    InstructBlipVideoQFormerConfig,
    InstructBlipVideoQFormerModel,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from tests.families.builders import randomise
from tests.families.instruments import Recorder, recording

DIM, IMAGE, FFN, LAYERS, QUERIES, TOKENS, VOCABULARY = 24, 36, 56, 5, 4, 7, 60
IMAGE_TOKEN = 90
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": FFN, "max_position_embeddings": 64, "cross_attention_frequency": 2, "encoder_hidden_size": IMAGE,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
VISION = {
    "hidden_size": IMAGE, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One of the three upstream Q-Formers."""

    name: str

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0, **options: Any) -> nn.Module:
        if self.name == "blip2":
            config = Blip2QFormerConfig(**({"use_qformer_text_input": True} | CONFIG | options))
            model = Blip2QFormerModel._from_config(config)
        elif self.name == "instructblip":
            model = InstructBlipQFormerModel._from_config(InstructBlipQFormerConfig(**(CONFIG | options)))
        else:
            model = InstructBlipVideoQFormerModel._from_config(InstructBlipVideoQFormerConfig(**(CONFIG | options)))
        return randomise(model, seed).eval()

    def text(self, queries: Tensor, ids: Tensor, model: nn.Module) -> dict[str, Any]:
        """The arguments that stand for queries and text together."""
        if self.name == "blip2":
            table = torch.randn(VOCABULARY, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
            rows = table.to(queries.dtype)[ids]
            if queries.shape[1] == 0:
                return {"query_embeds": rows, "query_length": 0}
            return {"query_embeds": torch.cat((queries, rows), 1), "query_length": queries.shape[1]}
        return {"input_ids": ids, "query_embeds": queries if queries.shape[1] else None}

    def only_queries(self, queries: Tensor) -> dict[str, Any]:
        return {"query_embeds": queries} | ({} if self.name == "blip2" else {"input_ids": None})


KINDS = [Kind("blip2"), Kind("instructblip"), Kind("instructblipvideo")]


def draw(seed: int, batch: int = 3, *, images: int | None = None, queries: int = QUERIES) -> dict[str, Tensor]:
    """One row of query tokens, image features, and text that is padded on the right, in fp64."""
    generator = torch.Generator().manual_seed(100 + seed)
    lengths = torch.tensor([6, 3, 1, 5, 2, 4])[torch.arange(batch) % 6]
    return {
        "tokens": torch.randn(1, queries, DIM, generator=generator, dtype=torch.float64),
        "image": torch.randn(images or batch, TOKENS, IMAGE, generator=generator, dtype=torch.float64),
        "ids": torch.randint(3, VOCABULARY - 5, (batch, 6), generator=generator),
        "text_mask": (torch.arange(6) < lengths.unsqueeze(1)).long(),
    }


def arguments(kind: Kind, which: str, drawn: dict[str, Tensor], tokens: Tensor, image: Tensor) -> dict[str, Any]:
    """Of one of the three passes, with query tokens and image as given."""
    rows = drawn["ids"].shape[0]
    queries = tokens.expand(rows, -1, -1)
    seen = {"encoder_hidden_states": image, "encoder_attention_mask": torch.ones(image.shape[:2], dtype=torch.long)}
    if which == "queries":
        return kind.only_queries(queries) | seen
    mask = drawn["text_mask"]
    if which == "text only":
        return kind.text(queries[:, :0], drawn["ids"], None) | {"attention_mask": mask}
    mask = torch.cat((torch.ones(rows, tokens.shape[1], dtype=torch.long), mask), 1)
    return kind.text(queries, drawn["ids"], None) | {"attention_mask": mask} | seen


def projections(model: nn.Module, given: dict[str, Any], grad: bool = False) -> Recorder:
    """What a call computes."""
    with torch.set_grad_enabled(grad), recording() as record:
        model(**given)
    return record


def opt() -> OPTConfig:
    return OPTConfig(
        vocab_size=100, hidden_size=40, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=40,
        max_position_embeddings=128, pad_token_id=1, bos_token_id=2, eos_token_id=2, dropout=0.0,
    )  # fmt: skip


def t5() -> T5Config:
    return T5Config(
        vocab_size=100, d_model=40, d_kv=10, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1, dropout_rate=0.0,
    )  # fmt: skip


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=100, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _options(language: str, **qformer: Any) -> dict[str, Any]:
    text = {"opt": opt, "t5": t5, "llama": llama}[language]()
    return {
        "vision_config": dict(VISION),
        "qformer_config": CONFIG | qformer,
        "text_config": text,
        "num_query_tokens": QUERIES,
    }


def retrieval(seed: int = 0, **qformer: Any) -> Blip2ForImageTextRetrieval:
    """A retrieval model whose texts hold no image tokens."""
    config = Blip2Config(**_options("opt", **{"use_qformer_text_input": True} | qformer), image_text_hidden_size=16)
    return randomise(Blip2ForImageTextRetrieval(config), seed).eval()


def generator(name: str, language: str = "opt", seed: int = 0, **qformer: Any) -> nn.Module:
    """A model that generates: "blip2", "instructblip" or "instructblipvideo", over OPT, T5 or Llama."""
    options = _options(language, **qformer)
    if name == "blip2":
        model = Blip2ForConditionalGeneration(Blip2Config(**options, image_token_index=IMAGE_TOKEN))
    elif name == "instructblip":
        config = InstructBlipConfig(**options, image_token_index=IMAGE_TOKEN)
        model = InstructBlipForConditionalGeneration(config)
    else:
        config = InstructBlipVideoConfig(**options, video_token_index=IMAGE_TOKEN)
        model = InstructBlipVideoForConditionalGeneration(config)
    return randomise(model, seed).eval()


def prompt(name: str, seed: int = 0, *, padded: bool = False, frames: int = 2) -> dict[str, Tensor]:
    """Inputs of a generating model for two samples; `padded` puts padding to the left of the second."""
    g = torch.Generator().manual_seed(200 + seed)
    tokens = QUERIES * (frames if name == "instructblipvideo" else 1)
    ids = torch.cat((torch.full((2, tokens), IMAGE_TOKEN), torch.randint(3, 80, (2, 5), generator=g)), 1)
    mask = torch.ones_like(ids)
    if padded:
        ids[1] = torch.cat((torch.full((3,), 1), ids[1, :-3]))
        mask[1, :3] = 0
    shape = (2, frames, 3, 28, 28) if name == "instructblipvideo" else (2, 3, 28, 28)
    inputs = {
        "pixel_values": torch.randn(shape, generator=g, dtype=torch.float64),
        "input_ids": ids,
        "attention_mask": mask,
    }
    if name != "blip2":
        drawn = draw(seed, 2)
        inputs |= {"qformer_input_ids": drawn["ids"], "qformer_attention_mask": drawn["text_mask"]}
    return inputs
