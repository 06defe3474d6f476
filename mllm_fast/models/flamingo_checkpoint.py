"""Flamingo checkpoints in the layouts of OpenFlamingo 2.0 and Otter, to and from `mllm_fast.models.Flamingo`.

    perceiver.*                                               the resampler
    lang_encoder.<decoder layers>.{i}.gated_cross_attn_layer.*   the block before decoder layer i; released files name it so
    lang_encoder.gated_cross_attn_layers.{i}.*                the same block, registered a second time by OpenFlamingo
    lang_encoder.*                                            embeddings of the new tokens; in Otter's, the language model

Keys and values are one matrix there, rows K then V. Otter has the feed-forward networks under another name and the
resampler's layers flat. Both were read from the projects' sources (`open_flamingo/src/helpers.py`, Otter's
`modeling_otter.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .bridge_file import write_atomically
from .conditioning import base_model, decoder
from .flamingo import Flamingo
from .original_checkpoint import CheckpointMismatchError, KeyMap, load_strictly, read_checkpoint

_WRAPPERS = re.compile(r"^module\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_BLOCK = re.compile(r"lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|(?:.+\.)?(\d+)\.gated_cross_attn_layer)\.(.+)")
# The frozen decoder layers' second name, and what older versions of transformers saved with a Llama.
_IGNORED = re.compile(r"^lang_encoder\.old_decoder_blocks\.|rotary_emb\.inv_freq$|embeddings\.position_ids$")
# After `_BLOCK` has become `blocks.{j}`. In both parts the feed-forward network is norm, linear, activation, linear.
_NAMES = KeyMap.of(
    (r"perceiver\.latents$", "resampler.latents"),
    (r"perceiver\.frame_embs$", "resampler.frame_embeddings"),
    (r"perceiver\.media_time_embs$", "resampler.image_embeddings"),
    (r"perceiver\.norm\.", "resampler.norm."),
    (r"perceiver\.layers\.(\d+)\.(?:0\.)?(?=norm_media|norm_latents|to_)", r"resampler.layers.\1."),
    (r"perceiver\.layers\.(\d+)\.(?:1|feed_forward)\.0\.", r"resampler.layers.\1.ffn_norm."),
    (r"perceiver\.layers\.(\d+)\.(?:1|feed_forward)\.1\.", r"resampler.layers.\1.ffn_up."),
    (r"perceiver\.layers\.(\d+)\.(?:1|feed_forward)\.3\.", r"resampler.layers.\1.ffn_down."),
    (r"blocks\.(\d+)\.attn\.", r"blocks.\1."),
    (r"blocks\.(\d+)\.(?:ff|feed_forward)\.0\.", r"blocks.\1.ffn_norm."),
    (r"blocks\.(\d+)\.(?:ff|feed_forward)\.1\.", r"blocks.\1.ffn_up."),
    (r"blocks\.(\d+)\.(?:ff|feed_forward)\.3\.", r"blocks.\1.ffn_down."),
    (r"blocks\.(\d+)\.ff_gate$", r"blocks.\1.ffn_gate"),
)
_FFN = {"ffn_norm": "0", "ffn_up": "1", "ffn_down": "3"}
_BRIDGE = ("resampler.", "blocks.")


def read_original(path: str | Path, *, meta: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their original names, without what distributed training put into these.

    Args:
        path: a file or folder, as for `original_checkpoint.read_checkpoint`, which also says what is raised.
        meta: shapes only.
    """
    return {_WRAPPERS.sub("", name): value for name, value in read_checkpoint(path, meta=meta).items()}


def load_original(model: nn.Module, path: str | Path, *, frozen: bool = False) -> None:
    """Load a checkpoint of OpenFlamingo or Otter, strictly: either everything fits, or nothing is changed.

    The embeddings that it holds are loaded into the language model, whose embeddings must have as many rows.

    Args:
        model: a `Flamingo` or `FlamingoForConditionalGeneration` over the models that the checkpoint was trained with.
        path: a file or folder.
        frozen: load also what the file holds of the frozen language and vision models under the names of transformers, as
            Otter's files do. Otherwise these parts keep what they have, and the file's are left out.

    Raises:
        CheckpointMismatchError: tensors are missing, unexpected or of another shape; all are listed.
        ValueError: a model that these projects do not have.
    """
    core = _core(model)
    given = _split(_NAMES.rename(_placed(core, read_original(path), frozen)))
    load_strictly(core, given, str(path), needed=lambda name: name.startswith(_BRIDGE))


