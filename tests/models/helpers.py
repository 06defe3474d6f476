"""A tiny Flamingo whose gates are open and whose weights hide nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from mllm_fast.models import Flamingo, FlamingoConfig

PAD, IMAGE, VISION_DIM = 0, 3, 24
_IDS = {"vocab_size": 40, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


class Vision(nn.Module):
    """Images [N, 2, 4, 3] to patches [N, 4, 24]; counts the images it was given."""

    def __init__(self, dim: int = VISION_DIM) -> None:
        super().__init__()
        self.patches = nn.Linear(6, dim)
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += images.shape[0]
        return self.patches(images.permute(0, 2, 1, 3).flatten(2))


def language_model(kind: str = "llama", dim: int = 32) -> PreTrainedModel:
    """Four layers of width 32."""
    if kind == "llama":
        sizes = {"hidden_size": dim, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**sizes, **_IDS))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=dim, n_layer=4, n_head=4, **_IDS))
    if kind == "opt":
        sizes = {"hidden_size": dim, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
        return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, **_IDS))
    if kind == "gpt_neox":
        sizes = {"hidden_size": dim, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **_IDS))
    if kind == "mpt":
        return MptForCausalLM(MptConfig(d_model=dim, n_layers=4, n_heads=4, expansion_ratio=2, **_IDS))
    raise ValueError(kind)


def config(**changes: object) -> FlamingoConfig:
    """Two blocks, three media tokens an image."""
    sizes = {
        "media_token_id": IMAGE, "vision_dim": VISION_DIM, "every": 2, "latents": 3, "resampler_depth": 2,
        "resampler_heads": 2, "resampler_head_dim": 8, "heads": 2, "head_dim": 16,
    }  # fmt: skip
    return FlamingoConfig(**{**sizes, **changes})


@torch.no_grad()
def flamingo(kind: str = "llama", *, seed: int = 0, **changes: object) -> Flamingo:
    """With random weights of gain about 1 everywhere, and gates at 0.7."""
    torch.manual_seed(seed)
    model = Flamingo(language_model(kind), Vision(), config(**changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.fill_(0.7)
        elif parameter.ndim >= 2:
            parameter.normal_(std=1.0 if "latents" in name else parameter[0].numel() ** -0.5)
    return model


def prompts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [3, 7], attention mask, images [3, 2, ...] and image mask: two images; one, padded left; none at all."""
    ids = torch.tensor(
        [[IMAGE, 5, 6, 7, IMAGE, 8, 9], [PAD, PAD, 10, IMAGE, 11, 12, 13], [PAD, 14, 15, 16, 17, 18, 19]]
    )
    images = torch.randn(3, 2, 2, 4, 3)
    # The one image of the second sample stands behind a padding image.
    return ids, (ids != PAD).long(), images, torch.tensor([[True, True], [False, True], [False, False]])


GREEDY = {
    "max_new_tokens": 5,
    "do_sample": False,
    "suppress_tokens": [IMAGE],
    "eos_token_id": None,
    "pad_token_id": PAD,
}
