"""bitsandbytes' `Linear4bit` and `Linear8bitLt`: the same types, bytes and state dict, another computation.

What bitsandbytes 0.50 does here and these drop-ins do not: on CPUs with AVX512-BF16 its first forward in eval mode packs
the weight anew in place, after which there is no gradient, checkpoints hold wrong scales, shapes have to be multiples of
32 and 64, and fp32 is computed in bf16. Backward never holds the whole weight in 16 bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from ..kernels import runtime
from ..kernels.quantized_linear import Nested, Weight4bit, Weight8bit
from ..modules.frozen_linear import FrozenLinearSpec, FrozenLinearState, frozen_linear
from ..modules.media_context import MediaContext
from ..modules.state import Options, needs_graph
from . import CannotFuseError, named_like_upstream
from ._bitsandbytes_cpu import CpuWeight, cpu_linear, cpu_weight, decoder_name, unpacked

# Up to this many rows the CPU's fused kernel was faster than decoding and multiplying (4096 x 4096).
CPU_ROWS = 128


@named_like_upstream
class FusedLinear4bit(bnb.nn.Linear4bit):
    """Drop-in for `Linear4bit` (NF4 and FP4, plain and double-quantised scales)."""

    _mllm_fast: FrozenLinearState
    weight: Any

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FrozenLinearState:
        state = getattr(module.weight, "quant_state", None)
        if state is None or module.weight.is_meta:
            raise CannotFuseError("its weight is not quantised yet: move it to a device first")
        if getattr(state, "packing_format_for_cpu", False):
            # bitsandbytes rounded the scales to bf16 when it packed this weight for the CPU, for good.
            warnings.warn(
                "bitsandbytes has run this model in eval mode on the CPU and thereby rounded the scales of its 4-bit "
                "weights to bf16; load the model again and fuse it before its first call to have them exact",
                stacklevel=2,
            )
            module.weight.data, state = unpacked(module.weight.data, state)
            module.weight.quant_state = module.quant_state = state
        if tuple(state.shape) != (module.out_features, module.in_features):
            raise CannotFuseError(f"its weight was quantised as {list(state.shape)}, not as [out, in]")
        try:
            weight = _weight_4bit(module.weight, state, _decoder(state))
        except (ValueError, RuntimeError) as error:
            raise CannotFuseError(str(error)) from error
        return FrozenLinearState(type(module), options, FrozenLinearSpec(), weight=weight)

    def frozen_weight(self) -> Weight4bit:
        """The layer's bytes as the op takes them."""
        weight = self._parameters["weight"]
        if getattr(weight, "quant_state", None) is None:
            fix_4bit_weight_quant_state_from_module(self)
            weight = self._parameters["weight"]
        state = self._mllm_fast
        if torch.compiler.is_compiling():
            seen = state.weight  # a tracer cannot look into the map of codes
            return _weight_4bit(weight, weight.quant_state, None if seen is None else seen.decoder)
        if not isinstance(state.weight, Weight4bit) or not _views(state.weight, weight):
            state.forget()
            state.weight = _weight_4bit(weight, weight.quant_state, _decoder(weight.quant_state))
        return state.weight

    def forward(self, x: Tensor) -> Tensor:
        """As upstream: [..., K] -> [..., N] in the dtype of `x`, computed in `compute_dtype`.

        Where no compute dtype is set, each call computes in the dtype of its `x`; upstream keeps to that of the first.
        """
        weight = self.frozen_weight()
        if self.training:
            self._mllm_fast.derived.clear()  # a second copy of the weight would be a waste while it is trained through
        elif (packed := self._packed(x, weight)) is not None:
            return cpu_linear(x.to(torch.bfloat16), packed, self.bias).to(x.dtype)
        return frozen_linear(x, weight, self.bias, self.product_dtype(x), self._mllm_fast.spec)

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that a call with `x` computes in."""
        return x.dtype if self.compute_dtype is None else self.compute_dtype

    def _packed(self, x: Tensor, weight: Weight4bit) -> CpuWeight | None:
        """A copy of the weight for the CPU's fused inference kernel, where that may serve this call."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or runtime.current_backend() != "auto":
            return None
        if self.product_dtype(x) != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            return None
        if x.numel() > CPU_ROWS * self.in_features or x.numel() == 0 or needs_graph(x, self.bias):
            return None
        sources = (weight.packed, weight.absmax)
        return self._mllm_fast.derived.get("cpu", sources, lambda: cpu_weight(weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight: Any = self._parameters["weight"]
        storage = weight.dtype
        # .half() and the like are for numbers; these are packed bytes, which quant_storage may call floating point.
        if storage.is_floating_point:
            weight.data = weight.data.view(torch.uint8)
        try:
            return super()._apply(fn, recurse)
        finally:
            if storage.is_floating_point:
                self.weight.data = self.weight.data.view(storage)
            self._mllm_fast.forget()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Upstream saves the scales and rejects them on loading."""
        stem = f"{prefix}weight."
        statistics = {key: value for key, value in state_dict.items() if key.startswith(stem)}
        if not statistics and f"{prefix}weight" not in state_dict:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        packed = state_dict.get(f"{prefix}weight")
        state = self._read_statistics(packed, statistics, stem, missing_keys, error_msgs)
        if state is None:
            return
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        unexpected_keys += [key for key in unexpected if key not in statistics]
        if not isinstance(self.weight, bnb.nn.Params4bit):  # load_state_dict(assign=True) put a plain parameter in
            self.weight = bnb.nn.Params4bit(self.weight.data, quant_storage=self.weight.dtype, bnb_quantized=True)
        self.weight.quant_state = self.quant_state = state
        self.weight.blocksize, self.weight.quant_type = state.blocksize, state.quant_type
        self.weight.compress_statistics = state.nested
        self._mllm_fast.forget()

    def _read_statistics(
        self,
        packed: Tensor | None,
        statistics: dict[str, Tensor],
        stem: str,
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> bnb.functional.QuantState | None:
        name, own = stem.removesuffix("."), self.weight
        if packed is None:
            missing_keys.append(name)
            return None
        if not statistics:
            error_msgs.append(
                f"{name} comes as {list(packed.shape)} of {packed.dtype} without absmax and quant_map; expected a "
                "checkpoint of the quantised layer (quantise after loading a full-precision one)"
            )
            return None
        try:
            copies = {key.removeprefix(stem): value.clone() for key, value in statistics.items()}
            state = bnb.functional.QuantState.from_dict(copies, device=own.device)
            if packed.dtype != own.dtype or tuple(state.shape) != (self.out_features, self.in_features):
                raise ValueError(
                    f"a weight {list(state.shape)} in {packed.dtype}; expected "
                    f"{[self.out_features, self.in_features]} in {own.dtype}"
                )
        except (ValueError, KeyError, AssertionError) as error:
            error_msgs.append(f"{name}: the checkpoint has {error or 'unknown statistics'}")
            return None
        return state


@named_like_upstream
class FusedLinear8bitLt(bnb.nn.Linear8bitLt):
    """Drop-in for `Linear8bitLt` with a frozen int8 weight."""

    _mllm_fast: FrozenLinearState
    weight: Any

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FrozenLinearState:
        if module.state.has_fp16_weights:
            raise CannotFuseError("its weight is kept in 16 bit and trained (has_fp16_weights)")
        if module.weight.dtype != torch.int8 or _row_scales(module) is None or module.weight.is_meta:
            raise CannotFuseError("its weight is not quantised yet: move it to a device first")
        _align(module)
        return FrozenLinearState(type(module), options, FrozenLinearSpec(threshold=module.state.threshold))

    def frozen_weight(self) -> Weight8bit:
        """The layer's bytes as the op takes them."""
        weight, scale = self._parameters["weight"], _row_scales(self)
        if torch.compiler.is_compiling():
            return Weight8bit(_plain(weight), scale)
        state = self._mllm_fast
        view = state.weight
        if (
            not isinstance(view, Weight8bit)
            or view.scale is not scale
            or view.values.untyped_storage()._cdata != weight.untyped_storage()._cdata
        ):
            state.weight = Weight8bit(_plain(weight), scale)
        return state.weight

    def forward(self, x: Tensor) -> Tensor:
        """As upstream: [..., K] -> [..., N] in the dtype of `x`, which is also what is computed in."""
        return frozen_linear(x, self.frozen_weight(), self.bias, x.dtype, self._mllm_fast.spec)

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that a call with `x` computes in."""
        return x.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        try:
            return super()._apply(fn, recurse)
        finally:
            # The weight moves as a parameter; its scales, and the second name of the weight, are plain attributes.
            weight, state = self.weight, self.state
            for holder in (weight, state):
                if holder.CB is not None:
                    holder.CB = weight.data
                if holder.SCB is not None:
                    holder.SCB = holder.SCB.to(weight.device)
            self._mllm_fast.forget()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Upstream refuses to load once the layer has run, because it looks for the scales where they were before."""
        scales, weight = state_dict.get(f"{prefix}SCB"), state_dict.get(f"{prefix}weight")
        own = _row_scales(self)
        if weight is not None and (weight.dtype != torch.int8 or scales is None or scales.shape != own.shape):
            error_msgs.append(
                f"{prefix}weight comes as {list(weight.shape)} of {weight.dtype} "
                f"{'without' if scales is None else 'with'} SCB; expected int8 {list(self.weight.shape)} with SCB"
            )
            return
        rest = {key: value for key, value in state_dict.items() if key != f"{prefix}SCB"}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not isinstance(self.weight, bnb.nn.Int8Params):  # load_state_dict(assign=True)
            self.weight = bnb.nn.Int8Params(self.weight.data, False, CB=self.weight.data, SCB=own)
            self.state.CB = self.state.SCB = None
        if scales is not None:
            own.copy_(scales)
        self._mllm_fast.forget()


def _decoder(state: bnb.functional.QuantState) -> str | None:
    return decoder_name(state.code, state.quant_type, state.blocksize)


def _weight_4bit(weight: Tensor, state: bnb.functional.QuantState, decoder: str | None) -> Weight4bit:
    packed = _plain(weight)
    if packed.dtype != torch.uint8:
        packed = packed.contiguous().view(torch.uint8)
    nested = None
    if state.nested:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    absmax = state.absmax if state.nested else state.absmax.float()
    code, shape = state.code.float(), tuple(state.shape)
    return Weight4bit(packed.flatten(), absmax, code, state.blocksize, shape, nested, decoder)


def _plain(weight: Tensor) -> Tensor:
    """The parameter's bytes without its class, which sends every operation through Python."""
    weight = weight.detach()
    return weight if torch.compiler.is_compiling() else weight.as_subclass(Tensor)  # which torch.compile cannot trace


def _views(view: Weight4bit, weight: Any) -> bool:
    """Whether `view` shows the bytes that the parameter holds now."""
    state, nested = weight.quant_state, view.nested
    if nested is None:
        same = not state.nested
    else:
        inner = state.state2
        same = nested.absmax is inner.absmax and nested.code is inner.code and nested.offset is state.offset
    return (
        same
        and view.absmax is state.absmax
        and view.code is state.code
        and view.blocksize == state.blocksize
        and view.packed.untyped_storage()._cdata == weight.untyped_storage()._cdata
    )


def _align(module: nn.Module) -> None:
    """Copy an int8 weight that lies at an odd address of a mapped checkpoint: torch's int8 product wants 16 bytes."""
    weight, state = module.weight, module.state
    if weight.device.type != "cpu" or weight.data_ptr() % 16 == 0:
        return
    weight.data = weight.data.clone()
    for holder in (weight, state):
        if holder.CB is not None:
            holder.CB = weight.data


def _row_scales(module: nn.Module) -> Tensor | None:
    """They move from the weight to the layer's state when upstream's forward first runs."""
    scales = getattr(module._parameters["weight"], "SCB", None)
    return module.state.SCB if scales is None else scales
