"""What the Q-Formers of transformers have in common: BLIP-2's layer layout, which InstructBLIP's two copies repeat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import _CAN_RECORD_REGISTRY

from ..kernels.attention import Mask
from ..modules import children
from ..modules.media_context import MediaContext, one_row_each
from ..modules.qformer import run_layer
from ..modules.qformer_projections import absorbs, project_images
from ..modules.qformer_spec import AttentionNames, FfnNames, Layer, LayerCall, QFormerLayerSpec
from ..modules.rows import Parts, Rows, defers_norm, joined, may_defer
from ..modules.state import FusedState, Options, plain_state
from . import CannotFuseError, state_of
from ._transformers import KNOWN_ATTENTION, activation_name, asked_for, hooked, watched

# The keyword by which a fused Q-Former tells its layers what to do; without it a layer runs upstream's forward.
CALL = "mllm_fast_call"

_ATTENTION = AttentionNames(
    module="attention.attention",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    norm="attention.output.LayerNorm",
    dropout="attention.output.dropout",
)
_CROSS = AttentionNames(
    module="crossattention.attention",
    query="crossattention.attention.query",
    key="crossattention.attention.key",
    value="crossattention.attention.value",
    out="crossattention.output.dense",
    norm="crossattention.output.LayerNorm",
    dropout="crossattention.output.dropout",
)


def _ffn(up: str, down: str) -> FfnNames:
    return FfnNames(up=f"{up}.dense", down=f"{down}.dense", norm=f"{down}.LayerNorm", dropout=f"{down}.dropout")


def layer_spec(layer: nn.Module) -> QFormerLayerSpec:
    """The spec of a Q-Former layer.

    Raises:
        CannotFuseError: an activation that no kernel computes, or a feed-forward network that is computed in chunks.
    """
    attention = layer.attention.attention
    if layer.chunk_size_feed_forward > 0:
        raise CannotFuseError("chunk_size_feed_forward is set, and a fused network is computed whole")
    return QFormerLayerSpec(
        heads=attention.num_attention_heads,
        head_dim=attention.attention_head_size,
        activation=activation_name(layer.intermediate_query.intermediate_act_fn),
        attention=_ATTENTION,
        cross=_CROSS if layer.has_cross_attention else None,
        query_ffn=_ffn("intermediate_query", "output_query"),
        text_ffn=_ffn("intermediate", "output") if hasattr(layer, "intermediate") else None,
    )


class LayerState:
    """Mixin of the layer drop-ins."""

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, layer_spec(module), context)


class ModelState:
    """Mixin of the drop-ins that have no spec of their own."""

    fused_state = staticmethod(plain_state)


def run(layer: nn.Module, x: Tensor | Parts, source: Tensor | None, call: LayerCall) -> Any:
    """The forward of a fused layer that was given a call."""
    state: FusedState = layer._mllm_fast
    return run_layer(Layer(layer, state.spec, state), x, source, call)


def layer_forward(
    layer: nn.Module, upstream: Callable[..., Any], x: Tensor | Parts, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The forward of the layer drop-ins: fused inside a fused Q-Former, `upstream`'s own when called by itself."""
    call = kwargs.pop(CALL, None)
    return upstream(x, *args, **kwargs) if call is None else run(layer, x, args[1], call)


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a fused Q-Former, as `modules.qformer` sees them."""
    return [Layer(module, state_of(module).spec, state_of(module)) for module in model.encoder.layer]


def register_outputs(model: nn.Module) -> None:
    """Let transformers record hidden states and attentions of the drop-in: it looks them up by the model's class."""
    name = str(type(model))
    if name not in _CAN_RECORD_REGISTRY:
        dict.__setitem__(_CAN_RECORD_REGISTRY, name, model._can_record_outputs)


