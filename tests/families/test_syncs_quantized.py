"""No layer over a frozen weight in 4 or 8 bits waits for the device; see test_syncs.py. Only LLM.int8's outliers do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.tuners.lora import bnb as peft_bnb
from torch import Tensor, nn

import mllm_fast
from mllm_fast.kernels.quantized_linear import configs
from mllm_fast.quantization.quantize import adopt
from tests.families import frozen_decoders
from tests.families.fake_gpu import FakeGpu, HostReadError
from tests.families.quantized_layers import layer4, layer8

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": layer4,
    "nf4_nested": lambda: layer4(nested=True),
    "fp4": lambda: layer4(quant_type="fp4"),
    "nf4_straddling": lambda: layer4(columns=96),  # blocks that no kernel reads in place
    "int8": layer8,
}
trained = pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
adapters = pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])


def on_gpu(gpu: FakeGpu, module: nn.Module) -> nn.Module:
    """The module itself on the fake GPU, with what bitsandbytes keeps beside its parameters."""
    layers = [layer for layer in module.modules() if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    weights = [layer.weight for layer in layers]
    gpu.module(module)
    for layer, weight in zip(layers, weights, strict=True):
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.weight.quant_state = layer.quant_state = quant_state(gpu, weight.quant_state)
        else:
            scales = gpu.tensor(layer.state.SCB if weight.SCB is None else weight.SCB)
            for holder in (layer.weight, layer.state):
                holder.CB, holder.SCB = layer.weight.data, scales
    return module


def quant_state(gpu: FakeGpu, state: Any) -> Any:
    moved = copy.copy(state)
    moved.absmax, moved.code = gpu.tensor(state.absmax), gpu.tensor(state.code)
    if state.nested:
        moved.offset, moved.state2 = gpu.tensor(state.offset), quant_state(gpu, state.state2)
    return moved


class Net(nn.Module):
    """Just enough of a model for PEFT to adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.is_loaded_in_8bit = isinstance(layer, bnb.nn.Linear8bitLt)
        self.is_loaded_in_4bit = not self.is_loaded_in_8bit
        self.q_proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def net(gpu: FakeGpu, layer: nn.Module, lora: bool) -> nn.Module:
    model = Net(layer)
    if lora:
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
        peft.inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    mllm_fast.fuse(model)
    return on_gpu(gpu, model)


@pytest.fixture
def peft_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What PEFT's own forward is called with."""
    seen: list[Tensor] = []
    for kind in (peft_bnb.Linear4bit, peft_bnb.Linear8bitLt):

        def counted(self: Any, x: Tensor, *, forward: Any = kind.forward) -> Tensor:
            seen.append(x)
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", counted)
    return seen


@trained
@adapters
@pytest.mark.parametrize("rows", [1, 100, configs.MAX_ROWS + 1])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer(gpu: FakeGpu, kind: str, rows: int, lora: bool, grad: bool, peft_calls: list[Tensor]) -> None:
    """In training with dropout of the low-rank term."""
    layer = LAYERS[kind]()
    model = net(gpu, layer, lora).train(grad)
    x = gpu.tensor(torch.zeros(rows, layer.in_features, dtype=torch.bfloat16)).requires_grad_(grad)
    with gpu.running(grad):
        y = model(x)
        if grad:
            y.sum().backward()
    kernels = {launch.kernel.fn.__name__ for launch in gpu.launches}
    by_parts = kind == "nf4_straddling"
    dequantizes = {f"dequantize_{'8' if kind == 'int8' else '4'}bit"}
    assert kernels >= (dequantizes if by_parts or rows > configs.MAX_ROWS else {"product_tiles"})
    if grad:
        assert x.grad is not None
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
        assert kernels >= (dequantizes if by_parts else {"gradient_tiles"})
    assert not peft_calls


@trained
def test_what_peft_computes_itself(gpu: FakeGpu, grad: bool, peft_calls: list[Tensor]) -> None:
    """A low-rank term in another dtype than the product's."""
    model = net(gpu, layer4(), lora=True).train(grad)
    x = gpu.tensor(torch.zeros(3, 128)).requires_grad_(grad)
    with gpu.running(grad):
        y = model(x)
        if grad:
            y.sum().backward()
    assert peft_calls and gpu.launches


@trained
@adapters
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_decoder_layers(gpu: FakeGpu, kind: str, rows: int, lora: bool, grad: bool) -> None:
    targets = frozen_decoders.SEVEN if lora else ()
    model = frozen_decoders.fused(frozen_decoders.adapted(kind=kind, targets=targets)).train(grad)
    on_gpu(gpu, model)
    x = gpu.tensor(torch.zeros(1, rows, frozen_decoders.SIZES["hidden_size"])).requires_grad_(grad)
    with gpu.running(grad):
        y = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        if grad:
            y.sum().backward()
    assert {"product_tiles", *(["gradient_tiles"] if grad else [])} <= {v.kernel.fn.__name__ for v in gpu.launches}


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_the_outliers_of_llm_int8_wait(gpu: FakeGpu, threshold: float, rows: int) -> None:
    """Which columns have some decides on the shape of a product. Without a threshold there are none to look for."""
    layer = layer8(threshold=threshold)
    adopt(layer, outliers="llm_int8")
    on_gpu(gpu, layer)
    x = gpu.tensor(torch.zeros(rows, layer.in_features, dtype=torch.bfloat16))
    with gpu.running():
        if threshold > 0:
            with pytest.raises(HostReadError, match="nonzero"):
                layer(x)
        else:
            layer(x)
