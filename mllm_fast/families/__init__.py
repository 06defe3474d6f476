"""Which classes of which libraries become which drop-in.

A family file is the only place that names a class of another project. It translates: the upstream class to a spec, its
parameter names to roles, its call signature and quirks. Family files import their upstream library, so they are loaded
only once a model that needs them exists.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from ..modules.state import FusedState

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One upstream class that can be fused.

    Attributes:
        upstream: module and name of the class.
        family: file in `mllm_fast.families` that holds the drop-in.
        dropin: name of the drop-in class there, a subclass of the upstream class with a classmethod
            `fused_state(module, options, context) -> FusedState` that raises `CannotFuseError` where it cannot serve.
        ops: the public ops its forward runs.
        min_level: the fuse level from which the class is swapped.
        graphs: whether its runs may be captured as CUDA graphs; "only": that is all the drop-in is for.
        training: the drop-in is for training alone: `fuse(model, training=True)`.

    An entry without ops is a wrapper: its forward prepares and calls `super().forward`, so that a subclass may have a
    forward of its own.
    """

    upstream: str
    family: str
    dropin: str
    ops: tuple[str, ...]
    min_level: int = 0
    graphs: Literal["no", "yes", "only"] = "no"
    training: bool = False

    def load(self) -> type[nn.Module]:
        """The drop-in's class; this imports the upstream library."""
        return getattr(importlib.import_module(f"mllm_fast.families.{self.family}"), self.dropin)


class CannotFuseError(Exception):
    """A module of a known class that is configured in a way no drop-in serves; the message is the report's reason."""


_BLOCK_OPS = ("norm_linear", "attention", "linear_residual")
_RESAMPLER_OPS = ("stacked_linear", "attention", "linear_residual", "norm_linear")
_QFORMER_OPS = ("stacked_linear", "attention", "linear_residual", "norm_linear", "grouped_linear")
_BLIP2 = "transformers.models.blip_2.modeling_blip_2"
_IDEFICS2 = "transformers.models.idefics2.modeling_idefics2"
_INSTRUCTBLIP = "transformers.models.instructblip.modeling_instructblip"
_INSTRUCTBLIP_VIDEO = "transformers.models.instructblipvideo.modeling_instructblipvideo"

