"""Load a model with its language model quantised on the way in, and fused."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from ..fusion import NothingToFuseError, fuse
from .config import Recipe, import_bitsandbytes
from .quantize import adopt
from .report import quantization_report
from .selection import NothingToQuantizeError, Selection, names_to_skip, quantized_layers, select

logger = logging.getLogger(__name__)

_fuse = fuse  # `load` has an argument of that name


class ModelNotFoundError(FileNotFoundError):
    """No model under this name: not a folder, not in the local cache, and not to be had from the hub."""


class UnreadableModelError(ValueError):
    """The files of a model are damaged, or hold what is not loaded; the message names the folder and the reason."""


def load(
    name_or_path: str | Path,
    llm: Literal["nf4", "fp4", "int8"] | None = None,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device | None = None,
    device_map: Any = None,
    fuse: bool = True,
    level: int = 1,
    fixes: str | Iterable[str] = (),
    prepack: bool = False,
    cuda_graphs: bool = False,
    double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    outliers: Literal["llm_int8"] | None = None,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    gated_layers: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A model of transformers (BLIP-2, LLaVA, Idefics, a language model, ...) or of `mllm_fast.models`, quantised and fused.

    The weights are read, quantised and dropped one by one, so that at most the quantised model and one file of the
    checkpoint are in memory. What is quantised is what `quantize_llm` quantises; `quantization_report(model)` shows
    it. `model.save_pretrained(folder)` writes the quantised bytes, and `load(folder)` reads the very same back.

    Args:
        name_or_path: a folder, or a name on the Hugging Face hub.
        llm: how to quantise the language model; None keeps it as it is in the checkpoint, quantised or not.
        dtype: of everything that is not quantised; None: as in the checkpoint.
        device: where to; default: the first GPU, or the CPU where there is none.
        device_map: transformers' own way to spread a model, in place of `device`.
        fuse: put the drop-ins in (`mllm_fast.fuse` with `level`, `fixes`, `prepack` and `cuda_graphs`). Quantised layers
            run mllm_fast's computation in any case.
        double_quant, compute_dtype, outliers, skip, include, gated_layers: as for `quantize_llm`.
        **kwargs: of transformers' `from_pretrained` (`revision`, `cache_dir`, `local_files_only`, `attn_implementation`).
            Code that lies beside a model is run only with `trust_remote_code=True`.

    Returns:
        the model, in eval mode.

    Raises:
        ModelNotFoundError: there is no such folder, and the name is neither in the cache nor on a hub that answers.
        UnreadableModelError: its files are damaged, lack weights, or hold pickled code.
        UnmatchedNameError, NothingToQuantizeError, NothingToFuseError: as `quantize_llm` and `fuse`.
        ValueError: arguments that do not go together, or a checkpoint that is quantised in another way already.
    """
    if device is not None and device_map is not None:
        raise ValueError("both device and device_map were given; pass one of them")
    recipe = None if llm is None else Recipe(llm, double_quant, 64, compute_dtype, outliers)
    if recipe is None and (double_quant or outliers or list(skip) or list(include) or gated_layers):
        raise ValueError("llm is None, so nothing is quantised; say how: llm='nf4', 'fp4' or 'int8'")
    if device_map is None:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        device_map = {"": device}
    if cuda_graphs:
        check_cuda_graphs(device, fuse=fuse)
    config = _config(name_or_path, kwargs)
    model_class = _model_class(config, name_or_path)
    stored = getattr(config, "quantization_config", None)
    selection = None
    if recipe is not None and stored is not None:
        _check_stored(stored, recipe, name_or_path)
    elif recipe is not None:
        selection, skipped = _plan(model_class, config, skip=skip, include=include, gated_layers=gated_layers)
        kwargs["quantization_config"] = recipe.config(skipped)
    if recipe is not None or stored is not None:
        _need_accelerate()
        import_bitsandbytes()
    model: nn.Module = _from_pretrained(
        model_class, name_or_path, dtype="auto" if dtype is None else dtype, device_map=device_map, **kwargs
    )
    if stored is not None and dtype is not None:
        _cast(model, dtype)
    adopt(model, outliers=outliers)
    if compute_dtype is not None:
        for layer in quantized_layers(model).values():
            layer.compute_dtype, layer.compute_type_is_set = compute_dtype, True
    if fuse:
        try:
            _fuse(model, level=level, fixes=fixes, prepack=prepack, cuda_graphs=cuda_graphs)
        except NothingToFuseError:
            if not quantized_layers(model):
                raise
    if selection is not None:
        logger.info("%s\n%s", name_or_path, quantization_report(model, selection))
    return model.eval()


def check_cuda_graphs(device: str | torch.device | None, *, fuse: bool) -> None:
    """Raise ValueError where CUDA graphs can have no effect: on such a device, or without the drop-ins.

    Args:
        device: that the model is to run on; None: not known yet.
        fuse: whether the drop-ins are put in.
    """
    if not fuse:
        raise ValueError("CUDA graphs replay the drop-ins, which fuse=False leaves out; ask for one of the two")
    if device is not None and torch.device(device).type != "cuda":
        raise ValueError(
            f"CUDA graphs need a GPU, but the model is to run on {device}; choose device 'cuda' on a machine that has one, "
            "or leave CUDA graphs off"
        )


