"""Provider `embedded`: desktops in unprivileged sandboxes on this machine.

Every reset creates a new sandbox, so that no state of the last task can survive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shutil
import signal
import socket
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from deskrl.actor.actions import Action
from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.cgroups import ControlGroups, create_groups, num_host_kills, remove_groups
from deskrl.actor.desktops.debian_packages import missing_packages
from deskrl.actor.desktops.guest_desktop import GuestDesktop
from deskrl.actor.desktops.kernel_users import KernelUser, own_users
from deskrl.actor.desktops.orphan_cleanup import OwnerRecord
from deskrl.actor.desktops.provider import DesktopDurations, DesktopProvider
from deskrl.actor.desktops.sandbox import Sandbox, SandboxSpec, guest_start_error
from deskrl.core.config import DesktopConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import new_id
from deskrl.core.socket_paths import check_socket_path

_log = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 20.0
_SOCKET_NAME = "guest.sock"
_LINGERING_S = 1.0
"""Time that a sandbox may exist after its guest server or X server has ended."""


class EmbeddedDesktop(GuestDesktop):
    """One desktop in a sandbox.

    Args:
        config: desktop configuration.
        name: desktop name, unique in the run.
        run_root: folder of all desktops of the run; this desktop's folder is created in it.
    """

    def __init__(self, config: DesktopConfig, name: str, run_root: Path) -> None:
        super().__init__(config)
        self._folder = run_root.absolute() / name
        self._group = new_id("deskrl")
        self._random = Random(name)
        self._sandbox: Sandbox | None = None
        self._groups = ControlGroups()
        self._user: KernelUser | None = None
        self._num_host_kills = 0
        self._was_closed = False
        check_socket_path(self.socket_path)

    @property
    def socket_path(self) -> Path:
        """Unix socket of the guest server."""
        return self._folder / _SOCKET_NAME

    async def start(self) -> None:
        """Start the desktop and return when a screenshot can be taken."""
        if self._sandbox is not None:
            raise DesktopError("the desktop is already started")
        self._was_closed = False
        self._num_host_kills = num_host_kills()
        if self._user is None and (users := own_users()) is not None:
            self._user = KernelUser.acquire(users)
        groups = create_groups(self._group, self._config.memory_bytes, self._config.max_processes)
        self._groups = groups
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        OwnerRecord.for_this_process(groups.all_folders).write(self._folder)
        spec = SandboxSpec(
            folder=self._folder,
            width=self._config.width,
            height=self._config.height,
            memory_bytes=self._config.memory_bytes,
            max_processes=self._config.max_processes,
            max_file_bytes=self._config.max_file_bytes,
            groups=groups,
            user=self._user,
        )
        self.socket_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(bytes(self.socket_path))
            listener.listen(64)
            self._sandbox = await Sandbox.spawn(spec, listener)
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                await self.check_health(self._config.start_timeout_s)
        except (TimeoutError, DesktopError) as error:
            raise guest_start_error(f"{error}: {self._sandbox.log_tail}") from error

    async def reset(self) -> None:
        """Restore the initial state by a new sandbox."""
        await self._terminate()
        await self.start()
        delay = self._config.embedded
        await self._delay(delay.added_reset_median_s, delay.added_reset_sigma)

    async def act(self, action: Action) -> None:
        """Execute one action."""
        await super().act(action)
        delay = self._config.embedded
        await self._delay(delay.added_action_median_s, delay.added_action_sigma)

    async def _delay(self, median_s: float, sigma: float) -> None:
        """Sleep for the lognormal time by which the configuration slows desktops down; a median of 0 adds nothing."""
        if median_s:
            await asyncio.sleep(self._random.lognormvariate(math.log(median_s), sigma))

    async def close(self) -> None:
        """Terminate the sandbox and remove the folder."""
        self._was_closed = self._sandbox is not None
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._terminate()
                await asyncio.to_thread(self._remove_folder)
        except (OSError, TimeoutError):  # the caller no longer needs it, and `reap_orphans` removes the rest
            _log.exception("cannot close desktop %s", self._folder)
        finally:
            if self._user is not None:
                self._user.release()
                self._user = None

    async def _terminate(self) -> None:
        if self._sandbox is not None:
            await self._sandbox.kill()
            self._sandbox = None
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(remove_groups, OwnerRecord.read(self._folder).groups)

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the parent still contains other desktops
            self._folder.parent.rmdir()

    @property
    def can_observe_host(self) -> bool:
        """True: the sandbox runs on this machine, and nothing inside it can end it."""
        return True

    async def death_cause(self) -> str | None:
        """Return evidence that the sandbox was ended from outside.

        Nothing in the session can send a signal to the guest server. If a signal ended it, the sender was another
        process of this machine or the kernel's out-of-memory killer; the latter is not evidence if the desktop has
        reached its own memory limit.
        """
        if self._was_closed:
            return "the actor closed the desktop"
        if self._sandbox is None or not await self._sandbox.has_ended_within(_LINGERING_S):
            return None
        if self._groups.was_out_of_memory():
            return None
        number = await self._sandbox.end_signal()
        if number is None:
            return None
        if num_host_kills() > self._num_host_kills and number == signal.SIGKILL:
            return "the machine ran out of memory, and its kernel killed the desktop"
        return f"the desktop was ended from outside by {number.name}"

    @property
    def address(self) -> Address:
        """Address of the guest server."""
        if self._sandbox is None or not self._sandbox.is_running:
            raise DesktopGone("the desktop is not running")
        return self.socket_path


class EmbeddedProvider(DesktopProvider):
    """Provider `embedded`."""

    starts_within_seconds: ClassVar = True
    uses_machine_resources: ClassVar = True
    runs_machine_programs: ClassVar = True
    socket_name: ClassVar = _SOCKET_NAME

    def make(self, config: DesktopConfig, options: Any, name: str, run_root: Path) -> EmbeddedDesktop:
        """Create a desktop without starting it."""
        return EmbeddedDesktop(config, name, run_root)

    def check_usable(self, config: DesktopConfig, options: Any) -> None:
        """Raise UserError if a Debian package is missing."""
        if missing := missing_packages(applications=False):
            raise UserError(
                f"Debian packages required by embedded desktops are not installed: {', '.join(missing)}",
                f"run: apt-get install {' '.join(missing)}",
            )

    def durations(self, config: DesktopConfig, options: Any) -> DesktopDurations:
        """Return the measured durations plus the mean of the configured delays, which are lognormal."""
        added = config.embedded
        return DesktopDurations(
            reset_s=0.6 + added.added_reset_median_s * math.exp(added.added_reset_sigma**2 / 2),
            action_s=0.15 + added.added_action_median_s * math.exp(added.added_action_sigma**2 / 2),
            evaluation_s=0.1,
        )

    def describe_added_delays(self, config: DesktopConfig, options: Any) -> str:
        """Return a description of the delays of the section `embedded`; empty if it adds none."""
        return config.embedded.describe_delay() if config.embedded.has_added_delay else ""
