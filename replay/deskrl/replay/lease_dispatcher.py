"""Lease dispatcher: queues actors that wait for work and grants leases, first come, first served.

One task serves all waiting actors, so that many grants share one transaction. `rollout_scheduler.grant_leases` chooses
the rollouts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from deskrl.replay.rollout_scheduler import LeaseGrant, LeaseRequest
from deskrl.replay.status_errors import StatusError


@dataclass(eq=False)
class _Waiter:
    request: LeaseRequest
    response: asyncio.Future[LeaseGrant | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    is_timed_out: bool = False
    """The wait is over: the next response is final, with or without a lease."""
    is_cancelled: bool = False
    """The caller has cancelled its call."""


class LeaseDispatcher:
    """Queue of actors that wait for a lease."""

    def __init__(
        self,
        grant: Callable[[Sequence[LeaseRequest]], Awaitable[list[LeaseGrant | None]]],
        release: Callable[[list[str]], Awaitable[None]],
    ) -> None:
        """Create the queue; `serve` serves it.

        Args:
            grant: answers requests in order and durably; None where there is no work.
            release: releases leases whose caller has gone.
        """
        self._grant = grant
        self._release = release
        self._waiters: list[_Waiter] = []
        self._changed = asyncio.Event()
        self._is_closed = False

    async def acquire(self, request: LeaseRequest, wait_s: float) -> LeaseGrant | None:
        """Return a lease, after a wait of at most `wait_s` seconds; None if there is no work."""
        waiter = _Waiter(request)
        self._waiters.append(waiter)
        self.notify()
        try:
            done, _ = await asyncio.wait([waiter.response], timeout=0 if self._is_closed else wait_s)
            if not done:
                waiter.is_timed_out = True
                self.notify()
            return await waiter.response
        except asyncio.CancelledError:
            waiter.is_cancelled = True
            raise

    def notify(self) -> None:
        """Look for work again: rollouts or waiters may have been added."""
        self._changed.set()

    def close(self) -> None:
        """Answer all present and future requests without waiting."""
        self._is_closed = True
        self.notify()

    async def serve(self) -> None:
        """Serve requests until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            waiters = [waiter for waiter in self._waiters if not waiter.is_cancelled]
            self._waiters = []
            if waiters:
                await self._serve_waiters(waiters)

    async def _serve_waiters(self, waiters: list[_Waiter]) -> None:
        try:
            grants = await self._grant([waiter.request for waiter in waiters])
        except StatusError as error:
            for waiter in waiters:
                if not waiter.is_cancelled:
                    waiter.response.set_exception(error)
            return
        still_waiting, taken, orphaned = [], set(), []
        for waiter, grant in zip(waiters, grants, strict=True):
            if waiter.is_cancelled:
                if grant is not None:
                    orphaned.append(grant.lease_id)
            elif grant is not None or waiter.is_timed_out or self._is_closed:
                waiter.response.set_result(grant)
                if grant is not None:
                    taken.add(grant.lease_id)
            else:
                still_waiting.append(waiter)
        self._waiters = still_waiting + self._waiters
        # A caller that cancelled and asked again has two waiters and one lease.
        if unused := [lease_id for lease_id in orphaned if lease_id not in taken]:
            await self._release(unused)
