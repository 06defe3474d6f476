"""A trained Flamingo with all it needs to caption image files, in one folder:

- bridge.safetensors, bridge.json: what was trained (`Flamingo.save_bridge`);
- captioner.json: the shape of the patch encoder;
- language_model/, tokenizer/: the frozen language model, as Hugging Face saves them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pipeline import read_image
from ..quantization import load, quantize_llm
from .bridge_file import DamagedBridgeError
from .flamingo import Flamingo
from .patch_encoder import PatchEncoder

CONFIG_FILE = "captioner.json"
LANGUAGE_MODEL_FOLDER = "language_model"
TOKENIZER_FOLDER = "tokenizer"


class Captioner:
    """A Flamingo over a `PatchEncoder`, with its tokenizer: images in, sentences out.

    Args:
        model: its vision encoder is a `PatchEncoder`.
        tokenizer: a Hugging Face tokenizer with bos, eos and pad tokens and the model's media token.
    """

    def __init__(self, model: Flamingo, tokenizer: Any) -> None:
        if not isinstance(model.vision_encoder, PatchEncoder):
            raise TypeError(f"the vision encoder is a {type(model.vision_encoder).__name__}; expected a PatchEncoder")
        self.model = model.eval()
        self.tokenizer = tokenizer

    def caption(self, images: Tensor, prompt: str | None = None, max_new_tokens: int = 32) -> list[str]:
        """Greedy captions.

        Args:
            images: [N, channels, size, size] in 0 to 1.
            prompt: words that every caption begins with.

        Returns:
            N sentences, the prompt's words included.

        Raises:
            ValueError: the prompt has words that the tokenizer does not know.
        """
        media_token = self.tokenizer.convert_ids_to_tokens(self.model.config.media_token_id)
        text = f"{self.tokenizer.bos_token} {media_token} {prompt or ''}".strip()
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if prompt and bool((ids == self.tokenizer.unk_token_id).any()):
            known = sorted(word for word in self.tokenizer.get_vocab() if not word.startswith("<"))
            raise ValueError(f"the prompt {prompt!r} has unknown words; this model knows: {', '.join(known)}")
        ids = ids.to(self.model.lm.device).expand(len(images), -1).contiguous()
        generated = self.model.generate(
            ids,
            images.to(ids.device).unsqueeze(1),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return list(self.tokenizer.batch_decode(generated, skip_special_tokens=True))

    def read(self, path: str | Path) -> Tensor:
        """An image file as [channels, size, size] in 0 to 1, light on dark: a bright border means ink on paper."""
        size, channels = self.model.vision_encoder.config["image_size"], self.model.vision_encoder.config["channels"]
        image = read_image(path)
        small = (image.convert("L") if channels == 1 else image).resize((size, size), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255.0).reshape(size, size, channels)
        border = torch.cat((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
        return (1 - pixels if border.mean() > 0.5 else pixels).permute(2, 0, 1)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the whole folder under another name, then rename it: `folder` is never half written.

        Raises:
            FileExistsError: `folder` exists and is not empty, and `overwrite` is False or it holds no captioner.
        """
        folder = Path(folder)
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if taken and not (overwrite and (folder / CONFIG_FILE).is_file()):
            raise FileExistsError(
                f"{folder} exists; choose another folder, or pass overwrite=True to replace a captioner"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            stage.chmod(0o755)
            self.model.save_bridge(stage)
            (stage / CONFIG_FILE).write_text(json.dumps({"vision": self.model.vision_encoder.config}, indent=2) + "\n")
            with _no_progress_bars():
                self.model.lm.save_pretrained(stage / LANGUAGE_MODEL_FOLDER)
            self.tokenizer.save_pretrained(stage / TOKENIZER_FOLDER)
            if taken:
                old = stage.with_name(f"{stage.name}.old")
                os.rename(folder, old)
                os.rename(stage, folder)
                shutil.rmtree(old)
            else:
                os.rename(stage, folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Captioner:
        """What `save` wrote.

        Raises:
            FileNotFoundError: `folder` holds no captioner.
            BridgeMismatchError: its parts do not fit together.
        """
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        wanted = (CONFIG_FILE, LANGUAGE_MODEL_FOLDER, TOKENIZER_FOLDER)
        if missing := [name for name in wanted if not (folder / name).exists()]:
            raise FileNotFoundError(
                f"no captioner in {folder}: {', '.join(missing)} missing; expected a folder such as `mllm-fast demo` writes"
            )
        try:
            vision = PatchEncoder(**json.loads((folder / CONFIG_FILE).read_text())["vision"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedBridgeError(
                f"{folder / CONFIG_FILE} is damaged: expected the options of the vision encoder under 'vision' ({error})"
            ) from error
        with _no_progress_bars():
            lm = load(folder / LANGUAGE_MODEL_FOLDER, dtype=None, device="cpu", fuse=False)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / TOKENIZER_FOLDER, local_files_only=True)
        return cls(Flamingo.from_bridge(folder, lm, vision), tokenizer)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """For files that take a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def generate_captions(
    path: str | Path,
    images: Sequence[str | Path],
    prompt: str | None = None,
    max_new_tokens: int = 32,
    llm: Literal["nf4", "fp4", "int8"] | None = None,
) -> list[str]:
    """Caption image files with the captioner in folder `path`, one sentence each.

    Args:
        path: a folder that `Captioner.save` (or the demo) wrote.
        images: files of any size that Pillow reads.
        prompt: words that every caption begins with.
        max_new_tokens: words added to the prompt at most.
        llm: quantise the language model first.

    Raises:
        FileNotFoundError: no captioner in `path`, or an image file is missing.
        ValueError: no images, a file that is no image, a prompt with unknown words, or a language model that is
            quantised already.
    """
    if not images:
        raise ValueError("no images were given; pass at least one image file")
    captioner = Captioner.load(path)
    if llm is not None:
        quantize_llm(captioner.model, llm)
    return captioner.caption(torch.stack([captioner.read(image) for image in images]), prompt, max_new_tokens)
