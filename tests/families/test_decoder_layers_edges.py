"""Where a decoder layer that is trained through does what upstream does, and what around it stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache

import mllm_fast
from tests.families.frozen_decoders import SIX, adapted, close, fused, hooked, inputs, layers_of, results
from tests.families.quantized_layers import assert_equal_bytes, error, tensors


def _without_adapters(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def _trained_norm(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_(True)


def _wider_norm(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.double()


UPSTREAM: dict[str, Callable[[Any], Any]] = {
    "hook on the attention": hooked("self_attn"),
    "hook on the MLP": hooked("mlp"),
    "hook on a projection": hooked("mlp.up_proj"),
    "hook on a norm": hooked("input_layernorm"),
    "adapters off": _without_adapters,
    "trained norm": _trained_norm,
    "wider norm": _wider_norm,
}


# A decoder of LLaMA's kind, and OPT's with its other parts.
BOTH = pytest.mark.parametrize("name", ["Llama", "OPT"])


def model_of(name: str) -> Any:
    return adapted(name, targets=SIX) if name == "OPT" else adapted(name)


@pytest.mark.parametrize("name", UPSTREAM)
def test_what_upstream_does_itself(name: str, calls: list[Any]) -> None:
    upstream = adapted()
    ours = fused(upstream)
    for model in (ours, upstream):
        UPSTREAM[name](model)
    found, expected = results(ours, inputs()), results(upstream, inputs())
    close(found, expected)
    assert not calls


def test_dora(calls: list[Any]) -> None:
    upstream = adapted(use_dora=True, targets=("v_proj",))
    close(results(fused(upstream), inputs()), results(upstream, inputs()), 2e-5)
    assert not calls


@BOTH
def test_attention_weights_on_request(name: str, calls: list[Any]) -> None:
    """Eager attention is given a mask of floating point, which is added as it is."""
    upstream = model_of(name)
    ours = fused(upstream)
    for model in (ours, upstream):
        model.set_attn_implementation("eager")
    given = inputs()
    found, expected = (m.model(**given, output_attentions=True, use_cache=False) for m in (ours, upstream))
    assert not calls
    assert len(found.attentions) == 2
    for mine, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    close(results(ours, given), results(upstream, given))
    assert len(calls) == 2


def test_without_a_gradient(calls: list[Any]) -> None:
    ours, given = fused(adapted()), inputs()
    with torch.no_grad():
        ours(**given)
    frozen = fused(adapted(targets=()))
    frozen(**given)
    assert not calls


@BOTH
def test_hidden_states_on_request(name: str, calls: list[Any]) -> None:
    upstream, given = model_of(name), inputs()
    ours = fused(upstream)
    found, expected = (m(**given, output_hidden_states=True).hidden_states for m in (ours, upstream))
    assert len(found) == len(expected) == 3
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine, theirs.double()) < 5e-6
    # The recording leaves hooks behind, which do nothing from then on.
    close(results(ours, given), results(upstream, given), 1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["Mistral", "OPT"])
def test_a_cache_is_filled(name: str, calls: list[Any]) -> None:
    upstream, given = model_of(name), inputs(padded=False)
    ours = fused(upstream)
    caches = [DynamicCache(config=m.config) for m in (ours, upstream)]
    mine, theirs = (
        m.model(**given, past_key_values=cache, use_cache=True).last_hidden_state
        for m, cache in zip((ours, upstream), caches, strict=True)
    )
    assert len(calls) == 2
    assert error(mine, theirs.double()) < 5e-6
    for own, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert error(own.keys, other.keys.double()) < 5e-6
        assert torch.allclose(own.values, other.values, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, calls: list[Any]) -> None:
    upstream = adapted()
    ours = fused(upstream)
    expected = results(ours, inputs())
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(results(ours, inputs()), expected, 5e-6 if reentrant else 1e-12)
    assert len(calls) == (4 if reentrant else 6)  # reentrant: without a graph first, where upstream serves


def test_dropout(calls: list[Any]) -> None:
    """Of the terms alone; the pattern of backward is that of forward, and a seed gives it again."""
    ours = fused(adapted(kind="dense", lora_dropout=0.4))
    given = inputs(padded=False)
    torch.manual_seed(3)
    first = results(ours, given)
    torch.manual_seed(3)
    again = results(ours, given)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert error(results(ours, given)["y"], first["y"].double()) > 1e-3
    # The change of the functional along a direction is the gradient's, under one seed.
    slope = torch.stack([g.norm() for n, g in first.items() if "lora_" in n]).norm()
    direction = {n: g / slope for n, g in first.items() if "lora_" in n}
    values = []
    for step in (1e-2, -1e-2):
        moved = copy.deepcopy(ours)
        with torch.no_grad():
            for n, p in moved.named_parameters():
                if n in direction:
                    p.add_(step * direction[n])
        torch.manual_seed(3)
        y = results(moved, given)["y"]
        values.append((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).double().sum())
    assert abs((values[0] - values[1]) / 2e-2 - slope) < 1e-2 * abs(slope)
    for module in ours.modules():
        if type(module) is nn.Dropout:
            module.p = 1.0
    without = adapted(kind="dense")
    _without_adapters(without)
    assert error(results(ours, given)["y"], results(without, given)["y"].double()) < 5e-6
    assert calls


@BOTH
def test_fusing_and_unfusing(name: str) -> None:
    upstream = model_of(name)
    ours = copy.deepcopy(upstream)
    assert not [row for row in mllm_fast.fuse(ours).fused if "DecoderLayer" in row.now]
    report = mllm_fast.fuse(ours, training=True)
    assert {row.now for row in report.fused} == {f"Fused{name}DecoderLayer"}
    layer = layers_of(ours)[0]
    assert type(layer).__name__ == f"{name}DecoderLayer"
    assert isinstance(layer, type(layers_of(upstream)[0]))
    assert_equal_bytes(tensors(ours), tensors(upstream))
    twin = copy.deepcopy(ours)
    close(results(twin, inputs()), results(ours, inputs()), 1e-12)
    mllm_fast.unfuse(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in upstream.modules()]
    assert not [m for m in ours.modules() if "_mllm_fast" in vars(m)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_idefics(dropout: float, calls: list[Any]) -> None:
    """Its layers turn positions by themselves, and drop entries of both branches and of the attention's weights."""
    torch.manual_seed(0)
    config = transformers.IdeficsConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, dropout=dropout,
        vision_config={"embed_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    )  # fmt: skip
    upstream = transformers.IdeficsForVisionText2Text(config).requires_grad_(False).train()
    ours = copy.deepcopy(upstream)
    mllm_fast.fuse(ours, training=True)
    x, ids = torch.randn(2, 5, 32), torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    found = []
    for model in (ours, ours, upstream):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = model.model.layers[0](leaf, position_ids=ids)
        y.square().sum().backward()
        found.append({"y": y.detach(), "dx": leaf.grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert len(calls) == 2
    if dropout == 0.0:
        close(found[0], found[2])
    else:
        assert error(found[0]["y"], found[2]["y"].double()) > 1e-2  # other patterns


def test_compiles_without_a_break(calls: list[Any]) -> None:
    ours, given = fused(adapted()), inputs()
    expected = results(ours, given)
    counted = len(calls)
    torch.compiler.reset()
    for layer in ours.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    close(results(ours, given), expected, 1e-5)
    assert len(calls) == counted  # upstream's forward is what is traced
    torch.compiler.reset()
