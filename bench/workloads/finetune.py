"""Training steps through a frozen 4-bit decoder: LoRA, and the bridge of a Flamingo-style model.

The peers are what the documentation of PEFT and transformers tells people to write: the linear layers in NF4 with double
quantisation (bitsandbytes), `prepare_model_for_kbit_training`, LoRA or the unfrozen bridge, and `model(**batch).loss` with
labels; once as it stands, which is the baseline, and once under autocast, as `Trainer` with `bf16=True` runs it. The bridge
is also trained with nothing cast but itself, which no documentation describes: hidden states then stay in bf16 as ours do,
and the errors of the gradients can be compared.
Ours is the same model with the same bytes after `fuse(model, training=True)`, and `language_model_loss`. A call is one step
without the optimiser, which is the same code for all: zero_grad, loss, backward. The gradients' memory is there before it,
as when they are accumulated over several steps: what is compared is what a step takes beyond weights and gradients. It
returns a sample of every trained parameter's gradient, so that a peer that gets one of them wrong is not timed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import mllm_fast
from mllm_fast.finetune.loss import language_model_loss

from ..goals import Goals
from ..registry import OURS, Case, Workload, register

DOCUMENTED = "transformers + peft"
AUTOCAST = "transformers + peft, autocast"
UNCAST = "transformers, nothing cast"

# The image and the prompt, which are not supervised, are this share of a row.
UNSUPERVISED = 0.75
# Gradient entries compared of each parameter.
SAMPLED = 1 << 14
DTYPE = torch.bfloat16

# Gradients below this share of the middle one are left out of the comparison.
ROUNDING = 1e-5

# tanh of it lets the bridge's branches through; upstream starts with closed gates, which would hide errors.
GATE = 0.7

What = Literal["lora", "bridge"]


@dataclass(frozen=True)
class Shape:
    """A decoder of LLaMA's kind, `rows` x `tokens` of text, and for the bridge `images` a row."""

    rows: int
    tokens: int
    layers: int = 4
    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    images: int = 0
    vision: int = 1280
    patches: int = 257

    @property
    def linear_weights(self) -> int:
        """Entries of the decoder layers' weights."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn)


def _llama(shape: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _idefics(shape: Shape) -> nn.Module:
    """Idefics-9B's sizes, one gated block for four layers; its vision tower is not run: the features are cached."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        alpha_initializer="ones",
        freeze_lm_head=True,
        vision_config={"embed_dim": shape.vision, "num_hidden_layers": 1, "num_attention_heads": 16, "image_size": 28},
        perceiver_config={"resampler_depth": 6 if shape.hidden >= 1024 else 1, "qk_layer_norms_perceiver": True},
        attn_implementation="sdpa",
        use_cache=False,
    )
    return IdeficsForVisionText2Text(config)


TRAINED = {"bridge": ("gated_cross_attn_layers", "perceiver_resampler"), "lora": ("lora_",)}


