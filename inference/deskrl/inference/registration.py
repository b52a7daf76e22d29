"""Registration of a replica that joins a running job with the directory of the replay service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from deskrl.core import rpc
from deskrl.inference.served_version import INITIAL_VERSION, ServedVersion
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc

PERIOD_S = 1.0
"""Interval between announcements, in seconds."""
_LEAVE_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def register_replica(
    replay_address: str, address: str, version: Callable[[], ServedVersion]
) -> AsyncIterator[None]:
    """Announce a replica periodically while the context is open, and deregister it on exit.

    Args:
        replay_address: address of the replay service, which hosts the directory.
        address: address at which the replica is reachable.
        version: returns the currently served policy version; called for each announcement.

    Raises:
        UserError: the replay service rejects this process, for example because it belongs to another run.
    """
    await asyncio.to_thread(rpc.check_health, replay_address)
    async with rpc.connect(replay_address) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        announcing = asyncio.create_task(_announce(stub, address, version))
        try:
            yield
        finally:
            announcing.cancel()
            await asyncio.wait([announcing])
            with contextlib.suppress(grpc.aio.AioRpcError):  # without the call the entry expires soon
                await stub.Announce(_request(address, INITIAL_VERSION, is_leaving=True), timeout=_LEAVE_TIMEOUT_S)


async def _announce(
    stub: directory_pb2_grpc.DirectoryServiceStub, address: str, version: Callable[[], ServedVersion]
) -> None:
    is_registered = True
    while True:
        try:
            await stub.Announce(_request(address, version()), timeout=rpc.UNARY_TIMEOUT_S)
            is_registered = True
        except grpc.aio.AioRpcError as error:
            if is_registered:
                _log.warning("the announcement of %s to the replay service failed: %s", address, error.details())
            is_registered = False
        await asyncio.sleep(PERIOD_S)


def _request(address: str, version: ServedVersion, is_leaving: bool = False) -> directory_pb2.AnnounceRequest:
    request = directory_pb2.AnnounceRequest(peer=rpc.peer("inference", address), address=address, is_leaving=is_leaving)
    if version != INITIAL_VERSION:
        request.version.CopyFrom(version.to_message())
    return request
