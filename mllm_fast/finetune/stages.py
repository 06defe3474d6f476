"""Run a stage of a system's training: what is trained, the published settings, prompts and loss are the stage's.

    run_stage("minigpt4-projection", model=model, processor=processor, data=CaptionFolder("pictures"), output="run", steps=500)

Settings are the published ones unless they are given. Published warm-ups belong to long runs: unless it is given, a warm-up
takes at most a tenth of the steps.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..families.recipes import unwrapped
from .checkpointing import Checkpointing
from .collation import IGNORED, Collate, collator_for
from .evaluation import Evaluate
from .features import FeatureCache
from .loop import train as run_loop
from .lora import Lora
from .memory import BatchShape
from .plan import FinetuningPlan
from .prepare import prepare_finetuning
from .published import STAGES, stage_named
from .settings import TrainingResult, TrainingSettings
from .stage import Stage, caption_loss, pair_loss

__all__ = ["STAGES", "Stage", "StageRun", "caption_loss", "pair_loss", "prepare_stage", "run_stage", "stage_named"]


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
                whole_batches=self.stage.whole_batches,
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
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    chosen = stage.training_settings(len(data), processes, **settings)
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
    ids, labels, pixels, mask = (batch.get(name) for name in ("input_ids", "labels", "pixel_values", "attention_mask"))
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    # Labels of another length are those of an encoder-decoder's decoder, whose tokens these are not.
    known = labels is not None and labels.shape == ids.shape
    supervised = int((labels != IGNORED).sum(1).max()) if known else None
    images = 0 if pixels is None else pixels.shape[1] if pixels.dim() > 4 else -(-len(pixels) // count)
    padded = mask is not None and not bool(mask.all())
    return BatchShape(settings.batch_size, ids.shape[1], images, supervised, padded=padded)
