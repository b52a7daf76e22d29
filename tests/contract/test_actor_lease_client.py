"""Lease client and episode sender: behaviour when the replay service breaks streams, rejects episodes or loses leases.

The replay service is a double, because a real one does not fail on demand. Restarts of a real one are tested in
tests/system.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import pytest
from ports_kit import free_address

from deskrl.actor.desktop_starts import DesktopStarts
from deskrl.actor.episode_sender import EpisodeSender
from deskrl.actor.lease import Lease, LeaseLostError, ReplayRejectedError
from deskrl.actor.lease_client import LeaseClient
from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[rollout_pb2.StreamEpisodeRequest]
Responses = AsyncIterator[rollout_pb2.StreamEpisodeResponse]
Behaviour = Callable[["ReplayDouble", Requests, Context], Responses]

RESULT = rollout_pb2.EpisodeResult(reward=1.0, termination=rollout_pb2.TERMINATION_FINISHED, num_steps=2)


class ReplayDouble(rollout_pb2_grpc.RolloutServiceServicer):
    """Replay service that behaves differently on each stream, repeats the last behaviour, and records all events."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self._behaviours = list(behaviours)
        self.received: list[list[str]] = []
        self.alive: set[str] = set()

    async def StreamEpisode(self, requests: Requests, context: Context) -> Responses:
        """Run the next behaviour."""
        self.received.append([])
        behaviour = self._behaviours[0]
        if len(self._behaviours) > 1:
            del self._behaviours[0]
        async for response in behaviour(self, requests, context):
            yield response

    async def receive(self, requests: Requests, until: str) -> None:
        """Record events up to the named one."""
        async for request in requests:
            event = request.WhichOneof("event")
            assert event is not None
            name = {"step": f"step {request.step.index}"}.get(event, event)
            self.received[-1].append(" with ".join([name, *(image.data.decode() for image in request.images)]))
            if name == until:
                return

    async def AcquireLease(
        self, request: rollout_pb2.AcquireLeaseRequest, context: Context
    ) -> rollout_pb2.AcquireLeaseResponse:
        """Grant a lease per request; reject a caller of another protocol version."""
        if request.peer.name == "stranger":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "protocol version mismatch")
        rollout = rollout_pb2.Rollout(episode_id="episode")
        return rollout_pb2.AcquireLeaseResponse(lease_id=f"lease of {request.request_id}", rollout=rollout, ttl_s=0.03)

    async def ExtendLeases(
        self, request: rollout_pb2.ExtendLeasesRequest, context: Context
    ) -> rollout_pb2.ExtendLeasesResponse:
        """Extend only the leases in `alive`."""
        return rollout_pb2.ExtendLeasesResponse(alive=self.alive.intersection(request.lease_ids))


async def close_episode(double: ReplayDouble, requests: Requests, context: Context) -> Responses:
    """Receive and acknowledge the whole episode."""
    await double.receive(requests, until="result")
    yield rollout_pb2.StreamEpisodeResponse(acked_steps=2, closed=True)


async def break_after_a_step(double: ReplayDouble, requests: Requests, context: Context) -> Responses:
    """Acknowledge the first step, receive the second, and break the stream."""
    await double.receive(requests, until="step 0")
    yield rollout_pb2.StreamEpisodeResponse(acked_steps=1)
    await double.receive(requests, until="step 1")
    await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")


async def break_at_once(double: ReplayDouble, requests: Requests, context: Context) -> Responses:
    """Break the stream before the first event."""
    await context.abort(grpc.StatusCode.UNAVAILABLE, "coming up")
    yield rollout_pb2.StreamEpisodeResponse()


async def end_early(double: ReplayDouble, requests: Requests, context: Context) -> Responses:
    """End the stream without an error and without closing the episode."""
    await double.receive(requests, until="step 1")
    yield rollout_pb2.StreamEpisodeResponse(acked_steps=2)


async def lose_lease(double: ReplayDouble, requests: Requests, context: Context) -> Responses:
    """Report that the lease was granted to another actor."""
    await context.abort(grpc.StatusCode.NOT_FOUND, "granted again")
    yield rollout_pb2.StreamEpisodeResponse()


async def reject(double: ReplayDouble, requests: Requests, context: Context) -> Responses:
    """Reject the episode because it violates the protocol."""
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a step leaves a gap")
    yield rollout_pb2.StreamEpisodeResponse()


