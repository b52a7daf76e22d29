"""Replay service under messages that it cannot decode and identifiers that are too long; unused connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports_kit import free_address
from replay_fuzz_kit import SERVER_STREAMS, UNARY
from replay_kit import ReplayProcess, StartReplay, begin, screenshot, step

from deskrl.core import rpc
from deskrl.proto.v1 import rollout_pb2

_UNDECODABLE = b"\x0a\xff\xff\xff\xff\xff"
_TIMEOUT_S = 60.0


def _path(name: str) -> str:
    return f"/deskrl.proto.v1.{name}"


@pytest.fixture
def replay(start_replay: StartReplay) -> ReplayProcess:
    return start_replay()


@pytest.fixture
def channel(replay: ReplayProcess) -> Iterator[grpc.Channel]:
    with rpc.connect_sync(replay.config.replay.address) as channel:
        yield channel


def _rejection(call: grpc.Call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        list(call)  # type: ignore[call-overload]
    return error.value.code(), error.value.details()


def _send_undecodable(channel: grpc.Channel) -> Iterator[tuple[str, tuple[grpc.StatusCode, str]]]:
    """Send an undecodable message to each method, and return the method and its answer."""
    for name in UNARY:
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(_path(name))(_UNDECODABLE, timeout=_TIMEOUT_S)
        yield name, (error.value.code(), error.value.details())
    for name in SERVER_STREAMS:
        yield name, _rejection(channel.unary_stream(_path(name))(_UNDECODABLE, timeout=_TIMEOUT_S))
    stream = channel.stream_stream(_path("RolloutService/StreamEpisode"))
    yield "RolloutService/StreamEpisode", _rejection(stream(iter([_UNDECODABLE]), timeout=_TIMEOUT_S))
    health = channel.unary_unary("/grpc.health.v1.Health/Check")
    with pytest.raises(grpc.RpcError) as error:
        health(_UNDECODABLE, timeout=_TIMEOUT_S)
    yield "grpc.health.v1.Health/Check", (error.value.code(), error.value.details())


def test_an_undecodable_message_is_an_invalid_argument_of_every_method(channel: grpc.Channel) -> None:
    for name, (code, details) in _send_undecodable(channel):
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (name, code, details)
        assert name in details


def test_undecodable_messages_are_logged_in_one_line_without_traceback(
    replay: ReplayProcess, channel: grpc.Channel
) -> None:
    for _ in range(20):
        list(_send_undecodable(channel))
    status, log = replay.stop()
    assert status == 0
    assert "Traceback" not in log and "DecodeError" not in log
    assert log.count("cannot be decoded") == 1, log


def test_an_undecodable_message_within_an_episode_ends_the_stream_and_keeps_what_was_stored(
    replay: ReplayProcess, channel: grpc.Channel
) -> None:
    client = replay.client()
    client.plan("train/0")
    lease = client.acquire()
    shot = screenshot(lease, 0)
    messages = [begin(lease), step(0, shot, sent=[shot])]
    stream = channel.stream_stream(_path("RolloutService/StreamEpisode"))
    call = stream(iter([*(it.SerializeToString() for it in messages), _UNDECODABLE]), timeout=_TIMEOUT_S)
    assert _rejection(call)[0] is grpc.StatusCode.INVALID_ARGUMENT
    client.run_episode(lease, reward=1.0, num_steps=2)
    assert "Traceback" not in replay.stop()[1]


def test_an_identifier_that_is_too_long_is_an_invalid_argument(replay: ReplayProcess) -> None:
    client, long = replay.client(), "x" * 2000
    calls: list[Callable[[], object]] = [
        lambda: client.acquire(request_id=long),
        lambda: client.release("lease-1", long),
        lambda: client.plan(f"train/{long}"),
        lambda: client.episodes(task_id=long),
        lambda: client.take(long, "batch", 0),
        lambda: client.rollout.ExtendLeases(rollout_pb2.ExtendLeasesRequest(peer=rpc.peer("actor", long))),
        lambda: client.stream([rollout_pb2.StreamEpisodeRequest(begin=rollout_pb2.EpisodeBegin(lease_id=long))]),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError, match=r"has 20.. characters, more than 1024") as error:
            call()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_server_closes_a_connection_without_calls_and_its_client_connects_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "MAX_CONNECTION_IDLE_S", 0.2)

    async def idle_then_call() -> None:
        address = free_address()
        server = rpc.make_server()
        await rpc.start_server(server, address, [])
        async with rpc.connect(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for _ in range(3):
                assert (await stub.Check(health_pb2.HealthCheckRequest())).status
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
                assert channel.get_state() is grpc.ChannelConnectivity.IDLE
        await server.stop(None)

    asyncio.run(asyncio.wait_for(idle_then_call(), _TIMEOUT_S))


def test_a_connection_with_a_call_that_waits_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CONNECTION_IDLE_S", 0.2)

    async def wait_in_a_call() -> None:
        address = free_address()
        server = rpc.make_server()
        health = await rpc.start_server(server, address, ["service"])
        async with rpc.connect(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="service"))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 2.0)
            await health.set("service", health_pb2.HealthCheckResponse.NOT_SERVING)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.stop(None)

    asyncio.run(asyncio.wait_for(wait_in_a_call(), _TIMEOUT_S))
