"""Lease client: acquires, extends and releases leases, and opens the streams of their episodes.

A lease ends early only if the replay service reports it (unary calls of `rollout.proto`).
"""

from __future__ import annotations

import asyncio
import logging

import grpc
import grpc.aio

from deskrl.actor.backoff import TRANSIENT, Backoff
from deskrl.actor.desktop_starts import DesktopStarts
from deskrl.actor.episode_sender import EpisodeSender
from deskrl.actor.lease import Lease, LeaseLostError, ReplayRejectedError
from deskrl.core import ids, rpc
from deskrl.core.errors import UserError
from deskrl.proto.v1 import rollout_pb2, rollout_pb2_grpc

ACQUIRE_WAIT_S = 10.0
"""Time in seconds for which the replay service may hold a request for a lease, or for a step in lock-step."""

_RELEASE_TIMEOUT_S = 3.0

_log = logging.getLogger(__name__)


class LeaseClient:
    """All leases of one actor process, over one channel.

    Args:
        address: `host:port` of the replay service.
        name: name of this actor process, unique in the run.
    """

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._peer = rpc.peer("actor", name)
        self._channel = rpc.connect(address)
        self._stub = rollout_pb2_grpc.RolloutServiceStub(self._channel)
        self._held: dict[str, Lease] = {}

    async def acquire(self) -> Lease:
        """Wait for a lease, without a deadline. While the replay service is unavailable, the call is repeated.

        Raises:
            UserError: the replay service uses another protocol version, or rejects this process's certificate.
            ReplayRejectedError: the replay service rejected the request.
        """
        request = rollout_pb2.AcquireLeaseRequest(
            peer=self._peer, request_id=ids.new_id("acquire"), wait_s=ACQUIRE_WAIT_S
        )
        backoff = Backoff()
        while True:
            try:
                response = await self._stub.AcquireLease(request, timeout=ACQUIRE_WAIT_S + rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if rpc.status_code(error) not in TRANSIENT:
                    raise _rejection(error, self._address) from error
                if backoff.is_first:
                    _log.warning("replay at %s is unavailable (%s), retrying", self._address, error.details())
                    await asyncio.to_thread(rpc.check_health, self._address)  # raises if no retry can succeed
                # The same request_id again: if only the response was lost, it is answered with the same lease.
                await backoff.sleep()
                continue
            if response.lease_id:
                lease = Lease(response.lease_id, response.rollout, response.ttl_s)
                self._held[lease.id] = lease
                return lease
            request.request_id = ids.new_id("acquire")
            backoff = Backoff()

    async def await_step(self, lease: Lease, step: int) -> None:
        """Wait until all running episodes have reached a step (lock-step schedule), or the lease has ended.

        Raises:
            UserError: see `acquire`.
            ReplayRejectedError: see `acquire`.
        """
        request = rollout_pb2.AwaitTurnRequest(peer=self._peer, lease_id=lease.id, turn=step, wait_s=ACQUIRE_WAIT_S)
        backoff = Backoff()
        while not lease.ended.is_set():
            try:
                response = await self._stub.AwaitTurn(request, timeout=ACQUIRE_WAIT_S + rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return lease.end(LeaseLostError(error.details() or "lease not found"))
                if rpc.status_code(error) not in TRANSIENT:
                    raise _rejection(error, self._address) from error
                await backoff.sleep()
                continue
            if response.is_open:
                return
            backoff = Backoff()

    async def keep_alive(self, default_ttl_s: float, starts: DesktopStarts) -> None:
        """Extend all leases in one call every third of the shortest lease time, until cancelled.

        The call also reports desktops that do not start. Leases that the replay service does not extend are ended.

        Args:
            default_ttl_s: lease time in seconds that applies while no lease is held.
            starts: start attempts of this process's desktops.
        """
        num_reported = 0
        while True:
            await asyncio.sleep(min([default_ttl_s, *(lease.ttl_s for lease in self._held.values())]) / 3)
            if not self._held and starts.num_set_aside == num_reported == 0:
                continue
            num_reported = starts.num_set_aside
            request = rollout_pb2.ExtendLeasesRequest(
                peer=self._peer,
                lease_ids=list(self._held),
                num_desktops_set_aside=num_reported,
                start_error=starts.last_error,
            )
            try:
                response = await self._stub.ExtendLeases(request, timeout=rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                _log.warning("leases were not extended: %s", error.details())
                continue
            for lease_id in set(request.lease_ids).difference(response.alive):
                if lease := self._held.pop(lease_id, None):
                    lease.end(LeaseLostError(f"{lease_id} is no longer held by this actor"))

    async def release(self, leases: list[Lease]) -> None:
        """Release leases of unfinished rollouts. If the replay service is unavailable, they expire instead."""
        for lease in leases:
            self.forget(lease)
        request = rollout_pb2.ReleaseLeasesRequest(peer=self._peer, lease_ids=[lease.id for lease in leases])
        try:
            await self._stub.ReleaseLeases(request, timeout=_RELEASE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            _log.warning("%d leases were not released and will expire: %s", len(leases), error.details())

    def forget(self, lease: Lease) -> None:
        """Stop extending a lease whose episode is delivered or abandoned."""
        self._held.pop(lease.id, None)

    def open_episode(self, lease: Lease) -> EpisodeSender:
        """Open the stream of a lease's episode."""
        return EpisodeSender(self._stub, self._peer, lease)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _rejection(error: grpc.aio.AioRpcError, address: str) -> Exception:
    """Return the exception for a status that another attempt would not change."""
    if (rejection := rpc.rejection_error(error, address)) is not None:
        return rejection
    if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
        return UserError(f"replay at {address} rejected this actor: {error.details()}", "see the log of replay")
    return ReplayRejectedError(rpc.describe_error(error))
