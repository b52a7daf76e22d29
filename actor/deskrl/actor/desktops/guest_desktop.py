"""Desktop operations through deskrl's own guest server: each operation is one request to a native route.

Providers add the lifecycle and the address of the guest server. The policy may control what the guest server answers:
each operation limits the time and the size of its response, and checks its content.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import Address, CommandResult, Desktop, DesktopError
from deskrl.actor.desktops.guest_replies import Acknowledgement, CommandReply, WindowRecord
from deskrl.actor.desktops.http_client import (
    STATUS_BYTES,
    GuestResponse,
    ResponseTooLarge,
    check_response,
    send_request,
)
from deskrl.actor.guest.frame_changes import parse_rows, replace_rows
from deskrl.actor.guest.limits import COMMAND_REPLY_BYTES
from deskrl.actor.image_decoding import ImageError, decode_off_loop
from deskrl.core.config import DesktopConfig

OPEN_TIMEOUT_S = 20.0
"""Time in seconds that the guest waits for the window of a file."""
MARGIN_S = 5.0
"""Time in seconds that the host waits beyond a timeout which the guest itself observes."""
_WINDOWS_BYTES = _BROWSER_BYTES = 1024**2
_FRAME_ID = re.compile(r"[0-9a-z-]{0,64}")
_STOP_TIMEOUT_S = 30.0
"""Time in seconds for the guest to kill processes, which a fork bomb can delay."""


class _Frame(NamedTuple):
    """Frame that was received last."""

    id: str
    """Its id in the guest; empty if the guest cannot send the rows that change."""
    pixels: bytearray


_NO_FRAME = _Frame("", bytearray())


class GuestDesktop(Desktop):
    """Desktop operations on a running guest server.

    Args:
        config: desktop configuration; gives the settle time and its timeout.
    """

    def __init__(self, config: DesktopConfig) -> None:
        self._config = config
        self._frame = _NO_FRAME

    @property
    @abstractmethod
    def address(self) -> Address:
        """Address of the guest server; raises DesktopGone if it does not run."""

    async def check_health(self, timeout_s: float) -> None:
        """Raise DesktopError if the guest server does not respond within `timeout_s`."""
        await self._operate("GET", "health", timeout_s=timeout_s)

    async def is_alive(self) -> bool:
        """Return whether the desktop exists and responds."""
        try:
            await self.check_health(self._config.step_timeout_s)
        except DesktopError:
            return False
        return True

    async def screenshot(self) -> Image.Image:
        """Return the current screen."""
        return await self._screen(lambda known: self._call_screen("GET", f"screenshot?known_frame={known}"))

    async def settle(self, min_quiet_s: float = 0.0) -> Image.Image:
        """Wait until the screen has stopped changing and return a screenshot."""
        quiet_s = max(self._config.settle_quiet_s, min_quiet_s)
        limits = {"quiet_s": quiet_s, "limit_s": self._config.settle_timeout_s}
        return await self._screen(lambda known: self._call_screen("POST", "settle", limits | {"known_frame": known}))

    async def act(self, action: Action) -> None:
        """Execute one action."""
        if action.ends_episode:
            return
        timeout_s = self._config.step_timeout_s + action.seconds + MARGIN_S
        await self._operate("POST", "act", action.to_record(), timeout_s=timeout_s)

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        """Run a command to its end; raises DesktopError if it takes longer than `timeout_s`."""
        arguments = {"command": _as_json(command), "shell": shell, "timeout_s": timeout_s}
        response = await self._call("POST", "execute", arguments, COMMAND_REPLY_BYTES, timeout_s + MARGIN_S)
        reply = response.decode(CommandReply)
        return CommandResult(reply.returncode, reply.output, reply.error)

    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None:
        """Start an application; raises DesktopError if it cannot be started."""
        arguments = {"command": _as_json(command), "shell": shell}
        await self._operate("POST", "launch", arguments, timeout_s=self._config.setup_timeout_s)

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file and create its parent folders."""
        await self._operate("POST", f"write_file?path={quote(path)}", data, timeout_s=self._config.setup_timeout_s)

    async def read_file(self, path: str) -> bytes:
        """Return a file of the desktop."""
        target = f"/deskrl/read_file?path={quote(path)}"
        max_bytes, timeout_s = self._config.max_file_bytes, self._config.evaluate_timeout_s
        try:
            response = await self._request("POST", target, b"", max_bytes, timeout_s)
        except ResponseTooLarge as error:
            raise FileNotFoundError(f"{path}: larger than desktop.max_file_bytes") from error
        if response.status == 404:
            raise FileNotFoundError(path)
        return check_response(response).body

    async def open_path(self, path: str) -> None:
        """Open a file in its default application and wait for the window."""
        arguments = {"path": path, "timeout_s": OPEN_TIMEOUT_S}
        await self._operate("POST", "open_path", arguments, timeout_s=OPEN_TIMEOUT_S + MARGIN_S)

    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None:
        """Wait for a window by its title or class."""
        arguments = {"name": name, "timeout_s": timeout_s}
        await self._operate("POST", "wait_for_window", arguments, timeout_s=timeout_s + MARGIN_S)

    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Raise and focus a window. Does nothing if there is no such window, as in OSWorld."""
        await self._window_operation("activate_window", name, strict=strict, by_class=by_class)

    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Close a window. Does nothing if there is no such window, as in OSWorld."""
        await self._window_operation("close_window", name, strict=strict, by_class=by_class)

    async def allow_terminal(self) -> None:
        """Let Ctrl+Alt+T open a terminal."""
        await self._operate("POST", "allow_terminal", timeout_s=self._config.step_timeout_s)

    async def end_setup(self) -> None:
        """Remember the processes of the setup."""
        await self._operate("POST", "end_setup", timeout_s=self._config.step_timeout_s)

    async def stop_policy_programs(self) -> None:
        """Kill every process that the policy started."""
        await self._operate("POST", "stop_policy_programs", timeout_s=_STOP_TIMEOUT_S)

    async def stop_all_programs(self) -> None:
        """Kill all processes of the session."""
        await self._operate("POST", "stop_all_programs", timeout_s=_STOP_TIMEOUT_S)

    async def redraw(self) -> None:
        """Make every window repaint itself and wait until the screen has settled."""
        await self._operate("POST", "redraw", timeout_s=self._config.step_timeout_s)
        await self.settle()

    async def windows(self) -> list[dict[str, Any]]:
        """Return the windows on the screen with their owners, oldest first."""
        response = await self._call("GET", "windows", b"", _WINDOWS_BYTES, self._config.step_timeout_s)
        return [dict(window) for window in response.decode(list[WindowRecord])]

    async def start_browser(self, command: Sequence[str], events: Sequence[str]) -> None:
        """Start a browser whose DevTools connection only the guest server holds."""
        arguments = {"command": list(command), "events": list(events)}
        await self._operate("POST", "start_browser", arguments, timeout_s=self._config.setup_timeout_s)

    async def call_browser(
        self, method: str, parameters: Mapping[str, Any], session_id: str | None = None
    ) -> dict[str, Any]:
        """Call a DevTools method and return its result."""
        timeout_s = self._config.step_timeout_s
        arguments = {"method": method, "parameters": parameters, "session_id": session_id, "timeout_s": timeout_s}
        response = await self._call("POST", "call_browser", arguments, _BROWSER_BYTES, timeout_s + MARGIN_S)
        return response.decode(dict[str, Any])

    async def browser_events(self) -> list[dict[str, Any]]:
        """Return the first requested events of the browser, oldest first."""
        response = await self._call("GET", "browser_events", b"", _BROWSER_BYTES, self._config.step_timeout_s)
        return response.decode(list[dict[str, Any]])

    async def _window_operation(self, operation: str, name: str, *, strict: bool, by_class: bool) -> None:
        arguments = {"window_name": name, "strict": strict, "by_class": by_class}
        timeout_s = self._config.setup_timeout_s
        check_response(await self._request("POST", f"/setup/{operation}", arguments, STATUS_BYTES, timeout_s))

    async def _screen(self, request: Callable[[str], Awaitable[GuestResponse]]) -> Image.Image:
        """Return the image of a request, which responds with the raw pixels of the screen, or of its changed rows.

        Args:
            request: function of the id of the frame that was received last.
        """
        size = (self._config.width, self._config.height)
        before, self._frame = self._frame, _NO_FRAME  # a failed or concurrent request must not leave half a frame
        frame = _received_frame(await request(before.id), before, size)
        try:
            image = await decode_off_loop(partial(Image.frombytes, "RGB", size, frame.pixels, "raw", "BGRX"))
        except ImageError as error:
            raise DesktopError(f"the guest's screenshot: {error}") from error
        self._frame = frame
        return image

    async def _call_screen(self, method: str, operation: str, body: bytes | dict[str, Any] = b"") -> GuestResponse:
        timeout_s = self._config.settle_timeout_s + self._config.step_timeout_s + MARGIN_S
        return await self._call(method, operation, body, 4 * self._config.width * self._config.height, timeout_s)

    async def _operate(
        self, method: str, operation: str, body: bytes | dict[str, Any] = b"", *, timeout_s: float
    ) -> None:
        """Request an operation that returns nothing."""
        (await self._call(method, operation, body, STATUS_BYTES, timeout_s)).decode(Acknowledgement)

    async def _call(
        self, method: str, operation: str, body: bytes | dict[str, Any], max_bytes: int, timeout_s: float
    ) -> GuestResponse:
        return check_response(await self._request(method, f"/deskrl/{operation}", body, max_bytes, timeout_s))

    async def _request(
        self, method: str, target: str, body: bytes | dict[str, Any], max_bytes: int, timeout_s: float
    ) -> GuestResponse:
        return await send_request(self.address, method, target, body, max_bytes=max_bytes, timeout_s=timeout_s)


