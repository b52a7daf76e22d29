"""From a conversation to the exact token ids of a prompt, and what else of a prompt all roles must agree on.

Inference samples from these prompts and the learner rebuilds the same ones (demonstrations, expanded images,
suppressed tokens), so there is one definition. A conversation is rendered by the model's own chat template, but piece
by piece: what the template writes may hold special tokens, what a person or a web page wrote never becomes one, and
what the policy sampled is put in as the very ids. So the prompt of a step strictly extends prompt and action of the
step before whenever its messages do. Knows tokenizers only as objects handed in; reads no weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deskrl.core.errors import UserError
from deskrl.proto.v1 import inference_pb2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<|image_pad|>"

# Special tokens that mark a place on the screen: content, which some policies are trained to write.
_GROUNDING_TOKENS = frozenset(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end"))
_GROUNDING_MARK = re.compile(f"({'|'.join(map(re.escape, sorted(_GROUNDING_TOKENS)))})")

_ROLES = {
    inference_pb2.MESSAGE_ROLE_SYSTEM: "system",
    inference_pb2.MESSAGE_ROLE_USER: "user",
    inference_pb2.MESSAGE_ROLE_ASSISTANT: "assistant",
}

# Stands for a piece of content while the template runs; content itself never meets the template.
_MARK = "\ue000"


class RenderingError(ValueError):
    """A conversation that is no conversation: the caller's mistake."""


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids with one image token for each screenshot, and the screenshots' hashes in the same order."""

    ids: tuple[int, ...]
    image_hashes: tuple[str, ...]


@dataclass(frozen=True)
class ImageSizing:
    """How a Qwen2-VL style processor scales images, and so how many tokens one costs."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after scaling: multiples of a merged patch, the area between the two bounds."""
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
        """Image tokens of a screenshot of this size."""
        scaled_width, scaled_height = self.scaled(width, height)
        return scaled_width * scaled_height // (self.patch_size * self.merge_size) ** 2


