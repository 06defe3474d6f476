"""Our own Flamingo (mllm_fast.models.flamingo): it runs the ops by itself, so that only CUDA graphs are added here."""

from __future__ import annotations

from torch import Tensor

from ..models.flamingo import Flamingo
from ..modules.state import FusedState, plain_state
from . import named_like_upstream


@named_like_upstream
class FusedFlamingo(Flamingo):
    """Drop-in for `mllm_fast.models.Flamingo`: vision encoder and resampler are replayed as one graph."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    def _encode(self, images: Tensor, frames: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        graphs = self._mllm_fast.graphs
        # Counts of frames and numbers of images may lie on another device than the parts.
        if graphs is None or frames is not None or numbers is not None:
            return super()._encode(images, frames, numbers)
        capture, parts = self._mllm_fast.shared.capture, (self.vision_encoder, self.resampler)
        encoded: Tensor = graphs.call(capture, parts, super()._encode, (images,))
        return encoded
