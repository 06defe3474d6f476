"""What the original training of each system trains, and where it lies in the model: the only place that names these.

A path leads from the model to a module or parameter, name by name, with a dot between. In the place of a name, `*` means
every child, `*[name]` every child that has such a child itself, and `name()` the module that the method of this name
gives. With `?` at the end, the path may lead nowhere: a configuration can leave the module out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from . import class_path


class MissingPartError(ValueError):
    """A path of a recipe leads nowhere in the model."""


@dataclass(frozen=True)
class Recipe:
    """What can be trained of a system, and what goes with it.

    Attributes:
        parts: what the original trains, by the name that `prepare_finetuning(train=...)` takes; paths of modules and
            parameters. Parts may overlap.
        vision: path of the vision model; while it is frozen it stays in evaluation mode. None: there is none.
        language_model: path of the language model, or of its layers, where LoRA goes. None: there is none.
        fp32: paths of modules that are trained in fp32 whatever the other parts are trained in.
        evaluation: paths of modules that stay in evaluation mode while they are frozen, as in the original's training.
        blocks: paths of blocks that are checkpointed by themselves, beside those that transformers can checkpoint.
    """

    parts: Mapping[str, tuple[str, ...]]
    vision: str | None
    language_model: str | None
    fp32: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of a model of a supported system, by its class or the nearest known base class.

    Args:
        model: the whole model; PEFT's wrapper around it is looked through.

    Raises:
        ValueError: a model of another class; the message lists what is known.
    """
    base = unwrapped(model)
    for cls in type(base).__mro__:
        if (path := class_path(cls)) in RECIPES:
            one_layer = path == _LLAVA and getattr(base.config, "projector_hidden_act", None) == "linear"
            return _LLAVA_1 if one_layer else RECIPES[path]
    known = "".join(f"\n  {name}" for name in sorted(RECIPES))
    raise ValueError(
        f"{class_path(type(base))} has no recipe for fine-tuning; pass the whole model, of one of these classes:{known}"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, or the model itself."""
    base: Any = model
    return base.get_base_model() if hasattr(base, "get_base_model") else model


def resolve(model: nn.Module, path: str) -> list[nn.Module | nn.Parameter]:
    """What a path leads to; several where it has a `*`, and none where it ends in `?` and leads nowhere.

    Raises:
        MissingPartError: it leads nowhere.
    """
    found: list[Any] = [model]
    walked = path.removesuffix("?")
    for name in walked.split("."):
        found = [child for parent in found for child in _children(parent, name)]
        if not found:
            break
    if not found and not path.endswith("?"):
        names = [name for name, _ in model.named_modules()]
        close = difflib.get_close_matches(walked, names, n=1, cutoff=0.4)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise MissingPartError(
            f"{type(model).__name__} has nothing at {walked}, which its recipe trains or keeps frozen{hint}. Was the part "
            "removed or replaced after the model was built?"
        )
    return found


def _children(parent: Any, name: str) -> list[Any]:
    if not isinstance(parent, nn.Module):
        return []
    if name.startswith("*"):
        needed = name[2:-1]
        children = (child for child in parent._modules.values() if child is not None)
        return [child for child in children if not needed or getattr(child, needed, None) is not None]
    child: Any = getattr(parent, name.removesuffix("()"), None)
    if name.endswith("()") and child is not None:
        child = child()
    return [child] if isinstance(child, nn.Module | nn.Parameter) else []


_HF = "transformers.models"
_OWN = "mllm_fast.models"
_LLAVA = f"{_HF}.llava.modeling_llava.LlavaForConditionalGeneration"

# Its factory leaves the language model's embeddings to training, where the tokenizer's two new tokens have their rows.
_OPEN_FLAMINGO = Recipe(
    parts={
        "bridge": ("perceiver", "lang_encoder.gated_cross_attn_layers"),
        "embeddings": ("lang_encoder.get_input_embeddings()",),
    },
    vision="vision_encoder",
    language_model="lang_encoder",
    blocks=("lang_encoder.gated_cross_attn_layers.*", "lang_encoder.old_decoder_blocks.*"),
)


def _own_flamingo(prefix: str = "") -> Recipe:
    return Recipe(
        parts={
            "bridge": (f"{prefix}resampler", f"{prefix}blocks"),
            "embeddings": (f"{prefix}lm.get_input_embeddings()",),
            # Frozen in the paper; a small one can be trained from nothing together with the bridge.
            "vision": (f"{prefix}vision_encoder",),
        },
        vision=f"{prefix}vision_encoder",
        language_model=f"{prefix}lm",
        blocks=(f"{prefix}blocks.*",),
    )


# arXiv 2301.12597 and 2305.06500: Q-Former, queries and projection; the norm after the frozen vision model belongs to them,
# and the original computes it in fp32.
_LN_VISION = "vision_model.post_layernorm"


def _qformer(vision: bool = True) -> Recipe:
    parts = {
        "bridge": ("qformer", "query_tokens", "language_projection", _LN_VISION),
        "projection": ("language_projection",),
    }
    if vision:  # captioning on COCO trains it as well
        parts["vision"] = ("vision_model",)
    return Recipe(parts, vision="vision_model", language_model="language_model", fp32=(_LN_VISION,))


def _retrieval(prefix: str = "", *more: str) -> Recipe:
    inside = ("qformer", "query_tokens", "embeddings?", "vision_projection", "text_projection", "itm_head", _LN_VISION)
    vision = f"{prefix}vision_model"
    return Recipe(
        parts={"bridge": (*(prefix + path for path in inside), *more), "vision": (vision,)},
        vision=vision,
        language_model=None,
        fp32=(prefix + _LN_VISION,),
    )


RECIPES: Mapping[str, Recipe] = {
    "open_flamingo.src.flamingo.Flamingo": _OPEN_FLAMINGO,
    # With images, its forward itself freezes whatever is not the bridge.
    "flamingo_pytorch.flamingo_palm.FlamingoPaLM": Recipe(
        parts={"bridge": ("perceiver_resampler", "layers.*.1")},
        vision="img_encoder?",
        language_model=None,
        blocks=("layers.*.*",),
    ),
    f"{_OWN}.flamingo.Flamingo": _own_flamingo(),
    f"{_OWN}.flamingo_model.FlamingoForConditionalGeneration": _own_flamingo("model."),
    f"{_HF}.idefics.modeling_idefics.IdeficsForVisionText2Text": Recipe(
        parts={
            "bridge": ("model.gated_cross_attn_layers", "model.perceiver_resampler?"),
            "embeddings": ("model.embed_tokens.additional_embedding?", "lm_head.additional_fc?"),
            # Its last norm is for an output that nothing reads.
            "vision": tuple(f"model.vision_model.{name}" for name in ("embeddings", "pre_layrnorm", "encoder")),
        },
        vision="model.vision_model",
        language_model="model.layers",
    ),
    f"{_HF}.idefics2.modeling_idefics2.Idefics2ForConditionalGeneration": Recipe(
        parts={"bridge": ("model.connector",), "vision": ("model.vision_model",)},
        vision="model.vision_model",
        language_model="model.text_model",
    ),
    f"{_HF}.mllama.modeling_mllama.MllamaForConditionalGeneration": Recipe(
        parts={
            "bridge": ("model.multi_modal_projector", "model.language_model.layers.*[cross_attn]"),
            "projection": ("model.multi_modal_projector",),
            "vision": ("model.vision_model",),
        },
        vision="model.vision_model",
        language_model="model.language_model",
    ),
    # arXiv 2201.12086: fine-tuning trains everything.
    f"{_HF}.blip.modeling_blip.BlipForConditionalGeneration": Recipe(
        parts={"vision": ("vision_model",), "decoder": ("text_decoder",)},
        vision="vision_model",
        language_model="text_decoder",
    ),
    f"{_HF}.blip.modeling_blip.BlipForQuestionAnswering": Recipe(
        parts={"vision": ("vision_model",), "encoder": ("text_encoder",), "decoder": ("text_decoder",)},
        vision="vision_model",
        language_model="text_decoder",
    ),
    f"{_HF}.blip.modeling_blip.BlipForImageTextRetrieval": Recipe(
        parts={
            "vision": ("vision_model",),
            "encoder": ("text_encoder",),
            "heads": ("vision_proj", "text_proj", "itm_head"),
        },
        vision="vision_model",
        language_model="text_encoder",
    ),
    f"{_OWN}.blip_pretraining.BlipPretraining": Recipe(
        parts={
            "vision": ("vision_model",),
            "encoder": ("text_encoder",),
            "decoder": ("text_decoder",),
            "heads": ("vision_projection", "text_projection", "itm_head", "temperature"),
        },
        vision="vision_model",
        language_model=None,
        # Copies that follow the trained encoders with a momentum.
        evaluation=("vision_model_m", "text_encoder_m"),
    ),
    f"{_HF}.blip_2.modeling_blip_2.Blip2ForConditionalGeneration": _qformer(),
    f"{_HF}.blip_2.modeling_blip_2.Blip2ForImageTextRetrieval": _retrieval(),
    f"{_OWN}.blip2_stage1.Blip2Stage1": _retrieval("retrieval.", "lm_head", "temperature"),
    f"{_HF}.instructblip.modeling_instructblip.InstructBlipForConditionalGeneration": _qformer(),
    f"{_HF}.instructblipvideo.modeling_instructblipvideo.InstructBlipVideoForConditionalGeneration": _qformer(),
    # arXiv 2304.10592: the projection alone; the original keeps vision model and Q-Former in evaluation mode.
    f"{_OWN}.minigpt4.MiniGPT4ForConditionalGeneration": Recipe(
        parts={"projection": ("language_projection",)},
        vision="vision_model",
        language_model="language_model",
        evaluation=("qformer?",),
    ),
    # arXiv 2304.08485: the projection, then the language model with it.
    _LLAVA: Recipe(
        parts={
            "projection": ("model.multi_modal_projector",),
            "language_model": ("model.language_model", "lm_head"),
        },
        vision="model.vision_tower",
        language_model="model.language_model",
    ),
    # arXiv 2304.14178: vision model and abstractor, then LoRA and the abstractor.
    f"{_OWN}.mplug_owl.MplugOwlForConditionalGeneration": Recipe(
        parts={"bridge": ("query_tokens", "abstractor"), "vision": ("vision_model",)},
        vision="vision_model",
        language_model="language_model",
    ),
}

# The projector of LLaVA 1 has one layer. transformers' second one is the identity there, and stays it (`llava_checkpoint`).
_LLAVA_1 = replace(
    RECIPES[_LLAVA],
    parts={**RECIPES[_LLAVA].parts, "projection": ("model.multi_modal_projector.linear_1",)},
)
