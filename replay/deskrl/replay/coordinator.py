"""Coordinator: state of the replay service around its writes: lease deadlines, waiting actors and learners, metrics.

Every change is on disk before anyone is notified of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial

from deskrl.core import rpc
from deskrl.core.config import RunConfig
from deskrl.proto.v1 import common_pb2, replay_pb2, rollout_pb2
from deskrl.replay import (
    batch_delivery,
    damaged_episodes,
    image_index,
    queries,
    rollout_scheduler,
    rollouts,
    success_buffer,
)
from deskrl.replay.damaged_episodes import DamagedEpisode, EpisodesDamagedError
from deskrl.replay.lease_dispatcher import LeaseDispatcher
from deskrl.replay.leases import LeaseDeadlines
from deskrl.replay.lockstep import LockstepBarrier
from deskrl.replay.metrics import ReplayMetrics
from deskrl.replay.notifier import Notifier
from deskrl.replay.peer_registry import PeerRegistry
from deskrl.replay.rate_limiter import RateLimiter
from deskrl.replay.rollout_scheduler import LeaseGrant, LeaseRequest
from deskrl.replay.status_errors import EpisodeDamagedError, LeaseNotFoundError, StoreFullError
from deskrl.replay.store import Store

_log = logging.getLogger(__name__)


class Coordinator:
    """Replay service without its gRPC interface."""

    def __init__(self, config: RunConfig, store: Store, metrics: ReplayMetrics) -> None:
        grpo = config.learner.grpo
        self.store = store
        self.rate_limiter = RateLimiter(grpo.max_staleness, grpo.groups_per_batch, config.tasks.num_rollouts)
        self.lease_ttl_s = config.replay.lease_ttl_s
        self.metrics = metrics
        self.peers = PeerRegistry()
        self._max_faults = config.replay.max_faults
        self._success_buffer = success_buffer.SuccessBufferConfig(
            threshold=config.replay.success_threshold,
            capacity=config.replay.successes_per_task if grpo.use_success_buffer else 0,
            seed=config.seed,
            failure_rule=grpo.replace_when,
            sampling=config.replay.success_sampling,
        )
        self._leases = LeaseDeadlines(self.lease_ttl_s)
        metrics.active.set_function(lambda: len(self._leases))
        is_lockstep = config.replay.schedule == "lock_step"
        self._barrier = LockstepBarrier(config.desktop.num_envs, self._leases) if is_lockstep else None
        self._dispatcher = LeaseDispatcher(self._grant, self.release)
        self._group_ready = Notifier()  # wakes learners that wait for a group
        self._has_lost_connections = False
        self._is_closed = False
        self._started_s = time.monotonic()

    async def open(self) -> None:
        """Restore the leases granted by the previous process, each with a full time to live."""
        self.store.set_aside_callbacks.append(partial(self._after_set_aside, asyncio.get_running_loop()))
        now_s = time.monotonic()
        for lease_id in await self.store.read(rollout_scheduler.list_active_leases):
            self._leases.start(lease_id, now_s)
        await self._count_lost_connections()

    async def serve(self) -> None:
        """Grant and expire leases until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._dispatcher.serve())
            tasks.create_task(self._expire())

    def close(self) -> None:
        """Answer all waiting calls."""
        self._is_closed = True
        self._dispatcher.close()
        self._group_ready.notify()

    async def acquire(self, request: LeaseRequest, wait_s: float) -> LeaseGrant | None:
        """Return a lease, after a wait of at most `wait_s` seconds; None if there is no work."""
        return await self._dispatcher.acquire(request, wait_s)

    async def extend(self, lease_ids: Sequence[str]) -> list[str]:
        """Extend leases; return those that are active, or that ended by their own result or fault."""
        alive = self._leases.extend(lease_ids, time.monotonic())
        others = sorted(set(lease_ids).difference(alive))
        if not others:
            return alive
        return alive + await self.store.read(partial(queries.leases_ended_by_holder, lease_ids=others))

    async def await_step(self, lease_id: str, step: int, wait_s: float) -> bool:
        """Return whether an episode may take a step, after waiting at most `wait_s`; always True unless in lockstep."""
        if self._barrier is None:
            return True
        if lease_id not in self._leases:
            raise LeaseNotFoundError(f"lease {lease_id} expired, was released or is unknown: abandon the episode")
        return await self._barrier.wait(lease_id, step, wait_s)

    async def release(self, lease_ids: Iterable[str]) -> None:
        """Release leases, whose rollouts are granted again."""
        released = list(lease_ids)
        await self.store.write(partial(rollouts.release, lease_ids=released))
        for lease_id in released:
            self._leases.end(lease_id)
        self._notify_lease_ended()

    async def finish(
        self,
        lease_id: str,
        result: rollout_pb2.EpisodeResult,
        received: Sequence[image_index.ReceivedImage],
        named: Sequence[bytes],
    ) -> int:
        """End an episode with its result, and return the number of steps on disk."""
        num_steps = await self.store.write(
            lambda connection: rollouts.finish(
                connection, self.store.blob_log, lease_id, result, received, named, self._success_buffer.threshold
            )
        )
        self._end_lease(lease_id)
        self.metrics.episodes.inc()
        if self._has_lost_connections:
            await self._count_lost_connections()
        return num_steps

    async def fault(self, lease_id: str, cause: rollout_pb2.EpisodeFault) -> None:
        """End an attempt by a fault."""
        await self.store.write(partial(rollouts.fault, lease_id=lease_id, cause=cause, max_faults=self._max_faults))
        self._end_lease(lease_id)
        kind = rollout_pb2.FaultKind.Name(cause.kind)
        self.metrics.faults.labels(kind=kind).inc()
        if cause.kind == rollout_pb2.FAULT_KIND_CONNECTION_LOST:
            await self._count_lost_connections()
        _log.warning("lease %s ended by a fault, %s: %s", lease_id, kind, cause.message)

    async def plan_groups(self, groups: Sequence[replay_pb2.GroupPlan]) -> int:
        """Plan groups, and return the number of new ones."""
        num_added = await self.store.write(partial(rollout_scheduler.plan_groups, plans=groups))
        self._dispatcher.notify()
        return num_added

    async def set_policy(self, version: common_pb2.PolicyVersion, num_updates: int) -> None:
        """Record the acting policy version, which moves the rate limit."""
        await self.store.write(partial(batch_delivery.set_policy, version=version, num_updates=num_updates))
        self._dispatcher.notify()

    async def take(
        self, slot: batch_delivery.BatchSlot, dropped_group_ids: Sequence[str], wait_s: float
    ) -> replay_pb2.Group | None:
        """Return the group in a slot of a batch, after waiting at most `wait_s`; None if there is none yet."""
        deadline_s = time.monotonic() + wait_s
        while True:
            notified = self._group_ready.subscribe()
            position = await self.store.write(
                partial(
                    batch_delivery.bind,
                    slot=slot,
                    dropped_group_ids=dropped_group_ids,
                    buffer_config=self._success_buffer,
                )
            )
            self._dispatcher.notify()  # a bound or dropped group may have made room
            if position is not None:
                if (group := await self._read_group(position)) is None:
                    continue
                self._group_ready.notify()  # for waiters of the next slot
                return group
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._is_closed:
                return None
            try:
                await asyncio.wait_for(notified.wait(), left_s)
            except TimeoutError:
                return None

    async def _read_group(self, position: int) -> replay_pb2.Group | None:
        """Return a bound group after verifying it; None, with damaged members set aside, if any is damaged."""
        try:
            group = await self.store.read(partial(queries.group, position=position))
        except EpisodesDamagedError as error:
            if not await self.store.set_aside(error.reasons):
                await self.store.read(partial(queries.check_num_members, position=position))
            return None
        members = await self.store.read(partial(queries.group_members, position=position))
        lost = await self.store.read(partial(image_index.find_lost, blob_log=self.store.blob_log, rollouts=members))
        # What the reader finds may have been moved to another segment in the meantime.
        return None if lost and await self.store.set_aside({}, lost) else group

    async def list_episode(self, rollout: int, *, with_steps: bool) -> replay_pb2.Episode:
        """Return an ended episode.

        Raises:
            EpisodeDamagedError: it is damaged, and was set aside.
        """
        try:
            return await self.store.read(partial(queries.episode, rollout=rollout, with_steps=with_steps))
        except EpisodesDamagedError as error:
            await self.store.set_aside(error.reasons)
            name = await self.store.read(partial(damaged_episodes.episode_id, rollout=rollout))
            raise EpisodeDamagedError(f"episode {name} is damaged ({error.reasons[rollout]})") from error

    async def read_images(self, hashes: Sequence[bytes], max_bytes: int) -> list[bytes]:
        """Return the first screenshots of `hashes`; see `image_index.read`.

        Raises:
            EpisodeDamagedError: a screenshot is damaged, and the episodes that use it were set aside.
        """
        try:
            read = partial(image_index.read, blob_log=self.store.blob_log, hashes=hashes, max_bytes=max_bytes)
            return await self.store.read(read)
        except image_index.ImagesDamagedError as error:
            await self.store.set_aside({}, error.hashes)
            raise EpisodeDamagedError(f"{error}; the episodes that use it were set aside") from error
        except image_index.ImageNotFoundError as error:
            if await self.store.set_aside({}, [error.hash]):
                raise EpisodeDamagedError(f"{error}; the episodes that use it were set aside") from error
            raise

    async def commit(
        self,
        queue: str,
        batch_id: str,
        verdicts: Sequence[replay_pb2.GroupVerdict],
        version: common_pb2.PolicyVersion,
    ) -> None:
        """Commit a batch, which consumes its groups."""
        is_new = await self.store.write(
            partial(batch_delivery.commit, queue=queue, batch_id=batch_id, verdicts=verdicts, version=version)
        )
        self._dispatcher.notify()
        if is_new:
            self.metrics.batches.inc()

    async def status(self) -> replay_pb2.GetReplayStatusResponse:
        """Return counters of the whole store, and the peers."""
        status = await self.store.read(queries.status)
        status.num_actors = self.peers.num_actors(self.lease_ttl_s)
        status.peers.extend(self.peers.list_peers())
        status.service.CopyFrom(rpc.service_status(self._started_s))
        return status

    async def _grant(self, requests: Sequence[LeaseRequest]) -> list[LeaseGrant | None]:
        grant_new = self._barrier is None or self._barrier.can_start_round(len(requests))
        grants = await self.store.write(
            partial(
                rollout_scheduler.grant_leases,
                rate_limiter=self.rate_limiter,
                requests=requests,
                grant_new=grant_new,
            )
        )
        now_s = time.monotonic()
        for grant in grants:
            if grant is not None:
                self._leases.start(grant.lease_id, now_s)
                self.metrics.leases.inc()
        return grants

    def _after_set_aside(self, loop: asyncio.AbstractEventLoop, episodes: Sequence[DamagedEpisode]) -> None:
        """Call `_end_set_aside` in the event loop. Called in the writer's thread."""
        with contextlib.suppress(RuntimeError):  # the service has ended
            loop.call_soon_threadsafe(self._end_set_aside, episodes)

    def _end_set_aside(self, episodes: Sequence[DamagedEpisode]) -> None:
        """End the leases of episodes that were set aside, and grant their rollouts again."""
        for episode in episodes:
            if episode.lease_id is not None:
                self._leases.end(episode.lease_id)
        self._notify_lease_ended()

    async def _count_lost_connections(self) -> None:
        tasks = await self.store.read(queries.lost_connections)
        self._has_lost_connections = bool(tasks)
        self.metrics.observe_lost_connections(tasks)

    def _end_lease(self, lease_id: str) -> None:
        self._leases.end(lease_id)
        self._notify_lease_ended()
        self._group_ready.notify()

    def _notify_lease_ended(self) -> None:
        """Notify actors that wait for work, or for the other episodes of a lockstep round."""
        self._dispatcher.notify()
        if self._barrier is not None:
            self._barrier.update()

    async def _expire(self) -> None:
        """End leases as they expire. A lease granted during the sleep cannot expire before its end."""
        while True:
            now_s = time.monotonic()
            deadline_s = self._leases.next_deadline_s()
            await asyncio.sleep(self.lease_ttl_s if deadline_s is None else max(0.0, deadline_s - now_s))
            expired = self._leases.take_expired(time.monotonic())
            if not expired:
                continue
            try:
                num_expired = await self.store.write(partial(rollouts.expire, lease_ids=expired))
            except StoreFullError:
                for lease_id in expired:  # still active on disk: retry after one time to live
                    self._leases.start(lease_id, time.monotonic())
                continue
            self.metrics.expired.inc(num_expired)
            _log.warning("%d leases expired and will be granted again: %s", num_expired, ", ".join(expired))
            self._notify_lease_ended()
            self._group_ready.notify()
