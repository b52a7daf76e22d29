"""One episode on its way to replay: `StreamEpisode` of `rollout.proto` as the actor sees it, broken streams resumed.

Knows no desktop and no policy. Replay may be away at any moment and for any time: nothing is lost by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from deskrl.actor.leases import Lease, LeaseLost, ReplayRefused
from deskrl.actor.retries import TRANSIENT, Pauses
from deskrl.core import rpc
from deskrl.core.trajectory import Step, encode_step
from deskrl.proto.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

# A stream that ends while something is being written reports INTERNAL, whatever the server said. So after an INTERNAL
# events are written one at a time, with a pause after each in which a refusal of it is heard; several INTERNAL in a row
# with nothing acknowledged are a refusal too.
_FIRST_LISTEN_S, _MAX_INTERNAL = 0.1, 5
_log = logging.getLogger(__name__)


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
        self._new_images: list[common_pb2.Image] = []
        self._complete = False
        self._added = asyncio.Event()
        self._pump = asyncio.create_task(self._deliver())

    @property
    def num_steps(self) -> int:
        """Steps added."""
        return len(self._step_ends)

    def add_image(self, image: common_pb2.Image) -> None:
        """Have a screenshot sent with the next step or the result, unless this episode sent it before."""
        if image.hash not in self._image_hashes:
            self._image_hashes.add(image.hash)
            self._new_images.append(image)

    def add_step(self, step: Step) -> None:
        """Send a step; its screenshots were added before."""
        record = rollout_pb2.EpisodeStep(index=step.index, image_hashes=step.images, payload=encode_step(step))
        self._add(rollout_pb2.StreamEpisodeRequest(step=record, images=self._new_images))
        self._new_images.clear()
        self._step_ends.append(self._base + len(self._events))

    async def finish(self, end: rollout_pb2.EpisodeResult | rollout_pb2.EpisodeFault) -> None:
        """Send how it ended; returns when replay has the whole episode on disk.

        Raises:
            LeaseLost: the work was granted to another actor.
            ReplayRefused: replay will not take this episode.
        """
        if isinstance(end, rollout_pb2.EpisodeResult):
            self._add(rollout_pb2.StreamEpisodeRequest(result=end, images=self._new_images))
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
        """Converse until replay has closed the episode, or would not take it any more."""
        pauses = Pauses()
        num_internal = 0
        while not self._lease.over.is_set():
            num_acked = self._num_acked_steps
            internal = False
            try:
                if await self._converse(listen_s=_FIRST_LISTEN_S * 2**num_internal if num_internal else 0.0):
                    return
                reason: str | None = "the stream ended early"
            except TimeoutError:
                reason = "the result was not acknowledged in time"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                internal = error.code() == grpc.StatusCode.INTERNAL
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return self._lease.end(LeaseLost(error.details() or "lease not found"))
                if rpc.code_of(error) not in TRANSIENT or num_internal == _MAX_INTERNAL:
                    return self._lease.end(ReplayRefused(reason))
            progressed = self._num_acked_steps > num_acked
            num_internal = num_internal + 1 if internal and not progressed else 0
            if progressed:
                pauses = Pauses()
            if pauses.are_new:
                _log.warning("the stream of %s broke (%s): resuming it", self._lease.rollout.episode_id, reason)
            await pauses.take()

    async def _converse(self, listen_s: float) -> bool:
        """One stream from begin to its end; whether replay closed the episode.

        Args:
            listen_s: pause after each event written.
        """
        call = self._stub.StreamEpisode()
        async with asyncio.timeout(None) as patience:
            sender = asyncio.create_task(self._send(call, patience, listen_s))
            try:
                async for response in call:
                    self._acknowledge(response.acked_steps)
                    if response.closed:
                        return True
                return False
            finally:
                sender.cancel()
                call.cancel()

    async def _send(self, call: EpisodeCall, patience: asyncio.Timeout, listen_s: float) -> None:
        # A stream that is over fails the write too; the reading side hears why.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._begin)
            await asyncio.sleep(listen_s)
            async for event in self._unacknowledged():
                await call.write(event)
                await asyncio.sleep(listen_s)
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
