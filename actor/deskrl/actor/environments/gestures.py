"""Gestures: the names and values under which a configuration maps the policy's actions to those of an environment.

A gesture is named by the kind of the action (`click`, `type`, `wait`, ...), and a key press by its keys (`press left`,
`press ctrl+s`). The table `actions` of a configuration has a template for each gesture: the environment's action as
JSON values, in which a placeholder such as "{x}" stands for a value of the policy's action.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.guest.keysyms import key_name

_PRESS = "press "
_POINT = ("x", "y")
_PLACEHOLDERS: dict[ActionKind, tuple[str, ...]] = {
    ActionKind.CLICK: _POINT,
    ActionKind.DOUBLE_CLICK: _POINT,
    ActionKind.TRIPLE_CLICK: _POINT,
    ActionKind.RIGHT_CLICK: _POINT,
    ActionKind.MIDDLE_CLICK: _POINT,
    ActionKind.MOVE: _POINT,
    ActionKind.DRAG: (*_POINT, "end_x", "end_y"),
    ActionKind.SCROLL: (*_POINT, "scroll_x", "scroll_y"),
    ActionKind.TYPE: ("text",),
    ActionKind.WAIT: ("seconds",),
}
"""Values of each kind of action that has a gesture of its name."""
HORIZONTAL, VERTICAL = ("x", "end_x"), ("y", "end_y")
"""Values that are pixels of the environment's image, from its left and from its top."""


@dataclass(frozen=True)
class Gesture:
    """Action of the policy as an environment sees it."""

    name: str
    values: Mapping[str, float | str]
    """Values by the names of their placeholders; points are pixels of the environment's image."""
    image_size: tuple[int, int]
    """(width, height) of the environment's image in pixels."""


def make_gesture(action: Action, image_size: tuple[int, int]) -> Gesture | None:
    """Return the gesture of an action; None if it has none, or if a point is outside of the image.

    Args:
        action: action whose points are pixels of the environment's image.
        image_size: (width, height) of that image in pixels.
    """
    if action.kind is ActionKind.HOTKEY:
        return Gesture(_PRESS + "+".join(key_name(key) or key for key in action.keys), {}, image_size)
    if action.kind not in _PLACEHOLDERS:
        return None
    values = {name: getattr(action, name) for name in _PLACEHOLDERS[action.kind]}
    width, height = image_size
    is_inside = all(
        0 <= value < (width if name in HORIZONTAL else height)
        for name, value in values.items()
        if name in (*HORIZONTAL, *VERTICAL)
    )
    return Gesture(action.kind.value, values, image_size) if is_inside else None


def check_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of templates with its key presses in their canonical names.

    Raises:
        ValueError: a gesture, a key or a placeholder is unknown.
    """
    checked: dict[str, Any] = {}
    for name, template in table.items():
        canonical, allowed = _canonical(name)
        if unknown := [text for text in placeholders(template) if text not in allowed]:
            names = ", ".join(f"{{{text}}}" for text in allowed) or "none"
            raise ValueError(f"{name}: has no placeholder {{{unknown[0]}}}, but {names}")
        checked[canonical] = template
    return checked


def placeholders(template: Any) -> Iterator[str]:
    """Yield the names of the placeholders in a template."""
    if isinstance(template, Mapping):
        for value in template.values():
            yield from placeholders(value)
    elif isinstance(template, list | tuple):
        for value in template:
            yield from placeholders(value)
    elif (name := placeholder(template)) is not None:
        yield name


def placeholder(value: Any) -> str | None:
    """Return the name of the placeholder that a value of a template is; None for any other value."""
    is_one = isinstance(value, str) and value[:1] == "{" and value[-1:] == "}" and value[1:-1].isidentifier()
    return value[1:-1] if is_one else None


def fill(template: Any, gesture: Gesture) -> Any:
    """Return a template with the values of a gesture in place of its placeholders."""
    if isinstance(template, Mapping):
        return {key: fill(value, gesture) for key, value in template.items()}
    if isinstance(template, list | tuple):
        return [fill(value, gesture) for value in template]
    name = placeholder(template)
    return template if name is None else gesture.values[name]


def _canonical(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the canonical name of a gesture, and the names of its placeholders."""
    if not name.startswith(_PRESS):
        try:
            kind = ActionKind(name)
            return name, _PLACEHOLDERS[kind]
        except (ValueError, KeyError):
            known = ", ".join(_PLACEHOLDERS)
            raise ValueError(f"{name!r} is not a gesture; known are {known}, and keys such as 'press left'") from None
    keys = [(key_name(part), part) for part in name.removeprefix(_PRESS).strip().split("+")]
    if unknown := [part for key, part in keys if key is None]:
        raise ValueError(f"{name!r}: {unknown[0]!r} is not a key; write 'press left', 'press a' or 'press ctrl+s'")
    return _PRESS + "+".join(str(key) for key, _ in keys), ()
