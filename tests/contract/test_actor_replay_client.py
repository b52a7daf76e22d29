"""How an actor streams an episode when replay breaks off, refuses or forgets. Against a double of replay: a real one
does none of it on command (its death and return are tested in tests/system)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import pytest
from ports_kit import free_address

from deskrl.actor.episode_stream import EpisodeStream
from deskrl.actor.leases import Lease, LeaseLost, ReplayRefused
from deskrl.actor.replay_client import ReplayClient
from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.core.trajectory import Step
from deskrl.proto.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[rollout_pb2.StreamEpisodeRequest]
Answers = AsyncIterator[rollout_pb2.StreamEpisodeResponse]
Conversation = Callable[["ReplayDouble", Requests, Context], Answers]

RESULT = rollout_pb2.EpisodeResult(reward=1.0, termination=rollout_pb2.TERMINATION_FINISHED, num_steps=2)


class ReplayDouble(rollout_pb2_grpc.RolloutServiceServicer):
    """Holds one conversation after another, the last one again and again, and notes what it hears."""

    def __init__(self, *conversations: Conversation) -> None:
        self._conversations = list(conversations)
        self.heard: list[list[str]] = []
        self.alive: set[str] = set()

    async def StreamEpisode(self, requests: Requests, context: Context) -> Answers:
        """The next conversation."""
        self.heard.append([])
        conversation = self._conversations[0]
        if len(self._conversations) > 1:
            del self._conversations[0]
        async for answer in conversation(self, requests, context):
            yield answer

    async def hear(self, requests: Requests, until: str) -> None:
        """Note events up to one of a kind."""
        async for request in requests:
            event = request.WhichOneof("event")
            assert event is not None
            name = {"step": f"step {request.step.index}"}.get(event, event)
            self.heard[-1].append(" with ".join([name, *(image.data.decode() for image in request.images)]))
            if name == until:
                return

    async def AcquireLease(
        self, request: rollout_pb2.AcquireLeaseRequest, context: Context
    ) -> rollout_pb2.AcquireLeaseResponse:
        """Every ask is granted once; one of another protocol is refused."""
        if request.peer.name == "stranger":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "speaks protocol 0, this service 1")
        rollout = rollout_pb2.Rollout(episode_id="episode")
        return rollout_pb2.AcquireLeaseResponse(lease_id=f"lease of {request.request_id}", rollout=rollout, ttl_s=0.03)

    async def ExtendLeases(
        self, request: rollout_pb2.ExtendLeasesRequest, context: Context
    ) -> rollout_pb2.ExtendLeasesResponse:
        """Only those in `alive` are held."""
        return rollout_pb2.ExtendLeasesResponse(alive=self.alive.intersection(request.lease_ids))


async def close_it(double: ReplayDouble, requests: Requests, context: Context) -> Answers:
    """Hear all, acknowledge all."""
    await double.hear(requests, until="result")
    yield rollout_pb2.StreamEpisodeResponse(acked_steps=2, closed=True)


async def break_after_a_step(double: ReplayDouble, requests: Requests, context: Context) -> Answers:
    """Acknowledge the first step, hear the second, and be gone."""
    await double.hear(requests, until="step 0")
    yield rollout_pb2.StreamEpisodeResponse(acked_steps=1)
    await double.hear(requests, until="step 1")
    await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")


async def break_at_once(double: ReplayDouble, requests: Requests, context: Context) -> Answers:
    """Have no time at all."""
    await context.abort(grpc.StatusCode.UNAVAILABLE, "coming up")
    yield rollout_pb2.StreamEpisodeResponse()


async def end_early(double: ReplayDouble, requests: Requests, context: Context) -> Answers:
    """End the stream in order, yet without having closed the episode."""
    await double.hear(requests, until="step 1")
    yield rollout_pb2.StreamEpisodeResponse(acked_steps=2)


async def disown(double: ReplayDouble, requests: Requests, context: Context) -> Answers:
    """The lease is another's."""
    await context.abort(grpc.StatusCode.NOT_FOUND, "granted again")
    yield rollout_pb2.StreamEpisodeResponse()


async def refuse(double: ReplayDouble, requests: Requests, context: Context) -> Answers:
    """What is sent contradicts the contract."""
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a step leaves a gap")
    yield rollout_pb2.StreamEpisodeResponse()


