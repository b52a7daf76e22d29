"""Which calls are worth making again, and after what pause. Knows gRPC's status codes, no service."""

from __future__ import annotations

import asyncio

import grpc

# What a service that is restarting, full or overloaded answers; anything else would be answered again the same.
TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
    }
)


class Pauses:
    """Pauses between attempts, each twice as long as the last up to a limit."""

    def __init__(self, first_s: float = 0.2, longest_s: float = 2.0) -> None:
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    @property
    def are_new(self) -> bool:
        """Whether none was taken yet."""
        return self._next_s == self._first_s

    async def take(self) -> None:
        """Wait once."""
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._longest_s)
        await asyncio.sleep(pause_s)
