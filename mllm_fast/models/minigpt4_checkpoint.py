"""The files of the original MiniGPT-4: read into our model, and what was trained written back.

    eva_vit_g.pth                     the vision model's layers; those past the model's depth, its norm and head are unused
    blip2_pretrained_flant5xxl.pth    LAVIS's Q-Former, queries and `ln_vision`, under "model"; not for the LLaMA-2 variant
    a folder                          the language model, as transformers saves it
    pretrained_minigpt4*.pth          `llama_proj`, under "model", next to the optimiser's state

They are loaded in this order but for the language model, and what a later file holds replaces what an earlier one held.
The LLaMA-2 variant and MiniGPT-v2 never load a weight for `ln_vision`: their projections were trained behind a norm without
one, and so it stays here. MiniGPT-v2's last file also holds LoRA matrices of the language model, which are merged into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .bridge_file import write_atomically
from .lavis_checkpoint import THEIRS, convert_lavis, split_keys
from .minigpt4_config import MiniGPT4Config
from .original_checkpoint import CheckpointMismatchError, KeyMap, differences, load_strictly, read_checkpoint

if TYPE_CHECKING:
    from .minigpt4 import MiniGPT4ForConditionalGeneration

POSITIONS = "vision_model.embeddings.position_embedding"
LN_VISION = "vision_model.post_layernorm."
LORA_ALPHA = 16  # in all of the original's configurations

_KNOWN = KeyMap.of(
    # Heads of the vision model, and of LAVIS's other stages and language models; the text half of the Q-Former; buffers.
    dropped=r"^visual_encoder\.(norm|fc_norm|head)\.|^visual_encoder\.mask_token$"
    r"|^(t5|opt|llm|vision|text)_proj\.|^itm_head\.|^temp$|^Qformer\.cls\."
    r"|^Qformer\.bert\.embeddings\.(word|position)_embeddings\.|^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
    r"|position_ids$|rotary_emb\.inv_freq$",
)
_OURS = KeyMap.of(
    (r"^retrieval\.", r""),  # where `convert_lavis` puts vision model and Q-Former
    (r"^llama_proj\.", r"language_projection.linear."),
    (r"^llama_model\.", r"language_model."),
)
_THEIRS = KeyMap.of(
    (r"^language_projection\.linear\.", r"llama_proj."),
    (r"^language_model\.", r"llama_model."),
    *THEIRS,
)
_LAYER = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.")
_LORA = re.compile(r"^language_model\.base_model\.model\.(.+)\.lora_([AB])(\.[^.]+)?\.weight$")


def from_original(
    cls: type[MiniGPT4ForConditionalGeneration],
    *,
    vision: str | Path,
    language_model: str | Path | PreTrainedModel,
    projection: str | Path,
    qformer: str | Path | None = None,
    config: MiniGPT4Config | None = None,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    lora_alpha: float = LORA_ALPHA,
    **language_model_kwargs: Any,
) -> MiniGPT4ForConditionalGeneration:
    """The model in the original's files, in evaluation. Any of the files may be safetensors, with the same names in it.

    Args:
        vision: `eva_vit_g.pth`.
        language_model: its folder (or name on the hub), or the model itself.
        projection: `pretrained_minigpt4*.pth`.
        qformer: `blip2_pretrained_flant5xxl.pth`. None: the variant without Q-Former.
        config: of another size than the original; its text_config is replaced by the language model's.
        image_size: height and width of pictures, 224 by default; positions of another grid are interpolated.
        dtype: of the parts before the language model; default: the language model's. In fp16 Q-Former and queries stay fp32.
        lora_alpha: by which LoRA matrices in `projection`, divided by their rank, are scaled.
        **language_model_kwargs: of `AutoModelForCausalLM.from_pretrained` (`device_map`, `quantization_config`, ...). The
            other parts go where its embeddings are.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointMismatchError: tensors are missing, unexpected or of another shape; all are listed, by file.
        ValueError: a file cannot be read, or the config's kind of model has other files.
    """
    if config is not None and config.has_qformer != (qformer is not None):
        raise ValueError(
            f"config.has_qformer is {config.has_qformer}, but qformer is {qformer}; pass the Q-Former's file to a model that "
            "has one, and only to that"
        )
    files = {"vision": Path(vision), "projection": Path(projection)}
    if qformer is not None:
        files = {"vision": Path(vision), "qformer": Path(qformer), "projection": Path(projection)}
    states = {part: read_checkpoint(file) for part, file in files.items()}
    lm = language_model
    if not isinstance(lm, PreTrainedModel):
        lm = _load_language_model(lm, dtype, language_model_kwargs)
    config = _config(config, lm, image_size, has_qformer=qformer is not None)
    with torch.device("meta"):
        model = cls(config).eval()
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("language_model.")}
    given = {part: convert_original(state, config) for part, state in states.items()}
    lora = {name: given["projection"].pop(name) for name in list(given["projection"]) if _LORA.match(name)}
    weights = {} if config.has_qformer else _plain_norm(own)
    for tensors in given.values():
        weights |= tensors
    _check(files, given, own, weights, _lora_problems(lm, lora))
    dtype = lm.dtype if dtype is None else dtype
    device = lm.get_input_embeddings().weight.device
    weights = {name: value.to(device, _dtype(name, dtype), copy=True) for name, value in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    _merge_lora(lm, lora, lora_alpha)
    model.language_model, model.generation_config = lm, lm.generation_config
    return model


def convert_original(state: Mapping[str, Tensor], config: MiniGPT4Config) -> dict[str, Tensor]:
    """An original file's tensors under our names; without those that the model has no use for, positions interpolated.

    Names that no rule knows are kept as they are, for the caller to complain about.
    """
    if "patch_embed.proj.weight" in state:  # the vision model's own file, where it is the whole
        state = {f"visual_encoder.{name}": value for name, value in state.items()}
    given = _OURS.rename(convert_lavis(_KNOWN.rename(state)))
    depth = config.vision_config.num_hidden_layers
    given = {name: value for name, value in given.items() if not (found := _LAYER.match(name)) or int(found[1]) < depth}
    if POSITIONS in given:
        given[POSITIONS] = _resize(given[POSITIONS], int(config.patches**0.5))
    return given


def load_original(model: nn.Module, path: str | Path) -> None:
    """Load what the original trained into a model that exists, strictly: either everything fits, or nothing is changed.

    Args:
        model: a `MiniGPT4ForConditionalGeneration`. LoRA matrices go where PEFT's layers are in its `language_model`.
        path: `pretrained_minigpt4*.pth`, or what `save_original` wrote; the projection has to be there.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointMismatchError: tensors are missing, unexpected or of another shape; all are listed.
        ValueError: the file cannot be read.
    """
    given = convert_original(read_checkpoint(path), model.config)
    load_strictly(model, given, str(path), needed=lambda name: name.startswith("language_projection."))


def save_original(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write what is trained as the original does: the projection, what the config does not freeze, LoRA matrices.

    Args:
        model: a `MiniGPT4ForConditionalGeneration`.
        path: with suffix `.safetensors` the tensors alone, otherwise a pickle with the tensors under "model".
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = {name: value for name, value in model.state_dict().items() if _is_trained(name, model.config)}
    theirs = {
        name: value.detach().cpu().clone().contiguous() for name, value in _THEIRS.rename(split_keys(ours)).items()
    }
    if path.suffix == ".safetensors":
        write_atomically(path, lambda file: save_file(theirs, file))
    else:
        write_atomically(path, lambda file: torch.save({"model": theirs}, file))
    return path


def _load_language_model(path: str | Path, dtype: torch.dtype | None, kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """A language model with all of its weights, which transformers would make up where they are missing."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"no language model in {path}: config.json is missing; expected a folder of transformers'"
        )
    if not Path(path).exists() and (Path(path).is_absolute() or str(path).startswith(".")):
        raise FileNotFoundError(f"there is no language model at {path}; expected a folder of transformers'")
    try:
        options = {"dtype": "auto" if dtype is None else dtype, "trust_remote_code": False, **kwargs}
        lm, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"no language model could be loaded from {path}: {str(error).splitlines()[0]}") from error
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    if problems:
        raise CheckpointMismatchError(f"the language model in {path} lacks weights:\n  " + "\n  ".join(problems))
    return lm


