"""mPLUG-Owl: a vision model, a visual abstractor and a language model, trained in turns (Ye et al. 2023, arXiv 2304.14178).

An image becomes 65 rows of the language model: 64 learned queries that read it, and an end row. They stand where
`input_ids` hold the image token, 65 times for each image (the processor writes them). Names and layout are those of the
original `MplugOwlForConditionalGeneration`, so its checkpoints load (`from_original`) and `save_pretrained` writes them.

What differs from the original: images that stand next to each other are both seen (it sees the first one only), images of
a size that the positions were not made for are refused, and labels need no masks beside them. The video variant is another
model: its checkpoints hold temporal layers, which are listed as unexpected.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

# transformers 5.17 gives the class at its top only where torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .image_rows import ImageRows
from .mplug_owl_config import MplugOwlConfig, MplugOwlVisionConfig, MplugOwlVisualAbstractorConfig
from .mplug_owl_processing import MplugOwlImageProcessor, MplugOwlProcessor
from .mplug_owl_vision import MplugOwlPreTrainedModel, MplugOwlVisionModel, MplugOwlVisualAbstractorModel
from .original_checkpoint import CheckpointMismatchError, KeyMap, differences, load_strictly, read_checkpoint

__all__ = [
    "MplugOwlConfig",
    "MplugOwlForConditionalGeneration",
    "MplugOwlProcessor",
    "MplugOwlVisionConfig",
    "MplugOwlVisionModel",
    "MplugOwlVisualAbstractorConfig",
    "MplugOwlVisualAbstractorModel",
    "load_original",
    "lora_targets",
]

# Buffers that older versions of transformers saved with a Llama.
_BUFFERS = KeyMap.of(dropped=r"rotary_emb\.inv_freq$|position_ids$")
# What PEFT and data-parallel training put into names, by version and by what was saved: the whole or its inside.
_WRAPPERS = re.compile(r"^module\.|\bbase_model\.model\.|\.base_layer(?=\.)")
_WIDTH = "abstractor.encoder.layers.0.crossattention.output.mlp.w1.weight"


def lora_targets(*names: str) -> str:
    """PEFT's `target_modules` for layers of these names in the language model, and nowhere else.

    Names alone would also match in the vision model of, say, an mPLUG-Owl over GPT-NeoX (`query_key_value`, `dense`). The
    original fine-tunes `q_proj` and `v_proj`, the default here: 2,097,152 parameters at r=4 over LLaMA-7B.
    """
    return rf".*language_model.*\.({'|'.join(map(re.escape, names or ('q_proj', 'v_proj')))})"


class MplugOwlForConditionalGeneration(ImageRows, MplugOwlPreTrainedModel, GenerationMixin):
    """The whole model.

    Args:
        config: `text_config` may be that of any decoder-only language model of transformers.

    Shapes: as in `ImageRows`; images are [N, 3, image_size, image_size], and R = 65.
    """

    def __init__(self, config: MplugOwlConfig) -> None:
        super().__init__(config)
        self.vision_model = MplugOwlVisionModel._from_config(config.vision_config)
        width = config.visual_abstractor_config.hidden_size
        self.query_tokens = nn.Parameter(torch.randn(1, config.num_query_tokens, width))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.abstractor = MplugOwlVisualAbstractorModel._from_config(
            config.visual_abstractor_config,
            language_hidden_size=self.language_model.get_input_embeddings().embedding_dim,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MplugOwlForConditionalGeneration):
            # The original has zeros here: queries that are all the same, and stay so in training.
            init.trunc_normal_(module.query_tokens, std=self.config.initializer_range)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Images [N, C, H, W], through the vision model and the abstractor.

        Returns:
            the vision model's output, and as its `pooler_output` the rows of the language model [N, R, D].
        """
        vision = self.vision_model(pixel_values, return_dict=True, **kwargs)
        image = vision.last_hidden_state
        queries = self.query_tokens.to(image.device, image.dtype).expand(image.shape[0], -1, -1)
        vision.pooler_output = self.abstractor(queries, image, return_dict=True).last_hidden_state
        return vision

    @classmethod
    def from_original(cls, path: str | Path, **kwargs: Any) -> MplugOwlForConditionalGeneration:
        """The model in a folder of the original layout: `config.json`, and `pytorch_model.bin` or safetensors, or shards.

        `from_pretrained` reads these folders too, where their configuration is right, and makes up what is missing. Here
        everything has to fit, which is known before any weight is read, and the width of the abstractor's feed-forward
        networks is that of the weights.

        Args:
            path: the folder.
            **kwargs: of `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...).

        Raises:
            FileNotFoundError: no weights are there.
            CheckpointMismatchError: tensors are missing, unexpected or of another shape; all are listed.
        """
        given = _BUFFERS.rename(read_checkpoint(path, meta=True))
        config = cls.config_class.from_pretrained(path)
        if _WIDTH in given:
            config.visual_abstractor_config.intermediate_size = given[_WIDTH].shape[0]
        with torch.device("meta"):
            empty = cls(config)
        problems = differences(empty.state_dict(), given, needed=set(empty.state_dict()) - _tied(empty))
        if problems:
            raise CheckpointMismatchError(f"{path} does not fit its configuration:\n  " + "\n  ".join(problems))
        return cls.from_pretrained(path, config=config, **kwargs)


def load_original(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint of the original's fine-tuning into a model that exists, strictly: all of it, or nothing changes.

    Args:
        model: a `MplugOwlForConditionalGeneration`, also inside PEFT's wrapper or with LoRA layers in it.
        path: a file or folder (`read_checkpoint`). With LoRA in the model, the file holds the adapters too, as PEFT names
            them, with the weights under them by their old or new names.

    Raises:
        CheckpointMismatchError: tensors are missing, unexpected or of another shape; all are listed.
    """
    own = {_WRAPPERS.sub("", name): name for name in model.state_dict()}
    given = {_WRAPPERS.sub("", name): tensor for name, tensor in _BUFFERS.rename(read_checkpoint(path)).items()}
    tied = _tied(model)
    load_strictly(
        model,
        {own.get(name, name): tensor for name, tensor in given.items()},
        str(path),
        needed=lambda n: n not in tied,
    )


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that are another one's under a second name, and that a checkpoint may leave out."""
    names: dict[int, str] = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            tied.add(name)
    return tied


AutoConfig.register(MplugOwlConfig.model_type, MplugOwlConfig, exist_ok=True)
AutoConfig.register(MplugOwlVisionConfig.model_type, MplugOwlVisionConfig, exist_ok=True)
AutoModel.register(MplugOwlVisionConfig, MplugOwlVisionModel, exist_ok=True)
AutoModel.register(MplugOwlConfig, MplugOwlForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(MplugOwlConfig, MplugOwlForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(MplugOwlConfig, slow_image_processor_class=MplugOwlImageProcessor, exist_ok=True)
AutoProcessor.register(MplugOwlConfig, MplugOwlProcessor, exist_ok=True)
