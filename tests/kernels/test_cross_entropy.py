"""frozen_cross_entropy against the loss of transformers over the whole logits."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from mllm_fast.kernels import runtime
from mllm_fast.kernels.cross_entropy import frozen_cross_entropy, op
from mllm_fast.kernels.quantized_linear import Weight4bit, Weight8bit, dequantize

V, D = 37, 16


def draw(*shape: int, dtype: torch.dtype = torch.float64, supervised: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(*shape, D, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype)
    labels = torch.where(torch.rand(shape) < supervised, torch.randint(V, shape), -100)
    return hidden, weight, labels


def peer(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **kw: Any) -> Tensor:
    softcap = kw.pop("softcap", None)
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels.flatten(), **kw)


def gradient(loss: Tensor, hidden: Tensor) -> Tensor:
    (d,) = torch.autograd.grad(3.0 * loss, hidden)
    return d


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"softcap": 2.0}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows_a_chunk", [1, 3, 1000])
def test_equals_the_loss_over_all_logits(
    options: dict[str, Any], bias: bool, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(op.CHUNK_BYTES, "cpu", rows_a_chunk * V * 8)
    hidden, weight, labels = draw(3, 11)
    b = torch.randn(V, dtype=torch.float64) if bias else None
    options = options | {"ignore_index": -100}
    ours = frozen_cross_entropy(hidden, weight, labels, bias=b, **options)
    theirs = peer(hidden, weight, labels, b, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, hidden), gradient(theirs, hidden))
    with torch.no_grad():
        torch.testing.assert_close(frozen_cross_entropy(hidden, weight, labels, bias=b, **options), theirs)


def test_shifted_it_is_the_loss_of_transformers() -> None:
    hidden, weight, labels = draw(2, 9, dtype=torch.float32)
    ours = frozen_cross_entropy(hidden, weight, labels, shift=True)
    theirs = ForCausalLMLoss(hidden @ weight.T, labels, V)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, hidden), gradient(theirs, hidden))


@pytest.mark.parametrize("supervised", [0.0, 1.0])
def test_all_or_nothing_supervised(supervised: float) -> None:
    hidden, weight, labels = draw(2, 5, supervised=supervised)
    for reduction in ("mean", "sum"):
        ours = frozen_cross_entropy(hidden, weight, labels, reduction=reduction)
        theirs = peer(hidden, weight, labels, reduction=reduction)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        torch.testing.assert_close(
            gradient(ours, hidden), gradient(theirs, hidden) if supervised else torch.zeros_like(hidden)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_errs_no_more_than_upstream(dtype: torch.dtype) -> None:
    hidden, weight, labels = draw(8, 40)
    exact = peer(hidden, weight, labels)
    d_exact = gradient(exact, hidden)
    low, w = hidden.detach().to(dtype).requires_grad_(), weight.to(dtype)
    ours = frozen_cross_entropy(low, w, labels)
    theirs = F.cross_entropy(F.linear(low, w).float().flatten(0, -2), labels.flatten())
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 1e-5
    mine, other = ((gradient(loss, low) - d_exact).square().mean().sqrt() for loss in (ours, theirs))
    assert mine <= 2 * other


class Largest(TorchDispatchMode):
    """The most elements of any tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_the_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(op.CHUNK_BYTES, "cpu", 8 * 500 * 4)
    hidden, weight = torch.randn(4, 64, D).requires_grad_(), torch.randn(500, D)
    labels = torch.randint(500, (4, 64))
    with Largest() as seen:
        frozen_cross_entropy(hidden, weight, labels).backward()
    assert seen.elements <= max(8 * 500, hidden.numel(), weight.numel())
    with Largest() as seen:
        peer(hidden, weight, labels).backward()
    assert seen.elements == 4 * 64 * 500


