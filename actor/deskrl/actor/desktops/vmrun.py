"""VMware's command line, `vmrun`: calls of it, and what it says as errors. Knows no desktop and no guest.

It says what is wrong on its output, as `Error: …`, and ends with a status other than 0.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.programs import output_of
from deskrl.core.config import VMwareConfig

_LIMIT_S = 60.0
"""Of a call that nobody else puts a deadline around."""


async def vmrun(config: VMwareConfig, *words: str | Path) -> list[str]:
    """The lines that a command prints; raises DesktopError if it fails. Cancelled, it is ended."""
    try:
        process = await asyncio.create_subprocess_exec(
            *_command(config, words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise DesktopError(f"{config.vmrun} cannot be run: {error.strerror}") from error
    written = await output_of(process)
    return _lines(words, process.returncode, written)


def vmrun_now(config: VMwareConfig, *words: str | Path) -> list[str]:
    """The same for those who may wait."""
    try:
        done = subprocess.run(
            _command(config, words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DesktopError(f"vmrun {words[0]} was not over in {_LIMIT_S:g} s") from error
    except OSError as error:
        raise DesktopError(f"{config.vmrun} cannot be run: {error.strerror}") from error
    return _lines(words, done.returncode, done.stdout)


def _command(config: VMwareConfig, words: Sequence[str | Path]) -> list[str]:
    product = config.product or ("fusion" if sys.platform == "darwin" else "ws")
    return [config.vmrun, "-T", product, *map(str, words)]


def _lines(words: Sequence[str | Path], status: int | None, written: bytes) -> list[str]:
    text = written.decode("utf-8", "replace").strip()
    if status != 0:
        told = " ".join(text.split()).removeprefix("Error: ")[-300:] or f"it ended with status {status}"
        raise DesktopError(f"vmrun {words[0]}: {told}")
    return text.splitlines()
