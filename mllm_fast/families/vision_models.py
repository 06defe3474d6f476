"""Vision models of transformers whose runs are captured as CUDA graphs; what they compute is upstream's."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipVisionModel
from transformers.models.instructblipvideo.modeling_instructblipvideo import InstructBlipVideoVisionModel

from ..modules.graphs import replayed
from ..modules.media_context import MediaContext
from ..modules.state import FusedState, Options
from ._transformers import model_dropin


class _State:
    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, None, context)


@model_dropin
class FusedBlipVisionModel(BlipVisionModel, _State):
    """Drop-in for `BlipVisionModel` in a model fused with CUDA graphs."""

    @replayed
    @functools.wraps(BlipVisionModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@model_dropin
class FusedBlip2VisionModel(Blip2VisionModel, _State):
    """Drop-in for `Blip2VisionModel` in a model fused with CUDA graphs."""

    @replayed
    @functools.wraps(Blip2VisionModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@model_dropin
class FusedInstructBlipVisionModel(InstructBlipVisionModel, _State):
    """Drop-in for `InstructBlipVisionModel` in a model fused with CUDA graphs."""

    @replayed
    @functools.wraps(InstructBlipVisionModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@model_dropin
class FusedInstructBlipVideoVisionModel(InstructBlipVideoVisionModel, _State):
    """Drop-in for `InstructBlipVideoVisionModel` in a model fused with CUDA graphs."""

    @replayed
    @functools.wraps(InstructBlipVideoVisionModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
