"""Work that an actor holds, and how it ends before its time. Knows no wire."""

from __future__ import annotations

import asyncio

from deskrl.proto.v1 import rollout_pb2


class LeaseLost(Exception):
    """The work was granted to another actor: what this one has of it is worthless."""


class ReplayRefused(RuntimeError):
    """Replay will not take what was sent, however often: this actor's fault."""


class Lease:
    """One rollout that this actor holds. `over` is set when replay would not take the episode any more."""

    def __init__(self, lease_id: str, rollout: rollout_pb2.Rollout, ttl_s: float) -> None:
        self.id = lease_id
        self.rollout = rollout
        self.ttl_s = ttl_s
        self.over = asyncio.Event()
        self.error: LeaseLost | ReplayRefused | None = None

    def end(self, error: LeaseLost | ReplayRefused) -> None:
        """Say why there is no use in going on."""
        self.error = self.error or error
        self.over.set()
