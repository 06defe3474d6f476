"""One training process or several: the loss as a module, wrapped by DDP or sharded by FSDP2, and what processes agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .settings import Loss, Parallel

T = TypeVar("T")


class LossModule(nn.Module):
    """A model and its loss as one module: what DDP and FSDP wrap, so that the loss is given the model itself.

    Args:
        model: the model.
        loss: `loss(model, batch)`, a scalar, or a mapping with the scalar "loss", perhaps "count", and parts to log.
        autocast: `plan.autocast`.
    """

    def __init__(self, model: nn.Module, loss: Loss, autocast: Callable[[str], Any]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.autocast = autocast
        self._context: Any = None

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """(loss, count or None, parts)."""
        if self._context is None:
            # Once: the plan looks through all parameters to choose it.
            self._context = self.autocast(next(self.model.parameters()).device.type)
        with self._context:
            found = self.loss(self.model, batch)
        parts = {"loss": found} if isinstance(found, Tensor) else dict(found)
        loss, count = parts.pop("loss", None), parts.pop("count", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"the loss function returned {_said(found)}; expected one number with a gradient, or a mapping that has it "
                'as "loss"'
            )
        if count is not None:
            count = torch.as_tensor(count, device=loss.device).detach().float().reshape(())
        # A view of it would keep FSDP from seeing where backward begins.
        loss = loss if loss.dim() == 0 else loss.sum()
        return loss, count, {k: torch.as_tensor(v).detach().float().reshape(()) for k, v in parts.items()}


def _said(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    return f"a mapping of {sorted(found)}" if isinstance(found, Mapping) else f"a {type(found).__name__}"


class Processes:
    """The processes that train together: all those of torch.distributed, or this one alone.

    Args:
        device: of the model.

    Raises:
        ValueError: torchrun started several processes, and torch.distributed was not initialised.
    """

    def __init__(self, device: torch.device) -> None:
        joined = dist.is_available() and dist.is_initialized()
        if not joined and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes that do not know of each other; call "
                "mllm_fast.finetune.join_processes() before the model is built"
            )
        self.device = device
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Everybody's value."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, act: Callable[[], T]) -> T:
        """What `act` returns or raises in the first process, which is the only one to run it."""
        if self.size == 1:
            return act()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = act()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=self.device if dist.get_backend() == "nccl" else None)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def wrap(self, module: LossModule, parallel: Parallel) -> nn.Module:
        """`module` as several processes train it: by DDP, or, once `shard` was called, as it is.

        DDP averages the gradients of the trained parameters, and sends their values round once, from the first process;
        frozen parameters and buffers are left alone, as every process loaded the same.
        """
        if self.size == 1 or parallel == "fsdp":
            return module
        ignored = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        ignored += [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        # A batch without images does not reach the bridge: its parameters then have no gradient in that process.
        return DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True)


def join_processes() -> None:
    """Under torchrun: take this process's GPU, or the CPU, and join the others. Otherwise, and a second time: nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")


def leave_processes() -> None:
    """Undo `join_processes`: to be called by every process at the end of a run that went well. Otherwise: nothing."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    # gloo's threads outlive the group where DDP or FSDP2 were used, and need Python to let go of the last collective's
    # tensors: a process that ends meanwhile is aborted, after all its work. A barrier has no tensors, and lets them finish.
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def gradients_kept_here(module: nn.Module, kept: bool = True) -> Iterator[None]:
    """While `kept`: backward passes add to this process's gradients and send nothing round."""
    if isinstance(module, DistributedDataParallel) and kept:
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not kept)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


def shard(module: LossModule, layers: list[nn.Module]) -> None:
    """Shard by FSDP2 what can be, in place, over all processes.

    Sharded are the trained parameters, with their gradients and optimiser states, and the dense frozen ones. Each of `layers`
    (the language model's decoder layers) is a group that is gathered when it runs and let go after; all other parameters
    are one group, gathered for the whole step, as drop-ins read weights of several modules at once and the loss
    reads the head. What FSDP2 cannot cut stays replicated: frozen integers (the bytes of 4-bit and 8-bit weights), parameters
    of another type than torch's own, and single numbers (gates); their gradients are averaged by `average_replicated`.
    """
    left = {p for p in module.parameters() if not p.is_floating_point() or p.dim() == 0 or type(p) is not nn.Parameter}
    for layer in layers:
        if not any(p in left for p in layer.parameters()):
            fully_shard(layer)
    fully_shard(module, ignored_params=left)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While it lasts, the model inside `module` can be called by itself, though its parameters are sharded."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        # A forward pass without a backward pass would leave them gathered.
        module.reshard()


def average_replicated(parameters: list[nn.Parameter], processes: Processes) -> None:
    """Average the gradients of the trained parameters that `shard` left whole."""
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            processes.sum(parameter.grad).div_(processes.size)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, sharded ones included: a scalar."""
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter in parameters:
        if parameter.grad is not None:
            kinds[isinstance(parameter.grad, DTensor)].append(parameter.grad)
    norms = [nn.utils.get_total_norm(gradients, foreach=None) for gradients in kinds if gradients]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