_ENTRIES = (
    Entry(
        "open_flamingo.src.helpers.GatedCrossAttentionBlock",
        "open_flamingo",
        "FusedGatedCrossAttentionBlock",
        _BLOCK_OPS,
    ),
    Entry(
        "open_flamingo.src.helpers.PerceiverResampler",
        "open_flamingo",
        "FusedPerceiverResampler",
        _RESAMPLER_OPS,
        graphs="yes",
    ),
    Entry("open_flamingo.src.flamingo.Flamingo", "open_flamingo", "FusedFlamingo", (), 1, graphs="yes"),
    Entry("open_flamingo.src.flamingo_lm.FlamingoLMMixin", "open_flamingo", "FusedFlamingoLMMixin", (), 1),
    Entry(
        "flamingo_pytorch.flamingo_pytorch.GatedCrossAttentionBlock",
        "flamingo_pytorch",
        "FusedGatedCrossAttentionBlock",
        _BLOCK_OPS,
    ),
    Entry(
        "flamingo_pytorch.flamingo_pytorch.PerceiverResampler",
        "flamingo_pytorch",
        "FusedPerceiverResampler",
        _RESAMPLER_OPS,
        graphs="yes",
    ),
    Entry(
        "transformers.models.idefics.modeling_idefics.IdeficsGatedCrossAttentionLayer",
        "idefics",
        "FusedIdeficsGatedCrossAttentionLayer",
        _BLOCK_OPS,
    ),
    Entry(
        "transformers.models.idefics.perceiver.IdeficsPerceiverResampler",
        "idefics",
        "FusedIdeficsPerceiverResampler",
        _RESAMPLER_OPS,
        graphs="yes",
    ),
    Entry(
        "transformers.models.idefics.modeling_idefics.IdeficsDecoupledEmbedding",
        "idefics",
        "FusedIdeficsDecoupledEmbedding",
        ("splice_rows",),
    ),
    Entry(
        "transformers.models.idefics.modeling_idefics.IdeficsModel", "idefics", "FusedIdeficsModel", (), graphs="yes"
    ),
    Entry(
        "transformers.models.idefics.modeling_idefics.IdeficsForVisionText2Text",
        "idefics",
        "FusedIdeficsForVisionText2Text",
        (),
        1,
    ),
    Entry(
        "transformers.models.blip.modeling_blip_text.BlipTextLayer",
        "blip_text",
        "FusedBlipTextLayer",
        ("stacked_linear", "attention", "linear_residual", "norm_linear"),
    ),
    Entry("transformers.models.blip.modeling_blip_text.BlipTextModel", "blip_text", "FusedBlipTextModel", ()),
    Entry(
        "transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel",
        "blip_text",
        "FusedBlipTextLMHeadModel",
        (),
        1,
    ),
    Entry(
        "transformers.models.blip.modeling_blip_text.BlipTextLMPredictionHead",
        "blip_text",
        "FusedBlipTextLMPredictionHead",
        ("norm_linear",),
    ),
    Entry(
        "transformers.models.blip.modeling_blip.BlipForImageTextRetrieval",
        "blip",
        "FusedBlipForImageTextRetrieval",
        (),
        1,
    ),
    Entry(
        "transformers.models.blip.modeling_blip.BlipAttention",
        "blip",
        "FusedBlipAttention",
        ("norm_linear", "attention"),
    ),
    Entry(f"{_BLIP2}.Blip2QFormerLayer", "blip2", "FusedBlip2QFormerLayer", _QFORMER_OPS),
    Entry(f"{_BLIP2}.Blip2QFormerModel", "blip2", "FusedBlip2QFormerModel", (), graphs="yes"),
    Entry(f"{_BLIP2}.Blip2ForConditionalGeneration", "blip2", "FusedBlip2ForConditionalGeneration", ()),
    Entry(f"{_BLIP2}.Blip2ForImageTextRetrieval", "blip2", "FusedBlip2ForImageTextRetrieval", ()),
    *(
        Entry(f"{path}.{name}QFormerLayer", "instructblip", f"Fused{name}QFormerLayer", _QFORMER_OPS)
        for path, name in ((_INSTRUCTBLIP, "InstructBlip"), (_INSTRUCTBLIP_VIDEO, "InstructBlipVideo"))
    ),
    *(
        Entry(f"{path}.{name}{kind}", "instructblip", f"Fused{name}{kind}", (), graphs=graphs)
        for path, name in ((_INSTRUCTBLIP, "InstructBlip"), (_INSTRUCTBLIP_VIDEO, "InstructBlipVideo"))
        for kind, graphs in (("QFormerModel", "yes"), ("ForConditionalGeneration", "no"))
    ),
    Entry(
        "transformers.models.llava.modeling_llava.LlavaMultiModalProjector",
        "llava",
        "FusedLlavaMultiModalProjector",
        ("norm_linear",),
        graphs="yes",
    ),
    Entry("transformers.models.llava.modeling_llava.LlavaModel", "llava", "FusedLlavaModel", (), 1, graphs="yes"),
    Entry(
        "transformers.models.llava.modeling_llava.LlavaForConditionalGeneration",
        "llava",
        "FusedLlavaForConditionalGeneration",
        (),
        1,
    ),
    Entry("transformers.models.clip.modeling_clip.CLIPEncoder", "llava", "FusedCLIPEncoder", (), 1),
    Entry("transformers.models.siglip.modeling_siglip.SiglipEncoder", "llava", "FusedSiglipEncoder", (), 1),
    Entry("mllm_fast.models.minigpt4.MiniGPT4Projection", "minigpt4", "FusedMiniGPT4Projection", ("norm_linear",)),
    *(
        Entry(f"transformers.models.{path}VisionModel", "vision_models", f"Fused{name}VisionModel", (), graphs="only")
        for path, name in (
            ("blip.modeling_blip.Blip", "Blip"),
            ("blip_2.modeling_blip_2.Blip2", "Blip2"),
            ("instructblip.modeling_instructblip.InstructBlip", "InstructBlip"),
            ("instructblipvideo.modeling_instructblipvideo.InstructBlipVideo", "InstructBlipVideo"),
        )
    ),
    *(
        Entry(f"{path}.{name}EncoderLayer", "vision_models", f"Fused{name}EncoderLayer", _BLOCK_OPS)
        for path, name in (
            (_BLIP2, "Blip2"),
            (_INSTRUCTBLIP, "InstructBlip"),
            (_INSTRUCTBLIP_VIDEO, "InstructBlipVideo"),
        )
    ),
    Entry("mllm_fast.models.flamingo.Flamingo", "flamingo", "FusedFlamingo", (), graphs="only"),
    Entry(
        "mllm_fast.models.mplug_owl_vision.MplugOwlVisionEncoderLayer",
        "mplug_owl",
        "FusedMplugOwlVisionEncoderLayer",
        ("norm_linear", "attention", "linear_residual"),
    ),
    Entry(
        "mllm_fast.models.mplug_owl_vision.MplugOwlVisualAbstractorEncoder",
        "mplug_owl",
        "FusedMplugOwlVisualAbstractorEncoder",
        (),
        1,
    ),
    Entry(
        "mllm_fast.models.mplug_owl_vision.MplugOwlVisualAbstractorLayer",
        "mplug_owl",
        "FusedMplugOwlVisualAbstractorLayer",
        ("stacked_linear", "attention", "linear_residual", "norm_linear"),
    ),
    Entry(
        f"{_IDEFICS2}.Idefics2PerceiverResampler",
        "idefics2",
        "FusedIdefics2PerceiverResampler",
        _RESAMPLER_OPS,
        graphs="yes",
    ),
    Entry(f"{_IDEFICS2}.Idefics2Connector", "idefics2", "FusedIdefics2Connector", ("norm_linear",)),
    Entry(
        "transformers.models.mllama.modeling_mllama.MllamaCrossAttentionDecoderLayer",
        "mllama",
        "FusedMllamaCrossAttentionDecoderLayer",
        _BLOCK_OPS,
    ),
    Entry("transformers.models.mllama.modeling_mllama.MllamaModel", "mllama", "FusedMllamaModel", ()),
    Entry("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes", "FusedLinear4bit", ("quantized_linear",)),
    Entry("bitsandbytes.nn.modules.Linear8bitLt", "bitsandbytes", "FusedLinear8bitLt", ("quantized_linear",)),
    Entry("peft.tuners.lora.bnb.Linear4bit", "peft", "FusedLoraLinear4bit", ("quantized_linear",)),
    Entry("peft.tuners.lora.bnb.Linear8bitLt", "peft", "FusedLoraLinear8bitLt", ("quantized_linear",)),
    *(
        Entry(
            f"transformers.models.{path}DecoderLayer",
            "decoder_layers",
            f"Fused{name}DecoderLayer",
            ("rms_norm", "quantized_linear"),
            training=True,
        )
        for path, name in (
            ("llama.modeling_llama.Llama", "Llama"),
            ("mistral.modeling_mistral.Mistral", "Mistral"),
            ("qwen2.modeling_qwen2.Qwen2", "Qwen2"),
            ("idefics.modeling_idefics.Idefics", "Idefics"),
        )
    ),
    Entry(
        "transformers.models.opt.modeling_opt.OPTDecoderLayer",
        "decoder_layers",
        "FusedOPTDecoderLayer",
        ("layer_norm", "quantized_linear"),
        training=True,
    ),
)
REGISTRY = {entry.upstream: entry for entry in _ENTRIES}

