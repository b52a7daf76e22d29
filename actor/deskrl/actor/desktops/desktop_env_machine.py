"""Provider `desktop_env`: virtual machines of a cloud or of VirtualBox, managed by the provider classes of desktop-env.

The classes run in the environment of OSWorld's evaluators (`osworld_evaluators/machine_process.py`). AWS, Alibaba Cloud
and Volcengine create a machine for each desktop; with Azure and VirtualBox, the configuration lists machines, of which
each serves one desktop at a time. A lock file names the run and the machine, so that the run's next actor stops the
machines of an actor that was killed.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deskrl.actor.desktops.base import Address, DesktopError, DesktopGone
from deskrl.actor.desktops.guest_locks import acquire_any, try_acquire
from deskrl.actor.desktops.osworld_guest import OSWorldGuestDesktop
from deskrl.actor.desktops.provider import DesktopProvider
from deskrl.actor.osworld_evaluators.evaluator_environment import DESKTOP_ENV_VERSION, interpreter_path
from deskrl.actor.osworld_evaluators.machine_client import (
    MachineCall,
    MachineReply,
    MachineRequest,
    call_blocking,
    machines_dir,
)
from deskrl.core.config import DesktopConfig, Section
from deskrl.core.errors import UserError

_log = logging.getLogger(__name__)
_INIT_STATE = "init_state"
_LISTED = ("azure", "virtualbox")
"""Providers whose machines exist before the run."""
_PACKAGES = {
    "aws": "boto3",
    "azure": "azure-identity azure-mgmt-compute azure-mgmt-network",
    "aliyun": "alibabacloud_ecs20140526 alibabacloud_tea_openapi alibabacloud_tea_util",
    "volcengine": "volcengine-python-sdk",
}
"""Packages that desktop-env's provider imports, beyond those of the evaluators."""
_STOP_TIMEOUT_S = 60.0
_TIMEOUT_FRACTION = 0.95  # fail with a specific error shortly before the caller's deadline cancels the start


class DesktopEnvDesktop(OSWorldGuestDesktop):
    """One desktop in a virtual machine.

    Args:
        config: desktop configuration.
        options: provider of desktop-env and its machines.
        name: desktop name, unique in the run.
        run_root: folder of all desktops of the run, by which a lock file names the run.
    """

    def __init__(self, config: DesktopConfig, options: DesktopEnvProvider.Options, name: str, run_root: Path) -> None:
        super().__init__(config)
        self._options = options
        self._name = name
        self._run_root = run_root
        self._machine = ""
        self._lock: IO[bytes] | None = None
        self._address: tuple[str, int] | None = None
        self._call: MachineCall | None = None

    @property
    def address(self) -> Address:
        """Address of the guest server."""
        if self._address is None:
            raise DesktopGone("the virtual machine is not running")
        return self._address

    async def reset(self) -> None:
        """Create a machine; or start a listed one and revert to its snapshot; or revert the desktop's own."""
        deadline_s = time.monotonic() + _TIMEOUT_FRACTION * self._config.start_timeout_s
        self._address, self._has_input_code = None, False
        is_first = self._lock is None
        if is_first:
            await self._acquire(deadline_s)
            if self._options.provider not in _LISTED:
                self._record((await self._make_call("create", deadline_s)).machine)
            else:
                await self._make_call("start", deadline_s)  # some providers revert running machines only
        if not is_first or self._options.provider in _LISTED:
            self._record((await self._make_call("revert", deadline_s)).machine)
        self._address = (await self._make_call("start", deadline_s)).address
        await self.wait_until_ready(deadline_s, f"the guest of {self._machine} at {self._address}")

    async def close(self) -> None:
        """Stop the machine; one that was created is removed by it."""
        if self._lock is None:
            return
        lock, self._lock, self._address = self._lock, None, None
        call, self._call = self._call, None
        try:
            reply = MachineReply() if call is None else await call.end(_STOP_TIMEOUT_S)
            if reply is None or reply.stopped:  # the call stops the machine
                self._machine = ""
            else:
                self._machine = reply.machine or self._machine
            if self._machine:
                stop = await MachineCall.start(self._request("stop"), lock)
                await stop.reply(_STOP_TIMEOUT_S)
            self._options.forget(lock)
        except DesktopError:  # the caller no longer needs it, and the run's next actor stops it
            _log.exception("cannot stop virtual machine %s", self._machine)
        finally:
            lock.close()
            self._machine = ""

    async def _acquire(self, deadline_s: float) -> None:
        """Acquire a listed machine, or the lock file of one that is created."""
        folder, machines = machines_dir(self._options.provider), self._options.listed
        if machines:
            locks = [folder / f"{sha256(machine.encode()).hexdigest()[:16]}.json" for machine in machines]
            index, self._lock = await acquire_any(locks, deadline_s, "virtual machines")
            self._record(machines[index])
        else:
            _, self._lock = await acquire_any([folder / f"{self._name}.json"], deadline_s, "lock files")
            self._record("")

    def _record(self, machine: str) -> None:
        """Write the machine into the lock file."""
        assert self._lock is not None
        self._machine = machine
        self._lock.truncate(0)
        self._lock.write(json.dumps({"run": _run_mark(self._run_root), "machine": machine}).encode())
        self._lock.flush()

    async def _make_call(self, operation: str, deadline_s: float) -> MachineReply:
        assert self._lock is not None
        self._call = await MachineCall.start(self._request(operation), self._lock)
        reply = await self._call.reply(deadline_s - time.monotonic())
        self._call = None
        return reply

    def _request(self, operation: str) -> MachineRequest:
        size = (self._config.width, self._config.height)
        options = self._options
        return MachineRequest(options.provider, options.region, operation, self._machine, options.snapshot, size)


