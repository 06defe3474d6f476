"""A tiny model of every system with a recipe, and a loss of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

import mllm_fast
from mllm_fast.models.blip2_stage1 import Blip2Stage1
from tests.families import blip_models, builders, llava_models, qformers, test_idefics2, test_mllama
from tests.models import flamingo_models, helpers, minigpt4_models, mplug_owl_models, test_blip_pretraining
from tests.quantization import systems as quantizable

Batch = dict[str, Any]


@dataclass(frozen=True)
class System:
    """How a model is built, its batch, and its loss."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def _labelled(batch: Batch, name: str = "input_ids") -> Batch:
    ids = batch[name]
    return {**batch, "labels": torch.where((ids > 2) & (ids < 80), ids, -100)}


def _of_output(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def _retrieval(model: nn.Module, batch: Batch) -> Tensor:
    itm = "use_image_text_matching_head" if hasattr(model, "qformer") else "use_itm_head"
    scores = [model(**batch, **{itm: on}) for on in (True, False)]
    values = [s.logits_per_image if hasattr(s, "logits_per_image") else s.itm_score for s in scores]
    return sum((value.float().square().mean() for value in values), torch.zeros(()))


def _of_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**batch).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].roll(-1, 1).flatten())


def _palm(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["input_ids"], images=batch["images"])
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].roll(-1, 1).flatten())


def _summed(model: nn.Module, batch: Batch) -> Tensor:
    torch.manual_seed(5)  # its negatives are drawn
    return model(**batch)["loss"]


def _float(batch: Batch) -> Batch:
    return {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def _text_pairs() -> Batch:
    drawn = qformers.draw(0, 3)
    return {
        "input_ids": drawn["ids"],
        "attention_mask": drawn["text_mask"],
        "pixel_values": torch.randn(3, 3, 28, 28),
    }


def _palm_batch() -> Batch:
    batch = builders.of_inputs()
    return {"input_ids": batch["lang_x"], "images": torch.randn(2, 2, 5, 20)}


def _flamingo_batch() -> Batch:
    ids, mask, images, image_mask = helpers.prompts()
    return {"input_ids": ids, "attention_mask": mask, "images": images, "image_mask": image_mask, "labels": ids}


def _stage1() -> nn.Module:
    model = Blip2Stage1(qformers.retrieval(), bos_token_id=58, eos_token_id=57)
    builders.randomise(model.lm_head, 1)
    return model


SYSTEMS: dict[str, System] = {
    "open_flamingo": System(builders.of_model, lambda: _labelled(builders.of_inputs(), "lang_x"), _of_output),
    "flamingo_pytorch": System(builders.palm, _palm_batch, _palm),
    "flamingo": System(helpers.flamingo, _flamingo_batch, _of_output),
    "flamingo_hf": System(flamingo_models.flamingo, lambda: _labelled(flamingo_models.prompts()), _of_output),
    # Upstream's loss fails on a vocabulary with additional tokens.
    "idefics": System(builders.idefics, builders.idefics_inputs, _of_logits),
    "idefics2": System(test_idefics2.model, lambda: _labelled(_float(test_idefics2.inputs())), _of_output),
    "mllama": System(test_mllama.model, lambda: _labelled(_float(test_mllama.inputs())), _of_output),
    "blip": System(
        lambda: blip_models.model(BlipForConditionalGeneration), lambda: _labelled(blip_models.inputs()), _of_output
    ),
    "blip_vqa": System(
        lambda: blip_models.model(BlipForQuestionAnswering),
        lambda: {**blip_models.inputs(), "labels": blip_models.inputs()["input_ids"]},
        _of_output,
    ),
    "blip_retrieval": System(lambda: blip_models.model(BlipForImageTextRetrieval), blip_models.inputs, _retrieval),
    "blip_pretraining": System(
        lambda: test_blip_pretraining.build().float(), lambda: _float(test_blip_pretraining.batch()), _summed
    ),
    "blip2": System(
        lambda: qformers.generator("blip2"), lambda: _labelled(_float(qformers.prompt("blip2"))), _of_output
    ),
    "blip2_t5": System(
        lambda: qformers.generator("blip2", "t5"), lambda: _labelled(_float(qformers.prompt("blip2"))), _of_output
    ),
    "blip2_retrieval": System(qformers.retrieval, _text_pairs, _retrieval),
    "blip2_stage1": System(_stage1, _text_pairs, _summed),
    "instructblip": System(
        lambda: qformers.generator("instructblip"),
        lambda: _labelled(_float(qformers.prompt("instructblip"))),
        _of_output,
    ),
    "instructblipvideo": System(
        lambda: qformers.generator("instructblipvideo"),
        lambda: _labelled(_float(qformers.prompt("instructblipvideo"))),
        _of_output,
    ),
    "llava": System(llava_models.model, lambda: _labelled(llava_models.inputs()), _of_output),
    "minigpt4": System(minigpt4_models.minigpt4, lambda: _labelled(minigpt4_models.inputs()), _of_output),
    "mplug_owl": System(mplug_owl_models.owl, lambda: _labelled(mplug_owl_models.inputs()), _of_output),
}


def built(name: str) -> tuple[nn.Module, Batch]:
    """A model in training mode, with its batch; the same at every call."""
    torch.manual_seed(0)
    model = SYSTEMS[name].build()
    torch.manual_seed(1)
    return model.train(), SYSTEMS[name].batch()


def nf4(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model whose language model is quantised, in training mode."""
    model = quantizable.SYSTEMS[name]().to(dtype)
    mllm_fast.quantize_llm(model, "nf4")
    return model.train()


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refused request must leave as it was."""
    return {
        "modules": {name: (type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.dtype, p.data_ptr()) for name, p in model.named_parameters()},
    }
