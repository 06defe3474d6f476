"""A model with its processor: image files and a prompt in, text out. For every supported system, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

# How a system without a chat template writes a prompt, by `config.model_type`: (images, prompt) -> text. `None` in place of
# a text: the processor takes none (BLIP then captions without a beginning).
_PROMPTS: dict[str, Callable[[int, str], str | None]] = {
    "blip": lambda images, prompt: prompt or None,
    "blip-2": lambda images, prompt: prompt,
    "instructblip": lambda images, prompt: prompt,
    "instructblipvideo": lambda images, prompt: prompt,
    "llava": lambda images, prompt: f"USER: {'<image>' * images}\n{prompt} ASSISTANT:",
    "idefics2": lambda images, prompt: f"User:{'<image>' * images}{prompt}<end_of_utterance>\nAssistant:",
    "mllama": lambda images, prompt: f"{'<|image|>' * images}<|begin_of_text|>{prompt}",
}
# Systems that read one image a prompt: several images are several prompts.
_ONE_IMAGE = ("blip", "blip-2", "instructblip")
# Without a prompt these describe the image; BLIP and BLIP-2 caption it by themselves.
_DESCRIBE = "Describe the image."
_CAPTIONERS = ("blip", "blip-2")


class UnknownSystemError(ValueError):
    """A model whose prompts nobody described here."""


def written_prompt(processor: Any, model_type: str, images: int, prompt: str) -> str | None:
    """A prompt about images as a system is asked: its processor's chat template, or the form known here.

    Args:
        processor: of the model.
        model_type: of the model's configuration.
        images: how many the prompt is about; they come first.
        prompt: the question or instruction; "": none.

    Returns:
        the text that the processor takes; None: it takes none.

    Raises:
        UnknownSystemError: the processor has no chat template, and the system's prompts are not known here.
    """
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}] * images + ([{"type": "text", "text": prompt}] if prompt else [])
        written: str = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        return written
    if model_type not in _PROMPTS:
        raise UnknownSystemError(
            f"{type(processor).__name__} has no chat template, and prompts for model_type {model_type!r} are not known: "
            f"call the processor yourself; known are {', '.join(sorted({*_PROMPTS, 'idefics'}))}"
        )
    return _PROMPTS[model_type](images, prompt)


@dataclass(frozen=True)
class Pipeline:
    """A model and its processor.

    Attributes:
        model: a `PreTrainedModel` in evaluation mode.
        processor: its own, from the same place.
    """

    model: Any
    processor: Any

    def inputs(self, images: Sequence[Image.Image], prompt: str | None = None) -> dict[str, Any]:
        """What the model's forward and generate take, on its device and in its dtype.

        Args:
            images: pictures of any size. A system that reads one image a prompt gets a row for each, another gets one row
                with all of them; for InstructBLIP-Video they are the frames of one video.
            prompt: the question or instruction; None asks for a description.

        Raises:
            UnknownSystemError: the processor has no chat template, and the system's prompts are not known here.
        """
        kind = self.model.config.model_type
        prompt = prompt if prompt is not None else "" if kind in _CAPTIONERS else _DESCRIBE
        pictures: Any = list(images)
        if kind == "idefics" and not getattr(self.processor, "chat_template", None):
            return self._on_device(self.processor(text=[[*images, prompt]], return_tensors="pt"))
        text: Any = written_prompt(self.processor, kind, 1 if kind in _ONE_IMAGE else len(images), prompt)
        if kind in _ONE_IMAGE and text is not None:
            text = [text] * len(images)
        elif kind == "mllama":
            pictures = [pictures]
        return self._on_device(self.processor(images=pictures, text=text, return_tensors="pt"))

    @torch.no_grad()
    def generate(self, images: Sequence[Image.Image], prompt: str | None = None, **kwargs: Any) -> list[str]:
        """The model's answers, without the prompt: one for each row that `inputs` makes.

        An answer ends where the system's answers do, also where that is no token of its own (`stop_strings` of its
        processor, as in MiniGPT-4).

        Args:
            images, prompt: as for `inputs`.
            **kwargs: of the model's `generate` (`max_new_tokens`, `num_beams`, ...).
        """
        inputs = self.inputs(images, prompt)
        if (stops := getattr(self.processor, "stop_strings", None)) and "stop_strings" not in kwargs:
            kwargs |= {"stop_strings": stops, "tokenizer": self.processor.tokenizer}
        ids = self.model.generate(**inputs, **kwargs)
        ids = continuation(getattr(ids, "sequences", ids), inputs.get("input_ids"), self.model.config)
        if read := getattr(self.processor, "read_answers", None):
            answers: list[str] = read(ids)
            return answers
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def _on_device(self, inputs: Any) -> dict[str, Any]:
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for name, value in dict(inputs).items()
        }


def continuation(ids: Tensor, prompt: Tensor | None, config: Any) -> Tensor:
    """What was generated, without the prompt where `generate` returned that too.

    Args:
        ids: [B * sequences, L] what `generate` returned.
        prompt: [B, S] what it was given, if that was tokens.
        config: of the model. Where its image token is outside the vocabulary, another id stands in the prompt's places.
    """
    if prompt is None or ids.shape[1] < prompt.shape[1] or ids.shape[0] % prompt.shape[0]:
        return ids
    prompt = prompt.to(ids.device).repeat_interleave(ids.shape[0] // prompt.shape[0], dim=0)
    places = prompt == getattr(config, "image_token_id", None)
    whole = bool(((ids[:, : prompt.shape[1]] == prompt) | places).all())
    return ids[:, prompt.shape[1] :] if whole else ids


def load_pipeline(
    name_or_path: str | Path,
    *,
    llm: Literal["nf4", "fp4", "int8"] | None = None,
    fuse: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    cuda_graphs: bool = False,
) -> Pipeline:
    """A supported system from a local folder or the hub, with its processor.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, or a name on the hub.
        llm: "nf4", "fp4" or "int8" quantises the language model as it is loaded; None leaves it.
        fuse: whether to put the drop-ins in.
        dtype: default bf16 on a GPU and where the CPU has it, else fp32.
        device: default the first GPU, or the CPU.
        cuda_graphs: replay the encoder side as CUDA graphs (`mllm_fast.fuse`); needs a GPU.

    Raises:
        ValueError: a GPU that is not there, or CUDA graphs without a GPU or without the drop-ins.
        OSError: nothing is found under that name, or a model without its processor; says what was looked for.
    """
    from .quantization import load

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch finds no GPU here; leave it out, or choose 'cpu'"
        )
    if dtype is None:
        narrow = torch.device(device).type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtype = torch.bfloat16 if narrow else torch.float32
    model = load(str(name_or_path), llm=llm, fuse=fuse, dtype=dtype, device=device, cuda_graphs=cuda_graphs)
    return Pipeline(model.eval(), _load_processor(name_or_path, model.config))


def _load_processor(name: str | Path, config: Any) -> Any:
    from transformers import AutoProcessor

    try:
        if config.model_type == "instructblipvideo":
            from .frames import FramesProcessor

            return FramesProcessor.from_pretrained(name, config)
        return AutoProcessor.from_pretrained(str(name), trust_remote_code=False)
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).split(". ")[0]
        raise OSError(
            f"{name} holds a model but not its whole processor ({reason}); put the processor's files beside the weights: "
            "processor.save_pretrained(folder)"
        ) from error


def drawn_image(size: int = 224) -> Image.Image:
    """A picture without a file: three overlapping gradients, the same on every machine."""
    ramp = torch.linspace(0, 1, size)
    channels = (ramp[:, None].expand(size, size), ramp.expand(size, size), (ramp[:, None] - ramp).abs())
    pixels = (torch.stack(channels, dim=-1) * 255).round().byte()
    return Image.fromarray(pixels.numpy())


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: Pillow cannot read it, or it is cut short.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except PermissionError:
        raise
    except (
        Exception
    ) as error:  # of damaged bytes Pillow's decoders raise anything: SyntaxError, struct.error, zlib.error
        raise ValueError(
            f"{path} is not an image that Pillow can read, or is damaged; expected a PNG, JPEG or the like"
        ) from error
