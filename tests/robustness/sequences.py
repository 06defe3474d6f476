"""What people do to one model, one after another: the steps, and how each is carried out on a model of transformers."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.families import state_of
from tests.families import builders, llava_models, qformers

Inputs = dict[str, Any]


@dataclass(frozen=True)
class System:
    """A tiny model, its inputs by seed, and the suffixes of the layers that LoRA targets."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    lora: tuple[str, ...]


SYSTEMS = {
    "idefics": System(
        builders.idefics, lambda seed: builders.idefics_inputs(seed=seed), ("cross_attn.q_proj", "cross_attn.v_proj")
    ),
    "blip2": System(lambda: qformers.generator("blip2"), lambda seed: qformers.prompt("blip2", seed), ("query", "value")),
    "llava": System(llava_models.model, lambda seed: llava_models.inputs(seed=seed), ("linear_1", "q_proj")),
}  # fmt: skip


def fused(model: nn.Module) -> bool:
    return any(state_of(module) is not None for module in model.modules())


def unfused_copy(model: nn.Module) -> nn.Module:
    """The same model by upstream's code alone, with nothing kept from before."""
    twin = copy.deepcopy(model)
    mllm_fast.unfuse(twin)
    return twin


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Twice without gradients: the second may come from what the first kept."""
    inputs = cast(inputs, dtype_of(model))
    with torch.no_grad():
        first, second = (model(**inputs).logits for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    return first.double()


def perturb(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Other values of the same size; running numbers and masks stay."""

    def other(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.clone()
        return (t.double() + 0.3 * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(t.dtype)

    return {name: other(t) for name, t in state.items()}


def train_step(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients by name, after a step along them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    out = model(**cast(inputs, dtype_of(model))).logits
    out.float().square().mean().backward()
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    norm = sum(g.double().square().sum() for g in found.values()) ** 0.5
    with torch.no_grad():
        for name, gradient in found.items():
            trained[name] -= (2.0 / norm * gradient.double()).to(gradient.dtype)
    model.zero_grad(set_to_none=True)
    return found


def through_files(model: nn.Module) -> nn.Module:
    """Saved and read back, by transformers' own means."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        plain = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models"))
        loaded: nn.Module = plain.from_pretrained(folder, dtype=dtype_of(model))  # type: ignore[attr-defined]
    return loaded.eval()


def through_meta(model: nn.Module) -> nn.Module:
    """To a device without memory and back, where the weights are filled in again."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.to("meta")
    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]  # to_empty unties them
    model.load_state_dict(state)
    with torch.no_grad():
        for name, t in model.named_buffers():
            t.copy_(buffers[name])
    for name, p in model.named_parameters():
        p.requires_grad_(trained[name])
    return model


def through_pickle(model: nn.Module) -> nn.Module:
    """Unchanged where upstream's own hooks keep the plain model from being pickled after a pass, too."""
    try:
        pickle.dumps(unfused_copy(model))
    except AttributeError:
        return model
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def add_lora(model: nn.Module, targets: tuple[str, ...], seed: int) -> None:
    """Rank 2, with B drawn: upstream's 0 would hide it."""
    names = "|".join(target.replace(".", r"\.") for target in targets)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=rf"(.*\.)?({names})$")
    peft.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def merge_lora(model: nn.Module) -> None:
    """The adapters into the weights, and the plain layers back in their places."""
    for name, layer in lora_layers(model):
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
