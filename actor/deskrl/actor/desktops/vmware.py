"""Provider `vmware`: virtual machines of VMware Workstation or Fusion on this machine that run OSWorld's guest server.

A reset reverts to a snapshot. A virtual machine serves one desktop at a time, across runs: a lock file beside it names
the run that started it, so that the run's next actor stops the machine if the actor was killed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import shutil
import time
from functools import cache
from pathlib import Path
from typing import IO, Any

from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.guest_locks import acquire_any, try_acquire
from deskrl.actor.desktops.osworld_guest import OSWorldGuestDesktop
from deskrl.actor.desktops.provider import DesktopProvider
from deskrl.actor.desktops.vmrun import vmrun, vmrun_blocking
from deskrl.core.config import DesktopConfig, VMwareConfig
from deskrl.core.errors import UserError

_log = logging.getLogger(__name__)
_GUEST_PORT = 5000
_STOP_TIMEOUT_S = 30.0
_TIMEOUT_FRACTION = 0.95  # fail with a specific error shortly before the caller's deadline cancels the start


class VMwareDesktop(OSWorldGuestDesktop):
    """One desktop in any free one of the configured virtual machines.

    Args:
        config: desktop configuration; its section `vmware` lists the virtual machines.
        run_root: folder of all desktops of the run, by which a machine's lock file names the run.
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
        """Address of the guest server."""
        if not self._host:
            raise DesktopGone("the virtual machine is not running")
        return self._host, _GUEST_PORT

    async def start(self) -> None:
        """Acquire a free machine and start it from its snapshot."""
        if self._machine is not None:
            raise DesktopError("the desktop is already started")
        await self.reset()

    async def reset(self) -> None:
        """Revert to the snapshot."""
        deadline_s = time.monotonic() + _TIMEOUT_FRACTION * self._config.start_timeout_s
        machine = self._machine or await self._acquire(deadline_s)
        self._host, self._has_input_code = "", False
        await vmrun(self._vmware, "revertToSnapshot", machine, self._vmware.snapshot)
        if machine not in await self._running():  # the snapshot of a running machine may have started it already
            await vmrun(self._vmware, "start", machine, "nogui")
        self._host = await self._find_host(machine, deadline_s)
        await self.wait_until_ready(deadline_s, f"the guest of {machine} at {self._host}:{_GUEST_PORT}")

    async def close(self) -> None:
        """Stop the machine and release it."""
        if self._machine is None or self._lock is None:
            return
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                if self._machine in await self._running():
                    await vmrun(self._vmware, "stop", self._machine, "hard")
            self._lock.truncate(0)
        except (DesktopError, TimeoutError):  # the caller no longer needs it, and the run's next actor stops it
            _log.exception("cannot stop virtual machine %s", self._machine)
        finally:
            self._lock.close()
            self._machine, self._lock, self._host = None, None, ""

    async def _acquire(self, deadline_s: float) -> Path:
        machines = _machines(self._vmware)
        locks = [_lock_path(machine) for machine in machines]
        index, self._lock = await acquire_any(locks, deadline_s, "virtual machines")
        self._lock.truncate(0)
        self._lock.write(_run_mark(self._run_root))
        self._lock.flush()
        self._machine = machines[index]
        return self._machine

    async def _running(self) -> set[Path]:
        return _parse_list(await vmrun(self._vmware, "list"))

    async def _find_host(self, machine: Path, deadline_s: float) -> str:
        """Return the guest's IP address. Without `-wait`, vmrun does not find it for machines without a window."""
        try:
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                lines = await vmrun(self._vmware, "getGuestIPAddress", machine, "-wait")
        except TimeoutError as error:
            limit_s = self._config.start_timeout_s
            raise DesktopError(
                f"{machine} reported no IP address within {limit_s:g} s (hint: possibly VMware Tools do not run in it)"
            ) from error
        try:
            return str(ipaddress.ip_address(lines[-1].strip()))
        except (ValueError, IndexError) as error:
            output = " ".join(lines) or "nothing"
            raise DesktopError(f"{machine} has no IP address: vmrun getGuestIPAddress printed {output}") from error


class VMwareProvider(DesktopProvider):
    """Provider `vmware`."""

    def make(self, config: DesktopConfig, options: Any, name: str, run_root: Path) -> VMwareDesktop:
        """Create a desktop without starting it."""
        return VMwareDesktop(config, run_root)

    def check_usable(self, config: DesktopConfig, options: Any) -> None:
        """Raise UserError if a requirement of the virtual machines is not met on this machine."""
        vmware = config.vmware
        machines = _machines(vmware)
        if shutil.which(vmware.vmrun) is None:
            raise UserError(
                f"{vmware.vmrun}: program not found",
                "install VMware Workstation or Fusion and set desktop.vmware.vmrun to its vmrun, or choose another "
                "desktop.provider",
            )
        if len(machines) < config.num_envs:
            raise UserError(
                f"desktop.num_envs = {config.num_envs}, but desktop.vmware.machines lists {len(machines)} virtual "
                "machines",
                "list a .vmx file for each desktop, or lower desktop.num_envs",
            )
        for machine in machines:
            if not machine.is_file():
                raise UserError(f"desktop.vmware.machines: {machine}: not found", "list the machine's .vmx file")
            _check_snapshot(vmware, machine)

    def reap(self, config: DesktopConfig, options: Any, run_root: Path) -> int:
        """Stop the run's virtual machines whose actor has ended; return their number."""
        num_reaped = 0
        for machine in _machines(config.vmware):
            lock = try_acquire(_lock_path(machine)) if _lock_path(machine).exists() else None
            if lock is None:
                continue
            with lock:
                lock.seek(0)
                if lock.read() != _run_mark(run_root):
                    continue
                try:
                    if machine in _parse_list(vmrun_blocking(config.vmware, "list")):
                        vmrun_blocking(config.vmware, "stop", machine, "hard")
                except DesktopError:
                    _log.exception("cannot stop virtual machine %s of a killed actor", machine)
                    continue
                lock.truncate(0)
                num_reaped += 1
        return num_reaped


@cache
def _check_snapshot(config: VMwareConfig, machine: Path) -> None:
    try:
        snapshots = vmrun_blocking(config, "listSnapshots", machine)[1:]  # the first line is their number
    except DesktopError as error:
        raise UserError(f"{machine}: {error}", "make the machine accessible to vmrun") from error
    if config.snapshot not in snapshots:
        existing = f"it has {', '.join(snapshots)}" if snapshots else "it has none"
        raise UserError(
            f"{machine} has no snapshot {config.snapshot}: {existing}",
            f"create it (vmrun snapshot {machine} {config.snapshot}), or set desktop.vmware.snapshot",
        )


def _machines(config: VMwareConfig) -> list[Path]:
    return list(dict.fromkeys(machine.expanduser().resolve() for machine in config.machines))


def _lock_path(machine: Path) -> Path:
    return machine.with_name(f"{machine.name}.deskrl")


def _run_mark(run_root: Path) -> bytes:
    return str(run_root.absolute()).encode()


def _parse_list(lines: list[str]) -> set[Path]:
    """Parse the output of `vmrun list`: the number of running machines, then one path per line."""
    return {Path(line).resolve() for line in lines[1:]}
