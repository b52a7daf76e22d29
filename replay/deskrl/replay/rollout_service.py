"""RolloutService: what actors call. Knows the wire; what is done about a request is the coordinator's matter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from deskrl.proto.v1 import rollout_pb2, rollout_pb2_grpc
from deskrl.replay.answers import admit, refusing, wait_within
from deskrl.replay.coordinator import Coordinator
from deskrl.replay.episode_stream import EpisodeStream
from deskrl.replay.planning import Ask
from deskrl.replay.refusals import Malformed, Refused


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    """See rollout.proto."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    @refusing
    async def AcquireLease(
        self, request: rollout_pb2.AcquireLeaseRequest, context: Any
    ) -> rollout_pb2.AcquireLeaseResponse:
        """Wait for work."""
        admit(request.peer)
        if not request.request_id:
            raise Malformed("a lease is asked for without a request_id, so a retry could not be told from a new ask")
        ask = Ask(request.request_id, request.peer.name)
        with self._coordinator.attendance.present(request.peer):
            grant = await self._coordinator.acquire(ask, wait_within(request.wait_s, context))
        if grant is None:
            return rollout_pb2.AcquireLeaseResponse()
        return rollout_pb2.AcquireLeaseResponse(
            lease_id=grant.lease_id, rollout=grant.rollout, ttl_s=self._coordinator.lease_ttl_s
        )

    @refusing
    async def ExtendLeases(
        self, request: rollout_pb2.ExtendLeasesRequest, context: Any
    ) -> rollout_pb2.ExtendLeasesResponse:
        """One heartbeat for all leases of an actor."""
        admit(request.peer)
        self._coordinator.attendance.note(request.peer)
        return rollout_pb2.ExtendLeasesResponse(alive=await self._coordinator.extend(list(request.lease_ids)))

    @refusing
    async def AwaitTurn(self, request: rollout_pb2.AwaitTurnRequest, context: Any) -> rollout_pb2.AwaitTurnResponse:
        """Hold an episode until the others of its round have come as far."""
        admit(request.peer)
        wait_s = wait_within(request.wait_s, context)
        is_open = await self._coordinator.await_turn(request.lease_id, request.turn, wait_s)
        return rollout_pb2.AwaitTurnResponse(is_open=is_open)

    @refusing
    async def ReleaseLeases(
        self, request: rollout_pb2.ReleaseLeasesRequest, context: Any
    ) -> rollout_pb2.ReleaseLeasesResponse:
        """Take unfinished work back."""
        admit(request.peer)
        await self._coordinator.release(request.lease_ids)
        return rollout_pb2.ReleaseLeasesResponse()

    async def StreamEpisode(
        self, request_iterator: AsyncIterator[rollout_pb2.StreamEpisodeRequest], context: Any
    ) -> None:
        """Take one episode in."""
        self._coordinator.metrics.streams.inc()
        try:
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("event") != "begin":
                raise Malformed("an episode starts with its begin")
            admit(first.begin.peer)
            self._coordinator.attendance.note(first.begin.peer)
            await EpisodeStream(self._coordinator, first.begin, context).run(request_iterator)
        except Refused as refusal:
            await context.abort(refusal.code, str(refusal))
        finally:
            self._coordinator.metrics.streams.dec()