def _config(
    config: MiniGPT4Config | None, lm: PreTrainedModel, image_size: int | None, *, has_qformer: bool
) -> MiniGPT4Config:
    """The config of the model that is to be built over this language model."""
    settings: dict[str, Any] = {"has_qformer": has_qformer} if config is None else config.to_dict()
    settings["text_config"] = lm.config
    if image_size is not None:
        settings["vision_config"] = {**settings.get("vision_config", {}), "image_size": image_size}
    return MiniGPT4Config(**settings)


def _check(
    files: Mapping[str, Path],
    given: Mapping[str, Mapping[str, Tensor]],
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    more: list[str],
) -> None:
    """Raise unless the files together hold all of our own parameters, and nothing else; `more`: problems known already."""
    lines: list[str] = []
    for part, file in files.items():
        needed = [name for name in own if name not in weights and _part(name, files) == part]
        problems = differences(own, given[part], needed=needed) + (more if part == "projection" else [])
        if problems:
            lines += [f"{file}:", *(f"  {problem}" for problem in problems)]
    if lines:
        raise CheckpointMismatchError("the original's files do not fit this model:\n  " + "\n  ".join(lines))


def _part(name: str, files: Mapping[str, Path]) -> str:
    """Which file should hold a parameter of ours."""
    if name.startswith("language_projection."):
        return "projection"
    return "qformer" if name.startswith(("query_tokens", "qformer.", LN_VISION)) and "qformer" in files else "vision"


