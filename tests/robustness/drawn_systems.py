"""More of `drawn_models`: vision layers, whole models of BLIP, BLIP-2 and MiniGPT-4, decoder layers, quantised layers."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import peft
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

from tests.families import blip_models, builders, frozen_decoders, qformers, test_blip2_models, test_vision_layers
from tests.families.instruments import Results
from tests.families.quantized_layers import exact_weight, layer4, layer8
from tests.models import minigpt4_models
from tests.robustness.drawn_models import Drawn, logits, normal, passing, seeds, widened

NAMES = ("blip2", "instructblip", "instructblipvideo")


@st.composite
def vision_models(draw: st.DrawFn) -> Drawn:
    """The vision models of BLIP-2 and InstructBLIP: rows of other grids where positions are interpolated."""
    kind, attention = draw(st.sampled_from(NAMES)), draw(st.sampled_from(["sdpa", "eager"]))
    options = {"qkv_bias": draw(st.booleans()), "hidden_act": draw(st.sampled_from(["gelu", "relu", "quick_gelu"]))}
    model = test_vision_layers.build(kind, draw(seeds), attention, **options).double()
    other, size = draw(st.booleans()), (draw(st.sampled_from([28, 42])), draw(st.sampled_from([28, 56])))

    def call(module: nn.Module, pixels: Tensor) -> Tensor:
        states: Tensor = module(pixels, interpolate_pos_encoding=other).last_hidden_state
        return states

    shape = size if other else (28, 28)
    return Drawn(model, passing(call, {"pixels": normal(draw(st.integers(1, 3)), 3, *shape)}))


@st.composite
def generators(draw: st.DrawFn) -> Drawn:
    """BLIP-2 and InstructBLIP with all that is around the Q-Former."""
    name, language = draw(st.sampled_from(NAMES)), draw(st.sampled_from(["opt", "t5"]))
    layers = {"num_hidden_layers": draw(st.integers(1, 4)), "cross_attention_frequency": draw(st.integers(1, 3))}
    model = qformers.generator(name, language, draw(seeds), **layers).double()
    given = qformers.prompt(name, draw(seeds), padded=draw(st.booleans()))
    inputs = test_blip2_models.labelled(given, language)
    return Drawn(model, passing(logits, inputs))


@st.composite
def blip2_retrieval(draw: st.DrawFn) -> Drawn:
    model = qformers.retrieval(draw(seeds), num_hidden_layers=draw(st.integers(1, 4))).double()
    matching = draw(st.booleans())
    images = draw(st.integers(1, 4))
    texts = images if matching else draw(st.integers(1, 5))

    def call(module: nn.Module, **inputs: Tensor) -> Tensor:
        scores: Tensor = module(**inputs, use_image_text_matching_head=matching).logits_per_image
        return scores

    return Drawn(model, passing(call, test_blip2_models.pairs(images, texts)))


@st.composite
def blip_heads(draw: st.DrawFn) -> Drawn:
    """Captioning, question answering and retrieval of BLIP."""
    head = draw(st.sampled_from([BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval]))
    options = {"num_hidden_layers": draw(st.integers(1, 3)), "num_attention_heads": draw(st.sampled_from([1, 2, 8]))}
    model = blip_models.model(head, draw(seeds), **options).double()
    # Of padding on the left, which sees nothing, outputs are upstream's and gradients are not: no loss may lie there.
    left, given = 0, {}
    if head is BlipForConditionalGeneration:
        given = draw(st.sampled_from([{}, {"labels": blip_models.LABELS}, {"logits_to_keep": 3}]))
        left = draw(st.integers(0, 2)) if "labels" in given else 0
    elif head is BlipForQuestionAnswering:
        given = {"labels": blip_models.LABELS.clamp_min(0)}
    else:
        given, left = {"use_itm_head": draw(st.booleans())}, draw(st.integers(0, 4))
    return Drawn(model, lambda module: blip_models.task(module, left, **given))


@st.composite
def minigpt4s(draw: st.DrawFn) -> Drawn:
    kind, has_qformer = draw(st.sampled_from(["llama", "gpt2", "opt"])), draw(st.booleans())
    model = minigpt4_models.minigpt4(kind, draw(seeds), has_qformer=has_qformer).double()
    rows = minigpt4_models.QUERIES if has_qformer else minigpt4_models.PATCHES // 4
    return Drawn(model, passing(logits, widened(minigpt4_models.inputs(rows))))


@st.composite
def decoder_layers(draw: st.DrawFn) -> Drawn:
    """Frozen decoder layers with LoRA beside any of their linear layers."""
    name = draw(st.sampled_from(["Llama", "Mistral", "Qwen2", "OPT"]))
    linear = frozen_decoders.SIX if name == "OPT" else frozen_decoders.SEVEN
    targets = draw(st.sets(st.sampled_from(linear), min_size=1).map(sorted))
    model = frozen_decoders.adapted(name, "dense", torch.float64, targets=tuple(targets)).double()
    given = frozen_decoders.inputs(torch.float64, padded=draw(st.booleans()))
    return Drawn(model, lambda module: frozen_decoders.results(module, given), options={"training": True})


@st.composite
def idefics_decoder_layers(draw: st.DrawFn) -> Drawn:
    """A gated layer is trained, and the language model above it only read."""
    model: Any = builders.idefics(seed=draw(seeds), resampler=False, qk_norms=False).double().train()
    model.requires_grad_(False)
    model.model.gated_cross_attn_layers[draw(st.integers(0, 1))].requires_grad_(True)
    kind = draw(st.sampled_from(["incremental", "scattered", "everything"]))
    inputs = builders.idefics_inputs(kind, draw(st.integers(1, 3)), 11, draw(st.integers(1, 3)), seed=draw(seeds))
    return Drawn(model, passing(logits, widened(inputs)), options={"training": True})


class Dense(nn.Module):
    """What a quantised layer stands for, in fp64."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.register_buffer("matrix", exact_weight(layer))
        self.register_buffer("offset", None if layer.bias is None else layer.bias.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.offset)


