"""Windows of the setup as evidence: titles that an application rewrites, and pixels that it redraws, on demand.

Any program on a desktop can set the title of any window and draw into it, so that neither is evidence by itself. These
functions are called after the policy's programs were stopped. They accept only windows that existed at the end of the
setup and belong to a program of the setup, and they discard what the window showed before: the title is cleared until
the application sets it again, and pixels are redrawn.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any
from weakref import WeakKeyDictionary

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.desktops.base import Desktop

_Window = dict[str, Any]

_XDOTOOL = "/usr/bin/xdotool"
_TIMEOUT_S = 5.0
_NUM_ROUNDS = 3
_QUIET_S = 0.05  # a title that was cleared must stay empty for this time: requests of killed programs may be pending
_REWRITE_S = 1.0
_POLL_S = 0.02

_noted: WeakKeyDictionary[Desktop, frozenset[int]] = WeakKeyDictionary()


async def note_setup_windows(desktop: Desktop) -> None:
    """Remember which windows exist; called at the end of the setup of tasks that use them as evidence."""
    _noted[desktop] = frozenset(window["id"] for window in await desktop.windows())


def has_noted_windows(desktop: Desktop) -> bool:
    """Return whether a window existed at the end of the setup; False also if the provider cannot list windows."""
    return bool(_noted.get(desktop))


async def find_setup_window(desktop: Desktop, executables: Sequence[str]) -> _Window | None:
    """Return the oldest window of the setup whose program has one of these file names; None if there is none."""
    noted = _noted.get(desktop, frozenset())
    for window in await desktop.windows():
        name = PurePosixPath(window["executable"]).name
        if window["id"] in noted and window["is_setup_program"] and name in executables:
            return window
    return None


async def rewritten_title(desktop: Desktop, executables: Sequence[str], keys: Sequence[str]) -> str | None:
    """Return the title that an application of the setup gives its window after `keys` were pressed.

    Args:
        desktop: desktop on which the policy's programs were stopped.
        executables: file names of the application's program, one of which suffices.
        keys: keys on which the application sets the title of its window without changing its state.

    Returns:
        The title; None if there is no such window or the application does not set the title.
    """
    for _ in range(_NUM_ROUNDS):
        window = await find_setup_window(desktop, executables)
        if window is None or not await _raise_and_focus(desktop, window, "set_window", "--name", "", str(window["id"])):
            return None
        await asyncio.sleep(_QUIET_S)
        if await _title(desktop, window):
            continue
        await desktop.act(Action(ActionKind.HOTKEY, keys=tuple(keys)))
        title = await _wait_for_title(desktop, window)
        await asyncio.sleep(_QUIET_S)
        if title and await _title(desktop, window) == title:
            return title
    return None


async def redrawn_image(desktop: Desktop, executables: Sequence[str], keys: Sequence[str]) -> bytes | None:
    """Return the content of a window of the setup as PNG, after `keys` were pressed and all windows were redrawn.

    Args:
        desktop: desktop on which the policy's programs were stopped.
        executables: file names of the application's program, one of which suffices.
        keys: keys that bring the application into a defined view, such as its original size; empty: none.

    Returns:
        The image, cut off at the edges of the screen; None if there is no such window.
    """
    window = await find_setup_window(desktop, executables)
    if window is None or not await _raise_and_focus(desktop, window):
        return None
    if keys:
        await desktop.act(Action(ActionKind.HOTKEY, keys=tuple(keys)))
    await desktop.redraw()
    screen = await desktop.settle()
    left, top = max(window["x"], 0), max(window["y"], 0)
    right = min(window["x"] + window["width"], screen.width)
    bottom = min(window["y"] + window["height"], screen.height)
    if right <= left or bottom <= top:
        return None
    data = io.BytesIO()
    await asyncio.to_thread(screen.crop((left, top, right, bottom)).save, data, "PNG")
    return data.getvalue()


async def _raise_and_focus(desktop: Desktop, window: _Window, *more: str) -> bool:
    """Show, raise and focus a window without the window manager, which the policy may have stopped."""
    number = str(window["id"])
    command = [_XDOTOOL, "windowmap", number, "windowraise", number, "windowfocus", number, *more]
    return (await desktop.execute(command, timeout_s=_TIMEOUT_S)).returncode == 0


async def _title(desktop: Desktop, window: _Window) -> str:
    return next((str(one["title"]) for one in await desktop.windows() if one["id"] == window["id"]), "")


async def _wait_for_title(desktop: Desktop, window: _Window) -> str:
    deadline = time.monotonic() + _REWRITE_S
    while True:
        title = await _title(desktop, window)
        if title or time.monotonic() >= deadline:
            return title
        await asyncio.sleep(_POLL_S)
