"""Whole systems with a quantised language model: fused against unfused, generation, and LoRA through the frozen weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.quantization.selection import quantized_layers
from tests.families.quantized_layers import error, tensors
from tests.quantization import systems

every = pytest.mark.parametrize("name", systems.SYSTEMS)
kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])


def quantised(name: str, kind: str, compute_dtype: torch.dtype = torch.float32) -> nn.Module:
    model = systems.SYSTEMS[name]()
    options = {} if kind == "int8" else {"compute_dtype": compute_dtype, "double_quant": True}
    mllm_fast.quantize_llm(model, kind, **options)
    return model


def unfused(model: nn.Module) -> nn.Module:
    """bitsandbytes' own layers, which dequantise and multiply, as they do in train mode on a CPU."""
    twin = copy.deepcopy(model)
    mllm_fast.unfuse(twin)
    for layer in quantized_layers(twin).values():
        layer.support_avx512bf16_for_cpu = False
        if kind_of(layer) == "int8":
            layer.train()
    return twin


def kind_of(layer: nn.Module) -> str:
    return str(getattr(layer.weight, "quant_type", "int8"))


def generate(model: nn.Module, given: dict[str, Tensor], **options: Any) -> list[list[int]]:
    return model.generate(**given, max_new_tokens=6, do_sample=False, **options).tolist()


@every
@kinds
def test_fp32_gives_the_same_tokens_as_unfused(name: str, kind: str) -> None:
    model, given = quantised(name, kind), systems.inputs(name)
    upstream = unfused(model)
    report = mllm_fast.fuse(model)
    assert report.fused
    with torch.no_grad():
        expected = upstream(**given).logits
        torch.testing.assert_close(model(**given).logits, expected, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(systems.dense(model)(**given).logits, expected, atol=2e-4, rtol=2e-4)
    assert generate(model, given) == generate(upstream, given)
    assert generate(model, given, num_beams=3) == generate(upstream, given, num_beams=3)


@every
@kinds
def test_bf16(name: str, kind: str) -> None:
    """At most twice the error of bitsandbytes' layers in the unfused model, against fp32 over the same weights."""
    model = quantised(name, kind, torch.bfloat16)
    exact = systems.dense(model)
    half, given = copy.deepcopy(model), systems.inputs(name)
    for module in half.modules():  # transformers refuses to cast a quantised model
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
    upstream = unfused(half)
    mllm_fast.fuse(half)
    with torch.no_grad():
        reference = exact(**given).logits.double()
        ours, theirs = (m(**systems.inputs(name, torch.bfloat16)).logits for m in (half, upstream))
        assert error(ours, reference) <= 2 * error(theirs, reference)
    assert torch.tensor(generate(half, systems.inputs(name, torch.bfloat16))).shape[1] >= 10


@every
@kinds
def test_a_lora_step(name: str, kind: str) -> None:
    """Loss and every gradient as over the dequantised weights; then a step lowers the loss, and nothing frozen moves."""
    torch.manual_seed(0)
    model = quantised(name, kind)
    given = systems.inputs(name)
    labels = given["input_ids"].masked_fill(given["input_ids"] == systems.IMAGE, -100)
    config = peft.LoraConfig(
        r=4, target_modules=r".*(language_model|model\.layers).*\.(q_proj|v_proj)", lora_dropout=0.0
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    reference = systems.dense(model)
    mllm_fast.unfuse(reference)
    upstream = copy.deepcopy(model)
    mllm_fast.unfuse(upstream)
    fused = mllm_fast.fuse(model)
    layers = [row.path for row in fused.fused if row.now.startswith("FusedLora")]
    assert len(layers) == 2 * systems.LAYERS
    before = {n: t for n, t in tensors(model).items() if "lora" not in n}
    results = []
    for net in (model, upstream, reference):
        net.train()
        loss = net(**given, labels=labels).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in net.named_parameters() if "lora" in n and p.grad is not None}
        results.append((loss.detach(), grads))
    (ours, grads), (theirs, others), (true, exact) = results
    torch.testing.assert_close(ours, true, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, true, atol=1e-4, rtol=1e-4)
    assert grads.keys() == others.keys() == exact.keys()
    assert len(grads) == 4 * systems.LAYERS
    for key, gradient in exact.items():
        assert error(grads[key], gradient.double()) < max(1e-3, 2 * error(others[key], gradient.double())), key
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora" in n], 0.02)
    optimizer.step()
    with torch.no_grad():
        assert model(**given, labels=labels).loss < ours
    after = tensors(model)
    assert all(torch.equal(after[n], value) for n, value in before.items())


def test_validation_between_training_steps() -> None:
    """What bitsandbytes' CPU path cannot: evaluate, train, save, and the checkpoint is right."""
    model = quantised("llava", "nf4", torch.bfloat16)
    mllm_fast.fuse(model)
    given = systems.inputs("llava")
    before = tensors(model)
    for _ in range(2):
        model.eval()
        generate(model, given)
        model.train()
        model.model.multi_modal_projector.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        gradient = model.model.multi_modal_projector.linear_1.weight.grad
        assert gradient.abs().sum() > 0
    after = tensors(model)
    assert all(torch.equal(after[n], value) for n, value in before.items())


def test_gated_layers_in_4_bits() -> None:
    """For inference: the blocks call their quantised projections."""
    model = systems.idefics()
    mllm_fast.quantize_llm(model, "nf4", compute_dtype=torch.float32, gated_layers=True)
    upstream = systems.dense(model)  # their image width straddles blocks, which bitsandbytes gets wrong
    mllm_fast.fuse(model)
    given = systems.inputs("idefics")
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, upstream(**given).logits, atol=2e-4, rtol=2e-4)
    assert generate(model, given) == generate(upstream, given)
