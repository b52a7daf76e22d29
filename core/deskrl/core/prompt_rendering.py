"""Prompt rendering: from a conversation to token ids, and the properties of prompts that all roles share.

Inference samples from these prompts and the learner rebuilds them (demonstrations, expanded images, suppressed tokens).
The chat template of the model renders a conversation, but its contents are tokenised separately: text that the template
writes may contain special tokens, text of users and web pages never becomes one, and sampled actions are inserted as
their token ids. Hence the prompt of a step strictly extends prompt and action of the previous step if its messages do.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.proto.v1 import inference_pb2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKENS = ("<|image_pad|>", "<|image|>")
"""Tokens that stand for a part of a screenshot: of Qwen's models, and of GLM's."""
_USER_HEADER = "<|user|>"

_HINT = "name a complete model directory, or copy the file from the original model"

# Special tokens that mark coordinates; some policies are trained to write them.
_GROUNDING_TOKENS = frozenset(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end"))
_GROUNDING_MARK = re.compile(f"({'|'.join(map(re.escape, sorted(_GROUNDING_TOKENS)))})")

_ROLES = {
    inference_pb2.MESSAGE_ROLE_SYSTEM: "system",
    inference_pb2.MESSAGE_ROLE_USER: "user",
    inference_pb2.MESSAGE_ROLE_ASSISTANT: "assistant",
}

# Placeholder of a content while the template is rendered.
_MARK = "\ue000"


_FRAME_COUNTING = "Glm4"
"""Start of the names of image processors whose limits count the pixels of all frames of a still image."""


class RenderingError(ValueError):
    """The conversation is malformed."""


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids of a prompt, with one image token per screenshot, and the hashes of the screenshots in order."""

    ids: tuple[int, ...]
    image_hashes: tuple[str, ...]


@dataclass(frozen=True)
class ImageSizing:
    """Image scaling of a Qwen2-VL processor, which determines the number of tokens of an image."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) in pixels after scaling: multiples of a merged patch, with the area within bounds."""
        unit = self.patch_size * self.merge_size
        scaled_width, scaled_height = round(width / unit) * unit, round(height / unit) * unit
        if scaled_width * scaled_height > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            scaled_width = max(unit, math.floor(width / shrink / unit) * unit)
            scaled_height = max(unit, math.floor(height / shrink / unit) * unit)
        elif scaled_width * scaled_height < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (width * height))
            scaled_width = math.ceil(width * stretch / unit) * unit
            scaled_height = math.ceil(height * stretch / unit) * unit
        return scaled_width, scaled_height

    def num_tokens(self, width: int, height: int) -> int:
        """Return the number of image tokens of a screenshot of this size."""
        scaled_width, scaled_height = self.scaled_size(width, height)
        return scaled_width * scaled_height // (self.patch_size * self.merge_size) ** 2


