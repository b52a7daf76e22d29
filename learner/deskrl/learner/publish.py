"""Weights to replicas, proven: checksums on arrival, and a canary's logprobs against the learner's own forward pass.

A replica that fails or stalls is quarantined: the run goes on with the others, and a thread of its own brings it up to
the newest weights as soon as it answers again. Knows the stream of weights.proto; knows nothing of training.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import grpc
import torch
from torch import Tensor

from deskrl.core import rpc
from deskrl.core.lifetime import StopEvent
from deskrl.learner import stopping
from deskrl.proto.v1 import common_pb2, weights_pb2, weights_pb2_grpc

TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_BFLOAT16 = 0.3
"""Largest difference of a canary's logprob between a replica and the learner: two implementations, one arithmetic."""
START_TIMEOUT_S = 900.0
"""How long the first publication waits for replicas to come up."""
STALL_S = 120.0
"""An update that takes longer than this and a second for each `BYTES_PER_S` has stalled."""
BYTES_PER_S = 50 * 1024**2
RECOVERY_S = 300.0
"""How long an update waits for a replica to come back when none could be reached."""
RETRY_S = 2.0
_POLL_S = 0.2

_PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
"""What a replica that was killed and is restarted answers; anything else it would answer again."""

_log = logging.getLogger("deskrl.learner")


@dataclass(frozen=True)
class Snapshot:
    """Weights as they are published."""

    version: common_pb2.PolicyVersion
    tensors: Mapping[str, Tensor]
    specs: tuple[weights_pb2.TensorSpec, ...]
    canary: weights_pb2.Canary
    canary_logprobs: tuple[float, ...]
    """Of the learner's own forward pass."""
    processor_hash: str

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(spec.num_bytes for spec in self.specs)


@dataclass(frozen=True)
class Outcome:
    """What became of one update of one replica."""

    replica: int
    version: common_pb2.PolicyVersion
    ok: bool
    error: str = ""
    canary_max_difference: float | None = None
    receive_ms: float = 0.0
    total_ms: float = 0.0
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    num_requests_kept: int = 0
    late: bool = False
    """Brought by the catching-up thread."""
    may_recover: bool = False
    """It failed because the replica could not be reached."""


def describe(tensors: Mapping[str, Tensor]) -> tuple[weights_pb2.TensorSpec, ...]:
    """Names, types, shapes and checksums."""
    return tuple(
        weights_pb2.TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            checksum=hashlib.sha256(_bytes_of(tensor)).hexdigest(),
            num_bytes=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    )


