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

from ..kernels.attention import MediaRanges, MediaSubsets
from ..modules import GatedCrossAttentionBlock
from ..modules.gated_cross_attention import Visibility

DECODER_LAYER_PATHS = (
    "model.layers",
    "model.decoder.layers",
    "transformer.h",
    "transformer.blocks",
    "gpt_neox.layers",
    "model.language_model.layers",
    "biogpt.layers",
)


class Channel:
    """What ties the hooks on a language model to one `Flamingo`: two models over one language model have two channels.

    `traced` is the conditioning in force, for hooks that run in a trace. It is the channel's, not the thread's: compiled
    generations of one model run one at a time.
    """

    traced: Conditioning | None = None


@dataclass(eq=False)
class Conditioning:
    """The images of one forward pass or generation, and which of them each text position sees.

    media: [Bm, images, n, D]; one row per sample however many beams.
    index: [B, P] int64, the image that position `offset + p` of a row sees, -1 for none; later positions see what the last
        one sees, so that every generated token reads the prompt's last image. Or [B, P, images] bool, the images it sees.
    previous: a position sees the images before its index, too.
    keys_values: for each block its keys and values of the media, where these cannot change while the conditioning lasts:
        compiled steps take them from here.
    """

    channel: Channel
    media: Tensor
    index: Tensor
    offset: int = 0
    previous: bool = False
    visible: Visibility | None = None
    keys_values: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    _tail: dict[tuple[int, int], Visibility] = dataclasses.field(default_factory=dict)
    _media_on: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict)
    _visible_on: dict[torch.device, tuple[Visibility, Visibility]] = dataclasses.field(default_factory=dict)

    def condition(self, start: int | Tensor, rows: int, length: int) -> None:
        """Fix the ranges for a language model pass over positions [start, start + length) of `rows` rows.

        `start` is a tensor where a static cache counts on its device; what it holds is not asked for.
        """
        if isinstance(start, Tensor) or start - self.offset < self.index.shape[1]:
            self.visible = self._ranges(start - self.offset, rows, length)
            return
        if (rows, length) not in self._tail:
            self._tail[rows, length] = self._ranges(self.index.shape[1], rows, length)
        self.visible = self._tail[rows, length]

    def media_on(self, device: torch.device) -> Tensor:
        """The media on a device, the same tensor at each call: blocks may lie on several."""
        if self.media.device == device:
            return self.media
        if device not in self._media_on:
            self._media_on[device] = self.media.to(device)
        return self._media_on[device]

    def visible_on(self, device: torch.device) -> Visibility:
        """The ranges of this pass on a device.

        Raises:
            RuntimeError: no pass has begun.
        """
        if self.visible is None:
            raise RuntimeError("a decoder layer ran outside of its language model; call the whole language model")
        if self.index.device == device:
            return self.visible
        known = self._visible_on.get(device)
        if known is None or known[0] is not self.visible:
            known = self._visible_on[device] = self.visible, _moved(self.visible, device)
        return known[1]

    def _ranges(self, start: int | Tensor, rows: int, length: int) -> Visibility:
        if rows % self.index.shape[0]:
            raise ValueError(
                f"the language model ran {rows} rows for {self.index.shape[0]} samples; "
                "expected the same number of rows (beams or samples) for each"
            )
        positions = torch.arange(length, device=self.index.device) + start
        index = self.index[:, positions.clamp(max=self.index.shape[1] - 1)]
        index = index.repeat_interleave(rows // self.index.shape[0], dim=0)
        images, tokens = self.media.shape[1:3]
        if index.dtype == torch.bool:
            return MediaSubsets.from_mask(index, tokens)
        first = torch.zeros_like(index) if self.previous else index.clamp(min=0)
        return MediaRanges(first=first, last=index + 1, images=images, tokens_per_image=tokens)


def _moved(visible: Visibility, device: torch.device) -> Visibility:
    if isinstance(visible, MediaSubsets):
        return MediaSubsets(visible.words.to(device), visible.images, visible.tokens_per_image)
    return dataclasses.replace(visible, first=visible.first.to(device), last=visible.last.to(device))


# Per thread and per async task, so that two generations can be interleaved and nothing outlives its `with` block.
_active: ContextVar[Conditioning | None] = ContextVar("mllm_fast_flamingo", default=None)


@contextlib.contextmanager
def conditioned(conditioning: Conditioning | None) -> Iterator[None]:
    """Inside, passes of the language model with this conditioning's channel see its images."""
    token = _active.set(conditioning)
    channel = None if conditioning is None else conditioning.channel
    before = None if channel is None else channel.traced
    if channel is not None:
        channel.traced = conditioning
    try:
        yield
    finally:
        _active.reset(token)
        if channel is not None:
            channel.traced = before


def _current(channel: Channel) -> Conditioning | None:
    """The conditioning in force for the hooks of this channel."""
    if torch.compiler.is_compiling():  # a tracer cannot look into a ContextVar
        return channel.traced
    conditioning = _active.get()
    return conditioning if conditioning is not None and conditioning.channel is channel else None


def recompute_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For checkpointed decoder layers: whatever runs again during backward sees the images that it saw in forward."""
    conditioning = _active.get()
    snapshot = None if conditioning is None else dataclasses.replace(conditioning)
    return contextlib.nullcontext(), conditioned(snapshot)


def _recomputed_outside() -> bool:
    """Whether this runs in backward, with no conditioning of any channel around it."""
    return _active.get() is None and torch._C._current_graph_task_id() != -1


class DecoderHook:
    """Forward pre-hook of the module that holds the decoder layers: which positions does this pass hold?

    It is not on the language model itself, which PEFT and others call by its `forward`, past its hooks.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """As `register_forward_pre_hook(..., with_kwargs=True)` calls it."""
        conditioning = _current(self.channel)
        if conditioning is None:
            return
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        past = kwargs.get("past_key_values")
        conditioning.condition(0 if past is None else past.get_seq_length(), tokens.shape[0], tokens.shape[1])


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
        conditioning = _current(self.channel)
        if conditioning is None and not torch.compiler.is_compiling() and _recomputed_outside():
            raise RuntimeError(
                "a decoder layer is recomputed in backward without its images; enable checkpointing with "
                "Flamingo.gradient_checkpointing_enable(), not on the language model"
            )
        if conditioning is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        device = device_of(self.block, hidden.device)
        hidden, media, visible = hidden.to(device), conditioning.media_on(device), conditioning.visible_on(device)
        if self.checkpoint and torch.is_grad_enabled():
            hidden = checkpoint(self.block, hidden, media, visible, use_reentrant=False)
        elif torch.compiler.is_compiling():
            with self.block._mllm_fast.shared.given(conditioning.keys_values):
                hidden = self.block(hidden, media, visible)
        else:
            hidden = self.block(hidden, media, visible)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def device_of(block: GatedCrossAttentionBlock, otherwise: torch.device) -> torch.device:
    """Where a block computes; `otherwise` where its weights are brought from elsewhere for each call."""
    device = block.attn_gate.device
    return otherwise if device.type == "meta" else device


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
