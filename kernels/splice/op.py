"""The public functions `splice_rows` and `image_rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import runtime
from . import reference

runtime.register_op("splice_rows", "image features in the places of image tokens, by row", has_triton=True)

_INTEGERS = (torch.int32, torch.int64)


def splice_rows(text: Tensor, features: Tensor, index: Tensor, *, token_ids: Tensor | None = None) -> Tensor:
    """out[b, i] = features[index[b, i]] where index[b, i] >= 0, else the text's row.

    What LLaVA, BLIP-2, MiniGPT-4 and mPLUG-Owl do to put an image's rows into the sequence of a language model:
    `inputs_embeds.masked_scatter(mask, features)` of transformers (`LlavaModel.forward`), whose mask is as large as the
    embeddings, and the per-sample loops of the original LLaVA (`prepare_inputs_labels_for_multimodal`), which wait for
    the device. Here each row is copied once, and nothing is read back.

    Args:
        text: [B, L, D] embeddings; or, with `token_ids`, the table [V, D] that they are rows of.
        features: [N, D] in the dtype of `text`.
        index: [B, L] int32 or int64, the row of `features`, or negative for text. Any rows in any order, a row more than
            once too. Entries are not checked: N and above read past the end.
        token_ids: [B, L] int32 or int64 in 0 to V - 1. In places of features they may be anything.

    Returns:
        [B, L, D] in the dtype of `text`, contiguous.

    Saved for backward: `index` and `token_ids`. Gradients go to `text` (the table's is dense, and has no padding row) and
    to `features`; rows that are read more than once are summed in fp32 in the order of the sequence, without atomics.
    Differentiable once on the kernels. Equal inputs give bitwise equal outputs and gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    _check(text, features, index, token_ids)
    if runtime.choose_for("splice_rows", features.device.type, lambda: _unsupported(features)) == "torch":
        return reference.splice_rows(text, features, index, token_ids)
    from . import triton_op

    if features.stride(1) != 1:
        features = features.contiguous()
    if text.stride(-1) != 1:
        text = text.contiguous()
    return triton_op.run(text, features, index, token_ids)


def image_rows(places: Tensor) -> Tensor:
    """The index of `splice_rows` for features that stand in the order of their places.

    Args:
        places: [B, L] bool, True at image tokens.

    Returns:
        [B, L] int64: 0, 1, 2, ... at the image tokens, row by row, and -1 elsewhere. Computed where `places` is, without
        reading it back.
    """
    ordinal = places.flatten().cumsum(0).view(places.shape)
    return (ordinal * places) - 1


def _unsupported(features: Tensor) -> str | None:
    from . import triton_op

    return triton_op.unsupported(features)


def _check(text: Tensor, features: Tensor, index: Tensor, token_ids: Tensor | None) -> None:
    if index.ndim != 2 or index.dtype not in _INTEGERS:
        raise ValueError(f"index is {list(index.shape)} of {index.dtype}; expected [batch, length] of int32 or int64")
    width = text.shape[-1]
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"features is {list(features.shape)}; expected [rows, {width}], as wide as the text")
    if features.dtype != text.dtype or features.device != text.device:
        raise ValueError(
            f"features is {features.dtype} on {features.device}, but the text is {text.dtype} on {text.device}; bring "
            "them to one dtype and device"
        )
    if index.device != text.device:
        raise ValueError(f"index is on {index.device}, but the text is on {text.device}; move it there")
    if token_ids is None:
        if text.shape[:-1] != index.shape:
            raise ValueError(
                f"text is {list(text.shape)}; expected [{index.shape[0]}, {index.shape[1]}, D], as index has"
            )
        return
    if text.ndim != 2:
        raise ValueError(f"with token_ids, text is the table [vocabulary, D], but it is {list(text.shape)}")
    if token_ids.shape != index.shape or token_ids.dtype not in _INTEGERS or token_ids.device != text.device:
        raise ValueError(
            f"token_ids is {list(token_ids.shape)} of {token_ids.dtype} on {token_ids.device}; expected "
            f"{list(index.shape)} of int32 or int64 on {text.device}"
        )
