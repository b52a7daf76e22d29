"""Notifier: broadcast notification for asyncio waiters."""

from __future__ import annotations

import asyncio


class Notifier:
    """Wakes every waiter at once. Hand-written, because `asyncio.Condition` takes a lock for each look at the state."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake all present waiters."""
        self._event.set()
        self._event = asyncio.Event()

    def subscribe(self) -> asyncio.Event:
        """Return an event that the next notification sets.

        Subscribe first, then check the condition, then wait: no notification is missed.
        """
        return self._event
