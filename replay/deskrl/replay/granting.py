"""Actors that wait for work, and the one task that serves them: first come, first served, many in one transaction.

Knows who waits; which rollout is granted is `planning.grant`'s matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from deskrl.replay.planning import Ask, Grant
from deskrl.replay.refusals import Refused


@dataclass(eq=False)
class _Waiter:
    ask: Ask
    answer: asyncio.Future[Grant | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_late: bool = False
    """Its time is over: it takes the next answer, whatever that is."""
    is_gone: bool = False
    """Its caller hung up."""


class GrantDesk:
    """The queue of waiting actors."""

    def __init__(
        self,
        grant: Callable[[Sequence[Ask]], Awaitable[list[Grant | None]]],
        give_back: Callable[[list[str]], Awaitable[None]],
    ) -> None:
        """Nothing is served before `serve` runs.

        Args:
            grant: answers asks in order, durably.
            give_back: releases leases that nobody took.
        """
        self._grant = grant
        self._give_back = give_back
        self._waiters: list[_Waiter] = []
        self._changed = asyncio.Event()
        self._is_closed = False

    async def ask(self, ask: Ask, wait_s: float) -> Grant | None:
        """Wait up to `wait_s` for work; without any wait, what there is right now."""
        waiter = _Waiter(ask)
        self._waiters.append(waiter)
        self.kick()
        try:
            done, _ = await asyncio.wait([waiter.answer], timeout=0 if self._is_closed else wait_s)
            if not done:
                waiter.is_late = True
                self.kick()
            return await waiter.answer
        except asyncio.CancelledError:
            waiter.is_gone = True
            raise

    def kick(self) -> None:
        """There may be work, or someone new who waits for it."""
        self._changed.set()

    def close(self) -> None:
        """Answer everyone who waits, now and from now on, without further waiting."""
        self._is_closed = True
        self.kick()

    async def serve(self) -> None:
        """Answer for ever."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            round_ = [waiter for waiter in self._waiters if not waiter.is_gone]
            self._waiters = []
            if round_:
                await self._serve_round(round_)

    async def _serve_round(self, waiters: list[_Waiter]) -> None:
        try:
            grants = await self._grant([waiter.ask for waiter in waiters])
        except Refused as refusal:
            for waiter in waiters:
                if not waiter.is_gone:
                    waiter.answer.set_exception(refusal)
            return
        still_waiting, taken, orphaned = [], set(), []
        for waiter, grant in zip(waiters, grants, strict=True):
            if waiter.is_gone:
                if grant is not None:
                    orphaned.append(grant.lease_id)
            elif grant is not None or waiter.is_late or self._is_closed:
                waiter.answer.set_result(grant)
                if grant is not None:
                    taken.add(grant.lease_id)
            else:
                still_waiting.append(waiter)
        self._waiters = still_waiting + self._waiters
        # A caller that hung up and asked again has two waiters and one lease.
        if nobodys := [lease_id for lease_id in orphaned if lease_id not in taken]:
            await self._give_back(nobodys)
