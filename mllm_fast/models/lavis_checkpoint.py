"""The checkpoints of LAVIS, where BLIP-2 and InstructBLIP were trained first, read and written.

    stage 1         `Blip2Stage1`: Q-Former, heads, temperature (`blip2_pretrained.pth`)
    stage 2         `Blip2ForConditionalGeneration`: Q-Former without its text half, `opt_proj` or `t5_proj`
                    (`blip2_pretrained_opt2.7b.pth`, `blip2_pretrained_flant5xl.pth`, `blip2_caption_opt2.7b.pth`)
    InstructBLIP    `InstructBlipForConditionalGeneration` and that for videos: Q-Former with text, `llm_proj` or `t5_proj`
                    (`instruct_blip_vicuna7b_trimmed.pth`, `instruct_blip_flanxl_trimmed.pth`)

LAVIS saves only what it trains, with the norm after the vision model (`ln_vision`): no frozen vision or language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .bridge_file import write_atomically
from .original_checkpoint import CheckpointMismatchError, KeyMap, load_strictly, read_checkpoint

# LAVIS's norm after the vision tower is a plain LayerNorm, transformers' has 1e-6.
LN_VISION_EPS = 1e-5

_NAMES = KeyMap.of(
    (r"^query_tokens$", r"retrieval.query_tokens"),
    (r"^temp$", r"temperature"),
    (r"^(vision|text)_proj\.", r"retrieval.\1_projection."),
    (r"^itm_head\.", r"retrieval.itm_head."),
    (r"^ln_vision\.", r"retrieval.vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", r"retrieval.qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.", r"retrieval.embeddings."),
    (r"^Qformer\.bert\.(.*attention)\.self\.", r"retrieval.qformer.\1.attention."),
    (r"^Qformer\.bert\.", r"retrieval.qformer."),
    (r"^Qformer\.cls\.predictions\.transform\.dense\.", r"lm_head.dense."),
    (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.", r"lm_head.norm."),
    (r"^Qformer\.cls\.predictions\.bias$", r"lm_head.bias"),
    (r"^visual_encoder\.cls_token$", r"retrieval.vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", r"retrieval.vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", r"retrieval.vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"retrieval.vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"retrieval.vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"retrieval.vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.", r"retrieval.vision_model.encoder.layers."),
    # Tied to the word embeddings and to the bias, or no parameters.
    dropped=r"position_ids$|^Qformer\.cls\.predictions\.decoder\.",
)  # fmt: skip

# From the names of `Blip2Stage1` to those of the classes that generate.
_BLIP2 = KeyMap.of((r"^retrieval\.", r""), dropped=r"rotary_emb\.inv_freq$")
_INSTRUCTBLIP = KeyMap.of(
    (r"^retrieval\.qformer\.layernorm\.", r"qformer.embeddings.layernorm."),
    (r"^retrieval\.embeddings\.", r"qformer.embeddings."),
    *((rule.pattern, replacement) for rule, replacement in _BLIP2.rules),
    dropped=r"rotary_emb\.inv_freq$",
)
# And back, from any of them once `retrieval.` is gone. The language model's two names depend on which one it is.
THEIRS = (
    (r"^temperature$", r"temp"),
    (r"^(vision|text)_projection\.", r"\1_proj."),
    (r"^lm_head\.dense\.", r"Qformer.cls.predictions.transform.dense."),
    (r"^lm_head\.norm\.", r"Qformer.cls.predictions.transform.LayerNorm."),
    (r"^lm_head\.bias$", r"Qformer.cls.predictions.bias"),
    (r"^qformer\.(?:embeddings\.)?layernorm\.", r"Qformer.bert.embeddings.LayerNorm."),
    (r"^(?:qformer\.)?embeddings\.", r"Qformer.bert.embeddings."),
    (r"^qformer\.(.*attention)\.attention\.", r"Qformer.bert.\1.self."),
    (r"^qformer\.", r"Qformer.bert."),
    (r"^vision_model\.post_layernorm\.", r"ln_vision."),
    (r"^vision_model\.embeddings\.class_embedding$", r"visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", r"visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", r"visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"visual_encoder.blocks.\1.attn."),
    (r"^vision_model\.encoder\.layers\.", r"visual_encoder.blocks."),
)  # fmt: skip
_GENERATORS = {
    "Blip2ForConditionalGeneration": _BLIP2,
    "InstructBlipForConditionalGeneration": _INSTRUCTBLIP,
    "InstructBlipVideoForConditionalGeneration": _INSTRUCTBLIP,
}
_PARTS = {"vision_model.": "vision model", "language_model.": "language model"}


class LavisMismatchError(CheckpointMismatchError):
    """A LAVIS checkpoint does not fit the model; the message lists every difference."""


def convert_lavis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LAVIS's parameters of stage 1 under the names of `Blip2Stage1`.

    Names that no rule knows are kept as they are, for the caller to complain about.
    """
    converted = _NAMES.rename(state)
    for name in [name for name in converted if name.endswith(".self_attn.q_bias")]:
        # The vision tower's keys have no bias, which transformers stores as zeros.
        if (other := name.replace("q_bias", "v_bias")) not in converted:
            continue
        q, v = converted.pop(name), converted.pop(other)
        converted[name.replace("q_bias", "qkv.bias")] = torch.cat((q, torch.zeros_like(v), v))
    return converted


