"""A tiny Flamingo to train, as a module and as a command that a test can kill: `python -m tests.finetune.runs FOLDER ...`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_fast.finetune import FinetuningPlan, Lora, TrainingSettings, language_model_loss, prepare_finetuning, train
from mllm_fast.quantization import quantize_llm
from tests.models import helpers


class Captions:
    """Rows of different lengths, each with one image that is augmented with every generator there is."""

    def __init__(self, rows: int = 21, *, augment: bool = True) -> None:
        self.rows = rows
        self.augment = augment

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        drawn = torch.Generator().manual_seed(row)
        length = 4 + row % 4
        ids = torch.randint(5, 40, (length,), generator=drawn)
        ids[0] = helpers.IMAGE
        labels = ids.clone()
        labels[: 1 + row % 3] = -100
        image = torch.randn(1, 2, 4, 3, generator=drawn)
        if self.augment:
            noise = np.random.standard_normal() + random.random()  # noqa: NPY002  # what augmentations draw from
            image = image + 0.1 * torch.randn_like(image) + 0.1 * noise
        return {"input_ids": ids, "labels": labels, "images": image}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch = {"images": torch.stack([sample["images"] for sample in samples])}
    for name, padding in (("input_ids", helpers.PAD), ("labels", -100)):
        rows = [nn.functional.pad(s[name], (0, longest - len(s[name])), value=padding) for s in samples]
        batch[name] = torch.stack(rows)
    return batch | {"attention_mask": (batch["input_ids"] != helpers.PAD).long()}


def loss(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weighted by what is supervised, so that it does not matter which rows share a pass."""
    labels = batch["labels"]
    return {"loss": language_model_loss(model, batch), "count": (labels[:, 1:] != -100).sum()}


def plan(kind: str = "nf4", train: str = "bridge+lora", dropout: float = 0.3) -> FinetuningPlan:
    """A plan over a frozen language model in 4 bits, or "dense"; the same weights every time."""
    model = helpers.flamingo()
    if kind != "dense":
        quantize_llm(model, kind, compute_dtype=torch.float32)
    lora = Lora(r=2, dropout=dropout) if "lora" in train else None
    made = prepare_finetuning(model, train, lora=lora)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.trained.items():
            if "lora_B" in name:  # zeros hide errors
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=drawn))
    return made


def settings(steps: int = 6, **changes: Any) -> TrainingSettings:
    defaults = {
        "batch_size": 3, "accumulation": 2, "learning_rate": 5e-3, "warmup_steps": 2, "log_every": 1, "seed": 3,
    }  # fmt: skip
    return TrainingSettings(steps, **{**defaults, **changes})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--kind", default="nf4")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    told = settings(**arguments.settings)

    def reporting(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        sys.stdout.write("pass\n")
        sys.stdout.flush()
        return loss(model, batch)

    result = train(
        plan(arguments.kind), reporting, Captions(), collate, told, arguments.output,
        resume=arguments.resume, progress=False,
    )  # fmt: skip
    sys.stdout.write(json.dumps(dataclasses.asdict(result) | {"output": None}) + "\n")


if __name__ == "__main__":
    main()
