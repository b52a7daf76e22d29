"""Starts of desktops: one with a time limit, and the record of those of an actor process, which gives up at last."""

from __future__ import annotations

import asyncio
import time

from deskrl.actor.desktops.base import Desktop, DesktopError
from deskrl.core.error_text import one_line, typed_line

_MAX_REASON_CHARACTERS = 300


class DesktopStartError(RuntimeError):
    """None of the process's desktops could be started for `desktop.start_retry_timeout_s`."""


class DesktopNotReadyError(DesktopError):
    """A desktop did not start, or could not be reset; the message is the reason in one line."""


async def reset_in_time(desktop: Desktop, timeout_s: float) -> None:
    """Reset a desktop, or start it if it does not run.

    Args:
        desktop: desktop to reset.
        timeout_s: time limit in seconds.

    Raises:
        DesktopNotReadyError: it did not start, or not in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await desktop.reset()
    except TimeoutError as error:
        raise DesktopNotReadyError(f"not ready within {timeout_s:g} s") from error
    except DesktopError as error:
        raise DesktopNotReadyError(one_line(error)) from error
    except OSError as error:  # such as a full disk
        raise DesktopNotReadyError(typed_line(error)) from error


class DesktopStarts:
    """Record of start attempts.

    Args:
        timeout_s: time in seconds after which the process gives up if none of its desktops is started.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._started: set[object] = set()
        self._set_aside: set[object] = set()
        self._none_since_s = time.monotonic()
        self.last_error = ""
        """Why the desktop that was set aside last did not start; empty while no desktop is set aside."""

    @property
    def num_set_aside(self) -> int:
        """Number of desktops that did not start and are retried."""
        return len(self._set_aside)

    def record_success(self, owner: object) -> None:
        """Record that the desktop of `owner` was started or reset."""
        self._started.add(owner)
        self._set_aside.discard(owner)
        if not self._set_aside:
            self.last_error = ""

    def record_failure(self, owner: object, reason: str) -> None:
        """Record that the desktop of `owner` did not start.

        Raises:
            DesktopStartError: none of the process's desktops could be started for too long.
        """
        if owner in self._started:
            self._started.remove(owner)
            if not self._started:
                self._none_since_s = time.monotonic()
        self._set_aside.add(owner)
        self.last_error = reason[:_MAX_REASON_CHARACTERS]
        if not self._started and time.monotonic() - self._none_since_s > self._timeout_s:
            raise DesktopStartError(
                f"no desktop could be started for {self._timeout_s:g} s (desktop.start_retry_timeout_s); "
                f"last error: {self.last_error}"
            )