def render(
    messages: Sequence[inference_pb2.ChatMessage],
    tokenizer: PreTrainedTokenizerFast,
    add_generation_prompt: bool = True,
) -> RenderedPrompt:
    """Token ids of a conversation.

    Args:
        messages: as in `ActRequest`. Text is taken literally; sampled turns are inserted as their ids.
        tokenizer: with the model's chat template.
        add_generation_prompt: end with the opening of the policy's next turn.

    Raises:
        RenderingError: a message without role or content, sampled ids outside of an assistant's turn, or image tokens
            that no screenshot stands behind.
    """
    if not messages:
        raise RenderingError("a conversation without messages")
    contents = [content for message in messages for content in message.contents]
    rendered: str = tokenizer.apply_chat_template(
        list(_with_marks(messages)), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    # Odd parts are the numbers of marked contents, even ones what the template wrote around them.
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
                # The template closes every turn, and a sampled turn has closed itself already.
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


def _with_marks(messages: Sequence[inference_pb2.ChatMessage]) -> Iterator[dict[str, Any]]:
    """The conversation as a chat template takes it, a numbered mark in place of each text and each sampled turn."""
    number = 0
    for message in messages:
        if message.role not in _ROLES or not message.contents:
            raise RenderingError("a message without a role or without content")
        items: list[dict[str, str]] = []
        for content in message.contents:
            kind = content.WhichOneof("kind")
            if kind is None or (kind == "image_hash" and not content.image_hash):
                raise RenderingError("an empty content")
            if kind == "token_ids":
                alone = message.role == inference_pb2.MESSAGE_ROLE_ASSISTANT and len(message.contents) == 1
                if not alone or not content.token_ids.ids:
                    raise RenderingError("sampled ids that are not the whole of an assistant's turn")
            items.append(
                {"type": "image"} if kind == "image_hash" else {"type": "text", "text": f"{_MARK}{number}{_MARK}"}
            )
            number += 1
        yield {"role": _ROLES[message.role], "content": items}


def encode_text(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of text as text: a typed "<|image_pad|>" stays the characters that it is. Marks of places are their tokens:
    UI-TARS 1.0 is prompted with them and writes them, and they can open neither a turn nor an image."""
    ids: list[int] = []
    for part in _GROUNDING_MARK.split(text):
        if _GROUNDING_MARK.fullmatch(part) and (mark := tokenizer.convert_tokens_to_ids(part)) is not None:
            ids.append(mark)
        elif part:
            ids += tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_action(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of a scripted action as the policy would have to sample it: the text, then the end of its turn."""
    return [*encode_text(text, tokenizer), end_of_turn_id(tokenizer)]


def expand_images(ids: Sequence[int], image_token_id: int, tokens_per_image: Sequence[int]) -> list[int]:
    """The prompt as the engine sees it: each image token repeated as often as its screenshot costs.

    Raises:
        ValueError: the numbers of image tokens and of screenshots differ.
    """
    return place_images(ids, image_token_id, tokens_per_image)[0]


def place_images(
    ids: Sequence[int], image_token_id: int, tokens_per_image: Sequence[int]
) -> tuple[list[int], list[int]]:
    """`expand_images`, and where each screenshot's tokens begin.

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
    """Id of the token that stands for a screenshot."""
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def end_of_turn_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token with which the policy ends its turn."""
    return int(tokenizer.eos_token_id)


def suppressed_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[int, ...]:
    """Ids that are never sampled, in order: their logits are -inf before the temperature is applied.

    These are the special tokens (an image token in an action would ask for an image that is not there) save the end of
    the turn and the marks of places, and the rows of the model's vocabulary to which the tokenizer gives no meaning.

    Args:
        tokenizer: of the model.
        vocab_size: width of the model's logits (`vocab_size_of` reads it).
    """
    special = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in _GROUNDING_TOKENS
    }
    return tuple(sorted((special | set(range(len(tokenizer), vocab_size))) - {end_of_turn_id(tokenizer)}))


def vocab_size_of(model_folder: Path) -> int:
    """Width of a model's logits, from its config.json."""
    config = _read_json(model_folder / "config.json")
    return int(config.get("text_config", config)["vocab_size"])


def image_sizing_of(model_folder: Path) -> ImageSizing:
    """How a model's processor scales images."""
    config = _image_processor_config(model_folder)
    size = config.get("size") or {}
    return ImageSizing(
        patch_size=config["patch_size"],
        merge_size=config["merge_size"],
        min_pixels=config.get("min_pixels") or size["shortest_edge"],
        max_pixels=config.get("max_pixels") or size["longest_edge"],
    )


def processor_hash(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Hex SHA-256 over all that turns a conversation into a prompt and logits into a distribution.

    By meaning, not by file: the tokenizer's rules and vocabulary, the chat template, the image processor's numbers, and
    the suppressed ids. So a checkpoint that transformers wrote anew has the hash of the model that it came from.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by whoever last padded or truncated with this object.
    del rules["padding"], rules["truncation"]
    image = {key: value for key, value in _image_processor_config(model_folder).items() if _is_number(value)}
    sizing = image_sizing_of(model_folder)
    suppressed = suppressed_ids(tokenizer, vocab_size_of(model_folder))
    description = [rules, tokenizer.chat_template, image, vars(sizing), suppressed]
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _is_number(value: object) -> bool:
    """Whether a processor's setting is about pixels (numbers, or a list of them), and not a name or a flag."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)


def _image_processor_config(model_folder: Path) -> dict[str, Any]:
    """Settings of the image processor: a file of their own, or a part of the processor's file."""
    own = model_folder / "preprocessor_config.json"
    if own.is_file():
        return _read_json(own)
    image_config: dict[str, Any] | None = _read_json(model_folder / "processor_config.json").get("image_processor")
    if image_config is None:
        raise UserError(
            f"{model_folder} has no image processor", "copy preprocessor_config.json from the original model"
        )
    return image_config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", "name a complete model folder, its processor included") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}", "copy the file from the original model") from error
    return value
