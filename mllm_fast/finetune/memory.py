"""Memory that a training step keeps between forward and backward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShape:
    """How large a batch of training is.

    Attributes:
        samples: rows of the batch.
        tokens: text tokens of a row, padding and the places of images in the text counted.
        images: images of a row.
        supervised: tokens of a row that have labels; None: all of them.

    Raises:
        ValueError: a number below what makes a batch.
    """

    samples: int
    tokens: int
    images: int = 1
    supervised: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.tokens < 1 or self.images < 0:
            raise ValueError(f"a batch has at least one sample and one token and no fewer than 0 images; got {self}")
        if self.supervised is not None and not 0 <= self.supervised <= self.tokens:
            raise ValueError(f"supervised is {self.supervised}; expected 0 to tokens={self.tokens}")
