"""Parser of UI-TARS's action languages: splits a response into thought and `Action`.

The releases of UI-TARS write points in different notations, and the parser accepts each of them. It ignores variations
without meaning (spaces, quotes, markup of boxes and points, action names of other releases) and rejects everything else
with a reason. It never evaluates text as code.
"""

from __future__ import annotations

import re

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.action_language import FormatError, PolicyResponse
from deskrl.actor.agent.call_scanner import Call, find_call, has_another_call, scan_call, shorten
from deskrl.actor.guest.keysyms import key_name

SCROLL_NOTCHES = 5
WAIT_S = 5.0
_MAX_COORDINATE = 1e6  # wider than any screen; bounds the numbers that are rounded to integers

_KINDS = {
    "click": ActionKind.CLICK,
    "left_single": ActionKind.CLICK,
    "left_click": ActionKind.CLICK,
    "left_double": ActionKind.DOUBLE_CLICK,
    "double_click": ActionKind.DOUBLE_CLICK,
    "right_single": ActionKind.RIGHT_CLICK,
    "right_click": ActionKind.RIGHT_CLICK,
    "hover": ActionKind.MOVE,
    "mouse_move": ActionKind.MOVE,
    "drag": ActionKind.DRAG,
    "left_click_drag": ActionKind.DRAG,
    "select": ActionKind.DRAG,
    "scroll": ActionKind.SCROLL,
    "hotkey": ActionKind.HOTKEY,
    "press": ActionKind.HOTKEY,
    "type": ActionKind.TYPE,
    "input": ActionKind.TYPE,
    "wait": ActionKind.WAIT,
    "finished": ActionKind.FINISHED,
    "finish": ActionKind.FINISHED,
    "call_user": ActionKind.INFEASIBLE,
    "error_env": ActionKind.INFEASIBLE,
}
POINTER_NAMES = {
    ActionKind.CLICK: "click",
    ActionKind.DOUBLE_CLICK: "left_double",
    ActionKind.RIGHT_CLICK: "right_single",
    ActionKind.MOVE: "hover",
}
"""Names of the actions that only have a point."""
_DIRECTIONS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}

_ARGUMENTS = {
    **dict.fromkeys(
        ["start_box", "start_point", "start", "start_coordinate", "point", "box", "bbox", "position", "coordinate"],
        "start_box",
    ),
    **dict.fromkeys(["end_box", "end_point", "end", "end_coordinate"], "end_box"),
    **dict.fromkeys(["key", "keys", "hotkey", "press"], "key"),
    **dict.fromkeys(["content", "text"], "content"),
    "direction": "direction",
    "x": "x",
    "y": "y",
}
"""Arguments by the names that models use."""
_TAKEN = {
    ActionKind.DRAG: {"start_box", "end_box"},
    ActionKind.SCROLL: {"start_box", "direction", "x", "y"},
    ActionKind.HOTKEY: {"key"},
    ActionKind.TYPE: {"content"},
    ActionKind.FINISHED: {"content"},
    **{kind: {"start_box", "x", "y"} for kind in POINTER_NAMES},
}
"""Arguments by kind of action. The others ignore all arguments: a pause is always `WAIT_S`."""

