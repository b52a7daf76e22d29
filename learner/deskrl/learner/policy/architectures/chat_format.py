"""Chat format of the models that deskrl builds: special tokens and chat template, as in published models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatFormat:
    """Special tokens and chat template of an architecture."""

    special_tokens: tuple[str, ...]
    """Names of the published tokenizer that the processor and the template require."""
    template: str
    eos_token: str
    pad_token: str
    config_tokens: Mapping[str, str]
    """Special token whose id is the value of a key in config.json."""


QWEN_CHAT = ChatFormat(
    special_tokens=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|box_start|>",
        "<|box_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    template=(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    config_tokens={
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    },
)
"""Format of Qwen's models: a token ends each turn."""

GLM_CHAT = ChatFormat(
    special_tokens=(
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|image|>",
        "<|video|>",
    ),
    template=(
        "[gMASK]<sop>{% for message in messages %}"
        "{% if message.role == 'user' %}<|user|>{% elif message.role == 'system' %}<|system|>"
        "{% else %}<|assistant|>{% endif %}{{ '\\n' }}"
        "{% if message.role != 'user' or message.content is string %}{{ message.content }}"
        "{% else %}{% for item in message.content %}"
        "{% if item.type == 'image' or 'image' in item %}<|begin_of_image|><|image|><|end_of_image|>"
        "{% elif item.type == 'text' %}{{ item.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
    ),
    eos_token="<|endoftext|>",
    pad_token="<|endoftext|>",
    config_tokens={
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
    },
)
"""Format of GLM's models: the header of the next turn ends a turn, and the text of an answer must be a string."""
