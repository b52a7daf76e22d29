"""Fuzzing of a running replay service with damaged gRPC messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import grpc
from google.protobuf.message import Message
from replay_kit import TEST_PEER, ReplayProcess

from deskrl.core import rpc
from deskrl.core.ids import image_hash
from deskrl.proto.v1 import common_pb2, directory_pb2, replay_pb2, rollout_pb2

_TIMEOUT_S = 60.0
_VERSION = common_pb2.PolicyVersion(lineage="lineage", step=1)
_PLAN = replay_pb2.GroupPlan(
    group_id="fuzz/0", queue="fuzz", task_id="task", task_json=b"{}", seeds=[1, 2], max_steps=3, temperature=1.0,
    acting_policy=rollout_pb2.ACTING_POLICY_SCRIPTED,
)  # fmt: skip

UNARY: dict[str, Message] = {
    "RolloutService/AcquireLease": rollout_pb2.AcquireLeaseRequest(peer=TEST_PEER, request_id="request-1"),
    "RolloutService/ExtendLeases": rollout_pb2.ExtendLeasesRequest(peer=TEST_PEER, lease_ids=["lease-1", "lease-2"]),
    "RolloutService/ReleaseLeases": rollout_pb2.ReleaseLeasesRequest(peer=TEST_PEER, lease_ids=["lease-1"]),
    "ReplayService/PlanGroups": replay_pb2.PlanGroupsRequest(peer=TEST_PEER, groups=[_PLAN]),
    "ReplayService/SetPolicyVersion": replay_pb2.SetPolicyVersionRequest(version=_VERSION, num_updates=1),
    "ReplayService/TakeGroup": replay_pb2.TakeGroupRequest(peer=TEST_PEER, queue="fuzz", batch_id="batch", ordinal=0),
    "ReplayService/CommitBatch": replay_pb2.CommitBatchRequest(
        peer=TEST_PEER, queue="fuzz", batch_id="b", version=_VERSION
    ),
    "DirectoryService/Announce": directory_pb2.AnnounceRequest(peer=TEST_PEER, address="127.0.0.1:1", version=_VERSION),
    "DirectoryService/ListReplicas": directory_pb2.ListReplicasRequest(peer=TEST_PEER),
}
EPISODE_STREAM = [
    rollout_pb2.StreamEpisodeRequest(
        begin=rollout_pb2.EpisodeBegin(peer=TEST_PEER, lease_id="lease-1", episode_id="fuzz/0.0")
    ),
    rollout_pb2.StreamEpisodeRequest(
        step=rollout_pb2.EpisodeStep(index=0, payload=b"\x80"),
        images=[common_pb2.Image(hash=image_hash(b"picture"), data=b"picture")],
    ),
    rollout_pb2.StreamEpisodeRequest(result=rollout_pb2.EpisodeResult(reward=1.0, num_steps=1)),
]
SERVER_STREAMS: dict[str, Message] = {
    "ReplayService/FetchImages": replay_pb2.FetchImagesRequest(hashes=["ab" * 32]),
    "ReplayService/ListEpisodes": replay_pb2.ListEpisodesRequest(),
}


def fuzz_replay(replay: ReplayProcess, num_messages: int) -> None:
    """Send damaged messages and check that the service responds to each and stays healthy.

    Half of the episode streams begin with a valid lease.
    """
    random = Random(0)
    address = replay.config.replay.address
    with rpc.connect_sync(address) as channel:
        for _ in range(num_messages):
            _expect_handled(_call(channel, random))
    assert rpc.is_healthy(address) and replay.process.poll() is None


def _call(channel: grpc.Channel, random: Random) -> Callable[[], Any]:
    def path(name: str) -> str:
        return f"/deskrl.proto.v1.{name}"

    kind = random.randrange(4)
    if kind == 0:
        stream = channel.stream_stream(path("RolloutService/StreamEpisode"))
        messages = _stream(channel, random)
        return lambda: list(stream(iter(messages), timeout=_TIMEOUT_S))
    if kind == 1:
        name, message = random.choice(sorted(SERVER_STREAMS.items()))
        listing = channel.unary_stream(path(name))
        return lambda: list(listing(damage(message.SerializeToString(), random), timeout=_TIMEOUT_S))
    name, message = random.choice(sorted(UNARY.items()))
    call = channel.unary_unary(path(name))
    return lambda: call(damage(message.SerializeToString(), random), timeout=_TIMEOUT_S)


def _stream(channel: grpc.Channel, random: Random) -> list[bytes]:
    begin, *others = (message.SerializeToString() for message in EPISODE_STREAM)
    if random.random() < 0.5:
        begin = _begin_with_lease(channel, random) or begin
        return [begin, *(damage(other, random) for other in others)]
    return [damage(message, random) for message in (begin, *others)]


def _begin_with_lease(channel: grpc.Channel, random: Random) -> bytes | None:
    """Return the first message of a stream with a valid lease; None if no rollout is available."""
    name = f"held-{random.randrange(2**32)}"
    group = replay_pb2.GroupPlan()
    group.CopyFrom(_PLAN)
    group.group_id = f"fuzz/{name}"
    plan = channel.unary_unary("/deskrl.proto.v1.ReplayService/PlanGroups")
    plan(replay_pb2.PlanGroupsRequest(peer=TEST_PEER, groups=[group]).SerializeToString(), timeout=_TIMEOUT_S)
    acquire = channel.unary_unary("/deskrl.proto.v1.RolloutService/AcquireLease")
    request = rollout_pb2.AcquireLeaseRequest(peer=TEST_PEER, request_id=name).SerializeToString()
    lease = rollout_pb2.AcquireLeaseResponse.FromString(acquire(request, timeout=_TIMEOUT_S))
    if not lease.lease_id:
        return None
    begin = rollout_pb2.EpisodeBegin(peer=TEST_PEER, lease_id=lease.lease_id, episode_id=lease.rollout.episode_id)
    return bytes(rollout_pb2.StreamEpisodeRequest(begin=begin).SerializeToString())


def damage(valid: bytes, random: Random) -> bytes:
    """Return valid data with some bytes changed, removed, inserted or repeated."""
    data = bytearray(valid)
    for start, length in _places(len(data), random):
        data[start : start + length] = random.choice(
            (b"", random.randbytes(random.randrange(1, 8)), bytes(data[start : start + length]) * 2)
        )
    return bytes(data)


def _places(num_bytes: int, random: Random) -> Iterator[tuple[int, int]]:
    for _ in range(random.randrange(1, 4)):
        yield random.randrange(num_bytes + 1), random.randrange(8)


def _expect_handled(call: Callable[[], Any]) -> None:
    """Accept any response and any status except UNKNOWN, which unhandled exceptions produce."""
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() is not grpc.StatusCode.UNKNOWN, error.details()
