"""The stages that systems are trained in, each ready to run: what is trained, the published settings, prompts and loss.

    run_stage("minigpt4-projection", model=model, processor=processor, data=CaptionFolder("pictures"), output="run", steps=500)

Settings are the published ones unless they are given. Published warm-ups belong to long runs: unless it is given, a warm-up
takes at most a tenth of the steps.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..families.recipes import unwrapped
from .checkpointing import Checkpointing
from .collation import IGNORED, Collate, collator_for
from .data import Part
from .evaluation import Evaluate
from .features import FeatureCache
from .loop import train as run_loop
from .lora import ALL_LINEAR, Lora
from .loss import can_skip_logits, language_model_loss
from .memory import BatchShape
from .plan import FinetuningPlan
from .prepare import prepare_finetuning
from .settings import Loss, TrainingResult, TrainingSettings

__all__ = ["STAGES", "Stage", "StageRun", "caption_loss", "pair_loss", "prepare_stage", "run_stage", "stage_named"]

# A warm-up that nobody asked for takes at most this share of a run.
_LONGEST_WARMUP = 0.1


def caption_loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Mean cross entropy of the supervised tokens, and their number as "count".

    Without the logits, where the head is frozen and the last thing that the model computes; else the model's own loss.
    """
    labels = batch["labels"]
    config: Any = unwrapped(model).config
    shifted = not config.get_text_config(decoder=True).is_encoder_decoder
    loss = language_model_loss(model, batch) if can_skip_logits(model) else model(**batch).loss
    return {"loss": loss, "count": (labels[:, shifted:] != IGNORED).sum()}


