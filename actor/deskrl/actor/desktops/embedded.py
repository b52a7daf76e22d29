"""The provider `embedded`: a desktop in an unprivileged sandbox on this machine. Knows no task and no policy.

Every reset is a new sandbox: nothing of the last task can survive it, and there is no half-clean state to reason about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import CommandResult, Desktop, DesktopError, DesktopGone
from deskrl.actor.desktops.client import Reply, request
from deskrl.actor.desktops.limits import create_groups, remove_groups
from deskrl.actor.desktops.orphans import Record
from deskrl.actor.desktops.sandbox import Sandbox, SandboxSpec
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import new_id

_LOGGER = logging.getLogger(__name__)
_SOCKET_PATH_BYTES = 107
_OPEN_TIMEOUT_S = 20.0
_CLOSE_TIMEOUT_S = 20.0


class EmbeddedDesktop(Desktop):
    """One desktop in a sandbox.

    Args:
        config: size, limits and patience.
        name: its name, unique in the run.
        run_root: folder of all desktops of the run; this one lives below it.
    """

    def __init__(self, config: DesktopConfig, name: str, run_root: Path) -> None:
        self._config = config
        self._folder = run_root.absolute() / name
        self._group = new_id("deskrl")
        self._sandbox: Sandbox | None = None
        if len(bytes(self.socket_path)) > _SOCKET_PATH_BYTES:
            raise UserError(f"{self.socket_path}: too long for the name of a socket", "choose a shorter run_root")

    @property
    def socket_path(self) -> Path:
        """Unix socket on which the guest server speaks HTTP, OSWorld's protocol among it."""
        return self._folder / "guest.sock"

    async def start(self) -> None:
        """Bring it up: returns when a screenshot can be taken."""
        if self._sandbox is not None:
            raise DesktopError("already started")
        groups = create_groups(self._group, self._config.memory_bytes, self._config.max_processes)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        Record.of_this_process(groups.folders).write(self._folder)
        spec = SandboxSpec(
            folder=self._folder,
            width=self._config.width,
            height=self._config.height,
            memory_bytes=self._config.memory_bytes,
            max_processes=self._config.max_processes,
            groups=groups,
        )
        self.socket_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(bytes(self.socket_path))
            listener.listen(64)
            self._sandbox = await Sandbox.spawn(spec, listener)
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                await self._call("GET", "health")
        except (TimeoutError, DesktopError) as error:
            raise DesktopError(f"the desktop did not come up: {error}: {self._sandbox.log_tail}") from error

    async def reset(self) -> None:
        """Back to the first state, in a new sandbox."""
        await self._end()
        await self.start()

    async def close(self) -> None:
        """End it and everything of it."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._end()
                await asyncio.to_thread(self._remove_folder)
        except (OSError, TimeoutError):  # the caller is done with it; `reap_orphans` finds what is left
            _LOGGER.exception("desktop %s did not close", self._folder)

    async def _end(self) -> None:
        if self._sandbox is not None:
            await self._sandbox.kill()
            self._sandbox = None
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(remove_groups, Record.read(self._folder).groups)

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other desktops still live there
            self._folder.parent.rmdir()

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

    async def settle(self) -> Image.Image:
        """Wait until the screen is quiet, then what is on it."""
        rule = {"quiet_s": self._config.settle_quiet_s, "limit_s": self._config.settle_limit_s}
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
        return _checked(reply).body

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
        _checked(await self._request("POST", f"/setup/{operation}", arguments))

    async def _call(self, method: str, operation: str, body: bytes | dict[str, Any] = b"") -> Reply:
        return _checked(await self._request(method, f"/deskrl/{operation}", body))

    async def _request(self, method: str, target: str, body: bytes | dict[str, Any] = b"") -> Reply:
        if self._sandbox is None or not self._sandbox.is_running:
            raise DesktopGone("the desktop is not running")
        return await request(self.socket_path, method, target, body)


def _checked(reply: Reply) -> Reply:
    if reply.status != 200:
        raise DesktopError(f"the guest refused ({reply.status}): {reply.error}")
    return reply


def _image(reply: Reply) -> Image.Image:
    size = (int(reply.headers["x-width"]), int(reply.headers["x-height"]))
    return Image.frombytes("RGB", size, reply.body, "raw", "BGRX")


def _words(command: str | Sequence[str]) -> str | list[str]:
    return command if isinstance(command, str) else list(command)
