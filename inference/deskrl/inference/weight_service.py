"""Weight service: implements `UpdateWeights` and `GetWeightStatus` of weights.proto, one update at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import grpc
import grpc.aio

from deskrl.core.rpc import protocol_mismatch
from deskrl.core.weights.gpu_transfer import host_id
from deskrl.inference import metrics
from deskrl.inference.engine_prompt import EnginePrompt
from deskrl.inference.inference_service import Context, PromptBuilder, RequestRejected
from deskrl.inference.served_version import ServedVersion
from deskrl.inference.vllm_engine import EngineDead, VllmEngine
from deskrl.inference.weight_receivers import (
    DirectReceiver,
    Requests,
    StreamReceiver,
    WeightReceiver,
    next_commit,
    next_event,
    run_to_completion,
)
from deskrl.inference.weight_staging import UpdateRejected, check_announcement, vision_changed
from deskrl.proto.v1 import weights_pb2, weights_pb2_grpc

_log = logging.getLogger(__name__)


class WeightServicer(weights_pb2_grpc.WeightServiceServicer):
    """Updates the weights of one engine."""

    def __init__(
        self,
        engine: VllmEngine,
        prompt_builder: PromptBuilder,
        shapes: Mapping[str, tuple[int, ...]],
        processor_hash: str,
        gpu_uuids: Sequence[str],
        on_engine_death: Callable[[], None],
    ) -> None:
        """Create the service.

        Args:
            engine: engine whose weights are updated.
            prompt_builder: builds the prompt of the canary.
            shapes: shapes of the model's tensors by name; an update must contain exactly these.
            processor_hash: hash of the replica's processor; updates with another one are rejected.
            gpu_uuids: UUIDs of the workers' GPUs; empty on a CPU.
            on_engine_death: called if an update fails while the engine changes its weights, which are then unknown.
        """
        self._engine = engine
        self._prompt_builder = prompt_builder
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
        """Receive one update and commit it; see weights.proto."""
        try:
            begin = await self._receive_begin(requests)
            async with self._updating:
                async for response in self._update(begin, requests):
                    yield response
        except UpdateRejected as rejection:
            await _abort(context, grpc.StatusCode.DATA_LOSS, rejection)
        except RequestRejected as rejection:
            await _abort(context, rejection.code, rejection)
        except EngineDead as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    async def _update(
        self, begin: weights_pb2.UpdateBegin, requests: Requests
    ) -> AsyncIterator[weights_pb2.UpdateWeightsResponse]:
        canary = await self._canary_prompt(begin.canary)
        with contextlib.closing(await self._open_receiver(begin)) as receiver:
            committed = None
            try:
                yield weights_pb2.UpdateWeightsResponse(ready=weights_pb2.UpdateReady())
                started_s = time.perf_counter()
                await receiver.receive(requests)
                receive_ms = (time.perf_counter() - started_s) * 1e3
                yield weights_pb2.UpdateWeightsResponse(received=weights_pb2.UpdateReceived(receive_ms=receive_ms))
                commit = await next_commit(requests, receiver)
                committed = await run_to_completion(self._commit(begin, receiver, commit, canary))
            finally:
                if committed is None:
                    self._communicator_id = b""  # it may have been aborted, so the next update needs a new one
                if receiver.is_inconsistent:
                    metrics.UPDATES.labels("failed").inc()
                    _log.error("a weight update failed while the weights were changed; the replica terminates")
                    self._on_engine_death()
        yield weights_pb2.UpdateWeightsResponse(committed=committed)

    async def _open_receiver(self, begin: weights_pb2.UpdateBegin) -> WeightReceiver:
        """Return the receiver for the kind of transfer that the learner has chosen."""
        kind = begin.WhichOneof("direct")
        if kind is None:
            return StreamReceiver(self._engine, begin)
        if not self._gpu_uuids:
            raise RequestRejected(grpc.StatusCode.FAILED_PRECONDITION, f"{kind}: this replica has no GPU")
        if kind == "nccl" and begin.nccl.communicator_id != self._communicator_id:
            self._communicator_id = begin.nccl.communicator_id
            await self._engine.join(self._communicator_id)
        return DirectReceiver(self._engine, begin)

    async def _receive_begin(self, requests: Requests) -> weights_pb2.UpdateBegin:
        begin = (await next_event(requests, "begin")).begin
        if (mismatch := protocol_mismatch(begin.peer)) is not None:
            raise RequestRejected(grpc.StatusCode.FAILED_PRECONDITION, mismatch)
        if self._updating.locked():
            raise RequestRejected(grpc.StatusCode.FAILED_PRECONDITION, "another update is in progress")
        if begin.model_fingerprint not in ("", self._processor_hash):
            raise RequestRejected(grpc.StatusCode.FAILED_PRECONDITION, "learner and replica use different processors")
        try:
            check_announcement(begin.tensors, self._shapes)
        except UpdateRejected as error:
            raise RequestRejected(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        return begin

    async def _canary_prompt(self, canary: weights_pb2.Canary) -> tuple[EnginePrompt, list[int]] | None:
        if not canary.continuation_ids:
            return None
        continuation_ids = list(canary.continuation_ids)
        prompt = await self._prompt_builder.build(canary.messages, canary.images, len(continuation_ids) + 1)
        if isinstance(prompt, list):
            raise RequestRejected(grpc.StatusCode.INVALID_ARGUMENT, f"screenshots of the canary are missing: {prompt}")
        return prompt, continuation_ids

    async def _commit(
        self,
        begin: weights_pb2.UpdateBegin,
        receiver: WeightReceiver,
        commit: weights_pb2.UpdateCommit,
        canary: tuple[EnginePrompt, list[int]] | None,
    ) -> weights_pb2.UpdateCommitted:
        """Serve the new weights. If that fails after they were loaded, the replica terminates."""
        version = ServedVersion.from_message(begin.version)
        checksums = await receiver.load(commit)
        timer = receiver.timer
        try:
            await self._engine.set_version(version)
            await self._engine.clear_caches(vision_changed=vision_changed(self._checksums, checksums))
            timer.end("clear_caches")
            await self._engine.resume()
            timer.end("resume")
            logprobs = [] if canary is None else await self._engine.score(*canary, name="canary")
            timer.end("canary")
        except Exception:
            metrics.UPDATES.labels("failed").inc()
            _log.exception("the weight update to %s failed after the weights were loaded", version)
            self._on_engine_death()
            raise
        self._checksums = checksums
        self._num_updates += 1
        _observe_commit(version, receiver)
        return weights_pb2.UpdateCommitted(
            version=begin.version,
            canary_logprobs=logprobs,
            phases_ms=timer.phases_ms,
            num_requests_kept=receiver.num_kept,
        )

    async def GetWeightStatus(
        self, request: weights_pb2.GetWeightStatusRequest, context: Context
    ) -> weights_pb2.GetWeightStatusResponse:
        """Return the served version and the state of updates; see weights.proto."""
        if (mismatch := protocol_mismatch(request.peer)) is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, mismatch)
        return weights_pb2.GetWeightStatusResponse(
            version=self._engine.version.to_message(),
            state="updating" if self._updating.locked() else "serving",
            num_updates=self._num_updates,
            host=host_id(),
            gpu_uuids=self._gpu_uuids,
            communicator_id=self._communicator_id,
        )


def _observe_commit(version: ServedVersion, receiver: WeightReceiver) -> None:
    """Record the metrics of a committed update and log it."""
    metrics.UPDATES.labels("committed").inc()
    metrics.POLICY_STEP.set(version.step)
    phases_ms = receiver.timer.phases_ms
    for phase, phase_ms in phases_ms.items():
        metrics.UPDATE_SECONDS.labels(phase).observe(phase_ms / 1e3)
    _log.info("serving %s after %.0f ms, retained %d requests", version, sum(phases_ms.values()), receiver.num_kept)


async def _abort(context: Context, code: grpc.StatusCode, rejection: Exception) -> None:
    metrics.UPDATES.labels("refused").inc()
    _log.warning("weight update rejected: %s", rejection)
    await context.abort(code, str(rejection))
