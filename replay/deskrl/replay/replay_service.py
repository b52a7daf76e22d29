"""ReplayService: gRPC interface of the learner, reports and status displays; also checks the plans of groups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from deskrl.proto.v1 import common_pb2, replay_pb2, replay_pb2_grpc, rollout_pb2
from deskrl.replay import batch_delivery, image_index, queries
from deskrl.replay.coordinator import Coordinator
from deskrl.replay.rate_limiter import RATE_LIMITED_QUEUE
from deskrl.replay.servicer_helpers import aborts_on_status_error, bounded_wait_s, check_names, check_protocol
from deskrl.replay.status_errors import InvalidRequestError, StatusError

_READ_AHEAD_BYTES = 4 * 1024**2


class ReplayServicer(replay_pb2_grpc.ReplayServiceServicer):
    """Implementation of replay.proto."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    @aborts_on_status_error
    async def PlanGroups(self, request: replay_pb2.PlanGroupsRequest, context: Any) -> replay_pb2.PlanGroupsResponse:
        """Plan groups of rollouts."""
        check_protocol(request.peer)
        self._coordinator.peers.record_call(request.peer)
        for group in request.groups:
            _check_plan(group, self._coordinator.rate_limiter.rollouts_per_group)
        return replay_pb2.PlanGroupsResponse(num_added=await self._coordinator.plan_groups(list(request.groups)))

    @aborts_on_status_error
    async def SetPolicyVersion(
        self, request: replay_pb2.SetPolicyVersionRequest, context: Any
    ) -> replay_pb2.SetPolicyVersionResponse:
        """Record the acting policy version, which moves the rate limit."""
        await self._coordinator.set_policy(request.version, request.num_updates)
        return replay_pb2.SetPolicyVersionResponse()

    @aborts_on_status_error
    async def TakeGroup(self, request: replay_pb2.TakeGroupRequest, context: Any) -> replay_pb2.TakeGroupResponse:
        """Bind a complete group to a slot of a batch and return it."""
        check_protocol(request.peer)
        if not request.queue or not request.batch_id:
            raise InvalidRequestError("TakeGroup: queue and batch_id must be set")
        slot = batch_delivery.BatchSlot(request.queue, request.batch_id, request.ordinal)
        wait_s = bounded_wait_s(request.wait_s, context)
        with self._coordinator.peers.record_waiting(request.peer):
            group = await self._coordinator.take(slot, list(request.dropped_group_ids), wait_s)
        return replay_pb2.TakeGroupResponse(group=group)

    @aborts_on_status_error
    async def CommitBatch(self, request: replay_pb2.CommitBatchRequest, context: Any) -> replay_pb2.CommitBatchResponse:
        """Commit a batch, which consumes its groups."""
        check_protocol(request.peer)
        self._coordinator.peers.record_call(request.peer)
        await self._coordinator.commit(request.queue, request.batch_id, list(request.verdicts), request.version)
        return replay_pb2.CommitBatchResponse()

    async def FetchImages(
        self, request: replay_pb2.FetchImagesRequest, context: Any
    ) -> AsyncIterator[replay_pb2.FetchImagesResponse]:
        """Stream screenshots in the order of the request."""
        try:
            hashes = [image_index.parse_hash(text) for text in request.hashes]
            read_ahead = self._read_images(hashes)
            try:
                while hashes:
                    part = await read_ahead
                    names, hashes = hashes[: len(part)], hashes[len(part) :]
                    read_ahead = self._read_images(hashes)  # while this part is sent
                    for name, data in zip(names, part, strict=True):
                        yield replay_pb2.FetchImagesResponse(image=common_pb2.Image(hash=name.hex(), data=data))
            finally:
                read_ahead.cancel()
        except StatusError as error:
            await context.abort(error.code, str(error))

    def _read_images(self, hashes: list[bytes]) -> asyncio.Task[list[bytes]]:
        return asyncio.create_task(self._coordinator.read_images(hashes, _READ_AHEAD_BYTES))

    async def ListEpisodes(
        self, request: replay_pb2.ListEpisodesRequest, context: Any
    ) -> AsyncIterator[replay_pb2.ListEpisodesResponse]:
        """Stream ended episodes, newest first."""
        coordinator = self._coordinator
        try:
            check_names(request)
            for rollout in await coordinator.store.read(partial(queries.find_episodes, request=request)):
                episode = await coordinator.list_episode(rollout, with_steps=not request.envelope_only)
                yield replay_pb2.ListEpisodesResponse(episode=episode)
        except StatusError as error:
            await context.abort(error.code, str(error))

    @aborts_on_status_error
    async def GetReplayStatus(
        self, request: replay_pb2.GetReplayStatusRequest, context: Any
    ) -> replay_pb2.GetReplayStatusResponse:
        """Return counters of the whole store, and the peers."""
        return await self._coordinator.status()


def _check_plan(group: replay_pb2.GroupPlan, rollouts_per_group: int) -> None:
    """Raise InvalidRequestError unless the plan is complete and its group is not too large."""
    name = group.group_id or "group without group_id"
    if not (group.group_id and group.queue and group.task_id and group.seeds and group.max_steps):
        raise InvalidRequestError(f"{name}: group_id, queue, task_id, seeds and max_steps must be set")
    if group.acting_policy == rollout_pb2.ACTING_POLICY_UNSPECIFIED:
        raise InvalidRequestError(f"{name}: acting_policy must be set")
    if group.queue == RATE_LIMITED_QUEUE and len(group.seeds) > rollouts_per_group:
        raise InvalidRequestError(
            f"{name}: {len(group.seeds)} seeds exceed the limit of {rollouts_per_group} (tasks.num_rollouts) "
            f"on queue {RATE_LIMITED_QUEUE!r}"
        )
