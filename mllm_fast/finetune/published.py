"""The stages that systems were published with, and where their settings are published."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from .lora import ALL_LINEAR, Lora
from .stage import Stage, pair_loss

_FLAMINGOS = ("FlamingoForConditionalGeneration", "IdeficsForVisionText2Text")
_BLIP2 = ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration")

STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "flamingo-bridge",
            models=_FLAMINGOS,
            train="bridge",
            settings={
                "batch_size": 128,
                "learning_rate": 1e-4,
                "schedule": "constant",
                "warmup_steps": 5000,
                "weight_decay": 0.1,
            },
            epochs=1,
            source=(
                "open_flamingo/train/train.py, its defaults for image-text pairs. There the embeddings of the two new tokens "
                "are trained too: train='bridge+embeddings'"
            ),
        ),
        Stage(
            "blip2-stage1",
            models=("Blip2Stage1",),
            train="bridge",
            settings={
                "batch_size": 100,
                "learning_rate": 1e-4,
                "minimum_learning_rate": 1e-5,
                "warmup_steps": 5000,
                "weight_decay": 0.05,
                "max_grad_norm": None,
            },
            epochs=10,
            source="LAVIS projects/blip2/train/pretrain_stage1.yaml; its warm-up starts at 1e-6 and not at 0",
            max_caption_tokens=32,
            loss=pair_loss,
            whole_batches=True,
        ),
        Stage(
            "blip2-stage2",
            models=_BLIP2,
            train="bridge",
            settings={
                "batch_size": 64,
                "learning_rate": 1e-4,
                "minimum_learning_rate": 1e-5,
                "warmup_steps": 2000,
                "weight_decay": 0.05,
                "max_grad_norm": None,
            },
            epochs=10,
            source="LAVIS projects/blip2/train/pretrain_stage2.yaml; its warm-up starts at 1e-6 and not at 0",
            max_caption_tokens=32,
        ),
        Stage(
            "minigpt4-projection",
            models=("MiniGPT4ForConditionalGeneration",),
            train="projection",
            settings={
                "batch_size": 64,
                "learning_rate": 1e-4,
                "minimum_learning_rate": 8e-5,
                "warmup_steps": 5000,
                "weight_decay": 0.05,
                "max_grad_norm": None,
            },
            epochs=1,
            source=(
                "MiniGPT-4 train_configs/minigpt4_stage1_pretrain.yaml (20,000 updates, less than an epoch of its data). Its "
                "second stage: learning_rate 3e-5, minimum_learning_rate 1e-5, warmup_steps 200, batch_size 12, steps 1000"
            ),
            prompt="Describe this image in detail.",
            max_caption_tokens=160,
        ),
        Stage(
            "llava-stage1",
            models=("LlavaForConditionalGeneration",),
            train="projection",
            settings={"batch_size": 256, "learning_rate": 1e-3, "schedule": "cosine", "weight_decay": 0.0},
            epochs=1,
            source=(
                "LLaVA scripts/v1_5/pretrain.sh: image and caption alone, which there ends with a line break and here with "
                "the token at which generation stops"
            ),
            warmup=0.03,
            plain=True,
        ),
        Stage(
            "llava-stage2",
            models=("LlavaForConditionalGeneration",),
            train="projection+lora",
            settings={"batch_size": 128, "learning_rate": 2e-4, "schedule": "cosine", "weight_decay": 0.0},
            epochs=1,
            source=(
                "LLaVA scripts/v1_5/finetune_lora.sh; there the projection has a learning rate of its own, 2e-5, here the "
                "one of all"
            ),
            warmup=0.03,
            lora=Lora(r=128, alpha=256.0, dropout=0.05, targets=(ALL_LINEAR,)),
            prompt="Describe the image.",
        ),
        Stage(
            "mplug-owl-lora",
            models=("MplugOwlForConditionalGeneration",),
            train="lora",
            settings={
                "batch_size": 256,
                "learning_rate": 2e-5,
                "minimum_learning_rate": 1e-6,
                "warmup_steps": 50,
                "weight_decay": 1e-4,
            },
            epochs=3,
            source=(
                "mPLUG-Owl train_it.sh and its pipeline/train.py: LoRA alone. The paper trains the abstractor with it: "
                "train='bridge+lora'"
            ),
            lora=Lora(r=8, alpha=32.0, dropout=0.05, targets=("q_proj", "v_proj")),
            prompt="Describe the image.",
        ),
    )
}


def stage_named(name: str) -> Stage:
    """A stage of `STAGES`.

    Raises:
        ValueError: there is none of that name; lists them.
    """
    if name not in STAGES:
        close = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise ValueError(f"there is no stage {name!r}{hint} Stages are {', '.join(STAGES)}")
    return STAGES[name]


def describe(stage: Stage) -> str:
    """A stage in one line, for `mllm-fast finetune --list`."""
    return f"{stage.name}: trains {stage.train} of {' or '.join(stage.models)} ({stage.source})"