def _received_frame(response: GuestResponse, before: _Frame, size: tuple[int, int]) -> _Frame:
    """Return the frame of a response, which has all its rows or those that differ from `before`."""
    num_bytes = 4 * size[0] * size[1]
    reported = (response.headers.get("x-width", "?"), response.headers.get("x-height", "?"))
    rows = response.headers.get("x-rows")
    if reported != (str(size[0]), str(size[1])) or (rows is None and len(response.body) != num_bytes):
        raise DesktopError(
            f"the guest's screenshot has {reported[0]:.20} x {reported[1]:.20} pixels in {len(response.body)} "
            f"bytes, not {size[0]} x {size[1]} in {num_bytes}"
        )
    frame_id = response.headers.get("x-frame", "")
    if not _FRAME_ID.fullmatch(frame_id):
        raise DesktopError(f"the guest's screenshot has the frame id {frame_id[:40]!r}")
    if rows is None:
        return _Frame(frame_id, bytearray(response.body))
    if not before.id:
        raise DesktopError("the guest's screenshot has changed rows of a frame that it has not sent")
    try:
        replace_rows(before.pixels, parse_rows(rows), response.body, 4 * size[0])
    except ValueError as error:
        raise DesktopError(f"the guest's screenshot: {error}") from error
    return _Frame(frame_id, before.pixels)


def _as_json(command: str | Sequence[str]) -> str | list[str]:
    return command if isinstance(command, str) else list(command)
