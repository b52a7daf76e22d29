"""Memory of the replay service after large messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from replay_kit import TEST_PEER, ReplayProcess, StartReplay, begin, screenshot, step

from deskrl.core import rpc
from deskrl.proto.v1 import rollout_pb2

_TIMEOUT_S = 20.0
_MIB = 1024**2
_KEPT_MIB = 96
_UNDECODABLE = b"\x0a\xff\xff\xff\xff\xff"


def _resident_mib(replay: ReplayProcess) -> float:
    lines = Path(f"/proc/{replay.process.pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def _wait_until_resident_below(replay: ReplayProcess, limit_mib: float) -> None:
    """Wait until the memory of the service is below `limit_mib`; the wait exceeds the interval of its trimming."""
    deadline_s = time.monotonic() + 30.0
    while (held_mib := _resident_mib(replay)) >= limit_mib:
        assert time.monotonic() < deadline_s, f"{held_mib:.0f} MiB, limit {limit_mib:.0f} MiB"
        time.sleep(0.05)


def _large_episodes(replay: ReplayProcess) -> None:
    client = replay.client()
    client.plan("train/0", num=2)
    for _ in range(2):
        lease = client.acquire()
        shots = [screenshot(lease, index, 15 * _MIB) for index in range(8)]
        client.stream([begin(lease), *(step(index, shot, sent=[shot]) for index, shot in enumerate(shots))])


def _large_names(replay: ReplayProcess) -> None:
    client = replay.client()
    for index in range(8):
        peer = rpc.peer("actor", str(index) * (60 * _MIB))
        with pytest.raises(grpc.RpcError) as error:
            client.rollout.ExtendLeases(rollout_pb2.ExtendLeasesRequest(peer=peer), timeout=_TIMEOUT_S)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def _large_identifiers(replay: ReplayProcess) -> None:
    client = replay.client()
    for request in (
        rollout_pb2.AcquireLeaseRequest(peer=TEST_PEER, request_id="x" * (60 * _MIB)),
        rollout_pb2.ReleaseLeasesRequest(peer=TEST_PEER, lease_ids=["x" * (60 * _MIB)]),
    ):
        method = getattr(client.rollout, type(request).__name__.removesuffix("Request"))
        with pytest.raises(grpc.RpcError) as error:
            method(request, timeout=_TIMEOUT_S)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as error:
        client.plan("train/" + "x" * (60 * _MIB))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as error:
        client.episodes(task_id="x" * (60 * _MIB))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def _large_lists(replay: ReplayProcess) -> None:
    client = replay.client()
    for _ in range(4):
        client.release(*(f"lease-{index}" for index in range(100_000)))


def _large_requests_of_new_peers(replay: ReplayProcess) -> None:
    client = replay.client()
    for index in range(4):
        request = rollout_pb2.ExtendLeasesRequest(peer=rpc.peer("actor", f"{index}"), start_error="x" * (60 * _MIB))
        client.rollout.ExtendLeases(request, timeout=_TIMEOUT_S)


def _large_undecodable(replay: ReplayProcess) -> None:
    with rpc.connect_sync(replay.config.replay.address) as channel:
        for _ in range(8):
            with pytest.raises(grpc.RpcError):
                call = channel.unary_unary("/deskrl.proto.v1.RolloutService/AcquireLease")
                call(_UNDECODABLE + bytes(60 * _MIB), timeout=_TIMEOUT_S)


@pytest.mark.parametrize(
    "send",
    [
        _large_episodes,
        _large_names,
        _large_identifiers,
        _large_lists,
        _large_requests_of_new_peers,
        _large_undecodable,
    ],
)
def test_memory_returns_to_its_level_after_large_messages(
    start_replay: StartReplay, send: Callable[[ReplayProcess], None]
) -> None:
    replay = start_replay()
    replay.client().status()
    before_mib = _resident_mib(replay)
    send(replay)
    _wait_until_resident_below(replay, before_mib + _KEPT_MIB)