_THINKING = re.compile(r"\s*+<(think\w*+|thought)>(.*?)</(?:think\w*+|thought)>", re.DOTALL | re.IGNORECASE)
_END_OF_THINKING = re.compile(r"</think\w{0,60}>[ \t]*+\n", re.IGNORECASE)
_THOUGHT = re.compile(r"thought\s{0,3}\*{0,2}[:：]", re.IGNORECASE)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20, 0x3001: 0x2C}
"""Full-width forms, the ideographic space and the ideographic comma, with their ASCII characters."""
_MARKUP = re.compile(r"</?(?:point|bbox|box)>|<\|(?:box|point)_(?:start|end)\|>")
_AXIS = re.compile(r"(?<![a-z])[\"']?[xy][\"']?\s*+[=:]", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_KEY_SEPARATORS = re.compile(r"[\s+,]+")
_POINT_PUNCTUATION = frozenset(" ()[]{},;\"'\n\t")
_LONGEST_POINT = 200
_LONGEST_KEYS = 200
_TWO_WORDS = frozenset(
    [
        *(f"{first} {second}" for first in ("page", "pg") for second in ("up", "down", "dn")),
        *(f"{side} arrow" for side in _DIRECTIONS),
        *(f"arrow {side}" for side in _DIRECTIONS),
        *("back space", "space bar", "caps lock", "num lock", "scroll lock", "print screen", "prt sc"),
        *("windows key", "win key", "context menu", *(f"num {digit}" for digit in range(10))),
    ]
)
"""Names of keys that consist of two words."""
_ESCAPE = re.compile(r"\\(r\\n|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "r\\n": "\n", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


def parse_response(text: str, centre: tuple[int, int] | None = None) -> PolicyResponse:
    """Parse a response.

    Args:
        text: response of the policy.
        centre: see `parse_action`.

    Raises:
        FormatError: the text does not contain exactly one valid action.
    """
    thinking, text = _split_thinking(text)
    label, position = find_call(text)
    call = scan_call(text, position)
    if has_another_call(text, call.end):
        raise FormatError("the response contains more than one action")
    head = text[:label]
    thought = _THOUGHT.search(head)
    said = head if thought is None else head[thought.end() :]
    return PolicyResponse(said.strip(" \t\r\n`*") or thinking, _action(call, centre))


def parse_action(call: str, centre: tuple[int, int] | None = None) -> Action:
    """Parse a call such as `click(start_box='(412,230)')`.

    Args:
        call: text that begins with a call.
        centre: point at which a `scroll` without a point turns the wheel; None: such a call is rejected.

    Raises:
        FormatError: the text does not begin with a valid call.
    """
    return _action(scan_call(call), centre)


def _split_thinking(text: str) -> tuple[str, str]:
    """Return the leading reasoning of a response and the rest. Its opening tag may be part of the prompt."""
    thinking = _THINKING.match(text)
    if thinking is not None:
        return thinking[2].strip(), text[thinking.end() :]
    end = _END_OF_THINKING.search(text)
    if end is None or "<think" in text[: end.start()]:
        return "", text
    rest = text[end.end() :]
    try:
        find_call(rest)
    except FormatError:
        return "", text
    return text[: end.start()].strip(), rest


def _action(call: Call, centre: tuple[int, int] | None) -> Action:
    """Return the action of a call; raises FormatError if an argument is missing, unknown or malformed."""
    kind = _KINDS.get(call.name)
    if kind is None:
        raise FormatError(f"unknown action {shorten(call.name)}")
    arguments = _named_arguments(call, kind)
    match kind:
        case ActionKind.DRAG:
            x, y = _point(_required(arguments, "start_box", call.name), "start_box", call.name)
            end_x, end_y = _point(_required(arguments, "end_box", call.name), "end_box", call.name)
            return Action(kind, x=x, y=y, end_x=end_x, end_y=end_y)
        case ActionKind.SCROLL:
            return _scroll(arguments, centre)
        case ActionKind.HOTKEY:
            return Action(kind, keys=_keys(arguments.get("key", "")))
        case ActionKind.TYPE:
            return Action(kind, text=_typed(_required(arguments, "content", call.name)))
        case ActionKind.WAIT:
            return Action(kind, seconds=WAIT_S)
        case ActionKind.FINISHED:
            return Action(kind, text=_unescape(arguments.get("content", "")))
        case ActionKind.INFEASIBLE:
            return Action(kind)
    x, y = _point(_required(arguments, "start_box", call.name), "start_box", call.name)
    return Action(kind, x=x, y=y)


def _named_arguments(call: Call, kind: ActionKind) -> dict[str, str]:
    """Return the arguments by their names in the language, with unnamed ones assigned by the kind of the action."""
    taken = _TAKEN.get(kind)
    if taken is None:
        return {}
    arguments: dict[str, str] = {}
    for written, value in call.arguments.items():
        name = _ARGUMENTS.get(written, written) if written else ""
        if not written:
            arguments |= _unnamed_arguments(value, kind)
        elif name in taken and name not in arguments:
            arguments[name] = value
        elif value.strip():
            reason = "is given twice" if name in taken else "is not an argument of this action"
            raise FormatError(f"{call.name}: {shorten(written)} {reason}")
    if "x" in arguments and "y" in arguments:
        arguments["start_box"] = f"{arguments['x']} {arguments['y']}"
    return arguments


def _unnamed_arguments(value: str, kind: ActionKind) -> dict[str, str]:
    """Return the named arguments that unnamed ones stand for, such as `drag((1,2), (3,4))` or `scroll('down')`."""
    match kind:
        case ActionKind.DRAG:
            numbers = _NUMBER.findall(value)
            half = len(numbers) // 2
            if len(numbers) not in (4, 8):
                raise FormatError(f"drag: {shorten(value)} is not two points")
            return {"start_box": " ".join(numbers[:half]), "end_box": " ".join(numbers[half:])}
        case ActionKind.SCROLL:
            point, _, direction = f" {value}".rpartition(" ")
            return {"start_box": point, "direction": direction}
        case ActionKind.HOTKEY:
            return {"key": value}
        case ActionKind.TYPE | ActionKind.FINISHED:
            return {"content": value}
    return {"start_box": value}


def _required(arguments: dict[str, str], key: str, name: str) -> str:
    if key not in arguments:
        raise FormatError(f"{name} has no {key}")
    return arguments[key]


def _point(written: str, key: str, name: str) -> tuple[int, int]:
    """Return a point, or the centre of a box of four numbers."""
    bare = _AXIS.sub(" ", _MARKUP.sub(" ", written[:_LONGEST_POINT].translate(_FULL_WIDTH)))
    numbers = [float(number) for number in _NUMBER.findall(bare)]
    is_valid = len(written) <= _LONGEST_POINT and len(numbers) in (2, 4) and max(map(abs, numbers)) <= _MAX_COORDINATE
    if not is_valid or not _POINT_PUNCTUATION.issuperset(_NUMBER.sub("", bare)):
        raise FormatError(f"{name}: {key} {shorten(written)} is not a point (x,y)")
    half = len(numbers) // 2
    return round(sum(numbers[0::2]) / half), round(sum(numbers[1::2]) / half)


def _scroll(arguments: dict[str, str], centre: tuple[int, int] | None) -> Action:
    written = arguments.get("start_box", "")
    if not written.strip() and centre is not None:
        x, y = centre
    else:
        x, y = _point(_required(arguments, "start_box", "scroll"), "start_box", "scroll")
    direction = _required(arguments, "direction", "scroll").translate(_FULL_WIDTH).strip().lower()
    if direction not in _DIRECTIONS:
        raise FormatError(f"scroll: direction {shorten(direction)} is not one of {', '.join(_DIRECTIONS)}")
    right, down = _DIRECTIONS[direction]
    return Action(ActionKind.SCROLL, x=x, y=y, scroll_x=right * SCROLL_NOTCHES, scroll_y=down * SCROLL_NOTCHES)


def direction_name(action: Action) -> str:
    """Return the direction of a scroll."""
    if action.scroll_x:
        return "right" if action.scroll_x > 0 else "left"
    return "down" if action.scroll_y > 0 else "up"


def _keys(written: str) -> tuple[str, ...]:
    """Split key names at spaces, plus signs, commas and hyphens; a separator at the end is itself a key."""
    plain = _unescape(written).translate(_FULL_WIDTH).strip()
    if len(plain) > _LONGEST_KEYS:
        raise FormatError(f"hotkey: {shorten(plain)} is not a list of keys")
    if len(plain) > 2 and (plain[0], plain[-1]) in (("[", "]"), ("(", ")")):
        plain = " ".join(part.strip(" '\"") or part.strip() for part in plain[1:-1].split(","))
    last = plain[-1:] if plain[-1:] in ("+", ",", "-") else ""
    parts = [part for part in _KEY_SEPARATORS.split(plain[: len(plain) - len(last)]) if part]
    keys = tuple(key for part in _join_split_names(parts) for key in _key_names(part))
    keys += (last,) if last else ()
    if not keys:
        raise FormatError("hotkey has no key")
    return keys


def _join_split_names(parts: list[str]) -> list[str]:
    """Join names of keys that were split at a space, such as "page down"; two keys are never one name otherwise."""
    joined: list[str] = []
    for part in parts:
        if joined and f"{joined[-1]} {part}".lower() in _TWO_WORDS:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _key_names(part: str) -> tuple[str, ...]:
    """Return the keys of one word: a key in any spelling, or keys that are joined by hyphens or underscores."""
    bare = part if len(part) == 1 else part.strip("<>'\"{}") or part
    for keys in (bare.split("-"), [bare], bare.split("_")):
        names = tuple(name for key in keys if (name := key_name(key)) is not None)
        if len(names) == len(keys):
            return names
    raise FormatError(f"hotkey: unknown key {shorten(part)}")


def _typed(written: str) -> str:
    text = _unescape(written)
    for character in text:
        if not character.isprintable() and character not in "\n\t":
            raise FormatError(f"type: {character!r} cannot be typed")
    return text


def escape(text: str) -> str:
    """Return text as the content of a quoted argument."""
    return text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")


def _unescape(written: str) -> str:
    """Return text without its escapes and with line feeds as its only line breaks; unknown escapes are kept."""
    text = _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[0]), written)
    return text.replace("\r\n", "\n").replace("\r", "\n")
