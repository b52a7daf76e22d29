"""Inference client: behaviour when replicas are unavailable, slow or reject requests.

The replicas are doubles that fail on demand. The real engine is tested in tests/system.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from deskrl.actor.agent.inference_client import InferenceClient, InferenceError, InferenceSession
from deskrl.core.config import InferenceConfig
from deskrl.core.ids import image_hash
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[inference_pb2.ActRequest, Context], Awaitable[inference_pb2.ActResponse]]


class Replica(inference_pb2_grpc.InferenceServiceServicer):
    """Replica with a configurable behaviour that records its requests."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self.requests: list[inference_pb2.ActRequest] = []

    async def Act(self, request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
        """Record the request and run the behaviour."""
        self.requests.append(request)
        return await self._behaviour(request, context)


async def samples(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
    """Return an action."""
    return inference_pb2.ActResponse(action=inference_pb2.SampledAction(text="wait()"))


async def hangs(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
    """Never respond."""
    await asyncio.Event().wait()
    raise AssertionError


async def requests_another_image(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
    """Request a screenshot that is not in the conversation."""
    return inference_pb2.ActResponse(missing_images=inference_pb2.MissingImages(hashes=["0" * 64]))


def fails(code: grpc.StatusCode) -> Behaviour:
    """Return a behaviour that fails with a status."""

    async def behaviour(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
        await context.abort(code, "on demand")
        raise AssertionError

    return behaviour


def act(*replicas: Replica, num_steps: int = 1, timeout_s: float = 20.0) -> list[str]:
    """Run one episode and return the texts of its actions."""

    async def scenario() -> list[str]:
        servers, first_port = await serve(replicas)
        config = InferenceConfig(address=f"127.0.0.1:{first_port}", num_replicas=len(replicas))
        client = InferenceClient(config, "actor-0", timeout_s)
        try:
            return await run_episode(client.open_session("episode", temperature=1.0), num_steps)
        finally:
            await client.close()
            for server in servers:
                await server.stop(None)

    return asyncio.run(scenario())


async def serve(replicas: tuple[Replica, ...]) -> tuple[list[grpc.aio.Server], int]:
    """Serve replicas on consecutive ports, as in a run."""
    while True:
        servers = [grpc.aio.server() for _ in replicas]
        first_port = servers[0].add_insecure_port("127.0.0.1:0")
        try:
            for offset, server in enumerate(servers[1:], start=1):
                server.add_insecure_port(f"127.0.0.1:{first_port + offset}")
        except RuntimeError:  # one of the ports is in use: try others
            continue
        for server, replica in zip(servers, replicas, strict=True):
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(replica, server)
            await server.start()
        return servers, first_port


async def run_episode(session: InferenceSession, num_steps: int) -> list[str]:
    """Sample one action per step, each on a new screenshot."""
    messages: list[inference_pb2.ChatMessage] = []
    texts = []
    for step in range(num_steps):
        data = f"screenshot {step}".encode()
        image = common_pb2.Image(hash=image_hash(data), data=data)
        content = inference_pb2.Content(image_hash=image.hash)
        messages.append(inference_pb2.ChatMessage(role=inference_pb2.MESSAGE_ROLE_USER, contents=[content]))
        texts.append((await session.act(messages, image, seed=step)).text)
    return texts


def num_images_sent(replica: Replica) -> list[int]:
    """Return the number of screenshots in each request to a replica."""
    return [len(request.images) for request in replica.requests]


def test_an_episode_uses_one_replica_and_sends_it_each_screenshot_once() -> None:
    replicas = Replica(samples), Replica(samples)
    assert act(*replicas, num_steps=3) == ["wait()"] * 3
    assert sorted(map(num_images_sent, replicas)) == [[], [1, 1, 1]]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_if_a_replica_fails_another_one_is_used_and_gets_all_screenshots(code: grpc.StatusCode) -> None:
    async def fails_the_second_time(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
        num_requests = sum(len(replica.requests) for replica in replicas)
        return await (fails(code) if num_requests == 2 else samples)(request, context)

    replicas = Replica(fails_the_second_time), Replica(fails_the_second_time)
    assert act(*replicas, num_steps=3) == ["wait()"] * 3
    failed, other = replicas if num_images_sent(replicas[0]) == [1, 1] else reversed(replicas)
    assert num_images_sent(failed) == [1, 1] and num_images_sent(other) == [2, 1]


def test_replicas_may_join_and_leave_during_an_episode() -> None:
    first, second = Replica(samples), Replica(samples)

    async def scenario() -> None:
        servers, port = await serve((first, second))
        addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
        client = InferenceClient(InferenceConfig(num_replicas=0), "actor-0", 20.0)
        session = client.open_session("episode", temperature=1.0)
        running = asyncio.create_task(run_episode(session, 1))
        client.set_joined(addresses[:1])
        assert await running == ["wait()"]
        client.set_joined(addresses[1:])
        assert await run_episode(session, 1) == ["wait()"]
        await client.close()
        for server in servers:
            await server.stop(None)

    asyncio.run(scenario())
    assert num_images_sent(first) == num_images_sent(second) == [1]


def test_a_replica_that_joins_takes_its_share_of_episodes_and_moves_no_others() -> None:
    async def chosen_addresses(num_replicas: int) -> list[str]:
        client = InferenceClient(InferenceConfig(num_replicas=num_replicas), "actor-0", 1.0)
        chosen = [client._choose_replica(f"episode-{number}") for number in range(300)]
        await client.close()
        return [replica.address for replica in chosen if replica is not None]

    before, after = asyncio.run(chosen_addresses(2)), asyncio.run(chosen_addresses(3))
    newcomer = InferenceConfig(num_replicas=3).replica_addresses[2]
    assert 60 < after.count(newcomer) < 140
    assert all(one == two for one, two in zip(before, after, strict=True) if two != newcomer)


def test_no_action_within_the_timeout_raises_an_error_with_the_last_reason() -> None:
    with pytest.raises(InferenceError, match=r"no action within 0\.3 s"):
        act(Replica(hangs), timeout_s=0.3)
    with pytest.raises(InferenceError, match=r"within 0\.3 s; last error: .* UNAVAILABLE: on demand"):
        act(Replica(fails(grpc.StatusCode.UNAVAILABLE)), timeout_s=0.3)


def test_a_rejected_request_is_not_repeated() -> None:
    replica = Replica(fails(grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(InferenceError, match="INVALID_ARGUMENT: on demand"):
        act(replica)
    assert len(replica.requests) == 1


def test_a_replica_that_requests_a_screenshot_outside_the_conversation_raises_an_error() -> None:
    with pytest.raises(InferenceError, match="requested screenshots outside the conversation"):
        act(Replica(requests_another_image))


def test_replicas_have_consecutive_ports() -> None:
    config = InferenceConfig(address="127.0.0.1:7421", num_replicas=3)
    assert config.replica_addresses == ["127.0.0.1:7421", "127.0.0.1:7422", "127.0.0.1:7423"]
