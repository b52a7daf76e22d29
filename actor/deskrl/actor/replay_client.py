"""An actor's leases: asked for, kept alive, given back; and the streams of their episodes.

Knows the unary calls of `rollout.proto`; knows neither desktops nor policies. Only replay itself ends a lease early,
by saying that it granted the work again.
"""

from __future__ import annotations

import asyncio
import logging

import grpc
import grpc.aio

from deskrl.actor.episode_stream import EpisodeStream
from deskrl.actor.leases import Lease, LeaseLost, ReplayRefused
from deskrl.actor.retries import TRANSIENT, Pauses
from deskrl.core import ids, rpc
from deskrl.core.errors import UserError
from deskrl.proto.v1 import rollout_pb2, rollout_pb2_grpc

ACQUIRE_WAIT_S = 10.0
"""How long replay may hold a request for work, or for a turn, before it answers that there is none."""

_log = logging.getLogger(__name__)


class ReplayClient:
    """All leases of one actor process, over one channel.

    Args:
        address: of the replay service.
        name: of this actor process, unique in the run.
    """

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._peer = rpc.peer("actor", name)
        self._channel = rpc.connect(address)
        self._stub = rollout_pb2_grpc.RolloutServiceStub(self._channel)
        self._held: dict[str, Lease] = {}

    async def acquire(self) -> Lease:
        """Wait for work, however long it takes and however often replay is away meanwhile.

        Raises:
            UserError: replay speaks another protocol version, or does not trust this process.
        """
        request = rollout_pb2.AcquireLeaseRequest(
            peer=self._peer, request_id=ids.new_id("acquire"), wait_s=ACQUIRE_WAIT_S
        )
        pauses = Pauses()
        while True:
            try:
                response = await self._stub.AcquireLease(request, timeout=ACQUIRE_WAIT_S + rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if rpc.code_of(error) not in TRANSIENT:
                    raise _refusal(error, self._address) from error
                if pauses.are_new:
                    _log.warning("replay at %s does not answer (%s): waiting for it", self._address, error.details())
                    await asyncio.to_thread(rpc.check_health, self._address)  # it may be that it never will
                await pauses.take()  # the same request again: a grant whose answer was lost is answered once more
                continue
            if response.lease_id:
                lease = Lease(response.lease_id, response.rollout, response.ttl_s)
                self._held[lease.id] = lease
                return lease
            request.request_id = ids.new_id("acquire")
            pauses = Pauses()

    async def await_turn(self, lease: Lease, turn: int) -> None:
        """In lock-step: wait until every running episode has come as far, or the lease is lost."""
        request = rollout_pb2.AwaitTurnRequest(peer=self._peer, lease_id=lease.id, turn=turn, wait_s=ACQUIRE_WAIT_S)
        pauses = Pauses()
        while not lease.over.is_set():
            try:
                response = await self._stub.AwaitTurn(request, timeout=ACQUIRE_WAIT_S + rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return lease.end(LeaseLost(error.details() or "lease not found"))
                if rpc.code_of(error) not in TRANSIENT:
                    raise _refusal(error, self._address) from error
                await pauses.take()
                continue
            if response.is_open:
                return
            pauses = Pauses()

    async def keep_alive(self, default_ttl_s: float) -> None:
        """Extend all leases in one call each third of their time, for ever; those that replay disowns are ended."""
        while True:
            await asyncio.sleep(min([default_ttl_s, *(lease.ttl_s for lease in self._held.values())]) / 3)
            if not self._held:
                continue
            request = rollout_pb2.ExtendLeasesRequest(peer=self._peer, lease_ids=list(self._held))
            try:
                response = await self._stub.ExtendLeases(request, timeout=rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                _log.warning("leases were not extended: %s", error.details())
                continue
            for lease_id in set(request.lease_ids).difference(response.alive):
                if lease := self._held.pop(lease_id, None):
                    lease.end(LeaseLost(f"{lease_id} was granted to another actor"))

    async def release(self, leases: list[Lease]) -> None:
        """Give work back unfinished, at once. If replay cannot be told, the leases run out by themselves."""
        for lease in leases:
            self.forget(lease)
        request = rollout_pb2.ReleaseLeasesRequest(peer=self._peer, lease_ids=[lease.id for lease in leases])
        try:
            await self._stub.ReleaseLeases(request, timeout=3.0)
        except grpc.aio.AioRpcError as error:
            _log.warning("%d leases were not given back and will run out: %s", len(leases), error.details())

    def forget(self, lease: Lease) -> None:
        """Extend this lease no longer: its episode is delivered, or given up."""
        self._held.pop(lease.id, None)

    def open_episode(self, lease: Lease) -> EpisodeStream:
        """Begin to stream the episode of a lease."""
        return EpisodeStream(self._stub, self._peer, lease)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _refusal(error: grpc.aio.AioRpcError, address: str) -> Exception:
    if error.code() in rpc.DISTRUST:
        return rpc.distrust(error, address)
    if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
        return UserError(f"replay at {address} refuses this actor", error.details() or "install the same version")
    return ReplayRefused(f"{error.code().name}: {error.details()}")
