"""Which image each token of a text reads (phi in Alayrac et al. 2022, 3.1.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modules.state import readable_on_host


def image_index(
    input_ids: Tensor,
    media_token_id: int,
    images: int,
    image_mask: Tensor | None = None,
    next_image: Tensor | bool = False,
) -> Tensor:
    """The last image at or before each token; in some samples, the first image at or after it.

    Args:
        input_ids: [B, S] int64; a media token stands for an image.
        images: how many images a sample has, padding included.
        image_mask: [B, I] or [1, I] bool, True for a real image, or [.., I, F] for real frames. The k-th media token means
            the k-th real image, wherever padding stands between them. Default: all real.
        next_image: [B] bool, or one for all: the samples in which text reads the image after it.

    Returns:
        [B, S] int64; -1 before the first media token, or after the last one where text reads the image after it.

    Raises:
        ValueError: a sample has more media tokens than images. Only where `input_ids` are on the CPU: on a GPU, which is
            not waited for, the surplus tokens see nothing.
    """
    is_media = input_ids == media_token_id
    ordinal = is_media.cumsum(dim=1)
    needed = ordinal[:, -1]
    if image_mask is not None:
        image_mask = real_images(image_mask.to(input_ids.device))
    real = needed.new_full(needed.shape, images) if image_mask is None else image_mask.sum(dim=1).expand_as(needed)
    if readable_on_host(input_ids) and bool((needed > real).any()):
        row = int((needed > real).nonzero()[0])
        raise ValueError(
            f"sample {row} has {int(needed[row])} media tokens (id {media_token_id}) "
            f"but {int(real[row])} images; pass one image for each media token"
        )
    if next_image is not False:
        rows = torch.as_tensor(next_image, device=ordinal.device).expand(ordinal.shape[0]).unsqueeze(1)
        following = torch.where(is_media, ordinal, ordinal + 1)
        following = following.masked_fill(following > needed.unsqueeze(1), 0)
        ordinal = torch.where(rows, following, ordinal)
    if image_mask is None or images == 0:
        return ordinal - 1
    slots = (~image_mask).int().argsort(dim=1, stable=True).expand(input_ids.shape[0], -1)
    named = (ordinal > 0) & (ordinal <= real.unsqueeze(1))
    return torch.where(named, slots.gather(1, (ordinal - 1).clamp(0, images - 1)), -1)


def real_images(image_mask: Tensor) -> Tensor:
    """[B, I] bool from a mask of images [B, I] or of frames [B, I, F]: an image is real if it has a frame."""
    return image_mask.bool() if image_mask.ndim == 2 else image_mask.bool().any(dim=2)


def up_to(index: Tensor, image_mask: Tensor) -> Tensor:
    """The real images up to that of an index.

    Args:
        index: [B, S] int64.
        image_mask: [B, I] or [1, I], or with frames.

    Returns:
        [B, S, I] bool.
    """
    real = real_images(image_mask.to(index.device))
    before: Tensor = torch.arange(real.shape[1], device=index.device) <= index.unsqueeze(-1)
    return before & real.unsqueeze(1)
