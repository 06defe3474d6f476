"""What a stage of training is: parts, published settings, prompts and the loss."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from ..families.recipes import unwrapped
from .collation import IGNORED
from .lora import Lora
from .loss import can_skip_logits, language_model_loss
from .settings import Loss, TrainingSettings

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
        whole_batches: the loss compares the samples of a batch with each other, so held-out samples that fill no batch are
            left out.
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
    whole_batches: bool = False

    def training_settings(self, rows: int, processes: int = 1, **given: Any) -> TrainingSettings:
        """The stage's settings for so many samples.

        Args:
            rows: of the data set.
            processes: that train together, and share the published batch.
            **given: of `TrainingSettings`, in place of the published ones; or `epochs` in place of `steps`.

        Raises:
            ValueError: both `epochs` and `steps`, an unknown setting, a value out of range, or fewer rows than a batch.
        """
        known = [*(f.name for f in fields(TrainingSettings)), "epochs"]
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
        if "batch_size" not in given:
            values["batch_size"] = max(1, values["batch_size"] // (processes * values.get("accumulation", 1)))
        update = values["batch_size"] * values.get("accumulation", 1) * processes
        if rows < update and "steps" not in given:
            raise ValueError(
                f"the data set has {rows} samples, and an update takes {update}; give a smaller batch_size"
            )
        steps = values.setdefault("steps", max(1, math.floor(epochs * rows / update)))
        if "warmup_steps" not in given:
            wanted = self.settings.get("warmup_steps", steps if self.warmup is None else round(self.warmup * steps))
            values["warmup_steps"] = min(wanted, int(_LONGEST_WARMUP * steps)) if self.warmup is None else wanted
        lowest = self.settings.get("minimum_learning_rate")
        if lowest is not None and "minimum_learning_rate" not in given:
            # It goes with the published learning rate and schedule: their ratio is kept.
            values["minimum_learning_rate"] = lowest * values["learning_rate"] / self.settings["learning_rate"]
            if values.get("schedule", "cosine") != "cosine":
                del values["minimum_learning_rate"]
        return TrainingSettings(**values)