def runs_upstream(model: nn.Module, masks: tuple[Tensor | None, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call has to take upstream's path: what is asked for, or what hangs on the modules, is beyond the kernels."""
    return (
        asked_for("output_attentions", model, kwargs)
        or bool(kwargs.get("is_causal"))
        or model.config._attn_implementation not in KNOWN_ATTENTION
        or any(not isinstance(mask, Tensor) or mask.ndim != 2 for mask in masks if mask is not None)
        or hooked(model.encoder)
        or any(state_of(layer) is None or _hooked_inside(layer) for layer in model.encoder.layer)
    )


def _hooked_inside(layer: nn.Module) -> bool:
    """Whether a child that the drop-in does not call does more than its class."""
    branches = [layer.attention, layer.crossattention] if layer.has_cross_attention else [layer.attention]
    outputs = [branch.output for branch in branches] + [layer.output_query]
    ups = [layer.intermediate_query]
    if (up := layer._modules.get("intermediate")) is not None:
        ups.append(up)
        outputs.append(layer.output)
    bypassed = [*branches, *(branch.attention for branch in branches), *outputs, *ups]
    bypassed += [output.dropout for output in outputs]
    bypassed += [up.intermediate_act_fn for up in ups]
    return any(map(hooked, bypassed))


def encode(
    model: nn.Module,
    x: Tensor | Parts,
    image: Tensor | None,
    *,
    query_length: int,
    attention_mask: Tensor | None,
    image_mask: Tensor | None,
    image_index: Tensor | None,
    only_queries: bool,
) -> Tensor:
    """All layers of a Q-Former.

    Args:
        x: [B, S, D] embeddings after their norm, which may be pending, `query_length` queries and then text.
        image: [I, M, D_image], or None where no queries read one.
        attention_mask: [B, S], nonzero where visible; None: everything is.
        image_mask: [I or B, M], nonzero where visible; None: everything is.
        image_index: [B], the image that each row reads; None: B / I neighbours share one.
        only_queries: leave the text rows out of the last layer's output.

    Returns:
        [B, S, D], or [B, query_length, D] with `only_queries`.
    """
    values = x if isinstance(x, Tensor) else x[0].values
    batch, length = values.shape[:2]
    layers = layers_of(model)
    mask = None
    if attention_mask is not None:
        _check_mask(attention_mask, batch, length, query_length)
        mask = Mask(key_padding=attention_mask.to(values.device, torch.bool))
    cross_mask, projected, absorbed = None, [None] * len(layers), False
    if image is not None and query_length:
        _check_images(image, batch, image_index)
        image = one_if_shared(image, layers[0].state.options) if image_index is None else image
        image = image.to(values.dtype)
        seen = _per_row(image_mask, image.shape[0], batch, image_index)
        cross_mask = None if seen is None else Mask(key_padding=seen.to(values.device, torch.bool))
        absorbed = image_index is None and absorbs(layers, values, image, query_length)
        if absorbed and seen is not None and bool(seen.all()):
            cross_mask = None  # absorbing is for CPUs, where reading a value costs nothing
        if not absorbed:
            projected = project_images(layers, model._mllm_fast, image)
    call = LayerCall(query_length, mask, cross_mask, image_index, absorbed=absorbed)
    return run_layers(model, x, image, projected, call, rows=query_length if only_queries else None)[0]


def run_layers(
    model: nn.Module,
    x: Tensor | Parts,
    image: Tensor | None,
    projected: Sequence[Tensor | None],
    call: LayerCall,
    *,
    rows: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Call the layers of a fused Q-Former one after another, as modules, so that their hooks and checkpointing run.

    Args:
        x: [B, S, D] embeddings after their norm, which may be pending.
        image: [I, M, D_image] features.
        projected: for each layer its keys and values of the image (`project_images`), or with `call.past` those that its
            self-attention sees first; None lets it read the features.
        call: what all layers are told.
        rows: of the last layer's output; None is all.

    Returns:
        [B, S or rows, D], and with `call.keep` the keys and values of each layer, [B, S, 2 * heads * head_dim].
    """
    kept: list[Tensor] = []
    last = len(projected) - 1
    # No norm may be pending where somebody else sees what a layer hands on.
    defers = may_defer((x if isinstance(x, Tensor) else x[0].values).device.type) and not watched(model.encoder.layer)
    if not defers and not isinstance(x, Tensor):
        x = joined(x)
    by_features = dataclasses.replace(call, defers=True) if defers else call
    by_projection = dataclasses.replace(by_features, projected=not call.past)
    for i, (layer, keys_values) in enumerate(zip(model.encoder.layer, projected, strict=True)):
        own = by_features if keys_values is None else by_projection
        if i == last and (defers or rows is not None):
            own = dataclasses.replace(own, rows=rows, defers=False)
        # What may need gradients goes by position, where reentrant checkpointing looks for it.
        source = image if keys_values is None and layer.has_cross_attention else keys_values
        x = layer(x, None, source, **{CALL: own})
        if call.keep:
            x, keys_values = x
            kept.append(keys_values)
    return x, kept


def one_if_shared(x: Tensor, options: Options) -> Tensor:
    """A batch that `expand` made of one row, as that row."""
    return x[:1] if options.level >= 1 and x.shape[0] > 1 and x.stride(0) == 0 else x


def unshared(
    image: Tensor | None, mask: Tensor | None, rows: int, image_index: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Image features and mask with a row for each batch row: for upstream's path, which knows no sharing."""
    if image is None:
        return None, mask
    _check_images(image, rows, image_index)
    return _per_row(image, image.shape[0], rows, image_index), _per_row(mask, image.shape[0], rows, image_index)


def _per_row(x: Tensor | None, images: int, rows: int, image_index: Tensor | None) -> Tensor | None:
    """From a row for each image to a row for each batch row, where x does not have these already."""
    if x is None or x.shape[0] != images:
        return x
    if image_index is not None:
        return x[image_index]
    return one_row_each(x, rows)


def _check_images(image: Tensor, rows: int, image_index: Tensor | None) -> None:
    if image.ndim != 3:
        raise ValueError(f"image features must be [images, tokens, dim], got {tuple(image.shape)}")
    if image_index is not None and image_index.shape != (rows,):
        raise ValueError(f"image_index has shape {tuple(image_index.shape)}; expected ({rows},), the image of each row")
    if image_index is None and (image.shape[0] == 0 or rows % image.shape[0]):
        raise ValueError(
            f"{rows} sequences cannot share {image.shape[0]} images evenly; pass image_index, which says for each "
            "sequence which image it reads"
        )


def _check_mask(mask: Tensor, rows: int, length: int, query_length: int) -> None:
    if mask.shape != (rows, length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {(rows, length)}: a value for each of the "
            f"{query_length} queries and of the {length - query_length} text tokens"
        )


def embed(model: nn.Module, x: Tensor, norm: nn.Module, dropout: nn.Module) -> Tensor | Parts:
    """dropout(norm(x)) of embeddings x [B, S, D], in the norm's dtype; a batch made by `expand` stays one row of memory.

    The norm may be left to the first layer.
    """
    batch, drops = x.shape[0], hooked(dropout) or (dropout.training and dropout.p > 0)
    if not drops:
        x = one_if_shared(x, model._mllm_fast.options)
    x, read = x.to(norm.weight.dtype), children.read_norm(norm)
    if (
        not drops
        and read is not None
        and model._mllm_fast.options.level >= 1
        and defers_norm(x, read.weight, read.bias)
    ):
        return (Rows(x.expand(batch, -1, -1), read),)
    x = children.normalize(x, norm)
    return dropout(x) if drops else x.expand(batch, -1, -1)
