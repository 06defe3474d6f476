"""Small frozen language models of transformers with PEFT's LoRA, and what a training step through them gives."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import mllm_fast
from mllm_fast.families import decoder_layers
from mllm_fast.modules.decoder_layer import mlp_residual
from tests.families.quantized_layers import error

KINDS = ("nf4", "int8", "dense")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
SIX = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
OPT_SIZES = {
    "hidden_size": 64,
    "ffn_dim": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
    "dropout": 0.0,
}
Results = dict[str, Tensor]


@functools.cache
def pretrained(name: str, kind: str, compute: torch.dtype, activation: str | None = None) -> Any:
    """A frozen model of a class of transformers, with random norms and biases; bitsandbytes' own layers.

    `activation`: of an OPT, in place of its own.
    """
    torch.manual_seed(0)
    heads = {} if name == "Llama" else {"num_key_value_heads": 2}
    extra: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if name == "Llama" else {}
    sizes: dict[str, Any] = SIZES | heads | extra
    if name == "OPT":
        sizes = OPT_SIZES | ({} if activation is None else {"activation_function": activation})
    config = getattr(transformers, f"{name}Config")(**sizes, attn_implementation="sdpa")
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.2) if parameter.ndim == 1 else parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.to(torch.bfloat16))
    if kind == "nf4":
        mllm_fast.quantize_llm(model, "nf4", compute_dtype=compute)
    elif kind == "int8":
        mllm_fast.quantize_llm(model, "int8")
    mllm_fast.unfuse(model)
    return model.requires_grad_(False)


def adapted(
    name: str = "Llama",
    kind: str = "nf4",
    dtype: torch.dtype = torch.float32,
    *,
    targets: tuple[str, ...] = SEVEN,
    compute: torch.dtype | None = None,
    activation: str | None = None,
    **options: Any,
) -> Any:
    """The model with PEFT's LoRA, B not zero."""
    model = copy.deepcopy(pretrained(name, kind, compute or dtype, activation))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if targets:
        torch.manual_seed(1)
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets)} | options)
        peft.inject_adapter_in_model(config, model)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.float()
                if "lora_B" in key:
                    nn.init.normal_(parameter, std=0.2)
    return model.train()


def fused(model: Any) -> Any:
    ours = copy.deepcopy(model)
    report = mllm_fast.fuse(ours, training=True)
    assert sum("DecoderLayer" in row.now for row in report.fused) == 2
    return ours


def inputs(dtype: torch.dtype = torch.float32, *, padded: bool = True, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 7, SIZES["hidden_size"], generator=generator).to(dtype)
    mask = torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[1, 5:] = 0
    return {"inputs_embeds": x, "attention_mask": mask}


def results(model: Any, given: dict[str, Tensor], **kwargs: Any) -> Results:
    """The last hidden states, and every gradient of a fixed functional of them."""
    x = given["inputs_embeds"].clone().requires_grad_()
    model.zero_grad()
    y = model.model(**given | {"inputs_embeds": x}, use_cache=False, **kwargs).last_hidden_state
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def layers_of(model: Any) -> Any:
    """The decoder layers."""
    return getattr(model.model, "decoder", model.model).layers


def close(ours: Results, theirs: Results, tolerance: float = 5e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, reference in theirs.items():
        assert ours[name].dtype == reference.dtype, name
        assert error(ours[name], reference.double()) < tolerance, name


def count_layers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets an entry for each layer that runs its own way."""
    seen: list[Any] = []

    def counted(*args: Any) -> Tensor:
        seen.append(args)
        return mlp_residual(*args)

    monkeypatch.setattr(decoder_layers, "mlp_residual", counted)
    return seen


def hooked(path: str) -> Callable[[Any], Any]:
    """Doubles what the child at `path` of every layer gives."""
    return lambda model: [
        layer.get_submodule(path).register_forward_hook(
            lambda _, __, y: (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y
        )
        for layer in layers_of(model)
    ]
