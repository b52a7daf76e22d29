"""A desktop behind deskrl's own guest server, wherever that runs: every operation is one of its fast routes.

Knows no sandbox and no container: a provider brings the guest up and says where it listens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import Address, CommandResult, Desktop, DesktopError
from deskrl.actor.desktops.client import Reply, checked, request
from deskrl.core.config import DesktopConfig

_OPEN_TIMEOUT_S = 20.0


class GuestDesktop(Desktop):
    """Operations of a running guest; its life is a provider's.

    Args:
        config: patience of the operations.
    """

    def __init__(self, config: DesktopConfig) -> None:
        self._config = config

    @property
    @abstractmethod
    def address(self) -> Address:
        """Where the guest server listens; raises DesktopGone if there is none."""

    async def is_alive(self) -> bool:
        """Whether it still exists and answers."""
        try:
            await self._call("GET", "health")
        except DesktopError:
            return False
        return True

    async def screenshot(self) -> Image.Image:
        """What is on the screen now."""
        return _image(await self._call("GET", "screenshot"))

    async def settle(self, rest_s: float = 0.0) -> Image.Image:
        """Wait until the screen is quiet, then what is on it."""
        rule = {"quiet_s": max(self._config.settle_quiet_s, rest_s), "limit_s": self._config.settle_limit_s}
        return _image(await self._call("POST", "settle", rule))

    async def act(self, action: Action) -> None:
        """Do one action."""
        if action.ends_episode:
            return
        await self._call("POST", "act", action.to_record())

    async def execute(
        self, command: str | Sequence[str], *, shell: bool = False, timeout_s: float = 30.0
    ) -> CommandResult:
        """Run a command to its end; raises DesktopError if it is not over after `timeout_s`."""
        arguments = {"command": _words(command), "shell": shell, "timeout_s": timeout_s}
        done = (await self._call("POST", "execute", arguments)).json()
        return CommandResult(done["returncode"], done.get("output", ""), done.get("error", ""))

    async def launch(self, command: str | Sequence[str], *, shell: bool = False) -> None:
        """Start an application; raises DesktopError if there is none of that name."""
        await self._call("POST", "launch", {"command": _words(command), "shell": shell})

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file, making parent folders."""
        await self._call("POST", f"write_file?path={quote(path)}", data)

    async def read_file(self, path: str) -> bytes:
        """Read a file."""
        reply = await self._request("POST", f"/deskrl/read_file?path={quote(path)}")
        if reply.status == 404:
            raise FileNotFoundError(path)
        return checked(reply).body

    async def open_path(self, path: str) -> None:
        """Open a file with its default application and wait for its window."""
        await self._call("POST", "open_path", {"path": path, "timeout_s": _OPEN_TIMEOUT_S})

    async def wait_for_window(self, name: str, *, timeout_s: float = 20.0) -> None:
        """Wait for a window by its title or class."""
        await self._call("POST", "wait_for_window", {"name": name, "timeout_s": timeout_s})

    async def activate_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Bring a window to the front; without such a window nothing happens, as in OSWorld."""
        await self._on_window("activate_window", name, strict=strict, by_class=by_class)

    async def close_window(self, name: str, *, strict: bool = False, by_class: bool = False) -> None:
        """Close a window; without such a window nothing happens, as in OSWorld."""
        await self._on_window("close_window", name, strict=strict, by_class=by_class)

    async def windows(self) -> list[dict[str, Any]]:
        """The windows on the screen, oldest first: id, title, window_class, x, y, width, height."""
        listed: list[dict[str, Any]] = (await self._call("GET", "windows")).json()
        return listed

    async def _on_window(self, operation: str, name: str, *, strict: bool, by_class: bool) -> None:
        arguments = {"window_name": name, "strict": strict, "by_class": by_class}
        checked(await self._request("POST", f"/setup/{operation}", arguments))

    async def _call(self, method: str, operation: str, body: bytes | dict[str, Any] = b"") -> Reply:
        return checked(await self._request(method, f"/deskrl/{operation}", body))

    async def _request(self, method: str, target: str, body: bytes | dict[str, Any] = b"") -> Reply:
        return await request(self.address, method, target, body)


def _image(reply: Reply) -> Image.Image:
    size = (int(reply.headers["x-width"]), int(reply.headers["x-height"]))
    return Image.frombytes("RGB", size, reply.body, "raw", "BGRX")


def _words(command: str | Sequence[str]) -> str | list[str]:
    return command if isinstance(command, str) else list(command)