def with_replay(double: ReplayDouble, use: Callable[[ReplayClient], Awaitable[None]], name: str = "actor-0") -> None:
    """Use a client of the double."""

    async def scenario() -> None:
        server = grpc.aio.server()
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(double, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = ReplayClient(f"127.0.0.1:{port}", name)
        try:
            async with asyncio.timeout(30):
                await use(client)
        finally:
            await client.close()
            await server.stop(None)

    asyncio.run(scenario())


def stream_an_episode(double: ReplayDouble) -> None:
    """Stream two steps with a screenshot each, the first screenshot twice, and the result."""

    async def use(client: ReplayClient) -> None:
        lease = await client.acquire()
        stream = client.open_episode(lease)
        add_turn(stream, 0, "first")
        add_turn(stream, 1, "first")
        stream.add_image(image("last"))
        await stream.finish(RESULT)

    with_replay(double, use)


def add_turn(stream: EpisodeStream, index: int, screenshot: str) -> None:
    """Add a screenshot and the step decided on it."""
    stream.add_image(image(screenshot))
    name = image(screenshot).hash
    stream.add_step(Step(index=index, screenshot=name, images=(name,), text="wait()"))


def image(text: str) -> common_pb2.Image:
    """Some bytes for a screenshot."""
    return common_pb2.Image(hash=image_hash(text.encode()), data=text.encode())


def test_an_episode_goes_in_one_stream_each_screenshot_once() -> None:
    double = ReplayDouble(close_it)
    stream_an_episode(double)
    assert double.heard == [["begin", "step 0 with first", "step 1", "result with last"]]


def test_a_broken_stream_is_resumed_with_what_was_not_acknowledged() -> None:
    double = ReplayDouble(break_after_a_step, break_at_once, close_it)
    stream_an_episode(double)
    assert double.heard == [["begin", "step 0 with first", "step 1"], [], ["begin", "step 1", "result with last"]]


def test_a_stream_that_ends_without_closing_the_episode_is_resumed() -> None:
    double = ReplayDouble(end_early, close_it)
    stream_an_episode(double)
    assert double.heard[-1] == ["begin", "result with last"]


def test_a_lost_lease_ends_the_episode() -> None:
    with pytest.raises(LeaseLost, match="granted again"):
        stream_an_episode(ReplayDouble(disown))


def test_a_refusal_is_final() -> None:
    with pytest.raises(ReplayRefused, match="INVALID_ARGUMENT: a step leaves a gap"):
        stream_an_episode(ReplayDouble(refuse))


def test_a_lost_lease_is_noticed_while_nothing_is_sent() -> None:
    async def use(client: ReplayClient) -> None:
        lease = await client.acquire()
        client.open_episode(lease)
        await lease.over.wait()
        assert isinstance(lease.error, LeaseLost)

    with_replay(ReplayDouble(disown), use)


def test_a_heartbeat_speaks_for_all_leases_and_ends_those_that_are_disowned() -> None:
    double = ReplayDouble()

    async def use(client: ReplayClient) -> None:
        kept, lost = await client.acquire(), await client.acquire()
        double.alive = {kept.id}
        heartbeat = asyncio.create_task(client.keep_alive(default_ttl_s=30.0))
        await lost.over.wait()
        assert isinstance(lost.error, LeaseLost) and not kept.over.is_set()
        heartbeat.cancel()

    with_replay(double, use)


def test_another_protocol_is_the_users_matter() -> None:
    async def use(client: ReplayClient) -> None:
        with pytest.raises(UserError, match="refuses this actor; speaks protocol 0"):
            await client.acquire()

    with_replay(ReplayDouble(), use, name="stranger")


def test_work_is_waited_for_until_replay_is_there() -> None:
    async def scenario() -> None:
        client = ReplayClient(address, "actor-0")
        asking = asyncio.create_task(client.acquire())
        server = grpc.aio.server()
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(ReplayDouble(), server)
        await asyncio.wait({asking}, timeout=0.5)  # long enough for a first answer that nobody listens
        server.add_insecure_port(address)
        await server.start()
        async with asyncio.timeout(30):
            lease: Lease = await asking
        assert lease.rollout.episode_id == "episode"
        await client.close()
        await server.stop(None)

    address = free_address()
    asyncio.run(scenario())
