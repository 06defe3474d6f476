"""Contrast of images and texts within a batch, over the pairs of all processes, and the hard negatives that it gives.

ALBEF's way (arXiv 2107.07651, sections 3.2 and 3.3) as BLIP-2 uses it (arXiv 2301.12597, section 3.2): no queues.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .gathering import gathered, gathered_numbers, processes


@dataclass(frozen=True)
class Share:
    """Of the pairs of a step, those of this process.

    Attributes:
        processes: that take part in the step.
        pairs: B, of each process.
        start: number of this process's first pair, counted through all processes.
        length: T of the process whose texts are padded to the most.
        supervised: tokens of all processes that are predicted.
    """

    processes: int
    pairs: int
    start: int
    length: int
    supervised: int

    @classmethod
    def of(cls, pairs: int, length: int, supervised: int, device: torch.device, across: bool = True) -> Share:
        """This process's numbers and what the others have, unless there are none or `across` is false.

        Raises:
            ValueError: another process has another number of pairs, or all together have fewer than two.
        """
        rank, count = processes() if across else (0, 1)
        numbers = [pairs, length, supervised]
        everywhere = gathered_numbers(numbers, device) if count > 1 else [numbers]
        counts, lengths, tokens = (tuple(column) for column in zip(*everywhere, strict=True))
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes have {list(counts)} pairs in this step; give each equally many (drop the last batch)"
            )
        if sum(counts) < 2:
            raise ValueError(
                f"got {sum(counts)} pairs; a step needs at least two, of which each finds its negatives in the others"
            )
        return cls(count, pairs, rank * pairs, max(lengths), sum(tokens))


def similarities(image: Tensor, text: Tensor, across: bool = False) -> tuple[Tensor, Tensor]:
    """Cosine of an image's best query and a text.

    Args:
        image: [I, Lq, d], each row of length 1.
        text: [B, d], likewise.
        across: compare with the texts and images of all processes, I and B of each, which get gradients too.

    Returns:
        of images with all texts [I, all B], and of texts with all images [B, all I].
    """
    if not across:
        both = (image @ text.t()).amax(dim=1)
        return both, both.t()
    everything = gathered(torch.cat((image, text.unsqueeze(1)), dim=1))
    images, texts = everything[:, :-1], everything[:, -1]
    return (image @ texts.t()).amax(dim=1), (images @ text.t()).amax(dim=1).t()


def contrast(scores: tuple[Tensor, Tensor], start: int, label_smoothing: float) -> Tensor:
    """Cross entropy of the scores [B, all] of both directions, where row b belongs to column start + b; their mean."""
    target = torch.arange(start, start + scores[0].shape[0], device=scores[0].device)
    losses = [F.cross_entropy(s, target, label_smoothing=label_smoothing) for s in scores]
    return (losses[0] + losses[1]) / 2


@torch.no_grad()
def hard_negatives(scores: tuple[Tensor, Tensor], start: int) -> tuple[Tensor, Tensor]:
    """For each text a wrong image and for each image a wrong text, [B] each: the more alike, the likelier.

    Args:
        scores: of images with texts [B, all], and of texts with images [B, all]; row b belongs to column start + b.
    """
    rows = torch.arange(scores[0].shape[0], device=scores[0].device)
    drawn = []
    for score in reversed(scores):
        score = score.float().index_put((rows, rows + start), score.new_tensor(-10000.0, dtype=torch.float32))
        drawn.append(torch.multinomial(F.softmax(score, dim=1), 1).squeeze(1))
    return drawn[0], drawn[1]