def save_original(
    model: nn.Module,
    path: str | Path,
    *,
    layout: Literal["open_flamingo", "otter"] = "open_flamingo",
    frozen: bool = False,
) -> Path:
    """Write the bridge and the input embeddings as OpenFlamingo's released checkpoints have them, or as Otter's.

    Args:
        model: as in `load_original`.
        path: the file; safetensors where it ends in `.safetensors`, otherwise as `torch.save` writes it. It is replaced
            if it exists.
        layout: whose names are written.
        frozen: in Otter's layout, write the language and vision models too, as its folders hold them.

    Raises:
        ValueError: a model that these projects do not have, or frozen models in OpenFlamingo's layout, which has none.
    """
    if layout not in ("open_flamingo", "otter"):
        raise ValueError(f"unknown layout {layout!r}; choose 'open_flamingo' or 'otter'")
    if frozen and layout != "otter":
        raise ValueError("OpenFlamingo's checkpoints hold no frozen models; pass layout='otter', or frozen=False")
    core, path = _core(model), Path(path)
    base = base_model(core.lm)
    _, layers = decoder(core.lm)
    prefix = next(name for name, module in base.named_modules() if module is layers)
    state = {name: value for name, value in core.state_dict().items() if name.startswith(_BRIDGE)}
    tensors = {}
    for name, value in state.items():
        head, _, leaf = name.partition(".to_k.")
        if leaf:
            value, name = torch.cat((value, state[f"{head}.to_v.{leaf}"])), f"{head}.to_kv.{leaf}"
        if ".to_v." not in name:
            tensors[_original_name(core, name, prefix)] = value.unsqueeze(1) if "image_emb" in name else value
    for name in _embeddings(base, outputs=False):
        tensors[f"lang_encoder.{name}"] = base.get_parameter(name)
    if layout == "otter":
        tensors = {_otter_name(name): value for name, value in tensors.items()}
    if frozen:
        tensors |= _frozen(core, base, prefix)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}

    def write(file: Path) -> None:
        if path.suffix == ".safetensors":
            save_file(tensors, file)
        else:
            torch.save(tensors, file)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    return path


def options_of(
    given: Mapping[str, Tensor], language_model: nn.Module, heads: int = 8
) -> tuple[dict[str, Any], int | None]:
    """What a checkpoint's shapes say of the bridge: options of `FlamingoModelConfig`, and the rows of the embeddings.

    Args:
        given: what `read_original` read; tensors on the meta device will do.
        language_model: for the name of its embeddings.
        heads: of resampler and blocks, which no shape says.

    Returns:
        the options; the number of tokens that the file has embeddings for, None if it has none.

    Raises:
        CheckpointMismatchError: parts are missing, or the blocks do not stand at equal distances.
    """
    matches = {name: match for name in given if (match := _BLOCK.fullmatch(name))}
    layers = sorted({int(match[1] or match[2]) for match in matches.values()})
    every = layers[0] + 1 if layers else 0
    if not layers or layers != list(range(every - 1, layers[-1] + 1, every)) or "perceiver.latents" not in given:
        raise CheckpointMismatchError(
            f"no checkpoint of OpenFlamingo or Otter: it has gated blocks before decoder layers {layers} and "
            f"{'a' if 'perceiver.latents' in given else 'no'} resampler; expected both, with blocks at equal distances"
        )
    first = {match[3]: given[name] for name, match in matches.items() if int(match[1] or match[2]) == layers[0]}
    resampler = _NAMES.rename({name: value for name, value in given.items() if name.startswith("perceiver.")})
    depth = 1 + max((int(name.split(".")[2]) for name in resampler if name.startswith("resampler.layers.")), default=-1)
    block = _NAMES.rename({f"blocks.0.{name}": value for name, value in first.items()})
    rows = [given[f"lang_encoder.{name}"] for name in _embeddings(language_model) if f"lang_encoder.{name}" in given]

    def length(tensors: Mapping[str, Tensor], name: str) -> int | None:
        return tensors[name].shape[0] if name in tensors else None

    inner = length(block, "blocks.0.to_q.weight") or 512
    resampler_inner = length(resampler, "resampler.layers.0.to_q.weight") or 512
    options = {
        "every": every,
        "latents": given["perceiver.latents"].shape[0],
        "resampler_depth": depth,
        "resampler_heads": heads,
        "resampler_head_dim": resampler_inner // heads,
        "resampler_ffn_dim": length(resampler, "resampler.layers.0.ffn_up.weight"),
        "heads": heads,
        "head_dim": inner // heads,
        "ffn_dim": length(block, "blocks.0.ffn_up.weight"),
        "max_frames": length(resampler, "resampler.frame_embeddings"),
        "max_images": length(resampler, "resampler.image_embeddings"),
    }
    return options, rows[0].shape[0] if rows else None


def _core(model: Any) -> Flamingo:
    core = model if isinstance(model, Flamingo) else getattr(model, "model", None)
    if not isinstance(core, Flamingo):
        raise TypeError(f"expected a Flamingo or FlamingoForConditionalGeneration, got {type(model).__name__}")
    if core.config.activation != "gelu" or core.config.gate != "scalar":
        raise ValueError(
            f"the model has activation {core.config.activation!r} and {core.config.gate} gates; checkpoints of OpenFlamingo "
            "and Otter are of models with 'gelu' and scalar gates"
        )
    return core


