"""Lease: one rollout that this actor holds, and the reasons for which it may end early."""

from __future__ import annotations

import asyncio

from deskrl.proto.v1 import rollout_pb2


class LeaseLostError(Exception):
    """The lease expired or its rollout was leased to another actor, so this actor's episode is void."""


class ReplayRejectedError(RuntimeError):
    """The replay service rejected a request for good; the cause is a defect of this actor."""


class Lease:
    """One rollout that this actor holds.

    Args:
        lease_id: identifier that the replay service assigned.
        rollout: rollout to run.
        ttl_s: time in seconds after which the lease expires unless it is extended.
    """

    def __init__(self, lease_id: str, rollout: rollout_pb2.Rollout, ttl_s: float) -> None:
        self.id = lease_id
        self.rollout = rollout
        self.ttl_s = ttl_s
        self.ended = asyncio.Event()
        """Set once the replay service accepts nothing more for this lease."""
        self.error: LeaseLostError | ReplayRejectedError | None = None
        """Reason of an early end; None otherwise."""

    def end(self, error: LeaseLostError | ReplayRejectedError) -> None:
        """End the lease early. The first reason is kept."""
        self.error = self.error or error
        self.ended.set()
