"""What OpenFlamingo and flamingo-pytorch have in common: the same block layout, written twice upstream."""

from __future__ import annotations

from torch import nn

from ..modules.children import hooked
from ..modules.gated_cross_attention import GatedCrossAttentionSpec, Names
from ..modules.perceiver_resampler import LayerNames, PerceiverResamplerSpec
from . import CannotFuseError

BLOCK_NAMES = Names(
    norm="attn.norm",
    q="attn.to_q",
    k=None,
    v=None,
    kv="attn.to_kv",
    out="attn.to_out",
    attn_gate="attn_gate",
    ffn_norm="ff.0",
    ffn_up="ff.1",
    ffn_down="ff.3",
    ffn_gate="ff_gate",
)


def block_spec(block: nn.Module) -> GatedCrossAttentionSpec:
    """The spec of a GatedCrossAttentionBlock with `attn` and a Sequential `ff`."""
    heads = block.attn.heads
    return GatedCrossAttentionSpec(
        heads=heads,
        head_dim=_out_features(block.attn.to_q) // heads,
        kv_heads=heads,
        activation=activation_name(block.ff[2]),
        scale=block.attn.scale,
        names=BLOCK_NAMES,
    )


def resampler_spec(resampler: nn.Module) -> PerceiverResamplerSpec:
    """The spec of a PerceiverResampler whose layers are pairs of a PerceiverAttention and a Sequential."""
    if len(resampler.layers) == 0:
        raise CannotFuseError("a resampler without layers is only its norm")
    attention, ffn = resampler.layers[0]
    layers = tuple(
        LayerNames(
            norm_media=f"layers.{i}.0.norm_media",
            norm_latents=f"layers.{i}.0.norm_latents",
            q=f"layers.{i}.0.to_q",
            kv=f"layers.{i}.0.to_kv",
            out=f"layers.{i}.0.to_out",
            ffn_norm=f"layers.{i}.1.0",
            ffn_up=f"layers.{i}.1.1",
            ffn_down=f"layers.{i}.1.3",
        )
        for i in range(len(resampler.layers))
    )
    return PerceiverResamplerSpec(
        heads=attention.heads,
        head_dim=_out_features(attention.to_q) // attention.heads,
        kv_heads=attention.heads,
        activation=activation_name(ffn[2]),
        latents="latents",
        layers=layers,
        final_norm="norm",
    )


def block_hooked(block: nn.Module) -> bool:
    """Whether a child is hooked whose own forward the fused block does not run."""
    children = block._modules
    return hooked(children["attn"]) or hooked(children["ff"]) or hooked(children["ff"]._modules["2"])


def resampler_hooked(resampler: nn.Module) -> bool:
    """Whether a child is hooked whose own forward the fused resampler does not run."""
    pairs = resampler.layers
    return any(hooked(child) for pair in pairs for child in (pair, *pair, pair[1][2]))


def activation_name(activation: nn.Module) -> str:
    """The name `ops.norm_linear` has for an upstream activation module."""
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if type(activation) is nn.ReLU:
        return "relu"
    if type(activation) is nn.SiLU:
        return "silu"
    raise CannotFuseError(f"its feed-forward activation is {type(activation).__name__}, which no kernel computes")


def _out_features(linear: nn.Module) -> int:
    return int(linear.out_features)
