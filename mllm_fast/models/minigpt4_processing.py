"""What stands before MiniGPT-4: its prompts, conversations and training samples, to tensors.

The original splices an image into `<Img><ImageHere></Img>`: it cuts the prompt at `<ImageHere>` and tokenises the pieces one
by one, so that a piece after an image begins as a text does; the first piece alone begins with bos.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, BatchFeature

from .image_prompts import ImagePromptProcessor

IMAGE = "<Img><ImageHere></Img>"
_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
IGNORED = -100

# A turn's images and texts are joined by single spaces.
_CONVERSATION = (
    "{%- macro say(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if not loop.first -%}{{ ' ' }}{%- endif -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}{{ '"
    + IMAGE
    + "' }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- if messages[0]['role'] != 'system' -%}{{ SYSTEM + SEPARATOR }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ USER }}{%- elif message['role'] == 'assistant' -%}{{ ASSISTANT }}{%- endif -%}"
    "{{ say(message['content']) + SEPARATOR }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ASSISTANT }}{%- endif -%}"
)


@dataclass(frozen=True)
class Style:
    """How a language model was made to converse.

    Attributes:
        instruction: what training and benchmarks wrap an instruction in.
        end: what stands behind an answer in training, and ends one.
        system: what a conversation begins with.
        user, assistant: what the turns of a conversation begin with.
        separator: what the system's words and every turn end with.
    """

    instruction: str
    end: str
    system: str
    user: str
    assistant: str
    separator: str

    def chat_template(self) -> str:
        """A conversation as a template of transformers' `apply_chat_template`; without system's words it has its own."""
        template = _CONVERSATION
        for name in ("system", "user", "assistant", "separator"):
            template = template.replace(name.upper(), json.dumps(getattr(self, name)))
        return template


STYLES = {
    "vicuna": Style("###Human: {} ###Assistant: ", "###", _SYSTEM, "Human: ", "Assistant: ", "###"),
    "llama2": Style("[INST] {} [/INST] ", "</s>", _SYSTEM, "<s>[INST] ", " [/INST] ", ""),
    "v2": Style("[INST] {} [/INST]", "</s>", "", "<s>[INST] ", " [/INST]", ""),
}


class MiniGPT4Processor(ImagePromptProcessor):
    """Image processor and tokenizer of a MiniGPT-4.

    Args:
        image_processor, tokenizer, image_token, image_token_id, rows_per_image: as in `ImagePromptProcessor`, with the
            values of `MiniGPT4Config`.
        style: a name in `STYLES`: "vicuna", "llama2" (the variant without Q-Former) or "v2" (MiniGPT-v2).
        chat_template: default: the style's conversation.

    Raises:
        ValueError: an unknown style.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_token: str = "<ImageHere>",
        image_token_id: int = -1,
        rows_per_image: int = 32,
        style: str = "vicuna",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if style not in STYLES:
            raise ValueError(f"unknown style {style!r}; choose one of {', '.join(STYLES)}")
        self.style = style
        template = STYLES[style].chat_template() if chat_template is None else chat_template
        super().__init__(
            image_processor, tokenizer, image_token, image_token_id, rows_per_image, chat_template=template, **kwargs
        )

    @classmethod
    def from_original(
        cls,
        language_model: Any,
        *,
        style: str = "vicuna",
        image_size: int = 224,
        rows_per_image: int | None = None,
        **kwargs: Any,
    ) -> MiniGPT4Processor:
        """For the original's files: the tokenizer of the language model's folder, and BLIP-2's pictures.

        Args:
            language_model: its folder or name on the hub.
            style: as above.
            image_size: height and width that pictures are resized to, whatever their proportions; 448 for MiniGPT-v2.
            rows_per_image: default 32, or a quarter of the patches of 14 x 14 pixels where the style has no Q-Former.
            **kwargs: of `AutoTokenizer.from_pretrained`.
        """
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        if rows_per_image is None:
            rows_per_image = 32 if style == "vicuna" else (image_size // 14) ** 2 // 4
        pictures = BlipImageProcessorPil(size={"height": image_size, "width": image_size})
        tokenizer = AutoTokenizer.from_pretrained(language_model, **{"trust_remote_code": False, **kwargs})
        if tokenizer.pad_token is None and "$$" in tokenizer.get_vocab():
            tokenizer.pad_token = "$$"
        return cls(pictures, tokenizer, rows_per_image=rows_per_image, style=style)

    def instruct(self, text: str, images: int = 1) -> str:
        """The prompt of training and benchmarks: images, then an instruction.

        In style "vicuna": `###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: `.
        """
        return STYLES[self.style].instruction.format(" ".join([*[IMAGE] * images, text]))

    @property
    def stop_strings(self) -> list[str]:
        """What ends an answer, for `generate(stop_strings=..., tokenizer=...)`."""
        return [STYLES[self.style].end]

    def training_batch(
        self,
        images: Any,
        text: Sequence[str | Sequence[str]],
        answers: Sequence[str | Sequence[str]],
        *,
        max_answer_tokens: int | None = 160,
        **images_kwargs: Any,
    ) -> BatchFeature:
        """Prompts with their answers, as the original trains on them.

        A row is bos, prompt, answer and its end; padding is on the right. Prompt and answer are tokenised apart. In a
        conversation, every later prompt begins with another bos. Where an answer holds the padding token (the original
        makes that "$$"), nothing is learned there, as in the original.

        Args:
            images: as in a call.
            text: a prompt a sample (see `instruct`), or the prompts of a conversation; images are in the first of them.
            answers: the answer to each prompt.
            max_answer_tokens: what follows the first prompt is cut after so many tokens; None: never.
            **images_kwargs: of the image processor.

        Returns:
            `input_ids`, `attention_mask` and `labels` [B, S], and `pixel_values`. Labels are -100 but on the answers.

        Raises:
            ValueError: image tokens and pictures, or prompts and answers, that do not match.
        """
        turns = [
            ([q], [a]) if isinstance(q, str) else (list(q), _listed(a)) for q, a in zip(text, answers, strict=True)
        ]
        for questions, given in turns:
            if len(questions) != len(given) or not questions:
                raise ValueError(
                    f"got {len(questions)} prompts and {len(given)} answers; expected an answer to each prompt"
                )
            if any(self.image_token in question for question in questions[1:]):
                raise ValueError(f"{self.image_token} stands in a later prompt; put images into the first prompt")
        self._check_images([questions[0] for questions, _ in turns], images)
        rows, targets = [], []
        for questions, given in turns:
            prompt = self._tokenize(questions[0], add_special_tokens=True)
            answer, target = self._answers(questions, given)
            rows.append(prompt + answer[:max_answer_tokens])
            targets.append([IGNORED] * len(prompt) + target[:max_answer_tokens])
        features = self._pad(rows, "right")
        labels = torch.full_like(features["input_ids"], IGNORED)
        for row, own in enumerate(targets):
            labels[row, : len(own)] = torch.tensor(own)
        return BatchFeature(features | {"labels": labels} | self._pixels(images, images_kwargs))

    def _answers(self, questions: Sequence[str], answers: Sequence[str]) -> tuple[list[int], list[int]]:
        """What follows the first prompt, and what of it is to be learned."""
        ids: list[int] = []
        target: list[int] = []
        for question, answer in zip([None, *questions[1:]], answers, strict=True):
            if question is not None:
                asked = self._tokenize((self.tokenizer.bos_token or "") + question, add_special_tokens=False)
                ids += asked
                target += [IGNORED] * len(asked)
            said = self._tokenize(answer + STYLES[self.style].end, add_special_tokens=False)
            ids += said
            target += [IGNORED if i == self.tokenizer.pad_token_id else i for i in said]
        return ids, target

    def read_answers(self, sequences: Any, prompt_length: int = 0) -> list[str]:
        """The answers in generated ids [B, prompt_length + new]: up to their end, as the original's chat cuts them."""
        style = STYLES[self.style]
        texts = self.batch_decode([ids[prompt_length:] for ids in sequences], skip_special_tokens=True)
        return [
            text.split(style.end)[0].replace("<s>", "").split(style.assistant.strip())[-1].strip() for text in texts
        ]


def _listed(answers: str | Sequence[str]) -> list[str]:
    return [answers] if isinstance(answers, str) else list(answers)
