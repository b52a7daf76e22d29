"""Start of a desktop within a time limit: each reason for which it is not ready is one line."""

from __future__ import annotations

import asyncio

import pytest

from deskrl.actor.desktop_starts import DesktopNotReadyError, reset_in_time
from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.core.config import DesktopConfig


class BrokenDesktop(SimulatedDesktop):
    """Desktop whose reset raises an error, or never ends."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(DesktopConfig(), "broken")
        self._error = error

    async def reset(self) -> None:
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "not ready within 0.05 s"),
        (DesktopError("no\ndisplay"), "no display"),
        (OSError(28, "No space left on device"), r"OSError: \[Errno 28\] No space left on device"),
    ],
)
def test_the_reason_for_which_a_desktop_is_not_ready_is_one_line(error: Exception | None, reason: str) -> None:
    with pytest.raises(DesktopNotReadyError, match=f"^{reason}$"):
        asyncio.run(reset_in_time(BrokenDesktop(error), 0.05))
