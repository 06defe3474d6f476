"""LLaVA's own checkpoints (haotian-liu/LLaVA) in transformers' `LlavaForConditionalGeneration`.

Three layouts: a whole model (`model.layers.*`, `model.mm_projector.*`, `lm_head.weight`, with or without the vision tower),
a projector alone (`mm_projector.bin`, what stage 1 saves), and a LoRA folder (`adapter_config.json`, the adapter's weights,
and `non_lora_trainables.bin` with the projector).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .bridge_file import write_atomically
from .original_checkpoint import CheckpointMismatchError, KeyMap, differences, load_strictly, read_checkpoint

PROJECTOR_FILE = "mm_projector.bin"
LORA_EXTRA_FILE = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# What PEFT and data-parallel training put before names.
_WRAPPERS = r"^(?:module\.)?(?:base_model\.model\.)?(?=model\.|lm_head\.)"
_NAMES = KeyMap.of(
    (r"^model\.mm_projector\.0\.", r"model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", r"model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.", r"model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    # Buffers that older versions of transformers saved.
    dropped=r"rotary_emb\.inv_freq$|position_ids$",
)
_ORIGINAL = (("linear_1.", "model.mm_projector.0."), ("linear_2.", "model.mm_projector.2."))
_PROJECTOR = "model.multi_modal_projector."
_TOWER = "model.vision_tower."


def load_llava(model: nn.Module, path: str | Path) -> None:
    """Load a whole original LLaVA, all of it or nothing.

    Args:
        model: a `LlavaForConditionalGeneration` of the same shape. Where the checkpoint leaves out the vision tower (most
            do: it is the unchanged CLIP), the model keeps its own.
        path: the folder, with weights whole or in shards, or a single file.

    Raises:
        FileNotFoundError: there are no weights at `path`.
        CheckpointMismatchError: names or shapes differ; all are listed.
    """
    given = _convert(read_checkpoint(path))
    tower = any(name.startswith(_TOWER) for name in given)
    load_strictly(model, given, str(path), needed=lambda name: tower or not name.startswith(_TOWER))


def load_projector(model: nn.Module, path: str | Path) -> None:
    """Load the projector alone, from `mm_projector.bin`, `non_lora_trainables.bin`, or a folder that holds one of them.

    Args:
        model: a `LlavaForConditionalGeneration`.
        path: the file or the folder.

    Raises:
        FileNotFoundError: neither file is there.
        CheckpointMismatchError: names or shapes differ; all are listed. The projector of LLaVA 1 ("linear") has one layer,
            and fits `mllm_fast.modules.Projector`, not this class.
    """
    file = _projector_file(Path(path))
    given = {name: value for name, value in _convert(read_checkpoint(file)).items() if name.startswith("model.m")}
    if not any(name.startswith(_PROJECTOR) for name in given) and "model.mm_projector.weight" not in given:
        raise CheckpointMismatchError(f"{file} holds no projector; expected names that begin with model.mm_projector.")
    load_strictly(model, given, str(file), needed=lambda name: name.startswith(_PROJECTOR))


def save_projector(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the projector as `mm_projector.bin`, which LLaVA's own `builder.py` reads.

    Args:
        model: a `LlavaForConditionalGeneration`.
        path: the file, or a folder to put `mm_projector.bin` into.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: the file is there, and `overwrite` is False.
    """
    path = Path(path)
    if path.suffix != ".bin":
        path = path / PROJECTOR_FILE
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: t for name, t in model.state_dict().items() if name.startswith(_PROJECTOR)}
    original = {
        theirs + name.removeprefix(_PROJECTOR + ours): value.detach().cpu().contiguous().clone()
        for name, value in state.items()
        for ours, theirs in _ORIGINAL
        if name.startswith(_PROJECTOR + ours)
    }
    if not original:
        raise ValueError(f"{type(model).__name__} has no multi_modal_projector with linear_1 and linear_2")
    write_atomically(path, lambda file: torch.save(original, file))
    return path


def load_lora(model: nn.Module, folder: str | Path, *, adapter: str = "default", merge: bool = False) -> None:
    """Put an original LLaVA LoRA on the language model, and load the projector that was trained with it.

    Args:
        model: a `LlavaForConditionalGeneration` that holds the base model's weights (`load_llava`).
        folder: with `adapter_config.json`, `adapter_model.safetensors` or `.bin`, and `non_lora_trainables.bin`.
        adapter: name of the adapter in the model.
        merge: add the low-rank terms to the weights, and leave no adapter.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointMismatchError: names or shapes differ; all are listed, and the model is as it was.
    """
    import peft

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter_config.json; expected a LoRA folder of LLaVA")
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} holds no adapter weights; expected {' or '.join(ADAPTER_FILES)}")
    config = peft.LoraConfig.from_pretrained(folder)
    given = {_adapter_name(name, adapter): value for name, value in _convert(read_checkpoint(file)).items()}
    # LLaVA names layers by their ends ("q_proj"), which the vision tower has too: name those that were trained.
    trained = sorted({re.sub(r"\.lora_.*", "", name) for name in given})
    modules = dict(model.named_modules())
    if unknown := [name for name in trained if name not in modules]:
        raise CheckpointMismatchError(
            f"{file} does not fit this model:\n  " + "\n  ".join(f"no such layer: {name}" for name in unknown)
        )
    extra = folder / LORA_EXTRA_FILE
    others = _convert(read_checkpoint(extra)) if extra.is_file() else {}
    problems = differences(model.state_dict(), others, needed=())
    if problems:
        raise CheckpointMismatchError(f"{extra} does not fit this model:\n  " + "\n  ".join(problems))
    for name, value in given.items():
        layer = modules[re.sub(r"\.lora_.*", "", name)]
        wanted = (config.r, layer.in_features) if ".lora_A." in name else (layer.out_features, config.r)
        if value.shape != wanted:
            problems.append(f"shape of {name}: the checkpoint has {tuple(value.shape)}, the model needs {wanted}")
    if problems:
        raise CheckpointMismatchError(f"{file} does not fit this model:\n  " + "\n  ".join(problems))
    config.target_modules, config.inference_mode = trained, False
    peft.inject_adapter_in_model(config, model, adapter_name=adapter)
    model.load_state_dict({**given, **others}, strict=False)
    if merge:
        _merge(model, trained)


def _merge(model: nn.Module, names: list[str]) -> None:
    for name in names:
        layer = model.get_submodule(name)
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _adapter_name(name: str, adapter: str) -> str:
    """`x.lora_A.weight` as PEFT names it inside a model: `x.lora_A.default.weight`."""
    return re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{adapter}.weight", name)


def _convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _NAMES.rename({re.sub(_WRAPPERS, "", name): value for name, value in state.items()})


def _projector_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (PROJECTOR_FILE, LORA_EXTRA_FILE):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} holds neither {PROJECTOR_FILE} nor {LORA_EXTRA_FILE}")
