"""How the learner gives up an update in the middle. Knows nothing of what is given up: the newest checkpoint stands."""

from __future__ import annotations

from deskrl.core.lifetime import StopEvent


class Stopped(Exception):
    """It is time to end; raised at the next place where ending is safe."""


def check(stop: StopEvent) -> None:
    """Raise `Stopped` if it is time."""
    if stop.is_set():
        raise Stopped
