"""A frozen linear layer as its two halves, for blocks that write their own backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .. import seeds
from . import autograd, op, reference
from .lowrank import LowRank
from .weights import Lora, Weight

Adapter = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Projection:
    """y = x W^T + bias + scaling * dropout(x) a^T b^T, with W and bias frozen.

    The tensors of the low-rank term are given to each half, since autograd hands them to a function as its arguments.

    Attributes:
        weight: [N, K] in 4 or 8 bits, or in the dtype of x.
        bias: [N] or None.
        lora: scaling and dropout of the term; None: there is none.
        seed: of the dropout; both halves draw the same pattern from it.
    """

    weight: Weight | Tensor
    bias: Tensor | None = None
    lora: Lora | None = None
    seed: int = 0

    @classmethod
    def drawn(cls, weight: Weight | Tensor, bias: Tensor | None, lora: Lora | None) -> Projection:
        """With a seed from torch's default CPU generator, where there is dropout."""
        return cls(weight, bias, lora, 0 if lora is None else seeds.drawn(lora.dropout_p, None))

    def forward(self, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
        """([M, N] in the dtype of x [M, K]; what backward wants of the low-rank term, [M, r] or None)."""
        a, b = adapter
        if not isinstance(self.weight, Tensor):
            return autograd.forward(self._settings(x), self.weight, x, self.bias, a, b)
        y = F.linear(x, self.weight, self.bias)
        if a is None or b is None or self.lora is None:
            return y, None
        down = F.linear(reference.dropout(x, self.lora.dropout_p, self.seed).to(a.dtype), a) * self.lora.scaling
        return y.add_(reference.dense(LowRank(down, b), y.dtype)), down

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        adapter: Adapter,
        down: Tensor | None,
        needs: tuple[bool, bool, bool],
        into: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x, a and b, those that are needed.

        Args:
            grad: [M, N].
            x: [M, K]; wanted for the gradient of a only.
            adapter, down: as in forward.
            needs: of x, a, b.
            into: [M, K], to which the gradient of x is added; it is returned then.
        """
        a, b = adapter
        if not isinstance(self.weight, Tensor):
            return autograd.backward(self._settings(grad), self.weight, grad, x, a, b, down, needs, into)
        need_x, need_a, need_b = needs
        dx = da = db = None
        if need_x:
            dx = grad @ self.weight if into is None else into.addmm_(grad, self.weight)
        if a is not None and b is not None and self.lora is not None:
            wide, p = grad.to(a.dtype), self.lora.dropout_p
            if need_b and down is not None:
                db = wide.mT @ down
            back = wide @ b * self.lora.scaling
            if need_a and x is not None:
                da = back.mT @ reference.dropout(x, p, self.seed).to(a.dtype)
            if dx is not None:
                dx.add_(reference.dense(LowRank(back, a.mT, p, self.seed), dx.dtype))
        return dx, da, db

    def _settings(self, x: Tensor) -> autograd.Settings:
        implementation = op.implementation(x.device.type, x.dtype)
        if self.lora is None:
            return autograd.Settings(implementation)
        return autograd.Settings(implementation, None, self.lora.scaling, self.lora.dropout_p, self.seed)
