"""Client of evaluator processes: starts them on demand and sends each of them one request at a time.

A process exits when its standard input is closed, at the latest when the actor exits. A process that failed or did not
respond in time is killed, and a later request starts a new one. Several processes keep a desktop whose evaluation takes
long from delaying that of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from deskrl.actor.desktops.base import Address
from deskrl.actor.osworld_evaluators.evaluator_environment import PROCESS_SCRIPT, interpreter_path

_MAX_LINE_BYTES = 1024**2
_MAX_PROCESSES = 4
_TIMEOUT_S = 300.0
_KILL_TIMEOUT_S = 5.0


class OSWorldEvaluatorError(RuntimeError):
    """OSWorld's evaluators could not evaluate a state; the message contains the reason."""


class CheckScore(msgspec.Struct):
    """Score of one check of an evaluator."""

    func: str
    score: float


class _Response(msgspec.Struct):
    reward: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    checks: list[CheckScore] = []
    fault: str = ""


@dataclass(frozen=True)
class OSWorldEvaluation:
    """Reward of an end state, with the score of each check."""

    reward: float
    checks: list[CheckScore]


class OSWorldEvaluatorClient:
    """Evaluates end states with a few processes for all desktops of an actor; further requests are queued."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_MAX_PROCESSES)
        self._idle: list[_EvaluatorProcess] = []

    async def evaluate(
        self,
        task: Mapping[str, Any],
        address: Address,
        assets: Mapping[str, Path],
        outputs: Mapping[str, str],
    ) -> OSWorldEvaluation:
        """Evaluate the end state of a desktop.

        Args:
            task: content of the task file.
            address: address of the desktop's guest server, a socket path or host and port.
            assets: local copies of the files that the evaluator uses, by URL.
            outputs: saved output of setup steps, by file name.

        Raises:
            OSWorldEvaluatorError: the evaluators failed, the process exited without a response, did not respond within
                5 minutes, or its response is invalid.
        """
        guest = {"socket": str(address)} if isinstance(address, Path) else {"address": list(address)}
        request = {"task": task, "assets": {url: str(path) for url, path in assets.items()}, "outputs": outputs}
        async with self._slots:
            process = self._take_idle() or await _start_process()
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    response = await _exchange(process, json.dumps(request | guest))
            except TimeoutError as error:
                await _kill(process)
                raise OSWorldEvaluatorError(f"the evaluators did not respond within {_TIMEOUT_S:g} s") from error
            except BaseException:  # otherwise a late response would be read as that to the next request
                await _kill(process)
                raise
            self._idle.append(process)
        if response.fault or response.reward is None:
            raise OSWorldEvaluatorError(response.fault or "the evaluator process sent no reward")
        return OSWorldEvaluation(response.reward, response.checks)

    def _take_idle(self) -> _EvaluatorProcess | None:
        """Take an idle process; those that exited since their last response are dropped."""
        while self._idle:
            if (evaluator := self._idle.pop()).process.returncode is None:
                return evaluator
        return None

    async def close(self) -> None:
        """Kill the idle processes."""
        while self._idle:
            await _kill(self._idle.pop())


@dataclass(frozen=True)
class _EvaluatorProcess:
    """Process of which standard input and output can be closed although a descendant of it holds them open."""

    transport: asyncio.SubprocessTransport
    process: asyncio.subprocess.Process


async def _start_process() -> _EvaluatorProcess:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(
        lambda: asyncio.subprocess.SubprocessStreamProtocol(limit=_MAX_LINE_BYTES, loop=loop),
        interpreter_path(),
        PROCESS_SCRIPT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
    )
    return _EvaluatorProcess(transport, asyncio.subprocess.Process(transport, protocol, loop))


async def _exchange(evaluator: _EvaluatorProcess, line: str) -> _Response:
    """Send a request and return the response; raises OSWorldEvaluatorError if there is none or it is invalid."""
    process = evaluator.process
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line.encode() + b"\n")
        await process.stdin.drain()
        response = await process.stdout.readline()
    except OSError as error:
        raise OSWorldEvaluatorError("the evaluator process exited without a response") from error
    except ValueError as error:
        raise OSWorldEvaluatorError(f"the evaluators' response is longer than {_MAX_LINE_BYTES} bytes") from error
    if not response:
        raise OSWorldEvaluatorError("the evaluator process exited without a response")
    try:
        return msgspec.json.decode(response, type=_Response)
    except (ValueError, RecursionError) as error:
        raise OSWorldEvaluatorError(f"the evaluator process sent an invalid response: {error}") from error


async def _kill(evaluator: _EvaluatorProcess) -> None:
    """Kill a process and close its pipes, so that nothing of it is left when the event loop is closed."""
    process = evaluator.process
    if process.returncode is None:
        process.kill()
    # The pipes are not closed by the end of the process if a descendant holds them or unread output fills one.
    assert process.stdin is not None
    if not process.stdin.transport.is_closing():  # a transport of which the connection is lost cannot be aborted
        process.stdin.transport.abort()
    if (output := evaluator.transport.get_pipe_transport(1)) is not None:
        output.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KILL_TIMEOUT_S):
            await process.wait()
