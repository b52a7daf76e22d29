"""Facade over the screen, the input and the windows of one session, used by all routes."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Mapping
from typing import Any

from Xlib.display import Display

from deskrl.actor.guest.command_runner import CommandRunner
from deskrl.actor.guest.framebuffer import Framebuffer
from deskrl.actor.guest.input_device import InputDevice
from deskrl.actor.guest.processes import Process
from deskrl.actor.guest.session import Session
from deskrl.actor.guest.windows import Window, Windows
from deskrl.actor.guest.x_connection import XConnection

BACKGROUND_COLOUR = 0x2E5266
_NEW_WINDOW_TIMEOUT_S = 3.0


class ReconnectingInput:
    """Input device that survives the end of its connection to the X server.

    Args:
        connection: connection to the X server, used by this object only.
        width: screen width in pixels.
        height: screen height in pixels.
    """

    def __init__(self, connection: XConnection, width: int, height: int) -> None:
        self._connection = connection
        self._size = (width, height)
        self._device: tuple[Display, InputDevice] | None = None
        connection.call(self._for_display)

    def act(self, action: Mapping[str, Any]) -> None:
        """Execute one action, given as the record of `deskrl.actor.actions.Action`."""
        self._connection.call(lambda display: self._for_display(display).act(action))

    def position(self) -> tuple[int, int]:
        """Return the position of the pointer in pixels."""
        return self._connection.call(lambda display: self._for_display(display).position())

    def _for_display(self, display: Display) -> InputDevice:
        if self._device is None or self._device[0] is not display:
            self._device = (display, InputDevice(display, *self._size))
        return self._device[1]


class DesktopFacade:
    """Screen, input and windows of one running session."""

    def __init__(
        self,
        framebuffer: Framebuffer,
        input_device: ReconnectingInput,
        windows: Windows,
        commands: CommandRunner,
        session: Session,
    ) -> None:
        self.framebuffer = framebuffer
        self.input_device = input_device
        self.windows = windows
        self.session = session
        self._commands = commands

    def window_records(self) -> list[dict[str, Any]]:
        """Return all windows with their owners, oldest first."""
        windows = self.windows.list()
        owners = self.windows.owners(windows)
        processes = {x_pid: self._process(x_pid) for x_pid in set(owners.values())}
        records = []
        for window in windows:
            process = processes[owners[window.id]]
            is_setup = process is not None and self.session.programs.keeps(process)
            executable = process.executable if process is not None else ""
            records.append(window.to_record() | {"is_setup_program": is_setup, "executable": executable})
        return records

    def allow_terminal(self) -> None:
        """Let Ctrl+Alt+T open a terminal, and wait until the window manager can do so."""
        self.session.allow_terminal()
        self.windows.expect_new_manager()
        while not self.windows.is_manager_ready():
            self.session.check_window_manager()

    def stop_policy_programs(self) -> None:
        """Kill the processes that the policy started and remove their windows."""
        self.session.stop_policy_programs()
        if not self.session.has_ended:
            self.windows.kill_orphans(lambda x_pid: self._is_kept(x_pid))

    def _is_kept(self, x_pid: int) -> bool:
        process = self._process(x_pid)
        return process is not None and self.session.programs.keeps(process)

    def _process(self, x_pid: int) -> Process | None:
        pid = self.session.box.pid_of_x_client(x_pid)
        return None if pid is None else self.session.programs.read(pid)

    def encode_png(self, pixels: bytes) -> bytes:
        """Return `pixels` (BGRX) as PNG, at a low compression level for speed."""
        from PIL import Image

        size = (self.framebuffer.width, self.framebuffer.height)
        file = io.BytesIO()
        Image.frombuffer("RGB", size, pixels, "raw", "BGRX", 0, 1).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def open_path(self, path: str, timeout_s: float) -> bool:
        """Open a file in its default application and wait for a new window or one that takes the file's name as title.

        Returns:
            Whether such a window appeared within `timeout_s`.
        """
        before = self.windows.list()
        name = posixpath.basename(path)
        self._commands.open_with_default(path)

        def is_new(window: Window) -> bool:
            known = [other for other in before if other.id == window.id]
            return not known or (window.title != known[0].title and window.matches(name))

        # An application that already shows the file opens no new window: then accept the existing one.
        opened = self.windows.wait_until(is_new, min(timeout_s, _NEW_WINDOW_TIMEOUT_S))
        if opened is None:
            opened = self.windows.wait_until(lambda shown: is_new(shown) or shown.matches(name), timeout_s)
        return opened is not None
