"""Quantise the language model of a model that is in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from ..families import state_of
from ..fusion import NothingToFuseError, fuse
from ..modules.children import hooked
from ..modules.frozen_linear import FrozenLinearSpec
from .config import KINDS, THRESHOLD, Recipe, describe, import_bitsandbytes
from .report import QuantizationReport, quantization_report
from .selection import NothingToQuantizeError, Selection, Target, quantized_layers, select

logger = logging.getLogger(__name__)


def quantize_llm(
    model: nn.Module,
    kind: Literal["nf4", "fp4", "int8"] = "nf4",
    *,
    double_quant: bool = False,
    blocksize: int = 64,
    compute_dtype: torch.dtype | None = None,
    outliers: Literal["llm_int8"] | None = None,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    gated_layers: bool = False,
) -> QuantizationReport:
    """Quantise the language model's linear layers to 4 or 8 bits, in place; they are frozen from then on.

    Exactly those: the vision tower, the resampler or Q-Former, the projector, gated cross-attention layers and the output
    head stay as they are, unless asked for. The layers become bitsandbytes' `Linear4bit` or `Linear8bitLt`, which
    PEFT and transformers know and save, with mllm_fast's computation in them (`unfuse` gives bitsandbytes' own back).
    Either all are replaced, or, where something cannot be done, none is.

    Args:
        model: a supported multimodal model or a decoder-only language model, with its weights, on any device. Add LoRA
            afterwards.
        kind: "nf4" or "fp4" (QLoRA, arXiv 2305.14314), "int8" (LLM.int8, arXiv 2208.07339).
        double_quant: of 4 bits: also quantise the scales, which take 4.13 instead of 4.5 bits a parameter then.
        blocksize: of 4 bits: elements that share a scale, a power of two from 32 to 4096.
        compute_dtype: of 4 bits: in which the product is computed; default bf16.
        outliers: of int8: "llm_int8" quantises activations too, as bitsandbytes does, bit for bit; by default they stay
            as they are, which is more exact.
        skip: names of modules of the language model to leave as they are: full paths, or the end of some ("o_proj").
        include: names of modules outside the language model, or of the output head, to quantise as well.
        gated_layers: also quantise the gated cross-attention layers of a Flamingo-style model, for inference.

    Returns:
        what was quantised, what was left alone and why, and the bytes before and after; `print` it.

    Raises:
        UnmatchedNameError: a name in `skip` or `include` that the model does not have.
        NothingToQuantizeError: no language model, or nothing of it that is not quantised yet.
        ValueError: arguments that do not go together, or a layer that cannot be quantised (hooks, adapters, meta device).
    """
    recipe = Recipe(kind, double_quant, blocksize, compute_dtype, outliers)
    selection = select(model, skip=skip, include=include, gated_layers=gated_layers)
    _check(model, recipe, selection)
    layers = [_quantized(target.module, recipe) for target in selection.targets]
    for layer in layers:
        adopt(layer, outliers=outliers)
    for target, layer in zip(selection.targets, layers, strict=True):
        for path in target.paths:
            model.set_submodule(path, layer)
    for root in _pretrained_roots(model):
        describe(root, recipe)
    return quantization_report(model, selection)


def adopt(model: nn.Module, *, outliers: Literal["llm_int8"] | None = None) -> None:
    """Let every bitsandbytes layer in `model` run mllm_fast's computation; layers that cannot are left as they are."""
    for path, layer in quantized_layers(model).items():
        try:
            fuse(layer)
        except NothingToFuseError as reason:
            logger.warning("%s stays as it is: %s", path or type(layer).__name__, reason)
            continue
        state = state_of(layer)
        if outliers is not None and state is not None:
            state.spec = FrozenLinearSpec(outliers, state.spec.threshold)


def _check(model: nn.Module, recipe: Recipe, selection: Selection) -> None:
    if selection.adapted:
        raise ValueError(
            f"{selection.adapted[0]} lies inside a PEFT adapter; quantise the model first, and add adapters afterwards"
        )
    if not selection.targets:
        already = f"; {len(selection.quantized)} layers are quantised already" if selection.quantized else ""
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in selection.left[:8])
        raise NothingToQuantizeError(f"{type(model).__name__} has no layer left to quantise{already}{reasons}")
    kinds = {kind_of(layer) for layer in selection.quantized.values()}
    if kinds - {recipe.kind}:
        raise ValueError(
            f"{type(model).__name__} has layers in {', '.join(sorted(kinds))}; a checkpoint can hold one kind, so quantise "
            f"the rest to the same, not to {recipe.kind}"
        )
    for target in selection.targets:
        _check_target(target)


def _check_target(target: Target) -> None:
    path, weight = target.paths[0], target.module._parameters.get("weight")
    if hooked(target.module):
        raise ValueError(
            f"{path} has hooks, which a new module would lose; remove them, or let load() quantise the model"
        )
    if weight is None or type(weight) is not nn.Parameter:
        raise ValueError(f"{path} has a weight of type {type(weight).__name__}; expected a plain parameter")
    if weight.is_meta:
        raise ValueError(f"{path} has no weights yet (meta device); load them first, or use load()")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{path} is in {weight.dtype}; expected fp32, fp16 or bf16")


def kind_of(layer: Any) -> str:
    """ "nf4", "fp4" or "int8"."""
    return str(getattr(layer.weight, "quant_type", KINDS[-1]))


def _quantized(linear: Any, recipe: Recipe) -> nn.Module:
    """A quantised layer with the weights of `linear`, which stays as it is."""
    bnb = import_bitsandbytes()
    weight: torch.Tensor = linear.weight.detach()
    if not isinstance(linear, nn.Linear):  # GPT-2's Conv1D has its weight the other way round
        weight = weight.T.contiguous()
    (rows, columns), device = weight.shape, weight.device
    bias = linear._parameters.get("bias")
    if recipe.kind == "int8":
        layer: Any = bnb.nn.Linear8bitLt(
            columns, rows, bias is not None, has_fp16_weights=False, threshold=THRESHOLD, device="meta"
        )
        values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    else:
        layer = bnb.nn.Linear4bit(
            columns,
            rows,
            bias is not None,
            recipe.product_dtype,
            compress_statistics=recipe.double_quant,
            quant_type=recipe.kind,
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            blocksize=recipe.blocksize,
            compress_statistics=recipe.double_quant,
            quant_type=recipe.kind,
            module=layer,
        ).to(device)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    layer.source_cls = type(linear)  # by which transformers undoes the transposition
    return layer.train(linear.training)


def _pretrained_roots(model: nn.Module) -> list[nn.Module]:
    """The outermost transformers models with quantised layers: what `save_pretrained` is called on."""
    from transformers import PreTrainedModel

    roots: list[nn.Module] = []
    for module in model.modules():
        inside = any(module is part for root in roots for part in root.modules())
        if isinstance(module, PreTrainedModel) and not inside and quantized_layers(module):
            roots.append(module)
    return roots
