"""language_model_loss against the loss that each model computes from its logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import mllm_fast
from mllm_fast.finetune import HeadHasToBeCalledError, can_skip_logits, language_model_loss
from mllm_fast.finetune.loss import language_model, output_head
from tests.families import builders, llava_models, qformers
from tests.models import flamingo_models, helpers


def supervised(ids: Tensor, vocabulary: int) -> Tensor:
    """Labels for some tokens."""
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(ids.shape, generator=generator) < 0.5
    return torch.where(keep, ids % vocabulary, -100)


def case(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "llava":
        return llava_models.model(), llava_models.inputs()
    if name in ("blip2-opt", "blip2-t5", "instructblip"):
        system, language = ("instructblip", "opt") if name == "instructblip" else name.split("-")
        return qformers.generator(system, language), qformers.prompt(system)
    if name == "flamingo-hf":
        return flamingo_models.flamingo(), flamingo_models.prompts()
    if name == "open_flamingo":
        return builders.of_model(), builders.of_inputs()
    model = helpers.flamingo()
    ids, mask, images, image_mask = helpers.prompts()
    return model, {"input_ids": ids, "attention_mask": mask, "images": images, "image_mask": image_mask}


NAMES = ["llava", "blip2-opt", "blip2-t5", "instructblip", "open_flamingo", "flamingo"]


def prepared(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, batch = case(name)
    model = model.double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    head = output_head(language_model(model)).requires_grad_(False)
    ids = batch.get("input_ids", batch.get("lang_x"))
    return model, {**batch, "labels": supervised(ids, head.weight.shape[0])}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_the_models_own(name: str) -> None:
    model, batch = prepared(name)
    theirs = model(**batch).loss
    expected = gradients(model, theirs)
    ours = language_model_loss(model, batch)
    # transformers computes losses in fp32.
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)
    found = gradients(model, ours)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert not output_head(language_model(model))._forward_pre_hooks


@pytest.mark.parametrize("name", ["llava", "blip2-t5", "flamingo-hf"])
def test_options(name: str) -> None:
    """Another mark for what does not count, smoothing, and sums, with images in the text."""
    model, batch = prepared(name)
    if name == "flamingo-hf":
        batch["labels"][batch["input_ids"] == model.config.image_token_id] = 6  # never predicted, whatever it says
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"} | _decoder_input(model, batch)).logits
    labels = batch["labels"]
    if name == "flamingo-hf":
        labels = model.supervised_labels(labels, batch["input_ids"])
    if name != "blip2-t5":
        logits, labels = logits[:, :-1], labels[:, 1:]
    other = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, -7)}
    for options in ({}, {"label_smoothing": 0.2}, {"reduction": "sum"}, {"label_smoothing": 0.2, "reduction": "sum"}):
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)
        torch.testing.assert_close(language_model_loss(model, other, ignore_index=-7, **options), expected)


def _decoder_input(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    lm = getattr(model, "language_model", None)
    if lm is None or not lm.config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": lm.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


def test_the_head_sees_no_rows() -> None:
    model, batch = prepared("llava")
    logits: list[tuple[int, ...]] = []
    output_head(model).register_forward_hook(lambda module, args, out: logits.append(tuple(out.shape)))
    with pytest.raises(HeadHasToBeCalledError, match="hooks or an adapter"):
        language_model_loss(model, batch)
    output_head(model)._forward_hooks.clear()
    seen: list[int] = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(out.logits.numel()))
    language_model_loss(model, batch)
    handle.remove()
    assert seen == [0]


@pytest.mark.parametrize("llm", ["nf4", "int8"])
def test_a_quantised_head(llm: str) -> None:
    model, batch = prepared("llava")
    model = model.float()
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    how = {} if llm == "int8" else {"compute_dtype": torch.float32}
    mllm_fast.quantize_llm(model, llm, include=["lm_head"], **how)
    mllm_fast.fuse(model)
    model.train()
    theirs = model(**batch).loss
    expected = gradients(model, theirs)
    ours = language_model_loss(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for key, value in gradients(model, ours).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


def test_a_softcap_is_that_of_the_configuration() -> None:
    config = Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(40)
    output_head(model).requires_grad_(False)
    ids = torch.randint(1, 60, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    torch.testing.assert_close(language_model_loss(model, batch), model(**batch).loss)
    model.config.final_logit_softcapping = None
    uncapped = copy.deepcopy(model)
    assert (language_model_loss(uncapped, batch) - model(**batch).loss).abs() < 1e-5


def test_what_it_refuses() -> None:
    model, batch = prepared("llava")
    with pytest.raises(ValueError, match="no labels"):
        language_model_loss(model, {k: v for k, v in batch.items() if k != "labels"})
    head = output_head(model)
    head.requires_grad_(True)
    assert not can_skip_logits(model)
    with pytest.raises(HeadHasToBeCalledError, match="the head is trained"):
        language_model_loss(model, batch)
    head.requires_grad_(False)
    assert can_skip_logits(model)
    model.config.get_text_config().logits_scaling = 8.0
    with pytest.raises(HeadHasToBeCalledError, match="logits_scaling"):
        language_model_loss(model, batch)
    del model.config.get_text_config().logits_scaling
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    with pytest.raises(HeadHasToBeCalledError, match="adapter"):
        language_model_loss(model, batch)
    with pytest.raises(HeadHasToBeCalledError, match="no output embeddings"):
        language_model_loss(nn.Linear(2, 2), batch)
