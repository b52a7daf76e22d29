"""Which replicas have joined the job since it began, as replay's directory has them. Knows no policy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NoReturn

import grpc
import grpc.aio

from deskrl.core import rpc
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc

POLL_S = 2.0


async def follow_joined(replay_address: str, name: str, take_over: Callable[[Iterable[str]], None]) -> NoReturn:
    """Tell `take_over` again and again which joined replicas have weights; while replay is away, nothing changes.

    Args:
        replay_address: where the directory is.
        name: of this actor process.
        take_over: told all addresses at once.
    """
    request = directory_pb2.ListReplicasRequest(peer=rpc.peer("actor", name))
    async with rpc.connect(replay_address) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        while True:
            try:
                listed = await stub.ListReplicas(request, timeout=rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                pass  # whoever asks for work tells of it
            else:
                take_over(replica.address for replica in listed.replicas if replica.HasField("version"))
            await asyncio.sleep(POLL_S)
