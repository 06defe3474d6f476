"""What the oldest supported transformers cannot do by itself, so that there is nothing to compare with."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

BEFORE_5_20 = Version(transformers.__version__) < Version("5.20")

IDEFICS_BEAMS = pytest.mark.skipif(BEFORE_5_20, reason="upstream's IDEFICS fails with beams before transformers 5.20")
MLLAMA_STATIC_CACHE = pytest.mark.skipif(
    BEFORE_5_20, reason="upstream's Mllama fails with a static cache before transformers 5.20"
)
MLLAMA_STEPS = pytest.mark.skipif(
    BEFORE_5_20, reason="upstream's Mllama wants the mask of all tokens at each step before transformers 5.20"
)
ENCODER_OUTPUTS = pytest.mark.skipif(BEFORE_5_20, reason="mm_encoder_outputs came with transformers 5.20")


def beams(system: str) -> tuple[int, ...]:
    """Numbers of beams that upstream's own model of this system generates with."""
    return (1,) if system.startswith("idefics") and BEFORE_5_20 else (1, 3)
