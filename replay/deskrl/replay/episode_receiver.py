"""Receiver of one StreamEpisode call: checks messages, queues them for the writer, acknowledges them once on disk.

It implements the server side of the state machine in rollout.proto. Receiving and acknowledging run concurrently, so
that the next step is transferred while the last one is committed. A bounded queue between them applies back-pressure.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from typing import Any

from deskrl.core.step_codec import MAX_STEP_BYTES, CodecError, decode_step
from deskrl.proto.v1 import common_pb2, rollout_pb2
from deskrl.replay import image_index, rollouts
from deskrl.replay.coordinator import Coordinator
from deskrl.replay.status_errors import InvalidRequestError

MAX_IMAGE_BYTES = 16 * 1024**2
MAX_STEPS_IN_FLIGHT = 16
_MAX_FAULT_CHARACTERS = 10_000

_TERMINATIONS = frozenset(rollout_pb2.Termination.values()) - {rollout_pb2.TERMINATION_UNSPECIFIED}
_FAULT_KINDS = frozenset(rollout_pb2.FaultKind.values()) - {rollout_pb2.FAULT_KIND_UNSPECIFIED}
_END = None
_Ack = tuple["asyncio.Future[int]", bool]


class EpisodeReceiver:
    """Receives one episode under one lease."""

    def __init__(self, coordinator: Coordinator, begin: rollout_pb2.EpisodeBegin, context: Any) -> None:
        self._coordinator = coordinator
        self._lease_id = begin.lease_id
        self._episode_id = begin.episode_id
        self._context = context
        self._pending: asyncio.Queue[_Ack | None] = asyncio.Queue(MAX_STEPS_IN_FLIGHT)

    async def run(self, requests: AsyncIterator[rollout_pb2.StreamEpisodeRequest]) -> None:
        """Serve the stream until it ends.

        Raises:
            LeaseNotFoundError: the lease has been lost.
            InvalidRequestError: a message violates the protocol.
        """
        lease = await self._coordinator.store.read(
            lambda connection: rollouts.get_lease(connection, self._lease_id, self._episode_id)
        )
        if lease.num_steps:  # a reopened stream: report where it resumes
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
                    raise InvalidRequestError(f"unexpected {other or 'empty message'} within an episode")
        await self._pending.put(_END)

    async def _acknowledge(self) -> None:
        """Send acknowledgements; steps committed together share one message."""
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

    def _receive_images(self, sent: Iterable[common_pb2.Image]) -> list[image_index.ReceivedImage]:
        received = [image_index.ReceivedImage(image_index.parse_hash(image.hash), image.data) for image in sent]
        for image in received:
            if len(image.data) > MAX_IMAGE_BYTES:
                raise InvalidRequestError(
                    f"a screenshot has {len(image.data)} bytes, over the limit of {MAX_IMAGE_BYTES}"
                )
            self._coordinator.metrics.image_bytes.inc(len(image.data))
        return received

    async def _receive_step(self, step: rollout_pb2.EpisodeStep, received: list[image_index.ReceivedImage]) -> None:
        if len(step.payload) > MAX_STEP_BYTES:
            raise InvalidRequestError(
                f"step {step.index} has {len(step.payload)} bytes, over the limit of {MAX_STEP_BYTES}"
            )
        try:
            content = decode_step(step.payload, with_ids=False)
        except CodecError as error:
            raise InvalidRequestError(f"step {step.index}: {error}") from error
        if content.index != step.index:
            raise InvalidRequestError(f"step {step.index} has the payload of step {content.index}")
        all_names = {*step.image_hashes, *content.images, content.screenshot} - {""}
        named = [image_index.parse_hash(text) for text in sorted(all_names)]
        store = self._coordinator.store
        written = store.submit(
            lambda connection: rollouts.add_step(
                connection, store.blob_log, self._lease_id, step, content.spans, received, named
            )
        )
        self._coordinator.metrics.steps.inc()
        await self._await_commit(asyncio.wrap_future(written), closes=False)

    async def _receive_result(
        self, result: rollout_pb2.EpisodeResult, received: list[image_index.ReceivedImage]
    ) -> None:
        if not math.isfinite(result.reward):
            raise InvalidRequestError(f"the reward must be finite, not {result.reward}")
        if result.termination not in _TERMINATIONS:
            raise InvalidRequestError(f"unknown termination {result.termination} in a result")
        named = [image_index.parse_hash(result.final_image_hash)] if result.final_image_hash else []
        writing = self._coordinator.finish(self._lease_id, result, received, named)
        await self._await_commit(asyncio.ensure_future(writing), closes=True)

    async def _receive_fault(self, fault: rollout_pb2.EpisodeFault) -> None:
        if fault.kind not in _FAULT_KINDS:
            raise InvalidRequestError(f"unknown fault kind {fault.kind}")
        fault.message = fault.message[:_MAX_FAULT_CHARACTERS]
        await self._await_commit(asyncio.ensure_future(self._fault(fault)), closes=True)

    async def _fault(self, fault: rollout_pb2.EpisodeFault) -> int:
        await self._coordinator.fault(self._lease_id, fault)
        return 0

    async def _await_commit(self, written: asyncio.Future[int], *, closes: bool) -> None:
        """Queue an acknowledgement. If the stream breaks, the write continues and its error is ignored."""
        written.add_done_callback(lambda future: future.cancelled() or future.exception())
        await self._pending.put((written, closes))
