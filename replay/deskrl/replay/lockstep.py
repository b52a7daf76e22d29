"""Lockstep schedule: all desktops reset together, act step by step together, and are evaluated together.

This is the loop of trainers that step a batch of environments, kept as a scheduling mode for comparison.
"""

from __future__ import annotations

import asyncio

from deskrl.replay.leases import LeaseDeadlines
from deskrl.replay.notifier import Notifier


class LockstepBarrier:
    """Barrier of the current round: a step opens once every active lease has asked for it.

    Hand-written, because the number of parties of an `asyncio.Barrier` is fixed and here shrinks as leases end.

    Args:
        num_desktops: number of actors that must ask for work before a round starts; no lease may be active then.
        leases: deadlines of the active leases.
    """

    def __init__(self, num_desktops: int, leases: LeaseDeadlines) -> None:
        self._num_desktops = num_desktops
        self._leases = leases
        self._requested_steps: dict[str, int] = {}
        self._open_step = -1
        self._opened = Notifier()

    def can_start_round(self, num_requests: int) -> bool:
        """Return whether work may be granted to the actors that ask for it."""
        return len(self._leases) == 0 and num_requests >= self._num_desktops

    async def wait(self, lease_id: str, step: int, wait_s: float) -> bool:
        """Return whether every active lease has reached `step`, after a wait of at most `wait_s` seconds."""
        self._requested_steps[lease_id] = max(step, self._requested_steps.get(lease_id, -1))
        self.update()
        try:
            async with asyncio.timeout(wait_s):
                while step > self._open_step:
                    await self._opened.subscribe().wait()
        except TimeoutError:
            pass
        return step <= self._open_step

    def update(self) -> None:
        """Recompute the open step, the lowest that an active lease asks for, after leases or requests changed."""
        active = list(self._leases)
        self._requested_steps = {name: self._requested_steps[name] for name in active if name in self._requested_steps}
        open_step = min((self._requested_steps.get(lease_id, -1) for lease_id in active), default=-1)
        has_opened, self._open_step = open_step > self._open_step, open_step
        if has_opened:
            self._opened.notify()
