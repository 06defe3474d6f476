"""What a whole step takes, as the allocator sees it, against the sums of the plan, at a usual depth.

Weights are there before the step. Beyond them it takes activations, gradients and the optimiser's states, which the plan
adds up, and what one block needs for a moment, which it leaves out: the deeper the model, the less that is. Checkpointing
leaves little else to be held, so there it shows more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from bench.measure import peak_memory
from mllm_fast.finetune import (
    BatchShape,
    Lora,
    TrainingSettings,
    build_optimizer,
    language_model_loss,
    prepare_finetuning,
)
from mllm_fast.models import Flamingo, FlamingoConfig
from mllm_fast.quantization import quantize_llm

LAYERS, SAMPLES, TOKENS, IMAGE = 32, 2, 128, 199
SIZES = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 200}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
bf16, fp32 = torch.bfloat16, torch.float32


class Patches(nn.Module):
    """A vision model: [I, 1, 16, 6] to [I, 16, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.squeeze(1))
        return y


def llava() -> tuple[nn.Module, Tensor]:
    text = LlamaConfig(**SIZES, intermediate_size=172)
    vision = CLIPVisionConfig(**VISION, patch_size=14, projection_dim=8)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config), torch.randn(SAMPLES, 3, 28, 28)


def blip2() -> tuple[nn.Module, Tensor]:
    text = {**SIZES, "model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 64, "dropout": 0.0}
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    qformer = {**sizes, "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = Blip2Config(
        vision_config={**VISION, "patch_size": 14}, qformer_config=qformer, text_config=text,
        num_query_tokens=4, image_token_index=IMAGE,
    )  # fmt: skip
    return Blip2ForConditionalGeneration(config), torch.randn(SAMPLES, 3, 28, 28)


def flamingo() -> tuple[nn.Module, Tensor]:
    lm = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=172))
    config = FlamingoConfig(
        media_token_id=IMAGE, vision_dim=32, every=4, latents=8, resampler_depth=2, resampler_heads=2,
        resampler_head_dim=16, heads=4, head_dim=16,
    )  # fmt: skip
    return Flamingo(lm, Patches(), config), torch.randn(SAMPLES, 1, 1, 16, 6)


CASES: dict[str, tuple[Any, str, int]] = {
    "llava": (llava, "projection+lora", 4),
    "blip2": (blip2, "bridge", 4),
    "flamingo": (flamingo, "bridge", 1),
}


@pytest.mark.parametrize(
    ("checkpointing", "dtype", "share"), [("none", fp32, 0.1), ("none", bf16, 0.1), ("recompute", fp32, 0.17)], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_a_whole_step(name: str, checkpointing: Any, dtype: torch.dtype, share: float) -> None:
    build, train, images = CASES[name]
    torch.manual_seed(0)
    model, pictures = build()
    model.to(dtype).train()
    quantize_llm(model, "nf4", compute_dtype=dtype)
    ids = torch.randint(0, 190, (SAMPLES, TOKENS))
    ids[:, :images] = IMAGE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == IMAGE, -100)}
    batch["images" if name == "flamingo" else "pixel_values"] = pictures.to(dtype)
    shape = BatchShape(SAMPLES, TOKENS, 1, TOKENS - images, 16 if name == "flamingo" else None)
    lora = Lora(r=8) if "lora" in train else None
    plan = prepare_finetuning(model, train, lora=lora, batch=shape, checkpointing=checkpointing)
    optimizer = build_optimizer(plan.trained, TrainingSettings(3))

    def loss() -> Tensor:
        with plan.autocast("cpu"):
            return language_model_loss(model, batch)

    loss().backward()  # what is made once and stays, such as stacked weights
    optimizer.zero_grad()

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    kinds = ("activations", "gradients", "optimizer")
    expected = sum(getattr(row, kind) for row in plan.rows for kind in kinds)
    measured = peak_memory(step, torch.device("cpu")).peak
    assert abs(expected - measured) <= share * measured, f"expected {expected}, measured {measured}"
