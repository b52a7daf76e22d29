"""The provider `vmware`: virtual machines of VMware Workstation or Fusion on this machine, OSWorld's guest in them.

A reset goes back to a snapshot. A machine serves one desktop at a time, of whichever run: a lock file beside it says
so, in which stands the run that started it, so that one whose actor was killed is stopped by that run's next start.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import shutil
import time
from functools import cache
from pathlib import Path
from typing import IO

from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.holding import hold, hold_one
from deskrl.actor.desktops.osworld_guest import OSWorldGuestDesktop
from deskrl.actor.desktops.vmrun import vmrun, vmrun_now
from deskrl.core.config import DesktopConfig, VMwareConfig
from deskrl.core.errors import UserError

_LOGGER = logging.getLogger(__name__)
_PORT = 5000
_STOP_S = 30.0
_SHARE = 0.95  # so that this says what was wrong before the caller's own deadline cuts it off


class VMwareDesktop(OSWorldGuestDesktop):
    """One desktop in one of the configured virtual machines, whichever is free.

    Args:
        config: patience, and in its section `vmware` the machines.
        run_root: folder of the run's desktops, by which a machine's lock file names the run.
    """

    def __init__(self, config: DesktopConfig, run_root: Path) -> None:
        super().__init__(config)
        self._vmware = config.vmware
        self._run_root = run_root
        self._machine: Path | None = None
        self._lock: IO[bytes] | None = None
        self._host = ""

    @property
    def address(self) -> Address:
        """Where the guest server listens."""
        if not self._host:
            raise DesktopGone("the virtual machine is not running")
        return self._host, _PORT

    async def start(self) -> None:
        """Take a free machine and bring it up from its snapshot."""
        if self._machine is not None:
            raise DesktopError("already started")
        await self.reset()

    async def reset(self) -> None:
        """Back to the snapshot."""
        deadline_s = time.monotonic() + _SHARE * self._config.start_timeout_s
        machine = self._machine or await self._take(deadline_s)
        self._host, self._has_hands = "", False
        await vmrun(self._vmware, "revertToSnapshot", machine, self._vmware.snapshot)
        if machine not in await self._running():  # a snapshot of a machine that runs may have brought it up already
            await vmrun(self._vmware, "start", machine, "nogui")
        self._host = await self._find_host(machine, deadline_s)
        await self.answer_by(deadline_s, f"of {machine} at {self._host}:{_PORT}")

    async def close(self) -> None:
        """Stop the machine and give it back."""
        if self._machine is None or self._lock is None:
            return
        try:
            async with asyncio.timeout(_STOP_S):
                if self._machine in await self._running():
                    await vmrun(self._vmware, "stop", self._machine, "hard")
            self._lock.truncate(0)
        except (DesktopError, TimeoutError):  # the caller is done with it; the run's next start finds what is left
            _LOGGER.exception("%s was not stopped", self._machine)
        finally:
            self._lock.close()
            self._machine, self._lock, self._host = None, None, ""

    async def _take(self, deadline_s: float) -> Path:
        machines = _machines(self._vmware)
        locks = [_lock_of(machine) for machine in machines]
        index, self._lock = await hold_one(locks, deadline_s, "virtual machines")
        self._lock.truncate(0)
        self._lock.write(_mark(self._run_root))
        self._lock.flush()
        self._machine = machines[index]
        return self._machine

    async def _running(self) -> set[Path]:
        return _listed(await vmrun(self._vmware, "list"))

    async def _find_host(self, machine: Path, deadline_s: float) -> str:
        """The guest's address; without `-wait`, vmrun does not find it in a machine that has no window."""
        try:
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                told = await vmrun(self._vmware, "getGuestIPAddress", machine, "-wait")
        except TimeoutError as error:
            limit_s = self._config.start_timeout_s
            raise DesktopError(f"{machine} told no address in {limit_s:g} s; do VMware Tools run in it?") from error
        try:
            return str(ipaddress.ip_address(told[-1].strip()))
        except (ValueError, IndexError) as error:
            raise DesktopError(f"{machine} has no address: vmrun says {' '.join(told) or 'nothing'}") from error


def refuse_unusable(config: DesktopConfig) -> None:
    """Raise UserError for what the virtual machines need and this machine lacks."""
    vmware = config.vmware
    machines = _machines(vmware)
    if shutil.which(vmware.vmrun) is None:
        raise UserError(
            f"there is no program {vmware.vmrun} on this machine",
            "install VMware Workstation or Fusion and name its vmrun with desktop.vmware.vmrun, or choose another "
            "desktop.provider",
        )
    if len(machines) < config.num_envs:
        raise UserError(
            f"desktop.num_envs = {config.num_envs} and desktop.vmware.machines names {len(machines)} virtual machines",
            "name a .vmx file for each desktop, or lower desktop.num_envs",
        )
    for machine in machines:
        if not machine.is_file():
            raise UserError(f"desktop.vmware.machines: {machine}: no such file", "name the machine's .vmx file")
        _refuse_missing_snapshot(vmware, machine)


@cache
def _refuse_missing_snapshot(config: VMwareConfig, machine: Path) -> None:
    try:
        snapshots = vmrun_now(config, "listSnapshots", machine)[1:]  # the first line counts them
    except DesktopError as error:
        raise UserError(f"{machine}: {error}", "see to it that vmrun can open the machine") from error
    if config.snapshot not in snapshots:
        named = f"it has {', '.join(snapshots)}" if snapshots else "it has none"
        raise UserError(
            f"{machine} has no snapshot {config.snapshot}: {named}",
            f"take it (vmrun snapshot {machine} {config.snapshot}), or set desktop.vmware.snapshot",
        )


def reap_machines(config: VMwareConfig, run_root: Path) -> int:
    """Stop the run's machines whose actor is gone; how many there were."""
    num_reaped = 0
    for machine in _machines(config):
        lock = hold(_lock_of(machine)) if _lock_of(machine).exists() else None
        if lock is None:
            continue
        with lock:
            lock.seek(0)
            if lock.read() != _mark(run_root):
                continue
            try:
                if machine in _listed(vmrun_now(config, "list")):
                    vmrun_now(config, "stop", machine, "hard")
            except DesktopError:
                _LOGGER.exception("%s, which a killed actor left, was not stopped", machine)
                continue
            lock.truncate(0)
            num_reaped += 1
    return num_reaped


def _machines(config: VMwareConfig) -> list[Path]:
    return list(dict.fromkeys(machine.expanduser().resolve() for machine in config.machines))


def _lock_of(machine: Path) -> Path:
    return machine.with_name(f"{machine.name}.deskrl")


def _mark(run_root: Path) -> bytes:
    return str(run_root.absolute()).encode()


def _listed(lines: list[str]) -> set[Path]:
    """Machines that `vmrun list` names, below a line that counts them."""
    return {Path(line).resolve() for line in lines[1:]}