@dataclass(frozen=True)
class LavisReport:
    """What a LAVIS checkpoint held; `str()` says it in a line.

    Attributes:
        loaded: names of the model's tensors that were in it.
        kept: parts that were not, and are as the model held them: "vision model", "language model".
    """

    loaded: tuple[str, ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        kept = f"; no {' and no '.join(self.kept)} in the checkpoint, the model keeps its own" if self.kept else ""
        return f"{len(self.loaded)} tensors loaded{kept}"


def load_lavis(model: nn.Module, checkpoint: str | Path | Mapping[str, Tensor]) -> LavisReport:
    """Load a checkpoint of LAVIS, strictly: either everything fits, or nothing is changed.

    A vision or language model that the checkpoint leaves out stays as the model holds it: load it before, or after. The norm
    after the vision model is in every checkpoint, and gets LAVIS's eps of 1e-5, where transformers builds it with 1e-6; so
    after `save_pretrained` and `from_pretrained`, set `model.vision_model.post_layernorm.eps` again. LAVIS runs Flan-T5 with
    `dense_act_fn="gelu"` in its config, which is for the caller to choose.

    Args:
        model: of the checkpoint's shapes: a `Blip2Stage1` whose vocabulary includes [DEC], or one of transformers'
            `Blip2ForConditionalGeneration`, `InstructBlipForConditionalGeneration` and
            `InstructBlipVideoForConditionalGeneration`.
        checkpoint: a file as LAVIS writes it (`{"model": ...}`), or the mapping in it.

    Returns:
        what was loaded, and what the checkpoint left out.

    Raises:
        LavisMismatchError: parameters are missing, unexpected or of another shape; all are listed.
        ValueError: a model of another class, or a file that cannot be read.
    """
    layout, prefix = _layout(model)
    named = isinstance(checkpoint, str | Path)
    state = read_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint.get("model", checkpoint)
    own = model.state_dict()
    given = convert_lavis(state)
    if layout is not None:
        kind = _language_model(model)
        own_names = KeyMap.of((rf"^{kind}_proj\.", r"language_projection."), (rf"^{kind}_model\.", r"language_model."))
        given = own_names.rename(layout.rename(given))
    tied = _tied(model)
    given = {
        # A single number, as the temperature is, may have a dimension or none.
        name: value.reshape(own[name].shape) if name in own and value.numel() == own[name].numel() == 1 else value
        for name, value in given.items()
        # LAVIS drops what is frozen by the first name of a parameter only: its other names are in the file by accident.
        if tied.get(name, name) in given
    }
    parts = {prefix + part: title for part, title in _PARTS.items() if any(_in(name, prefix + part) for name in own)}
    absent = tuple(part for part in parts if not any(_in(name, part) for name in given))
    source = f"the LAVIS checkpoint {checkpoint}" if named else "the LAVIS checkpoint"
    load_strictly(
        model,
        given,
        source,
        needed=lambda name: name not in tied and not any(_in(name, part) for part in absent),
        error=LavisMismatchError,
    )
    model.get_submodule(f"{prefix}vision_model.post_layernorm").eps = LN_VISION_EPS
    return LavisReport(tuple(sorted(given)), tuple(parts[part] for part in absent))


def save_lavis(
    model: nn.Module, path: str | Path, *, vision: bool = False, language_model: bool = False, overwrite: bool = False
) -> Path:
    """Write a model as LAVIS does, for its own code and for `load_lavis`: what is trained through a frozen rest.

    LAVIS computes the norm after the vision model with an eps of 1e-5: train with that (`load_lavis` sets it).

    Args:
        model: as for `load_lavis`.
        path: with suffix `.safetensors` the tensors alone, otherwise a pickle with the tensors under "model".
        vision, language_model: write these too, where they were trained.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False.
        ValueError: a model of another class, or LoRA or quantised weights among what is to be written.
    """
    layout, prefix = _layout(model)
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass overwrite=True")
    left_out = [prefix + part for part, wanted in zip(_PARTS, (vision, language_model), strict=True) if not wanted]
    ours = {n: value for n, value in model.state_dict().items() if not any(_in(n, part) for part in left_out)}
    if strange := [n for n, value in ours.items() if ".lora_" in n or not value.is_floating_point()]:
        raise ValueError(
            f"LAVIS's layout has no place for {strange[0]}; merge LoRA into the weights, and write parts in 16 or 32 bits"
        )
    kind = "" if layout is None else _language_model(model)
    theirs = KeyMap.of(
        (r"^language_projection\.", rf"{kind}_proj."), (r"^language_model\.", rf"{kind}_model."), *THEIRS
    ).rename(split_keys({name.removeprefix(prefix): value for name, value in ours.items()}))
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in theirs.items()}
    if "temp" in tensors:
        tensors["temp"] = tensors["temp"].reshape(())
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_atomically(path, lambda file: save_file(tensors, file))
    else:
        write_atomically(path, lambda file: torch.save({"model": tensors}, file))
    return path


