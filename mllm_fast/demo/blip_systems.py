"""The BLIP family, LLaVA, MiniGPT-4 and mPLUG-Owl in part 1 of the demo: one image each, the last of the photographs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .photographs import Photograph, to_tensor
from .systems import BOS, EOS, IMAGE, PAD, VOCABULARY, Case, Size, System, Tick, greedy, prompt, randomise

SEPARATOR = 2  # BLIP's decoder stops at it; among the ids that are never generated here
QUERIES = 32


def blip(size: Size, photographs: list[Photograph]) -> Case:
    """BLIP captioning: a text decoder that reads the image in every layer, with 3 beams."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    config = BlipConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": size.text_dim,
            "intermediate_size": 4 * size.text_dim,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.text_dim // 64,
            "max_position_embeddings": 512,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "sep_token_id": SEPARATOR,
            "pad_token_id": PAD,
        },
        vision_config=_vision(size),
    )
    return _case(BlipForConditionalGeneration(config), {"pixel_values": _last(size, photographs)}, size, beams=3)


def blip2(size: Size, photographs: list[Photograph]) -> Case:
    """BLIP-2: a Q-Former of 32 queries before an OPT language model."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    config = Blip2Config(
        vision_config=_vision(size),
        qformer_config=_qformer(size),
        text_config=_opt(size),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    return _case(Blip2ForConditionalGeneration(config), _prompted(size, photographs, QUERIES), size)


def instructblip(size: Size, photographs: list[Photograph]) -> Case:
    """InstructBLIP: the Q-Former reads the instruction together with the image."""
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    config = InstructBlipConfig(
        vision_config=_vision(size),
        qformer_config=_qformer(size),
        text_config=_opt(size),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    instruction = torch.tensor([[BOS, *(byte + 5 for byte in b"Describe the photograph.")]])
    inputs = _prompted(size, photographs, QUERIES)
    inputs |= {"qformer_input_ids": instruction, "qformer_attention_mask": torch.ones_like(instruction)}
    return _case(InstructBlipForConditionalGeneration(config), inputs, size)


def llava(size: Size, photographs: list[Photograph]) -> Case:
    """LLaVA: every patch of a CLIP tower becomes a token of a Llama."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    patches = (size.image // 14) ** 2
    config = LlavaConfig(
        # The second last of its layers is read.
        vision_config=CLIPVisionConfig(**_vision(size) | {"num_hidden_layers": size.vision_layers + 1}),
        text_config=_llama(size),
        image_token_index=IMAGE,
        image_seq_length=patches,
    )
    return _case(LlavaForConditionalGeneration(config), _prompted(size, photographs, patches), size)


def minigpt4(size: Size, photographs: list[Photograph]) -> Case:
    """MiniGPT-4: the vision model and Q-Former of BLIP-2 and one linear layer before a Llama."""
    from ..models.minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration

    config = MiniGPT4Config(
        vision_config=_vision(size),
        qformer_config=_qformer(size),
        text_config=_llama(size),
        num_query_tokens=QUERIES,
        image_token_id=IMAGE,
    )
    return _case(MiniGPT4ForConditionalGeneration(config), _prompted(size, photographs, QUERIES), size)


def mplug_owl(size: Size, photographs: list[Photograph]) -> Case:
    """mPLUG-Owl: a visual abstractor of 64 queries before a Llama; an image is 65 of its tokens."""
    from ..models.mplug_owl import MplugOwlConfig, MplugOwlForConditionalGeneration

    heads = size.vision_dim // 64
    abstractor = {"hidden_size": size.vision_dim, "encoder_hidden_size": size.vision_dim, "num_attention_heads": heads}
    config = MplugOwlConfig(
        vision_config=_vision(size),
        visual_abstractor_config=abstractor | {"intermediate_size": size.vision_dim * 11 // 4},
        text_config=_llama(size),
        image_token_id=IMAGE,
    )
    inputs = _prompted(size, photographs, config.rows_per_image)
    return _case(MplugOwlForConditionalGeneration(config), inputs, size)


SYSTEMS = (
    System("BLIP, 3 beams (transformers)", (), blip),
    System("BLIP-2 (transformers)", (), blip2),
    System("InstructBLIP (transformers)", (), instructblip),
    System("LLaVA (transformers)", (), llava),
    System("MiniGPT-4 (mllm_fast)", (), minigpt4),
    System("mPLUG-Owl (mllm_fast)", (), mplug_owl),
)


def _vision(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.vision_dim,
        "intermediate_size": 4 * size.vision_dim,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_dim // 64,
        "image_size": size.image,
        "patch_size": 14,
    }


def _qformer(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.text_dim,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_dim // 64,
        "intermediate_size": 4 * size.text_dim,
        "max_position_embeddings": 512,
        "cross_attention_frequency": 2,
    }


def _opt(size: Size) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.text_dim,
        word_embed_proj_dim=size.text_dim,
        ffn_dim=4 * size.text_dim,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_dim // 64,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _llama(size: Size) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.text_dim,
        intermediate_size=size.text_dim * 8 // 3 // 64 * 64,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_dim // 64,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _last(size: Size, photographs: list[Photograph]) -> Tensor:
    return to_tensor(photographs[-1:], size.image)


def _prompted(size: Size, photographs: list[Photograph], tokens: int) -> dict[str, Tensor]:
    """The last photograph and a prompt that holds `tokens` places for it."""
    text = prompt(photographs[-1:])
    ids = torch.cat([torch.full((1, tokens), IMAGE), text[text != IMAGE].unsqueeze(0)], dim=1)
    return {"pixel_values": _last(size, photographs), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _case(model: Any, inputs: dict[str, Tensor], size: Size, beams: int = 1) -> Case:
    randomise(model.eval())
    text = inputs.get("input_ids", torch.tensor([[BOS]]))
    forward: Callable[[], Tensor] = lambda: model(**{**inputs, "input_ids": text}).logits  # noqa: E731

    def generate(new: int, tick: Tick) -> Tensor:
        return model.generate(**inputs, **greedy(new, tick), num_beams=beams)

    return Case(model, forward, generate, 1, size.new_tokens)
