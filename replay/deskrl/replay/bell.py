"""A bell that wakes whoever waits for something to have happened since they last looked. Knows not what happened."""

from __future__ import annotations

import asyncio


class Bell:
    """Rung by whoever changes something, listened to by whoever waits for it."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Something happened."""
        self._rung.set()
        self._rung = asyncio.Event()

    def listen(self) -> asyncio.Event:
        """An event that the next ring sets. Take it first, look then, wait last: nothing is missed."""
        return self._rung
