"""Media keys and values for compiled decode steps.

Inside a trace nothing can be kept by the identity of a tensor: a compiled function could not tell that media or weights
were written to since. So `MediaContext` projects the media anew in every compiled call, unless the call is handed the keys
and values as arguments. `generate` does that: before each step it prepares the step's inputs, uncompiled, and there the
context, which checks media and weights each time, gives what it has kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.gated_cross_attention import media_keys_values
from ..modules.media_context import KeysValues
from ..modules.state import FusedState

# The keyword by which keys and values travel from the preparation of a step to the model's forward.
KEYS_VALUES = "mllm_fast_keys_values"


def project_ahead(state: FusedState, blocks: Sequence[nn.Module], media: Tensor | None, inputs: dict[str, Any]) -> None:
    """Add the blocks' keys and values to the inputs of a step that may run compiled.

    Args:
        state: of the model.
        blocks: its fused gated blocks, in order.
        media: [B_media, images, tokens, D_media] as the blocks will see it; None: the step encodes its images itself.
        inputs: of the step, as `prepare_inputs_for_generation` returns them.
    """
    past = inputs.get("past_key_values")
    if media is None or state.options.level == 0 or past is None or not past.is_compileable:
        return
    inputs[KEYS_VALUES] = tuple(media_keys_values(b, b._mllm_fast.spec, b._mllm_fast, media) for b in blocks)


def taken(
    state: FusedState, blocks: Sequence[nn.Module], keys_values: Sequence[KeysValues] | None
) -> AbstractContextManager[None]:
    """While it lasts, blocks in a trace use the keys and values that came with a step's inputs, if any did."""
    if keys_values is None or not torch.compiler.is_compiling():  # uncompiled, the context finds its own
        return nullcontext()
    return state.shared.given({id(b._mllm_fast): kv for b, kv in zip(blocks, keys_values, strict=True)})
