"""The definition of `splice_rows` in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def splice_rows(text: Tensor, features: Tensor, index: Tensor, token_ids: Tensor | None) -> Tensor:
    """As the public function, whose arguments these are."""
    spliced = index >= 0
    if token_ids is not None:
        # Ids in the places of features are not looked up: they may lie beyond the table.
        text = F.embedding(token_ids.masked_fill(spliced, 0), text)
    if features.shape[0] == 0:  # a row that nobody reads, for the look-up
        features = F.pad(features, (0, 0, 0, 1))
    return torch.where(spliced.unsqueeze(-1), features[index.clamp(min=0)], text)
