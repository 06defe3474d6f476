"""Frozen decoder layers that are trained through: values, gradients and kept bytes against transformers and PEFT."""

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
from transformers import DynamicCache

import mllm_fast
from mllm_fast.families import decoder_layers as family
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
Results = dict[str, Tensor]


@functools.cache
def pretrained(name: str, kind: str, compute: torch.dtype) -> nn.Module:
    """A frozen model of a class of transformers, with random norms and biases; bitsandbytes' own layers."""
    torch.manual_seed(0)
    heads = {} if name == "Llama" else {"num_key_value_heads": 2}
    extra: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if name == "Llama" else {}
    config = getattr(transformers, f"{name}Config")(**SIZES, **heads, **extra, attn_implementation="sdpa")
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.2) if parameter.ndim == 1 else parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.to(torch.bfloat16))
    if kind != "dense":
        mllm_fast.quantize_llm(model, kind, compute_dtype=compute)  # type: ignore[arg-type]
        mllm_fast.unfuse(model)
    return model.requires_grad_(False)


def adapted(
    name: str = "Llama",
    kind: str = "nf4",
    dtype: torch.dtype = torch.float32,
    *,
    targets: tuple[str, ...] = SEVEN,
    compute: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """The model with PEFT's LoRA, B not zero."""
    model = copy.deepcopy(pretrained(name, kind, compute or dtype))
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


def fused(model: nn.Module) -> nn.Module:
    ours = copy.deepcopy(model)
    report = mllm_fast.fuse(ours, training=True)
    assert sum("DecoderLayer" in row.now for row in report.fused) == 2
    return ours


def inputs(dtype: torch.dtype = torch.float32, *, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, SIZES["hidden_size"], generator=generator).to(dtype)
    mask = torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[1, 5:] = 0
    return {"inputs_embeds": x, "attention_mask": mask}


def results(model: nn.Module, given: dict[str, Tensor], **kwargs: Any) -> Results:
    """The last hidden states, and every gradient of a fixed functional of them."""
    x = given["inputs_embeds"].clone().requires_grad_()
    model.zero_grad()
    base: Any = model.model  # type: ignore[union-attr]
    y = base(**given | {"inputs_embeds": x}, use_cache=False, **kwargs).last_hidden_state
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(ours: Results, theirs: Results, tolerance: float = 5e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, reference in theirs.items():
        assert ours[name].dtype == reference.dtype, name
        assert error(ours[name], reference.double()) < tolerance, name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each layer that ran its own way."""
    seen: list[Any] = []
    original: Callable[..., Tensor] = family.gated_mlp

    def counted(*args: Any) -> Tensor:
        seen.append(args)
        return original(*args)

    monkeypatch.setattr(family, "gated_mlp", counted)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_values_and_gradients(name: str, kind: str, calls: list[Any]) -> None:
    upstream = adapted(name, kind)
    ours = fused(upstream)
    expected = results(upstream, inputs())
    assert len(expected) == 2 + 2 * 2 * len(SEVEN)
    close(results(ours, inputs()), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("down_proj",)], ids=str)
def test_some_adapters(targets: tuple[str, ...], calls: list[Any]) -> None:
    upstream = adapted(targets=targets)
    given = inputs(padded=False)
    close(results(fused(upstream), given), results(upstream, given))
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, calls: list[Any]) -> None:
    """bf16 around fp32 adapters: at most twice the error of transformers and PEFT, for the output and every gradient."""
    upstream = adapted("Mistral", kind, torch.bfloat16)
    exact = results(adapted("Mistral", kind, torch.float32), inputs())
    given = inputs(torch.bfloat16)
    theirs, mine = results(upstream, given), results(fused(upstream), given)
    assert calls
    assert mine.keys() == theirs.keys() == exact.keys()
    for name, true in exact.items():
        assert mine[name].dtype == theirs[name].dtype
        assert error(mine[name], true.double()) <= 2 * error(theirs[name], true.double()) + 1e-6, name


def test_autocast(calls: list[Any]) -> None:
    """An fp32 stream between layers that compute in bf16, as behind a bridge that is trained in fp32."""
    upstream = adapted("Llama", "nf4", compute=torch.bfloat16)
    exact = results(adapted("Llama", "nf4"), inputs())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = results(upstream, inputs()), results(fused(upstream), inputs())
    assert len(calls) == 2
    for name, true in exact.items():
        assert mine[name].dtype == theirs[name].dtype
        assert error(mine[name], true.double()) <= 2 * error(theirs[name], true.double()) + 1e-6, name


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_kept_for_backward(trained: bool) -> None:
    """Per token 6 h and 2 f numbers, the ranks of the adapters, the logsumexps and nothing that grows otherwise."""
    model = fused(adapted(targets=("q_proj", "v_proj") if trained else ()))
    h, f, heads, layers, tokens = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"], 2, 14
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    base: Any = model.model
    given = inputs(padded=False) | {"inputs_embeds": inputs()["inputs_embeds"].requires_grad_()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = base.layers[1](base.layers[0](given["inputs_embeds"], **_positions(base, given)), **_positions(base, given))
    rank = 2 * 4 if trained else 0
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 4 * tokens * layers * (
        6 * h + 2 * f + heads + rank
    )
    assert y.requires_grad


def _positions(base: Any, given: dict[str, Tensor]) -> dict[str, Any]:
    # Held by a name, so that they are nobody's but the caller's.
    if not hasattr(base, "known_positions"):
        ids = torch.arange(given["inputs_embeds"].shape[1])[None]
        base.known_positions = base.rotary_emb(given["inputs_embeds"], ids)
        for number, t in enumerate(base.known_positions):
            base.register_buffer(f"position_{number}", t)
    return {"position_embeddings": base.known_positions}
