"""`mllm-fast finetune CONFIG.yaml`: from a configuration to a trained bridge, with nothing but the file to write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hub import asking
from ..models.blip2_stage1 import Blip2Stage1
from ..pipeline import load_pipeline
from .checkpoint import TRAINED_FILE, RunExistsError, check_unused
from .config import ConfigError, FinetuneConfig, read_config
from .data import CaptionFolder, open_dataset, split
from .processes import join_processes, leave_processes
from .published import STAGES, describe, stage_named
from .stages import StageRun, prepare_stage

# BERT's token that begins a text to be generated, in BLIP's and BLIP-2's tokenizers.
_DEC = "[DEC]"


def list_stages() -> int:
    """Print the stages, one a line."""
    for stage in STAGES.values():
        print(describe(stage))  # noqa: T201
    return 0


def finetune(path: Path, *, resume: bool = False, dry_run: bool = False) -> int:
    """Run a configuration file.

    Args:
        path: of the file; see `config`.
        resume: go on from the checkpoint in its output folder.
        dry_run: print the plan (what is trained, what it costs) and run nothing.

    Returns:
        0.

    Raises:
        ConfigError, DataError, ...: what is wrong, in one line.
    """
    config = read_config(path)
    stage_named(config.stage)
    if not dry_run and not resume:
        try:
            check_unused(Path(config.output))  # before minutes of loading
        except RunExistsError as error:
            raise RunExistsError(str(error).replace("resume=True", "--resume")) from error
    _quiet()
    join_processes()
    first = int(os.environ.get("RANK", "0")) == 0
    run = prepare(config)
    if first:
        print(run.plan)  # noqa: T201
        print(_summary(run))  # noqa: T201
    if dry_run:
        leave_processes()
        return 0
    result = run.train(config.output, resume=resume)
    if first:
        last = f", loss {result.losses[-1]:.4f}" if result.losses else ""
        best = (
            "" if result.best is None else f"; the best evaluation, {result.best:.4g}, was at step {result.best_step}"
        )
        print(f"{result.stopped} after {result.step} steps{last}{best}")  # noqa: T201
        print(f"written to {Path(config.output) / TRAINED_FILE}")  # noqa: T201
    leave_processes()
    return 0


def prepare(config: FinetuneConfig) -> StageRun:
    """Load model and data of a configuration, and prepare its stage.

    Data come first: their defects are found before the weights are read.
    """
    data = config.data
    dataset: Any = open_dataset(
        data.path,
        captions=data.captions,
        subset=data.subset,
        split=data.split,
        image_column=data.image_column,
        caption_column=data.caption_column,
        prompt_column=data.prompt_column,
    )
    if data.check and isinstance(dataset, CaptionFolder):
        dataset.check()
    train, held_out = (dataset, None) if data.held_out is None else split(dataset, data.held_out, data.seed)
    device = config.device or (f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    if config.llm is not None and config.stage == "blip2-stage1":
        raise ConfigError(f"llm is {config.llm!r}, but stage 'blip2-stage1' has no language model; leave it out")
    # Preparing fuses what there is to fuse.
    with asking(config.model):
        pipeline = load_pipeline(config.model, llm=config.llm, fuse=False, dtype=dtype, device=device)
    model = pipeline.model
    if config.stage == "blip2-stage1" and not isinstance(model, Blip2Stage1):
        model = stage1(model, pipeline.processor.tokenizer)
    return prepare_stage(
        config.stage,
        model=model,
        processor=pipeline.processor,
        data=train,
        held_out=held_out,
        features=config.features,
        train=config.train,
        lora=config.lora,
        trained_dtype=getattr(torch, config.trained_dtype),
        checkpointing=config.checkpointing,
        prompt=config.prompt,
        max_caption_tokens=config.max_caption_tokens,
        **config.settings,
    )


def stage1(retrieval: nn.Module, tokenizer: Any) -> Blip2Stage1:
    """Stage 1 around a `Blip2ForImageTextRetrieval`, with the tokens that its tokenizer has.

    Raises:
        ValueError: another model, or a tokenizer without [SEP] or [DEC].
    """
    if type(retrieval).__name__ != "Blip2ForImageTextRetrieval":
        raise ValueError(
            f"stage 'blip2-stage1' begins with a Blip2ForImageTextRetrieval, and the model is a {type(retrieval).__name__}"
        )
    known = tokenizer.get_vocab()
    begin = known.get(_DEC, tokenizer.bos_token_id)
    if begin is None or tokenizer.sep_token_id is None:
        raise ValueError(
            f"the tokenizer has no {_DEC} or no [SEP]; expected BERT's, with tokenizer.add_special_tokens({{'bos_token': "
            f"'{_DEC}'}}) and a row for it in the Q-Former's embeddings"
        )
    near = next(retrieval.parameters())
    return Blip2Stage1(retrieval, bos_token_id=begin, eos_token_id=tokenizer.sep_token_id).to(near.device)


def _summary(run: StageRun) -> str:
    settings = run.settings
    held_out = "" if run.evaluation_dataset is None else f", {len(run.evaluation_dataset)} held out"
    update = settings.batch_size * settings.accumulation
    return (
        f"stage {run.stage.name}: {settings.steps} steps of {update} samples out of {len(run.dataset)}{held_out}; "
        f"learning rate {settings.learning_rate:g} ({settings.schedule}, {settings.warmup_steps} steps of warm-up), "
        f"weight decay {settings.weight_decay:g}, {settings.optimizer}"
    )


def _quiet() -> None:
    """No advice from libraries between the lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
