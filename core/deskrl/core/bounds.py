"""Waiting with a bound for what has none of its own: calls that block for ever, and devices that one can only ask.

Knows threads and clocks; knows nothing of what is waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 5e-5


class GaveUp(RuntimeError):
    """Something did not happen within its bound, or never can."""


def in_background(work: Callable[[], T]) -> Future[T]:
    """Begin `work` in a thread that keeps no process alive; `result(timeout)` of the future is the bounded wait."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def outcome(future: Future[T], timeout_s: float, what: str) -> T:
    """The result of what `in_background` began; raises GaveUp if it has not ended within the bound."""
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        raise GaveUp(f"{what}: nothing within {timeout_s:.0f} s") from error


def wait_until(
    happened: Callable[[], bool], timeout_s: float, what: str, *, possible: Callable[[], bool] = lambda: True
) -> None:
    """Ask until it has happened.

    Raises:
        GaveUp: it did not happen within the bound, or is no longer possible.
    """
    deadline_s = time.monotonic() + timeout_s
    while not happened():
        if not possible():
            raise GaveUp(f"{what}: the other side is gone")
        if time.monotonic() > deadline_s:
            raise GaveUp(f"{what}: nothing within {timeout_s:.0f} s")
        time.sleep(_POLL_S)
