"""A replica that joins a running job makes itself known. Knows replay's directory; knows no engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from deskrl.core import rpc
from deskrl.inference.versions import INITIAL, Version
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc

PERIOD_S = 1.0
_LEAVE_S = 2.0
_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def announced(replay_address: str, address: str, version: Callable[[], Version]) -> AsyncIterator[None]:
    """Announce a replica for as long as the block runs, and say that it leaves at its end.

    Args:
        replay_address: where the directory is.
        address: where the replica is found.
        version: what it serves, asked each time.
    """
    async with rpc.connect(replay_address) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        announcing = asyncio.create_task(_announce(stub, address, version))
        try:
            yield
        finally:
            announcing.cancel()
            await asyncio.wait([announcing])
            with contextlib.suppress(grpc.aio.AioRpcError):  # it is forgotten soon all the same
                await stub.Announce(_request(address, INITIAL, is_leaving=True), timeout=_LEAVE_S)


async def _announce(
    stub: directory_pb2_grpc.DirectoryServiceStub, address: str, version: Callable[[], Version]
) -> None:
    is_known = True
    while True:
        try:
            await stub.Announce(_request(address, version()), timeout=rpc.UNARY_TIMEOUT_S)
            is_known = True
        except grpc.aio.AioRpcError as error:
            if is_known:
                _log.warning("replay does not take the announcement of %s: %s", address, error.details())
            is_known = False
        await asyncio.sleep(PERIOD_S)


def _request(address: str, version: Version, is_leaving: bool = False) -> directory_pb2.AnnounceRequest:
    request = directory_pb2.AnnounceRequest(peer=rpc.peer("inference", address), address=address, is_leaving=is_leaving)
    if version != INITIAL:
        request.version.CopyFrom(version.to_message())
    return request
