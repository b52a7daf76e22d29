"""Wait at the end of a setup until the applications that it started show complete windows.

A window is complete if it is not a splash screen, its visible part shows more than one colour, and neither it nor the
screen changes. Without this wait, a policy would first see an empty desktop, a white window or a splash screen.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from deskrl.actor.desktops.base import Desktop
from deskrl.actor.task import TypedItem
from deskrl.core.config import DesktopConfig

_STARTING_STEPS = ("launch", "open")
_PREFIXES = {"env", "nohup", "setsid", "sudo"}
_NO_WINDOW_EXPECTED = {"bash", "cd", "python", "python3", "sh", "sleep", "socat"}
"""Programs that show no window, or whose arguments decide whether they do."""
_POLL_S = 0.05
_GUEST_POLL_S = 0.3
_GUEST_QUIET_S = 0.3
"""Time without a change on guests that do not report whether their processes are busy."""
_SETUP_FRACTION = 0.9
"""Part of the time limit of the setup after which the wait ends, because exceeding that limit is a fault."""
_POINTER_RADIUS = 32
_MIN_SIDE = 16
_LIST_WINDOWS = """
printf '%s\\n' "$(xprop -root _NET_CLIENT_LIST_STACKING 2>/dev/null | tr -d '\\n')"
wmctrl -lGx | while read -r id rest
do printf '%s|%s\\n' "$(xprop -id "$id" _NET_WM_WINDOW_TYPE _NET_WM_STATE 2>/dev/null | tr -d '\\n')" "$id $rest"
done
"""
"""Shell program for guests whose provider cannot list windows: the ids from the bottom of the stack to its top in one
line, then a line for each window with its type and state and the line of wmctrl."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Window:
    id: int
    title: str
    box: tuple[int, int, int, int]
    """Left, top, right and bottom edge in pixels."""
    is_splash: bool
    is_minimised: bool


def started_programs(steps: Sequence[TypedItem]) -> frozenset[str] | None:
    """Return the file names of the programs that setup steps start and that show a window each.

    Returns:
        None if the steps start no application, in which case there is nothing to wait for.
    """
    if not any(step.type in _STARTING_STEPS for step in steps):
        return None
    if any(step.type == "close_window" for step in steps):
        return frozenset()
    commands = [step.parameters.get("command", "") for step in steps if step.type == "launch"]
    return frozenset(_program(command) for command in commands) - _NO_WINDOW_EXPECTED - {""}


class WindowWait:
    """Wait for the windows of one setup; created before its steps run.

    Args:
        desktop: desktop of the setup.
        task_id: id of the task, for the log.
        steps: setup steps of the task.
        config: time limit of the wait, and how long the screen must not change.
    """

    def __init__(self, desktop: Desktop, task_id: str, steps: Sequence[TypedItem], config: DesktopConfig) -> None:
        self._desktop = desktop
        self._task_id = task_id
        self._programs = started_programs(steps) if config.window_timeout_s > 0 else None
        self._config = config
        self._before: frozenset[int] = frozenset()
        self._began_s = time.monotonic()

    async def begin(self) -> None:
        """Remember which windows exist."""
        if self._programs is not None:
            self._before = frozenset(window.id for window in await self._list())

    async def wait(self) -> None:
        """Return when all windows are complete, or log a warning at the time limit."""
        if self._programs is None:
            return
        poll_s = _POLL_S if self._desktop.can_observe_host else _GUEST_POLL_S
        setup_ends_s = self._began_s + _SETUP_FRACTION * self._config.setup_timeout_s
        deadline_s = min(time.monotonic() + self._config.window_timeout_s, setup_ends_s)
        last: Image.Image | None = None
        while True:
            windows = await self._list()
            missing = self._missing(windows)
            if not missing:
                started_s = time.monotonic()
                screen = await self._desktop.settle(0.0 if self._desktop.can_observe_host else _GUEST_QUIET_S)
                is_quiet = time.monotonic() - started_s < self._config.settle_timeout_s
                is_quiet = is_quiet or (last is not None and await asyncio.to_thread(_are_equal, screen, last))
                last = screen
                if not is_quiet or await self._list() != windows:
                    missing = "the screen changes"
                elif not await asyncio.to_thread(_has_blank_window, screen, windows, self._before):
                    return
                else:
                    missing = "a window shows one colour only"
            if time.monotonic() > deadline_s:
                _log.warning("%s: the episode begins before the windows are complete: %s", self._task_id, missing)
                return
            await asyncio.sleep(poll_s)

    def _new(self, windows: Sequence[_Window]) -> list[_Window]:
        return [window for window in windows if window.id not in self._before]

    def _missing(self, windows: Sequence[_Window]) -> str:
        """Return what is missing before it is worth waiting for a quiet screen; empty if nothing is."""
        new, programs = self._new(windows), self._programs or frozenset()
        if any(window.is_splash for window in new):
            return "a splash screen is shown"
        if len(new) < len(programs):
            return f"{len(new)} new windows for {', '.join(sorted(programs))}"
        return ""

    async def _list(self) -> list[_Window]:
        """Return the windows from the bottom of the stack to its top."""
        if not self._desktop.can_observe_host:
            result = await self._desktop.execute(_LIST_WINDOWS, shell=True, timeout_s=self._config.step_timeout_s)
            return _parse_windows(result.stdout)
        return [
            _Window(
                window["id"],
                window["title"],
                (window["x"], window["y"], window["x"] + window["width"], window["y"] + window["height"]),
                bool(window.get("is_splash")),
                window.get("stack_position", 0) is None,
            )
            for window in sorted(await self._desktop.windows(), key=_stack_position)
        ]