FIXES = {
    "index_beyond_images": "a token past the last image sees nothing instead of the mean of all images",
    "future_images": "where tokens see all previous images, those before the first image see nothing",
    "generated_image_tokens": "image tokens fed during generation are counted per row instead of resetting every row",
    "missing_media_locations": "a block without media_locations lets every token see every image",
    "num_return_sequences": "several returned sequences per sample share the sample's images",
    "masked_row_gradients": "eager fp16 gradients of rows that see no image are 0 instead of NaN",
    "rows_without_image": "Mllama's tokens that see no image attend to nothing, and padding tiles are left out",
    "encoder_attention_mask": "BLIP's cross-attention hides the padding that this mask names instead of ignoring it",
}


def find(module: nn.Module) -> Entry | None:
    """The entry that serves this module, or None: by exact class, or by the nearest known base class."""
    return next((REGISTRY[name] for cls in type(module).__mro__ if (name := class_path(cls)) in REGISTRY), None)


def class_path(cls: type) -> str:
    """Module and qualified name, as `Entry.upstream` has it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def dropin_class(module: nn.Module, dropin: type[nn.Module], entry: Entry) -> type[nn.Module]:
    """The class to give to `module`: the drop-in itself, or a mix with the module's own subclass of the upstream class.

    A subclass made at run time (FSDP2's, OpenFlamingo's extended language models) keeps what it adds.

    Raises:
        CannotFuseError: the subclass has a forward of its own, which a drop-in would silently replace.
    """
    own = type(module)
    upstream: Any = next(cls for cls in own.__mro__ if class_path(cls) == entry.upstream)
    if own is upstream:
        return dropin
    # transformers wraps the forward of every subclass of a checkpointing layer; below the wrapper it is the same one.
    if entry.ops and inspect.unwrap(own.forward) is not inspect.unwrap(upstream.forward):
        raise CannotFuseError(f"{own.__qualname__} overrides the forward of {upstream.__qualname__}")
    mixed = type(own.__name__, (dropin, own), {"__module__": dropin.__module__})
    mixed.__qualname__ = f"Fused{own.__qualname__}"
    return mixed


def named_like_upstream(dropin: type[T]) -> type[T]:
    """Class decorator: let `__name__` stay the upstream one.

    Saved configs (`architectures`), device maps (`_no_split_modules`) and FSDP policies go by `__name__`; pickle goes by
    `__qualname__`, which keeps naming the drop-in.
    """
    dropin.__name__ = dropin.__mro__[1].__name__
    return dropin


def state_of(module: nn.Module) -> FusedState | None:
    """The private state of a module that `fuse` has swapped, or None."""
    state: Any = module.__dict__.get("_mllm_fast")
    return state if isinstance(state, FusedState) and state.original_class is not type(module) else None
