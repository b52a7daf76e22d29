"""The two ways in which an update's weights arrive: as a stream of bytes, or directly from the learner's GPU.

Knows the events of weights.proto from `ready` to `received`, and what each way leaves behind when it ends half-way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc

from deskrl.core.weights import direct
from deskrl.inference.acting import RequestRefused
from deskrl.inference.engine import Engine
from deskrl.inference.weights import UpdateRefused, WeightFile, differing
from deskrl.proto.v1 import weights_pb2

T = TypeVar("T")
Requests = AsyncIterator[weights_pb2.UpdateWeightsRequest]


class PhaseClock:
    """Milliseconds between calls of `end`, by the phase that ended."""

    def __init__(self) -> None:
        self.phases_ms: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def start(self) -> None:
        """What came before belongs to no phase."""
        self._last_s = time.perf_counter()

    def end(self, phase: str) -> None:
        """A phase has ended, and the next begins."""
        now_s = time.perf_counter()
        self.phases_ms[phase] = (now_s - self._last_s) * 1e3
        self._last_s = now_s


class Arrival(Protocol):
    """One update's weights on their way into the engine."""

    num_kept: int
    """Requests that were under way when generation stopped."""
    clock: PhaseClock

    async def receive(self, requests: Requests) -> None:
        """Take all that comes before the commit."""

    async def load(self, commit: weights_pb2.UpdateCommit) -> dict[str, str]:
        """Leave the engine paused with the new weights, proven; their checksums by name."""

    @property
    def is_half_way(self) -> bool:
        """Whether the engine's weights are neither the old ones nor the new."""

    def close(self) -> None:
        """The update is over, well or not."""


class StreamArrival:
    """Bytes in chunks, checked as they come, and loaded from memory at the commit."""

    def __init__(self, engine: Engine, begin: weights_pb2.UpdateBegin) -> None:
        self._engine = engine
        self._tensors = begin.tensors
        self._file = WeightFile(begin.tensors)
        self.num_kept = 0
        self.clock = PhaseClock()
        self.is_half_way = False

    async def receive(self, requests: Requests) -> None:
        """See `Arrival`.

        Raises:
            UpdateRefused: what came is not what was announced. Raised only once all has come: a sender whose stream
                ends while it writes is told of a broken connection instead of the reason.
        """
        refusal: UpdateRefused | None = None
        num_missing = self._file.num_bytes
        while num_missing > 0:
            chunk = (await next_event(requests, "chunk")).chunk
            num_missing -= len(chunk)
            if refusal is None:
                try:
                    # Hashing and copying a mebibyte takes a millisecond, which belongs to requests for actions.
                    await asyncio.to_thread(self._file.write, chunk)
                except UpdateRefused as error:
                    refusal = error
        if refusal is not None:
            raise refusal

    async def load(self, commit: weights_pb2.UpdateCommit) -> dict[str, str]:
        """See `Arrival`."""
        self.clock.start()
        self.num_kept = await self._engine.pause()
        self.clock.end("pause")
        self.is_half_way = True
        await self._engine.load(self._file.path)
        self.is_half_way = False
        self.clock.end("load")
        return {tensor.name: tensor.checksum for tensor in self._tensors}

    def close(self) -> None:
        """See `Arrival`."""
        self._file.close()


class DirectArrival:
    """Buckets that are loaded as they come, there being no room for a second copy, and proven at the commit."""

    def __init__(self, engine: Engine, begin: weights_pb2.UpdateBegin) -> None:
        self._engine = engine
        self._tensors = begin.tensors
        self._source: dict[str, Any] = {"bucket_bytes": begin.bucket_bytes}
        if begin.WhichOneof("direct") == "nccl":
            self._source["nccl"] = True
        else:
            self._source["socket_path"] = begin.ipc.socket_path
            if not Path(begin.ipc.socket_path).exists():
                reason = f"ipc: there is no {begin.ipc.socket_path} here; learner and replica must share their files"
                raise RequestRefused(grpc.StatusCode.FAILED_PRECONDITION, reason)
        self._checksums: tuple[int, ...] = ()
        self.num_kept = 0
        self.clock = PhaseClock()
        self.is_half_way = False

    async def receive(self, requests: Requests) -> None:
        """See `Arrival`."""
        await next_event(requests, "transfer")
        await carried_through(self._take())

    async def _take(self) -> None:
        self.clock.start()
        self.num_kept = await self._engine.pause()
        self.clock.end("pause")
        self.is_half_way = True
        received = await self._engine.receive(self._source, self._tensors)
        self.clock.end("load")
        if not received.error:
            self._checksums = tuple(received.checksums)
            return
        if not received.touched:
            await self._engine.resume()
            self.is_half_way = False
        raise RequestRefused(grpc.StatusCode.ABORTED, f"the weights did not all come: {received.error}")

    async def load(self, commit: weights_pb2.UpdateCommit) -> dict[str, str]:
        """See `Arrival`."""
        if wrong := differing([tensor.name for tensor in self._tensors], commit.checksums, self._checksums):
            raise UpdateRefused(f"checksums differ of {len(wrong)} tensors: {', '.join(wrong[:3])}")
        self.clock.end("verify")
        self.is_half_way = False
        names = (tensor.name for tensor in self._tensors)
        return {name: f"{checksum:x}" for name, checksum in zip(names, self._checksums, strict=True)}

    def close(self) -> None:
        """See `Arrival`."""


async def next_event(requests: Requests, expected: str) -> weights_pb2.UpdateWeightsRequest:
    """The next request of a stream; anything but the expected event ends the update."""
    request: weights_pb2.UpdateWeightsRequest | None = await anext(requests, None)
    if request is None:
        raise RequestRefused(grpc.StatusCode.ABORTED, f"the stream ended before {expected}")
    if (event := request.WhichOneof("event")) != expected:
        raise RequestRefused(grpc.StatusCode.INVALID_ARGUMENT, f"{event} where {expected} was due")
    return request


async def next_commit(requests: Requests, arrival: Arrival) -> weights_pb2.UpdateCommit:
    """The commit; without a bound only where the old weights go on serving until it comes."""
    patience_s = direct.REPLICA_PATIENCE_S if arrival.is_half_way else None
    try:
        async with asyncio.timeout(patience_s):
            return (await next_event(requests, "commit")).commit
    except TimeoutError as error:
        raise RequestRefused(grpc.StatusCode.ABORTED, f"no commit within {patience_s:.0f} s") from error


async def carried_through(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even if the caller is cancelled: the learner may be gone, but a swap has no half-way."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
