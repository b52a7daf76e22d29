"""Subset of the pyautogui API that OSWorld's client and task files use, implemented on `InputDevice`.

The desktop's interpreter called `python` imports this module for commands such as
`python -c "import pyautogui; pyautogui.hotkey('ctrl', 's')"`, because it starts in a third of the time and, unlike
pyautogui, types any text as written. There is no fail-safe corner and no implicit pause. The module must keep the name
`pyautogui`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from Xlib import X
from Xlib.display import Display
from Xlib.ext import xtest

from deskrl.actor.guest.input_device import InputDevice
from deskrl.actor.guest.keysyms import keysym_of_name

FAILSAFE = False
PAUSE = 0.0

_BUTTONS = {"left": 1, "middle": 2, "right": 3, "primary": 1, "secondary": 3}


@cache
def _display() -> Display:
    return Display()


@cache
def _input_device() -> InputDevice:
    width, height = size()
    return InputDevice(_display(), width, height)


def size() -> tuple[int, int]:
    """Return the width and height of the screen in pixels."""
    screen = _display().screen()
    return screen.width_in_pixels, screen.height_in_pixels


def position() -> tuple[int, int]:
    """Return the position of the pointer in pixels."""
    return _input_device().position()


def hotkey(*keys: str | Sequence[str], interval: float = 0.0) -> None:
    """Press keys in order and release them in reverse order; a list is replaced by its items."""
    _input_device().hotkey([key for group in keys for key in ([group] if isinstance(group, str) else group)])


def press(keys: str | Sequence[str], presses: int = 1, interval: float = 0.0) -> None:
    """Press and release a key, or several keys one after the other."""
    for _ in range(presses):
        for key in [keys] if isinstance(keys, str) else keys:
            _input_device().hotkey([key])
            time.sleep(interval)


def write(message: str | Sequence[str], interval: float = 0.0) -> None:
    """Type a text, or press the keys of a list."""
    if isinstance(message, str):
        _input_device().type_text(message)
    else:
        press(message, interval=interval)


typewrite = write


def keyDown(key: str) -> None:
    """Press a key without releasing it."""
    _key(X.KeyPress, key)


def keyUp(key: str) -> None:
    """Release a key."""
    _key(X.KeyRelease, key)


def moveTo(x: Any = None, y: Any = None, duration: float = 0.0, **_: Any) -> None:
    """Move the pointer."""
    _input_device().move(*_point(x, y))


def click(x: Any = None, y: Any = None, clicks: int = 1, interval: float = 0.0, button: str = "left", **_: Any) -> None:
    """Click at a point, by default at the pointer's position."""
    _input_device().click(*_point(x, y), button=_BUTTONS[button], times=clicks)


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
    """Press a button without releasing it."""
    moveTo(x, y)
    _button(X.ButtonPress, button)


def mouseUp(x: Any = None, y: Any = None, button: str = "left", **_: Any) -> None:
    """Release a button."""
    moveTo(x, y)
    _button(X.ButtonRelease, button)


def dragTo(x: Any, y: Any, duration: float = 0.0, button: str = "left", **_: Any) -> None:
    """Drag from the pointer's position to a point."""
    _input_device().drag(*position(), *_point(x, y))


def scroll(clicks: float, x: Any = None, y: Any = None, **_: Any) -> None:
    """Turn the wheel; positive values scroll up."""
    _input_device().scroll(*_point(x, y), 0, -round(clicks))


def hscroll(clicks: float, x: Any = None, y: Any = None, **_: Any) -> None:
    """Turn the wheel sideways; positive values scroll right."""
    _input_device().scroll(*_point(x, y), round(clicks), 0)


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
