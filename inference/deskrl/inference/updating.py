"""`UpdateWeights` and `GetWeightStatus`: the state machine of weights.proto, one update at a time.

Knows the stream and the order of things; the bytes are `weights`' business, the swap itself the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import grpc
import grpc.aio

from deskrl.core.rpc import protocol_refusal
from deskrl.inference import metrics
from deskrl.inference.acting import Context, Prompter, RequestRefused
from deskrl.inference.engine import Engine, EngineDead, Prompt
from deskrl.inference.versions import Version
from deskrl.inference.weights import UpdateRefused, WeightFile, check_announcement, vision_changed
from deskrl.proto.v1 import weights_pb2, weights_pb2_grpc

_LOG = logging.getLogger(__name__)


class WeightServicer(weights_pb2_grpc.WeightServiceServicer):
    """Brings new weights into one engine."""

    def __init__(
        self,
        engine: Engine,
        prompter: Prompter,
        shapes: Mapping[str, tuple[int, ...]],
        processor_hash: str,
        on_engine_death: Callable[[], None],
    ) -> None:
        """Serve updates.

        Args:
            engine: whose weights are replaced.
            prompter: makes the canary's prompt.
            shapes: names and shapes of the model's tensors; an update brings exactly these.
            processor_hash: an update that names another one is refused.
            on_engine_death: called when a swap failed half-way, so that no weights are known to be in place.
        """
        self._engine = engine
        self._prompter = prompter
        self._shapes = shapes
        self._processor_hash = processor_hash
        self._on_engine_death = on_engine_death
        self._updating = asyncio.Lock()
        self._num_updates = 0
        self._checksums: dict[str, str] | None = None

    async def UpdateWeights(
        self, requests: AsyncIterator[weights_pb2.UpdateWeightsRequest], context: Context
    ) -> AsyncIterator[weights_pb2.UpdateWeightsResponse]:
        """Carry one update; see weights.proto."""
        try:
            begin = await self._begin(requests)
            async with self._updating:
                async for response in self._update(begin, requests):
                    yield response
        except UpdateRefused as error:
            metrics.UPDATES.labels("refused").inc()
            _LOG.warning("weight update refused: %s", error)
            await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
        except RequestRefused as refusal:
            metrics.UPDATES.labels("refused").inc()
            _LOG.warning("weight update refused: %s", refusal)
            await context.abort(refusal.code, str(refusal))
        except EngineDead as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    async def _update(
        self, begin: weights_pb2.UpdateBegin, requests: AsyncIterator[weights_pb2.UpdateWeightsRequest]
    ) -> AsyncIterator[weights_pb2.UpdateWeightsResponse]:
        canary = await self._canary_prompt(begin.canary)
        yield weights_pb2.UpdateWeightsResponse(ready=weights_pb2.UpdateReady())
        started = time.perf_counter()
        with contextlib.closing(WeightFile(begin.tensors)) as file:
            await _receive(requests, file)
            receive_ms = (time.perf_counter() - started) * 1e3
            yield weights_pb2.UpdateWeightsResponse(received=weights_pb2.UpdateReceived(receive_ms=receive_ms))
            await _next(requests, "commit")
            committed = await _carried_through(self._commit(begin, file, canary))
        yield weights_pb2.UpdateWeightsResponse(committed=committed)

    async def _begin(self, requests: AsyncIterator[weights_pb2.UpdateWeightsRequest]) -> weights_pb2.UpdateBegin:
        begin = (await _next(requests, "begin")).begin
        if (refusal := protocol_refusal(begin.peer)) is not None:
            raise RequestRefused(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        if self._updating.locked():
            raise RequestRefused(grpc.StatusCode.FAILED_PRECONDITION, "another update is under way")
        if begin.model_fingerprint not in ("", self._processor_hash):
            raise RequestRefused(grpc.StatusCode.FAILED_PRECONDITION, "the learner's processor is another one")
        try:
            check_announcement(begin.tensors, self._shapes)
        except UpdateRefused as error:
            raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        return begin

    async def _canary_prompt(self, canary: weights_pb2.Canary) -> tuple[Prompt, list[int]] | None:
        if not canary.continuation_ids:
            return None
        continuation = list(canary.continuation_ids)
        prompt = await self._prompter.prompt(canary.messages, canary.images, len(continuation) + 1)
        if isinstance(prompt, list):
            raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, f"the canary lacks its screenshots {prompt}")
        return prompt, continuation

    async def _commit(
        self, begin: weights_pb2.UpdateBegin, file: WeightFile, canary: tuple[Prompt, list[int]] | None
    ) -> weights_pb2.UpdateCommitted:
        """Swap the weights. A failure in here leaves none that are known to be whole: the replica ends."""
        version = Version.from_message(begin.version)
        clock = _PhaseClock()
        try:
            num_kept = await self._engine.pause()
            clock.end("pause")
            await self._engine.load(file.path, version)
            clock.end("load")
            await self._engine.clear_caches(vision_changed=vision_changed(self._checksums, begin.tensors))
            clock.end("clear_caches")
            await self._engine.resume()
            clock.end("resume")
            logprobs = [] if canary is None else await self._engine.score(*canary, name="canary")
            clock.end("canary")
        except Exception:
            metrics.UPDATES.labels("failed").inc()
            _LOG.exception("weight update to %s failed half-way", version)
            self._on_engine_death()
            raise
        self._checksums = {tensor.name: tensor.checksum for tensor in begin.tensors}
        self._num_updates += 1
        metrics.UPDATES.labels("committed").inc()
        metrics.POLICY_STEP.set(version.step)
        for phase, phase_ms in clock.phases_ms.items():
            metrics.UPDATE_SECONDS.labels(phase).observe(phase_ms / 1e3)
        _LOG.info("serving %s after %.0f ms, %d requests kept", version, sum(clock.phases_ms.values()), num_kept)
        return weights_pb2.UpdateCommitted(
            version=begin.version,
            canary_logprobs=logprobs,
            phases_ms=clock.phases_ms,
            num_requests_kept=num_kept,
        )

    async def GetWeightStatus(
        self, request: weights_pb2.GetWeightStatusRequest, context: Context
    ) -> weights_pb2.GetWeightStatusResponse:
        """Say which weights are served."""
        if (refusal := protocol_refusal(request.peer)) is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        return weights_pb2.GetWeightStatusResponse(
            version=self._engine.version.to_message(),
            state="updating" if self._updating.locked() else "serving",
            num_updates=self._num_updates,
        )


async def _carried_through(work: Coroutine[Any, Any, weights_pb2.UpdateCommitted]) -> weights_pb2.UpdateCommitted:
    """Await `work` to its end even if the caller is cancelled: the learner may be gone, but a swap has no half-way."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class _PhaseClock:
    """Milliseconds between calls of `end`, by the phase that ended."""

    def __init__(self) -> None:
        self.phases_ms: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def end(self, phase: str) -> None:
        now_s = time.perf_counter()
        self.phases_ms[phase] = (now_s - self._last_s) * 1e3
        self._last_s = now_s


async def _receive(requests: AsyncIterator[weights_pb2.UpdateWeightsRequest], file: WeightFile) -> None:
    """Take all bytes of an update.

    Raises:
        UpdateRefused: what came is not what was announced. Raised only once all has come: a sender whose stream ends
            while it writes is told of a broken connection instead of the reason.
    """
    refusal: UpdateRefused | None = None
    num_missing = file.num_bytes
    while num_missing > 0:
        chunk = (await _next(requests, "chunk")).chunk
        num_missing -= len(chunk)
        if refusal is None:
            try:
                # Hashing and copying a mebibyte takes a millisecond, which belongs to requests for actions.
                await asyncio.to_thread(file.write, chunk)
            except UpdateRefused as error:
                refusal = error
    if refusal is not None:
        raise refusal


async def _next(requests: AsyncIterator[Any], expected: str) -> weights_pb2.UpdateWeightsRequest:
    """The next request of a stream; anything but the expected event ends the update."""
    request: weights_pb2.UpdateWeightsRequest | None = await anext(requests, None)
    if request is None:
        raise RequestRefused(grpc.StatusCode.ABORTED, f"the stream ended before {expected}")
    if (event := request.WhichOneof("event")) != expected:
        raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, f"{event} where {expected} was due")
    return request
