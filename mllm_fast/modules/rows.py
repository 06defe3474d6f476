"""Rows of a post-norm block, whose norm may be left to whoever reads them.

A post-norm block ends in norm(residual + x W^T + b). On a GPU that norm would be a launch of its own, because no program of
the GEMM sees a whole row. But whoever reads the rows is a GEMM that can normalise them on the way: the next projection, and
the next block's sum. So in inference a block hands out residual + x W^T + b and says which norm is pending. Both readers
compute it in fp32, and it rounds no more often than the norm of its own: its input once, as upstream does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..kernels import runtime
from ..kernels.norm import Norm
from .state import needs_graph


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows and the norm that is pending on them.

    Attributes:
        values: [..., S, D].
        norm: to be applied by whoever reads them; None: nothing is pending.
    """

    values: Tensor
    norm: Norm | None = None

    @property
    def length(self) -> int:
        """S."""
        return self.values.shape[-2]

    def of(self, values: Tensor) -> Rows:
        """Some of these rows, a view of `values`, with the same norm pending."""
        return Rows(values, self.norm)

    def normalized(self) -> Tensor:
        """The rows themselves, [..., S, D]."""
        return self.values if self.norm is None else ops.normalize(self.values, self.norm)


# Parts of each sequence that stand side by side along the second last dimension, such as the queries and the text of a
# Q-Former, whose last norms were different ones.
Parts = tuple[Rows, ...]


def joined(parts: Sequence[Rows]) -> Tensor:
    """The rows of all parts, [..., sum of S, D], with nothing pending."""
    if len(parts) == 1:
        return parts[0].normalized()
    return torch.cat([part.normalized() for part in parts], dim=-2)


def may_defer(device_type: str) -> bool:
    """Whether norms may be left pending on such a device: on the Triton kernels.

    A CPU has no launches to save and would compute the norm twice. Under autocast a norm decides on the dtype of what
    follows.
    """
    return runtime.chosen("linear_residual", device_type) == "triton" and not torch.is_autocast_enabled(device_type)


def defers_norm(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a norm that follows a GEMM over `x` and `others` is left pending: in inference, for a backward meets it once."""
    return may_defer(x.device.type) and x.dtype != torch.float64 and not needs_graph(x, *others)
