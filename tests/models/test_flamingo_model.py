"""Flamingo as a model of transformers: saved, loaded and placed whole; samples alone and together; over many models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, CLIPConfig, T5Config

import mllm_fast
from mllm_fast.models import Flamingo, FlamingoForConditionalGeneration, FlamingoModelConfig
from tests.models.flamingo_models import GREEDY, IMAGE, PAD, TEXTS, VISION, VISIONS, alone, config, flamingo, prompts


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ("llama", "clip"),
        ("gpt2", "siglip"),
        ("opt", "vit"),
        ("gpt_neox", "dinov2"),
        ("mpt", "clip"),
        ("biogpt", "clip"),
    ],
)
def test_each_sample_is_what_it_is_alone(text: str, vision: str) -> None:
    model, inputs = flamingo(text, vision), prompts()
    logits = model(**inputs).logits
    together = {beams: model.generate(**inputs, num_beams=beams, **GREEDY) for beams in (1, 3)}
    for row in range(3):
        own, pad = alone(inputs, row), int((inputs["attention_mask"][row] == 0).sum())
        torch.testing.assert_close(model(**own).logits[0], logits[row, pad:], rtol=1e-4, atol=1e-5)
        for beams, ids in together.items():
            assert torch.equal(model.generate(**own, num_beams=beams, **GREEDY)[0], ids[row, pad:])
    torch.testing.assert_close(logits, flamingo(text, vision)(**inputs).logits)
    changed = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    assert (model(**changed).logits - logits).abs()[:2].amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize(("vision", "prefix"), [("clip", 1), ("siglip", 0), ("vit", 1), ("dinov2", 4)])
def test_which_vision_features_are_read(vision: str, prefix: int) -> None:
    model, pixels = flamingo(vision=vision), prompts()["pixel_values"].flatten(0, 1)
    tower = model.model.vision_encoder.tower
    out = tower(pixel_values=pixels, output_hidden_states=True)
    assert out.last_hidden_state.shape == (6, prefix + 4, VISION)
    assert torch.equal(model.model.vision_encoder(pixels), out.last_hidden_state[:, prefix:])
    every = flamingo(vision=vision, vision_tokens="all", vision_layer=-2).model.vision_encoder
    every.tower.load_state_dict(tower.state_dict())
    assert torch.equal(every(pixels), out.hidden_states[-2])


def test_saved_and_loaded_by_the_auto_classes(tmp_path: Path) -> None:
    model, inputs = flamingo(max_frames=2, max_images=3, previous_images=True), prompts()
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), FlamingoModelConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), FlamingoForConditionalGeneration)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, FlamingoForConditionalGeneration)
    assert loaded.config.to_dict()["max_images"] == 3
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.generate(**inputs, do_sample=False, eos_token_id=None).shape == (3, 7 + 3)
    assert (
        _trained(loaded) == _trained(model) == {n for n in model.state_dict() if ".resampler." in n or ".blocks." in n}
    )
    half = FlamingoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(**inputs).logits.dtype == torch.bfloat16  # with fp32 pixels


def _trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("text", ["gpt2", "opt", "mpt"])
def test_a_language_model_whose_head_is_its_embeddings(tmp_path: Path, text: str) -> None:
    model, inputs = flamingo(text), prompts()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded, info = FlamingoForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_a_new_bridge_begins_as_the_language_model_alone() -> None:
    torch.manual_seed(0)
    lm: Any = AutoModelForCausalLM.from_config(TEXTS["gpt2"]())
    tower: Any = AutoModel.from_config(VISIONS["vit"]())
    parts: tuple[Any, ...] = lm, tower
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    model = FlamingoForConditionalGeneration.from_parts(lm.double(), tower, image_token_id=IMAGE, every=3, latents=3)
    assert model.model.lm is lm and model.model.vision_encoder.tower is tower
    for part, kept in zip(parts, before, strict=True):
        assert all(torch.equal(v.double(), kept[k].double()) for k, v in part.state_dict().items())
    inputs = prompts()
    model.eval(), tower.double()
    mask = inputs["attention_mask"]
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    text = lm(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions).logits
    assert torch.equal(model(**inputs).logits, text)
    resampler: Any = model.model.resampler
    assert 0.01 < float(resampler.latents.detach().std()) < 0.04
    assert torch.all(resampler.norm.weight == 1) and float(resampler.layers[0]["to_q"].weight.detach().std()) > 0.01
    assert model.generation_config is lm.generation_config


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_parts_in_several_places(tmp_path: Path, where: str) -> None:
    """Weights of some parts lie elsewhere and are brought for each call, as accelerate does it."""
    model, inputs = flamingo(max_images=2), prompts()
    model.save_pretrained(tmp_path)
    device_map = {name: "cpu" for name, _ in model.model.named_children()}
    device_map |= {"blocks.0": where, "blocks.1": "cpu", "resampler": where, "vision_encoder": "cpu"}
    del device_map["blocks"]
    placed = FlamingoForConditionalGeneration.from_pretrained(
        tmp_path, device_map={f"model.{k}": v for k, v in device_map.items()}, offload_folder=tmp_path / "offloaded"
    )
    assert placed.model.blocks[0].to_q.weight.device.type == ("meta" if where == "disk" else "cpu")
    torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits)
    text = {k: inputs[k] for k in ("attention_mask",)} | {"input_ids": inputs["input_ids"].clamp(min=IMAGE + 1)}
    torch.testing.assert_close(placed(**text).logits, model(**text).logits)
    assert torch.equal(
        placed.generate(**inputs, num_beams=2, **GREEDY), model.generate(**inputs, num_beams=2, **GREEDY)
    )


def test_an_automatic_device_map_splits_no_block() -> None:
    from accelerate import infer_auto_device_map

    model = flamingo()
    assert {"GatedCrossAttentionBlock", "PerceiverResampler", "LlamaDecoderLayer"} <= set(model._no_split_modules)
    size = sum(p.numel() * 4 for p in model.parameters())
    placed = infer_auto_device_map(model, {0: size // 2, "cpu": size}, no_split_module_classes=model._no_split_modules)
    assert set(placed.values()) == {0, "cpu"}
    whole = ("model.resampler", "model.blocks.0", "model.blocks.1", *(f"model.lm.model.layers.{i}" for i in range(4)))
    for name in whole:
        assert not any(key.startswith(f"{name}.") for key in placed), placed


def test_training_with_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, inputs = flamingo().train(), prompts()
        assert not model.model.vision_encoder.training
        if checkpointing:
            # Before transformers 5.20 it had the other name alone.
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
            assert all(hook.checkpoint for hook in model.model._layer_hooks)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == PAD, -100)
        loss = model(**inputs, labels=labels).loss
        model(**(inputs | {"pixel_values": inputs["pixel_values"] + 1}))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        if checkpointing:
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
            assert not any(hook.checkpoint for hook in model.model._layer_hooks)
    masked = labels.masked_fill(labels == IMAGE, -100)
    assert torch.equal(loss, model(**inputs, labels=masked).loss)
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_resized_embeddings(tmp_path: Path) -> None:
    model = flamingo()
    model.resize_token_embeddings(44)
    assert model.config.text_config.vocab_size == 44
    assert model(**prompts()).logits.shape[-1] == 44
    model.save_pretrained(tmp_path)
    assert torch.equal(
        FlamingoForConditionalGeneration.from_pretrained(tmp_path)(**prompts()).logits, model(**prompts()).logits
    )


def test_the_same_as_the_bridge_by_itself() -> None:
    """Nothing is added to `Flamingo` but the way in."""
    model, inputs = flamingo(), prompts()
    core = Flamingo(model.model.lm, model.model.vision_encoder, model.config.bridge)
    core.load_state_dict(model.model.state_dict())
    given: dict[str, Tensor] = {k: v for k, v in inputs.items() if k != "pixel_values"}
    expected = core(images=inputs["pixel_values"], **given).logits
    assert torch.equal(model(**inputs).logits, expected)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_mask"]).pooler_output
    assert features.shape == (3, 2, 3, VISION)
    assert torch.equal(model(image_features=features, **given).logits, expected)


def test_clear_errors() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"text_config": T5Config()}, "expected a decoder-only language model"),
        ({"vision_config": CLIPConfig()}, "without a hidden_size"),
        ({"vision_tokens": "some"}, "choose 'patches' or 'all'"),
        ({"p_next": 1.5}, "expected a probability"),
        ({"p_next": 0.5, "previous_images": True}, "choose one of them"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            FlamingoModelConfig(**options)
    inputs = prompts()
    with pytest.raises(ValueError, match=r"sample 0 has 2 media tokens .* but 1 images"):
        flamingo()(**(inputs | {"image_mask": torch.tensor([[1, 0], [1, 0], [0, 0]])}))
    with pytest.raises(ValueError, match="every=9 leaves no gated block"):
        FlamingoForConditionalGeneration(config(every=9))


def test_loaded_with_a_quantised_language_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    flamingo().save_pretrained(tmp_path)
    model: Any = mllm_fast.load(tmp_path, llm="nf4", device="cpu")
    assert type(model.model.lm.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    kept = (*model.model.blocks.modules(), *model.model.resampler.modules(), *model.model.vision_encoder.modules())
    assert not any("4bit" in type(module).__name__ for module in kept)
    assert _trained(model) == _trained(flamingo())
    assert model(**prompts()).logits.shape == (3, 7, 40)
