"""One layer of a vision transformer, norms first (Dosovitskiy et al. 2020, arXiv 2010.11929, equations 2 and 3).

    x = x + W_o attention(norm(x) W_qkv)
    x = x + W_2 act(W_1 norm(x))

Five launches: each norm is part of the GEMM that reads it, each residual of the GEMM that is added to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import ops
from . import children
from .state import FusedState


@dataclass(frozen=True)
class VisionLayerSpec:
    """What a layer computes, and the dotted paths of its children.

    Attributes:
        heads, head_dim: of the attention.
        activation: of the feed-forward network, a name of `ops.norm_linear`.
        interleaved: the rows of `qkv` are query, key and value of the first head, then of the second, and so on (Megatron's
            order); otherwise all heads' queries, then keys, then values.
    """

    heads: int
    head_dim: int
    activation: str
    interleaved: bool
    attention_norm: str
    qkv: str
    out: str
    ffn_norm: str
    up: str
    down: str


def run_vision_layer(
    module: nn.Module, spec: VisionLayerSpec, state: FusedState, x: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """The layer on x [N, L, D] -> [N, L, D]; `dropout_p` is on the attention's probabilities."""
    roles = (spec.attention_norm, spec.qkv, spec.out, spec.ffn_norm, spec.up, spec.down)
    attention_norm, qkv, out, ffn_norm, up, down = (children.resolve(module, path) for path in roles)
    packs = state.packs
    projected = children.norm_linear(x, attention_norm, qkv, packs=packs)
    if spec.interleaved:
        q, k, v = projected.unflatten(-1, (spec.heads, 3, spec.head_dim)).unbind(-2)
    else:
        q, k, v = projected.unflatten(-1, (3, spec.heads, spec.head_dim)).unbind(-3)
    attended = ops.attention(q, k, v, dropout_p=dropout_p).flatten(-2)
    x = children.linear_residual(attended, out, x, packs=packs)
    hidden = children.norm_linear(x, ffn_norm, up, activation=spec.activation, packs=packs)
    return children.linear_residual(hidden, down, x, packs=packs)
