"""RolloutService: gRPC interface of the actors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from deskrl.proto.v1 import rollout_pb2, rollout_pb2_grpc
from deskrl.replay.coordinator import Coordinator
from deskrl.replay.episode_receiver import EpisodeReceiver
from deskrl.replay.rollout_scheduler import LeaseRequest
from deskrl.replay.servicer_helpers import aborts_on_status_error, bounded_wait_s, check_names, check_protocol
from deskrl.replay.status_errors import InvalidRequestError, StatusError


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    """Implementation of rollout.proto."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    @aborts_on_status_error
    async def AcquireLease(
        self, request: rollout_pb2.AcquireLeaseRequest, context: Any
    ) -> rollout_pb2.AcquireLeaseResponse:
        """Grant a lease, after a wait if there is no work yet."""
        check_protocol(request.peer)
        if not request.request_id:
            raise InvalidRequestError(
                "AcquireLease: request_id must be set, so that a retry is distinguished from a new request"
            )
        lease_request = LeaseRequest(request.request_id, request.peer.name)
        with self._coordinator.peers.record_waiting(request.peer):
            grant = await self._coordinator.acquire(lease_request, bounded_wait_s(request.wait_s, context))
        if grant is None:
            return rollout_pb2.AcquireLeaseResponse()
        return rollout_pb2.AcquireLeaseResponse(
            lease_id=grant.lease_id, rollout=grant.rollout, ttl_s=self._coordinator.lease_ttl_s
        )

    @aborts_on_status_error
    async def ExtendLeases(
        self, request: rollout_pb2.ExtendLeasesRequest, context: Any
    ) -> rollout_pb2.ExtendLeasesResponse:
        """Extend all leases of an actor, and record which of its desktops do not start."""
        check_protocol(request.peer)
        self._coordinator.peers.record_desktops(request.peer, request.num_desktops_set_aside, request.start_error)
        return rollout_pb2.ExtendLeasesResponse(alive=await self._coordinator.extend(list(request.lease_ids)))

    @aborts_on_status_error
    async def AwaitTurn(self, request: rollout_pb2.AwaitTurnRequest, context: Any) -> rollout_pb2.AwaitTurnResponse:
        """Wait until all episodes of a lockstep round have reached a step."""
        check_protocol(request.peer)
        wait_s = bounded_wait_s(request.wait_s, context)
        is_open = await self._coordinator.await_step(request.lease_id, request.turn, wait_s)
        return rollout_pb2.AwaitTurnResponse(is_open=is_open)

    @aborts_on_status_error
    async def ReleaseLeases(
        self, request: rollout_pb2.ReleaseLeasesRequest, context: Any
    ) -> rollout_pb2.ReleaseLeasesResponse:
        """Release leases without a result."""
        check_protocol(request.peer)
        await self._coordinator.release(request.lease_ids)
        return rollout_pb2.ReleaseLeasesResponse()

    async def StreamEpisode(
        self, request_iterator: AsyncIterator[rollout_pb2.StreamEpisodeRequest], context: Any
    ) -> None:
        """Receive one episode."""
        self._coordinator.metrics.streams.inc()
        try:
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("event") != "begin":
                raise InvalidRequestError("the first message of an episode must be `begin`")
            check_names(first.begin)
            check_protocol(first.begin.peer)
            self._coordinator.peers.record_call(first.begin.peer)
            await EpisodeReceiver(self._coordinator, first.begin, context).run(request_iterator)
        except StatusError as error:
            await context.abort(error.code, str(error))
        finally:
            self._coordinator.metrics.streams.dec()
