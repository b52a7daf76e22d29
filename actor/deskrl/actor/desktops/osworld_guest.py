"""Desktop operations through OSWorld's guest server, or any other server that implements its protocol.

Operations that deskrl's guest server offers as one route are composed here of OSWorld's routes. The screen has settled
when two successive screenshots are equal. Input goes through deskrl's own keyboard and pointer code
(`guest/input_device.py`), which is uploaded once, because OSWorld's typing loses non-ASCII characters and types ">" for
"<". The guest's interpreter called `python` must have Xlib, which is a dependency of pyautogui.

The policy may control what the guest server answers: each operation limits the time and the size of its response.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import Address, CommandResult, Desktop, DesktopError
from deskrl.actor.desktops.guest_replies import CommandReply
from deskrl.actor.desktops.http_client import (
    STATUS_BYTES,
    GuestResponse,
    ResponseTooLarge,
    check_response,
    send_request,
)
from deskrl.actor.desktops.mounts import GUEST_FOLDER
from deskrl.actor.guest.limits import COMMAND_REPLY_BYTES
from deskrl.actor.image_decoding import ImageError, decode_image, decode_off_loop
from deskrl.core.config import DesktopConfig
from deskrl.core.ids import new_id

_UPLOAD_FOLDER = "/tmp/deskrl-input"
_UPLOADED_MODULES = ("input_device.py", "keysyms.py")
_ACT_PROGRAM = f"""
import json, sys
sys.path.insert(0, {_UPLOAD_FOLDER!r})
from Xlib.display import Display
from deskrl.actor.guest.input_device import InputDevice
display = Display()
screen = display.screen()
InputDevice(display, screen.width_in_pixels, screen.height_in_pixels).act(json.loads(sys.argv[1]))
"""
_FORM = "application/x-www-form-urlencoded"
OPEN_TIMEOUT_S = 60.0
"""Time in seconds to wait for the window of a file."""
MARGIN_S = 5.0
"""Time in seconds for which an operation of several requests may exceed its own timeout."""
_SCREENSHOT_BYTES = 64 * 1024**2
_MAX_WINDOWS = 200
_POLL_S = 0.1
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127


class OSWorldGuestDesktop(Desktop):
    """Desktop operations on a running guest server.

    Args:
        config: desktop configuration; gives the timeouts of the operations.
    """

    def __init__(self, config: DesktopConfig) -> None:
        self._config = config
        self._has_input_code = False

    @property
    @abstractmethod
    def address(self) -> Address:
        """Address of the guest server; raises DesktopGone if it does not run."""

    async def wake(self) -> None:
        """Resume an idle desktop that the provider has suspended. Called before each request."""

    async def wait_until_ready(self, deadline_s: float, guest: str) -> None:
        """Wait until a screenshot can be taken.

        Args:
            deadline_s: deadline on the monotonic clock, in seconds.
            guest: name of the guest in the error message.

        Raises:
            DesktopError: no screenshot could be taken before the deadline.
        """
        while True:
            try:
                async with asyncio.timeout(max(_POLL_S, deadline_s - time.monotonic())):
                    await self.screenshot()
                    return
            except (DesktopError, TimeoutError) as error:
                if time.monotonic() > deadline_s:
                    raise DesktopError(f"{guest} does not respond: {error}") from error
            await asyncio.sleep(_POLL_S)

    async def is_alive(self) -> bool:
        """Return whether the desktop exists and responds."""
        try:
            return (await self._send("GET", "/platform", timeout_s=self._config.step_timeout_s)).status == 200
        except DesktopError:
            return False

    async def screenshot(self) -> Image.Image:
        """Return the current screen."""
        timeout_s = self._config.step_timeout_s
        response = check_response(
            await self._send("GET", "/screenshot", max_bytes=_SCREENSHOT_BYTES, timeout_s=timeout_s)
        )
        try:
            return await decode_off_loop(partial(decode_image, response.body), timeout_s)
        except ImageError as error:
            raise DesktopError(f"the guest's screenshot cannot be decoded: {error}") from error

    async def settle(self, min_quiet_s: float = 0.0) -> Image.Image:
        """Wait until two successive screenshots are equal and return the last one."""
        deadline = time.monotonic() + self._config.settle_timeout_s
        last = await self.screenshot()
        while time.monotonic() < deadline:
            await asyncio.sleep(max(self._config.settle_quiet_s, min_quiet_s))
            current = await self.screenshot()
            if await asyncio.to_thread(_are_equal, current, last):
                break
            last = current
        return last

    async def act(self, action: Action) -> None:
        """Execute one action."""
        if action.ends_episode:
            return
        if not self._has_input_code:
            for name in _UPLOADED_MODULES:
                path = f"{_UPLOAD_FOLDER}/deskrl/actor/guest/{name}"
                await self.write_file(path, (GUEST_FOLDER / name).read_bytes())
            self._has_input_code = True
        command = ["python", "-c", _ACT_PROGRAM, json.dumps(action.to_record())]
        result = await self.execute(command, timeout_s=self._config.step_timeout_s + action.seconds)
        if result.returncode != 0:
            raise DesktopError(f"the action failed in the guest: {result.stderr[-300:] or result.stdout[-300:]}")

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        """Run a command to its end; raises DesktopError if it takes longer than `timeout_s`."""
        arguments = {"command": _as_json(command), "shell": shell}
        async with _deadline(timeout_s, f"the command did not finish within {timeout_s:g} s"):
            response = await self._send(
                "POST", "/execute", arguments, max_bytes=COMMAND_REPLY_BYTES, timeout_s=timeout_s + MARGIN_S
            )
        if response.status == 500:
            if "No such file" in response.error:
                return CommandResult(_NOT_FOUND, "", response.error)
            if "Permission denied" in response.error or "temporarily unavailable" in response.error:
                return CommandResult(_NOT_EXECUTABLE, "", response.error)
        reply = check_response(response).decode(CommandReply)
        return CommandResult(reply.returncode, reply.output, reply.error)

    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None:
        """Start an application; raises DesktopError if it cannot be started."""
        arguments = {"command": _as_json(command), "shell": shell}
        check_response(await self._send("POST", "/setup/launch", arguments, timeout_s=self._config.setup_timeout_s))

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file and create its parent folders."""
        boundary = new_id("deskrl")
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file_path"\r\n\r\n{path}\r\n'
        head += f'--{boundary}\r\nContent-Disposition: form-data; name="file_data"; filename="file"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        content_type = f"multipart/form-data; boundary={boundary}"
        timeout_s = self._config.setup_timeout_s
        check_response(await self._send("POST", "/setup/upload", body, content_type, timeout_s=timeout_s))

    async def read_file(self, path: str) -> bytes:
        """Return a file of the desktop."""
        form = urlencode({"file_path": path}).encode()
        max_bytes, timeout_s = self._config.max_file_bytes, self._config.evaluate_timeout_s
        try:
            response = await self._send("POST", "/file", form, _FORM, max_bytes=max_bytes, timeout_s=timeout_s)
        except ResponseTooLarge as error:
            raise FileNotFoundError(f"{path}: larger than desktop.max_file_bytes") from error
        if response.status == 404:
            raise FileNotFoundError(path)
        return check_response(response).body

    async def open_path(self, path: str) -> None:
        """Open a file in its default application and wait for the window."""
        timeout_s = OPEN_TIMEOUT_S + MARGIN_S
        async with _deadline(OPEN_TIMEOUT_S, f"no window opened for {path}"):
            check_response(await self._send("POST", "/setup/open_file", {"path": path}, timeout_s=timeout_s))

    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None:
        """Wait for a window by its title or class."""
        deadline = time.monotonic() + timeout_s
        message = f"no window named {name} within {timeout_s:g} s"
        async with _deadline(timeout_s + MARGIN_S, message):
            while not any(name.lower() in line.lower() for line in await self._window_lines()):
                if time.monotonic() > deadline:
                    raise DesktopError(message)
                await asyncio.sleep(_POLL_S)

    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Raise and focus a window. Does nothing if there is no such window."""
        await self._window_operation("activate_window", name, strict=strict, by_class=by_class)

    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Close a window. Does nothing if there is no such window."""
        await self._window_operation("close_window", name, strict=strict, by_class=by_class)

    async def close_all_windows(self) -> None:
        """Ask every window to close."""
        timeout_s = self._config.setup_timeout_s
        async with _deadline(timeout_s, f"the windows were not closed within {timeout_s:g} s"):
            for line in await self._window_lines():
                await self.execute(["wmctrl", "-i", "-c", line.partition(" ")[0]])

    async def _window_lines(self) -> list[str]:
        """Return wmctrl's list of windows: identifier, desktop, class, host and title, one window per line."""
        listed = await self.execute(shlex.split("wmctrl -l -x"))
        lines = listed.stdout.split("\n", _MAX_WINDOWS)
        return [line for line in lines[:_MAX_WINDOWS] if line]

    async def _window_operation(self, operation: str, name: str, *, strict: bool, by_class: bool) -> None:
        arguments = {"window_name": name, "strict": strict, "by_class": by_class}
        response = await self._send("POST", f"/setup/{operation}", arguments, timeout_s=self._config.setup_timeout_s)
        if response.status != 404:
            check_response(response)

    async def _send(
        self,
        method: str,
        route: str,
        body: bytes | Mapping[str, Any] = b"",
        content_type: str = "application/json",
        *,
        max_bytes: int = STATUS_BYTES,
        timeout_s: float,
    ) -> GuestResponse:
        await self.wake()
        return await send_request(
            self.address, method, route, body, content_type, max_bytes=max_bytes, timeout_s=timeout_s
        )


@asynccontextmanager
async def _deadline(timeout_s: float, message: str) -> AsyncIterator[None]:
    """Raise DesktopError with this message if the block takes longer than `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise DesktopError(message) from error


def _are_equal(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


def _as_json(command: str | Sequence[str]) -> str | list[str]:
    return command if isinstance(command, str) else list(command)
