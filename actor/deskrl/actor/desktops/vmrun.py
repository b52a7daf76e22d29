"""Calls of VMware's command line tool `vmrun`.

On failure vmrun prints `Error: ...` to standard output and exits with a non-zero status.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.subprocesses import read_output
from deskrl.core.config import VMwareConfig

_TIMEOUT_S = 600.0
_BLOCKING_TIMEOUT_S = 60.0


async def vmrun(config: VMwareConfig, *words: str | Path) -> list[str]:
    """Run a vmrun command and return the lines of its output. It is killed if the caller is cancelled.

    Raises:
        DesktopError: the command cannot be started, fails, or takes longer than ten minutes.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *_command(config, words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise DesktopError(f"cannot run {config.vmrun}: {error.strerror}") from error
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            output = await read_output(process)
    except TimeoutError as error:
        raise DesktopError(f"vmrun {words[0]} did not finish within {_TIMEOUT_S:g} s") from error
    return _lines(words, process.returncode, output)


def vmrun_blocking(config: VMwareConfig, *words: str | Path) -> list[str]:
    """Run a vmrun command outside an event loop, with a timeout of one minute; otherwise like `vmrun`."""
    try:
        done = subprocess.run(
            _command(config, words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_BLOCKING_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DesktopError(f"vmrun {words[0]} did not finish within {_BLOCKING_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise DesktopError(f"cannot run {config.vmrun}: {error.strerror}") from error
    return _lines(words, done.returncode, done.stdout)


def _command(config: VMwareConfig, words: Sequence[str | Path]) -> list[str]:
    product = config.product or ("fusion" if sys.platform == "darwin" else "ws")
    return [config.vmrun, "-T", product, *map(str, words)]


def _lines(words: Sequence[str | Path], status: int | None, output: bytes) -> list[str]:
    text = output.decode("utf-8", "replace").strip()
    if status != 0:
        reason = " ".join(text.split()).removeprefix("Error: ")[-300:] or f"exit status {status}"
        raise DesktopError(f"vmrun {words[0]}: {reason}")
    return text.splitlines()
