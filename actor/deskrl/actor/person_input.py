"""Input of a person who plays on a desktop: actions as JSON, checked before they are executed."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.guest.keysyms import key_name

_MAX_WAIT_S = 60.0
_MAX_TEXT_CHARACTERS = 10_000
_MAX_NOTCHES = 100


def read_action(data: bytes, width: int, height: int) -> Action:
    """Read an action of the person from JSON; keys may have any spelling that `keysyms.key_name` knows.

    Args:
        data: record of an action, as `Action.to_record` returns it.
        width: width of the screen in pixels.
        height: height of the screen in pixels.

    Raises:
        ValueError: it is not an action, or one that cannot be executed; the message is one line.
    """
    try:
        action = msgspec.json.decode(data, type=Action)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"not an action: {error}") from error
    if action.has_point and not all(
        0 <= x < width and 0 <= y < height for x, y in ((action.x, action.y), (action.end_x, action.end_y))
    ):
        raise ValueError(f"the point is outside the screen of {width} x {height} pixels")
    if unknown := [key for key in action.keys if key_name(key) is None]:
        raise ValueError(f"unknown key: {unknown[0][:20]}")
    if action.kind is ActionKind.HOTKEY and not action.keys:
        raise ValueError("no key")
    if action.kind is ActionKind.TYPE and not 0 < len(action.text) <= _MAX_TEXT_CHARACTERS:
        raise ValueError(f"text of {len(action.text)} characters, not 1 to {_MAX_TEXT_CHARACTERS}")
    if not 0 <= action.seconds <= _MAX_WAIT_S or action.repeat != 1:
        raise ValueError(f"a duration must be at most {_MAX_WAIT_S:g} s, and no action is repeated")
    if max(abs(action.scroll_x), abs(action.scroll_y)) > _MAX_NOTCHES:
        raise ValueError(f"more than {_MAX_NOTCHES} notches of the wheel")
    return replace(action, keys=tuple(key_name(key) or key for key in action.keys))
