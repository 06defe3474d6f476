"""The vision layers of BLIP-2 and InstructBLIP (EVA's ViT-g) against upstream's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2VisionConfig, InstructBlipVideoVisionConfig, InstructBlipVisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipVisionModel
from transformers.models.instructblipvideo.modeling_instructblipvideo import InstructBlipVideoVisionModel

import mllm_fast
from tests.families.builders import randomise
from tests.families.instruments import Results, assert_same, check_precision, fused, recording, run_module

DIM, FFN, LAYERS, IMAGES, TOKENS = 36, 44, 3, 2, 5
KINDS = {
    "blip2": (Blip2VisionModel, Blip2VisionConfig),
    "instructblip": (InstructBlipVisionModel, InstructBlipVisionConfig),
    "instructblipvideo": (InstructBlipVideoVisionModel, InstructBlipVideoVisionConfig),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str = "blip2", seed: int = 0, implementation: str = "sdpa", **options: Any) -> nn.Module:
    model, config = KINDS[kind]
    sizes = {"hidden_size": DIM, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    made = model._from_config(
        config(**sizes, image_size=28, patch_size=14, **options), attn_implementation=implementation
    )
    return randomise(made, seed).eval()


def pixels(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(IMAGES, 3, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def layer_results(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> Results:
    """A layer by itself, forward and backward."""
    x = torch.randn(IMAGES, TOKENS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return run_module(model.encoder.layers[1], {"x": x}, dtype)


@kinds
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("level", [0, 1])
def test_outputs_and_gradients_equal_upstream(kind: str, qkv_bias: bool, level: int) -> None:
    upstream = build(kind, qkv_bias=qkv_bias)
    assert_same(layer_results(fused(upstream, level=level), torch.float64), layer_results(upstream, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    def run(model: nn.Module, seed: int, dtype: torch.dtype) -> Results:
        with torch.no_grad():
            return {"output": model.to(dtype)(pixels(seed, dtype)).last_hidden_state}

    check_precision(lambda seed: build(seed=seed), mllm_fast.fuse, run, dtype, seeds=range(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_training(dtype: torch.dtype) -> None:
    check_precision(
        lambda seed: build(seed=seed),
        mllm_fast.fuse,
        lambda model, seed, dtype: layer_results(model, dtype, seed),
        dtype,
        seeds=range(4),
    )


@kinds
def test_the_report_names_each_layer_and_the_model_stays_itself(kind: str) -> None:
    upstream = build(kind)
    model = copy.deepcopy(upstream)
    report = mllm_fast.fuse(model)
    name = type(upstream.encoder.layers[0]).__name__
    assert [row.now for row in report.fused] == [f"Fused{name}"] * LAYERS
    assert {type(layer).__name__ for layer in model.encoder.layers} == {name}
    assert list(model.state_dict()) == list(upstream.state_dict())
    with torch.no_grad():
        expected = model(pixels()).last_hidden_state
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(pixels()).last_hidden_state, expected)
        mllm_fast.unfuse(model)
        assert [type(layer) for layer in model.encoder.layers] == [type(layer) for layer in upstream.encoder.layers]
        assert torch.equal(model(pixels()).last_hidden_state, upstream(pixels()).last_hidden_state)


def test_a_layer_is_five_ops() -> None:
    """Four GEMMs over all rows, the attention's own two apart, and no copy."""
    model = fused(build())
    with torch.no_grad(), recording() as seen:
        model.encoder.layers[0](torch.randn(IMAGES, TOKENS, DIM))
    assert sorted((g.k, g.n) for g in seen.gemms if g.batch == 1) == [
        (DIM, DIM),
        (DIM, FFN),
        (DIM, 3 * DIM),
        (FFN, DIM),
    ]
    assert seen.count("clone") == 0


@kinds
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_recorded_outputs(kind: str, implementation: str) -> None:
    upstream = build(kind, implementation=implementation).double()
    asked = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    with torch.no_grad():
        ours, theirs = (model(pixels(dtype=torch.float64), **asked) for model in (fused(upstream), upstream))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == LAYERS + 1
    assert_same(dict(enumerate(ours.hidden_states)), dict(enumerate(theirs.hidden_states)))  # type: ignore[arg-type]
    if implementation == "eager":
        assert len(ours.attentions) == len(theirs.attentions) == LAYERS
        assert_same(dict(enumerate(ours.attentions)), dict(enumerate(theirs.attentions)))  # type: ignore[arg-type]


@pytest.mark.parametrize("child", ["self_attn", "mlp", "mlp.activation_fn", "self_attn.qkv", "mlp.fc2", "layer_norm1"])
def test_hooks_inside_a_layer_run(child: str) -> None:
    upstream = build().double()
    results = []
    for model in (fused(upstream), upstream):
        part = model.encoder.layers[1].get_submodule(child)
        part.register_forward_hook(lambda _, args, out: (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out)
        with torch.no_grad():
            results.append({"output": model(pixels(dtype=torch.float64)).last_hidden_state})
    assert_same(*results)


def test_dropout_is_active_in_training_alone() -> None:
    model = fused(build(attention_dropout=0.5)).train()
    with torch.no_grad():
        first, second = (model(pixels()).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(model.eval()(pixels()).last_hidden_state, model(pixels()).last_hidden_state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    upstream = build().double().train()
    found = []
    for model, checkpointed in ((fused(upstream), True), (upstream, False)):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        image = pixels(dtype=torch.float64).requires_grad_()
        model(image).last_hidden_state.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(gradients | {"d image": image.grad})
    assert_same(*found)


def test_prepacked_weights_and_weights_that_change() -> None:
    upstream = build()
    model = fused(upstream, prepack=True)
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for either in (model, upstream):
                either.encoder.layers[0].mlp.fc1.weight.mul_(factor)
            ours, theirs = (either(pixels()).last_hidden_state for either in (model, upstream))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
