"""The quantised kernels in bf16 and at the sizes of models, against bitsandbytes on the same GPU."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fast.kernels.quantized_linear import Lora, Weight4bit, Weight8bit, dequantize, quantized_linear
from tests.kernels.quantized_weights import quantized, weight_8bit

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
ROWS = [1, 7, 16, 32, 64, 200, 1024, 1500]


def made(kind: str, width: int, columns: int) -> tuple[Weight4bit | Weight8bit, Any]:
    """(the weight, bitsandbytes' product with it)."""
    if kind == "int8":
        weight = weight_8bit(width, columns, device="cuda")
        dense = (weight.values.float() * weight.scale[:, None] / 127).to(BF16)
        return weight, lambda x: F.linear(x, dense)
    quant_type, _, nested = kind.partition(" ")
    weight_4, packed, state = quantized(width, columns, quant_type, 64, bool(nested), BF16, device="cuda")
    return weight_4, lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4", "int8"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "columns"), [(4096, 4096), (1000, 11008)])
def test_no_less_accurate_than_bitsandbytes(kind: str, rows: int, width: int, columns: int) -> None:
    weight, theirs = made(kind, width, columns)
    exact_weight = dequantize(weight, torch.float32).double()
    x = torch.randn(rows, columns, dtype=BF16, device="cuda")
    grad = torch.randn(rows, width, dtype=BF16, device="cuda")
    exact = (x.double() @ exact_weight.T, grad.double() @ exact_weight)
    errors = []
    for call in (lambda t: quantized_linear(t, weight), theirs):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(grad)
        assert leaf.grad is not None
        errors.append([((t.double() - e).norm() / e.norm()).item() for t, e in zip((y, leaf.grad), exact, strict=True)])
    for mine, other in zip(*errors, strict=True):
        assert mine <= 2 * other


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantised_bits(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    weight, packed, state = quantized(1024, 4096, quant_type, 64, nested, dtype, device="cuda")
    assert torch.equal(dequantize(weight, dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("rows", [1, 50])
def test_llm_int8(rows: int, threshold: float) -> None:
    weight, x = weight_8bit(512, 1024, device="cuda"), torch.randn(rows, 1024, dtype=torch.float16, device="cuda")
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.is_training, state.has_fp16_weights = weight.values, weight.scale, False, False
    theirs = bitsandbytes.matmul(x.clone(), weight.values, state=state, threshold=threshold)
    ours = quantized_linear(x, weight, outliers="llm_int8", threshold=threshold)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_low_rank_term_and_bias(rows: int, p: float) -> None:
    weight, _ = made("nf4 nested", 4096, 4096)
    a, b = (torch.randn(s, device="cuda", requires_grad=True) for s in ((16, 4096), (4096, 16)))
    x = torch.randn(rows, 4096, dtype=BF16, device="cuda", requires_grad=True)
    bias = torch.randn(4096, device="cuda", requires_grad=True)
    leaves = (x, a, b, bias)
    y = quantized_linear(x, weight, bias, lora=Lora(a, b, 0.01, p), seed=3)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, grad)
    from mllm_fast.kernels.quantized_linear import triton_launch

    keep = triton_launch.dropout(torch.ones_like(x), p, 3).double()
    exact = F.linear(x.double(), dequantize(weight, torch.float32).double(), bias.double())
    exact = exact + 0.01 * F.linear(F.linear(x.double() * keep, a.double()), b.double())
    for mine, theirs in zip((y, *found), (exact, *torch.autograd.grad(exact, leaves, grad.double())), strict=True):
        assert (mine.double() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("rows", [16, 2048])
def test_a_step_never_holds_the_weight_in_16_bits(rows: int) -> None:
    size = 16384
    weight, _ = made("nf4", size, size)
    x = torch.randn(rows, size, dtype=BF16, device="cuda", requires_grad=True)

    def step() -> None:
        quantized_linear(x, weight).backward(torch.ones(rows, size, dtype=BF16, device="cuda"))

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    # x, the result and its gradient have rows x size elements; many rows take a workspace of 64 Mi elements.
    allowed = 4 * 2 * rows * size + (1 << 25) + (2 * (1 << 26) if rows > 1024 else 0)
    assert torch.cuda.max_memory_allocated() - before <= allowed < 2 * size * size


def test_two_runs_are_bitwise_equal() -> None:
    weight, _ = made("nf4", 4096, 4096)
    x = torch.randn(16, 4096, dtype=BF16, device="cuda", requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        y = quantized_linear(x, weight)
        return y, torch.autograd.grad(y.sum(), x)[0]

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, first, run()))
