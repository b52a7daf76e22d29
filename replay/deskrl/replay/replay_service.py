"""ReplayService: what the learner, reports and the status line call. Knows the wire and what a sound plan is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from deskrl.proto.v1 import common_pb2, replay_pb2, replay_pb2_grpc, rollout_pb2
from deskrl.replay import batches, images, reading
from deskrl.replay.answers import admit, refusing, wait_within
from deskrl.replay.coordinator import Coordinator
from deskrl.replay.pacing import PACED_QUEUE
from deskrl.replay.refusals import Malformed, Refused

_READ_AHEAD_BYTES = 4 * 1024**2


class ReplayServicer(replay_pb2_grpc.ReplayServiceServicer):
    """See replay.proto."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    @refusing
    async def PlanGroups(self, request: replay_pb2.PlanGroupsRequest, context: Any) -> replay_pb2.PlanGroupsResponse:
        """Add work."""
        admit(request.peer)
        self._coordinator.attendance.note(request.peer)
        for group in request.groups:
            _check_plan(group, self._coordinator.pacing.rollouts)
        return replay_pb2.PlanGroupsResponse(num_added=await self._coordinator.plan(list(request.groups)))

    @refusing
    async def SetPolicyVersion(
        self, request: replay_pb2.SetPolicyVersionRequest, context: Any
    ) -> replay_pb2.SetPolicyVersionResponse:
        """Move the pacing."""
        await self._coordinator.set_policy(request.version, request.num_updates)
        return replay_pb2.SetPolicyVersionResponse()

    @refusing
    async def TakeGroup(self, request: replay_pb2.TakeGroupRequest, context: Any) -> replay_pb2.TakeGroupResponse:
        """Bind a complete group to its place in a batch."""
        admit(request.peer)
        if not request.queue or not request.batch_id:
            raise Malformed("a group is taken from a queue into a batch; name both")
        place = batches.Place(request.queue, request.batch_id, request.ordinal)
        wait_s = wait_within(request.wait_s, context)
        with self._coordinator.attendance.present(request.peer):
            group = await self._coordinator.take(place, list(request.dropped_group_ids), wait_s)
        return replay_pb2.TakeGroupResponse(group=group)

    @refusing
    async def CommitBatch(self, request: replay_pb2.CommitBatchRequest, context: Any) -> replay_pb2.CommitBatchResponse:
        """Consume a batch."""
        admit(request.peer)
        self._coordinator.attendance.note(request.peer)
        await self._coordinator.commit(request.queue, request.batch_id, list(request.verdicts), request.version)
        return replay_pb2.CommitBatchResponse()

    async def FetchImages(
        self, request: replay_pb2.FetchImagesRequest, context: Any
    ) -> AsyncIterator[replay_pb2.FetchImagesResponse]:
        """Send screenshots in the order in which they are named."""
        try:
            hashes = [images.parse_hash(text) for text in request.hashes]
            reading_ahead = self._read_images(hashes)
            try:
                while hashes:
                    part = await reading_ahead
                    names, hashes = hashes[: len(part)], hashes[len(part) :]
                    reading_ahead = self._read_images(hashes)  # while this part is sent
                    for name, data in zip(names, part, strict=True):
                        yield replay_pb2.FetchImagesResponse(image=common_pb2.Image(hash=name.hex(), data=data))
            finally:
                reading_ahead.cancel()
        except Refused as refusal:
            await context.abort(refusal.code, str(refusal))

    def _read_images(self, hashes: list[bytes]) -> asyncio.Task[list[bytes]]:
        store = self._coordinator.store
        part = partial(images.read, segments=store.segments, hashes=hashes, max_bytes=_READ_AHEAD_BYTES)
        return asyncio.create_task(store.read(part))

    async def ListEpisodes(
        self, request: replay_pb2.ListEpisodesRequest, context: Any
    ) -> AsyncIterator[replay_pb2.ListEpisodesResponse]:
        """Send ended episodes, newest first."""
        store = self._coordinator.store
        for rollout in await store.read(partial(reading.find_episodes, request=request)):
            episode = await store.read(partial(reading.episode, rollout=rollout, with_steps=not request.envelope_only))
            yield replay_pb2.ListEpisodesResponse(episode=episode)

    @refusing
    async def GetReplayStatus(
        self, request: replay_pb2.GetReplayStatusRequest, context: Any
    ) -> replay_pb2.GetReplayStatusResponse:
        """Count."""
        return await self._coordinator.status()


def _check_plan(group: replay_pb2.GroupPlan, rollouts: int) -> None:
    """Raise Malformed unless the plan says what to play, how often and by whom."""
    name = group.group_id or "a group"
    if not (group.group_id and group.queue and group.task_id and group.seeds and group.max_steps):
        raise Malformed(f"{name}: group_id, queue, task_id, seeds and max_steps must be set")
    if group.acting_policy == rollout_pb2.ACTING_POLICY_UNSPECIFIED:
        raise Malformed(f"{name}: acting_policy must be set")
    if group.queue == PACED_QUEUE and len(group.seeds) > rollouts:
        raise Malformed(
            f"{name}: {len(group.seeds)} seeds on queue {PACED_QUEUE!r}, whose groups have {rollouts} at the most "
            "(tasks.rollouts)"
        )