class DesktopEnvProvider(DesktopProvider):
    """Provider `desktop_env`."""

    class Options(Section):
        """Options of desktop-env's providers."""

        provider: Literal["aws", "azure", "aliyun", "volcengine", "virtualbox"]
        """Provider of desktop-env."""
        region: str = ""
        """Region of AWS; the other clouds take theirs from the environment variables that desktop-env documents."""
        machines: tuple[str, ...] = ()
        """Machines of Azure (`GROUP/NAME`) or VirtualBox (.vbox files); each is one desktop. The other providers create
        a machine for each desktop."""
        snapshot: Annotated[str, Field(min_length=1)] = _INIT_STATE
        """Snapshot that a reset restores. AWS: the AMI of which a reset makes a new machine. Alibaba Cloud and
        Volcengine: not used, since desktop-env makes new machines of the image that its variables name."""

        @field_validator("provider", mode="before")
        @classmethod
        def _check_provider(cls, value: Any) -> Any:
            if value == "gcp":
                raise ValueError(f"gcp: desktop-env {DESKTOP_ENV_VERSION} has only empty files for this provider")
            return value

        @model_validator(mode="after")
        def _check_completeness(self) -> DesktopEnvProvider.Options:
            if self.provider in _LISTED and not self.machines:
                raise ValueError(f"{self.provider} needs machines: desktop-env does not create them")
            if self.provider not in _LISTED and self.machines:
                raise ValueError(f"{self.provider} takes no machines: a reset replaces a machine by a new one")
            if self.provider == "aws" and (not self.region or self.snapshot == _INIT_STATE):
                raise ValueError("aws needs region, and snapshot, the AMI of OSWorld's machine in that region")
            return self

        @property
        def listed(self) -> list[str]:
            """Machines that exist before the run, each once."""
            is_path = self.provider == "virtualbox"
            names = [str(Path(name).expanduser().absolute()) if is_path else name for name in self.machines]
            return list(dict.fromkeys(names))

        def forget(self, lock: IO[bytes]) -> None:
            """Empty the lock file of a machine that is stopped; remove it if the machine was created."""
            lock.truncate(0)
            if not self.machines:
                Path(lock.name).unlink(missing_ok=True)

    def make(self, config: DesktopConfig, options: Options, name: str, run_root: Path) -> DesktopEnvDesktop:
        """Create a desktop without starting it."""
        return DesktopEnvDesktop(config, options, name, run_root)

    def check_usable(self, config: DesktopConfig, options: Options) -> None:
        """Raise UserError if desktop-env or a package of the cloud is missing, or its provider rejects the settings."""
        if options.listed and len(options.listed) < config.num_envs:
            raise UserError(
                f"desktop.num_envs = {config.num_envs}, but desktop.provider_options.machines lists "
                f"{len(options.listed)} virtual machines",
                "list a machine for each desktop, or lower desktop.num_envs",
            )
        if options.provider == "virtualbox":
            for machine in options.listed:
                if not Path(machine).is_file():
                    raise UserError(
                        f"desktop.provider_options.machines: {machine}: not found", "list the machine's .vbox file"
                    )
        if not interpreter_path().exists():
            raise UserError("desktop.provider = desktop_env: desktop-env is not installed", "deskrl evaluators install")
        _check_provider(options.provider, options.region)

    def reap(self, config: DesktopConfig, options: Options, run_root: Path) -> int:
        """Stop the run's machines whose actor has ended; return their number."""
        num_reaped = 0
        for path in sorted(machines_dir(options.provider).glob("*.json")):
            lock = try_acquire(path)
            if lock is None:
                continue
            with lock:
                lock.seek(0)
                record = json.loads(lock.read() or "{}")
                if record.get("run") != _run_mark(run_root):
                    continue
                try:
                    if record["machine"]:
                        call_blocking(MachineRequest(options.provider, options.region, "stop", record["machine"]))
                except DesktopError:
                    _log.exception("cannot stop virtual machine %s of a killed actor", record["machine"])
                    continue
                options.forget(lock)
                num_reaped += 1
        return num_reaped


@cache
def _check_provider(provider: str, region: str) -> None:
    try:
        reply = call_blocking(MachineRequest(provider, region, "check"))
    except DesktopError as error:
        raise UserError(f"desktop-env cannot use {error}", "set what the message names") from error
    if reply.missing_module:
        raise UserError(
            f"desktop-env's provider {provider} needs the module {reply.missing_module}",
            f"{shlex.quote(str(interpreter_path()))} -m pip install {_PACKAGES.get(provider, reply.missing_module)}",
        )


def _run_mark(run_root: Path) -> str:
    return str(run_root.absolute())