def _program(command: str | Sequence[str]) -> str:
    """Return the file name of the program that a command starts; empty if it cannot be parsed."""
    try:
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    except ValueError:
        return ""
    names = (PurePosixPath(word).name for word in words if "=" not in word and not word.startswith("-"))
    return next((name for name in names if name not in _PREFIXES), "")


def _stack_position(window: Mapping[str, Any]) -> int:
    position = window.get("stack_position")
    return -1 if position is None else int(position)


def _parse_windows(output: str) -> list[_Window]:
    """Parse the output of `_LIST_WINDOWS`; lines of another form are left out."""
    first, *lines = output.splitlines() or [""]
    stack = [int(number, 16) for number in re.findall(r"0x[0-9a-f]+", first)]
    windows = [window for line in lines if (window := _parse_window(line)) is not None]
    return sorted(windows, key=lambda window: stack.index(window.id) if window.id in stack else -1)


def _parse_window(line: str) -> _Window | None:
    properties, _, description = line.partition("|")
    fields = description.split(maxsplit=8)  # id, desktop, x, y, width, height, class, host, title
    try:
        number, x, y, width, height = int(fields[0], 16), *map(int, fields[2:6])
    except (ValueError, IndexError):
        return None
    title = fields[8] if len(fields) > 8 else ""
    box = (x, y, x + width, y + height)
    return _Window(number, title, box, "_SPLASH" in properties, "_STATE_HIDDEN" in properties)


def _has_blank_window(screen: Image.Image, windows: Sequence[_Window], before: Set[int]) -> bool:
    """Return whether the visible part of a window that is not in `before` shows one colour only.

    The pointer, which is in the centre at first, is not counted.
    """
    shown = [window for window in windows if not window.is_minimised]
    for index, window in enumerate(shown):
        visible = Image.new("L", screen.size)
        visible.paste(255, window.box)
        for above in shown[index + 1 :]:
            visible.paste(0, above.box)
        visible.paste(0, _pointer_box(screen))
        left, top, right, bottom = visible.getbbox() or (0, 0, 0, 0)
        is_too_small = right - left < _MIN_SIDE or bottom - top < _MIN_SIDE
        if window.id not in before and not is_too_small and _has_one_colour(screen, visible):
            return True
    return False


def _pointer_box(screen: Image.Image) -> tuple[int, int, int, int]:
    x, y = screen.width // 2, screen.height // 2
    return (x - _POINTER_RADIUS, y - _POINTER_RADIUS, x + _POINTER_RADIUS, y + _POINTER_RADIUS)


def _has_one_colour(screen: Image.Image, mask: Image.Image) -> bool:
    """Return whether all pixels of a non-empty mask have one colour."""
    histogram = screen.histogram(mask)
    return all(sum(map(bool, histogram[start : start + 256])) == 1 for start in range(0, len(histogram), 256))


def _are_equal(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()
