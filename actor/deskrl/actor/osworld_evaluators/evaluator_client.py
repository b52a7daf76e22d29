"""Client of evaluator processes: starts them on demand and sends each of them one request at a time.

A process exits when its standard input is closed, at the latest when the actor exits. A process that failed or did not
respond in time is killed, and a later request starts a new one. Several processes keep a desktop whose evaluation takes
long from delaying that of the others.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from deskrl.actor.desktops.base import Address
from deskrl.actor.helper_process import HelperProcess
from deskrl.actor.osworld_evaluators.evaluator_environment import PROCESS_SCRIPT, interpreter_path

_MAX_LINE_BYTES = 1024**2
_MAX_PROCESSES = 4
_TIMEOUT_S = 300.0


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
        self._idle: list[HelperProcess] = []

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
                await process.kill()
                raise OSWorldEvaluatorError(f"the evaluators did not respond within {_TIMEOUT_S:g} s") from error
            except BaseException:  # otherwise a late response would be read as that to the next request
                await process.kill()
                raise
            self._idle.append(process)
        if response.fault or response.reward is None:
            raise OSWorldEvaluatorError(response.fault or "the evaluator process sent no reward")
        return OSWorldEvaluation(response.reward, response.checks)

    def _take_idle(self) -> HelperProcess | None:
        """Take an idle process; those that exited since their last response are dropped."""
        while self._idle:
            if (process := self._idle.pop()).returncode is None:
                return process
        return None

    async def close(self) -> None:
        """Kill the idle processes."""
        while self._idle:
            await self._idle.pop().kill()


async def _start_process() -> HelperProcess:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return await HelperProcess.start([interpreter_path(), PROCESS_SCRIPT], environment, _MAX_LINE_BYTES)


async def _exchange(process: HelperProcess, line: str) -> _Response:
    """Send a request and return the response; raises OSWorldEvaluatorError if there is none or it is invalid."""
    try:
        await process.send(line.encode() + b"\n")
        response = await process.output.readline()
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
