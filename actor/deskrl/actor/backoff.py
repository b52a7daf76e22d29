"""Backoff between attempts of a call, and the gRPC statuses after which another attempt is worthwhile."""

from __future__ import annotations

import asyncio

import grpc

# Statuses of a service that is restarting, full or overloaded. Any other status would be returned again.
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


class Backoff:
    """Exponential backoff: each pause is twice as long as the previous one, up to a limit.

    Written by hand because tenacity retries one call, whereas the callers here change the replica between attempts, or
    start again with a short pause once a stream has progressed.
    """

    def __init__(self, first_s: float = 0.2, longest_s: float = 2.0) -> None:
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    @property
    def is_first(self) -> bool:
        """Whether the next pause is the first one."""
        return self._next_s == self._first_s

    async def sleep(self) -> None:
        """Sleep for the next pause."""
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._longest_s)
        await asyncio.sleep(pause_s)