def quantised(kind: str, nested: bool) -> tuple[Weight4bit | Weight8bit, Tensor]:
    w = torch.randn(96, 64)
    if kind == "int8":
        scale = w.abs().amax(1)
        values = (w * (127 / scale.unsqueeze(1))).round().to(torch.int8)
        weight: Weight4bit | Weight8bit = Weight8bit(values, scale)
        return weight, values.float() * (scale / 127).unsqueeze(1)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind)
    weight = Weight4bit(packed.view(-1), state.absmax, state.code, 64, (96, 64))
    return weight, bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_over_a_quantised_head(kind: str) -> None:
    weight, dense = quantised(kind, nested=False)
    hidden = torch.randn(5, 7, 64, requires_grad=True)
    labels = torch.where(torch.rand(5, 7) < 0.5, torch.randint(96, (5, 7)), -100)
    bias = torch.randn(96)
    ours, theirs = frozen_cross_entropy(hidden, weight, labels, bias=bias), peer(hidden, dense, labels, bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(ours, hidden), gradient(theirs, hidden), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dequantize(weight, torch.float32), dense, rtol=1e-6, atol=0)


def test_autocast_lowers_it_as_a_linear_layer() -> None:
    hidden, weight, labels = draw(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = frozen_cross_entropy(hidden, weight, labels)
        theirs = peer(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert gradient(ours, hidden).dtype == torch.float32


@pytest.mark.parametrize("quantise", [False, True])
def test_traced_without_a_break(quantise: bool) -> None:
    weight: Any
    if quantise:
        weight, dense = quantised("nf4", nested=False)
    else:
        weight = dense = torch.randn(96, 64)
    hidden = torch.randn(3, 8, 64, requires_grad=True)
    labels = torch.where(torch.rand(3, 8) < 0.5, torch.randint(96, (3, 8)), -100)
    compiled = torch.compile(
        lambda h: frozen_cross_entropy(h * 1.0, weight, labels, shift=True), fullgraph=True, backend="aot_eager"
    )
    ours, theirs = compiled(hidden), peer(hidden[:, :-1], dense, labels[:, 1:])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(ours, hidden), gradient(theirs, hidden), rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    hidden, weight, labels = draw(2, 5, dtype=torch.float32)
    torch.library.opcheck(op._traced, (hidden, [weight], 0, V, D, None, labels, -100, 0.1, 3.0, True, True))


def test_repeats_bitwise_and_leaves_its_inputs_alone() -> None:
    hidden, weight, labels = draw(4, 9, dtype=torch.float32, supervised=1.0)
    before = [x.detach().clone() for x in (hidden, weight, labels)]
    results = []
    for _ in range(2):
        loss = frozen_cross_entropy(hidden, weight, labels)
        results.append((loss.detach(), gradient(loss, hidden)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, labels), strict=True))
    loss = frozen_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_bad_input() -> None:
    hidden, weight, labels = draw(2, 5)
    with pytest.raises(ValueError, match="head's weight requires a gradient"):
        frozen_cross_entropy(hidden, weight.clone().requires_grad_(), labels)
    with pytest.raises(ValueError, match=r"expected \[V, D\]"):
        frozen_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="one label a row"):
        frozen_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="37 classes"):
        frozen_cross_entropy(hidden, weight, torch.full_like(labels, V))
    with pytest.raises(ValueError, match="labels hold -1"):
        frozen_cross_entropy(hidden, weight, torch.full_like(labels, -1))
    with pytest.raises(ValueError, match="cast them to one dtype"):
        frozen_cross_entropy(hidden, weight.float(), labels)
    with pytest.raises(ValueError, match="softcap must be positive"):
        frozen_cross_entropy(hidden, weight, labels, softcap=0.0)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        frozen_cross_entropy(hidden, weight, labels, reduction="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias has shape"):
        frozen_cross_entropy(hidden, weight, labels, bias=weight[0])
    with pytest.raises(ValueError, match="label_smoothing"):
        frozen_cross_entropy(hidden, weight, labels, label_smoothing=1.5)


def test_is_listed() -> None:
    assert "frozen_cross_entropy" in [declared.name for declared in runtime.ops()]
