"""Attention for few queries or few keys: two key sources, media visibility, GQA, beams that share keys, dropout."""

from .absorbed import absorbed_attention
from .masks import Mask, MediaRanges, MediaSubsets
from .op import attention

__all__ = ["Mask", "MediaRanges", "MediaSubsets", "absorbed_attention", "attention"]
