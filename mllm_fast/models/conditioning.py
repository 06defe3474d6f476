"""How a frozen language model is made to see images without being changed: hooks, and what they are told.

`conditioned` says which images the passes inside it see. A hook on the language model works out which positions a pass
holds, once for all layers, and a hook on some decoder layers sends the hidden states through a gated block first.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.attention import MediaRanges
from ..modules import GatedCrossAttentionBlock

DECODER_LAYER_PATHS = (
    "model.layers",
    "model.decoder.layers",
    "transformer.h",
    "transformer.blocks",
    "gpt_neox.layers",
    "model.language_model.layers",
)


class Channel:
    """What ties the hooks on a language model to one `Flamingo`: two models over one language model have two channels."""


@dataclass(eq=False)
class Conditioning:
    """The images of one forward pass or generation, and which of them each text position sees.

    media: [Bm, images, n, D]; one row per sample however many beams.
    index: [B, P] int64, the image that position `offset + p` of a row sees, -1 for none; later positions see what the last
        one sees, so that every generated token reads the prompt's last image.
    """

    channel: Channel
    media: Tensor
    index: Tensor
    offset: int = 0
    visible: MediaRanges | None = None
    _tail: dict[tuple[int, int], MediaRanges] = dataclasses.field(default_factory=dict)

    def condition(self, start: int, rows: int, length: int) -> None:
        """Fix the ranges for a language model pass over positions [start, start + length) of `rows` rows."""
        beyond_prompt = start - self.offset >= self.index.shape[1]
        if not beyond_prompt:
            self.visible = self._ranges(start - self.offset, rows, length)
            return
        if (rows, length) not in self._tail:
            self._tail[rows, length] = self._ranges(self.index.shape[1], rows, length)
        self.visible = self._tail[rows, length]

    def _ranges(self, start: int, rows: int, length: int) -> MediaRanges:
        if rows % self.index.shape[0]:
            raise ValueError(
                f"the language model ran {rows} rows for {self.index.shape[0]} samples; "
                "expected the same number of rows (beams or samples) for each"
            )
        positions = torch.arange(start, start + length, device=self.index.device)
        index = self.index[:, positions.clamp_(max=self.index.shape[1] - 1)]
        index = index.repeat_interleave(rows // self.index.shape[0], dim=0)
        return MediaRanges(
            first=index.clamp(min=0), last=index + 1, images=self.media.shape[1], tokens_per_image=self.media.shape[2]
        )


# Per thread and per async task, so that two generations can be interleaved and nothing outlives its `with` block.
_active: ContextVar[Conditioning | None] = ContextVar("mllm_fast_flamingo", default=None)


@contextlib.contextmanager
def conditioned(conditioning: Conditioning | None) -> Iterator[None]:
    """Inside, passes of the language model with this conditioning's channel see its images."""
    token = _active.set(conditioning)
    try:
        yield
    finally:
        _active.reset(token)


def recompute_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For checkpointed decoder layers: whatever runs again during backward sees the images that it saw in forward."""
    conditioning = _active.get()
    snapshot = None if conditioning is None else dataclasses.replace(conditioning)
    return contextlib.nullcontext(), conditioned(snapshot)


class DecoderHook:
    """Forward pre-hook of the module that holds the decoder layers: which positions does this pass hold?

    It is not on the language model itself, which PEFT and others call by its `forward`, past its hooks.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """As `register_forward_pre_hook(..., with_kwargs=True)` calls it."""
        conditioning = _active.get()
        if conditioning is None or conditioning.channel is not self.channel:
            return
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        past = kwargs.get("past_key_values")
        conditioning.condition(0 if past is None else int(past.get_seq_length()), tokens.shape[0], tokens.shape[1])


class LayerHook:
    """Forward pre-hook of a decoder layer: its hidden states [B, S, dim] pass through the gated block first."""

    def __init__(self, channel: Channel, block: GatedCrossAttentionBlock) -> None:
        self.channel = channel
        self.block = block
        self.checkpoint = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """As `register_forward_pre_hook(..., with_kwargs=True)` calls it; returns the layer's new arguments."""
        conditioning = _active.get()
        if conditioning is None and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a decoder layer is recomputed in backward without its images; enable checkpointing with "
                "Flamingo.gradient_checkpointing_enable(), not on the language model"
            )
        if conditioning is None or conditioning.channel is not self.channel:
            return None
        if conditioning.visible is None:
            raise RuntimeError("a decoder layer ran outside of its language model; call the whole language model")
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.checkpoint and torch.is_grad_enabled():
            hidden = checkpoint(self.block, hidden, conditioning.media, conditioning.visible, use_reentrant=False)
        else:
            hidden = self.block(hidden, conditioning.media, conditioning.visible)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def base_model(lm: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT wrapper, or `lm` itself."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def decoder(lm: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the decoder layers of a Hugging Face language model, and the layers, by the known paths.

    Raises:
        ValueError: none of the paths leads to a list of layers.
    """
    base = base_model(lm)
    for path in DECODER_LAYER_PATHS:
        holder: Any = base
        *outer, last = path.split(".")
        for name in outer:
            holder = getattr(holder, name, None)
        layers = getattr(holder, last, None)
        if isinstance(layers, nn.ModuleList):
            return holder, layers
    raise ValueError(
        f"no decoder layers were found in {type(base).__name__}; looked for {', '.join(DECODER_LAYER_PATHS)}. "
        "Pass a Hugging Face causal language model, such as AutoModelForCausalLM gives"
    )


def text_width(lm: nn.Module) -> int:
    """Width of the hidden states between the decoder layers."""
    config: Any = base_model(lm).config
    for name in ("hidden_size", "d_model", "n_embd"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise ValueError(
        f"{type(config).__name__} has none of hidden_size, d_model, n_embd; expected a text model's config"
    )
