"""Directory of the replicas that have joined: addresses, versions and expiry."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from replay_kit import StartReplay

from deskrl.core import rpc
from deskrl.inference.registration import register_replica
from deskrl.inference.served_version import INITIAL_VERSION, ServedVersion
from deskrl.proto.v1 import directory_pb2, directory_pb2_grpc
from deskrl.replay import directory_service
from deskrl.replay.directory_service import DirectoryServicer

TEST_PEER = rpc.peer("inference", "test")


async def listed(stub: directory_pb2_grpc.DirectoryServiceStub) -> dict[str, int | None]:
    """Return the step that each address serves."""
    response = await stub.ListReplicas(directory_pb2.ListReplicasRequest(peer=TEST_PEER))
    return {one.address: one.version.step if one.HasField("version") else None for one in response.replicas}


async def until_listed(stub: directory_pb2_grpc.DirectoryServiceStub, expected: dict[str, int | None]) -> None:
    async with asyncio.timeout(20):
        while await listed(stub) != expected:  # noqa: ASYNC110 - another process sends no notification
            await asyncio.sleep(0.05)


def test_a_replica_is_listed_with_its_version_until_it_leaves(start_replay: StartReplay) -> None:
    address = start_replay().config.replay.address

    async def scenario() -> None:
        version = INITIAL_VERSION
        async with rpc.connect(address) as channel:
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            assert await listed(stub) == {}
            async with register_replica(address, "10.0.0.7:7421", lambda: version):
                await until_listed(stub, {"10.0.0.7:7421": None})
                version = ServedVersion("lineage", 3)
                await until_listed(stub, {"10.0.0.7:7421": 3})
            assert await listed(stub) == {}

    asyncio.run(scenario())


def test_a_replica_that_stops_announcing_itself_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        now_s = 100.0
        monkeypatch.setattr(directory_service.time, "monotonic", lambda: now_s)
        servicer = DirectoryServicer()
        await servicer.Announce(directory_pb2.AnnounceRequest(peer=TEST_PEER, address="a:1"), None)
        now_s += directory_service.TTL_S / 2
        await servicer.Announce(directory_pb2.AnnounceRequest(peer=TEST_PEER, address="b:1"), None)
        now_s += directory_service.TTL_S / 2 + 1
        response = await servicer.ListReplicas(directory_pb2.ListReplicasRequest(peer=TEST_PEER), None)
        assert [replica.address for replica in response.replicas] == ["b:1"]

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["", "7421", "host:", "host:0", "host:70000"])
def test_an_invalid_address_is_rejected(start_replay: StartReplay, address: str) -> None:
    with rpc.connect_sync(start_replay().config.replay.address) as channel, pytest.raises(grpc.RpcError) as rejected:
        request = directory_pb2.AnnounceRequest(peer=TEST_PEER, address=address)
        directory_pb2_grpc.DirectoryServiceStub(channel).Announce(request, timeout=60)
    assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT
