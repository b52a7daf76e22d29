"""An actor's side of the rollout contract: leases kept alive, and episodes streamed until replay has them on disk.

Knows the state machines of `rollout.proto`; knows neither desktops nor policies. Replay may be away at any moment and
for any time: nothing is lost by that, an episode goes on and is delivered when replay is back. Only replay itself ends
a lease early, by saying that it granted the work again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from deskrl.core import ids, rpc
from deskrl.core.errors import UserError
from deskrl.core.trajectory import Step, encode_step
from deskrl.proto.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

ACQUIRE_WAIT_S = 10.0
"""How long replay may hold a request for work before it answers that there is none."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0
_log = logging.getLogger(__name__)

# What a service that is restarting, full or overloaded answers; anything else would be answered again the same.
_TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
    }
)


class LeaseLost(Exception):
    """The work was granted to another actor: what this one has of it is worthless."""


class ReplayRefused(RuntimeError):
    """Replay will not take what was sent, however often: this actor's fault."""


class Lease:
    """One rollout that this actor holds. `over` is set when replay would not take the episode any more."""

    def __init__(self, lease_id: str, rollout: rollout_pb2.Rollout, ttl_s: float) -> None:
        self.id = lease_id
        self.rollout = rollout
        self.ttl_s = ttl_s
        self.over = asyncio.Event()
        self.error: LeaseLost | ReplayRefused | None = None

    def end(self, error: LeaseLost | ReplayRefused) -> None:
        """Say why there is no use in going on."""
        self.error = self.error or error
        self.over.set()


