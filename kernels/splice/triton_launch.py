"""Launches the kernels of `splice_rows`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sizes import cdiv, next_power_of_2
from ..target import arch_of, on_device
from .triton_splice import gather_rows, sum_rows


@dataclass(frozen=True)
class Config:
    """One launch: BD columns a program."""

    BD: int
    num_warps: int


def config_for(arch: str, width: int, itemsize: int) -> Config:
    """16 bytes a thread, and no more threads than the row needs; chosen from compile-time resources.

    Args:
        arch: what it runs on.
        width: D.
        itemsize: bytes of an element.
    """
    lanes = 64 if arch == "gfx942" else 32
    elements = 16 // itemsize
    warps = min(4, max(1, next_power_of_2(width) // (lanes * elements)))
    return Config(warps * lanes * elements, warps)


def forward(text: Tensor, features: Tensor, index: Tensor, token_ids: Tensor | None) -> Tensor:
    """The spliced rows, contiguous; arguments as for `splice_rows`, checked."""
    shape, width = index.shape, features.shape[1]
    out = torch.empty(*shape, width, dtype=features.dtype, device=features.device)
    if out.numel():
        _gather(_rows(text), None if token_ids is None else token_ids, features, index, out)
    return out


def backward(
    grad: Tensor,
    index: Tensor,
    token_ids: Tensor | None,
    features: int,
    vocabulary: int,
    *,
    text: bool,
    spliced: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the text (embeddings or table) and of the features; None for the one that is not asked for.

    Args:
        grad: of the output.
        index, token_ids: as for `splice_rows`.
        features: N.
        vocabulary: V, rows of the table; 0 without one.
        text: whether the text's gradient is wanted.
        spliced: whether that of the features is.
    """
    width = grad.shape[-1]
    rows = _rows(grad)
    d_text = d_features = None
    if text and token_ids is None:
        d_text = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        if d_text.numel():
            _gather(rows, None, None, index, d_text)
    elif text:
        assert token_ids is not None
        d_text = torch.empty(vocabulary, width, dtype=grad.dtype, device=grad.device)
        _sum(rows, token_ids.masked_fill(index >= 0, -1), d_text)
    if spliced:
        d_features = torch.empty(features, width, dtype=grad.dtype, device=grad.device)
        _sum(rows, index, d_features)
    return d_text, d_features


def _gather(text: Tensor | None, ids: Tensor | None, features: Tensor | None, index: Tensor, out: Tensor) -> None:
    width = out.shape[-1]
    config = config_for(arch_of(out.device), width, out.element_size())
    with on_device(out):
        gather_rows[(index.numel(), cdiv(width, config.BD))](
            text, None if ids is None else ids.contiguous(), features, index.contiguous(), out,
            0 if text is None else text.stride(0), 0 if features is None else features.stride(0), width,
            BD=config.BD, num_warps=config.num_warps,
        )  # fmt: skip


def _sum(grad: Tensor, read: Tensor, out: Tensor) -> None:
    """out[n] = sum of the rows of grad whose entry of `read` is n: sorted, so that no two programs write one row."""
    if not out.numel():
        return
    sorted_reads, order = torch.sort(read.flatten(), stable=True)
    ends = torch.searchsorted(sorted_reads, torch.arange(out.shape[0] + 1, dtype=read.dtype, device=read.device))
    width = out.shape[1]
    config = config_for(arch_of(out.device), width, out.element_size())
    with on_device(out):
        sum_rows[(out.shape[0], cdiv(width, config.BD))](
            grad, order, ends, out, grad.stride(0), width, BD=config.BD, num_warps=config.num_warps
        )


def _rows(x: Tensor) -> Tensor:
    """[..., D] as rows whose elements lie side by side, without a copy where their stride allows it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
