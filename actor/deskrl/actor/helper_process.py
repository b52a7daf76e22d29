"""Helper process: a program on this machine that answers requests on its standard input."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

_KILL_TIMEOUT_S = 5.0


class HelperProcess:
    """Process of which input and output can be closed although a descendant of it holds them open.

    Its standard error is discarded, and it has a session of its own, so that Ctrl-C does not reach it. It should exit
    when its standard input is closed, which also happens when this process ends.
    """

    def __init__(self, transport: asyncio.SubprocessTransport, process: asyncio.subprocess.Process) -> None:
        self._transport = transport
        self._process = process

    @classmethod
    async def start(
        cls, command: Sequence[str | Path], environment: Mapping[str, str], max_line_bytes: int
    ) -> HelperProcess:
        """Start a process.

        Args:
            command: program with its arguments.
            environment: all of its environment variables.
            max_line_bytes: size limit of a line of its output, in bytes.

        Raises:
            OSError: the program cannot be started.
        """
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_exec(
            lambda: asyncio.subprocess.SubprocessStreamProtocol(limit=max_line_bytes, loop=loop),
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
        return cls(transport, asyncio.subprocess.Process(transport, protocol, loop))

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while the process runs."""
        return self._process.returncode

    @property
    def output(self) -> asyncio.StreamReader:
        """Standard output of the process."""
        assert self._process.stdout is not None
        return self._process.stdout

    async def send(self, data: bytes) -> None:
        """Write to the standard input of the process; raises OSError if it was closed."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        await self._process.stdin.drain()

    async def wait(self) -> int:
        """Wait for the end of the process and return its exit status."""
        return await self._process.wait()

    async def stop(self, timeout_s: float) -> None:
        """Close the standard input, wait for the end of the process, and kill what remains of it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        """Kill the process and its descendants in its session, and close its pipes. Idempotent."""
        if self._process.returncode is None:  # otherwise the group may be another one by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        # The pipes are not closed by the end of the process if a descendant holds them or unread output fills one.
        assert self._process.stdin is not None
        if not self._process.stdin.transport.is_closing():  # a transport that lost its connection cannot be aborted
            self._process.stdin.transport.abort()
        if (output := self._transport.get_pipe_transport(1)) is not None:
            output.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                await self._process.wait()
