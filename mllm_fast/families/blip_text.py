"""HF BLIP's text side (transformers.models.blip.modeling_blip_text): encoder and decoder layers, and the models of them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.models.blip.modeling_blip_text import (
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextLMPredictionHead,
    BlipTextModel,
)

from ..modules import children, med
from ..modules.med import AttentionNames, MakeMask, MedLayerSpec, MedPass
from ..modules.media_context import MediaContext, one_row_each
from ..modules.rows import Rows, may_defer
from ..modules.state import FusedState, Options, plain_state, readable_on_host
from . import named_like_upstream, state_of
from ._blip_cache import ImageCacheLayer, capacity, is_static, made_once, positions, room_for, split, static_mask
from ._transformers import activation_name, asked_for, hooked, model_dropin, watched

# The keywords by which the fused models talk to each other: the pass to its layers, the rows of the last layer that are
# read, and the wish to keep the image's keys and values for the next call.
PASS, ROWS, KEEP = "mllm_fast_pass", "mllm_fast_rows", "mllm_fast_keep"
# Inputs of the text model that hold one row per text.
TEXT_INPUTS = ("input_ids", "inputs_embeds", "encoder_embeds", "attention_mask")
# Inputs of `generate` that hold one row per image and need no copies for beams.
IMAGE_INPUTS = ("encoder_hidden_states", "encoder_attention_mask")


@named_like_upstream
class FusedBlipTextLayer(BlipTextLayer):
    """Drop-in for `BlipTextLayer`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        attention = module.attention.self
        crosses = hasattr(module, "crossattention")
        spec = MedLayerSpec(
            heads=attention.num_attention_heads,
            head_dim=attention.attention_head_size,
            activation=activation_name(module.intermediate.intermediate_act_fn),
            self_attention=_names("attention"),
            cross_attention=_names("crossattention") if crosses else None,
            ffn_up="intermediate.dense",
            ffn_down="output.dense",
            ffn_dropout="output.dropout",
            ffn_norm="output.LayerNorm",
        )
        return FusedState(type(module), options, spec, context)

    def forward(
        self,
        hidden_states: Tensor | Rows,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor | Rows:
        """As upstream: hidden_states [B, L, D], encoder_hidden_states [B_image, T, D_image].

        Inside a fused `BlipTextModel` the layer is told what each row sees, and may hand on rows whose norm is pending.
        Called by itself with a mask or a cache, or asked for attentions, it runs upstream's code.
        """
        told: MedPass | None = kwargs.pop(PASS, None)
        if told is None:
            others = (attention_mask, encoder_attention_mask, past_key_values)
            if (
                any(x is not None for x in others)
                or not self.readable()
                or asked_for("output_attentions", self, kwargs)
            ):
                return super().forward(
                    hidden_states,
                    encoder_hidden_states,
                    attention_mask,
                    encoder_attention_mask,
                    past_key_values=past_key_values,
                    **kwargs,
                )
            told = MedPass()
        state, spec = self._mllm_fast, self._mllm_fast.spec
        extend = None if past_key_values is None else functools.partial(self._extend, past_key_values)
        rows = told.rows if told.last is self else None
        given = Rows(hidden_states) if isinstance(hidden_states, Tensor) else hidden_states
        queries = given.length if rows is None else len(range(*rows.indices(given.length)))
        mask = None if told.mask is None else told.mask(queries)
        x = med.self_attention(self, spec, state, given, mask, extend=extend, rows=rows)
        if encoder_hidden_states is not None:
            k, v = self._image_keys_values(told, encoder_hidden_states, past_key_values, given.values.shape[0])
            mask = None if told.image_mask is None else told.image_mask(queries)
            x = med.cross_attention(self, spec, state, x, k, v, mask, told.image_index)
        x = med.feed_forward(self, spec, state, x)
        return x if told.defers and told.last is not self else x.normalized()

    def readable(self) -> bool:
        """Whether nothing watches the children whose own forward is not run."""
        # Asked at every step of a generation: `_modules` is several times faster than attributes of a module.
        parts = [self._modules["intermediate"], self._modules["output"]]
        for name in ("attention", "crossattention"):
            if (attention := self._modules.get(name)) is not None:
                parts += (attention, *attention._modules.values())
        inner = [part._modules.get(name) for part in parts for name in ("dropout", "intermediate_act_fn")]
        watched = any(part is not None and hooked(part) for part in (*parts, *inner))
        return not watched and not self.chunk_size_feed_forward

    def _extend(self, cache: Cache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.attention.self.layer_idx)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _image_keys_values(self, told: MedPass, image: Tensor, cache: Cache | None, rows: int) -> tuple[Tensor, Tensor]:
        """[B_image, T, heads, head_dim] each: from the cache, from the one GEMM of the pass, or projected here."""
        index = self.crossattention.self.layer_idx
        if isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(index):
            stored = cache.cross_attention_cache.layers[index]
            return stored.keys.transpose(1, 2), stored.values.transpose(1, 2)
        if told.image_keys_values is None:
            k, v = med.own_image_keys_values(self, self._mllm_fast.spec, image)
        else:
            k, v = told.image_keys_values[self.layer_num]
        if isinstance(cache, EncoderDecoderCache):
            keys, values, layers = k.transpose(1, 2), v.transpose(1, 2), cache.cross_attention_cache.layers
            if self._mllm_fast.options.level == 0 or not isinstance(cache.cross_attention_cache, DynamicCache):
                cache.cross_attention_cache.update(keys, values, index)
            else:
                layers += [DynamicLayer() for _ in range(index + 1 - len(layers))]
                layers[index] = ImageCacheLayer(keys, values, rows)
            cache.is_updated[index] = True
        return k, v


def _names(attention: str) -> AttentionNames:
    return AttentionNames(
        query=f"{attention}.self.query",
        key=f"{attention}.self.key",
        value=f"{attention}.self.value",
        dropout=f"{attention}.self.dropout",
        out=f"{attention}.output.dense",
        out_dropout=f"{attention}.output.dropout",
        norm=f"{attention}.output.LayerNorm",
    )


@model_dropin
class FusedBlipTextModel(BlipTextModel):
    """Drop-in for `BlipTextModel`: small masks, images by row instead of by copy, their keys and values in one GEMM."""

    _mllm_fast: FusedState

    fused_state = staticmethod(plain_state)

    @functools.wraps(BlipTextModel.forward, assigned=())
    def forward(self, *args: Any, image_index: Tensor | None = None, **kwargs: Any) -> Any:
        """As upstream, and images may have fewer rows than the texts.

        Args:
            encoder_hidden_states: [B_image, T, D_image]. Text row b of B reads image row b // (B / B_image), so one image
                serves all texts, and consecutive texts or beams share theirs. A single text reads all images, as upstream.
            encoder_attention_mask: [B_image, T] or [B, T]. Upstream ignores it; so does this without
                fixes=("encoder_attention_mask",), and where attentions are asked for.
            image_index: [B] int64, the image row that each text row reads instead; any order, any number of texts.

        A text row that may see no token (left padding) attends to all of them alike, as upstream; nothing that can see a
        token reads such rows, and no gradient flows through their scores.

        Raises:
            ValueError: text and image batches that do not fit.
        """
        kwargs |= dict(zip(_ARGUMENTS, args, strict=False))
        rows, keep = kwargs.pop(ROWS, None), kwargs.pop(KEEP, False)
        image = kwargs.get("encoder_hidden_states")
        given = (kwargs.get(name) for name in ("encoder_embeds", "input_ids", "inputs_embeds"))
        text = next((x for x in given if x is not None), None)
        if text is None:
            return super().forward(**kwargs)
        past = kwargs.get("past_key_values")
        if image is not None and text.shape[0] == 1 < image.shape[0] and image_index is None and past is None:
            kwargs |= {name: _repeated(kwargs.get(name), image.shape[0]) for name in TEXT_INPUTS}
            text = text.expand(image.shape[0], *text.shape[1:])
        batch, queries = text.shape[:2]
        if image is not None:
            _check_images(batch, image, image_index)
        static = is_static(past)
        if static:
            if isinstance(past, StaticCache) and self._caches(kwargs):
                kwargs["past_key_values"] = past = split(past, self.config)
            keys, place = capacity(past), positions(past, queries, text.device)
            if kwargs.get("position_ids") is None and kwargs.get("encoder_embeds") is None:
                kwargs["position_ids"] = place
        else:
            keys, place = queries + (past.get_seq_length() if past is not None else 0), None
        if not self._serves(kwargs, keys):
            if image is not None:
                _copy_images(kwargs, batch, image_index)
            return super().forward(**kwargs)
        told = MedPass(
            mask=self._text_mask(kwargs, keys, batch, place, text.device),
            image_index=image_index,
            last=self._layers()[-1],
            rows=rows,
            # No norm may be pending where somebody else sees what a layer hands on.
            defers=may_defer(text.device.type)
            and not asked_for("output_hidden_states", self, kwargs)
            and not watched(self.encoder.layer),
        )
        if image is not None:
            told.image_mask = self._image_mask(kwargs, image, batch, image_index)
            told.image_keys_values = self._image_keys_values(kwargs, image, keep)
        # Upstream takes a mask of four dimensions as finished and hands it on; the layers look at `told` instead.
        kwargs["attention_mask"] = text.new_empty((0, 0, 0, 0))
        kwargs["encoder_attention_mask"] = None
        return super().forward(**kwargs, **{PASS: told})

    def _layers(self) -> list[nn.Module]:
        """The layers, without what `torch.distributed`'s activation checkpointing puts around them."""
        return [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in self.encoder.layer]

    def _serves(self, kwargs: dict[str, Any], keys: int) -> bool:
        """Whether the ops can do what is asked; if not, upstream's code runs."""
        layers, past = self._layers(), kwargs.get("past_key_values")
        if len(layers) == 0 or not all(state_of(layer) and layer.readable() for layer in layers):
            return False
        image, mask, image_mask = (kwargs.get(n) for n in ("encoder_hidden_states", "attention_mask", IMAGE_INPUTS[1]))
        if image is not None and any(layer._mllm_fast.spec.cross_attention is None for layer in layers):
            return False
        if asked_for("output_attentions", self, kwargs):
            return False
        if mask is not None and (
            mask.ndim != 2 or (mask.shape[1] > keys if is_static(past) else mask.shape[1] != keys)
        ):
            return False
        if image_mask is not None and image_mask.ndim != 2:
            return False
        if past is None:
            return True
        # A cache that is not split would mix text and image keys.
        apart = isinstance(past, EncoderDecoderCache) or (isinstance(past, DynamicCache) and self._caches(kwargs))
        return bool(kwargs.get("is_decoder")) and (image is None or apart)

    def _caches(self, kwargs: dict[str, Any]) -> bool:
        if not kwargs.get("is_decoder") or (self.encoder.gradient_checkpointing and self.training):
            return False
        wanted = kwargs.get("use_cache")
        return bool(self.config.use_cache if wanted is None else wanted)

    def _text_mask(
        self, kwargs: dict[str, Any], keys: int, batch: int, place: Tensor | None, device: torch.device
    ) -> MakeMask:
        mask, causal = kwargs.get("attention_mask"), bool(kwargs.get("is_decoder"))
        visible = None if mask is None else mask.to(device, torch.bool)
        if place is not None:
            visible = room_for(visible, keys)
            return made_once(lambda queries: static_mask(visible, place[:, -queries:], batch, keys))
        return made_once(lambda queries: med.visible_mask(visible, queries, keys, causal=causal))

    def _image_mask(
        self, kwargs: dict[str, Any], image: Tensor, batch: int, image_index: Tensor | None
    ) -> MakeMask | None:
        mask = kwargs.get("encoder_attention_mask")
        # Upstream's layers do not hand the mask on to their cross-attention.
        if mask is None or not self._mllm_fast.fixes("encoder_attention_mask"):
            return None
        # Its heads make a mask of ones at every call, and `generate` hands the same one to every step.
        if readable_on_host(mask) and self._mllm_fast.shared.visibility(mask, "all seen", lambda: bool(mask.all())):
            return None
        visible = mask.to(image.device, torch.bool)
        if image_index is not None and mask.shape[0] != batch:
            visible = visible[image_index]
        visible = one_row_each(visible, batch)
        return made_once(lambda queries: med.visible_mask(visible, queries, visible.shape[1]))

    def _image_keys_values(
        self, kwargs: dict[str, Any], image: Tensor, keep: bool
    ) -> list[tuple[Tensor, Tensor]] | None:
        layers, past = self._layers(), kwargs.get("past_key_values")
        # A checkpointed layer projects its own, so that they are not held until the backward pass.
        wrapped = any(layer is not given for layer, given in zip(layers, self.encoder.layer, strict=True))
        checkpointed = self.training and (wrapped or any(layer.gradient_checkpointing for layer in layers))
        cached = isinstance(past, EncoderDecoderCache) and all(
            past.is_updated.get(layer.crossattention.self.layer_idx) for layer in layers
        )
        if self._mllm_fast.options.level == 0 or checkpointed or cached:
            return None
        specs = [(layer, layer._mllm_fast.spec) for layer in layers]
        caches = self._caches(kwargs)
        return med.image_keys_values(specs, self._mllm_fast, image, reused=caches, keep=keep and not caches)


_ARGUMENTS = tuple(inspect.signature(BlipTextModel.forward).parameters)[1:]


def _check_images(batch: int, image: Tensor, image_index: Tensor | None) -> None:
    if image.ndim != 3:
        raise ValueError(f"encoder_hidden_states must be [batch, tokens, dim], got {tuple(image.shape)}")
    if image_index is not None and image_index.shape != (batch,):
        raise ValueError(
            f"image_index must name one image row for each of the {batch} texts, got {tuple(image_index.shape)}"
        )
    if image_index is None and (image.shape[0] == 0 or batch % image.shape[0]):
        raise ValueError(
            f"{batch} texts cannot share {image.shape[0]} image rows: the text batch must be a multiple of the image batch, "
            "or image_index must name the image row of each text"
        )


def _repeated(rows: Tensor | None, count: int) -> Tensor | None:
    return rows.repeat(count, *(1 for _ in rows.shape[1:])) if rows is not None and rows.shape[0] == 1 else rows


def _copy_images(kwargs: dict[str, Any], batch: int, image_index: Tensor | None) -> None:
    """One image row for each text row, as upstream's code needs it."""
    for name in IMAGE_INPUTS:
        rows = kwargs.get(name)
        if rows is None or (rows.shape[0] == batch and (image_index is None or name != "encoder_hidden_states")):
            continue
        kwargs[name] = one_row_each(rows, batch) if image_index is None else rows[image_index.to(rows.device)]


@model_dropin
class FusedBlipTextLMHeadModel(BlipTextLMHeadModel):
    """Drop-in for `BlipTextLMHeadModel`: beams share their image, and the last layer computes the rows that are read."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, None, context, extra={"generating": False})

    @functools.wraps(BlipTextLMHeadModel.forward, assigned=())
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; images may have fewer rows than the texts (see `FusedBlipTextModel.forward`)."""
        keep = kwargs.get("logits_to_keep", 0)
        if state_of(self.bert) is not None:
            if isinstance(keep, int) and keep > 0 and not asked_for("output_hidden_states", self, kwargs):
                kwargs[ROWS] = slice(-keep, None)
            kwargs[KEEP] = self._mllm_fast.extra["generating"]
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream. Without a cache, too, the image's keys and values are projected once."""
        state = self._mllm_fast
        state.extra["generating"] = True
        try:
            return super().generate(*args, **kwargs)
        finally:
            state.extra["generating"] = False
            state.shared.clear()

    def create_masks_for_generate(self, attention_mask: Tensor | None, past_key_values: Cache, **kwargs: Any) -> Any:
        """For a static cache: the small mask, with room for all its keys, where upstream makes one of rows x keys."""
        if state_of(self.bert) is None:
            return create_masks_for_generate(attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
        return room_for(attention_mask, capacity(past_key_values))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        shared = state_of(self.bert) is not None
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if shared and name in kwargs}
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **images}


@named_like_upstream
class FusedBlipTextLMPredictionHead(BlipTextLMPredictionHead):
    """Drop-in for `BlipTextLMPredictionHead`."""

    _mllm_fast: FusedState

    @classmethod
    def fused_state(cls, module: nn.Module, options: Options, context: MediaContext) -> FusedState:
        return FusedState(type(module), options, activation_name(module.transform.transform_act_fn), context)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As upstream: [..., D] -> [..., vocabulary]."""
        transform = self.transform
        if hooked(transform) or hooked(transform.transform_act_fn):
            return super().forward(hidden_states)
        activation, packs = self._mllm_fast.spec, self._mllm_fast.packs
        hidden = children.norm_linear(hidden_states, None, transform.dense, activation=activation, packs=packs)
        return children.norm_linear(hidden, transform.LayerNorm, self.decoder, packs=packs)
