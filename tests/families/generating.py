"""The systems that generate text from images, tiny, behind one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import blip_models, llava_models, qformers
from tests.families.builders import idefics, idefics_inputs, of_inputs, of_model
from tests.models import helpers

NEW_TOKENS = 5


@dataclass(frozen=True)
class System:
    """One system: how to build it, its inputs, and the module inside of it whose `forward` runs at every step.

    Attributes:
        build: with random weights, upstream's own.
        inputs: arguments of `generate`, by seed; always of the same shapes.
        decoder: the model that generates.
        traceable: whether upstream's decode step can be compiled whole.
        static: whether upstream generates with a static cache at all.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    decoder: Callable[[nn.Module], nn.Module]
    traceable: bool = True
    static: bool = True

    def __str__(self) -> str:
        return self.name

    @torch.no_grad()
    def generate(self, model: nn.Module, seed: int = 0, **options: Any) -> Tensor:
        """Greedy token ids; every run gets copies of the inputs, because BLIP writes into its ids."""
        inputs = {name: x.clone() for name, x in self.inputs(seed).items()}
        settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        if self.name == "blip":
            del settings["pad_token_id"]
        return model.generate(**inputs, **(settings | options))[:, -NEW_TOKENS:]


def _float(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}


def _own_inputs(seed: int) -> dict[str, Tensor]:
    ids, mask, images, image_mask = helpers.prompts()
    images = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": mask, "images": images, "image_mask": image_mask}


def _qformer_system(name: str, language: str) -> System:
    return System(
        f"{name}_{language}",
        lambda: qformers.generator(name, language),
        lambda seed: _float(qformers.prompt(name, seed)),
        lambda model: model.language_model,
    )


SYSTEMS = (
    System(
        "open_flamingo", of_model, lambda seed: of_inputs(seed=seed), lambda model: model.lang_encoder, traceable=False
    ),
    System("idefics", idefics, lambda seed: idefics_inputs(seed=seed), lambda model: model),
    System(
        "blip",
        blip_models.model,
        lambda seed: blip_models.inputs(left=2, seed=seed),
        lambda model: model.text_decoder,
        static=False,
    ),
    *(_qformer_system(name, language) for name in ("blip2", "instructblip") for language in ("opt", "t5")),
    System(
        "llava", llava_models.model, lambda seed: llava_models.inputs(left=3, seed=seed), lambda model: model
    ),
    System("flamingo", helpers.flamingo, _own_inputs, lambda model: model.lm),
)  # fmt: skip
