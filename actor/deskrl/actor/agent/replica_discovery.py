"""Replica discovery: polls the replay service's directory for replicas that joined the run after it started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NoReturn

import grpc
import grpc.aio

from deskrl.core import rpc
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc

POLL_S = 2.0


async def poll_replicas(replay_address: str, name: str, set_joined: Callable[[Iterable[str]], None]) -> NoReturn:
    """Poll the directory until cancelled. While the replay service is unavailable, the replicas are unchanged.

    Args:
        replay_address: `host:port` of the replay service.
        name: name of this actor process.
        set_joined: called after each poll with the addresses of all joined replicas that have loaded weights.
    """
    request = directory_pb2.ListReplicasRequest(peer=rpc.peer("actor", name))
    async with rpc.connect(replay_address) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        while True:
            try:
                listed = await stub.ListReplicas(request, timeout=rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                pass  # the lease client reports an unavailable replay service
            else:
                set_joined(replica.address for replica in listed.replicas if replica.HasField("version"))
            await asyncio.sleep(POLL_S)
