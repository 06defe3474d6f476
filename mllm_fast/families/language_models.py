"""Where the systems keep their language model, and which of the modules in it are none of its own."""

from __future__ import annotations

# Classes whose language model is not the module at one of the usual paths.
LANGUAGE_MODELS = {
    "transformers.models.idefics.modeling_idefics.IdeficsForVisionText2Text": "model.layers",
    "transformers.models.idefics.modeling_idefics.IdeficsModel": "layers",
    "flamingo_pytorch.flamingo_palm.FlamingoPaLM": "layers",
}

# Tried in this order: transformers (BLIP-2, InstructBLIP, LLaVA, Mllama), Idefics2, OpenFlamingo, our own models.
USUAL_PATHS = (
    "language_model",
    "model.language_model",
    "model.text_model",
    "lang_encoder",
    "lm",
    "model.lm",
)

# Layers through which a Flamingo-style language model reads images. They are trained, and stay in the compute dtype.
GATED_LAYERS = frozenset(
    {
        "flamingo_pytorch.flamingo_pytorch.GatedCrossAttentionBlock",
        "mllm_fast.modules.gated_cross_attention.GatedCrossAttentionBlock",
        "open_flamingo.src.helpers.GatedCrossAttentionBlock",
        "transformers.models.idefics.modeling_idefics.IdeficsGatedCrossAttentionLayer",
        "transformers.models.mllama.modeling_mllama.MllamaCrossAttentionDecoderLayer",
    }
)

# What can be quantised: exactly these classes, for a subclass may compute something else.
LINEARS = frozenset({"torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"})

QUANTIZED = frozenset({"bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"})
