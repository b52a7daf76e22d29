"""What OSWorld's client and task files use of pyautogui, on `Hands`: for the desktop's interpreter called `python`.

Commands such as `python -c "import pyautogui; pyautogui.hotkey('ctrl', 's')"` find this module by that name and start
in a third of the time. It presses what it is asked to, as pyautogui does, and types any text as written, which
pyautogui does not. No fail-safe corner, no pauses but those asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from Xlib import X
from Xlib.display import Display
from Xlib.ext import xtest

from deskrl.actor.guest.hands import Hands
from deskrl.actor.guest.keys import keysym_of_name

FAILSAFE = False
PAUSE = 0.0

_BUTTONS = {"left": 1, "middle": 2, "right": 3, "primary": 1, "secondary": 3}


@cache
def _display() -> Display:
    return Display()


@cache
def _hands() -> Hands:
    width, height = size()
    return Hands(_display(), width, height)


def size() -> tuple[int, int]:
    """The screen's width and height."""
    screen = _display().screen()
    return screen.width_in_pixels, screen.height_in_pixels


def position() -> tuple[int, int]:
    """Where the pointer is."""
    return _hands().position()


def hotkey(*keys: str | Sequence[str], interval: float = 0.0) -> None:
    """Press keys in order and release them in reverse; a list counts as its keys."""
    _hands().hotkey([key for group in keys for key in ([group] if isinstance(group, str) else group)])


def press(keys: str | Sequence[str], presses: int = 1, interval: float = 0.0) -> None:
    """Press and release a key, or one after the other."""
    for _ in range(presses):
        for key in [keys] if isinstance(keys, str) else keys:
            _hands().hotkey([key])
            time.sleep(interval)


def write(message: str | Sequence[str], interval: float = 0.0) -> None:
    """Type a text."""
    if isinstance(message, str):
        _hands().type_text(message)
    else:
        press(message, interval=interval)


typewrite = write


def keyDown(key: str) -> None:
    """Press a key and keep it down."""
    _key(X.KeyPress, key)


def keyUp(key: str) -> None:
    """Release a key."""
    _key(X.KeyRelease, key)


def moveTo(x: Any = None, y: Any = None, duration: float = 0.0, **_: Any) -> None:
    """Move the pointer."""
    _hands().move(*_point(x, y))


def click(x: Any = None, y: Any = None, clicks: int = 1, interval: float = 0.0, button: str = "left", **_: Any) -> None:
    """Click where the pointer is, or at a point."""
    _hands().click(*_point(x, y), button=_BUTTONS[button], times=clicks)


def doubleClick(x: Any = None, y: Any = None, interval: float = 0.0, button: str = "left", **_: Any) -> None:
    """Click twice."""
    click(x, y, clicks=2, button=button)


def tripleClick(x: Any = None, y: Any = None, interval: float = 0.0, button: str = "left", **_: Any) -> None:
    """Click three times."""
    click(x, y, clicks=3, button=button)


def rightClick(x: Any = None, y: Any = None, **_: Any) -> None:
    """Click with the right button."""
    click(x, y, button="right")


def middleClick(x: Any = None, y: Any = None, **_: Any) -> None:
    """Click with the middle button."""
    click(x, y, button="middle")


def mouseDown(x: Any = None, y: Any = None, button: str = "left", **_: Any) -> None:
    """Press a button and keep it down."""
    moveTo(x, y)
    _button(X.ButtonPress, button)


def mouseUp(x: Any = None, y: Any = None, button: str = "left", **_: Any) -> None:
    """Release a button."""
    moveTo(x, y)
    _button(X.ButtonRelease, button)


def dragTo(x: Any, y: Any, duration: float = 0.0, button: str = "left", **_: Any) -> None:
    """Drag from where the pointer is to a point."""
    _hands().drag(*position(), *_point(x, y))


def scroll(clicks: float, x: Any = None, y: Any = None, **_: Any) -> None:
    """Turn the wheel: positive is up."""
    _hands().scroll(*_point(x, y), 0, -round(clicks))


def hscroll(clicks: float, x: Any = None, y: Any = None, **_: Any) -> None:
    """Turn the wheel sideways: positive is right."""
    _hands().scroll(*_point(x, y), round(clicks), 0)


def _point(x: Any, y: Any) -> tuple[int, int]:
    if isinstance(x, (tuple, list)):
        x, y = x
    here = position() if x is None or y is None else (0, 0)
    return round(here[0] if x is None else x), round(here[1] if y is None else y)


def _key(event: int, name: str) -> None:
    keycode = _display().keysym_to_keycode(keysym_of_name(name) or X.NONE)
    if keycode:
        xtest.fake_input(_display(), event, keycode)
        _display().sync()


def _button(event: int, name: str) -> None:
    xtest.fake_input(_display(), event, _BUTTONS[name])
    _display().sync()
