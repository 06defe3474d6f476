"""A small vision encoder for small pictures, trained together with the bridge it feeds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchEncoder(nn.Module):
    """Patches of a picture, each seen with its surroundings, and learnt positions.

    Batch norms, not layer norms: they take out what all pictures have in common. An attention that is still uniform
    would otherwise average the patches to nearly the same vector for every picture, and training would wait for long.

    Args:
        image_size: height and width of the pictures; a multiple of `patch`.
        patch: height and width of a patch.
        dim: width D of the patch vectors.
        channels: of the pictures; 1 for grey.
        stem: channels of the first convolution.

    Raises:
        ValueError: `patch` does not divide `image_size`.
    """

    def __init__(self, image_size: int, patch: int, dim: int, *, channels: int = 1, stem: int = 32) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patch must divide image_size, got {patch} and {image_size}")
        self.config = {"image_size": image_size, "patch": patch, "dim": dim, "channels": channels, "stem": stem}
        self.layers = nn.Sequential(
            nn.Conv2d(channels, stem, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(stem, dim, patch, stride=patch),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
        )
        # Of the order of the normalised patches: attention has to find a place before it can read it.
        self.positions = nn.Parameter(0.5 * torch.randn((image_size // patch) ** 2, dim))

    def forward(self, images: Tensor) -> Tensor:
        """images [N, channels, image_size, image_size] in 0 to 1; returns patches [N, (image_size / patch)^2, dim]."""
        size = self.config["image_size"]
        if images.shape[1:] != (self.config["channels"], size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape[1:])}; expected {(self.config['channels'], size, size)}"
            )
        return self.layers(images).flatten(2).transpose(1, 2) + self.positions
