"""Start attempts of the desktops of one actor process: which of them are set aside, and when the process gives up."""

from __future__ import annotations

import time

_MAX_REASON_CHARACTERS = 300


class DesktopStartError(RuntimeError):
    """None of the process's desktops could be started for `desktop.start_retry_timeout_s`."""


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
