"""Real photographs that installed packages ship, so that the demo needs no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy, stack

# The mean and spread that CLIP-like vision towers were trained with.
MEAN, SPREAD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


@dataclass(frozen=True)
class Photograph:
    """A picture [height, width, 3] of bytes and what it shows."""

    title: str
    pixels: np.ndarray


def load_photographs(count: int) -> list[Photograph]:
    """The first `count` of the photographs in scikit-image and scikit-learn that need no download.

    Raises:
        ValueError: fewer than `count` are there.
    """
    from skimage import data
    from sklearn.datasets import load_sample_image

    sources: tuple[tuple[str, Callable[[], np.ndarray]], ...] = (
        ("an astronaut", data.astronaut),
        ("a cup of coffee", data.coffee),
        ("a cat", data.chelsea),
        ("a temple in China", lambda: load_sample_image("china.jpg")),
        ("a flower", lambda: load_sample_image("flower.jpg")),
        ("a rocket at night", data.rocket),
        ("galaxies in deep space", data.hubble_deep_field),
        ("a motorcycle in a garage", lambda: data.stereo_motorcycle()[0]),
        ("the retina of an eye", data.retina),
    )
    if count > len(sources):
        raise ValueError(f"{count} photographs were asked for; {len(sources)} are installed")
    return [Photograph(title, np.asarray(load())) for title, load in sources[:count]]


def square(photograph: Photograph, size: int) -> np.ndarray:
    """The middle of a photograph, [size, size, 3] of bytes."""
    image = Image.fromarray(photograph.pixels).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    middle = image.crop((left, top, left + side, top + side))
    return np.array(middle.resize((size, size), Image.Resampling.BICUBIC))


def to_tensor(photographs: list[Photograph], size: int) -> Tensor:
    """[photographs, 3, size, size], normalised as vision towers expect."""
    pixels = [(square(photograph, size) / np.float32(255) - MEAN) / SPREAD for photograph in photographs]
    return stack([from_numpy(p.astype(np.float32)).permute(2, 0, 1) for p in pixels])
