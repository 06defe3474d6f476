"""Parameters and buffers that training changes without a gradient: momentum encoders, queues, running averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Changes:
    """Notes which frozen tensors of a model are written to, so that a checkpoint holds these and no others.

    It compares PyTorch's counters of in-place writes, reads no values, and thus costs nothing on a GPU.

    Args:
        model: before its first step.
        trained: names of the parameters that are kept elsewhere.
    """

    def __init__(self, model: nn.Module, trained: set[str]) -> None:
        self.model, self.trained = model, trained
        self.before = {name: (tensor, tensor._version) for name, tensor in self._candidates()}
        self.restored: set[str] = set()

    def _candidates(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if name not in self.trained:
                yield name, parameter
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}" if path else name, buffer

    def tensors(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of the tensors that were written to or replaced, by their names in the model."""
        found = {}
        for name, tensor in self._candidates():
            before, version = self.before.get(name, (None, -1))
            if isinstance(tensor, DTensor) or tensor.is_inference():
                continue
            if name in self.restored or tensor is not before or tensor._version != version:
                found[name] = tensor.detach().cpu().clone()
        return found

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave; they count as changed from now on."""
        own = dict(self._candidates())
        for name, value in saved.items():
            own[name].copy_(value)
        self.restored = set(saved)