class Publisher:
    """Publishes to all replicas of a run.

    Args:
        addresses: of the replicas.
        tolerance: for the canary.
        stop: ends waits.
        on_outcome: told of every update of every replica, from several threads.
    """

    def __init__(
        self, addresses: Sequence[str], tolerance: float, stop: StopEvent, on_outcome: Callable[[Outcome], None]
    ) -> None:
        self._replicas = [_Replica(index, address, tolerance, stop) for index, address in enumerate(addresses)]
        self._stop = stop
        self._on_outcome = on_outcome
        self._pool = ThreadPoolExecutor(len(addresses), thread_name_prefix="publish")
        self._newest: Snapshot | None = None
        self._lock = threading.Lock()
        self._catching_up: set[int] = set()

    def wait_for_replicas(self) -> None:
        """Wait until every replica answers; after `START_TIMEOUT_S` until one does.

        Raises:
            UserError: a replica and this process do not trust each other.
            RuntimeError: none has come up in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            stopping.check(self._stop)
            num_healthy = sum(rpc.check_health(replica.address) for replica in self._replicas)
            if num_healthy == len(self._replicas) or (num_healthy and time.monotonic() > deadline):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"no inference replica has come up in {START_TIMEOUT_S:.0f} s")
            self._stop.wait(_POLL_S)

    def publish(self, snapshot: Snapshot) -> None:
        """Bring the snapshot to every replica that is not catching up already; return when each has it or has failed.

        Where every replica is away, this waits until one is back with the snapshot.

        Raises:
            RuntimeError: no replica serves it.
        """
        with self._lock:
            self._newest = snapshot
            current = [replica for replica in self._replicas if replica.index not in self._catching_up]
        pending = [self._pool.submit(replica.update, snapshot) for replica in current]
        while wait(pending, timeout=_POLL_S).not_done:
            stopping.check(self._stop)
        outcomes = [future.result() for future in pending]
        for replica, outcome in zip(current, outcomes, strict=True):
            self._on_outcome(outcome)
            if not outcome.ok:
                self._quarantine(replica, outcome)
        if any(outcome.ok for outcome in outcomes):
            return
        if all(outcome.may_recover for outcome in outcomes) and self._one_recovers():
            return
        reasons = "; ".join(f"replica {outcome.replica}: {outcome.error}" for outcome in outcomes)
        raise RuntimeError(f"no inference replica took version {snapshot.version.step}: {reasons or 'all are late'}")

    def num_quarantined(self) -> int:
        """Replicas that do not serve the newest weights."""
        with self._lock:
            return len(self._catching_up)

    def close(self) -> None:
        """End all connections; streams under way break off, and the replicas keep what they have."""
        for replica in self._replicas:
            replica.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _one_recovers(self) -> bool:
        """Whether a catching-up thread brings the newest snapshot to a replica in time."""
        deadline = time.monotonic() + RECOVERY_S
        while self.num_quarantined() == len(self._replicas):
            stopping.check(self._stop)
            if time.monotonic() > deadline:
                return False
            self._stop.wait(_POLL_S)
        return True

    def _quarantine(self, replica: _Replica, outcome: Outcome) -> None:
        _log.error("replica %d is quarantined: %s", replica.index, outcome.error)
        with self._lock:
            self._catching_up.add(replica.index)
        name = f"catch-up-{replica.index}"
        threading.Thread(target=self._catch_up, args=(replica,), name=name, daemon=True).start()

    def _catch_up(self, replica: _Replica) -> None:
        """Bring the newest weights until it has them and none newer have come meanwhile."""
        while not self._stop.wait(RETRY_S):
            if not rpc.is_healthy(replica.address):
                continue
            snapshot = self._newest
            assert snapshot is not None
            outcome = replica.update(snapshot, late=True)
            self._on_outcome(outcome)
            with self._lock:
                if outcome.ok and snapshot is self._newest:
                    self._catching_up.discard(replica.index)
                    _log.info("replica %d has caught up at version %d", replica.index, snapshot.version.step)
                    return


class _Replica:
    """The stream to one replica."""

    def __init__(self, index: int, address: str, tolerance: float, stop: StopEvent) -> None:
        self.index = index
        self.address = address
        self._tolerance = tolerance
        self._stop = stop
        self._channel = rpc.connect_sync(address)
        self._stub = weights_pb2_grpc.WeightServiceStub(self._channel)

    def update(self, snapshot: Snapshot, late: bool = False) -> Outcome:
        """One update, from begin to the canary's comparison; never raises for what the replica does."""
        started_s = time.perf_counter()
        try:
            committed, receive_ms = self._stream(snapshot)
        except grpc.RpcError as error:
            reason, may_recover = f"{error.code().name}: {error.details()}", error.code() in _PASSING
            return Outcome(self.index, snapshot.version, False, reason, late=late, may_recover=may_recover)
        differences = [
            abs(theirs - ours)
            for theirs, ours in zip(committed.canary_logprobs, snapshot.canary_logprobs, strict=False)
        ]
        complete = len(committed.canary_logprobs) == len(snapshot.canary_logprobs) and bool(differences)
        largest = max(differences, default=None)
        ok = complete and largest is not None and largest <= self._tolerance  # a NaN compares as False
        return Outcome(
            replica=self.index,
            version=snapshot.version,
            ok=ok,
            error="" if ok else f"its canary differs by {largest} where {self._tolerance} is allowed",
            canary_max_difference=largest,
            receive_ms=receive_ms,
            total_ms=(time.perf_counter() - started_s) * 1e3,
            phases_ms=dict(committed.phases_ms),
            num_requests_kept=committed.num_requests_kept,
            late=late,
        )

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def _stream(self, snapshot: Snapshot) -> tuple[weights_pb2.UpdateCommitted, float]:
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        timeout_s = STALL_S + snapshot.num_bytes / BYTES_PER_S
        call = self._stub.UpdateWeights(_requests(snapshot, answers), timeout=timeout_s)
        receive_ms = 0.0
        try:
            for response in call:
                event = response.WhichOneof("event")
                answers.put(event)
                if event == "received":
                    receive_ms = response.received.receive_ms
                if event == "committed":
                    return response.committed, receive_ms
        finally:
            answers.put("")  # releases the sender, whatever ended the stream
        raise _EndedEarly


class _EndedEarly(grpc.RpcError):
    """The replica closed the stream without an answer."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.ABORTED

    def details(self) -> str:
        return "the stream ended before the update was committed"


def _requests(snapshot: Snapshot, answers: queue.SimpleQueue[str]) -> Iterator[weights_pb2.UpdateWeightsRequest]:
    """The sender's half of the state machine; goes on only as the replica answers."""
    begin = weights_pb2.UpdateBegin(
        peer=rpc.peer("learner", "rank-0"),
        version=snapshot.version,
        tensors=snapshot.specs,
        canary=snapshot.canary,
        model_fingerprint=snapshot.processor_hash,
    )
    yield weights_pb2.UpdateWeightsRequest(begin=begin)
    if answers.get() != "ready":
        return
    for tensor in snapshot.tensors.values():
        data = _bytes_of(tensor)
        for start in range(0, len(data), rpc.CHUNK_BYTES):
            yield weights_pb2.UpdateWeightsRequest(chunk=bytes(data[start : start + rpc.CHUNK_BYTES]))
    if answers.get() != "received":
        return
    yield weights_pb2.UpdateWeightsRequest(commit=weights_pb2.UpdateCommit())


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's raw little-endian bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
