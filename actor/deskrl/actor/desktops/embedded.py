"""The provider `embedded`: a desktop in an unprivileged sandbox on this machine. Knows no task and no policy.

Every reset is a new sandbox: nothing of the last task can survive it, and there is no half-clean state to reason about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shutil
import socket
from pathlib import Path
from random import Random

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.door import refuse_long_path
from deskrl.actor.desktops.guest_desktop import GuestDesktop
from deskrl.actor.desktops.limits import create_groups, remove_groups
from deskrl.actor.desktops.orphans import Record
from deskrl.actor.desktops.sandbox import Sandbox, SandboxSpec
from deskrl.core.config import DesktopConfig
from deskrl.core.ids import new_id

_LOGGER = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 20.0


class EmbeddedDesktop(GuestDesktop):
    """One desktop in a sandbox.

    Args:
        config: size, limits and patience.
        name: its name, unique in the run.
        run_root: folder of all desktops of the run; this one lives below it.
    """

    def __init__(self, config: DesktopConfig, name: str, run_root: Path) -> None:
        super().__init__(config)
        self._folder = run_root.absolute() / name
        self._group = new_id("deskrl")
        self._random = Random(name)
        self._sandbox: Sandbox | None = None
        refuse_long_path(self.socket_path)

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
        added = self._config.embedded
        await self._linger(added.added_reset_median_s, added.added_reset_sigma)

    async def act(self, action: Action) -> None:
        """Do one action."""
        await super().act(action)
        added = self._config.embedded
        await self._linger(added.added_action_median_s, added.added_action_sigma)

    async def _linger(self, median_s: float, sigma: float) -> None:
        """Take the time that the configuration adds."""
        if median_s:
            await asyncio.sleep(self._random.lognormvariate(math.log(median_s), sigma))

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

    @property
    def address(self) -> Address:
        """Where the guest server listens."""
        if self._sandbox is None or not self._sandbox.is_running:
            raise DesktopGone("the desktop is not running")
        return self.socket_path
