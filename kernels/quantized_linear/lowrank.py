"""The low-rank term beside a frozen weight, as the kernels add it to their result."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """down up^T, elements of which may be dropped: an [M, width] tensor that nobody has to hold.

    Forward, `down` is scaling * dropout(x) a^T and `up` is b; for the input gradient, `down` is scaling * dY b, `up` is
    a^T, and what dropout zeroed in x gets no gradient.

    Attributes:
        down: [M, r].
        up: [width, r], any strides.
        dropout_p, seed: the pattern of dropout(x), by which the product is multiplied; 0: none.
    """

    down: Tensor
    up: Tensor
    dropout_p: float = 0.0
    seed: int = 0