def with_replay(double: ReplayDouble, use: Callable[[LeaseClient], Awaitable[None]], name: str = "actor-0") -> None:
    """Run `use` with a client of the double."""

    async def scenario() -> None:
        server = grpc.aio.server()
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(double, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = LeaseClient(f"127.0.0.1:{port}", name)
        try:
            async with asyncio.timeout(30):
                await use(client)
        finally:
            await client.close()
            await server.stop(None)

    asyncio.run(scenario())


def stream_an_episode(double: ReplayDouble) -> None:
    """Stream two steps with a screenshot each, the first screenshot twice, and the result."""

    async def use(client: LeaseClient) -> None:
        lease = await client.acquire()
        sender = client.open_episode(lease)
        add_step(sender, 0, "first")
        add_step(sender, 1, "first")
        sender.add_image(image("last"))
        await sender.finish(RESULT)

    with_replay(double, use)


def add_step(sender: EpisodeSender, index: int, screenshot: str) -> None:
    """Add a screenshot and the step decided on it."""
    sender.add_image(image(screenshot))
    name = image(screenshot).hash
    sender.add_step(Step(index=index, screenshot=name, images=(name,), text="wait()"))


def image(text: str) -> common_pb2.Image:
    """Return a screenshot with a text in place of PNG data."""
    return common_pb2.Image(hash=image_hash(text.encode()), data=text.encode())


def test_an_episode_is_sent_in_one_stream_with_each_screenshot_once() -> None:
    double = ReplayDouble(close_episode)
    stream_an_episode(double)
    assert double.received == [["begin", "step 0 with first", "step 1", "result with last"]]


def test_a_broken_stream_is_resumed_from_the_first_unacknowledged_event() -> None:
    double = ReplayDouble(break_after_a_step, break_at_once, close_episode)
    stream_an_episode(double)
    assert double.received == [["begin", "step 0 with first", "step 1"], [], ["begin", "step 1", "result with last"]]


def test_a_stream_that_ends_without_closing_the_episode_is_resumed() -> None:
    double = ReplayDouble(end_early, close_episode)
    stream_an_episode(double)
    assert double.received[-1] == ["begin", "result with last"]


def test_a_lost_lease_ends_the_episode() -> None:
    with pytest.raises(LeaseLostError, match="granted again"):
        stream_an_episode(ReplayDouble(lose_lease))


def test_a_rejected_episode_is_not_sent_again() -> None:
    with pytest.raises(ReplayRejectedError, match="INVALID_ARGUMENT: a step leaves a gap"):
        stream_an_episode(ReplayDouble(reject))


def test_a_lost_lease_is_noticed_while_no_event_is_sent() -> None:
    async def use(client: LeaseClient) -> None:
        lease = await client.acquire()
        client.open_episode(lease)
        await lease.ended.wait()
        assert isinstance(lease.error, LeaseLostError)

    with_replay(ReplayDouble(lose_lease), use)


def test_one_call_extends_all_leases_and_ends_those_that_were_lost() -> None:
    double = ReplayDouble()

    async def use(client: LeaseClient) -> None:
        kept, lost = await client.acquire(), await client.acquire()
        double.alive = {kept.id}
        heartbeat = asyncio.create_task(client.keep_alive(30.0, DesktopStarts(60.0)))
        await lost.ended.wait()
        assert isinstance(lost.error, LeaseLostError) and not kept.ended.is_set()
        heartbeat.cancel()

    with_replay(double, use)


def test_another_protocol_version_is_a_user_error() -> None:
    async def use(client: LeaseClient) -> None:
        with pytest.raises(UserError, match="rejected this actor: protocol version mismatch"):
            await client.acquire()

    with_replay(ReplayDouble(), use, name="stranger")


def test_acquire_waits_until_the_replay_service_is_available() -> None:
    async def scenario() -> None:
        client = LeaseClient(address, "actor-0")
        acquiring = asyncio.create_task(client.acquire())
        server = grpc.aio.server()
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(ReplayDouble(), server)
        await asyncio.wait({acquiring}, timeout=0.5)  # long enough for the first attempt to fail
        server.add_insecure_port(address)
        await server.start()
        async with asyncio.timeout(30):
            lease: Lease = await acquiring
        assert lease.rollout.episode_id == "episode"
        await client.close()
        await server.stop(None)

    address = free_address()
    asyncio.run(scenario())
