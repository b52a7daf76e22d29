"""A desktop behind OSWorld's own guest server, or any other that speaks its protocol. Knows no provider.

What deskrl's guest does by one route is put together here from OSWorld's: a screen is settled when two screenshots are
alike, and input goes through deskrl's own keyboard and pointer (`guest/hands.py`), brought over once, because
OSWorld's way of typing loses what is not ASCII and types ">" for "<". The guest's interpreter called `python` must
have Xlib, which pyautogui brings.
"""

from __future__ import annotations

import asyncio
import io
import json
import shlex
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image, UnidentifiedImageError

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import Address, CommandResult, Desktop, DesktopError
from deskrl.actor.desktops.client import Reply, checked, request
from deskrl.core.config import DesktopConfig
from deskrl.core.ids import new_id

_GUEST_CODE = Path(__file__).resolve().parent.parent / "guest"
_PACKAGE = "/tmp/deskrl-hands"
_MODULES = {"hands.py": "deskrl/actor/guest/hands.py", "keys.py": "deskrl/actor/guest/keys.py"}
_ACT = f"""
import json, sys
sys.path.insert(0, {_PACKAGE!r})
from Xlib.display import Display
from deskrl.actor.guest.hands import Hands
display = Display()
screen = display.screen()
Hands(display, screen.width_in_pixels, screen.height_in_pixels).act(json.loads(sys.argv[1]))
"""
_FORM = "application/x-www-form-urlencoded"
_OPEN_TIMEOUT_S = 60.0
_POLL_S = 0.1
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127


class OSWorldGuestDesktop(Desktop):
    """Operations of a running guest; its life is a provider's.

    Args:
        config: patience of the operations.
    """

    def __init__(self, config: DesktopConfig) -> None:
        self._config = config
        self._has_hands = False

    @property
    @abstractmethod
    def address(self) -> Address:
        """Where the guest server listens; raises DesktopGone if there is none."""

    async def wake(self) -> None:
        """Called before each request: a provider that lets an idle desktop sleep wakes it."""

    async def answer_by(self, deadline_s: float, whose: str) -> None:
        """Wait until a screenshot can be taken; raises DesktopError if none can by `deadline_s`, naming the guest."""
        while True:
            try:
                async with asyncio.timeout(max(_POLL_S, deadline_s - time.monotonic())):
                    await self.screenshot()
                    return
            except (DesktopError, TimeoutError) as error:
                if time.monotonic() > deadline_s:
                    raise DesktopError(f"the guest {whose} does not answer: {error}") from error
            await asyncio.sleep(_POLL_S)

    async def is_alive(self) -> bool:
        """Whether it still exists and answers."""
        try:
            return (await self._send("GET", "/platform")).status == 200
        except DesktopError:
            return False

    async def screenshot(self) -> Image.Image:
        """What is on the screen now."""
        reply = checked(await self._send("GET", "/screenshot"))
        try:
            return Image.open(io.BytesIO(reply.body)).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DesktopError("the guest's screenshot is no picture") from error

    async def settle(self, rest_s: float = 0.0) -> Image.Image:
        """Wait until two screenshots in a row are alike, then what is on them."""
        deadline = time.monotonic() + self._config.settle_limit_s
        last = await self.screenshot()
        while time.monotonic() < deadline:
            await asyncio.sleep(max(self._config.settle_quiet_s, rest_s))
            current = await self.screenshot()
            if current.tobytes() == last.tobytes():
                break
            last = current
        return last

    async def act(self, action: Action) -> None:
        """Do one action."""
        if action.ends_episode:
            return
        if not self._has_hands:
            for name, place in _MODULES.items():
                await self.write_file(f"{_PACKAGE}/{place}", (_GUEST_CODE / name).read_bytes())
            self._has_hands = True
        command = ["python", "-c", _ACT, json.dumps(action.to_record())]
        done = await self.execute(command, timeout_s=self._config.step_timeout_s)
        if done.returncode != 0:
            raise DesktopError(f"the guest cannot act: {done.stderr[-300:] or done.stdout[-300:]}")

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        """Run a command to its end; raises DesktopError if it is not over after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._send("POST", "/execute", {"command": _words(command), "shell": shell})
        except TimeoutError as error:
            raise DesktopError(f"not over after {timeout_s:g} s") from error
        if reply.status == 500 and "No such file" in reply.error:
            return CommandResult(_NOT_FOUND, "", reply.error)
        if reply.status == 500 and ("Permission denied" in reply.error or "temporarily unavailable" in reply.error):
            return CommandResult(_NOT_EXECUTABLE, "", reply.error)
        done = checked(reply).json()
        return CommandResult(done["returncode"], done["output"], done["error"])

    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None:
        """Start an application; raises DesktopError if there is none of that name."""
        checked(await self._send("POST", "/setup/launch", {"command": _words(command), "shell": shell}))

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file, making parent folders."""
        boundary = new_id("deskrl")
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file_path"\r\n\r\n{path}\r\n'
        head += f'--{boundary}\r\nContent-Disposition: form-data; name="file_data"; filename="file"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        checked(await self._send("POST", "/setup/upload", body, kind))

    async def read_file(self, path: str) -> bytes:
        """Read a file."""
        reply = await self._send("POST", "/file", urlencode({"file_path": path}).encode(), _FORM)
        if reply.status == 404:
            raise FileNotFoundError(path)
        return checked(reply).body

    async def open_path(self, path: str) -> None:
        """Open a file with its default application and wait for its window."""
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                checked(await self._send("POST", "/setup/open_file", {"path": path}))
        except TimeoutError as error:
            raise DesktopError(f"no window came for {path}") from error

    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None:
        """Wait for a window by its title or class."""
        deadline = time.monotonic() + timeout_s
        while not any(name.lower() in line.lower() for line in await self._window_lines()):
            if time.monotonic() > deadline:
                raise DesktopError("no such window")
            await asyncio.sleep(_POLL_S)

    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Bring a window to the front; without such a window nothing happens."""
        await self._on_window("activate_window", name, strict=strict, by_class=by_class)

    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Close a window; without such a window nothing happens."""
        await self._on_window("close_window", name, strict=strict, by_class=by_class)

    async def close_all_windows(self) -> None:
        """Ask every window to close."""
        for line in await self._window_lines():
            await self.execute(["wmctrl", "-i", "-c", line.split()[0]])

    async def _window_lines(self) -> list[str]:
        """What wmctrl lists: identifier, desktop, class, host and title of each window."""
        listed = await self.execute(shlex.split("wmctrl -l -x"))
        return listed.stdout.splitlines()

    async def _on_window(self, operation: str, name: str, *, strict: bool, by_class: bool) -> None:
        arguments = {"window_name": name, "strict": strict, "by_class": by_class}
        reply = await self._send("POST", f"/setup/{operation}", arguments)
        if reply.status != 404:
            checked(reply)

    async def _send(
        self, method: str, route: str, body: bytes | dict[str, Any] = b"", kind: str = "application/json"
    ) -> Reply:
        await self.wake()
        return await request(self.address, method, route, body, kind)


def _words(command: str | Sequence[str]) -> str | list[str]:
    return command if isinstance(command, str) else list(command)
