"""The formulas of `memory.py`, with the sizes of a model at hand: what a step keeps, by part of the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..families import class_path, state_of
from ..families.recipes import Recipe, resolve
from ..modules import children
from ..modules.gated_cross_attention import GatedCrossAttentionSpec
from ..modules.perceiver_resampler import PerceiverResamplerSpec
from ..modules.qformer_spec import QFormerLayerSpec
from ..modules.state import FusedState
from . import memory
from .checkpointing import Checkpointing
from .lora import lora_layers
from .memory import BatchShape

_HF = "transformers.models"
_GATED_MLP = frozenset(
    f"{_HF}.{path}DecoderLayer"
    for path in (
        "llama.modeling_llama.Llama", "mistral.modeling_mistral.Mistral", "qwen2.modeling_qwen2.Qwen2",
        "idefics.modeling_idefics.Idefics",
    )
)  # fmt: skip
_OPT = f"{_HF}.opt.modeling_opt.OPTDecoderLayer"
_MLLAMA = f"{_HF}.mllama.modeling_mllama.MllamaSelfAttentionDecoderLayer"
# Read text with their queries, whose length a `BatchShape` does not say.
_INSTRUCTED = ("instructblip", "blip2_stage1", "Retrieval")


@dataclass
class _Block:
    """Bytes that one block keeps, None where no formula is for it; `n` elements go in. `again`: it can be checkpointed."""

    module: nn.Module
    kept: int | None
    goes_in: int = 0
    again: bool = True


def activations(
    model: nn.Module,
    recipe: Recipe,
    batch: BatchShape,
    compute_dtype: torch.dtype,
    checkpointing: Checkpointing,
    labels: Mapping[str, Iterable[nn.Module | nn.Parameter]],
) -> dict[str, int | None]:
    """Estimated bytes kept between forward and backward, by part; None for parts that no formula is for.

    Args:
        model: prepared: frozen and trained parameters are known.
        labels: modules and parameters of each part, as in the plan's table.
    """
    of: dict[int, str] = {}
    for part, members in labels.items():
        for member in members:
            for p in [member] if isinstance(member, nn.Parameter) else member.parameters():
                of.setdefault(id(p), part)
    sizes = _Sizes(model, recipe, batch, compute_dtype.itemsize)
    blocks = [*sizes.bridge(), *sizes.decoder(compute_dtype)]
    totals: dict[str, int | None] = dict.fromkeys(labels, 0)
    totals["the rest"] = 0
    covered = {id(p) for block in blocks for p in block.module.parameters()}
    # Layers that are trained and have no formula.
    for module in model.modules():
        p = module._parameters.get("weight")
        if isinstance(module, nn.Linear | nn.Conv2d) and p is not None and p.requires_grad and id(p) not in covered:
            totals[of.get(id(p), "the rest")] = None
    largest: tuple[int, str] | None = None
    for block in blocks:
        part = _part(block.module, of)
        kept = block.kept
        if checkpointing != "none" and block.again and kept is not None:
            if largest is None or kept > largest[0]:
                largest = kept, part
            kept = block.goes_in if checkpointing == "recompute" else 0
        held = totals[part]
        totals[part] = None if kept is None or held is None else held + kept
    if largest is not None:  # one block at a time is computed again
        held = totals[largest[1]]
        totals[largest[1]] = None if held is None else held + largest[0]
    return totals


def _part(module: nn.Module, of: Mapping[int, str]) -> str:
    """That of most of its parameters, LoRA left out."""
    counts: dict[str, int] = {}
    for p in module.parameters():
        part = of.get(id(p), "the rest")
        counts[part] = counts.get(part, 0) + (p.numel() if part != "lora" else 0)
    return max(counts, key=counts.__getitem__, default="the rest")


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


class _Sizes:
    """A model and a batch, and the blocks that keep something of it."""

    def __init__(self, model: nn.Module, recipe: Recipe, batch: BatchShape, e: int) -> None:
        self.model, self.recipe, self.batch, self.e = model, recipe, batch, e
        self.tokens, self.images = batch.samples * batch.tokens, batch.samples * batch.images
        # Its rows are aligned, see `modules.decoder_attention`.
        self.mask = self.tokens * -(-batch.tokens // 8) * 8 if batch.padded else 0
        self.specs = [(m, s.spec) for m in model.modules() if (s := _state(m)) is not None and s.spec is not None]
        self.resamplers = [(m, spec) for m, spec in self.specs if isinstance(spec, PerceiverResamplerSpec)]
        self.gated = [(m, spec) for m, spec in self.specs if isinstance(spec, GatedCrossAttentionSpec)]
        self.qformer = [(m, spec) for m, spec in self.specs if isinstance(spec, QFormerLayerSpec)]

    def rounded(self, module: nn.Module) -> int:
        """Elements of trained matrices that are wider than e, whose rounded copies are kept."""
        return sum(
            p.numel() for p in module.parameters() if p.requires_grad and p.ndim > 1 and p.element_size() > self.e
        )

    def stream(self, module: nn.Module) -> int:
        """Bytes of an element of the stream inside a block of the bridge: that of its parameters."""
        return max((p.element_size() for p in module.parameters()), default=self.e)

    def patches(self) -> int | None:
        """Tokens that the vision model makes of an image, the one of its class counted."""
        config: Any = getattr(getattr(self.model, "config", None), "vision_config", None)
        size, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
        if self.batch.patches is not None or not isinstance(size, int) or not isinstance(patch, int):
            return self.batch.patches
        return int((size // patch) ** 2 + 1)

    def media(self) -> int | None:
        """Media tokens that a gated block reads of an image."""
        if self.resamplers:
            module, spec = self.resamplers[0]
            return int(children.resolve(module, spec.latents).shape[-2])
        return self.patches()

    def bridge(self) -> list[_Block]:
        """Gated blocks, resamplers, Q-Formers and projections that are trained, and gated blocks that are trained through."""
        through = self._trained_through()
        blocks = [self._gated(m, spec) for m, spec in self.gated if _trained(m) or id(m) in through]
        blocks += [self._resampler(m, spec) for m, spec in self.resamplers if _trained(m)]
        if any(_trained(m) for m, _ in self.qformer):
            blocks += self._qformers()
        if self._trained_vision():  # no formula is for what is frozen and passes its gradient on
            frozen = [m for m, _ in (*self.resamplers, *self.qformer) if not _trained(m)]
            blocks += [_Block(m, None, again=False) for m in frozen]
        return [*blocks, *self._projections()]

    def _trained_vision(self) -> bool:
        if self.recipe.vision is None:
            return False
        return any(_trained(m) for m in resolve(self.model, self.recipe.vision) if isinstance(m, nn.Module))

    def _gated(self, block: nn.Module, spec: GatedCrossAttentionSpec) -> _Block:
        names, media = spec.names, self.media()
        keys = (names.k, names.v) if names.kv is None else (names.kv,)
        query, up = children.resolve(block, names.q), children.resolve(block, names.ffn_up)
        d, f = query.weight.shape[1], up.weight.shape[0]
        norm = children.read_norm(children.resolve(block, names.norm))
        goes_in = self.e * self.tokens * d
        if media is None:
            return _Block(block, None, goes_in)
        q, kv, gate = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, names.ffn_act_gate is not None
        rms, head_norms = norm is not None and norm.kind == "rms_norm", names.q_norm is not None
        if not _trained(block):
            grad = self._gradient_of_media()
            passed = (names.q, names.out, names.ffn_up, names.ffn_act_gate, names.ffn_down, *(keys if grad else ()))
            weights = [children.resolve(block, name).weight for name in passed if name is not None]
            kept = memory.frozen_gated_block_bytes(
                self.tokens, self.images * media, d, q, kv, f, spec.heads, self.e, kv_heads=spec.kv_heads, rms=rms,
                head_norms=head_norms, hidden=3 if gate else 1, media=grad,
                weights=sum(w.numel() for w in weights if w.element_size() > self.e),
            )  # fmt: skip
            return _Block(block, kept, goes_in)
        rounded, dm = self.rounded(block), children.resolve(block, keys[0]).weight.shape[1]
        wide = any(self.stream(m) > self.e and _trained(m) for m, _ in self.resamplers)
        kept = memory.gated_block_bytes(
            self.tokens, self.images * media, d, dm, q, kv, f, spec.heads, self.e, kv_heads=spec.kv_heads, rms=rms,
            head_norms=head_norms, hidden=4 if gate else _hidden(spec.activation),
            media_casts=len(keys) if wide else 0, weights=rounded,
        )  # fmt: skip
        return _Block(block, kept, goes_in)

    def _gradient_of_media(self) -> bool:
        """Whether something is trained that the media of the gated blocks come from."""
        others = {id(p) for m, _ in self.gated for p in m.parameters()}
        others |= {id(p) for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in others]
        return any("lora_" not in name for name, _ in trained)

    def _resampler(self, module: nn.Module, spec: PerceiverResamplerSpec) -> _Block:
        patches, latents = self.patches(), children.resolve(module, spec.latents)
        if patches is None or any(names.ffn_act_gate is not None for names in spec.layers):
            return _Block(module, None, again=False)
        if getattr(self.model, "config", None) is not None and self.batch.patches is None:
            patches -= int(getattr(self.model.config, "vision_tokens", None) == "patches")
        n, d = latents.shape[-2:]
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        f = children.resolve(module, spec.layers[0].ffn_up).weight.shape[0]
        # Keys and values of the media in one product for all layers, where they come from one weight a layer, with the
        # norm's affine folded in; and of each layer q, k, v of the latents.
        folded = len(spec.layers) * 2 * kv * d if spec.layers[0].kv is not None else 0
        stacked = len(spec.layers) * (q + 2 * kv) * d
        rest = len(spec.layers) * (q * d + 2 * d * f) if self.rounded(module) else 0
        kept = memory.resampler_bytes(
            self.images, n, self.images * patches, d, q, kv, f, spec.heads, len(spec.layers), self.e, self.stream(module),
            head_norms=spec.layers[0].q_norm is not None, hidden=_hidden(spec.activation),
            weights=folded * self.stream(module) // self.e + stacked + rest,
        )  # fmt: skip
        return _Block(module, kept, again=False)

    def _qformers(self) -> list[_Block]:
        queries = next((p for name, p in self.model.named_parameters() if name.endswith("query_tokens")), None)
        patches, path = self.patches(), class_path(type(self.model))
        if queries is None or patches is None or any(name in path for name in _INSTRUCTED):
            return [_Block(module, None) for module, _ in self.qformer]
        blocks, readers, weights = [], [], 0
        for i, (module, spec) in enumerate(self.qformer):
            d, rows, s, names = spec.width, self.images * queries.shape[1], self.stream(module), spec.attention
            f = children.resolve(module, spec.query_ffn.up).weight.shape[0]
            image = 0
            if spec.cross is not None:
                image = sum(children.resolve(module, n).weight.numel() for n in (spec.cross.key, spec.cross.value))
                readers.append((module, image // (2 * d), d))
                weights += image
            rounded = self.rounded(module)
            stacked = sum(children.resolve(module, n).weight.numel() for n in (names.query, names.key, names.value))
            dropped = any(m.p > 0 for m in module.modules() if isinstance(m, nn.Dropout))
            on_cpu = next(module.parameters()).device.type == "cpu"
            kept = memory.qformer_layer_bytes(
                rows,
                d,
                f,
                spec.heads,
                self.e,
                s,
                cross=spec.cross is not None,
                first=queries.shape[1] if i == 0 and not dropped else None,
                masks=dropped and on_cpu,
                weights=rounded - image if rounded else stacked,
            )
            blocks.append(_Block(module, kept, s * rows * d))
        if readers:
            module, dv, d = readers[0]
            norms = [m for path in self.recipe.fp32 for m in resolve(self.model, path) if isinstance(m, nn.Module)]
            kept = memory.qformer_image_bytes(
                self.images * patches, dv, d, len(readers), self.e, weights=weights, norm=any(map(_trained, norms))
            )
            blocks.append(_Block(module, kept, again=False))
        return blocks

    def _projections(self) -> list[_Block]:
        """Trained linear layers from the rows of images to the width of the language model."""
        found = []
        for path in self.recipe.parts.get("projection", ()):
            for module in resolve(self.model, path):
                if not isinstance(module, nn.Module) or not _trained(module):
                    continue
                linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
                widths = (linears[0].in_features, *(m.out_features for m in linears))
                rows = self._rows_of_an_image()
                kept = None
                if rows is not None:
                    rounded = self.rounded(module)
                    kept = memory.projection_bytes(self.images * rows, widths, self.e, weights=rounded)
                found.append(_Block(module, kept, again=False))
        return found

    def _rows_of_an_image(self) -> int | None:
        queries = next((p for name, p in self.model.named_parameters() if name.endswith("query_tokens")), None)
        if queries is not None:
            return int(queries.shape[1])
        rows = getattr(getattr(self.model, "config", None), "image_seq_length", None)
        return rows if isinstance(rows, int) else self.patches()

    def decoder(self, dtype: torch.dtype) -> list[_Block]:
        """Layers of the frozen language model from the first through which is trained, its last norm, and the loss."""
        if self.recipe.language_model is None:
            return []
        root, layers = self._layers()
        if not layers:
            return [_Block(root, None)]
        first = self._first(root, layers)
        blocks = [self._layer(layer, dtype) for layer in layers[first:]]
        if self.mask and any(state_of(layer) is not None for layer in layers[first:]):
            # One for all of them.
            blocks.append(_Block(layers[first], self.e * self.mask, again=False))
        if first < len(layers) or self.gated:
            h = self._width(layers[-1])
            n = self.batch.samples * (self.batch.tokens if self.batch.supervised is None else self.batch.supervised)
            kept = memory.loss_bytes(self.tokens, n, h, self.e, rms=_kind(layers[-1]) != "opt")
            blocks.append(_Block(layers[-1], kept, again=False))
        return blocks

    def _layers(self) -> tuple[nn.Module, list[Any]]:
        """The language model, and its layers that are known here."""
        assert self.recipe.language_model is not None
        (root,) = resolve(self.model, self.recipe.language_model)
        assert isinstance(root, nn.Module)
        named = [
            m for m in root.modules() if type(m).__name__.endswith(("DecoderLayer", "Block", "Layer")) and _depth(m)
        ]
        return root, [m for m in named if _kind(m) is not None]

    def _trained_through(self) -> set[int]:
        """Gated blocks that are frozen, and that a gradient passes on its way to what is trained below them; by id."""
        frozen = [m for m, _ in self.gated if not _trained(m)]
        if not frozen or self.recipe.language_model is None:
            return set()
        root, layers = self._layers()
        first, places = self._first(root, layers), self._places(root, layers)
        beside = self._beside_lora()
        return {id(m) for m in frozen if first < places[id(m)] or (first == places[id(m)] and beside)}

    def _beside_lora(self) -> bool:
        """Whether something is trained whose gradient comes through media or embeddings, below every gated block."""
        return any(p.requires_grad for name, p in self.model.named_parameters() if "lora_" not in name)

    def _places(self, root: nn.Module, layers: list[Any]) -> dict[int, int]:
        """Before how many layers each gated block stands."""
        order = {id(m): i for i, m in enumerate(root.modules())}
        found = (getattr(m, "places", None) for m in self.model.modules())
        given: Sequence[int] = next((places for places in found if isinstance(places, tuple)), ())
        # IDEFICS has its blocks beside the layers, one for every so many of them.
        given = given or [i * len(layers) // len(self.gated) for i in range(len(self.gated))]
        return {
            id(m): sum(order[id(layer)] < order[id(m)] for layer in layers) if id(m) in order else given[i]
            for i, (m, _) in enumerate(self.gated)
        }

    def _first(self, root: nn.Module, layers: list[Any]) -> int:
        """The first layer that a gradient reaches."""
        firsts = [i for i, layer in enumerate(layers) if _trained(layer)]
        embeddings = [p for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
        known = {id(p) for p in embeddings}
        if any(p.requires_grad for p in embeddings):
            firsts.append(0)
        # Media reach a language model with gated blocks through the first of these, others before their first layer.
        if any(p.requires_grad and id(p) not in known for n, p in self.model.named_parameters() if "lora_" not in n):
            firsts.append(min(self._places(root, layers).values(), default=0))
        return min(firsts, default=len(layers))

    def _width(self, layer: nn.Module) -> int:
        return int(next(p for name, p in layer.named_parameters() if "norm" in name).shape[0])

    def _layer(self, layer: Any, dtype: torch.dtype) -> _Block:
        kind, attention, h = _kind(layer), layer.self_attn, self._width(layer)
        lora: list[Any] = list(lora_layers(layer).values())
        r = sum(m.r[name] for m in lora for name in m.active_adapters)
        rounded = self.e * sum(p.numel() for p in layer.parameters() if p.requires_grad and p.element_size() > self.e)
        goes_in = self.e * self.tokens * h
        computes = {getattr(m, "compute_dtype", None) or dtype for m in layer.modules() if hasattr(m, "compute_dtype")}
        if kind == "opt" and state_of(layer) is None:
            f, heads = _out(layer.fc1), attention.num_heads
            kept = memory.plain_decoder_layer_bytes(self.tokens, h, f, heads, self.e, mask=self.mask)
            return _Block(layer, None if lora else kept, goes_in)
        if state_of(layer) is None or computes - {dtype}:
            return _Block(layer, None, goes_in)
        q, kv = (_out(m) for m in (attention.q_proj, attention.k_proj))
        f, hidden = (_out(layer.fc1), 1) if kind == "opt" else (_out(layer.mlp.gate_proj), 2)
        kept = memory.decoder_layer_bytes(self.tokens, h, q, kv, f, q // attention.head_dim, r, self.e, hidden=hidden)
        return _Block(layer, kept + rounded, goes_in)


def _state(module: nn.Module) -> FusedState | None:
    own: Any = module.__dict__.get("_mllm_fast")
    return own if isinstance(own, FusedState) else None


def _depth(module: nn.Module) -> bool:
    return hasattr(module, "self_attn")


def _kind(layer: nn.Module) -> str | None:
    names = {class_path(cls) for cls in type(layer).__mro__}
    if names & _GATED_MLP:
        return "gated"
    if _OPT in names:
        return "opt"
    return "other" if hasattr(layer, "self_attn") or hasattr(layer, "attention") else None


def _hidden(activation: str) -> int:
    """How much of a network without a gate is kept, in units of its width: a ReLU's result tells what it was given."""
    return 1 if activation == "relu" else 2


def _out(linear: Any) -> int:
    return int(linear.out_features)