def render_prompt(
    messages: Sequence[inference_pb2.ChatMessage],
    tokenizer: PreTrainedTokenizerFast,
    add_generation_prompt: bool = True,
) -> RenderedPrompt:
    """Render a conversation to token ids.

    Args:
        messages: messages of an `ActRequest`. Text is literal; sampled actions are inserted as their token ids.
        tokenizer: tokenizer with the chat template of the model.
        add_generation_prompt: whether to append the opening of the next assistant message.

    Raises:
        RenderingError: a message has no role or no content, token ids are not the only content of an assistant message,
            or the number of image tokens differs from the number of screenshots.
    """
    if not messages:
        raise RenderingError("the conversation has no messages")
    contents = [content for message in messages for content in message.contents]
    rendered: str = tokenizer.apply_chat_template(
        list(_with_placeholders(messages)), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    # Odd parts are the numbers of contents, even parts the text of the template around them.
    parts = rendered.split(_MARK)
    end_of_turn = end_of_turn_id(tokenizer)
    ids: list[int] = []
    text = ""
    closed = False
    for position, part in enumerate(parts):
        if position % 2 == 0:
            if part:
                ids += encode_text(text, tokenizer)
                text = ""
                written: list[int] = tokenizer.encode(part, add_special_tokens=False)
                # The template closes every message, but a sampled action may end with that token already.
                ids += written[1:] if closed and written[0] == end_of_turn else written
                closed = False
        elif (content := contents[int(part)]).WhichOneof("kind") == "text":
            text += content.text
        else:
            ids += content.token_ids.ids
            closed = ids[-1] == end_of_turn
    ids += encode_text(text, tokenizer)
    hashes = tuple(content.image_hash for content in contents if content.WhichOneof("kind") == "image_hash")
    num_placeholders = ids.count(image_token_id(tokenizer))
    if num_placeholders != len(hashes):
        raise RenderingError(f"{num_placeholders} image tokens for {len(hashes)} screenshots")
    return RenderedPrompt(tuple(ids), hashes)


def _with_placeholders(messages: Sequence[inference_pb2.ChatMessage]) -> Iterator[dict[str, Any]]:
    """Yield messages for the chat template, with a numbered placeholder for each text and each sampled action."""
    number = 0
    for message in messages:
        if message.role not in _ROLES or not message.contents:
            raise RenderingError("a message has no role or no content")
        items: list[dict[str, str]] = []
        for content in message.contents:
            kind = content.WhichOneof("kind")
            if kind is None or (kind == "image_hash" and not content.image_hash):
                raise RenderingError("a content is empty")
            if kind == "token_ids":
                alone = message.role == inference_pb2.MESSAGE_ROLE_ASSISTANT and len(message.contents) == 1
                if not alone or not content.token_ids.ids:
                    raise RenderingError("token ids must be the only content of an assistant message")
            items.append(
                {"type": "image"} if kind == "image_hash" else {"type": "text", "text": f"{_MARK}{number}{_MARK}"}
            )
            number += 1
        role = _ROLES[message.role]
        if role == "user":
            yield {"role": role, "content": items}
        else:  # a string, because the templates of GLM print contents of other messages as they are
            yield {"role": role, "content": _as_string(items)}


def _as_string(items: Sequence[Mapping[str, str]]) -> str | Sequence[Mapping[str, str]]:
    """Return contents as one string if they are all text."""
    texts = [item["text"] for item in items if item["type"] == "text"]
    return "".join(texts) if len(texts) == len(items) else items


def encode_text(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokenise literal text, in which special tokens such as "<|image_pad|>" are ordinary characters.

    Coordinate marks are exempt: UI-TARS 1.0 is prompted with them and writes them, and they cannot start a message or
    an image.
    """
    ids: list[int] = []
    for part in _GROUNDING_MARK.split(text):
        if _GROUNDING_MARK.fullmatch(part) and (mark := tokenizer.convert_tokens_to_ids(part)) is not None:
            ids.append(mark)
        elif part:
            ids += tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_action(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the token ids of a scripted action as the policy would sample it: its text and the end-of-turn token."""
    return [*encode_text(text, tokenizer), end_of_turn_id(tokenizer)]


def expand_images(ids: Sequence[int], image_token_id: int, tokens_per_image: Sequence[int]) -> list[int]:
    """Return the prompt of the engine, in which each image token is repeated for all tokens of its screenshot.

    Raises:
        ValueError: the numbers of image tokens and of screenshots differ.
    """
    return expand_images_with_starts(ids, image_token_id, tokens_per_image)[0]


def expand_images_with_starts(
    ids: Sequence[int], image_token_id: int, tokens_per_image: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the result of `expand_images` and the position of the first token of each screenshot.

    Raises:
        ValueError: the numbers of image tokens and of screenshots differ.
    """
    num_images = sum(1 for token in ids if token == image_token_id)
    if num_images != len(tokens_per_image):
        raise ValueError(f"{num_images} image tokens for {len(tokens_per_image)} screenshots")
    counts = iter(tokens_per_image)
    expanded: list[int] = []
    starts: list[int] = []
    for token in ids:
        if token == image_token_id:
            starts.append(len(expanded))
            expanded += [token] * next(counts)
        else:
            expanded.append(token)
    return expanded, starts


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that represents a screenshot; raises ValueError if the tokenizer has none."""
    for token in IMAGE_TOKENS:
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id is not None and token_id != tokenizer.unk_token_id:
            return int(token_id)
    raise ValueError(f"the tokenizer has no token {' or '.join(IMAGE_TOKENS)}")


def end_of_turn_token(eos_token: str, template: str) -> str:
    """Return the token that ends an action.

    It is `eos_token`, except with chat templates that do not write it, as those of GLM: there the header of the user's
    next turn ends the turn of the assistant.

    Args:
        eos_token: named token of the tokenizer.
        template: chat template.
    """
    writes_eos = eos_token in template or "eos_token" in template
    return _USER_HEADER if not writes_eos and _USER_HEADER in template else eos_token


def end_of_turn_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that ends an action."""
    return int(tokenizer.convert_tokens_to_ids(end_of_turn_token(tokenizer.eos_token, str(tokenizer.chat_template))))


def suppressed_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[int, ...]:
    """Return the sorted ids that are never sampled: their logits are set to -inf before the temperature is applied.

    These are all special tokens except the end-of-turn token and the coordinate marks (an image token in an action
    would lack its image), and the ids beyond the vocabulary of the tokenizer.

    Args:
        tokenizer: tokenizer of the model.
        vocab_size: number of logits of the model (see `read_vocab_size`).
    """
    special = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in _GROUNDING_TOKENS
    }
    return tuple(sorted((special | set(range(len(tokenizer), vocab_size))) - {end_of_turn_id(tokenizer)}))


def read_vocab_size(model_folder: Path) -> int:
    """Read the number of logits of a model from its config.json."""
    config = read_json_object(model_folder / "config.json", _HINT)
    return int(config.get("text_config", config)["vocab_size"])


def read_image_sizing(model_folder: Path) -> ImageSizing:
    """Read the image scaling of a model from the configuration of its processor.

    Raises:
        UserError: the configuration is missing or damaged, or a size is not a positive number.
    """
    config = _image_processor_config(model_folder)
    size = config.get("size")
    size = size if isinstance(size, dict) else {}
    sizes: dict[str, Any] = {
        "patch_size": config.get("patch_size"),
        "merge_size": config.get("merge_size"),
        "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
    }
    if counts_frames := str(config.get("image_processor_type")).startswith(_FRAME_COUNTING):
        sizes["temporal_patch_size"] = config.get("temporal_patch_size")
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**40:
            raise UserError(f"{model_folder}: {name} of the image processor is missing or not a positive number", _HINT)
    if counts_frames:
        num_frames = sizes.pop("temporal_patch_size")
        sizes |= {name: max(1, sizes[name] // num_frames) for name in ("min_pixels", "max_pixels")}
    return ImageSizing(**sizes)


def processor_hash(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the hex SHA-256 of everything that determines prompts and the suppression of logits.

    Covers rules and vocabulary of the tokenizer, the chat template, numeric settings of the image processor and the
    suppressed ids, not the bytes of files, so that a checkpoint saved by transformers has the hash of its base model.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # State of the last call that padded or truncated.
    del rules["padding"], rules["truncation"]
    image = {key: value for key, value in _image_processor_config(model_folder).items() if _is_number(value)}
    sizing = read_image_sizing(model_folder)
    suppressed = suppressed_ids(tokenizer, read_vocab_size(model_folder))
    description = [rules, tokenizer.chat_template, image, vars(sizing), suppressed]
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _is_number(value: object) -> bool:
    """Return whether a setting of the processor is a number or a list of numbers, not a name or a flag."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)


def _image_processor_config(model_folder: Path) -> dict[str, Any]:
    """Read the settings of the image processor from its own file, or from that of the whole processor."""
    own = model_folder / "preprocessor_config.json"
    if own.is_file():
        return read_json_object(own, _HINT)
    image_config: dict[str, Any] | None = read_json_object(model_folder / "processor_config.json", _HINT).get(
        "image_processor"
    )
    if not isinstance(image_config, dict):
        raise UserError(
            f"{model_folder}: no image processor found", "copy preprocessor_config.json from the original model"
        )
    return image_config
