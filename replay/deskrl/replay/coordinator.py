"""What happens around a write: clocks started and stopped, waiting actors and learners woken, metrics counted.

Knows the order of things (first on disk, then told to anyone); the rules are in `planning`, `rollouts` and `batches`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial

from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.proto.v1 import common_pb2, replay_pb2, rollout_pb2
from deskrl.replay import batches, images, planning, reading, rollouts, successes
from deskrl.replay.attendance import Attendance
from deskrl.replay.bell import Bell
from deskrl.replay.granting import GrantDesk
from deskrl.replay.leases import LeaseClock
from deskrl.replay.metrics import Metrics
from deskrl.replay.pacing import Pacing
from deskrl.replay.planning import Ask, Grant
from deskrl.replay.refusals import LeaseLost, StoreFull
from deskrl.replay.rounds import Rounds
from deskrl.replay.store import Store

_log = logging.getLogger("deskrl.replay")


class Coordinator:
    """The replay service without its wire."""

    def __init__(self, config: RunConfig, store: Store, metrics: Metrics) -> None:
        grpo = config.learner.grpo
        self.store = store
        self.pacing = Pacing(grpo.max_staleness, grpo.groups_per_batch, config.tasks.rollouts)
        self.lease_ttl_s = config.replay.lease_ttl_s
        self.metrics = metrics
        self.attendance = Attendance()
        self._max_faults = config.replay.max_faults
        self._rules = successes.SuccessRules(
            above=successes.threshold(config.replay.success_above),
            capacity=config.replay.successes_per_task if grpo.replay_successes else 0,
            seed=config.seed,
            when=grpo.replay_when,
            choice=config.replay.success_choice,
        )
        self._clock = LeaseClock(self.lease_ttl_s)
        metrics.active.set_function(lambda: len(self._clock))
        lock_step = config.replay.schedule == "lock_step"
        self._rounds = Rounds(config.desktop.num_envs, self._clock) if lock_step else None
        self._desk = GrantDesk(self._grant, self.release)
        self._takers = Bell()  # rung when whoever waits for a group may find one
        self._is_closed = False
        self._started_s = time.monotonic()

    async def open(self) -> None:
        """Take up the leases that the last service granted: each lives for a whole time to live from now."""
        now_s = time.monotonic()
        for lease_id in await self.store.read(planning.active_leases):
            self._clock.start(lease_id, now_s)

    async def serve(self) -> None:
        """Grant and expire leases for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._desk.serve())
            tasks.create_task(self._expire())

    def close(self) -> None:
        """Answer everyone who waits."""
        self._is_closed = True
        self._desk.close()
        self._takers.ring()

    async def acquire(self, ask: Ask, wait_s: float) -> Grant | None:
        """A lease for an actor, after a wait if need be."""
        return await self._desk.ask(ask, wait_s)

    async def extend(self, lease_ids: Sequence[str]) -> list[str]:
        """Those leases that are not lost: alive, or ended by their own result or fault."""
        alive = self._clock.extend(lease_ids, time.monotonic())
        others = set(lease_ids).difference(alive)
        return (
            alive + await self.store.read(partial(reading.own_endings, lease_ids=sorted(others))) if others else alive
        )

    async def await_turn(self, lease_id: str, turn: int, wait_s: float) -> bool:
        """Whether an episode may go on with a turn, after a wait if need be; out of lock-step it always may."""
        if self._rounds is None:
            return True
        if lease_id not in self._clock:
            raise LeaseLost(f"{lease_id} is not held any more: abandon the episode")
        return await self._rounds.wait(lease_id, turn, wait_s)

    async def release(self, lease_ids: Iterable[str]) -> None:
        """Give work back."""
        names = list(lease_ids)
        await self.store.write(partial(rollouts.release, lease_ids=names))
        for lease_id in names:
            self._clock.end(lease_id)
        self._leases_ended()

    async def finish(
        self,
        lease_id: str,
        result: rollout_pb2.EpisodeResult,
        received: Sequence[images.Received],
        named: Sequence[bytes],
    ) -> int:
        """End an episode with its result; returns the number of its steps on disk."""
        num_steps = await self.store.write(
            lambda connection: rollouts.finish(
                connection, self.store.segments, lease_id, result, received, named, self._rules.above
            )
        )
        self._ended(lease_id)
        self.metrics.episodes.inc()
        return num_steps

    async def fault(self, lease_id: str, cause: rollout_pb2.EpisodeFault) -> None:
        """End an attempt by a fault."""
        await self.store.write(partial(rollouts.fault, lease_id=lease_id, cause=cause, max_faults=self._max_faults))
        self._ended(lease_id)
        kind = rollout_pb2.FaultKind.Name(cause.kind)
        self.metrics.faults.labels(kind=kind).inc()
        _log.warning("%s ended by a fault, %s: %s", lease_id, kind, cause.message)

    async def plan(self, groups: Sequence[replay_pb2.GroupPlan]) -> int:
        """Add work; returns how many groups are new."""
        num_added = await self.store.write(partial(planning.plan, plans=groups))
        self._desk.kick()
        return num_added

    async def set_policy(self, version: common_pb2.PolicyVersion, num_updates: int) -> None:
        """Move the pacing."""
        await self.store.write(partial(batches.set_policy, version=version, num_updates=num_updates))
        self._desk.kick()

    async def take(
        self, place: batches.Place, dropped_group_ids: Sequence[str], wait_s: float
    ) -> replay_pb2.Group | None:
        """The group at a place in a batch, after a wait if need be."""
        deadline_s = time.monotonic() + wait_s
        while True:
            rung = self._takers.listen()
            position = await self.store.write(
                partial(batches.bind, place=place, dropped_group_ids=dropped_group_ids, rules=self._rules)
            )
            self._desk.kick()  # what was bound or dropped may have made room
            if position is not None:
                self._takers.ring()  # who waits for the next place
                return await self.store.read(partial(reading.group, position=position))
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._is_closed:
                return None
            try:
                await asyncio.wait_for(rung.wait(), left_s)
            except TimeoutError:
                return None

    async def commit(
        self,
        queue: str,
        batch_id: str,
        verdicts: Sequence[replay_pb2.GroupVerdict],
        version: common_pb2.PolicyVersion,
    ) -> None:
        """Consume a batch."""
        is_new = await self.store.write(
            partial(batches.commit, queue=queue, batch_id=batch_id, verdicts=verdicts, version=version)
        )
        self._desk.kick()
        if is_new:
            self.metrics.batches.inc()

    async def status(self) -> replay_pb2.GetReplayStatusResponse:
        """Everything that can be counted, and who is there."""
        status = await self.store.read(reading.status)
        status.num_actors = self.attendance.num_actors(self.lease_ttl_s)
        status.peers.extend(self.attendance.peers())
        status.service.CopyFrom(rpc.service_status(self._started_s))
        return status

    async def _grant(self, asks: Sequence[Ask]) -> list[Grant | None]:
        new_too = self._rounds is None or self._rounds.may_begin(len(asks))
        grants = await self.store.write(partial(planning.grant, pacing=self.pacing, asks=asks, new_too=new_too))
        now_s = time.monotonic()
        for grant in grants:
            if grant is not None:
                self._clock.start(grant.lease_id, now_s)
                self.metrics.leases.inc()
        return grants

    def _ended(self, lease_id: str) -> None:
        self._clock.end(lease_id)
        self._leases_ended()
        self._takers.ring()

    def _leases_ended(self) -> None:
        """Who waits for work, or for the others of a round, looks again."""
        self._desk.kick()
        if self._rounds is not None:
            self._rounds.update()

    async def _expire(self) -> None:
        """End leases as they run out. A lease granted while this sleeps cannot run out before it wakes."""
        while True:
            now_s = time.monotonic()
            deadline_s = self._clock.next_deadline_s()
            await asyncio.sleep(self.lease_ttl_s if deadline_s is None else max(0.0, deadline_s - now_s))
            expired = self._clock.take_expired(time.monotonic())
            if not expired:
                continue
            try:
                num_expired = await self.store.write(partial(rollouts.expire, lease_ids=expired))
            except StoreFull:
                for lease_id in expired:  # still active on disk: try again one time to live from now
                    self._clock.start(lease_id, time.monotonic())
                continue
            self.metrics.expired.inc(num_expired)
            _log.warning("%d leases ran out and are granted again: %s", num_expired, ", ".join(expired))
            self._leases_ended()
            self._takers.ring()
