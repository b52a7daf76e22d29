"""Cancels the learner's work when the process is to stop; what the newest checkpoint holds is kept."""

from __future__ import annotations

from deskrl.core.process_lifecycle import StopEvent


class Stopped(Exception):
    """The process is to stop; raised only where stopping is safe."""


def check(stop: StopEvent) -> None:
    """Raise `Stopped` if the stop event is set."""
    if stop.is_set():
        raise Stopped
