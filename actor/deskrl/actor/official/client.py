"""The host's end of the evaluator process: one process for all desktops of an actor, started when it is first needed.

It ends when this process does, since its input then ends; one that hung or died is ended and replaced at the next use.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deskrl.actor.desktops.base import Address
from deskrl.actor.official.environment import PROCESS, interpreter

_LINE_BYTES = 16 * 1024**2


class OfficialFault(RuntimeError):
    """The evaluators could not judge; the text says why."""


class OfficialEvaluators:
    """Judges one state at a time; others wait."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def judge(
        self,
        task: Mapping[str, Any],
        address: Address,
        assets: Mapping[str, Path],
        outputs: Mapping[str, str],
    ) -> dict[str, Any]:
        """The answer `{"reward": …, "checks": […]}`.

        Args:
            task: the task file.
            address: of the desktop's guest server.
            assets: local copies of the files that the evaluator names, by address.
            outputs: what setup steps printed that were to keep it, by file name.

        Raises:
            OfficialFault: there is no verdict.
        """
        where = {"socket": str(address)} if isinstance(address, Path) else {"address": list(address)}
        request = {"task": task, "assets": {url: str(path) for url, path in assets.items()}, "outputs": outputs}
        async with self._lock:
            try:
                answer = await self._ask(json.dumps(request | where))
            except BaseException:  # an answer that is not waited for would be taken for that to the next question
                await self.close()
                raise
        if "fault" in answer:
            raise OfficialFault(answer["fault"])
        return answer

    async def close(self) -> None:
        """End the process."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def _ask(self, line: str) -> dict[str, Any]:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                interpreter(),
                PROCESS,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=_LINE_BYTES,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            await self._process.stdin.drain()
            answer = await self._process.stdout.readline()
            parsed: dict[str, Any] = json.loads(answer)
        except (OSError, ValueError) as error:
            raise OfficialFault("the evaluator process ended without an answer") from error
        return parsed
