"""Deadlines of active leases.

Deadlines are kept in memory only; the store records which leases are active. After a restart of replay every active
lease starts with a full time to live, so that no actor loses a running episode because replay was unavailable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

MAX_EXPIRATIONS = 10
"""Number of expired leases after which a rollout is FAULTED, so that a task that kills its actors is not retried for
ever."""


class LeaseDeadlines:
    """Deadlines of active leases. Callers pass the time, so that the class needs no clock."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        # Insertion order is deadline order, because every deadline is "now + ttl" of a monotonic clock.
        self._deadlines_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._deadlines_s)

    def __iter__(self) -> Iterator[str]:
        return iter(self._deadlines_s)

    def start(self, lease_id: str, now_s: float) -> None:
        """Start the time to live of a lease that was granted, or found active when the service started."""
        self._deadlines_s.pop(lease_id, None)
        self._deadlines_s[lease_id] = now_s + self.ttl_s

    def extend(self, lease_ids: Iterable[str], now_s: float) -> list[str]:
        """Extend leases by a full time to live from now; return those that have not expired."""
        alive = [lease_id for lease_id in lease_ids if self._deadlines_s.get(lease_id, now_s) > now_s]
        for lease_id in alive:
            self.start(lease_id, now_s)
        return alive

    def end(self, lease_id: str) -> None:
        """Remove a lease that ended by its result, by a fault or by its release."""
        self._deadlines_s.pop(lease_id, None)

    def take_expired(self, now_s: float) -> list[str]:
        """Remove and return the leases whose deadline has passed."""
        expired = []
        for lease_id, deadline_s in self._deadlines_s.items():
            if deadline_s > now_s:
                break
            expired.append(lease_id)
        for lease_id in expired:
            del self._deadlines_s[lease_id]
        return expired

    def next_deadline_s(self) -> float | None:
        """Return the earliest deadline; None without active leases."""
        return next(iter(self._deadlines_s.values()), None)
