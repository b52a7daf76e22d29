"""Provider `remote`: guest servers that already run, at configured addresses.

An address serves one desktop at a time, across all processes of the run (`guest_locks`). The initial state is restored
by a command of the user. Without such a command a reset closes the windows, and files remain.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import cache
from pathlib import Path
from typing import IO, Any

from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.guest_locks import acquire_any
from deskrl.actor.desktops.osworld_guest import OSWorldGuestDesktop
from deskrl.actor.desktops.provider import DesktopProvider
from deskrl.actor.desktops.subprocesses import read_output
from deskrl.core.addresses import HostPort
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError

_log = logging.getLogger(__name__)
_TIMEOUT_FRACTION = 0.95  # fail with a specific error shortly before the caller's deadline cancels the start


class RemoteDesktop(OSWorldGuestDesktop):
    """One desktop at any free one of the configured addresses.

    Args:
        config: desktop configuration; its section `remote` lists the addresses.
        run_root: folder of all desktops of the run, which contains the lock files.
    """

    def __init__(self, config: DesktopConfig, run_root: Path) -> None:
        super().__init__(config)
        self._run_root = run_root
        self._acquired: tuple[HostPort, IO[bytes]] | None = None

    @property
    def address(self) -> Address:
        """Address of the guest server."""
        if self._acquired is None:
            raise DesktopGone("no guest is acquired")
        return self._acquired[0].host, self._acquired[0].port

    async def start(self) -> None:
        """Acquire a free address and wait until its guest server responds."""
        deadline_s = time.monotonic() + _TIMEOUT_FRACTION * self._config.start_timeout_s
        if self._acquired is None:
            addresses = self._config.remote.addresses
            self._run_root.mkdir(parents=True, exist_ok=True, mode=0o700)
            locks = [self._run_root / f"remote-{address.replace('/', '_')}.lock" for address in addresses]
            index, lock = await acquire_any(locks, deadline_s, "remote guests")
            self._acquired = addresses[index], lock
        await self.wait_until_ready(deadline_s, f"the guest at {self._acquired[0]}")

    async def reset(self) -> None:
        """Restore the initial state by the reset command, or close all windows if none is configured."""
        if self._acquired is None:
            await self.start()
        if self._config.remote.reset_command:
            await self._run_reset_command()
            self._has_input_code = False
            await self.start()
        else:
            _warn_of_remaining_files()
            await self.close_all_windows()

    async def close(self) -> None:
        """Release the address."""
        if self._acquired is not None:
            self._acquired[1].close()
            self._acquired = None

    async def _run_reset_command(self) -> None:
        assert self._acquired is not None
        guest = self._acquired[0]
        command = self._config.remote.reset_command.replace("{host}", guest.host).replace("{port}", str(guest.port))
        process = await asyncio.create_subprocess_shell(
            command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        timeout_s = self._config.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                output = await read_output(process)
        except TimeoutError as error:
            raise DesktopError(f"desktop.remote.reset_command did not finish within {timeout_s:g} s") from error
        if process.returncode != 0:
            tail = " ".join(output.decode("utf-8", "replace").split())[-300:]
            raise DesktopError(f"desktop.remote.reset_command ended with status {process.returncode}: {tail}")


class RemoteProvider(DesktopProvider):
    """Provider `remote`."""

    def make(self, config: DesktopConfig, options: Any, name: str, run_root: Path) -> RemoteDesktop:
        """Create a desktop without starting it."""
        return RemoteDesktop(config, run_root)

    def check_usable(self, config: DesktopConfig, options: Any) -> None:
        """Raise UserError if there are fewer addresses than desktops."""
        num_addresses = len(set(config.remote.addresses))
        if num_addresses < config.num_envs:
            raise UserError(
                f"desktop.num_envs = {config.num_envs}, but desktop.remote.addresses lists {num_addresses} guests",
                "list a guest server for each desktop, or lower desktop.num_envs",
            )


@cache
def _warn_of_remaining_files() -> None:
    _log.warning("desktop.remote.reset_command is unset: files of an episode remain for the next one")
