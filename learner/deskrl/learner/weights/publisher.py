"""Publisher: transfers new weights to all inference replicas and verifies them with checksums and a canary.

Weights go directly from GPU to GPU (NCCL or CUDA IPC) where learner and replica support it, otherwise as a gRPC stream.
A replica whose update fails or stalls is quarantined: training continues with the others, and the replica pool brings
it up to date in the background.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import grpc
from torch import Tensor

from deskrl.core import rpc
from deskrl.core.config import InferenceConfig
from deskrl.core.process_lifecycle import StopEvent
from deskrl.learner import cancellation
from deskrl.learner.weights.bucket_sender import BucketSender, gather_buckets
from deskrl.learner.weights.manifest import PublishOutcome, WeightManifest, WeightSnapshot, with_checksums
from deskrl.learner.weights.replica_client import DirectUpdate, ReplicaClient
from deskrl.learner.weights.replica_pool import ReplicaPool

T = TypeVar("T")

TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_TF32 = 5e-2
TOLERANCE_HALF = 0.3
"""Largest accepted difference of a canary logprob between replica and learner, by numeric type. The two use different
kernels for the same computation; attention kernels of GPUs multiply float32 as TF32."""
START_TIMEOUT_S = 900.0
"""Time that the first publication waits for replicas to start."""
RECOVERY_S = 300.0
"""Time that an update waits for a replica to recover when none was reachable."""
_POLL_S = 0.2
_MAX_CONCURRENT_UPDATES = 32

_log = logging.getLogger(__name__)


class WeightSource(Protocol):
    """Source of the published weights, on all ranks; every rank makes the same calls in the same order."""

    rank: int

    def checkpoint_parameters(self) -> Mapping[str, Tensor]:
        """Return the live tensors by checkpoint name, in checkpoint order; under ZeRO 3 they are shards."""

    def gathered(self, parameters: list[Tensor]) -> AbstractContextManager[Sequence[Tensor]]:
        """Gather some of the parameters while the context is open; its value on rank 0 are the tensors to send."""

    def weights(self) -> dict[str, Tensor]:
        """Return copies of all tensors on the CPU."""

    def broadcast_from_rank_0(self, value: str) -> str:
        """Return the value that rank 0 passes."""


class Publisher:
    """Publishes weights to all replicas of a run, including those that join later.

    Every rank has a publisher and calls `publish`; everything else runs on rank 0 only.

    Args:
        config: inference configuration: addresses of the replicas and the transfer mode.
        sender: bucket sender of rank 0 if its weights are on a GPU, otherwise None.
        tolerance: largest accepted difference of a canary logprob.
        stop: event that ends waiting.
        on_outcome: called with the outcome of every update of every replica, from several threads.
        list_joined: returns the addresses of all replicas that have joined and not left; if it raises grpc.RpcError,
            the membership is unchanged.
    """

    def __init__(
        self,
        config: InferenceConfig,
        sender: BucketSender | None,
        tolerance: float,
        stop: StopEvent,
        on_outcome: Callable[[PublishOutcome], None],
        list_joined: Callable[[], Collection[str]],
    ) -> None:
        def connect(index: int, address: str) -> ReplicaClient:
            return ReplicaClient(index, address, config.weight_transfer, tolerance, sender)

        self._sender = sender
        self._stop = stop
        self._on_outcome = on_outcome
        self._list_joined = list_joined
        self._refreshing = threading.Lock()
        self._pool = ThreadPoolExecutor(_MAX_CONCURRENT_UPDATES, thread_name_prefix="publish")
        self.replicas = ReplicaPool(config.replica_addresses, connect, stop, on_outcome)
        """The replicas and which of them are quarantined."""

    def refresh_members(self) -> None:
        """Follow replicas that joined or left."""
        with self._refreshing:  # an older list must not be applied after a newer one
            try:
                joined = self._list_joined()
            except grpc.RpcError:  # the learner's own calls report an unavailable replay service
                return
            self.replicas.set_joined(joined)

    def wait_for_replicas(self) -> None:
        """Wait until every replica is healthy, or at least one after `START_TIMEOUT_S`; then choose their transports.

        Raises:
            UserError: a replica rejects this process, or the configured transfer is not possible.
            RuntimeError: no replica has started within the timeout.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            cancellation.check(self._stop)
            replicas = self.replicas.members()
            healthy = [replica for replica in replicas if rpc.check_health(replica.address)]
            if healthy and (len(healthy) == len(replicas) or time.monotonic() > deadline):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"no inference replica has started within {START_TIMEOUT_S:.0f} s")
            self._stop.wait(_POLL_S)
        for replica in healthy:
            try:
                replica.negotiate()
            except grpc.RpcError as error:  # it has gone away again; each update negotiates anew
                _log.warning("replica %d: weight status is unavailable: %s", replica.index, error)

    def publish(self, manifest: WeightManifest, weights: WeightSource) -> None:
        """Update every replica that is not quarantined; return when each serves the weights or has failed.

        A collective call. If no replica is reachable, it waits until one has recovered and serves these weights.

        Raises:
            RuntimeError: no replica serves the weights.
            UserError: NCCL cannot connect learner and a replica at the first attempt.
        """
        is_first = weights.rank == 0
        opened, outcomes, streaming = self._open(manifest) if is_first else ([], [], [])
        if weights.broadcast_from_rank_0("send" if opened else ""):
            outcomes += self._send(manifest, weights, opened)
        needs_snapshot = streaming or not all(outcome.ok for outcome in outcomes) or self.replicas.num_quarantined()
        if weights.broadcast_from_rank_0("stream" if needs_snapshot else ""):
            # Copied only when needed: a copy of the weights on the CPU costs time and memory.
            tensors = weights.weights()
            if is_first:
                outcomes += self._stream(with_checksums(manifest, tensors), streaming)
        if is_first:
            self._settle(manifest, outcomes)

    def _open(self, manifest: WeightManifest) -> tuple[list[DirectUpdate], list[PublishOutcome], list[ReplicaClient]]:
        """Begin updates of the replicas outside quarantine: those ready for buckets, failures, those to be streamed."""
        available = self.replicas.begin_update()
        if self._sender is not None:
            self._sender.prepare(manifest.specs)
        opened, outcomes, streaming = [], [], []
        answers = self._wait_all([self._pool.submit(replica.open, manifest) for replica in available])
        for replica, answer in zip(available, answers, strict=True):
            if isinstance(answer, DirectUpdate):
                opened.append(answer)
            elif answer is None:
                streaming.append(replica)
            else:
                outcomes.append(answer)
        return opened, outcomes, streaming

    def _send(
        self, manifest: WeightManifest, weights: WeightSource, opened: Sequence[DirectUpdate]
    ) -> list[PublishOutcome]:
        """Send the buckets of all direct updates at once; ranks other than 0 take part in gathering."""
        held = weights.checkpoint_parameters()
        tensors = [held[spec.name] for spec in manifest.specs]
        if weights.rank != 0:
            gather_buckets(tensors, manifest.specs, weights.gathered)
            return []
        assert self._sender is not None
        for update in opened:
            update.start()
        transports = {update.replica.index: update.transport for update in opened}
        result = self._sender.send(tensors, weights.gathered, transports)
        return self._wait_all([self._pool.submit(update.conclude, result) for update in opened])

    def _stream(self, snapshot: WeightSnapshot, replicas: Sequence[ReplicaClient]) -> list[PublishOutcome]:
        """Stream a snapshot to replicas concurrently, and to quarantined ones from now on."""
        self.replicas.set_snapshot(snapshot)
        return self._wait_all([self._pool.submit(replica.stream, snapshot) for replica in replicas])

    def _settle(self, manifest: WeightManifest, outcomes: Sequence[PublishOutcome]) -> None:
        """Quarantine replicas whose update failed; raise RuntimeError if no replica serves the new weights.

        The update of a replica that has left in the meantime has no outcome.
        """
        if not all(outcome.ok for outcome in outcomes):
            self.refresh_members()
            members = {replica.index for replica in self.replicas.members()}
            outcomes = [outcome for outcome in outcomes if outcome.ok or outcome.replica in members]
        for outcome in outcomes:
            self._on_outcome(outcome)
            if not outcome.ok:
                self.replicas.quarantine(outcome)
        self.replicas.end_update(manifest)
        if any(outcome.ok for outcome in outcomes):
            return
        if all(outcome.may_recover for outcome in outcomes) and self.replicas.wait_for_recovery(RECOVERY_S):
            return
        reasons = "; ".join(f"replica {outcome.replica}: {outcome.error}" for outcome in outcomes)
        step = manifest.version.step
        raise RuntimeError(f"no inference replica serves version {step}: {reasons or 'all are quarantined'}")

    def _wait_all(self, pending: Sequence[Future[T]]) -> list[T]:
        """Return the results of all futures; raise Stopped if the run is stopped first."""
        while wait(pending, timeout=_POLL_S).not_done:
            cancellation.check(self._stop)
        return [future.result() for future in pending]

    def close(self) -> None:
        """Close all connections; streams in progress are aborted, and the replicas keep their weights."""
        self.replicas.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
