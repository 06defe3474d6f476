"""MiniGPT-4 (mllm_fast.models.minigpt4): the projection. Its Q-Former is BLIP-2's, and has the drop-ins of that.

The rest needs no drop-in: the model puts image rows in by index, and encodes images once for a whole generation.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..models.minigpt4 import MiniGPT4Projection
from ..modules.media_context import MediaContext
from ..modules.projector import ProjectorSpec, project
from ..modules.state import FusedState, Options
from . import named_like_upstream


@named_like_upstream
class FusedMiniGPT4Projection(MiniGPT4Projection):
    """Drop-in for `MiniGPT4Projection`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, ProjectorSpec(("linear",)), context)

    def forward(self, features: Tensor) -> Tensor:
        return project(self, self._mllm_fast.spec, self.rows(features))
