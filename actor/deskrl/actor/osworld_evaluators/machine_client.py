"""Calls of desktop-env's providers of virtual machines, each in a process of the evaluators' environment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import msgspec

from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.osworld_evaluators.evaluator_environment import environment_dir, interpreter_path

_SCRIPT = Path(__file__).with_name("machine_process.py")
_BLOCKING_TIMEOUT_S = 120.0


class MachineReply(msgspec.Struct):
    """Response of a machine process."""

    machine: str = ""
    """Name of the machine: an instance of a cloud, or the path of a local machine."""
    address: tuple[str, int] | None = None
    """Host and port of the guest server."""
    stopped: bool = False
    """Whether the process was told to end, and has stopped the machine."""
    missing_module: str = ""
    """Module that the environment lacks."""
    fault: str = ""
    """Why the call failed."""


@dataclass(frozen=True)
class MachineRequest:
    """Call of a provider (see `machine_process`)."""

    provider: str
    region: str
    operation: str
    machine: str = ""
    snapshot: str = ""
    screen_size: tuple[int, int] = (0, 0)
    """(width, height) in pixels."""

    def to_line(self) -> bytes:
        """Return the request as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


class MachineCall:
    """Running call. Its process holds the lock of the machine until it has ended, also after the end of the actor."""

    def __init__(self, request: MachineRequest, process: asyncio.subprocess.Process) -> None:
        self.request = request
        self._process = process
        self._reply = asyncio.create_task(self._communicate())

    @classmethod
    async def start(cls, request: MachineRequest, lock: IO[bytes]) -> MachineCall:
        """Start a call; raises DesktopError if the process cannot be started.

        Args:
            request: what is called.
            lock: locked file of the machine.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *_command(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                cwd=machines_dir(request.provider),
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C is the actor's
            )
        except OSError as error:
            raise DesktopError(f"cannot run {interpreter_path()}: {error.strerror}") from error
        return cls(request, process)

    async def reply(self, timeout_s: float) -> MachineReply:
        """Wait for the response. The call continues after a timeout or a cancellation: see `end`.

        Raises:
            DesktopError: the call failed, or there was no response within `timeout_s`.
        """
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                reply = await asyncio.shield(self._reply)
        except TimeoutError as error:
            raise DesktopError(f"{_describe(self.request)} did not finish in time") from error
        return _checked(self.request, reply)

    async def end(self, timeout_s: float) -> MachineReply | None:
        """Terminate the call, and return its response; None if it has not ended within `timeout_s`.

        A call without a response stops the machine that it makes by itself.
        """
        if not self._reply.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await asyncio.shield(self._reply)
        return self._reply.result() if self._reply.done() else None

    async def _communicate(self) -> MachineReply:
        output, _ = await self._process.communicate(self.request.to_line())
        return _parse(output)


def call_blocking(request: MachineRequest) -> MachineReply:
    """Make a call outside an event loop, within two minutes.

    Raises:
        DesktopError: the call failed.
    """
    try:
        done = subprocess.run(
            _command(),
            input=request.to_line(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=machines_dir(request.provider),
            timeout=_BLOCKING_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DesktopError(f"{_describe(request)} did not finish within {_BLOCKING_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise DesktopError(f"cannot run {interpreter_path()}: {error.strerror}") from error
    return _checked(request, _parse(done.stdout))


def machines_dir(provider: str) -> Path:
    """Return the folder of a provider's lock files, which is the working folder of its calls; it is created."""
    folder = environment_dir() / "machines" / provider
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _command() -> list[str]:
    return [str(interpreter_path()), str(_SCRIPT)]


def _describe(request: MachineRequest) -> str:
    return f"{request.provider}: {request.operation}" + (f" of {request.machine}" if request.machine else "")


def _parse(output: bytes) -> MachineReply:
    try:
        return msgspec.json.decode(output, type=MachineReply)
    except (ValueError, RecursionError):
        return MachineReply(fault="the process ended without a response")


def _checked(request: MachineRequest, reply: MachineReply) -> MachineReply:
    fault = reply.fault
    if reply.missing_module and request.operation != "check":
        fault = f"the module {reply.missing_module} is missing"
    if fault:
        raise DesktopError(f"{_describe(request)}: {fault}")
    return reply
