"""Termination of a role: on SIGTERM or SIGINT, and when the supervisor that started it has ended.

A role first calls `die_with_parent()`, then waits for `stop_event()` and shuts down gracefully once it is set.

A thread of the role detects the end of the supervisor with a pidfd, which becomes readable when the process ends for
any reason. PR_SET_PDEATHSIG is unsuitable: it is tied to the *thread* that started the child, is lost if the parent
ends between fork and the call, and reaches direct children only, which the ranks of torchrun are not.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
from types import FrameType

SUPERVISOR_VARIABLE = "DESKRL_SUPERVISOR_PID"
"""Environment variable with the process id of the supervisor, inherited by its descendants."""

GRACE_S = 15.0
"""Time between the SIGTERM and the SIGKILL that a role sends itself after its supervisor has ended, in seconds."""


def supervised_environment() -> dict[str, str]:
    """Return the environment variables of roles that must not outlive this process."""
    return {SUPERVISOR_VARIABLE: str(os.getpid())}


def die_with_parent(grace_s: float = GRACE_S) -> None:
    """Terminate this process after its supervisor has ended: with SIGTERM, and with SIGKILL `grace_s` seconds later.

    Has no effect on a role without a supervisor (started manually, by Slurm or in a container). A supervisor that has
    ended already counts as ending now.
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None:
        return
    try:
        descriptor = os.pidfd_open(int(supervisor))
    except ProcessLookupError:
        descriptor = None
    threading.Thread(target=_terminate_after, args=(descriptor, grace_s), name="die-with-parent", daemon=True).start()


def _terminate_after(descriptor: int | None, grace_s: float) -> None:
    if descriptor is not None:
        select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


class StopEvent:
    """Event that is set once and never cleared, for threads (`is_set`, `wait`) and coroutines (`wait_async`)."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def set(self) -> None:
        """Request the stop; safe in a signal handler and from any thread."""
        self._set.set()
        for loop, waiter in tuple(self._waiters):
            loop.call_soon_threadsafe(waiter.set)

    def is_set(self) -> bool:
        """Return whether a stop was requested."""
        return self._set.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until a stop is requested or `timeout_s` seconds have passed; return whether a stop was requested."""
        return self._set.wait(timeout_s)

    async def wait_async(self) -> None:
        """Wait until a stop is requested."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        self._waiters.add(entry)
        try:
            if not self._set.is_set():  # a later `set` finds the waiter
                await entry[1].wait()
        finally:
            self._waiters.discard(entry)


def stop_event() -> StopEvent:
    """Return an event that SIGTERM and SIGINT set; call once, on the main thread.

    Further signals have no effect: Ctrl-C reaches a role twice, from the terminal and through its supervisor, and the
    second signal must not interrupt the graceful shutdown.
    """
    event = StopEvent()

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return event