def pair_loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model of pairs says of a batch: "loss", and the objectives that it is the sum of."""
    return dict(model(**batch))


@dataclass(frozen=True)
class Stage:
    """One stage of one system's training.

    Attributes:
        name: as `run_stage` and a configuration take it.
        models: names of the classes that it trains.
        train: parts, as `prepare_finetuning` takes them.
        settings: of `TrainingSettings`, as published; `batch_size` is that of an update, over all processes.
        epochs: as published.
        source: where the settings are published, and what differs here.
        warmup: share of the steps, where it is not `warmup_steps` in `settings`.
        lora: low-rank terms, where `train` has them.
        prompt: for samples without one.
        plain: the image alone stands before the caption.
        max_caption_tokens: longer captions are cut.
        loss: of model and batch.
    """

    name: str
    models: tuple[str, ...]
    train: str
    settings: Mapping[str, Any]
    epochs: float
    source: str
    warmup: float | None = None
    lora: Lora | None = None
    prompt: str = ""
    plain: bool = False
    max_caption_tokens: int | None = None
    loss: Loss = field(default=caption_loss, repr=False)

    def training_settings(self, rows: int, **given: Any) -> TrainingSettings:
        """The stage's settings for so many samples.

        Args:
            rows: of the data set.
            **given: of `TrainingSettings`, in place of the published ones; or `epochs` in place of `steps`.

        Raises:
            ValueError: both `epochs` and `steps`, an unknown setting, a value out of range, or fewer rows than a batch.
        """
        known = [*TrainingSettings.names(), "epochs"]
        if unknown := [name for name in given if name not in known]:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            raise ValueError(
                f"there is no setting {unknown[0]!r}{f'; did you mean {close[0]!r}?' if close else ''} Settings are "
                f"{', '.join(known)}"
            )
        if "epochs" in given and "steps" in given:
            raise ValueError("both epochs and steps are given; leave one of them out")
        epochs = given.pop("epochs", self.epochs)
        values = {**self.settings, **given}
        update = values.get("batch_size", 8) * values.get("accumulation", 1)
        if rows < update and "steps" not in given:
            raise ValueError(f"the data set has {rows} samples, and an update takes {update}; give a smaller batch_size")
        steps = values.setdefault("steps", max(1, math.floor(epochs * rows / update)))
        if "warmup_steps" not in given:
            wanted = self.settings.get("warmup_steps", steps if self.warmup is None else round(self.warmup * steps))
            values["warmup_steps"] = min(wanted, int(_LONGEST_WARMUP * steps)) if self.warmup is None else wanted
        if values.get("schedule", "cosine") != "cosine":
            values.pop("minimum_learning_rate", None) if "minimum_learning_rate" not in given else None
        elif "minimum_learning_rate" not in given and "learning_rate" in given and "minimum_learning_rate" in values:
            # It goes with the published learning rate: keep their ratio.
            values["minimum_learning_rate"] *= given["learning_rate"] / self.settings["learning_rate"]
        return TrainingSettings(**values)


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
                "batch_size": 128, "learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 5000, "weight_decay": 0.1,
            },  # fmt: skip
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
                "batch_size": 100, "learning_rate": 1e-4, "minimum_learning_rate": 1e-5, "warmup_steps": 5000,
                "weight_decay": 0.05, "max_grad_norm": None,
            },  # fmt: skip
            epochs=10,
            source="LAVIS projects/blip2/train/pretrain_stage1.yaml; its warm-up starts at 1e-6 and not at 0",
            max_caption_tokens=32,
            loss=pair_loss,
        ),
        Stage(
            "blip2-stage2",
            models=_BLIP2,
            train="bridge",
            settings={
                "batch_size": 64, "learning_rate": 1e-4, "minimum_learning_rate": 1e-5, "warmup_steps": 2000,
                "weight_decay": 0.05, "max_grad_norm": None,
            },  # fmt: skip
            epochs=10,
            source="LAVIS projects/blip2/train/pretrain_stage2.yaml; its warm-up starts at 1e-6 and not at 0",
            max_caption_tokens=32,
        ),
        Stage(
            "minigpt4-projection",
            models=("MiniGPT4ForConditionalGeneration",),
            train="projection",
            settings={
                "batch_size": 64, "learning_rate": 1e-4, "minimum_learning_rate": 8e-5, "warmup_steps": 5000,
                "weight_decay": 0.05, "max_grad_norm": None,
            },  # fmt: skip
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
                "batch_size": 256, "learning_rate": 2e-5, "minimum_learning_rate": 1e-6, "warmup_steps": 50,
                "weight_decay": 1e-4,
            },  # fmt: skip
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


@dataclass
class StageRun:
    """A stage before it runs: `print(run.plan)` shows what it costs.

    Attributes:
        stage: which.
        plan: the model, prepared.
        settings: of the loop.
        collate: samples to batches.
        dataset, evaluation_dataset: what is trained on, and what is held out.
        features: folder of the feature cache, None without.
    """

    stage: Stage
    plan: FinetuningPlan
    settings: TrainingSettings
    collate: Collate
    dataset: Any
    evaluation_dataset: Any = None
    features: Path | None = None

    def train(
        self, output: str | Path, *, evaluate: Evaluate | None = None, resume: bool = False, progress: bool = True
    ) -> TrainingResult:
        """Run it; arguments as in `loop.train`."""
        with contextlib.ExitStack() as entered:
            if self.features is not None:
                entered.enter_context(FeatureCache(self.plan.model, self.features))
            return run_loop(
                self.plan,
                self.stage.loss,
                self.dataset,
                self.collate,
                self.settings,
                output,
                evaluation_dataset=self.evaluation_dataset,
                evaluate=evaluate,
                resume=resume,
                progress=progress,
            )


def prepare_stage(
    stage: str | Stage,
    *,
    model: nn.Module,
    processor: Any,
    data: Any,
    held_out: Any = None,
    features: str | Path | None = None,
    train: str | None = None,
    lora: Lora | None = None,
    trained_dtype: torch.dtype = torch.float32,
    checkpointing: Checkpointing = "none",
    prompt: str | None = None,
    max_caption_tokens: int | None = None,
    collate: Collate | None = None,
    **settings: Any,
) -> StageRun:
    """All of a stage but its running: the model is prepared in place.

    Args:
        stage: a name in `STAGES`, or a stage of one's own.
        model: of one of the stage's classes, on its device.
        processor: its own.
        data: samples to train on (see `data`).
        held_out: samples to evaluate on.
        features: keep the frozen vision model's features in this folder (see `features`).
        train, lora, prompt, max_caption_tokens: in place of the stage's own.
        trained_dtype, checkpointing: of `prepare_finetuning`.
        collate: samples to a batch, in place of the model's own collation; samples may then be anything.
        **settings: of `TrainingSettings`, or `epochs`; in place of the published ones.

    Raises:
        ValueError: a model that the stage does not train, data without a sample, or settings that do not fit.
    """
    stage = stage_named(stage) if isinstance(stage, str) else stage
    _check_model(stage, model)
    if not len(data):
        raise ValueError("the data set is empty; expected samples to train on")
    chosen = stage.training_settings(len(data), **settings)
    collate = collate or collator_for(
        model,
        processor,
        prompt=stage.prompt if prompt is None else prompt,
        plain=stage.plain,
        max_caption_tokens=max_caption_tokens or stage.max_caption_tokens,
    )
    parts = stage.train if train is None else train
    wants_lora = "lora" in (name.strip() for name in parts.split("+"))
    plan = prepare_finetuning(
        model,
        parts,
        lora=(lora or stage.lora) if wants_lora else lora,
        trained_dtype=trained_dtype,
        checkpointing=checkpointing,
        optimizer=chosen.optimizer,
        batch=_shape(collate, data, chosen),
    )
    folder = None if features is None else Path(features)
    if folder is not None:
        with FeatureCache(model, folder):  # whether it can be, before anything runs
            pass
    return StageRun(stage, plan, chosen, collate, data, held_out, folder)


def run_stage(
    stage: str | Stage,
    *,
    model: nn.Module,
    processor: Any,
    data: Any,
    output: str | Path,
    held_out: Any = None,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> TrainingResult:
    """Train a model through one stage.

    Args:
        stage, model, processor, data, held_out: as in `prepare_stage`.
        output: the run's folder: `trained.safetensors` holds what was trained.
        evaluate, resume, progress: as in `loop.train`.
        **options: of `prepare_stage`: `features`, `train`, `lora`, ..., and settings.
    """
    run = prepare_stage(stage, model=model, processor=processor, data=data, held_out=held_out, **options)
    return run.train(output, evaluate=evaluate, resume=resume, progress=progress)


def _check_model(stage: Stage, model: nn.Module) -> None:
    names = [cls.__name__ for cls in type(unwrapped(model)).__mro__]
    if any(name in stage.models for name in names):
        return
    own = [other.name for other in STAGES.values() if any(name in other.models for name in names)]
    raise ValueError(
        f"stage {stage.name!r} trains {' or '.join(stage.models)}, and the model is a {names[0]}, which "
        + (f"has {', '.join(own)}" if own else "has no stage")
    )


def _shape(collate: Collate, data: Any, settings: TrainingSettings) -> BatchShape | None:
    """Of a batch of the first samples; None where it holds no text."""
    count = min(len(data), settings.batch_size)
    batch = collate([data[i] for i in range(count)])
    ids, labels, pixels = (batch.get(name) for name in ("input_ids", "labels", "pixel_values"))
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    supervised = None if labels is None else int((labels != IGNORED).sum(1).max())
    images = 0 if pixels is None else pixels.shape[1] if pixels.dim() > 4 else -(-len(pixels) // count)
    return BatchShape(settings.batch_size, ids.shape[1], images, supervised)


def describe(stage: Stage) -> str:
    """A stage in one line, for `mllm-fast finetune --list`."""
    return f"{stage.name}: trains {stage.train} of {' or '.join(stage.models)} ({stage.source})"


_ = Part  # samples of a split are a dataset too
