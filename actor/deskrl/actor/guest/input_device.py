"""Synthetic keyboard and pointer input through the X server's XTEST extension.

Any Unicode text is typed as written: a character that the keyboard layout lacks is temporarily mapped to an unused
keycode. Such keycodes are reused in turn, so that a mapping is replaced as late as possible, because applications read
new mappings asynchronously.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from Xlib import XK, X
from Xlib.display import Display
from Xlib.ext import xtest

from deskrl.actor.guest.keysyms import keysym_of_character, keysym_of_name

_BUTTON_LEFT, _BUTTON_MIDDLE, _BUTTON_RIGHT = 1, 2, 3
_WHEEL_UP, _WHEEL_DOWN, _WHEEL_LEFT, _WHEEL_RIGHT = 4, 5, 6, 7
_DRAG_MOVES = 12
_DRAG_MOVE_S = 0.012
_DOUBLE_CLICK_S = 0.55  # slightly longer than the longest double-click time in use
_DOUBLE_CLICK_PIXELS = 8
_BETWEEN_CLICKS_S = 0.03
"""Pause between the clicks of a double click: Chromium merges two presses within one millisecond into one."""
_REMAP_S = 0.25
"""Time that applications get to process typed keys before their mappings are replaced."""
_MAX_NOTCHES = 100
_MAX_REPEATS = 100


class InputDevice:
    """Keyboard and pointer over one persistent connection to the X server. Thread-safe.

    Args:
        display: connection to the X server, used by this object only.
        width: screen width in pixels.
        height: screen height in pixels.
    """

    def __init__(self, display: Display, width: int, height: int) -> None:
        self._display = display
        self._width, self._height = width, height
        self._lock = threading.RLock()
        self._last_click = (0.0, 0, 0)
        first = display.display.info.min_keycode
        count = display.display.info.max_keycode - first + 1
        self._keys: dict[int, tuple[int, bool]] = {}
        self._temporary: OrderedDict[int, int | None] = OrderedDict()
        for keycode, symbols in enumerate(display.get_keyboard_mapping(first, count), start=first):
            if not any(symbols):
                self._temporary[keycode] = None
            for shifted, symbol in enumerate(symbols[:2]):
                if symbol:
                    self._keys.setdefault(symbol, (keycode, bool(shifted)))
        self._shift = self._keys[XK.XK_Shift_L][0]

    def act(self, action: Mapping[str, Any]) -> None:
        """Execute one action, given as the record of `deskrl.actor.actions.Action`."""
        keys, seconds = action.get("keys", ()), float(action.get("seconds", 0.0))
        with self._lock:
            match action["kind"]:
                case "hotkey":
                    for _ in range(min(int(action.get("repeat", 1)), _MAX_REPEATS)):
                        self.hotkey(keys, seconds)
                case "type":
                    self.type_text(action.get("text", ""))
                case "wait":
                    time.sleep(seconds)
                case _:
                    with self._held(keys):
                        self._point(action)

    def _point(self, action: Mapping[str, Any]) -> None:
        """Execute an action of the pointer."""
        at = (int(action.get("x", 0)), int(action.get("y", 0)))
        match action["kind"]:
            case "click":
                self.click(*at)
            case "double_click":
                self.click(*at, times=2)
            case "triple_click":
                self.click(*at, times=3)
            case "right_click":
                self.click(*at, button=_BUTTON_RIGHT)
            case "middle_click":
                self.click(*at, button=_BUTTON_MIDDLE)
            case "move":
                self.move(*at)
            case "drag":
                self.drag(*at, int(action.get("end_x", 0)), int(action.get("end_y", 0)))
            case "scroll":
                self.scroll(*at, int(action.get("scroll_x", 0)), int(action.get("scroll_y", 0)))
            case kind:
                raise ValueError(f"unknown action kind: {kind}")

    def position(self) -> tuple[int, int]:
        """Return the position of the pointer in pixels."""
        with self._lock:
            pointer = self._display.screen().root.query_pointer()
        return pointer.root_x, pointer.root_y

    def move(self, x: int, y: int) -> None:
        """Move the pointer; positions outside the screen are clamped to its edge."""
        x, y = min(max(x, 0), self._width - 1), min(max(y, 0), self._height - 1)
        xtest.fake_input(self._display, X.MotionNotify, x=x, y=y)
        self._display.sync()

    def click(self, x: int, y: int, *, button: int = _BUTTON_LEFT, times: int = 1) -> None:
        """Press and release a button `times` times.

        A click near the previous click is delayed until applications no longer interpret both as a double click.
        """
        clicked_at, last_x, last_y = self._last_click
        if button == _BUTTON_LEFT and max(abs(x - last_x), abs(y - last_y)) <= _DOUBLE_CLICK_PIXELS:
            time.sleep(max(0.0, clicked_at + _DOUBLE_CLICK_S - time.monotonic()))
        self.move(x, y)
        for repeat in range(times):
            if repeat:
                time.sleep(_BETWEEN_CLICKS_S)
            self._click_button(button)
            self._display.sync()
        if button == _BUTTON_LEFT:
            self._last_click = (time.monotonic(), x, y)

    def drag(self, x: int, y: int, end_x: int, end_y: int) -> None:
        """Press the left button at (x, y), move to (end_x, end_y) in several steps, and release."""
        self.move(x, y)
        xtest.fake_input(self._display, X.ButtonPress, _BUTTON_LEFT)
        try:
            for step in range(1, _DRAG_MOVES + 1):
                self.move(x + (end_x - x) * step // _DRAG_MOVES, y + (end_y - y) * step // _DRAG_MOVES)
                time.sleep(_DRAG_MOVE_S)
        finally:
            xtest.fake_input(self._display, X.ButtonRelease, _BUTTON_LEFT)
            self._display.sync()

    def scroll(self, x: int, y: int, notches_x: int, notches_y: int) -> None:
        """Turn the wheel at (x, y); positive values scroll right and down."""
        self.move(x, y)
        for notches, backward, forward in ((notches_y, _WHEEL_UP, _WHEEL_DOWN), (notches_x, _WHEEL_LEFT, _WHEEL_RIGHT)):
            for _ in range(min(abs(notches), _MAX_NOTCHES)):
                self._click_button(forward if notches > 0 else backward)
        self._display.sync()

    def hotkey(self, names: Sequence[str], hold_s: float = 0.0) -> None:
        """Press keys in order, hold them, and release them in reverse order.

        If a name is unknown, no key is pressed.
        """
        with self._held(names):
            time.sleep(hold_s)

    @contextmanager
    def _held(self, names: Sequence[str]) -> Iterator[None]:
        """Hold keys during a context; none of them if a name is unknown."""
        symbols = [symbol for name in names if (symbol := keysym_of_name(name)) is not None]
        if len(symbols) != len(names):
            symbols = []
        self._map_symbols(symbols)
        pressed: list[int] = []
        try:
            for symbol in symbols:
                keycode, shifted = self._keys[symbol]
                if shifted and self._shift not in pressed:
                    self._press(self._shift, pressed)
                self._press(keycode, pressed)
            self._display.sync()
            yield
        finally:
            self._release(pressed)
            self._display.sync()

    def type_text(self, text: str) -> None:
        """Type text; newlines are typed as Return, and control characters without a key are skipped."""
        symbols = [symbol for character in text if (symbol := keysym_of_character(character)) is not None]
        for start in range(0, len(symbols), len(self._temporary)):  # one batch per set of temporary keycodes
            batch = symbols[start : start + len(self._temporary)]
            self._map_symbols(batch)
            for symbol in batch:
                keycode, shifted = self._keys[symbol]
                pressed: list[int] = []
                if shifted:
                    self._press(self._shift, pressed)
                self._press(keycode, pressed)
                self._release(pressed)
            self._display.sync()

    def _press(self, keycode: int, pressed: list[int]) -> None:
        xtest.fake_input(self._display, X.KeyPress, keycode)
        pressed.append(keycode)

    def _release(self, pressed: list[int]) -> None:
        for keycode in reversed(pressed):
            xtest.fake_input(self._display, X.KeyRelease, keycode)

    def _click_button(self, button: int) -> None:
        xtest.fake_input(self._display, X.ButtonPress, button)
        xtest.fake_input(self._display, X.ButtonRelease, button)

    def _map_symbols(self, symbols: Iterable[int]) -> None:
        """Map each symbol without a keycode to a temporary keycode, the least recently used first."""
        wanted = dict.fromkeys(symbols)
        for symbol in wanted:
            if symbol in self._keys and self._keys[symbol][0] in self._temporary:
                self._temporary.move_to_end(self._keys[symbol][0])
        changed: dict[int, int] = {}
        must_wait = False
        for symbol in wanted:
            if symbol not in self._keys:
                keycode, replaced = self._temporary.popitem(last=False)
                if replaced is not None:
                    del self._keys[replaced]
                    must_wait = True
                changed[keycode] = self._temporary[keycode] = symbol
                self._keys[symbol] = (keycode, False)
        if must_wait:
            time.sleep(_REMAP_S)
        for run in _consecutive(sorted(changed)):
            self._display.change_keyboard_mapping(run[0], [[changed[keycode]] * 2 for keycode in run])
        self._display.sync()


def _consecutive(numbers: Iterable[int]) -> list[list[int]]:
    """Split ascending numbers into runs without gaps; each run needs one request and one notification."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
