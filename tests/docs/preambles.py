"""What a reader of each page already has: tiny models with random weights, their inputs, and files.

A page's blocks run in the namespace that `namespace` gives for its name; pages that are not listed start with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_fast.models.llava_checkpoint import save_lora, save_projector
from mllm_fast.pipeline import drawn_image
from tests.cli import systems as cli_systems
from tests.families import llava_models, qformers
from tests.models import (
    flamingo_models,
    minigpt4_models,
    stage1_models,
    test_blip2_stage1,
    test_lavis_checkpoint,
    test_llava_checkpoint,
    test_mplug_owl_checkpoint,
)
from tests.quantization import systems

Namespace = dict[str, Any]


def _blip2() -> Namespace:
    """A BLIP-2 and a prompt about an image for it, two samples."""
    return {"model": systems.blip2(), "inputs": systems.inputs("blip2")}


def _readme(folder: Path) -> Namespace:
    systems.llava().save_pretrained(folder / "path" / "or" / "hub-name")
    return _blip2() | {"another_model": systems.llava()}


def _fusing(folder: Path) -> Namespace:
    return _blip2()


def _quantising(folder: Path) -> Namespace:
    """LLaVAs: one in memory, another one, and one in a folder."""
    systems.llava().save_pretrained(folder / "path" / "to" / "model")
    return {
        "model": systems.llava(),
        "another_model": systems.blip2(),
        "inputs": systems.inputs("llava"),
    }


def _finetuning(folder: Path) -> Namespace:
    """A LLaVA with a prompt; another one in a folder with its processor; and pictures with captions."""
    cli_systems.llava(folder / "path" / "to" / "model")
    pictures = folder / "pictures"
    pictures.mkdir()
    lines = ["image,caption"]
    for i in range(6):
        drawn_image(20 + i).save(pictures / f"{i}.png")
        lines.append(f"{i}.png,a picture of the image.")
    (pictures / "captions.csv").write_text("\n".join(lines) + "\n")
    return {"model": systems.llava(), "inputs": systems.inputs("llava")}


def _checkpoints(folder: Path) -> Namespace:
    """Files in the layouts of the originals, the parts that go with them, and models to load into."""
    from mllm_fast.models.flamingo_checkpoint import save_original

    vocabulary = flamingo_models.VOCABULARY
    heads = {"heads": 8, "head_dim": 4, "resampler_heads": 8, "resampler_head_dim": 4}  # 8, as all released models have
    flamingo = flamingo_models.flamingo(image_token_id=vocabulary - 1, **heads)
    save_original(flamingo, folder / "OpenFlamingo" / "checkpoint.pt")
    minigpt4_models.write_files(folder / "minigpt4", minigpt4_models.original_files(), minigpt4_models.llama())
    (folder / "minigpt4" / "llm").rename(folder / "minigpt4" / "vicuna")
    minigpt4_models.tokenizer().save_pretrained(folder / "minigpt4" / "vicuna")
    (folder / "llava-v1.5-7b").mkdir()
    state = test_llava_checkpoint.original(llava_models.model(1).state_dict())
    torch.save(state, folder / "llava-v1.5-7b" / "pytorch_model.bin")
    save_projector(llava_models.model(2), folder / "llava-stage1")
    adapted = llava_models.model(2)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"), adapted)
    save_lora(adapted, folder / "llava-lora")
    test_mplug_owl_checkpoint.write(folder / "mplug-owl-llama-7b", test_mplug_owl_checkpoint.original_state())
    torch.save(test_blip2_stage1.lavis_checkpoint(stage1_models.stage1()[0], True), folder / "blip2_pretrained.pth")
    for file, *case in (
        ("blip2_pretrained_opt2.7b", "blip2", "opt"), ("instruct_blip_vicuna7b_trimmed", "instructblip", "llama"),
    ):  # fmt: skip
        state = test_lavis_checkpoint.lavis_file(qformers.generator(*case), *case, whole=False)
        torch.save({"model": state}, folder / f"{file}.pth")
    return {
        "language_model": flamingo.model.lm, "vision_model": flamingo.model.vision_encoder.tower,
        "image_processor": CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False),
        "tokenizer": cli_systems.tokenizer(vocabulary - 2, {}), "config": minigpt4_models.config(),
        "llava": llava_models.model(), "stage1": stage1_models.stage1(1)[0], "blip2": qformers.generator("blip2"),
        "instructblip": qformers.generator("instructblip", "llama"),
    }  # fmt: skip


_PAGES: dict[str, Callable[[Path], Namespace]] = {
    "README.md": _readme,
    "docs/fusing.md": _fusing,
    "docs/quantising.md": _quantising,
    "docs/finetuning.md": _finetuning,
    "docs/checkpoints.md": _checkpoints,
    "docs/robustness.md": lambda folder: _blip2(),
}


def namespace(page: str, folder: Path) -> Namespace:
    """The names that the blocks of a page may use.

    Args:
        page: its path in the repository.
        folder: in which its blocks run, for files that they read.
    """
    return {"__name__": "__page__", **_PAGES.get(page, lambda folder: {})(folder)}