def _plan(model_class: Any, config: Any, **choice: Any) -> tuple[Selection, list[str]]:
    """What to quantise of a model that has no weights yet, and the names that transformers has to leave out."""
    with torch.device("meta"):
        skeleton = model_class(copy.deepcopy(config))
    selection = select(skeleton, **choice)
    if not selection.targets:
        raise NothingToQuantizeError(f"{model_class.__name__} has no layer left to quantise")
    return selection, names_to_skip(skeleton, [path for target in selection.targets for path in target.paths])


def _config(name: str | Path, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    # They register themselves with transformers.
    from ..models import FlamingoModelConfig, MiniGPT4Config, MplugOwlConfig  # noqa: F401

    hub = ("revision", "cache_dir", "local_files_only", "token", "subfolder", "trust_remote_code", "force_download")
    # Where nothing is said, transformers asks on the terminal whether to run the code that lies beside a model.
    kwargs.setdefault("trust_remote_code", False)
    options = {key: kwargs[key] for key in hub if key in kwargs}
    if Path(name).is_dir() and not Path(name, options.get("subfolder", ""), "config.json").exists():
        raise _not_found(name, FileNotFoundError())
    try:
        return AutoConfig.from_pretrained(name, **options)
    except OSError as error:
        if Path(name).is_dir():  # config.json is there
            raise _unreadable(name, error) from error
        raise _not_found(name, error) from error
    except (TypeError, AttributeError, KeyError, UnicodeDecodeError) as error:
        raise _unreadable(name, error) from error


def _from_pretrained(model_class: Any, name: str | Path, **kwargs: Any) -> Any:
    try:
        model, found = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    except OSError as error:
        raise _not_found(name, error) from error
    except (SafetensorError, EOFError, json.JSONDecodeError) as error:
        raise _unreadable(name, error) from error
    except NotImplementedError as error:
        if "not implemented for" not in str(error):
            raise
        # transformers draws what is missing, and nothing draws bytes.
        raise _unreadable(name, "quantised weights are missing; was it saved with LoRA in it?") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _unreadable(name, "its tensors do not have the shapes that its config.json gives") from error
    except pickle.UnpicklingError as error:
        reason = "it holds pickled objects other than tensors, which can run code; convert it to safetensors where you trust it"
        raise _unreadable(name, reason) from error
    # transformers makes them up, and says so in a log that few read.
    if missing := sorted(set(found["missing_keys"]) & {key for key, _ in model.named_parameters()}):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UnreadableModelError(
            f"the weights in {name} are not those of a whole {model_class.__name__}: {', '.join(missing[:3])}{more} would be "
            "random numbers. Is a file missing? A model that is meant to begin so goes to fuse and quantize_llm instead"
        )
    return model


def _cast(model: Any, dtype: torch.dtype) -> None:
    """What is not quantised to `dtype`: out of a quantised checkpoint transformers reads every tensor as it was saved."""
    kept = model._get_dtype_plan(dtype)  # parts that transformers reads in fp32 whatever the dtype
    codes = {id(layer.weight) for layer in quantized_layers(model).values()}
    for name, p in model.named_parameters():
        if p.is_floating_point() and id(p) not in codes and not any(part in name for part in kept):
            p.data = p.data.to(dtype)


def _unreadable(name: str | Path, reason: object) -> UnreadableModelError:
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return UnreadableModelError(f"the model {name} cannot be read; is it damaged? ({lines[0]})")


def _not_found(name: str | Path, error: OSError) -> ModelNotFoundError:
    if Path(name).is_dir():
        files = ", ".join(sorted(path.name for path in Path(name).iterdir())[:6]) or "nothing"
        return ModelNotFoundError(
            f"{name} holds no model: expected config.json and *.safetensors, as save_pretrained writes; it has {files}"
        )
    if Path(name).exists():
        return ModelNotFoundError(f"{name} is a file; expected the folder that holds config.json and *.safetensors")
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelNotFoundError(
        f"{name} is no folder, and neither the local cache nor the hub gave it ({why}); where there is a network, run "
        f"'hf download {name}', and pass the folder it names"
    )


def _model_class(config: Any, name: str | Path) -> Any:
    import transformers

    names = getattr(config, "architectures", None) or []
    found = next((cls for each in names if (cls := _own_class(each) or getattr(transformers, each, None))), None)
    if found is None:
        listed = ", ".join(names) or "no architecture"
        raise ValueError(
            f"the config.json of {name} names {listed}, which transformers {transformers.__version__} does not have; load "
            "the model with its own code, and pass it to quantize_llm"
        )
    return found


def _own_class(name: str) -> Any:
    """A model of ours that is saved as transformers' are."""
    from .. import models

    found = getattr(models, name, None)
    return found if hasattr(found, "from_pretrained") else None


def _check_stored(stored: Any, recipe: Recipe, name: str | Path) -> None:
    values = stored if isinstance(stored, dict) else stored.to_dict()
    kind = "int8" if values.get("load_in_8bit") else values.get("bnb_4bit_quant_type")
    method = str(values.get("quant_method", "")).rpartition(".")[2].lower()
    if "bitsandbytes" not in method and "bits_and_bytes" not in method:
        raise ValueError(
            f"{name} is quantised with {method or 'an unknown method'}; expected a bitsandbytes checkpoint"
        )
    if kind != recipe.kind:
        raise ValueError(
            f"{name} is quantised to {kind} already; load it with llm=None or llm={kind!r}, not {recipe.kind!r}"
        )


def _need_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            "transformers loads quantised models with accelerate, which is not installed: pip install accelerate"
        )
