"""The directory of replicas that join: who is listed, with what, and for how long."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from replay_kit import StartReplay

from deskrl.core import rpc
from deskrl.inference.joining import announced
from deskrl.inference.versions import INITIAL, Version
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc
from deskrl.replay import directory_service
from deskrl.replay.directory_service import DirectoryServicer

ME = rpc.peer("inference", "test")


async def listed(stub: directory_pb2_grpc.DirectoryServiceStub) -> dict[str, int | None]:
    """Addresses, each with the step that it serves."""
    response = await stub.ListReplicas(directory_pb2.ListReplicasRequest(peer=ME))
    return {one.address: one.version.step if one.HasField("version") else None for one in response.replicas}


async def until_listed(stub: directory_pb2_grpc.DirectoryServiceStub, expected: dict[str, int | None]) -> None:
    async with asyncio.timeout(20):
        while await listed(stub) != expected:  # noqa: ASYNC110 - another process tells nobody
            await asyncio.sleep(0.05)


def test_a_replica_is_listed_with_what_it_serves_until_it_leaves(start_replay: StartReplay) -> None:
    address = start_replay().config.replay.address

    async def scenario() -> None:
        version = INITIAL
        async with rpc.connect(address) as channel:
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            assert await listed(stub) == {}
            async with announced(address, "10.0.0.7:7421", lambda: version):
                await until_listed(stub, {"10.0.0.7:7421": None})
                version = Version("lineage", 3)
                await until_listed(stub, {"10.0.0.7:7421": 3})
            assert await listed(stub) == {}

    asyncio.run(scenario())


def test_a_replica_that_falls_silent_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        now_s = 100.0
        monkeypatch.setattr(directory_service.time, "monotonic", lambda: now_s)
        servicer = DirectoryServicer()
        await servicer.Announce(directory_pb2.AnnounceRequest(peer=ME, address="a:1"), None)
        now_s += directory_service.TTL_S / 2
        await servicer.Announce(directory_pb2.AnnounceRequest(peer=ME, address="b:1"), None)
        now_s += directory_service.TTL_S / 2 + 1
        response = await servicer.ListReplicas(directory_pb2.ListReplicasRequest(peer=ME), None)
        assert [replica.address for replica in response.replicas] == ["b:1"]

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["", "7421", "host:", "host:0", "host:70000"])
def test_what_is_no_address_is_refused(start_replay: StartReplay, address: str) -> None:
    with rpc.connect_sync(start_replay().config.replay.address) as channel, pytest.raises(grpc.RpcError) as refusal:
        request = directory_pb2.AnnounceRequest(peer=ME, address=address)
        directory_pb2_grpc.DirectoryServiceStub(channel).Announce(request, timeout=20)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
