"""Every system of the README's table fine-tunes: over a language model in NF4, the loss falls and what is frozen stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BlipForQuestionAnswering

import mllm_fast
from mllm_fast.finetune import can_skip_logits, language_model_loss
from mllm_fast.finetune.prepare import prepare_finetuning
from mllm_fast.quantization import adopt, quantize_llm
from tests.families import blip_models, builders, llava_models, qformers, test_idefics2, test_mllama
from tests.models import flamingo_models, minigpt4_models, mplug_owl_models
from tests.quantization import systems as quantised

STEPS = 6


@dataclass(frozen=True)
class System:
    """How to build one, what its batch is, and which parts to train."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Mapping[str, Any]]
    train: str
    quantised: bool = True
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None


def _labelled(inputs: Mapping[str, Any], ids: str = "input_ids", special: tuple[int, ...] = ()) -> dict[str, Any]:
    """Labels where there is text."""
    labels = inputs[ids].clone()
    labels[inputs.get("attention_mask", torch.ones_like(labels)) == 0] = -100
    for token in special:
        labels[labels == token] = -100
    return {**inputs, "labels": labels.masked_fill(labels < 0, -100)}


def _open_flamingo() -> dict[str, Any]:
    return _labelled(builders.of_inputs(), "lang_x")


def _palm_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    logits = model(batch["text"], images=batch["images"])
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["text"][:, 1:].flatten())


def _palm() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(5, 20, (2, 9), generator=generator)
    text[:, 2] = builders.palm().media_token_id
    return {"text": text, "images": torch.randn(2, 1, 6, 20, generator=generator)}


def _float(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def _idefics2() -> dict[str, Any]:
    torch.manual_seed(0)
    return _labelled(_float(test_idefics2.inputs()), special=(test_idefics2.IMAGE_TOKEN,))


def _mllama() -> dict[str, Any]:
    torch.manual_seed(0)
    return _labelled(_float(test_mllama.inputs()), special=(128,))


def _blip(head: type[nn.Module] | None = None) -> dict[str, Any]:
    inputs = blip_models.inputs()
    if head is BlipForQuestionAnswering:
        return {**inputs, "labels": inputs["input_ids"].clone()}
    return _labelled(inputs)


SYSTEMS = {
    "open_flamingo": System(builders.of_model, _open_flamingo, "bridge"),
    "open_flamingo, lora": System(builders.of_model, _open_flamingo, "bridge+lora"),
    "flamingo-pytorch": System(builders.palm, _palm, "bridge", quantised=False, loss=_palm_loss),
    "flamingo": System(
        flamingo_models.flamingo,
        lambda: _labelled(flamingo_models.prompts(), special=(flamingo_models.IMAGE,)),
        "bridge",
    ),
    # Upstream's own loss fails with embeddings added behind the vocabulary, as the other builder has them.
    "idefics": System(quantised.idefics, lambda: _labelled(quantised.inputs("idefics")), "bridge"),
    "idefics2": System(test_idefics2.model, _idefics2, "bridge"),
    "mllama": System(test_mllama.model, _mllama, "bridge"),
    "blip": System(blip_models.model, _blip, "decoder", quantised=False),
    "blip, answers": System(
        lambda: blip_models.model(BlipForQuestionAnswering),
        lambda: _blip(BlipForQuestionAnswering),
        "encoder+decoder",
        quantised=False,
    ),
    "blip-2": System(
        lambda: qformers.generator("blip2"),
        lambda: _labelled(qformers.prompt("blip2"), special=(qformers.IMAGE_TOKEN,)),
        "bridge",
    ),
    "instructblip": System(
        lambda: qformers.generator("instructblip"),
        lambda: _labelled(qformers.prompt("instructblip"), special=(qformers.IMAGE_TOKEN,)),
        "bridge+lora",
    ),
    "llava": System(
        llava_models.model,
        lambda: _labelled(llava_models.inputs(), special=(llava_models.IMAGE_TOKEN,)),
        "projection+lora",
    ),
    "minigpt-4": System(minigpt4_models.minigpt4, lambda: _labelled(minigpt4_models.inputs()), "projection"),
    "mplug-owl": System(mplug_owl_models.owl, lambda: _labelled(mplug_owl_models.inputs()), "bridge+lora"),
}


def _loss(system: System, model: Any, batch: Mapping[str, Any]) -> Tensor:
    if system.loss is not None:
        return system.loss(model, batch)
    return language_model_loss(model, batch) if can_skip_logits(model) else model(**batch).loss


@pytest.mark.parametrize("name", SYSTEMS)
def test_it_fine_tunes(name: str) -> None:
    system = SYSTEMS[name]
    model = system.build().train()
    if system.quantised:
        quantize_llm(model, "nf4", compute_dtype=torch.float32)
    twin = copy.deepcopy(model)
    plan = prepare_finetuning(model, system.train)
    assert plan.trained
    assert all(p.requires_grad == (n in plan.trained) for n, p in model.named_parameters())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in plan.trained}
    before = {n: p.detach().clone() for n, p in plan.trained.items()}
    batch = system.batch()
    optimizer = torch.optim.AdamW(plan.trained.values(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        torch.manual_seed(0)  # the same dropout: the losses are of one function
        with plan.autocast("cpu"):
            loss = _loss(system, model, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], losses
    assert all(p.grad is None for n, p in model.named_parameters() if n not in plan.trained)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    moved = [n for n, p in plan.trained.items() if not torch.equal(p, before[n])]
    assert len(moved) > 0.5 * len(before), sorted(set(before) - set(moved))

    # What was trained is all that has to be kept.
    other = prepare_finetuning(twin, system.train)
    other.load_trained(plan.trained_state_dict())
    model.eval()
    twin.eval()
    with torch.no_grad():
        assert torch.equal(_loss(system, model, batch), _loss(system, twin, batch))
    mllm_fast.unfuse(twin)
    adopt(twin)  # bitsandbytes' own layers do not take these widths
    with torch.no_grad():
        unfused = system.loss(twin, batch) if system.loss is not None else twin(**batch).loss
        torch.testing.assert_close(_loss(system, model, batch), unfused, rtol=1e-4, atol=1e-5)
