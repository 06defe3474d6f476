"""What stands before InstructBLIP-Video: an instruction and the frames of a video, to tensors.

transformers' own processor needs torchvision and counts four frames whatever it is given. This one needs Pillow only, reads
the same files, and takes any number of frames; the released models were evaluated with four.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.utils import cached_file

# Files that may say how frames are prepared, the newest layout first, and under which key.
_FILES = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
)
_SETTINGS = (
    "do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
    "do_convert_rgb",
)  # fmt: skip


class FramesProcessor:
    """Frames, instruction and the Q-Former's copy of the instruction to what InstructBLIP-Video takes.

    Args:
        image_processor: of a frame.
        tokenizer, qformer_tokenizer: of the language model and of the Q-Former.
        queries: rows of the language model that a frame becomes (`num_query_tokens`).
        video_token_id: what `input_ids` hold in their places (`video_token_index`).
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, qformer_tokenizer: Any, queries: int, video_token_id: int
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.qformer_tokenizer = qformer_tokenizer
        self.queries = queries
        self.video_token_id = video_token_id

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, config: Any) -> FramesProcessor:
        """From the files of a model: two tokenizers, and the settings of its video or image processor.

        Args:
            name_or_path: a folder, or a name on the hub.
            config: of the model.

        Raises:
            OSError: one of them is missing.
        """
        name = str(name_or_path)
        settings = _settings(name)
        pictures = BlipImageProcessorPil(**{key: settings[key] for key in _SETTINGS if key in settings})
        words = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        qformer_words = AutoTokenizer.from_pretrained(name, subfolder="qformer_tokenizer", trust_remote_code=False)
        return cls(pictures, words, qformer_words, config.num_query_tokens, config.video_token_index)

    def __call__(self, images: Sequence[Image.Image], text: str, return_tensors: str = "pt") -> dict[str, Any]:
        """One video and the instruction about it.

        Args:
            images: its F frames.
            text: the instruction.

        Returns:
            `pixel_values` [1, F, 3, H, W], `input_ids` and `attention_mask` [1, F * queries + tokens], and
            `qformer_input_ids` and `qformer_attention_mask` [1, T].

        Raises:
            ValueError: no frame.
        """
        if not images:
            raise ValueError("a video of no frames was given; pass at least one picture")
        pixels = self.image_processor(list(images), return_tensors=return_tensors)["pixel_values"]
        places = [self.video_token_id] * (len(images) * self.queries)
        # The frames come before the bos token, as in training.
        ids = torch.tensor([places + self.tokenizer(text)["input_ids"]])
        qformer = self.qformer_tokenizer(text, return_tensors=return_tensors)
        return {
            "pixel_values": pixels.unsqueeze(0),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "qformer_input_ids": qformer["input_ids"],
            "qformer_attention_mask": qformer["attention_mask"],
        }

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        texts: list[str] = self.tokenizer.batch_decode(*args, **kwargs)
        return texts


def _settings(name: str) -> dict[str, Any]:
    """How the model's frames are prepared.

    Raises:
        OSError: no file says it.
    """
    for file, key in _FILES:
        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found is None:
            continue
        given = json.loads(Path(found).read_text(encoding="utf-8"))
        if key is None or key in given:
            settings: dict[str, Any] = given if key is None else given[key]
            return settings
    raise OSError(f"{name} does not say how frames are prepared; expected {', '.join(file for file, _ in _FILES)}")
