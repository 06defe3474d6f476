"""The public functions `quantized_linear` and `dequantize`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import runtime
from ..relaunch import PARTS, relaunches
from . import autograd, reference
from .weights import Lora, Weight, Weight4bit, Weight8bit, parts_of_4bit, parts_of_8bit

runtime.register_op(
    "quantized_linear",
    "x W^T + b with a frozen W in NF4, FP4 or int8, a LoRA term beside it, and the gradient of x",
    has_triton=True,
)

PARTS[Weight4bit] = parts_of_4bit
PARTS[Weight8bit] = parts_of_8bit

_SEEDS = 1 << 62
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`: what `quantized_linear` multiplies with.

    Bit for bit what bitsandbytes gives (`dequantize_4bit`, also with double quantisation, and
    `int8_vectorwise_dequant`): the product of code and scale in fp32, rounded to `dtype` once.

    Args:
        weight: in 4 or 8 bits.
        dtype: fp64, fp32, bf16 or fp16.

    Returns:
        [N, K], contiguous, on the weight's device.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, _FLOATS))}")
    if implementation(weight.device.type, dtype) == "torch":
        return reference.dequantize(weight, dtype)
    from . import triton_launch

    return triton_launch.dequantize(weight, dtype)


@relaunches
def quantized_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    lora: Lora | None = None,
    outliers: Literal["llm_int8"] | None = None,
    threshold: float = 6.0,
    seed: int | None = None,
) -> Tensor:
    """x W^T + bias + scaling * dropout(x) a^T b^T with a frozen W in 4 or 8 bits.

    QLoRA's linear layer (Dettmers et al. 2023, arXiv 2305.14314, eq. 5 and 6): `Linear4bit` and `Linear8bitLt` of
    bitsandbytes on their own bytes, with the term that PEFT adds (arXiv 2106.09685, eq. 3). It behaves the same in
    training and in evaluation. With int8, x stays as it is, and W alone is quantised, unless `outliers` asks for
    LLM.int8.

    Args:
        x: [..., K] in fp64, fp32, bf16 or fp16; any strides, any number of rows, 0 too.
        weight: [N, K] in 4 or 8 bits, on x's device.
        bias: [N] or None, of any floating-point dtype.
        lora: a trained term beside the weight, computed in its own dtype (under autocast in autocast's).
        outliers: "llm_int8" computes as `Linear8bitLt` does in evaluation, with the bits that it gives: x is rounded to
            int8 but for the columns where an entry reaches `threshold` (arXiv 2208.07339, section 3). It takes longer,
            the host waits for the device to learn how many columns these are, and the gradient is that of the product
            with the dequantised weight.
        threshold: of the outliers; 0: there are none. For `outliers` only.
        seed: decides which elements of x `lora` drops, together with the backend. None: drawn from torch's default CPU
            generator.

    Returns:
        [..., N] in x's dtype; under autocast in autocast's, as for `torch.nn.functional.linear`. Sums are in fp32
        (fp64 for fp64). The result is that of the product with `dequantize(weight, dtype)` up to rounding.

    Gradients flow to x, bias, a and b, once, and never to the weight. Saved for backward: nothing of x; with `lora`, x
    once if a is trained, a, b, and dropout(x) a^T. W is held in 16 bits nowhere but in the cache: on CPUs, and where
    x has many rows or blocks straddle rows (K no multiple of the block size), a part of it at a time.
    Equal inputs give bitwise equal outputs and gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or outliers without an 8-bit weight.
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    _check(x, weight, bias, lora, outliers)
    device_type = x.device.type
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        a, b = (None if t is None else t.to(dtype) for t in (a, b))
    p = 0.0 if lora is None else lora.dropout_p
    settings = autograd.Settings(
        implementation(device_type, x.dtype),
        threshold if outliers is not None else None,
        1.0 if lora is None else lora.scaling,
        p,
        0 if p == 0.0 or torch.compiler.is_compiling() else _drawn(seed),
    )
    rows = x.reshape(-1, weight.shape[1])
    if torch.compiler.is_compiling():
        # The seed stays a tensor: a tracer cannot look into it.
        drawn = torch.randint(_SEEDS, ()) if p > 0.0 and seed is None else torch.full((), seed or 0, dtype=torch.int64)
        out = autograd.run_traced(settings, weight, rows, bias, a, b, drawn)
    elif torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            out = autograd.run(settings, weight, rows, bias, a, b)
    else:
        out = autograd.run(settings, weight, rows, bias, a, b)
    return out.view(*x.shape[:-1], weight.shape[0])


def _drawn(seed: int | None) -> int:
    return int(torch.randint(_SEEDS, ()).item()) if seed is None else seed


def implementation(device_type: str, dtype: torch.dtype) -> str:
    """ "torch" or "triton", by the backend in force, the device and what the kernels can serve.

    Raises:
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    if _chosen(device_type) == "torch":
        return "torch"
    if dtype != torch.float64:
        return "triton"
    if runtime.current_backend() == "triton":
        raise runtime.BackendUnavailableError(
            "the Triton kernels of quantized_linear take fp32, bf16 and fp16, not fp64; call it under backend('auto') or "
            "'torch'"
        )
    return "torch"


def _chosen(device_type: str) -> str:
    return runtime.explain("quantized_linear", device_type)[0]


# As for runtime.current_backend: a compiled function keeps the choice in force while it was traced.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check(x: Tensor, weight: Weight, bias: Tensor | None, lora: Lora | None, outliers: str | None) -> None:
    rows, columns = weight.shape
    if x.dtype not in _FLOATS:
        raise ValueError(f"x is {x.dtype}; expected one of {', '.join(map(str, _FLOATS))}")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the weight is [{rows}, {columns}]: expected [..., {columns}]"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, but the weight is on {weight.device}; move them to one device")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but the weight is [{rows}, {columns}]: expected ({rows},)"
        )
    if lora is not None and (lora.a.shape[1] != columns or lora.b.shape[0] != rows):
        raise ValueError(
            f"lora has a {tuple(lora.a.shape)} and b {tuple(lora.b.shape)}, but the weight is [{rows}, {columns}]: "
            f"expected [r, {columns}] and [{rows}, r]"
        )
    if outliers is not None and (outliers != "llm_int8" or not isinstance(weight, Weight8bit)):
        raise ValueError(f"outliers={outliers!r} for a {type(weight).__name__}; expected None, or 'llm_int8' for int8")
