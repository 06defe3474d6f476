"""What stands before mPLUG-Owl: prompts with `<image>` in them, conversations, and pictures, to tensors."""

from __future__ import annotations

from typing import Any

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .image_prompts import ImagePromptProcessor

# What a conversation begins with, unless a message of role "system" does.
INTRODUCTION = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
# Every image and every text of a turn has a line of its own.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{ \"" + INTRODUCTION + '\\n" }}{%- endif -%}'
    "{%- for message in messages -%}"
    "{%- set begin = {'user': 'Human: ', 'assistant': 'AI: ', 'system': ''}[message['role']] -%}"
    "{%- if message['content'] is string -%}{{ begin + message['content'] + '\\n' }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{ begin + ('<image>' if part['type'] == 'image' else part['text']) + '\\n' }}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'AI: ' }}{%- endif -%}"
)


class MplugOwlImageProcessor(CLIPImageProcessorPil):
    """CLIP's, by the name that the original's `preprocessor_config.json` has for it."""


class MplugOwlProcessor(ImagePromptProcessor):
    """Image processor and tokenizer of an mPLUG-Owl.

    Args:
        image_processor, tokenizer, image_token, image_token_id, rows_per_image: as in `ImagePromptProcessor`, with the
            values of `MplugOwlConfig`.
        chat_template: default: conversations as the model was trained with.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_token: str = "<image>",
        image_token_id: int = -1,
        rows_per_image: int = 65,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        template = CHAT_TEMPLATE.replace("<image>", image_token) if chat_template is None else chat_template
        super().__init__(
            image_processor, tokenizer, image_token, image_token_id, rows_per_image, chat_template=template, **kwargs
        )
