"""Training through frozen decoder layers."""

from __future__ import annotations

from torch import nn

from ..fusion import FuseReport, fuse


def fuse_for_training(model: nn.Module) -> FuseReport:
    """`fuse` with what only training needs."""
    return fuse(model)
