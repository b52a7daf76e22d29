"""Guests that exist before a run and serve one desktop at a time: how one is held, whichever process asks.

A lock file says who holds it, and the kernel drops the lock with its holder. Knows no provider.
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

_turns = itertools.count()


async def hold_one(locks: Sequence[Path], deadline_s: float, kind: str) -> tuple[int, IO[bytes]]:
    """Which of these is free, and its lock, which lasts until it is closed.

    The search begins with the next one each time, lest a dead guest be taken again and again.

    Args:
        locks: a file for each guest; made where there is none.
        deadline_s: on the monotonic clock.
        kind: of the guests, in a word or two.

    Raises:
        DesktopError: none is free in time.
    """
    while True:
        first = next(_turns)
        for number in range(len(locks)):
            index = (first + number) % len(locks)
            if (lock := hold(locks[index])) is not None:
                return index, lock
        if time.monotonic() > deadline_s:
            raise DesktopError(f"none of {len(locks)} {kind} is free")
        await asyncio.sleep(_POLL_S)


def hold(path: Path) -> IO[bytes] | None:
    """The lock, open for reading and writing; None if another one holds it."""
    lock = open(path, "a+b")  # noqa: SIM115 - held
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