class Net(nn.Module):
    """Just enough of a model for PEFT to adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q_proj = layer
        self.is_loaded_in_4bit = isinstance(layer, bnb.nn.Linear4bit)
        self.is_loaded_in_8bit = isinstance(layer, bnb.nn.Linear8bitLt)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q_proj(x)
        return out


@st.composite
def quantised_layers(draw: st.DrawFn, *, lora: bool) -> Drawn:
    rows, columns = draw(st.integers(1, 5)) * 8, draw(st.sampled_from([32, 64, 72, 128]))
    shape, bias = draw(st.sampled_from([(1,), (5,), (2, 3), (3, 1, 7)])), draw(st.booleans())
    kind = draw(st.sampled_from(["nf4", "fp4", "int8"]))
    if kind == "int8":
        layer: Any = layer8(rows, columns, seed=draw(seeds), bias=bias)
    else:
        options = {"blocksize": draw(st.sampled_from([32, 64, 128])), "nested": draw(st.booleans())}
        layer = layer4(
            rows, columns, seed=draw(seeds), quant_type=kind, bias=bias, compute_dtype=torch.float64, **options
        )
    model, peer = Net(layer), Net(Dense(layer))
    if lora:
        config = peft.LoraConfig(r=draw(st.integers(1, 4)), lora_alpha=6, target_modules=["q_proj"])
        peft.inject_adapter_in_model(config, model)
        adapter: Any = model.q_proj
        nn.init.normal_(adapter.lora_B.default.weight, std=0.3)
        adapter.lora_A.double(), adapter.lora_B.double()
        peer = LoraPeer(Dense(layer), adapter)

    def results(module: nn.Module) -> Results:
        return passing(lambda module, x: module(x), {"x": x}, torch.float64)(module)

    x = normal(*shape, columns)
    return Drawn(model, results, peer)


class LoraPeer(nn.Module):
    """A dense layer with the low-rank term of PEFT's, under PEFT's names."""

    def __init__(self, dense: Dense, adapter: Any) -> None:
        super().__init__()
        self.q_proj = nn.Module()
        self.q_proj.base_layer = dense
        self.q_proj.lora_A, self.q_proj.lora_B = adapter.lora_A, adapter.lora_B
        self.scale = adapter.scaling["default"]

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.q_proj
        term: Tensor = layer.lora_B.default(layer.lora_A.default(x))
        return layer.base_layer(x) + self.scale * term  # type: ignore[no-any-return]


SYSTEMS: dict[str, st.SearchStrategy[Drawn]] = {
    "vision models of blip2": vision_models(),
    "blip2 and instructblip": generators(),
    "blip2 retrieval": blip2_retrieval(),
    "blip heads": blip_heads(),
    "minigpt4": minigpt4s(),
    "decoder layers": decoder_layers(),
    "decoder layers of idefics": idefics_decoder_layers(),
    "layers of bitsandbytes": quantised_layers(lora=False),
    "layers of bitsandbytes with lora": quantised_layers(lora=True),
}
