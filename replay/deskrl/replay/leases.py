"""When leases run out. Pure: knows identifiers and times that it is told; the clock and the store are its caller's.

Deadlines are kept in memory only: what is durable is that a lease is active. After a restart of replay every active
lease starts with a fresh time to live, so that no actor loses a running episode because replay was away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

MAX_EXPIRIES = 10
"""A rollout whose leases ran out this often is FAULTED: a task that kills its actors must not do so for ever."""


class LeaseClock:
    """Deadlines of active leases."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        # Insertion order is deadline order, because every deadline is "now + ttl" of a clock that only goes forward.
        self._deadlines_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._deadlines_s)

    def __iter__(self) -> Iterator[str]:
        return iter(self._deadlines_s)

    def start(self, lease_id: str, now_s: float) -> None:
        """A lease was granted, or found active at start: it lives for one time to live from now."""
        self._deadlines_s.pop(lease_id, None)
        self._deadlines_s[lease_id] = now_s + self.ttl_s

    def extend(self, lease_ids: Iterable[str], now_s: float) -> list[str]:
        """Heartbeat: those of `lease_ids` that are alive, for a whole time to live from now."""
        alive = [lease_id for lease_id in lease_ids if self._deadlines_s.get(lease_id, now_s) > now_s]
        for lease_id in alive:
            self.start(lease_id, now_s)
        return alive

    def end(self, lease_id: str) -> None:
        """A lease ended by its result, its fault or its release."""
        self._deadlines_s.pop(lease_id, None)

    def take_expired(self, now_s: float) -> list[str]:
        """Leases whose time has run out; they are forgotten here."""
        expired = []
        for lease_id, deadline_s in self._deadlines_s.items():
            if deadline_s > now_s:
                break
            expired.append(lease_id)
        for lease_id in expired:
            del self._deadlines_s[lease_id]
        return expired

    def next_deadline_s(self) -> float | None:
        """When the next lease runs out if nobody extends it."""
        return next(iter(self._deadlines_s.values()), None)
