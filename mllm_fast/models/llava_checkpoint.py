"""LLaVA's own checkpoints (haotian-liu/LLaVA) in transformers' `LlavaForConditionalGeneration`.

Three layouts: a whole model (`model.layers.*`, `model.mm_projector.*`, `lm_head.weight`, with or without the vision tower),
a projector alone (`mm_projector.bin`, what stage 1 saves), and a LoRA folder (`adapter_config.json`, the adapter's weights,
and `non_lora_trainables.bin` with the projector).

The projector of LLaVA 1 ("linear") has one layer, transformers' has two. Without an activation between them, which is
`LlavaConfig(projector_hidden_act="linear")`, and with the identity as the second one, it is the same, bit for bit.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .bridge_file import write_atomically
from .original_checkpoint import CheckpointMismatchError, KeyMap, differences, load_strictly, read_checkpoint

PROJECTOR_FILE = "mm_projector.bin"
LORA_EXTRA_FILE = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# What PEFT and data-parallel training put before names.
_INSIDE = "base_model.model."
_WRAPPERS = r"^(?:module\.)?(?:base_model\.model\.)?(?=model\.|lm_head\.)"
_NAMES = KeyMap.of(
    (r"^model\.mm_projector\.0\.", r"model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", r"model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.", r"model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    # Buffers that older versions of transformers saved.
    dropped=r"rotary_emb\.inv_freq$|position_ids$",
)
_THEIRS = KeyMap.of(
    (r"^model\.multi_modal_projector\.linear_1\.", r"model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", r"model.mm_projector.2."),
    (r"^model\.vision_tower\.", r"model.vision_tower.vision_tower."),
    (r"^model\.language_model\.", r"model."),
)
_PROJECTOR = "model.multi_modal_projector."
_LINEAR = "model.mm_projector."  # LLaVA 1's, which has no numbers
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
    given = _convert(read_checkpoint(path), model)
    tower = any(name.startswith(_TOWER) for name in given)
    load_strictly(model, given, str(path), needed=lambda name: tower or not name.startswith(_TOWER))


def load_projector(model: nn.Module, path: str | Path) -> None:
    """Load the projector alone, from `mm_projector.bin`, `non_lora_trainables.bin`, or a folder that holds one of them.

    Args:
        model: a `LlavaForConditionalGeneration`.
        path: the file or the folder.

    Raises:
        FileNotFoundError: neither file is there.
        CheckpointMismatchError: names or shapes differ; all are listed. Or the file is of a LLaVA 1 and the model is not, or
            the other way round.
    """
    file = _projector_file(Path(path))
    given = {n: value for n, value in _convert(read_checkpoint(file), model).items() if n.startswith("model.m")}
    if not any(name.startswith(_PROJECTOR) for name in given):
        raise CheckpointMismatchError(f"{file} holds no projector; expected names that begin with model.mm_projector.")
    load_strictly(model, given, str(file), needed=lambda name: name.startswith(_PROJECTOR))


def save_projector(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the projector as `mm_projector.bin`, which LLaVA's own `builder.py` reads.

    Args:
        model: a `LlavaForConditionalGeneration`. The two layers of a LLaVA 1 are written as their product, the one that the
            original has.
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
    projector = _projector_state(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(projector, file))
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
    given = {_adapter_name(name, adapter): value for name, value in _convert(read_checkpoint(file), model).items()}
    # LLaVA names layers by their ends ("q_proj"), which the vision tower has too: name those that were trained.
    trained = sorted({re.sub(r"\.lora_.*", "", name) for name in given})
    modules = dict(model.named_modules())
    if unknown := [name for name in trained if name not in modules]:
        raise CheckpointMismatchError(
            f"{file} does not fit this model:\n  " + "\n  ".join(f"no such layer: {name}" for name in unknown)
        )
    extra = folder / LORA_EXTRA_FILE
    others = _convert(read_checkpoint(extra), model) if extra.is_file() else {}
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


def save_lora(model: nn.Module, folder: str | Path, *, adapter: str = "default", overwrite: bool = False) -> Path:
    """Write LoRA and projector as LLaVA's own fine-tuning leaves them, for `load_lora` and for its `builder.py`.

    Args:
        model: a `LlavaForConditionalGeneration` with LoRA layers in it (`load_lora`, `prepare_finetuning`), or inside PEFT's
            wrapper.
        folder: gets `adapter_config.json`, `adapter_model.safetensors` and `non_lora_trainables.bin`.
        adapter: which of its adapters.
        overwrite: replace files that are there.

    Raises:
        FileExistsError: one of the files is there, and `overwrite` is False.
        ValueError: the model has no adapter of that name.
    """
    import peft

    configs = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise ValueError(f"the model has no adapter {adapter!r}; it has {', '.join(configs) or 'none'}")
    folder = Path(folder)
    files = [folder / name for name in ("adapter_config.json", ADAPTER_FILES[0], LORA_EXTRA_FILE)]
    if (there := [file.name for file in files if file.exists()]) and not overwrite:
        raise FileExistsError(f"{folder} holds {', '.join(there)}; choose another folder, or pass overwrite=True")
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    lora = _THEIRS.rename({re.sub(_WRAPPERS, "", name): value.detach() for name, value in state.items()})
    config = copy.deepcopy(configs[adapter])
    # By their whole names, because the ends of names are also those of layers in the vision tower.
    config.target_modules = sorted({re.sub(r"\.lora_.*", "", name) for name in lora})
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_INSIDE + name: value.cpu().contiguous().clone() for name, value in lora.items()}
    extra = {_INSIDE + name: value for name, value in _projector_state(model).items()}
    write_atomically(files[1], lambda file: save_file(tensors, file))
    write_atomically(files[2], lambda file: torch.save(extra, file))
    config.save_pretrained(str(folder))
    return folder


def _projector_state(model: nn.Module) -> dict[str, Tensor]:
    """The projector's tensors on the CPU, by the original's names.

    Raises:
        ValueError: the model has none.
    """
    state = {re.sub(_WRAPPERS, "", name): value.detach() for name, value in model.state_dict().items()}
    names = [_PROJECTOR + name for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")]
    if not {names[0], names[2]} <= state.keys():
        raise ValueError(f"{type(model).__name__} has no multi_modal_projector with linear_1 and linear_2")
    theirs = _THEIRS.rename({name: state[name] for name in names if name in state})
    if _is_linear(model):
        theirs = _product({name.removeprefix(_LINEAR): value for name, value in theirs.items()})
    return {name: value.cpu().contiguous().clone() for name, value in theirs.items()}


def _merge(model: nn.Module, names: list[str]) -> None:
    for name in names:
        layer = model.get_submodule(name)
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _adapter_name(name: str, adapter: str) -> str:
    """`x.lora_A.weight` as PEFT names it inside a model: `x.lora_A.default.weight`."""
    return re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{adapter}.weight", name)


def _convert(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under our names, those of a LLaVA 1's projector as two layers.

    Raises:
        CheckpointMismatchError: one of model and file is a LLaVA 1, and the other is not.
    """
    given = _NAMES.rename({re.sub(_WRAPPERS, "", name): value for name, value in state.items()})
    linear = {name: given.pop(name) for name in list(given) if name in (f"{_LINEAR}weight", f"{_LINEAR}bias")}
    holds = "linear" if linear else "mlp2x_gelu" if any(name.startswith(_PROJECTOR) for name in given) else None
    if holds is not None and (holds == "linear") != _is_linear(model):
        raise CheckpointMismatchError(
            f"the checkpoint has a projector of kind {holds!r}, and the model another; build it with projector_hidden_act="
            f"{'linear' if linear else 'gelu'!r} in its LlavaConfig"
        )
    for name, value in linear.items():
        leaf = name.removeprefix(_LINEAR)
        second = torch.eye(value.shape[0]) if leaf == "weight" else torch.zeros(value.shape[0])
        given |= {f"{_PROJECTOR}linear_1.{leaf}": value, f"{_PROJECTOR}linear_2.{leaf}": second.to(value.dtype)}
    return given


def _is_linear(model: Any) -> bool:
    """Whether the model is a LLaVA 1: nothing stands between the two layers of its projector."""
    return getattr(model.config, "projector_hidden_act", None) == "linear"


def _product(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two layers without an activation, named `0.*` and `2.*`, as one, by the names of LLaVA 1."""
    first, second = layers["0.weight"], layers["2.weight"]
    merged = {"weight": (second.double() @ first.double()).to(first.dtype)}
    if "0.bias" in layers:
        bias = second.double() @ layers["0.bias"].double() + layers["2.bias"].double()
        merged["bias"] = bias.to(first.dtype)
    return {_LINEAR + name: value for name, value in merged.items()}


def _projector_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (PROJECTOR_FILE, LORA_EXTRA_FILE):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} holds neither {PROJECTOR_FILE} nor {LORA_EXTRA_FILE}")
