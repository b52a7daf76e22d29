"""Episode sender: streams one episode to the replay service (`StreamEpisode` of `rollout.proto`).

A broken stream is resumed from the first event that was not acknowledged, however long the service was unavailable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from deskrl.actor.backoff import TRANSIENT, Backoff
from deskrl.actor.lease import Lease, LeaseLostError, ReplayRejectedError
from deskrl.core import rpc
from deskrl.core.step_codec import Step, encode_step
from deskrl.proto.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

# If a stream ends during a write, gRPC reports INTERNAL, whatever status the server returned. So after INTERNAL the
# next stream pauses after each write, long enough to receive the server's status. Several INTERNAL in a row without an
# acknowledgement count as a rejection.
_FIRST_WRITE_PAUSE_S, _MAX_INTERNAL = 0.1, 5
_log = logging.getLogger(__name__)


class EpisodeSender:
    """Sends one episode step by step as it happens.

    Events are kept until they are acknowledged and are sent again on the next stream if the present one breaks. Adding
    an event does not wait.

    Args:
        stub: stub of the replay service.
        peer: description of this process.
        lease: lease of the episode; it is ended if the replay service accepts nothing more.
    """

    def __init__(self, stub: rollout_pb2_grpc.RolloutServiceStub, peer: common_pb2.Peer, lease: Lease) -> None:
        self._stub = stub
        self._lease = lease
        begin = rollout_pb2.EpisodeBegin(peer=peer, lease_id=lease.id, episode_id=lease.rollout.episode_id)
        self._begin = rollout_pb2.StreamEpisodeRequest(begin=begin)
        # Events from number `_base` on. Earlier ones were acknowledged and deleted.
        self._base = 0
        self._events: list[rollout_pb2.StreamEpisodeRequest] = []
        self._step_ends: list[int] = []
        self._num_acked_steps = 0
        self._image_hashes: set[str] = set()
        self._new_images: list[common_pb2.Image] = []
        self._complete = False
        self._added = asyncio.Event()
        self._delivery = asyncio.create_task(self._deliver())

    @property
    def num_steps(self) -> int:
        """Number of steps added."""
        return len(self._step_ends)

    def add_image(self, image: common_pb2.Image) -> None:
        """Send a screenshot along with the next step or the result, unless this episode has sent it already."""
        if image.hash not in self._image_hashes:
            self._image_hashes.add(image.hash)
            self._new_images.append(image)

    def add_step(self, step: Step) -> None:
        """Send a step. Its screenshots must have been added before."""
        record = rollout_pb2.EpisodeStep(index=step.index, image_hashes=step.images, payload=encode_step(step))
        self._add(rollout_pb2.StreamEpisodeRequest(step=record, images=self._new_images))
        self._new_images.clear()
        self._step_ends.append(self._base + len(self._events))

    async def finish(self, end: rollout_pb2.EpisodeResult | rollout_pb2.EpisodeFault) -> None:
        """Send the result or fault, and wait until the replay service has stored the whole episode on disk.

        Raises:
            LeaseLostError: the lease expired or was granted to another actor.
            ReplayRejectedError: the replay service rejected this episode.
        """
        if isinstance(end, rollout_pb2.EpisodeResult):
            self._add(rollout_pb2.StreamEpisodeRequest(result=end, images=self._new_images))
        else:
            self._add(rollout_pb2.StreamEpisodeRequest(fault=end))
        self._complete = True
        self._added.set()
        await self._delivery
        if self._lease.error is not None:
            raise self._lease.error

    async def abandon(self) -> None:
        """Stop sending."""
        self._delivery.cancel()
        await asyncio.wait({self._delivery})

    def _add(self, event: rollout_pb2.StreamEpisodeRequest) -> None:
        self._events.append(event)
        self._added.set()

    async def _deliver(self) -> None:
        """Open one stream after another until the episode is closed or the lease has ended."""
        backoff = Backoff()
        num_internal = 0
        while not self._lease.ended.is_set():
            num_acked = self._num_acked_steps
            internal = False
            try:
                if await self._stream(write_pause_s=_FIRST_WRITE_PAUSE_S * 2**num_internal if num_internal else 0.0):
                    return
                reason: str | None = "the stream ended early"
            except TimeoutError:
                reason = "the result was not acknowledged in time"
            except grpc.aio.AioRpcError as error:
                reason = rpc.describe_error(error)
                internal = error.code() == grpc.StatusCode.INTERNAL
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return self._lease.end(LeaseLostError(error.details() or "lease not found"))
                if rpc.status_code(error) not in TRANSIENT or num_internal == _MAX_INTERNAL:
                    return self._lease.end(ReplayRejectedError(reason))
            progressed = self._num_acked_steps > num_acked
            num_internal = num_internal + 1 if internal and not progressed else 0
            if progressed:
                backoff = Backoff()
            if backoff.is_first:
                _log.warning("stream of %s broke (%s), resuming it", self._lease.rollout.episode_id, reason)
            await backoff.sleep()

    async def _stream(self, write_pause_s: float) -> bool:
        """Run one stream and return whether the replay service closed the episode.

        Args:
            write_pause_s: pause in seconds after each event written.

        Raises:
            TimeoutError: the end of the episode was not acknowledged in time.
            grpc.aio.AioRpcError: the stream broke.
        """
        call = self._stub.StreamEpisode()
        async with asyncio.timeout(None) as deadline:
            writing = asyncio.create_task(self._write(call, deadline, write_pause_s))
            try:
                async for response in call:
                    self._acknowledge(response.acked_steps)
                    if response.closed:
                        return True
                return False
            finally:
                writing.cancel()
                call.cancel()

    async def _write(self, call: EpisodeCall, deadline: asyncio.Timeout, write_pause_s: float) -> None:
        """Write all events, then set the deadline for the acknowledgement of the last one."""
        # The write fails too if the stream has ended. The reading side receives the reason.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._begin)
            await asyncio.sleep(write_pause_s)
            async for event in self._unacknowledged():
                await call.write(event)
                await asyncio.sleep(write_pause_s)
            await call.done_writing()
            deadline.reschedule(asyncio.get_running_loop().time() + rpc.UNARY_TIMEOUT_S)

    async def _unacknowledged(self) -> AsyncIterator[rollout_pb2.StreamEpisodeRequest]:
        """Yield events from the first unacknowledged one on, wait for new ones, and stop after the episode's end."""
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
        """Delete the events of the first `num_steps` steps."""
        if num_steps > self._num_acked_steps:
            self._num_acked_steps = num_steps
            num_done = self._step_ends[num_steps - 1] - self._base
            del self._events[:num_done]
            self._base += num_done


EpisodeCall = grpc.aio.StreamStreamCall[rollout_pb2.StreamEpisodeRequest, rollout_pb2.StreamEpisodeResponse]
