"""Drop-in modules: each block once, as a computation over the ops and as an `nn.Module` of our own."""

from .gated_cross_attention import GatedCrossAttentionBlock
from .perceiver_resampler import PerceiverResampler
from .visual_abstractor import VisualAbstractor

__all__ = ["GatedCrossAttentionBlock", "PerceiverResampler", "VisualAbstractor"]
