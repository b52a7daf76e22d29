"""Output of subprocesses that providers start on this machine."""

from __future__ import annotations

import asyncio


async def read_output(process: asyncio.subprocess.Process) -> bytes:
    """Return the standard output of a process when it has ended; kill the process if the caller is cancelled."""
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output
