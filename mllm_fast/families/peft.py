"""PEFT's LoRA layers over bitsandbytes' linear layers: base product and low-rank term in one op."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import bnb as peft_bnb
from torch import Tensor, nn

from ..modules.children import hooked
from ..modules.frozen_linear import frozen_linear
from ..modules.lora import computes_in, read_lora
from ..modules.media_context import MediaContext
from ..modules.state import FusedState, Options, needs_graph
from . import named_like_upstream, state_of
from .bitsandbytes import FusedLinear4bit, FusedLinear8bitLt


def _state(module: nn.Module, options: Options, context: MediaContext) -> FusedState:
    return FusedState(type(module), options)


def _fused(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The layer's output [..., N], or None where PEFT's own forward has to give it."""
    base = layer._modules["base_layer"]
    if not isinstance(base, FusedLinear4bit | FusedLinear8bitLt) or state_of(base) is None or hooked(base):
        return None
    dtype = base.product_dtype(x)
    # On a CPU the base layer may have a faster way without a graph; in another dtype, PEFT computes the term in that of x.
    if not computes_in(x, dtype) or (x.device.type == "cpu" and not needs_graph(x, *layer.parameters())):
        return None
    lora = read_lora(layer, x)
    if lora is None:
        return None
    return frozen_linear(x, base.frozen_weight(), base.bias, dtype, base._mllm_fast.spec, lora)


@named_like_upstream
class FusedLoraLinear4bit(peft_bnb.Linear4bit):
    """Drop-in for PEFT's LoRA layer over a `Linear4bit`."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_state)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As upstream: [..., K] -> [..., N]."""
        y = None if args or kwargs else _fused(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


@named_like_upstream
class FusedLoraLinear8bitLt(peft_bnb.Linear8bitLt):
    """Drop-in for PEFT's LoRA layer over a `Linear8bitLt`."""

    _mllm_fast: FusedState
    fused_state = staticmethod(_state)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As upstream: [..., K] -> [..., N]."""
        y = None if args or kwargs else _fused(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y
