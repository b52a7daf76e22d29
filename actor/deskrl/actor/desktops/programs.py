"""Programs of this machine that providers call: what they print, and their end when nobody waits any more."""

from __future__ import annotations

import asyncio


async def output_of(process: asyncio.subprocess.Process) -> bytes:
    """All that a program prints until its end; it is killed if the caller is cancelled meanwhile."""
    try:
        written, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return written