def _in_4_bits(model: nn.Module, what: What) -> nn.Module:
    """What transformers loads with `load_in_4bit`, type "nf4", double quantisation and bf16 as compute dtype; the bridge and
    the head are skipped.
    """
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or ".layers." not in path or any(part in path for part in TRAINED["bridge"]):
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features, module.out_features, False, DTYPE, compress_statistics=True, quant_type="nf4"
        )
        weight = module.weight.data
        layer.weight = bnb.nn.Params4bit(weight, False, compress_statistics=True, quant_type="nf4", module=layer)
        model.set_submodule(path, layer.to(weight.device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model.requires_grad_(False)


@torch.no_grad()
def _pretrained(device: torch.device, shape: Shape, what: What) -> nn.Module:
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device, no_init_weights():
            model = _llama(shape) if what == "lora" else _idefics(shape)
    finally:
        torch.set_default_dtype(before)
    # A billion normal numbers take half a minute; these come from a pool, whose length no row shares.
    pool = torch.randn(1_000_003, device=device).to(DTYPE)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "alpha" in name:
            parameter.fill_(GATE if "alpha" in name else 0.0 if "bias" in name else 1.0)
            continue
        for part in parameter.view(-1).split(pool.numel()):
            torch.mul(pool[: part.numel()], shape.hidden**-0.5, out=part)
    return _in_4_bits(model, what)


def _add_lora(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero would leave A without a gradient
                parameter.normal_(std=0.01)
    return adapted


def _unfreeze(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if any(part in name for part in TRAINED["bridge"]):
            parameter.requires_grad_(True)
    return model


def theirs(model: nn.Module, what: What, checkpointing: bool) -> nn.Module:
    """The model as PEFT prepares it: 16-bit parameters cast to fp32, gradient checkpointing unless told otherwise."""
    import peft

    model = peft.prepare_model_for_kbit_training(copy.deepcopy(model), use_gradient_checkpointing=checkpointing)
    return (_add_lora(model) if what == "lora" else _unfreeze(model)).train()


def uncast(model: nn.Module, what: What, checkpointing: bool, *, gates: bool = True) -> nn.Module:
    """The same model, nothing cast but what is trained; without `gates`, these neither: in fp32 they would widen all that
    comes after them.
    """
    model = copy.deepcopy(model)
    model = _add_lora(model) if what == "lora" else _unfreeze(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (gates or "alpha" not in name):
            parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model.train()


def ours(model: nn.Module, what: What, checkpointing: bool) -> nn.Module:
    """The same model with our blocks and layers in it."""
    model = uncast(model, what, checkpointing)
    mllm_fast.fuse(model, training=True)
    return model


def _exact(model: nn.Module, what: What) -> nn.Module:
    """The peers' model in fp32, with weights that are dequantised exactly."""
    from bitsandbytes.nn import Linear4bit

    model = theirs(model, what, False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model


def batch(device: torch.device, shape: Shape) -> dict[str, Tensor]:
    """Token ids, labels of the last quarter, and for the bridge cached vision features and what each token sees."""
    torch.manual_seed(2)
    ids = torch.randint(3, shape.vocabulary, (shape.rows, shape.tokens), device=device)
    labels = ids.clone()
    labels[:, : int(shape.tokens * UNSUPERVISED)] = -100
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if shape.images:
        made["image_encoder_embeddings"] = torch.randn(
            shape.rows, shape.images, shape.patches, shape.vision, device=device, dtype=DTYPE
        )
        position = torch.arange(shape.tokens, device=device)[:, None]
        first = torch.arange(shape.images, device=device) * (shape.tokens // (shape.images + 1))
        made["image_attention_mask"] = (position >= first).long().expand(shape.rows, -1, -1)
    return made


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _sample(gradient: Tensor) -> Tensor:
    return gradient.flatten()[:: max(1, gradient.numel() // SAMPLED)].float()


class Step:
    """One training step of a model."""

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], loss: Callable[..., Tensor], autocast: bool, norms: Tensor
    ) -> None:
        self.model, self.inputs, self.loss, self.autocast, self.norms = model, inputs, loss, autocast, norms
        for parameter in trained(model).values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self) -> Tensor:
        """[parameters * SAMPLED at most]: entries of each gradient, divided by the norm of that gradient's sample."""
        self.model.zero_grad(set_to_none=False)
        device = self.inputs["input_ids"].device.type
        with torch.autocast(device, DTYPE) if self.autocast else contextlib.nullcontext():
            loss = self.loss(self.model, self.inputs)
        loss.backward()
        samples = [_sample(p.grad) for p in trained(self.model).values() if p.grad is not None]
        return torch.cat([s / norm for s, norm in zip(samples, self.norms, strict=True)])


def _loss_of_model(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**inputs).loss
    return loss


def _gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    _loss_of_model(model, inputs).backward()
    return [_sample(p.grad) for p in trained(model).values() if p.grad is not None]


def build(device: torch.device, *, shape: Shape, what: What, checkpointing: bool) -> Case:
    """The peers on equal weights and the same batch."""
    model = _pretrained(device, shape, what)
    inputs = batch(device, shape)
    exact = _exact(model, what)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    samples = _gradients(exact, wide)
    del exact
    norms = torch.stack([sample.norm() for sample in samples])
    # A softmax does not see what all keys have in common: the gradient of a bias of keys is 0, and rounding all there is of it.
    norms = torch.where(norms < ROUNDING * norms.median(), torch.inf, norms)
    result = torch.cat([sample / norm for sample, norm in zip(samples, norms, strict=True)])
    bridge = what == "bridge"
    prepared = theirs(model, what, checkpointing)
    peers = {
        DOCUMENTED: Step(prepared, inputs, _loss_of_model, False, norms),
        AUTOCAST: Step(prepared, inputs, _loss_of_model, True, norms),
    }
    if bridge:
        plain = uncast(model, what, checkpointing, gates=False)
        peers[UNCAST] = Step(plain, inputs, _loss_of_model, True, norms)
    peers[OURS] = Step(ours(model, what, checkpointing), inputs, language_model_loss, bridge, norms)
    return Case(
        {name: [call] for name, call in peers.items()}, lambda: result, yardstick=UNCAST if bridge else AUTOCAST
    )


def _add(what: What, shape: Shape, model: str, checkpointing: bool, goals: Goals) -> None:
    supervised = shape.rows * int(shape.tokens * (1 - UNSUPERVISED))
    tokens, passes = shape.rows * shape.tokens, 3 if checkpointing else 2
    head = shape.vocabulary * shape.hidden
    register(
        Workload(
            name=f"finetune.{what}.nf4.{shape.layers}x{shape.hidden}.{shape.rows}x{shape.tokens}"
            f"{'.checkpointing' if checkpointing else ''}.bf16",
            block="training step",
            model=model,
            shape={k: v for k, v in vars(shape).items() if shape.images or k not in ("images", "vision", "patches")},
            dtype=DTYPE,
            direction="backward",
            build=functools.partial(build, shape=shape, what=what, checkpointing=checkpointing),
            nbytes=passes * shape.linear_weights * 9 // 16 + 2 * head * DTYPE.itemsize,
            flops=2 * (passes * tokens * shape.linear_weights + 2 * supervised * head),
            goals=goals,
        )
    )


def _register() -> None:
    lora, bridge = Shape(1, 256), Shape(1, 512, images=2)
    for checkpointing in (False, True):
        goals = Goals({DOCUMENTED: 1.5}, max_memory_ratio=0.5)
        _add("lora", lora, "LLaMA-7B, 4 of 32 layers, LoRA r=8 on q_proj and v_proj", checkpointing, goals)
        _add("bridge", bridge, "Idefics-9B, 4 of 32 layers, bridge trained", checkpointing, goals)


_register()