def _plain_norm(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"{LN_VISION}{name}": make(own[f"{LN_VISION}{name}"].shape)
        for name, make in (("weight", torch.ones), ("bias", torch.zeros))
    }


def _resize(positions: Tensor, size: int) -> Tensor:
    """Positions [1, 1 + n * n, D] for a grid of `size`, as the original interpolates them: not that of the class token."""
    old = int((positions.shape[1] - 1) ** 0.5)
    if old == size or old * old != positions.shape[1] - 1:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 and name.startswith(("query_tokens", "qformer.")) else dtype


def _is_trained(name: str, config: MiniGPT4Config) -> bool:
    if name.startswith("vision_model."):
        return not config.freeze_vision
    if name.startswith(("query_tokens", "qformer.")):
        return not config.freeze_qformer
    return name.startswith("language_projection.") or ".lora_" in name


def _lora_problems(lm: nn.Module, lora: Mapping[str, Tensor]) -> list[str]:
    problems = []
    own = dict(lm.named_parameters())
    for name, value in lora.items():
        found = _LORA.match(name)
        assert found is not None
        weight = own.get(f"{found[1]}.weight")
        if weight is None:
            problems.append(f"unexpected: {name}")
        elif name.replace(".lora_A", ".lora_%").replace(".lora_B", ".lora_A").replace(".lora_%", ".lora_B") not in lora:
            problems.append(f"{name} has no partner")
        elif not weight.is_floating_point():
            problems.append(
                f"{name}: cannot be merged into a quantised weight; load the language model in 16 or 32 bits"
            )
        elif value.shape[1 if found[2] == "A" else 0] != weight.shape[1 if found[2] == "A" else 0]:
            problems.append(f"shape of {name}: the checkpoint has {tuple(value.shape)}, for {tuple(weight.shape)}")
    return problems


@torch.no_grad()
def _merge_lora(lm: nn.Module, lora: Mapping[str, Tensor], alpha: float) -> None:
    """W + alpha / r * B A, in fp32."""
    for name, a in lora.items():
        found = _LORA.match(name)
        assert found is not None
        if found[2] == "B":
            continue
        b = lora[name.replace(".lora_A", ".lora_B")]
        weight = lm.get_parameter(f"{found[1]}.weight")
        delta = alpha / a.shape[0] * (b.float() @ a.float())
        weight.copy_(weight.float() + delta.to(weight.device))
