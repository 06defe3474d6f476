"""The loss of a model over its frozen head, without the logits: for any model whose head is the last thing it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from .. import ops
from ..families.recipes import unwrapped
from ..modules import children
from ..modules.frozen_linear import FrozenLinearState

# What transformers does to logits after the head, by the name in the text model's configuration.
_SOFTCAP = "final_logit_softcapping"
_SCALES = ("logits_scaling", "logit_scale")


class HeadHasToBeCalledError(ValueError):
    """The loss needs the logits: the head is trained, wrapped, or something happens to the logits after it."""


def language_model_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The loss that `model(**batch).loss` gives, computed by `ops.frozen_cross_entropy`.

    The model runs without labels. What its head is given is kept, the head itself gets no rows, so that the logits
    [B, S, V] are never made, forward or backward. Only the supervised rows meet the head, chunk by chunk.

    Args:
        model: a Hugging Face model with a language modelling head, or one that holds it as `lm` or `lang_encoder`
            (`models.flamingo.Flamingo`, open_flamingo's `Flamingo`); decoder-only or encoder-decoder (T5).
        batch: its keyword arguments, with `labels` [B, S].
        ignore_index: labels with this value count for nothing.
        label_smoothing: in [0, 1].
        reduction: "mean" over the supervised tokens, or "sum" (divide by their number over all accumulated batches).

    Returns:
        A scalar in fp32.

    Raises:
        HeadHasToBeCalledError: the head is trained or wrapped (LoRA, hooks), or the logits are scaled after it; use
            `model(**batch).loss`.
        ValueError: `batch` has no labels, or the model did not call its head exactly once.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            "the batch has no labels; expected a tensor [batch, length], -100 where there is no supervision"
        )
    lm = language_model(model)
    head = output_head(lm)
    weight, bias = _read(head)
    config: Any = getattr(lm, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in _SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise HeadHasToBeCalledError(f"the model scales its logits by {name}; use model(**batch).loss")
    # A cache is for tokens that come later; it would hold keys and values of layers that keep nothing for backward.
    arguments = {"use_cache": False} | {name: value for name, value in batch.items() if name != "labels"}
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if encoder_decoder and arguments.get("decoder_input_ids") is None:
        # transformers knows no other mark.
        arguments["decoder_input_ids"] = _shifted_right(lm, labels.masked_fill(labels == ignore_index, -100))
    hidden = _last_hidden(model, head, arguments)
    if not isinstance(weight, Tensor):
        hidden = hidden.to(head.product_dtype(hidden))
    owner: Any = unwrapped(model)
    if hasattr(owner, "supervised_labels") and arguments.get("input_ids") is not None:
        # What the system leaves out it marks with -100, whatever the caller's mark is.
        counted = owner.supervised_labels(labels, arguments["input_ids"])
        labels = labels.masked_fill(counted != labels, ignore_index)
    labels = labels.to(hidden.device)
    return ops.frozen_cross_entropy(
        hidden[:, -labels.shape[1] :],
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=getattr(config, _SOFTCAP, None),
        reduction=reduction,
        shift=not encoder_decoder,
    )


def language_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model with the head: `model` itself, or what it holds as `lm` or `lang_encoder`."""
    for name in ("lm", "lang_encoder"):
        held = model._modules.get(name)
        if held is not None:
            return held
    return model


def output_head(lm: nn.Module) -> nn.Module:
    """The module that makes logits.

    Raises:
        HeadHasToBeCalledError: there is none.
    """
    head: Any = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise HeadHasToBeCalledError(
            f"{type(lm).__name__} has no output embeddings; expected a model with a language modelling head"
        )
    return head


def can_skip_logits(model: nn.Module) -> bool:
    """Whether `language_model_loss` serves the model as it is now."""
    try:
        _read(output_head(language_model(model)))
    except HeadHasToBeCalledError:
        return False
    return True


def _read(head: nn.Module) -> tuple[Any, Tensor | None]:
    """(weight, bias) of a frozen head that can be read."""
    if isinstance(head.__dict__.get("_mllm_fast"), FrozenLinearState) and not children.hooked(head):
        return head.frozen_weight(), head._parameters.get("bias")
    if not children.readable_head(head):
        raise HeadHasToBeCalledError(
            f"the head is a {type(head).__name__} with hooks or an adapter around it; use model(**batch).loss"
        )
    weight, bias = head.weight, head.bias
    if any(t is not None and t.requires_grad for t in (weight, bias)):
        raise HeadHasToBeCalledError(
            "the head is trained, and this loss gives it no gradient; freeze it, or use model(**batch).loss"
        )
    return weight, bias


def _shifted_right(lm: nn.Module, labels: Tensor) -> Tensor:
    inner = getattr(lm, "language_model", lm)
    if not hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        raise HeadHasToBeCalledError(
            f"{type(inner).__name__} cannot make decoder_input_ids from labels; add them to the batch"
        )
    shifted: Tensor = inner.prepare_decoder_input_ids_from_labels(labels=labels)
    return shifted


def _last_hidden(model: nn.Module, head: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """What the model gives its head, which then sees no rows of it."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        model(**arguments)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].dim() != 3:
        shapes = [tuple(x.shape) for x in seen]
        raise ValueError(
            f"the model called its head {len(seen)} times, with {shapes}; expected one call with [batch, length, width]"
        )
    return seen[0]
