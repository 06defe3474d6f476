"""The optimiser of a run, its schedule, and their states by the names of the parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LRScheduler

from .settings import TrainingSettings

_GATE = re.compile(r"(^|_)gate$|^alpha_(cross_attn|dense)$")
_NORM = re.compile(r"(^|\.)\w*norm\d*(_\w+)?($|\.)", re.IGNORECASE)


def is_gate(name: str, parameter: Tensor) -> bool:
    """Whether this is the gate of a residual branch: one number or one vector, named "...gate" (Idefics: "alpha_...").

    A matrix that is called a gate (Llama's `gate_proj`) is none.
    """
    return bool(_GATE.search(name.split(".")[-1])) and parameter.numel() == max(parameter.shape, default=1)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls at a parameter: not at biases, gates, anything in a norm, or vectors of any kind."""
    if parameter.dim() < 2 or name.endswith("bias") or is_gate(name, parameter):
        return False
    return not _NORM.search(".".join(name.split(".")[-2:]))


def parameter_groups(trained: Mapping[str, nn.Parameter], settings: TrainingSettings) -> list[dict[str, Any]]:
    """Groups for any optimiser: with decay, without, and gates with their own learning rate; empty ones are left out.

    Raises:
        ValueError: nothing is trained.
    """
    if not trained:
        raise ValueError("nothing is trained; name the parts in prepare_finetuning(model, train=...)")
    gates = [n for n, p in trained.items() if settings.gate_learning_rate != 1 and is_gate(n, p)]
    decayed = [n for n, p in trained.items() if n not in gates and decays(n, p)]
    others = [n for n in trained if n not in gates and n not in decayed]
    groups = []
    for names, decay, factor in (
        (decayed, settings.weight_decay, 1.0),
        (others, 0.0, 1.0),
        (gates, 0.0, settings.gate_learning_rate),
    ):
        if names:
            groups.append(
                {
                    "params": [trained[name] for name in names],
                    "weight_decay": decay,
                    "lr": factor * settings.learning_rate,
                }
            )
    return groups


def build_optimizer(trained: Mapping[str, nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW over the trained parameters (see `parameter_groups`).

    "adamw" is torch's, in its fused form on a GPU. "adamw8bit" is bitsandbytes': moments of parameters with 4096 elements and
    more take one byte each, with a scale for every 256; it runs on GPUs and on the CPU.

    Args:
        trained: `plan.trained`.
        settings: optimizer, learning rate, weight decay, betas and the gates' factor are read.

    Raises:
        ValueError: nothing is trained, or "adamw8bit" was asked for sharded parameters.
    """
    groups = parameter_groups(trained, settings)
    if settings.optimizer == "adamw8bit":
        if any(isinstance(parameter, DTensor) for parameter in trained.values()):
            raise ValueError(
                'optimizer="adamw8bit" cannot step parameters that FSDP sharded; use parallel="ddp", or optimizer="adamw"'
            )
        import bitsandbytes

        return cast(
            torch.optim.Optimizer,
            bitsandbytes.optim.AdamW8bit(groups, lr=settings.learning_rate, betas=settings.betas),
        )
    fused = all(parameter.device.type == "cuda" for parameter in trained.values())
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=fused or None)


def build_schedule(optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> LRScheduler:
    """Linear warm-up, then what the settings name; to be stepped once an update (transformers' `get_scheduler`)."""
    from transformers import get_scheduler

    name, specific = str(settings.schedule), None
    if settings.schedule == "constant":
        name = "constant_with_warmup"
    elif settings.minimum_learning_rate:
        # A ratio, so that gates keep their factor.
        name, specific = "cosine_with_min_lr", {"min_lr_rate": settings.minimum_learning_rate / settings.learning_rate}
    schedule: LRScheduler = get_scheduler(
        name, optimizer, settings.warmup_steps, settings.steps, scheduler_specific_kwargs=specific
    )
    return schedule


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (all processes have to ask), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_state(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """The state of every trained parameter, by its name, whole and on the CPU."""
    return {
        name: {
            key: whole(value).detach().cpu() if isinstance(value, Tensor) else value
            for key, value in optimizer.state[parameter].items()
        }
        for name, parameter in trained.items()
        if parameter in optimizer.state
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put back what `optimizer_state` gave; learning rates are the schedule's to set."""
    names = {parameter: name for name, parameter in trained.items()}
    own = optimizer.state_dict()
    loaded = {}
    for group, ids in zip(optimizer.param_groups, own["param_groups"], strict=True):
        for parameter, number in zip(group["params"], ids["params"], strict=True):
            saved = state.get(names[parameter])
            if saved is not None:
                loaded[number] = {key: _as_held(value, parameter) for key, value in saved.items()}
    optimizer.load_state_dict({"state": loaded, "param_groups": own["param_groups"]})


def _as_held(value: Any, parameter: nn.Parameter) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
