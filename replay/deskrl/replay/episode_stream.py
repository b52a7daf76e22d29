"""One StreamEpisode call: checks what comes in, hands it to the writer, acknowledges what is on disk.

Knows the stream's state machine (rollout.proto). Reading and acknowledging run side by side, so that the next step
travels while the last one is being committed; a bounded queue between them is the back-pressure.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from typing import Any

from deskrl.core.trajectory import MAX_STEP_BYTES, CodecError, decode_step
from deskrl.proto.v1 import common_pb2, rollout_pb2
from deskrl.replay import images, rollouts
from deskrl.replay.coordinator import Coordinator
from deskrl.replay.refusals import Malformed

MAX_IMAGE_BYTES = 16 * 1024**2
MAX_STEPS_IN_FLIGHT = 16

_TERMINATIONS = frozenset(rollout_pb2.Termination.values()) - {rollout_pb2.TERMINATION_UNSPECIFIED}
_FAULT_KINDS = frozenset(rollout_pb2.FaultKind.values()) - {rollout_pb2.FAULT_KIND_UNSPECIFIED}
_END = None
_Ack = tuple["asyncio.Future[int]", bool]


class EpisodeStream:
    """One episode on its way in, under one lease."""

    def __init__(self, coordinator: Coordinator, begin: rollout_pb2.EpisodeBegin, context: Any) -> None:
        self._coordinator = coordinator
        self._lease_id = begin.lease_id
        self._episode_id = begin.episode_id
        self._context = context
        self._pending: asyncio.Queue[_Ack | None] = asyncio.Queue(MAX_STEPS_IN_FLIGHT)

    async def run(self, requests: AsyncIterator[rollout_pb2.StreamEpisodeRequest]) -> None:
        """Serve the stream to its end.

        Raises:
            LeaseLost: the lease is not held by this actor any more.
            Malformed: something that the contract does not allow was sent.
        """
        lease = await self._coordinator.store.read(
            lambda connection: rollouts.held(connection, self._lease_id, self._episode_id)
        )
        if lease.num_steps:  # a stream opened again: say where it goes on
            await self._context.write(rollout_pb2.StreamEpisodeResponse(acked_steps=lease.num_steps))
        tasks = [asyncio.create_task(self._receive(requests)), asyncio.create_task(self._acknowledge())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, requests: AsyncIterator[rollout_pb2.StreamEpisodeRequest]) -> None:
        async for request in requests:
            match request.WhichOneof("event"):
                case "step":
                    await self._receive_step(request.step, self._receive_images(request.images))
                case "result":
                    await self._receive_result(request.result, self._receive_images(request.images))
                    break
                case "fault":
                    await self._receive_fault(request.fault)
                    break
                case other:
                    raise Malformed(f"{other or 'an empty message'} in the middle of an episode")
        await self._pending.put(_END)

    async def _acknowledge(self) -> None:
        """Tell what is on disk; steps that were committed together share one message."""
        pending = await self._pending.get()
        while pending is not _END:
            written, closes = pending
            response = rollout_pb2.StreamEpisodeResponse(acked_steps=await asyncio.shield(written), closed=closes)
            try:
                pending = self._pending.get_nowait()
            except asyncio.QueueEmpty:
                await self._context.write(response)
                pending = await self._pending.get()
            else:
                if pending is _END or not pending[0].done():
                    await self._context.write(response)

    def _receive_images(self, sent: Iterable[common_pb2.Image]) -> list[images.Received]:
        received = [images.Received(images.parse_hash(image.hash), image.data) for image in sent]
        for image in received:
            if len(image.data) > MAX_IMAGE_BYTES:
                raise Malformed(f"a screenshot of {len(image.data)} bytes is over the limit of {MAX_IMAGE_BYTES}")
            self._coordinator.metrics.image_bytes.inc(len(image.data))
        return received

    async def _receive_step(self, step: rollout_pb2.EpisodeStep, received: list[images.Received]) -> None:
        if len(step.payload) > MAX_STEP_BYTES:
            raise Malformed(f"a step of {len(step.payload)} bytes is over the limit of {MAX_STEP_BYTES}")
        try:
            content = decode_step(step.payload, with_ids=False)
        except CodecError as error:
            raise Malformed(f"step {step.index}: {error}") from error
        if content.index != step.index:
            raise Malformed(f"step {step.index} carries the payload of step {content.index}")
        spoken_of = {*step.image_hashes, *content.images, content.screenshot} - {""}
        named = [images.parse_hash(text) for text in sorted(spoken_of)]
        store = self._coordinator.store
        written = store.submit(
            lambda connection: rollouts.add_step(
                connection, store.segments, self._lease_id, step, content.spans, received, named
            )
        )
        self._coordinator.metrics.steps.inc()
        await self._await_commit(asyncio.wrap_future(written), closes=False)

    async def _receive_result(self, result: rollout_pb2.EpisodeResult, received: list[images.Received]) -> None:
        if not math.isfinite(result.reward):
            raise Malformed(f"a reward of {result.reward}")
        if result.termination not in _TERMINATIONS:
            raise Malformed(f"a result with termination {result.termination}, which is none")
        named = [images.parse_hash(result.final_image_hash)] if result.final_image_hash else []
        writing = self._coordinator.finish(self._lease_id, result, received, named)
        await self._await_commit(asyncio.ensure_future(writing), closes=True)

    async def _receive_fault(self, fault: rollout_pb2.EpisodeFault) -> None:
        if fault.kind not in _FAULT_KINDS:
            raise Malformed(f"a fault of kind {fault.kind}, which is none")
        await self._await_commit(asyncio.ensure_future(self._fault(fault)), closes=True)

    async def _fault(self, fault: rollout_pb2.EpisodeFault) -> int:
        await self._coordinator.fault(self._lease_id, fault)
        return 0

    async def _await_commit(self, written: asyncio.Future[int], *, closes: bool) -> None:
        """Queue an acknowledgement. The write goes on should the stream break, and then nobody asks how it went."""
        written.add_done_callback(lambda future: future.cancelled() or future.exception())
        await self._pending.put((written, closes))
