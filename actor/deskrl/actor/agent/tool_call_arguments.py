"""Checks of the arguments of tool calls, for the action languages that write calls as JSON or as code."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from deskrl.actor.actions import Action
from deskrl.actor.agent.action_language import FormatError, PolicyResponse
from deskrl.actor.agent.call_scanner import shorten
from deskrl.actor.guest.keysyms import key_name

MAX_WAIT_S = 60.0
"""Longest pause in seconds; longer ones are cut to it."""
MAX_NOTCHES = 100
"""Longest scroll in notches; longer ones are cut to it."""
MAX_REPEATS = 100
"""Largest number of repeats of a key press; larger ones are cut to it."""
_MAX_NUMBER = 1e6
_LONGEST_CHORD = 200
_CHARACTER_KEYS = {" ": "space", "\n": "enter", "\r": "enter", "\t": "tab"}
_DECODER = json.JSONDecoder()
_OBJECT_LINE = re.compile(r"^[ \t]*+(?=\{)", re.MULTILINE)


def decode_object(text: str, position: int = 0) -> tuple[dict[str, Any], int]:
    """Return the JSON object at a position, and the position after it; raises FormatError if there is none."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        raise FormatError("the tool call is not valid JSON") from None
    if not isinstance(value, dict):
        raise FormatError("the tool call is not a JSON object")
    return value, end


def find_object(text: str, position: int = 0) -> int | None:
    """Return the position of the first line from `position` on that begins with a brace; None if there is none."""
    found = _OBJECT_LINE.search(text, position)
    return None if found is None else found.end()


def split_last_object(text: str, types: Collection[str]) -> tuple[str, dict[str, Any]]:
    """Return the text before the last line of a response, and the JSON object that is its last line.

    Args:
        text: response.
        types: values of `type` with which an object is a call, so that it is not part of the text.

    Raises:
        FormatError: the last line is not a JSON object, or an earlier line is a call.
    """
    thought, _, last = text.rstrip().rpartition("\n")
    last = last.lstrip()
    if not last.startswith("{"):
        raise FormatError("the last line of the response is not a tool call")
    value, end = decode_object(last)
    if end != len(last):
        raise FormatError("the last line of the response contains more than a tool call")
    for line in thought.split("\n"):
        if line.startswith("{"):
            try:
                earlier, _ = decode_object(line)
            except FormatError:
                continue
            if isinstance(earlier.get("type"), str) and earlier["type"] in types:
                raise FormatError("the response contains more than one tool call")
    return thought.strip(), value


def check_arguments(values: Mapping[str, Any], known: Collection[str], action: str) -> None:
    """Raise FormatError if an argument has a value although the action does not take it."""
    for name, value in values.items():
        if name not in known and value not in (None, "", [], {}):
            raise FormatError(f"{action}: {shorten(name)} is not an argument of this action")


def check_point(value: Any, name: str, action: str) -> tuple[int, int]:
    """Return a point [x, y], or the centre of a box [left, top, right, bottom]."""
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) not in (2, 4) or not all(_is_number(number) for number in numbers):
        raise _mismatch(value, "a point [x, y]", name, action)
    half = len(numbers) // 2
    return round(sum(numbers[0::2]) / half), round(sum(numbers[1::2]) / half)


def at_point(action: Action, value: Any, name: str, action_name: str) -> PolicyResponse:
    """Return an action at a point, without a thought; where the pointer is, if the value is None."""
    if value is None:
        return PolicyResponse("", action, starts_at_pointer=True)
    x, y = check_point(value, name, action_name)
    return PolicyResponse("", replace(action, x=x, y=y))


def check_number(value: Any, name: str, action: str) -> float:
    """Return a finite number; a text that is a number is accepted too, because models that also write XML do so."""
    written = value
    if isinstance(value, str) and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            value = None
    if not _is_number(value):
        raise _mismatch(written, "a number", name, action)
    return float(value)


def check_seconds(value: Any, name: str, action: str) -> float:
    """Return a duration in seconds, at most `MAX_WAIT_S`."""
    seconds = check_number(value, name, action)
    if seconds < 0:
        raise FormatError(f"{action}: {name} is negative")
    return min(seconds, MAX_WAIT_S)


def check_text(value: Any, name: str, action: str) -> str:
    """Return text that can be stored as UTF-8."""
    if not isinstance(value, str):
        raise _mismatch(value, "text", name, action)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON and Python can write halves of surrogate pairs
        raise FormatError(f"{action}: {name} contains an invalid character") from None
    return value


def check_typed_text(value: Any, name: str, action: str) -> str:
    """Return text that can be typed, with line feeds as its only line breaks."""
    text = check_text(value, name, action).replace("\r\n", "\n").replace("\r", "\n")
    for character in text:
        if not character.isprintable() and character not in "\n\t":
            raise FormatError(f"{action}: {character!r} cannot be typed")
    return text


def check_keys(value: Any, name: str, action: str) -> tuple[str, ...]:
    """Return the keys of a list of names, or of one text such as "ctrl+shift+s"; at least one."""
    parts = value if isinstance(value, list | tuple) else [value]
    if len(parts) > _LONGEST_CHORD or not all(isinstance(part, str) for part in parts):
        raise _mismatch(value, "a list of keys", name, action)
    keys = tuple(key for part in parts for key in parse_chord(part, action))
    if not keys:
        raise FormatError(f"{action} has no key")
    return keys


def parse_chord(written: str, action: str) -> tuple[str, ...]:
    """Return the keys of a text that joins them by plus signs; the last one may be the plus sign itself."""
    if written in _CHARACTER_KEYS:
        return (_CHARACTER_KEYS[written],)
    plain = written.strip()
    if len(plain) > _LONGEST_CHORD:
        raise FormatError(f"{action}: {shorten(plain)} is not a combination of keys")
    if (single := key_name(plain)) is not None:
        return (single,)
    last = ("+",) if plain.endswith("+") else ()
    parts = [part.strip() for part in plain[: len(plain) - len(last)].split("+") if part.strip()]
    keys = []
    for part in parts:
        key = key_name(part)
        if key is None:
            raise FormatError(f"{action}: unknown key {shorten(part)}")
        keys.append(key)
    return (*keys, *last)


def notches(distance: float, unit: float = 1.0) -> int:
    """Return a scroll distance in notches: at least one unless it is 0, at most `MAX_NOTCHES`.

    Args:
        distance: signed distance.
        unit: distance of one notch.
    """
    if distance == 0:
        return 0
    return round(math.copysign(min(max(1, round(abs(distance) / unit)), MAX_NOTCHES), distance))


def scroll_vector(direction: Any, amount: int, action: str) -> tuple[int, int]:
    """Return the notches to the right and down of a scroll in a named direction."""
    vectors = {"up": (0, -amount), "down": (0, amount), "left": (-amount, 0), "right": (amount, 0)}
    if not isinstance(direction, str) or direction.lower() not in vectors:
        raise _mismatch(direction, f"one of {', '.join(vectors)}", "direction", action)
    return vectors[direction.lower()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER


def _mismatch(value: Any, wanted: str, name: str, action: str) -> FormatError:
    """Return the error for an argument of another kind; containers, which may be deeply nested, are not shown."""
    if value is None:
        return FormatError(f"{action} has no {name}")
    is_scalar = isinstance(value, str | bool | float)
    shown = shorten(str(value)) if is_scalar else f"of type {type(value).__name__}"
    return FormatError(f"{action}: {name} {shown} is not {wanted}")