def split_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision model's biases as LAVIS holds them: it has none on keys, which no softmax would notice."""
    split = dict(state)
    for name in [name for name in state if name.endswith("self_attn.qkv.bias")]:
        query, _, value = split.pop(name).chunk(3)
        split |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    return split


def _layout(model: nn.Module) -> tuple[KeyMap | None, str]:
    """The map from stage 1's names to the model's, None where these are its own, and what its names begin with."""
    for cls in type(model).__mro__:
        if cls.__name__ == "Blip2Stage1":
            return None, "retrieval."
        if cls.__name__ in _GENERATORS:
            return _GENERATORS[cls.__name__], ""
    known = ", ".join(("Blip2Stage1", *_GENERATORS))
    raise ValueError(f"LAVIS has no checkpoints of a {type(model).__name__}; expected one of {known}")


def _language_model(model: nn.Module) -> str:
    """What LAVIS calls the language model: the beginning of two of its names."""
    kind = model.config.text_config.model_type
    return kind if kind in ("opt", "t5") else "llm"


def _tied(model: nn.Module) -> dict[str, str]:
    """Of a parameter with several names in the state dict: the first one, by the others."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: found for name, p in names if (found := first.setdefault(id(p), name)) != name}


def _in(name: str, part: str) -> bool:
    return name.startswith(part) and ".post_layernorm." not in name
