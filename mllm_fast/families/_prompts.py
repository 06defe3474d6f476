"""Prompts with image tokens: what drop-ins for models that put images into a prompt check and say."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..modules.state import readable_on_host

T = TypeVar("T")

_only_queries: ContextVar[bool] = ContextVar("mllm_fast_only_queries", default=False)


@contextlib.contextmanager
def reading_only_queries() -> Iterator[None]:
    """While it lasts, nobody reads the text rows of a Q-Former's output, and its last layer may leave them out."""
    token = _only_queries.set(True)
    try:
        yield
    finally:
        _only_queries.reset(token)


def only_queries() -> bool:
    """Whether `reading_only_queries` is in force; under a trace, which cannot see it, never."""
    return not torch.compiler.is_compiling() and _only_queries.get()


def checks_prompt(dropin: type[T]) -> type[T]:
    """Class decorator: `forward` and `generate` compare image tokens with images first (`check_prompt`).

    `generate` shows nobody the Q-Former's text rows, so its last layer leaves them out.
    """

    def checked(name: str, upstream: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upstream)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            check_prompt(self, upstream, args, kwargs)
            with reading_only_queries() if name == "generate" else contextlib.nullcontext():
                return getattr(super(dropin, self), name)(*args, **kwargs)

        return call

    for name in ("forward", "generate"):
        setattr(dropin, name, checked(name, getattr(dropin, name)))
    return dropin


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def check_prompt(model: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare the image tokens of a prompt with the images, which upstream pairs up silently or not at all.

    Only where reading the prompt costs nothing: nobody waits for a device to be told that all is well.

    Args:
        model: with `num_query_tokens` and the image token in its config.
        function: upstream's forward or generate, about to be called with `args` and `kwargs`.

    Raises:
        ValueError: see `check_image_tokens`.
    """
    if torch.compiler.is_compiling():
        return
    given = _signature(function).bind(model, *args, **kwargs).arguments
    input_ids, pixels = given.get("input_ids"), given.get("pixel_values")
    encoded = next(iter((given.get("mm_encoder_outputs") or {}).values()), None)
    if input_ids is None or (pixels is None and encoded is None) or not readable_on_host(input_ids):
        return
    token = getattr(
        model.config, "video_token_index" if hasattr(model.config, "video_token_index") else "image_token_index"
    )
    features = model.config.num_query_tokens
    # An image, or a frame of a video, is what lies in the last three dimensions.
    images = pixels.shape[:-3].numel() if pixels is not None else encoded.pooler_output.shape[:-1].numel() // features
    check_image_tokens(input_ids, token, features, images)


def check_image_tokens(input_ids: Tensor, token: int | None, features: int, images: int) -> None:
    """Raise unless each of the images has its tokens in the prompt.

    Args:
        input_ids: [B, L].
        token: id of the image token.
        features: positions of the prompt that one image fills.
        images: how many images (or frames) there are.

    Raises:
        ValueError: there is no image token id, the counts differ, or a row holds part of an image.
    """
    if token is None:
        raise ValueError("config.image_token_index is None, so no token of input_ids stands for an image; set it")
    counts = (input_ids == token).sum(dim=-1).tolist()
    if sum(counts) == images * features and not any(count % features for count in counts):
        return
    rows = ", ".join(map(str, counts[:8])) + (", ..." if len(counts) > 8 else "")
    raise ValueError(
        f"input_ids hold {sum(counts)} image tokens (id {token}; row by row: {rows}), but {images} images of {features} "
        f"tokens each need {images * features}; put {features} image tokens into the prompt for each image"
    )
