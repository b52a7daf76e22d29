"""File locks for guests that exist before a run and serve one desktop at a time, across processes.

The kernel releases a lock when its holder ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from deskrl.actor.desktops.base import DesktopError

_POLL_S = 0.2

_search_starts = itertools.count()


async def acquire_any(locks: Sequence[Path], deadline_s: float, kind: str) -> tuple[int, IO[bytes]]:
    """Acquire the lock of any free guest.

    Successive searches start at successive guests, so that a dead guest is not chosen again and again.

    Args:
        locks: one lock file per guest; missing files are created.
        deadline_s: deadline on the monotonic clock, in seconds.
        kind: plural noun for the guests in error messages.

    Returns:
        Index of the guest and its open lock file. Closing the file releases the lock.

    Raises:
        DesktopError: no guest was free before the deadline.
    """
    while True:
        first = next(_search_starts)
        for offset in range(len(locks)):
            index = (first + offset) % len(locks)
            if (lock := try_acquire(locks[index])) is not None:
                return index, lock
        if time.monotonic() > deadline_s:
            raise DesktopError(f"none of {len(locks)} {kind} is free")
        await asyncio.sleep(_POLL_S)


def try_acquire(path: Path) -> IO[bytes] | None:
    """Acquire one lock and return its file, open for reading and writing; return None if another holder has it."""
    lock = open(path, "a+b")  # noqa: SIM115 - stays open while the lock is held
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
