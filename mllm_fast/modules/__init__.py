"""Drop-in modules: each block once, as a computation over the ops and as an `nn.Module` of our own."""

from .gated_cross_attention import GatedCrossAttentionBlock
from .perceiver_resampler import PerceiverResampler

__all__ = ["GatedCrossAttentionBlock", "PerceiverResampler"]
