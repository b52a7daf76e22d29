"""Lock-step: all desktops reset, then act together turn by turn, then are evaluated together; nobody is ahead.

The loop of trainers that step a batch of environments, kept as a mode of scheduling so that it can be compared with.
Knows which leases run and where each stands; knows neither work nor store.
"""

from __future__ import annotations

import asyncio

from deskrl.replay.bell import Bell
from deskrl.replay.leases import LeaseClock


class Rounds:
    """The present round: the leases that run, and the turn at which each of them asks to go on.

    Args:
        num_desktops: a round begins when so many ask for work and no lease runs.
        clock: of the running leases.
    """

    def __init__(self, num_desktops: int, clock: LeaseClock) -> None:
        self._num_desktops = num_desktops
        self._clock = clock
        self._asked: dict[str, int] = {}
        self._open_turn = -1
        self._opened = Bell()

    def may_begin(self, num_asking: int) -> bool:
        """Whether work may be granted to those who ask."""
        return len(self._clock) == 0 and num_asking >= self._num_desktops

    async def wait(self, lease_id: str, turn: int, wait_s: float) -> bool:
        """Whether every running lease has come as far as `turn`, after a wait if need be."""
        self._asked[lease_id] = max(turn, self._asked.get(lease_id, -1))
        self.update()
        try:
            async with asyncio.timeout(wait_s):
                while turn > self._open_turn:
                    await self._opened.listen().wait()
        except TimeoutError:
            pass
        return turn <= self._open_turn

    def update(self) -> None:
        """A lease began, ended, or asks: the turn that is open is the least that any running one asks for."""
        running = list(self._clock)
        self._asked = {lease_id: self._asked[lease_id] for lease_id in running if lease_id in self._asked}
        open_turn = min((self._asked.get(lease_id, -1) for lease_id in running), default=-1)
        has_opened, self._open_turn = open_turn > self._open_turn, open_turn
        if has_opened:
            self._opened.ring()
