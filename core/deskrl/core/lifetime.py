"""When a role ends: on a signal, and when the supervisor that started it is gone.

Knows signals and processes; knows no role. A role calls `die_with_parent()` first thing, then waits on
`stop_event()` and drains when it is set.

How a role learns that its supervisor died: a thread of it holds a pidfd of the supervisor, which the kernel makes
readable when that process ends, however it ends. PR_SET_PDEATHSIG is not used: it follows the *thread* that started the
child, is lost between fork and call, and reaches only direct children (the ranks of a torchrun are none).
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
from types import FrameType

SUPERVISOR_VARIABLE = "DESKRL_SUPERVISOR_PID"
"""Environment variable in which a supervisor names itself to everything below it."""

GRACE_S = 15.0
"""Between the SIGTERM and the SIGKILL that a role sends itself when its supervisor is gone."""


def supervised_environment() -> dict[str, str]:
    """What this process adds to the environment of roles that must not outlive it."""
    return {SUPERVISOR_VARIABLE: str(os.getpid())}


def die_with_parent(grace_s: float = GRACE_S) -> None:
    """End when the supervisor does: SIGTERM to oneself, so that the role drains, and SIGKILL `grace_s` later.

    Without a supervisor (started by hand, by Slurm, in a container) nothing is watched. A supervisor that is gone
    already counts as one that ends now.
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None:
        return
    try:
        descriptor = os.pidfd_open(int(supervisor))
    except ProcessLookupError:
        descriptor = None
    threading.Thread(target=_follow, args=(descriptor, grace_s), name="die-with-parent", daemon=True).start()


def _follow(descriptor: int | None, grace_s: float) -> None:
    if descriptor is not None:
        select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


class StopEvent:
    """Set for good by the first SIGTERM or SIGINT. Plain code asks or waits, a coroutine awaits `wait_async`."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def set(self) -> None:
        """Stop, for a reason of one's own. Safe in a signal handler and from any thread."""
        self._set.set()
        for loop, waiter in tuple(self._waiters):
            loop.call_soon_threadsafe(waiter.set)

    def is_set(self) -> bool:
        """Whether it is time to stop."""
        return self._set.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it is time to stop, or for `timeout_s`; whether it is time to stop."""
        return self._set.wait(timeout_s)

    async def wait_async(self) -> None:
        """Wait until it is time to stop, on the running loop."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        self._waiters.add(entry)
        try:
            if not self._set.is_set():  # a `set` after this line finds the waiter
                await entry[1].wait()
        finally:
            self._waiters.discard(entry)


def stop_event() -> StopEvent:
    """Turn SIGTERM and SIGINT into an event; call it once, on the main thread. Further signals change nothing.

    A terminal's Ctrl-C reaches a role twice, from the terminal and through its supervisor, so a second signal must
    not cut the drain short.
    """
    event = StopEvent()

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return event
