"""How an actor asks for actions when replicas are away, slow or refuse. Against a double of inference that does so on
command; actions of the real engine are tested where the engine is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from deskrl.actor.agent.policy_client import InferenceFailed, PolicyClient, PolicySession
from deskrl.core.config import InferenceConfig
from deskrl.core.ids import image_hash
from deskrl.proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[inference_pb2.ActRequest, Context], Awaitable[inference_pb2.ActResponse]]


class Replica(inference_pb2_grpc.InferenceServiceServicer):
    """Behaves as told and notes what it is asked."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self.asked: list[inference_pb2.ActRequest] = []

    async def Act(self, request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
        """Note, and behave."""
        self.asked.append(request)
        return await self._behaviour(request, context)


async def answers(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
    """Sample something."""
    return inference_pb2.ActResponse(action=inference_pb2.SampledAction(text="wait()"))


async def hangs(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def lacks_another(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
    """Ask for a screenshot that is not in the conversation."""
    return inference_pb2.ActResponse(missing_images=inference_pb2.MissingImages(hashes=["0" * 64]))


def fails(code: grpc.StatusCode) -> Behaviour:
    """Answer with a status."""

    async def behaviour(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
        await context.abort(code, "told to")
        raise AssertionError

    return behaviour


def act(*replicas: Replica, num_turns: int = 1, timeout_s: float = 20.0) -> list[str]:
    """What the replicas say in one episode."""

    async def scenario() -> list[str]:
        servers, first_port = await serve(replicas)
        config = InferenceConfig(address=f"127.0.0.1:{first_port}", num_replicas=len(replicas))
        client = PolicyClient(config, "actor-0", timeout_s)
        try:
            return await play(client.open_session("episode", temperature=1.0), num_turns)
        finally:
            await client.close()
            for server in servers:
                await server.stop(None)

    return asyncio.run(scenario())


async def serve(replicas: tuple[Replica, ...]) -> tuple[list[grpc.aio.Server], int]:
    """Let replicas listen on ports that follow one another, as they do in a run."""
    while True:
        servers = [grpc.aio.server() for _ in replicas]
        first_port = servers[0].add_insecure_port("127.0.0.1:0")
        try:
            for offset, server in enumerate(servers[1:], start=1):
                server.add_insecure_port(f"127.0.0.1:{first_port + offset}")
        except RuntimeError:  # a port among them is taken: look elsewhere
            continue
        for server, replica in zip(servers, replicas, strict=True):
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(replica, server)
            await server.start()
        return servers, first_port


async def play(session: PolicySession, num_turns: int) -> list[str]:
    """Show a new screenshot each turn."""
    messages: list[inference_pb2.ChatMessage] = []
    said = []
    for turn in range(num_turns):
        data = f"screenshot {turn}".encode()
        image = common_pb2.Image(hash=image_hash(data), data=data)
        shown = inference_pb2.Content(image_hash=image.hash)
        messages.append(inference_pb2.ChatMessage(role=inference_pb2.MESSAGE_ROLE_USER, contents=[shown]))
        said.append((await session.act(messages, image, seed=turn)).text)
    return said


def num_images(replica: Replica) -> list[int]:
    """How many screenshots each request to a replica brought along."""
    return [len(request.images) for request in replica.asked]


def test_an_episode_stays_with_one_replica_and_sends_it_each_screenshot_once() -> None:
    replicas = Replica(answers), Replica(answers)
    assert act(*replicas, num_turns=3) == ["wait()"] * 3
    assert sorted(map(num_images, replicas)) == [[], [1, 1, 1]]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_another_replica_is_asked_instead_and_gets_all_screenshots(code: grpc.StatusCode) -> None:
    async def fails_the_second_time(request: inference_pb2.ActRequest, context: Context) -> inference_pb2.ActResponse:
        num_asked = sum(len(replica.asked) for replica in replicas)
        return await (fails(code) if num_asked == 2 else answers)(request, context)

    replicas = Replica(fails_the_second_time), Replica(fails_the_second_time)
    assert act(*replicas, num_turns=3) == ["wait()"] * 3
    tired, fresh = replicas if num_images(replicas[0]) == [1, 1] else reversed(replicas)
    assert num_images(tired) == [1, 1] and num_images(fresh) == [2, 1]


def test_replicas_join_and_leave_under_a_running_episode() -> None:
    first, second = Replica(answers), Replica(answers)

    async def scenario() -> None:
        servers, port = await serve((first, second))
        addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
        client = PolicyClient(InferenceConfig(num_replicas=0), "actor-0", 20.0)
        session = client.open_session("episode", temperature=1.0)
        playing = asyncio.create_task(play(session, 1))
        client.set_joined(addresses[:1])
        assert await playing == ["wait()"]
        client.set_joined(addresses[1:])
        assert await play(session, 1) == ["wait()"]
        await client.close()
        for server in servers:
            await server.stop(None)

    asyncio.run(scenario())
    assert num_images(first) == num_images(second) == [1]


def test_one_that_joins_takes_its_share_and_moves_no_other_episode() -> None:
    async def homes(num_replicas: int) -> list[str]:
        client = PolicyClient(InferenceConfig(num_replicas=num_replicas), "actor-0", 1.0)
        chosen = [client._choose(f"episode-{number}") for number in range(300)]
        await client.close()
        return [replica.address for replica in chosen if replica is not None]

    before, after = asyncio.run(homes(2)), asyncio.run(homes(3))
    newcomer = InferenceConfig(num_replicas=3).replica_addresses[2]
    assert 60 < after.count(newcomer) < 140
    assert all(one == other for one, other in zip(before, after, strict=True) if other != newcomer)


def test_a_policy_that_does_not_answer_in_time_has_failed() -> None:
    with pytest.raises(InferenceFailed, match=r"no action within 0\.3 s"):
        act(Replica(hangs), timeout_s=0.3)
    with pytest.raises(InferenceFailed, match=r"within 0\.3 s; the last answer was .* UNAVAILABLE: told to"):
        act(Replica(fails(grpc.StatusCode.UNAVAILABLE)), timeout_s=0.3)


def test_a_request_that_is_refused_is_not_repeated() -> None:
    replica = Replica(fails(grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(InferenceFailed, match="INVALID_ARGUMENT: told to"):
        act(replica)
    assert len(replica.asked) == 1


def test_a_server_that_asks_for_what_is_not_in_the_conversation_has_failed() -> None:
    with pytest.raises(InferenceFailed, match="screenshots that the conversation lacks"):
        act(Replica(lacks_another))


def test_replicas_count_the_port_up() -> None:
    config = InferenceConfig(address="127.0.0.1:7421", num_replicas=3)
    assert config.replica_addresses == ["127.0.0.1:7421", "127.0.0.1:7422", "127.0.0.1:7423"]
