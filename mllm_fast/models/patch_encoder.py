"""A small vision encoder for small pictures, trained together with the bridge it feeds."""

from __future__ import annotations

from torch import Tensor, nn

from torch import zeros


class PatchEncoder(nn.Module):
    """Patches of a picture, each seen with its surroundings: a convolutional stem, a patch embedding, positions.

    Args:
        image_size: height and width of the pictures; a multiple of `patch`.
        patch: height and width of a patch.
        dim: width D of the patch vectors.
        channels: of the pictures; 1 for grey.
        stem: channels of the stem.

    Raises:
        ValueError: `patch` does not divide `image_size`.
    """

    def __init__(self, image_size: int, patch: int, dim: int, *, channels: int = 1, stem: int = 32) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patch must divide image_size, got {patch} and {image_size}")
        self.image_size = image_size
        self.channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(channels, stem, 3, padding=1), nn.GELU(), nn.Conv2d(stem, stem, 3, padding=1), nn.GELU()
        )
        self.patches = nn.Conv2d(stem, dim, patch, stride=patch)
        self.positions = nn.Parameter(zeros((image_size // patch) ** 2, dim))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, channels, image_size, image_size] in 0 to 1; returns patches [N, (image_size / patch)^2, dim]."""
        expected = (self.channels, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(images.shape[1:])}; expected {expected}")
        return self.patches(self.stem(images)).flatten(2).transpose(1, 2) + self.positions
