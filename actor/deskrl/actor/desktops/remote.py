"""The provider `remote`: guest servers that run already, at addresses. Knows how one is taken and given back.

An address serves one desktop at a time, whichever of the run's processes holds it (`holding`). What brings such a guest
back to its first state is a command of the user's; without one a reset closes the windows, and files stay.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import cache
from pathlib import Path
from typing import IO

from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.holding import hold_one
from deskrl.actor.desktops.osworld_guest import OSWorldGuestDesktop
from deskrl.actor.desktops.programs import output_of
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError

_LOGGER = logging.getLogger(__name__)
_SHARE = 0.95  # so that this says what was wrong before the caller's own deadline cuts it off


class RemoteDesktop(OSWorldGuestDesktop):
    """One desktop at one of the configured addresses, whichever is free.

    Args:
        config: patience, and in its section `remote` the addresses.
        run_root: folder of the run's desktops, where locks lie.
    """

    def __init__(self, config: DesktopConfig, run_root: Path) -> None:
        super().__init__(config)
        self._run_root = run_root
        self._held: tuple[str, IO[bytes]] | None = None

    @property
    def address(self) -> Address:
        """Where the guest server listens."""
        if self._held is None:
            raise DesktopGone("no guest is held")
        host, _, port = self._held[0].rpartition(":")
        return host, int(port)

    async def start(self) -> None:
        """Take a free address and wait until its guest answers."""
        deadline_s = time.monotonic() + _SHARE * self._config.start_timeout_s
        if self._held is None:
            addresses = self._config.remote.addresses
            self._run_root.mkdir(parents=True, exist_ok=True, mode=0o700)
            locks = [self._run_root / f"remote-{address.replace('/', '_')}.lock" for address in addresses]
            index, lock = await hold_one(locks, deadline_s, "remote guests")
            self._held = addresses[index], lock
        await self.answer_by(deadline_s, f"at {self._held[0]}")

    async def reset(self) -> None:
        """Back to the first state, as far as the reset command brings it there."""
        if self._held is None:
            await self.start()
        if self._config.remote.reset_command:
            await self._run_reset_command()
            self._has_hands = False
            await self.start()
        else:
            _warn_of_leftovers()
            await self.close_all_windows()

    async def close(self) -> None:
        """Give the address back."""
        if self._held is not None:
            self._held[1].close()
            self._held = None

    async def _run_reset_command(self) -> None:
        assert self._held is not None
        host, _, port = self._held[0].rpartition(":")
        command = self._config.remote.reset_command.replace("{host}", host).replace("{port}", port)
        process = await asyncio.create_subprocess_shell(
            command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        written = await output_of(process)
        if process.returncode != 0:
            told = " ".join(written.decode("utf-8", "replace").split())[-300:]
            raise DesktopError(f"desktop.remote.reset_command ended with status {process.returncode}: {told}")


def refuse_unusable(config: DesktopConfig) -> None:
    """Raise UserError if the run has too few addresses."""
    num_addresses = len(set(config.remote.addresses))
    if num_addresses < config.num_envs:
        raise UserError(
            f"desktop.num_envs = {config.num_envs} and desktop.remote.addresses names {num_addresses} guests",
            "name a guest server for each desktop, or lower desktop.num_envs",
        )


@cache
def _warn_of_leftovers() -> None:
    _LOGGER.warning("desktop.remote.reset_command is unset: files that an episode leaves stay for the next one")
