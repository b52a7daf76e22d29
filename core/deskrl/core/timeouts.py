"""Waiting with a timeout for calls that may block indefinitely and for conditions that can only be polled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 5e-5


class WaitFailed(RuntimeError):
    """The awaited event did not occur within its timeout, or can no longer occur."""


def run_in_background(work: Callable[[], T]) -> Future[T]:
    """Run a function in a daemon thread; return the future of its result."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for_result(future: Future[T], timeout_s: float, what: str) -> T:
    """Return the result of a future.

    Args:
        future: future to wait for.
        timeout_s: limit in seconds.
        what: description of the work, for the error.

    Raises:
        WaitFailed: the work has not ended within `timeout_s`; its own errors are raised as they are.
    """
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        raise WaitFailed(f"{what}: timed out after {timeout_s:.0f} s") from error


def wait_until(
    condition: Callable[[], bool], timeout_s: float, what: str, *, is_possible: Callable[[], bool] = lambda: True
) -> None:
    """Poll until a condition holds.

    Args:
        condition: returns whether the condition holds.
        timeout_s: limit in seconds.
        what: description of the condition, for the error.
        is_possible: returns whether the condition can still be fulfilled.

    Raises:
        WaitFailed: the condition does not hold within `timeout_s`, or can no longer be fulfilled.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if not is_possible():
            raise WaitFailed(f"{what}: the peer has ended")
        if time.monotonic() > deadline_s:
            raise WaitFailed(f"{what}: timed out after {timeout_s:.0f} s")
        time.sleep(_POLL_S)
