"""Checks of the tokenizer and the chat template of a model directory against its architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deskrl.core.errors import UserError
from deskrl.core.file_io import read_json_object
from deskrl.core.prompt_rendering import end_of_turn_token
from deskrl.models.architectures import TensorLayout
from deskrl.models.model_checks.placeholder_files import COPY_HINT

_QUESTION, _ANSWER, _REPLY = _TEXTS = ("\ue001", "\ue002", "\ue003")
"""Texts of the messages by which the chat template is tried."""
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Tags of transformers that mark tokens of the assistant and print nothing."""
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""Errors that code in a template can raise."""


def check_tokenizer(folder: Path, layout: TensorLayout) -> None:
    """Check that every token has an embedding, and that special tokens have the ids on which the model relies.

    Raises:
        UserError: a check failed.
    """
    ids = _read_ids(folder)
    longest = max(ids, key=lambda token: ids[token], default="")
    if not ids or ids[longest] >= layout.vocab_size:
        problem = f"token {longest!r} has the id {ids[longest]}" if ids else "there are no tokens"
        raise UserError(
            f"{folder / 'tokenizer.json'}: {problem}, but the model has {layout.vocab_size} embeddings "
            "(vocab_size in config.json)",
            "copy the tokenizer's files from the same model, or add rows to the embeddings (resize_token_embeddings)",
        )
    for token, wanted in layout.token_ids.items():
        if ids.get(token) != wanted:
            state = "is missing" if token not in ids else f"has the id {ids[token]}"
            raise UserError(
                f"{folder / 'tokenizer.json'}: token {token} {state}, but config.json relies on the id {wanted}",
                "copy config.json and the tokenizer's files from the same model",
            )


def _read_ids(folder: Path) -> dict[str, int]:
    """Return the ids of all tokens, including those that are added to the vocabulary."""
    path = folder / "tokenizer.json"
    content = read_json_object(path, COPY_HINT)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # a unigram model lists pairs of token and score
        vocabulary = {str(pair[0]): index for index, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    if not isinstance(vocabulary, dict):
        raise UserError(f"{path}: has no vocabulary", COPY_HINT)
    ids = {token: value for token, value in vocabulary.items() if _is_id(value)}
    added = content.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_id(entry.get("id")):
            ids[entry["content"]] = entry["id"]
    decoder = _tokenizer_config(folder).get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if number.isascii() and number.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            ids.setdefault(entry["content"], int(number[:18]))
    return ids


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_chat_template(folder: Path, image_token: str) -> None:
    """Check that the chat template renders conversations as deskrl relies on, and ends turns with the end token.

    The policy ends an action with that token (`end_of_turn_token`); all other special tokens are never sampled.

    Args:
        folder: model directory.
        image_token: token that stands for a part of a screenshot.

    Raises:
        UserError: a check failed.
    """
    source, template = _read_template(folder)
    eos_token = _read_end_token(folder)
    end = end_of_turn_token(eos_token, template)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": _QUESTION}, {"type": "image"}]},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": [{"type": "text", "text": _REPLY}]},
    ]
    if end == eos_token:
        del messages[2]  # only without it does a turn that is not ended differ from one that the next turn ends
    rendered = _render(source, template, messages, _special_tokens(folder), add_generation_prompt=False)
    opened = _render(source, template, messages[:1], _special_tokens(folder), add_generation_prompt=True)
    before, _, after = rendered.partition(_ANSWER)
    shown = before.partition(_QUESTION)[2]
    if [it for it in rendered if it in _TEXTS] != list(_TEXTS[: len(messages)]):
        raise UserError(f"{source}: does not write each text of a conversation once and in order", COPY_HINT)
    if rendered.count(image_token) != 1 or image_token not in shown:
        raise UserError(f"{source}: does not write {image_token} once for a screenshot", COPY_HINT)
    if opened == _render(source, template, messages[:1], _special_tokens(folder), add_generation_prompt=False):
        raise UserError(f"{source}: does not open the turn of the assistant (add_generation_prompt)", COPY_HINT)
    if not after.lstrip().startswith(end):
        written = after.strip().split("\n")[0][:40]
        token = re.match(r"<[^<>\s]*>", written)
        hint = f'set eos_token to "{token[0]}" in {folder / "tokenizer_config.json"}' if token else COPY_HINT
        raise UserError(
            f"{source}: ends a turn with {written!r}, but eos_token is {end!r}, so that the policy would never end "
            "an action",
            hint,
        )


def _read_template(folder: Path) -> tuple[Path, str]:
    """Return the chat template, and the file that contains it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text", COPY_HINT) from error
    template = _tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str) or not template:
        raise UserError(
            f"{folder}: chat template not found (chat_template.jinja, or chat_template in tokenizer_config.json)",
            "copy the file from the original model",
        )
    return folder / "tokenizer_config.json", template


def _read_end_token(folder: Path) -> str:
    """Return the token that ends an action."""
    end = _special_tokens(folder).get("eos_token")
    if not end:
        raise UserError(f"{folder / 'tokenizer_config.json'}: eos_token is missing", COPY_HINT)
    return end


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return the named special tokens, which a template may write."""
    return dict(_named_tokens(_tokenizer_config(folder)))


def _named_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if key.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                yield key, content


def _render(
    source: Path,
    template: str,
    messages: list[dict[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
) -> str:
    """Render a conversation as transformers does, which this process need not have."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=lambda format: format)
    try:
        compiled = environment.from_string(_GENERATION_TAG.sub("", template))
        return compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **special_tokens
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: the chat template cannot be rendered: {reason}", COPY_HINT) from error


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json_object(path, COPY_HINT) if path.is_file() else {}
