"""UI-TARS's action grammar: text to `Action` and back. Knows no prompt and no screen: points are the family's own.

    Thought: The form is filled in, so I press Submit.
    Action: click(start_box='(412,230)')

Each family writes points in its own way, and all are understood of each. Parsing forgives what carries no meaning
(spaces, quotes, box and point markup, names of other releases) and refuses the rest with the reason. Nothing is ever
evaluated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from deskrl.actor.actions import Action, ActionKind
from deskrl.core.families import FamilyName

SCROLL_NOTCHES = 5
WAIT_S = 5.0
_FARTHEST = 1e6  # no screen is this wide; far larger numbers would not even be finite

_POINTER_NAMES = {
    "click": ActionKind.CLICK,
    "left_single": ActionKind.CLICK,
    "left_double": ActionKind.DOUBLE_CLICK,
    "right_single": ActionKind.RIGHT_CLICK,
    "hover": ActionKind.MOVE,
}
_POINTER_RENDERED = {
    ActionKind.CLICK: "click",
    ActionKind.DOUBLE_CLICK: "left_double",
    ActionKind.RIGHT_CLICK: "right_single",
    ActionKind.MOVE: "hover",
}
_DIRECTIONS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}

# What models call keys, where it differs from the names that `Action` uses.
_KEY_ALIASES = {
    "arrowleft": "left",
    "arrowright": "right",
    "arrowup": "up",
    "arrowdown": "down",
    "return": "enter",
    "escape": "esc",
    "del": "delete",
    "control": "ctrl",
    "cmd": "super",
    "command": "super",
    "win": "super",
    "meta": "super",
    "option": "alt",
    "page_down": "pagedown",
    "page_up": "pageup",
}
_NAMED_KEYS = frozenset(
    ["ctrl", "shift", "alt", "super", "enter", "tab", "esc", "space", "backspace", "delete", "insert", "home", "end"]
    + ["pageup", "pagedown", "left", "right", "up", "down", "capslock", "print", "menu"]
    + [f"f{number}" for number in range(1, 13)]
)

_THINKING = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_ACTION_LINE = re.compile(r"^\s*Action:", re.MULTILINE)
_ACTION_MARK = re.compile(r"Action:")
_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)
_ARGUMENT = re.compile(
    r"""\s*(\w+)\s*=\s*(?:(?P<quote>['"])(?P<quoted>(?:\\.|[^\\])*?)(?P=quote)|(?P<bare>[(\[<].*?[)\]>]|\w+))\s*(?=,\s*\w+\s*=|$)""",
    re.DOTALL,
)
_MARKUP = re.compile(r"<\|?/?(?:box_start|box_end|point|bbox)\|?>")
_BARE_BOX = re.compile(r"(?<=_box=')\([^'<>]*\)(?=')")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "'": "'", '"': '"', "\\": "\\"}
_NEXT_CALL = re.compile(
    r"\)\s*\n\s*(?:click|left_double|right_single|drag|hotkey|type|scroll|wait|finished|call_user)\s*\("
)


class FormatError(ValueError):
    """Text that is no action of the grammar; the message says why."""


@dataclass(frozen=True)
class Turn:
    """What the policy said: its thought, and one action."""

    thought: str
    action: Action


def parse_turn(text: str) -> Turn:
    """The thought and the action in a policy's answer; raises FormatError for anything else than one action."""
    thinking = _THINKING.match(text)
    if thinking is not None:
        text = text[thinking.end() :]
    marks = list(_ACTION_LINE.finditer(text)) or list(_ACTION_MARK.finditer(text))[:1]
    if not marks:
        raise FormatError('there is no "Action:"')
    call = text[marks[0].end() :]
    if len(marks) > 1 or _NEXT_CALL.search(call):
        raise FormatError("there is more than one action")
    head = text[: marks[0].start()]
    thought = head.partition("Thought:")[2].strip() or head.strip() or (thinking[1].strip() if thinking else "")
    return Turn(thought, parse_action(call))


def parse_action(call: str) -> Action:
    """The action that a call such as `click(start_box='(412,230)')` names."""
    match = _CALL.fullmatch(call)
    if match is None:
        raise FormatError(f"{_short(call)} is not of the form name(argument='value')")
    name, inside = match.groups()
    arguments = _arguments(inside)
    if name in _POINTER_NAMES:
        x, y = _point(arguments, "start_box", name)
        return Action(_POINTER_NAMES[name], x=x, y=y)
    match name:
        case "drag" | "select":
            x, y = _point(arguments, "start_box", name)
            end_x, end_y = _point(arguments, "end_box", name)
            return Action(ActionKind.DRAG, x=x, y=y, end_x=end_x, end_y=end_y)
        case "scroll":
            return _scroll(arguments)
        case "hotkey" | "press":
            return Action(ActionKind.HOTKEY, keys=_keys(arguments.get("key", arguments.get("hotkey", ""))))
        case "type":
            return Action(ActionKind.TYPE, text=_typed(_required(arguments, "content", name)))
        case "wait":
            return Action(ActionKind.WAIT, seconds=WAIT_S)
        case "finished":
            return Action(ActionKind.FINISHED, text=_unescape(arguments.get("content", "")))
        case "call_user" | "error_env":
            return Action(ActionKind.INFEASIBLE)
    raise FormatError(f"there is no action {_short(name)}")


def render_turn(turn: Turn, family: FamilyName) -> str:
    """The text that parses to `turn`: how a scripted solution becomes a demonstration."""
    thought = f"<think>{turn.thought}</think>" if family == "ui_tars_2" else f"Thought: {turn.thought}"
    return f"{thought}\nAction: {render_action(turn.action, family)}"


def render_action(action: Action, family: FamilyName) -> str:
    """The call that parses to `action`. WAIT and SCROLL lose how long and how far: the grammar cannot say it."""
    here = write_point(family, "", action.x, action.y)
    if action.kind in _POINTER_RENDERED:
        return f"{_POINTER_RENDERED[action.kind]}({here})"
    match action.kind:
        case ActionKind.DRAG:
            start = write_point(family, "start", action.x, action.y)
            return f"drag({start}, {write_point(family, 'end', action.end_x, action.end_y)})"
        case ActionKind.SCROLL:
            return f"scroll({here}, direction='{_direction(action)}')"
        case ActionKind.HOTKEY:
            return f"hotkey(key='{' '.join(action.keys)}')"
        case ActionKind.TYPE:
            return f"type(content='{_escape(action.text)}')"
        case ActionKind.WAIT:
            return "wait()"
        case ActionKind.FINISHED:
            return f"finished(content='{_escape(action.text)}')" if action.text else "finished()"
    return "call_user()"


def write_point(family: FamilyName, which: Literal["", "start", "end"], x: int | str, y: int | str) -> str:
    """A point as an argument of a call: a family's way of naming and of writing it; `which` of a drag's two points."""
    match family:
        case "ui_tars_1_0":  # marks that are tokens of their own
            return f"{which or 'start'}_box='<|box_start|>({x},{y})<|box_end|>'"
        case "ui_tars_1_5":
            return f"{which or 'start'}_box='({x},{y})'"
        case "ui_tars_2":
            return f"{which + '_' if which else ''}point='<point>{x} {y}</point>'"


def with_marks(text: str, family: FamilyName) -> str:
    """What the policy wrote, of which decoding left the text: UI-TARS 1.0 marks its points with special tokens."""
    return _BARE_BOX.sub(r"<|box_start|>\g<0><|box_end|>", text) if family == "ui_tars_1_0" else text


def _arguments(inside: str) -> dict[str, str]:
    """Keyword arguments as written, unescaped by those who want that. A value may hold its own quote unescaped."""
    arguments: dict[str, str] = {}
    position = 0
    while inside[position:].strip():
        match = _ARGUMENT.match(inside, position)
        if match is None:
            raise FormatError(f"{_short(inside[position:])} is no argument of the form name='value'")
        value = match["quoted"] if match["quote"] else match["bare"]
        arguments[match[1].replace("point", "box") if match[1] != "point" else "start_box"] = value
        position = match.end()
        if inside[position : position + 1] == ",":
            position += 1
    return arguments


def _required(arguments: dict[str, str], key: str, name: str) -> str:
    if key not in arguments:
        raise FormatError(f"{name} has no {key}")
    return arguments[key]


def _point(arguments: dict[str, str], key: str, name: str) -> tuple[int, int]:
    """A point, or the centre of a box of four numbers."""
    written = _required(arguments, key, name)
    bare = _MARKUP.sub(" ", written).strip()
    numbers = [float(number) for number in _NUMBER.findall(bare)]
    if _NUMBER.sub("", bare).strip("()[], ") or len(numbers) not in (2, 4) or max(map(abs, numbers)) > _FARTHEST:
        raise FormatError(f"{name}: {key} {_short(written)} is no point (x,y)")
    half = len(numbers) // 2
    return round(sum(numbers[0::2]) / half), round(sum(numbers[1::2]) / half)


def _scroll(arguments: dict[str, str]) -> Action:
    x, y = _point(arguments, "start_box", "scroll")
    direction = _required(arguments, "direction", "scroll").strip().lower()
    if direction not in _DIRECTIONS:
        raise FormatError(f"scroll: direction {_short(direction)} is none of {', '.join(_DIRECTIONS)}")
    right, down = _DIRECTIONS[direction]
    return Action(ActionKind.SCROLL, x=x, y=y, scroll_x=right * SCROLL_NOTCHES, scroll_y=down * SCROLL_NOTCHES)


def _direction(action: Action) -> str:
    if action.scroll_x:
        return "right" if action.scroll_x > 0 else "left"
    return "down" if action.scroll_y > 0 else "up"


def _keys(written: str) -> tuple[str, ...]:
    """Key names parted by spaces or plus signs; a lone plus is the key."""
    parts = written.split() if written.strip() in ("", "+") else re.split(r"[\s+]+(?=.)", written.strip())
    keys = tuple(_KEY_ALIASES.get(part.lower(), part.lower()) for part in parts)
    if not keys:
        raise FormatError("hotkey has no key")
    for key in keys:
        if key not in _NAMED_KEYS and not (len(key) == 1 and key.isprintable()):
            raise FormatError(f"hotkey: there is no key {_short(key)}")
    return keys


def _typed(written: str) -> str:
    text = _unescape(written)
    for character in text:
        if not character.isprintable() and character not in "\n\t":
            raise FormatError(f"type: no key enters {character!r}")
    return text


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")


def _unescape(written: str) -> str:
    return _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[0]), written)


def _short(text: str) -> str:
    """A piece of the policy's text for a message: one line, not long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 40 else line[:39] + "…")