def _placed(core: Flamingo, given: Mapping[str, Tensor], frozen: bool) -> dict[str, Tensor]:
    """The tensors without what is left out; blocks by their number, the language and vision models' by our names."""
    base = base_model(core.lm)
    own, lm_prefix = set(core.state_dict()), "lm." if base is core.lm else "lm.base_model.model."
    loaded = _embeddings(base)
    placed: dict[str, Tensor] = {}
    problems = []
    for name, value in given.items():
        block = _BLOCK.fullmatch(name)
        target: str | None = name
        if block is not None and int(block[1] or block[2]) in core.places:
            target = f"blocks.{core.places.index(int(block[1] or block[2]))}.{block[3]}"
        elif block is None and name.startswith("lang_encoder."):
            target = name.removeprefix("lang_encoder.").replace(".decoder_layer.", ".")
            if lm_prefix + target not in own:
                target = name
            else:
                target = lm_prefix + target if frozen or target in loaded else None
        elif name.startswith("vision_encoder."):
            target = _vision_name(name, own) if frozen else None
        if target is None or _IGNORED.search(name):
            continue
        if target in placed and not torch.equal(placed[target], value):
            problems.append(f"two different tensors for {target}, one of them {name}")
        placed[target] = value
    if problems:
        raise CheckpointMismatchError("the checkpoint contradicts itself:\n  " + "\n  ".join(problems))
    return placed


def _vision_name(name: str, own: set[str]) -> str:
    """transformers has CLIP's vision model with and without a level between."""
    inner = name.removeprefix("vision_encoder.")
    candidates = [inner, inner.removeprefix("vision_model."), f"vision_model.{inner}"]
    found = (f"vision_encoder.{level}{c}" for level in ("tower.", "") for c in candidates)
    return next((candidate for candidate in found if candidate in own), name)


def _split(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values apart, and a sample's image embeddings [M, 1, D] as [M, D]."""
    split: dict[str, Tensor] = {}
    for name, value in given.items():
        if name.startswith(_BRIDGE) and name.endswith(".to_kv.weight"):
            k, v = value.tensor_split(2)
            split |= {name.replace(".to_kv.", ".to_k."): k, name.replace(".to_kv.", ".to_v."): v}
        else:
            split[name] = value.squeeze(1) if name == "resampler.image_embeddings" and value.ndim == 3 else value
    return split


def _embeddings(language_model: Any, outputs: bool = True) -> list[str]:
    """Names of the input embeddings in the language model, and of its head."""
    heads = (language_model.get_input_embeddings(), language_model.get_output_embeddings() if outputs else None)
    weights = {id(head.weight) for head in heads if head is not None}
    named = language_model.named_parameters(remove_duplicate=outputs is False)
    return [name for name, parameter in named if id(parameter) in weights]


def _original_name(core: Flamingo, name: str, layers: str) -> str:
    """One of our names (with `to_kv`) in OpenFlamingo's layout."""
    part, *rest = name.split(".")
    if part == "blocks":
        prefix = f"lang_encoder.{layers}.{core.places[int(rest[0])]}.gated_cross_attn_layer"
        if len(rest) == 2:
            return f"{prefix}.{rest[1].replace('ffn_gate', 'ff_gate')}"
        role, leaf = rest[1:]
        return f"{prefix}.ff.{_FFN[role]}.{leaf}" if role in _FFN else f"{prefix}.attn.{role}.{leaf}"
    if rest[0] != "layers":
        renamed = {"frame_embeddings": "frame_embs", "image_embeddings": "media_time_embs"}.get(rest[0], rest[0])
        return ".".join(("perceiver", renamed, *rest[1:]))
    layer, role, leaf = rest[1:]
    return f"perceiver.layers.{layer}." + (f"1.{_FFN[role]}.{leaf}" if role in _FFN else f"0.{role}.{leaf}")


def _otter_name(name: str) -> str:
    """One of OpenFlamingo's names in Otter's layout."""
    name = re.sub(r"^(perceiver\.layers\.\d+)\.0\.", r"\1.", name)
    name = re.sub(r"^(perceiver\.layers\.\d+)\.1\.", r"\1.feed_forward.", name)
    return name.replace(".gated_cross_attn_layer.ff.", ".gated_cross_attn_layer.feed_forward.")


def _frozen(core: Flamingo, base: nn.Module, layers: str) -> dict[str, Tensor]:
    """The language and vision models' tensors by Otter's names; `layers` is where the decoder layers are."""
    if base is not core.lm:
        raise ValueError(
            "the language model is wrapped by PEFT; merge_and_unload() it, or leave it out with frozen=False"
        )
    within = re.compile(rf"^({re.escape(layers)}\.\d+)\.")
    tower = getattr(core.vision_encoder, "tower", core.vision_encoder)
    found = {}
    for name, value in base.state_dict().items():
        found["lang_encoder." + within.sub(r"\1.decoder_layer.", name)] = value
    for name, value in tower.state_dict().items():
        found["vision_encoder.vision_model." + name.removeprefix("vision_model.")] = value
    return found