class ReplayClient:
    """All leases of one actor process, over one channel.

    Args:
        address: of the replay service.
        name: of this actor process, unique in the run.
    """

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._peer = rpc.peer("actor", name)
        self._channel = rpc.connect(address)
        self._stub = rollout_pb2_grpc.RolloutServiceStub(self._channel)
        self._held: dict[str, Lease] = {}

    async def acquire(self) -> Lease:
        """Wait for work, however long it takes and however often replay is away meanwhile.

        Raises:
            UserError: replay speaks another protocol version.
        """
        request = rollout_pb2.AcquireLeaseRequest(
            peer=self._peer, request_id=ids.new_id("acquire"), wait_s=ACQUIRE_WAIT_S
        )
        pauses = Pauses()
        while True:
            try:
                response = await self._stub.AcquireLease(request, timeout=ACQUIRE_WAIT_S + rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _TRANSIENT:
                    raise _refusal(error, self._address) from error
                if pauses.are_new:
                    _log.warning("replay at %s does not answer (%s): waiting for it", self._address, error.details())
                await pauses.take()  # the same request again: a grant whose answer was lost is answered once more
                continue
            if response.lease_id:
                lease = Lease(response.lease_id, response.rollout, response.ttl_s)
                self._held[lease.id] = lease
                return lease
            request.request_id = ids.new_id("acquire")
            pauses = Pauses()

    async def keep_alive(self, default_ttl_s: float) -> None:
        """Extend all leases in one call each third of their time, for ever; those that replay disowns are ended."""
        while True:
            await asyncio.sleep(min([default_ttl_s, *(lease.ttl_s for lease in self._held.values())]) / 3)
            if not self._held:
                continue
            request = rollout_pb2.ExtendLeasesRequest(peer=self._peer, lease_ids=list(self._held))
            try:
                response = await self._stub.ExtendLeases(request, timeout=rpc.UNARY_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                _log.warning("leases were not extended: %s", error.details())
                continue
            for lease_id in set(request.lease_ids).difference(response.alive):
                if lease := self._held.pop(lease_id, None):
                    lease.end(LeaseLost(f"{lease_id} was granted to another actor"))

    async def release(self, leases: list[Lease]) -> None:
        """Give work back unfinished, at once. If replay cannot be told, the leases run out by themselves."""
        for lease in leases:
            self.forget(lease)
        request = rollout_pb2.ReleaseLeasesRequest(peer=self._peer, lease_ids=[lease.id for lease in leases])
        try:
            await self._stub.ReleaseLeases(request, timeout=3.0)
        except grpc.aio.AioRpcError as error:
            _log.warning("%d leases were not given back and will run out: %s", len(leases), error.details())

    def forget(self, lease: Lease) -> None:
        """Extend this lease no longer: its episode is delivered, or given up."""
        self._held.pop(lease.id, None)

    def open_episode(self, lease: Lease) -> EpisodeStream:
        """Begin to stream the episode of a lease."""
        return EpisodeStream(self._stub, self._peer, lease)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class EpisodeStream:
    """One episode on its way to replay, step by step as it happens; reopened when it breaks.

    What was not acknowledged is kept, and sent again on the next stream. Adding never waits.
    """

    def __init__(self, stub: rollout_pb2_grpc.RolloutServiceStub, peer: common_pb2.Peer, lease: Lease) -> None:
        self._stub = stub
        self._lease = lease
        begin = rollout_pb2.EpisodeBegin(peer=peer, lease_id=lease.id, episode_id=lease.rollout.episode_id)
        self._begin = rollout_pb2.StreamEpisodeRequest(begin=begin)
        # Events from number `_base` on; those before it are acknowledged and gone.
        self._base = 0
        self._events: list[rollout_pb2.StreamEpisodeRequest] = []
        self._step_ends: list[int] = []
        self._num_acked_steps = 0
        self._image_hashes: set[str] = set()
        self._complete = False
        self._added = asyncio.Event()
        self._pump = asyncio.create_task(self._deliver())

    @property
    def num_steps(self) -> int:
        """Steps added."""
        return len(self._step_ends)

    def add_image(self, image: common_pb2.Image) -> None:
        """Send a screenshot, unless this episode sent it before."""
        if image.hash not in self._image_hashes:
            self._image_hashes.add(image.hash)
            self._add(rollout_pb2.StreamEpisodeRequest(image=image))

    def add_step(self, step: Step) -> None:
        """Send a step; its screenshots were added before."""
        record = rollout_pb2.EpisodeStep(index=step.index, image_hashes=step.images, payload=encode_step(step))
        self._add(rollout_pb2.StreamEpisodeRequest(step=record))
        self._step_ends.append(self._base + len(self._events))

    async def finish(self, end: rollout_pb2.EpisodeResult | rollout_pb2.EpisodeFault) -> None:
        """Send how it ended; returns when replay has the whole episode on disk.

        Raises:
            LeaseLost: the work was granted to another actor.
            ReplayRefused: replay will not take this episode.
        """
        if isinstance(end, rollout_pb2.EpisodeResult):
            self._add(rollout_pb2.StreamEpisodeRequest(result=end))
        else:
            self._add(rollout_pb2.StreamEpisodeRequest(fault=end))
        self._complete = True
        self._added.set()
        await self._pump
        if self._lease.error is not None:
            raise self._lease.error

    async def abandon(self) -> None:
        """Send no more."""
        self._pump.cancel()
        await asyncio.wait({self._pump})

    def _add(self, event: rollout_pb2.StreamEpisodeRequest) -> None:
        self._events.append(event)
        self._added.set()

    async def _deliver(self) -> None:
        pauses = Pauses()
        while not self._lease.over.is_set():
            num_acked = self._num_acked_steps
            try:
                if await self._converse():
                    return
                reason: str | None = "the stream ended early"
            except TimeoutError:
                reason = "the result was not acknowledged in time"
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return self._lease.end(LeaseLost(error.details() or "lease not found"))
                if error.code() not in _TRANSIENT:
                    return self._lease.end(ReplayRefused(f"{error.code().name}: {error.details()}"))
                reason = error.details()
            if self._num_acked_steps > num_acked:
                pauses = Pauses()
            if pauses.are_new:
                _log.warning("the stream of %s broke (%s): resuming it", self._lease.rollout.episode_id, reason)
            await pauses.take()

    async def _converse(self) -> bool:
        """One stream from begin to its end; whether replay closed the episode."""
        call = self._stub.StreamEpisode()
        async with asyncio.timeout(None) as patience:
            sender = asyncio.create_task(self._send(call, patience))
            try:
                async for response in call:
                    self._acknowledge(response.acked_steps)
                    if response.closed:
                        return True
                return False
            finally:
                sender.cancel()
                call.cancel()

    async def _send(self, call: EpisodeCall, patience: asyncio.Timeout) -> None:
        # A stream that is over fails the write too; the reading side hears why.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._begin)
            async for event in self._unacknowledged():
                await call.write(event)
            await call.done_writing()
            patience.reschedule(asyncio.get_running_loop().time() + rpc.UNARY_TIMEOUT_S)

    async def _unacknowledged(self) -> AsyncIterator[rollout_pb2.StreamEpisodeRequest]:
        """Events from the first unacknowledged one, then new ones as they come, up to the episode's end."""
        position = 0
        while True:
            position = max(position, self._base)
            if position - self._base < len(self._events):
                position += 1
                yield self._events[position - self._base - 1]
            elif self._complete:
                return
            else:
                self._added.clear()
                await self._added.wait()

    def _acknowledge(self, num_steps: int) -> None:
        if num_steps > self._num_acked_steps:
            self._num_acked_steps = num_steps
            num_done = self._step_ends[num_steps - 1] - self._base
            del self._events[:num_done]
            self._base += num_done


EpisodeCall = grpc.aio.StreamStreamCall[rollout_pb2.StreamEpisodeRequest, rollout_pb2.StreamEpisodeResponse]


class Pauses:
    """Pauses between attempts, each twice as long as the last up to a limit."""

    def __init__(self, first_s: float = _FIRST_PAUSE_S, longest_s: float = _LONGEST_PAUSE_S) -> None:
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    @property
    def are_new(self) -> bool:
        """Whether none was taken yet."""
        return self._next_s == self._first_s

    async def take(self) -> None:
        """Wait once."""
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._longest_s)
        await asyncio.sleep(pause_s)


def _refusal(error: grpc.aio.AioRpcError, address: str) -> Exception:
    if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
        return UserError(f"replay at {address} refuses this actor", error.details() or "install the same version")
    return ReplayRefused(f"{error.code().name}: {error.details()}")
