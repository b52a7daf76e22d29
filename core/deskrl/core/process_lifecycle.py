"""Termination of a role: on SIGTERM or SIGINT, and when the supervisor that started it has ended.

A role first calls `die_with_parent()`, then waits for `stop_event()` and shuts down gracefully once it is set.

A thread of the role detects the end of the supervisor with a pidfd, which becomes readable when the process ends for
any reason. PR_SET_PDEATHSIG is unsuitable: it is tied to the *thread* that started the child, is lost if the parent
ends between fork and the call, and reaches direct children only, which the ranks of torchrun are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import signal
import threading
import time
import weakref
from types import FrameType

SUPERVISOR_VARIABLE = "DESKRL_SUPERVISOR_PID"
"""Environment variable with the process id of the supervisor, inherited by its descendants."""

STOPPED_STATUS = 128 + signal.SIGTERM
"""Exit status of a role that was asked to stop before its work was complete, and whose work another start resumes."""

GRACE_S = 15.0
"""Time between the SIGTERM and the SIGKILL that a role sends itself after its supervisor has ended, in seconds."""

_SIGNAL_CHECK_S = 1.0
"""Longest time that waiting for a stop blocks without running the handlers of signals that have arrived, in seconds.

Python runs them on the main thread only, between two instructions. A signal that the kernel delivers to another thread
does not interrupt a blocking call of the main thread.
"""


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
    """Event that is set once and never cleared, for threads (`is_set`, `wait`) and coroutines (`wait_async`).

    It takes no lock, unlike threading.Event, whose `set` deadlocks in a signal handler that interrupts `wait` on the
    same thread while that thread holds the event's lock.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._descriptor = os.eventfd(0)  # readable once the event is set: nothing reads it
        weakref.finalize(self, os.close, self._descriptor)
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def set(self) -> None:
        """Request the stop; safe in a signal handler and from any thread."""
        self._is_set = True
        os.eventfd_write(self._descriptor, 1)
        for loop, waiter in tuple(self._waiters):
            loop.call_soon_threadsafe(waiter.set)

    def is_set(self) -> bool:
        """Return whether a stop was requested."""
        return self._is_set

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until a stop is requested or `timeout_s` seconds have passed; return whether a stop was requested."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_set:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            poll.poll(1000 * min(left_s, _SIGNAL_CHECK_S))
        return self._is_set

    async def wait_async(self) -> None:
        """Wait until a stop is requested."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        self._waiters.add(entry)
        try:
            while not self._is_set:  # a later `set` finds the waiter
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(entry[1].wait(), _SIGNAL_CHECK_S)
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
