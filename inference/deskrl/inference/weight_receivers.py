"""Weight receivers: receive one update as a stream of bytes, or directly from the learner's GPU.

They implement the states of weights.proto between `ready` and `received`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc

from deskrl.core.weights import gpu_transfer
from deskrl.inference.inference_service import RequestRejected
from deskrl.inference.vllm_engine import VllmEngine
from deskrl.inference.weight_staging import StagingFile, UpdateRejected, mismatched_tensors
from deskrl.proto.v1 import weights_pb2

T = TypeVar("T")
Requests = AsyncIterator[weights_pb2.UpdateWeightsRequest]


class PhaseTimer:
    """Measures the duration of consecutive phases in milliseconds."""

    def __init__(self) -> None:
        self.phases_ms: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def start(self) -> None:
        """Start the first phase, or exclude the time since the last one."""
        self._last_s = time.perf_counter()

    def end(self, phase: str) -> None:
        """End a phase and start the next."""
        now_s = time.perf_counter()
        self.phases_ms[phase] = (now_s - self._last_s) * 1e3
        self._last_s = now_s


class WeightReceiver(Protocol):
    """Receives the weights of one update and loads them into the engine."""

    num_kept: int
    """Number of requests that were running when generation was paused."""
    timer: PhaseTimer

    async def receive(self, requests: Requests) -> None:
        """Receive everything before the commit."""

    async def load(self, commit: weights_pb2.UpdateCommit) -> dict[str, str]:
        """Leave the engine paused with the verified new weights; return the checksums of the tensors by name."""

    @property
    def is_inconsistent(self) -> bool:
        """Whether the weights of the engine are neither the old nor the verified new ones."""

    def close(self) -> None:
        """Release resources after the update has succeeded or failed."""


class StreamReceiver:
    """Receives a stream of chunks, verifies them on arrival, and loads them from memory at the commit."""

    def __init__(self, engine: VllmEngine, begin: weights_pb2.UpdateBegin) -> None:
        self._engine = engine
        self._tensors = begin.tensors
        self._file = StagingFile(begin.tensors)
        self.num_kept = 0
        self.timer = PhaseTimer()
        self.is_inconsistent = False

    async def receive(self, requests: Requests) -> None:
        """Implement `WeightReceiver`.

        Raises:
            UpdateRejected: the bytes differ from the announcement. Raised only after all bytes were received, because
                a sender whose stream ends while it writes sees a broken connection instead of the reason.
        """
        rejection: UpdateRejected | None = None
        num_missing = self._file.num_bytes
        while num_missing > 0:
            chunk = (await next_event(requests, "chunk")).chunk
            num_missing -= len(chunk)
            if rejection is None:
                try:
                    # In a thread, because hashing and copying 1 MiB would block the event loop for a millisecond.
                    await asyncio.to_thread(self._file.write, chunk)
                except UpdateRejected as error:
                    rejection = error
        if rejection is not None:
            raise rejection

    async def load(self, commit: weights_pb2.UpdateCommit) -> dict[str, str]:
        """Implement `WeightReceiver`."""
        self.timer.start()
        self.num_kept = await self._engine.pause()
        self.timer.end("pause")
        self.is_inconsistent = True
        await self._engine.load(self._file.path)
        self.is_inconsistent = False
        self.timer.end("load")
        return {tensor.name: tensor.checksum for tensor in self._tensors}

    def close(self) -> None:
        """Implement `WeightReceiver`."""
        self._file.close()


class DirectReceiver:
    """Loads buckets on arrival, as there is no memory for a second copy, and verifies them at the commit."""

    def __init__(self, engine: VllmEngine, begin: weights_pb2.UpdateBegin) -> None:
        self._engine = engine
        self._tensors = begin.tensors
        self._source: dict[str, Any] = {"bucket_bytes": begin.bucket_bytes}
        if begin.WhichOneof("direct") == "nccl":
            self._source["nccl"] = True
        else:
            self._source["socket_path"] = begin.ipc.socket_path
            if not Path(begin.ipc.socket_path).exists():
                reason = f"ipc: {begin.ipc.socket_path}: not found; learner and replica must share a file system"
                raise RequestRejected(grpc.StatusCode.FAILED_PRECONDITION, reason)
        self._checksums: tuple[int, ...] = ()
        self.num_kept = 0
        self.timer = PhaseTimer()
        self.is_inconsistent = False

    async def receive(self, requests: Requests) -> None:
        """Implement `WeightReceiver`."""
        await next_event(requests, "transfer")
        await run_to_completion(self._transfer())

    async def _transfer(self) -> None:
        self.timer.start()
        self.num_kept = await self._engine.pause()
        self.timer.end("pause")
        self.is_inconsistent = True
        result = await self._engine.receive(self._source, self._tensors)
        self.timer.end("load")
        if not result.error:
            self._checksums = tuple(result.checksums)
            return
        if not result.is_model_modified:
            await self._engine.resume()
            self.is_inconsistent = False
        raise RequestRejected(grpc.StatusCode.ABORTED, f"the weights were not received completely: {result.error}")

    async def load(self, commit: weights_pb2.UpdateCommit) -> dict[str, str]:
        """Implement `WeightReceiver`."""
        names = [tensor.name for tensor in self._tensors]
        if wrong := mismatched_tensors(names, commit.checksums, self._checksums):
            raise UpdateRejected(f"checksums of {len(wrong)} tensors differ: {', '.join(wrong[:3])}")
        self.timer.end("verify")
        self.is_inconsistent = False
        return {name: f"{checksum:x}" for name, checksum in zip(names, self._checksums, strict=True)}

    def close(self) -> None:
        """Implement `WeightReceiver`."""


async def next_event(requests: Requests, expected: str) -> weights_pb2.UpdateWeightsRequest:
    """Return the next request of a stream; raises RequestRejected if it is not the expected event."""
    request: weights_pb2.UpdateWeightsRequest | None = await anext(requests, None)
    if request is None:
        raise RequestRejected(grpc.StatusCode.ABORTED, f"the stream ended before {expected}")
    if (event := request.WhichOneof("event")) != expected:
        raise RequestRejected(grpc.StatusCode.INVALID_ARGUMENT, f"received {event} instead of {expected}")
    return request


async def next_commit(requests: Requests, receiver: WeightReceiver) -> weights_pb2.UpdateCommit:
    """Wait for the commit, without a timeout if the old weights are served until then."""
    timeout_s = gpu_transfer.REPLICA_TIMEOUT_S if receiver.is_inconsistent else None
    try:
        async with asyncio.timeout(timeout_s):
            return (await next_event(requests, "commit")).commit
    except TimeoutError as error:
        raise RequestRejected(grpc.StatusCode.ABORTED, f"no commit within {timeout_s:.0f} s") from error


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` until its end even if the caller is cancelled, so that no update is left half-finished."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
