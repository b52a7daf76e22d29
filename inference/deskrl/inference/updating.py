"""`UpdateWeights` and `GetWeightStatus`: the state machine of weights.proto, one update at a time.

Knows the stream and the order of things; how weights come is `arrivals`' business, the swap itself the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import grpc
import grpc.aio

from deskrl.core.rpc import protocol_refusal
from deskrl.core.weights.direct import host_name
from deskrl.inference import metrics
from deskrl.inference.acting import Context, Prompter, RequestRefused
from deskrl.inference.arrivals import (
    Arrival,
    DirectArrival,
    Requests,
    StreamArrival,
    carried_through,
    next_commit,
    next_event,
)
from deskrl.inference.engine import Engine, EngineDead
from deskrl.inference.engine_input import Prompt
from deskrl.inference.versions import Version
from deskrl.inference.weights import UpdateRefused, check_announcement, vision_changed
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
        gpu_uuids: Sequence[str],
        on_engine_death: Callable[[], None],
    ) -> None:
        """Serve updates.

        Args:
            engine: whose weights are replaced.
            prompter: makes the canary's prompt.
            shapes: names and shapes of the model's tensors; an update brings exactly these.
            processor_hash: an update that names another one is refused.
            gpu_uuids: of the engine's workers; none without GPUs.
            on_engine_death: called when a swap failed half-way, so that no weights are known to be in place.
        """
        self._engine = engine
        self._prompter = prompter
        self._shapes = shapes
        self._processor_hash = processor_hash
        self._gpu_uuids = gpu_uuids
        self._on_engine_death = on_engine_death
        self._updating = asyncio.Lock()
        self._num_updates = 0
        self._checksums: dict[str, str] | None = None
        self._communicator_id = b""

    async def UpdateWeights(
        self, requests: Requests, context: Context
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
        self, begin: weights_pb2.UpdateBegin, requests: Requests
    ) -> AsyncIterator[weights_pb2.UpdateWeightsResponse]:
        canary = await self._canary_prompt(begin.canary)
        with contextlib.closing(await self._arrival(begin)) as arrival:
            committed = None
            try:
                yield weights_pb2.UpdateWeightsResponse(ready=weights_pb2.UpdateReady())
                started = time.perf_counter()
                await arrival.receive(requests)
                receive_ms = (time.perf_counter() - started) * 1e3
                yield weights_pb2.UpdateWeightsResponse(received=weights_pb2.UpdateReceived(receive_ms=receive_ms))
                commit = await next_commit(requests, arrival)
                committed = await carried_through(self._commit(begin, arrival, commit, canary))
            finally:
                if committed is None:
                    self._communicator_id = b""  # whatever is left of it, the next update needs another
                if arrival.is_half_way:
                    metrics.UPDATES.labels("failed").inc()
                    _LOG.error("an update ended half-way: no weights are known to be in place")
                    self._on_engine_death()
        yield weights_pb2.UpdateWeightsResponse(committed=committed)

    async def _arrival(self, begin: weights_pb2.UpdateBegin) -> Arrival:
        """The way in which the weights come, made ready."""
        how = begin.WhichOneof("direct")
        if how is None:
            return StreamArrival(self._engine, begin)
        if not self._gpu_uuids:
            raise RequestRefused(grpc.StatusCode.FAILED_PRECONDITION, f"{how}: this replica has no GPU")
        if how == "nccl" and begin.nccl.communicator_id != self._communicator_id:
            self._communicator_id = begin.nccl.communicator_id
            await self._engine.join(self._communicator_id)
        return DirectArrival(self._engine, begin)

    async def _begin(self, requests: Requests) -> weights_pb2.UpdateBegin:
        begin = (await next_event(requests, "begin")).begin
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
        self,
        begin: weights_pb2.UpdateBegin,
        arrival: Arrival,
        commit: weights_pb2.UpdateCommit,
        canary: tuple[Prompt, list[int]] | None,
    ) -> weights_pb2.UpdateCommitted:
        """Serve the new weights. A failure once they are loaded leaves no engine to rely on: the replica ends."""
        version = Version.from_message(begin.version)
        checksums = await arrival.load(commit)
        clock = arrival.clock
        try:
            await self._engine.set_version(version)
            await self._engine.clear_caches(vision_changed=vision_changed(self._checksums, checksums))
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
        self._checksums = checksums
        self._num_updates += 1
        metrics.UPDATES.labels("committed").inc()
        metrics.POLICY_STEP.set(version.step)
        for phase, phase_ms in clock.phases_ms.items():
            metrics.UPDATE_SECONDS.labels(phase).observe(phase_ms / 1e3)
        _LOG.info(
            "serving %s after %.0f ms, %d requests kept", version, sum(clock.phases_ms.values()), arrival.num_kept
        )
        return weights_pb2.UpdateCommitted(
            version=begin.version,
            canary_logprobs=logprobs,
            phases_ms=clock.phases_ms,
            num_requests_kept=arrival.num_kept,
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
            host=host_name(),
            gpu_uuids=self._gpu_uuids,
            communicator_id=self._communicator_id,
        )
