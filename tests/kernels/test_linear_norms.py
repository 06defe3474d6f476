"""The norms of heads and of residuals in norm_linear and linear_residual, against explicit compositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.bert.modeling_bert import BertConfig, BertOutput
from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm
from transformers.models.mllama.modeling_mllama import MllamaTextRMSNorm

from mllm_fast.kernels.linear import linear_residual, norm_linear
from mllm_fast.kernels.norm import Norm
from tests.kernels.op_checks import Inputs, Op, check_exact, check_low_precision
from tests.kernels.test_linear import (
    LOW,
    draw_linear,
    draw_linear_residual,
    linear_residual_pair,
    our_norm,
    their_norm,
)


def head_norm_pair(kind: str | None, head_dim: int) -> tuple[Op, Op]:
    """A pre-norm query projection with normalised heads, and the same by transformers' module."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, **kw: Tensor) -> Tensor:
        norm = our_norm(kind, kw.get("norm_weight"), kw.get("norm_bias"))
        return norm_linear(x, weight, bias, norm=norm, head_norm=Norm("rms_norm", gain, eps=1e-6))

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, **kw: Tensor) -> Tensor:
        y = F.linear(their_norm(x, kind, kw.get("norm_weight"), kw.get("norm_bias")), weight, bias)
        heads = y.unflatten(-1, (-1, head_dim))
        # MllamaTextRMSNorm computes in fp32; here in the dtype of a narrow input and in fp64 for the exact result.
        wide = heads.double() if heads.dtype == torch.float64 else heads.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(heads.dtype)
        return (gain * normed).flatten(-2)

    return ours, theirs


def draw_heads(rows: tuple[int, ...], k: int, heads: int, head_dim: int, kind: str | None) -> Inputs:
    return draw_linear(rows, k, heads * head_dim, norm=kind) | {"gain": torch.randn(head_dim)}


@pytest.mark.parametrize("kind", [None, "layer_norm", "rms_norm"])
def test_head_norm(kind: str | None) -> None:
    for rows, heads, head_dim in [((2, 5), 3, 4), ((1,), 1, 7), ((3, 0), 2, 1)]:
        check_exact(*head_norm_pair(kind, head_dim), draw_heads(rows, 11, heads, head_dim, kind))
    for dtype in LOW:
        check_low_precision(*head_norm_pair(kind, 16), lambda: draw_heads((2, 8), 64, 3, 16, kind), dtype)


@pytest.mark.parametrize(("theirs", "arguments"), [(IdeficsRMSNorm, (8,)), (MllamaTextRMSNorm, (8,))])
def test_head_norm_is_that_of_transformers(theirs: Any, arguments: tuple[int]) -> None:
    peer = theirs(*arguments, eps=1e-5)
    peer.weight.data.normal_()
    x, weight = torch.randn(2, 5, 12), torch.randn(24, 12)
    ours = norm_linear(x, weight, head_norm=Norm("rms_norm", peer.weight, eps=1e-5))
    torch.testing.assert_close(ours, peer(F.linear(x, weight).unflatten(-1, (3, 8))).flatten(-2))


def residual_norm_pair(kind: str, post: bool, p: float) -> tuple[Op, Op]:
    """A block whose own residual is a post-norm that the block before left out."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gain: Tensor, **kw: Any) -> Tensor:
        norm = our_norm("layer_norm", kw.pop("norm_weight"), kw.pop("norm_bias")) if post else None
        before = our_norm(kind, gain, kw.pop("shift", None))
        arguments = {"residual": residual, "norm": norm, "residual_norm": before, "dropout_p": p, "seed": 3}
        return linear_residual(x, weight, bias, **arguments, **kw)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gain: Tensor, **kw: Any) -> Tensor:
        residual = their_norm(residual, kind, gain, kw.pop("shift", None))
        return linear_residual_pair("layer_norm" if post else None, p)[1](x, weight, bias, residual=residual, **kw)

    return ours, theirs


def draw_residual_norm(rows: tuple[int, ...], k: int, kind: str, post: bool) -> Inputs:
    gate = None if post else (13,)
    inputs = draw_linear_residual(rows, k, "layer_norm" if post else None, gate, not post)
    inputs["gain"] = torch.randn(13)
    return inputs | ({"shift": torch.randn(13)} if kind == "layer_norm" else {})


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_residual_norm(kind: str, post: bool, p: float) -> None:
    for rows in [(1, 1), (2, 5), (3, 0)]:
        check_exact(*residual_norm_pair(kind, post, p), draw_residual_norm(rows, 11, kind, post))
    for dtype in LOW:
        check_low_precision(
            *residual_norm_pair(kind, post, p), lambda: draw_residual_norm((2, 16), 64, kind, post), dtype
        )


def test_a_deferred_post_norm_is_that_of_the_block() -> None:
    """Two BERT blocks in a row: the norm between them may belong to the first or to the readers of its sum."""
    peers = [BertOutput(BertConfig(hidden_size=24, intermediate_size=24)).eval() for _ in range(2)]
    for peer in peers:
        peer.LayerNorm.weight.data.normal_()
        peer.LayerNorm.bias.data.normal_()
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    middle = peers[0](x, residual)
    theirs = peers[1](middle, middle)
    norms = [Norm("layer_norm", peer.LayerNorm.weight, peer.LayerNorm.bias, peer.LayerNorm.eps) for peer in peers]
    total = linear_residual(x, peers[0].dense.weight, peers[0].dense.bias, residual=residual)
    again = norm_linear(total, peers[1].dense.weight, peers[1].dense.bias, norm=norms[0])
    eye, arguments = torch.eye(24), {"residual": total, "residual_norm": norms[0], "norm": norms[1]}
    torch.testing.assert_close(linear_residual(again, eye, **arguments), theirs, rtol=0, atol=2e-6)
