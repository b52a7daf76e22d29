"""Weights to replicas, proven: checksums on arrival, and a canary's logprobs against the learner's own forward pass.

Directly from GPU to GPU where learner and replica have what that takes, else as a stream. A replica that fails or
stalls is quarantined: the run goes on with the others, and a thread of its own streams it the newest weights as soon as
it answers again. So is one that was started again, and serves what it began with.
Knows which replicas there are and which have what; knows nothing of training.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from itertools import count
from typing import Any, Protocol, TypeVar

import grpc
from torch import Tensor

from deskrl.core import rpc
from deskrl.core.config import InferenceConfig
from deskrl.core.lifetime import StopEvent
from deskrl.learner import stopping
from deskrl.learner.weights.announcements import Announcement, Outcome, Snapshot, with_checksums
from deskrl.learner.weights.replicas import DirectUpdate, Replica
from deskrl.learner.weights.sending import Sender, follow

T = TypeVar("T")

TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_TF32 = 5e-2
TOLERANCE_HALF = 0.3
"""Largest difference of a canary's logprob between a replica and the learner: two implementations, one arithmetic. A
GPU's attention kernels multiply float32 as TF32."""
START_TIMEOUT_S = 900.0
"""How long the first publication waits for replicas to come up."""
RECOVERY_S = 300.0
"""How long an update waits for a replica to come back when none could be reached."""
RETRY_S = 2.0
_POLL_S = 0.2
_MAX_AT_ONCE = 32
"""Replicas that are updated at the same time."""

_log = logging.getLogger("deskrl.learner")


class Weights(Protocol):
    """The weights that are published, on all ranks; every rank makes the same calls in the same order."""

    rank: int

    def checkpoint_parameters(self) -> Mapping[str, Tensor]:
        """The live tensors by the names of the checkpoint, in its order; shards of them under ZeRO 3."""

    def gathered(self, parameters: list[Tensor]) -> AbstractContextManager[Any]:
        """Makes some of them whole for as long as the context lasts."""

    def weights(self) -> dict[str, Tensor]:
        """All of them, copied to the CPU."""

    def from_rank_0(self, value: str) -> str:
        """What rank 0 says."""


class Publisher:
    """Publishes to all replicas of a run, those that join it later included.

    All ranks have one and call `publish`; the rest is rank 0's alone.

    Args:
        config: of inference: where the replicas are, and how weights go to them.
        sender: of rank 0, if its weights are on a GPU.
        tolerance: for the canary.
        stop: ends waits.
        on_outcome: told of every update of every replica, from several threads.
    """

    def __init__(
        self,
        config: InferenceConfig,
        sender: Sender | None,
        tolerance: float,
        stop: StopEvent,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._config = config
        self._sender = sender
        self._tolerance = tolerance
        self._replicas = dict(enumerate(map(self._connect, range(config.num_replicas), config.replica_addresses)))
        self._joined: dict[str, Replica] = {}
        self._left: list[Replica] = []
        self._stop = stop
        self._on_outcome = on_outcome
        self._pool = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="publish")
        self._newest: Snapshot | None = None
        self._served: Announcement | None = None  # by all that are not catching up; None during an update
        self._lock = threading.Lock()
        self._catching_up: set[int] = set()

    def wait_for_replicas(self) -> None:
        """Wait until every replica answers (after `START_TIMEOUT_S` until one does), and settle how weights go to them.

        Raises:
            UserError: a replica does not trust this process, or weights cannot go to it as the configuration says.
            RuntimeError: none has come up in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            stopping.check(self._stop)
            replicas = self._known()
            healthy = [replica for replica in replicas if rpc.check_health(replica.address)]
            if healthy and (len(healthy) == len(replicas) or time.monotonic() > deadline):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"no inference replica has come up in {START_TIMEOUT_S:.0f} s")
            self._stop.wait(_POLL_S)
        for replica in healthy:
            try:
                replica.negotiate()
            except grpc.RpcError as error:  # it is gone again, and will be asked anew
                _log.warning("replica %d does not say what it has: %s", replica.index, error)

    def publish(self, announcement: Announcement, weights: Weights) -> None:
        """Bring the weights to every replica that is not catching up already; return when each has them or has failed.

        A collective call. Where every replica is away, this waits until one is back with these weights.

        Raises:
            RuntimeError: no replica serves them.
            UserError: NCCL does not connect learner and replicas, the first time that it should.
        """
        is_first = weights.rank == 0
        opened, outcomes, streaming = self._open(announcement) if is_first else ([], [], [])
        if weights.from_rank_0("some" if opened else ""):
            outcomes += self._send(announcement, weights, opened)
        wanted = streaming or not all(outcome.ok for outcome in outcomes) or self.num_quarantined()
        if weights.from_rank_0("wanted" if wanted else ""):
            # Only now: a second copy of the weights, if on the CPU, is for those who cannot have them directly.
            tensors = weights.weights()
            if is_first:
                outcomes += self._stream(with_checksums(announcement, tensors), streaming)
        if is_first:
            self._settle(announcement, outcomes)

    def _open(self, announcement: Announcement) -> tuple[list[DirectUpdate], list[Outcome], list[Replica]]:
        """Ask every replica that is not catching up: those that wait for buckets, failed, or want a stream."""
        with self._lock:
            self._newest = self._served = None  # what it was is old by now: nobody has caught up by it
            current = [replica for index, replica in self._replicas.items() if index not in self._catching_up]
        if self._sender is not None:
            self._sender.prepare(announcement.specs)
        opened, outcomes, streaming = [], [], []
        answers = self._all([self._pool.submit(replica.open, announcement) for replica in current])
        for replica, answer in zip(current, answers, strict=True):
            if isinstance(answer, DirectUpdate):
                opened.append(answer)
            elif answer is None:
                streaming.append(replica)
            else:
                outcomes.append(answer)
        return opened, outcomes, streaming

    def _send(self, announcement: Announcement, weights: Weights, opened: Sequence[DirectUpdate]) -> list[Outcome]:
        """Direct updates of those that wait for one, all at once; the other ranks help to gather."""
        held = weights.checkpoint_parameters()
        tensors = [held[spec.name] for spec in announcement.specs]
        if weights.rank != 0:
            follow(tensors, announcement.specs, weights.gathered)
            return []
        assert self._sender is not None
        for update in opened:
            update.start()
        channels = {update.replica.index: update.channel for update in opened}
        sent = self._sender.send(tensors, weights.gathered, channels)
        return self._all([self._pool.submit(update.conclude, sent) for update in opened])

    def _stream(self, snapshot: Snapshot, replicas: Sequence[Replica]) -> list[Outcome]:
        """Streamed updates, all at once; from now on, those that catch up are brought this snapshot."""
        with self._lock:
            self._newest = snapshot
        return self._all([self._pool.submit(replica.stream, snapshot) for replica in replicas])

    def _settle(self, announcement: Announcement, outcomes: Sequence[Outcome]) -> None:
        """Quarantine who failed; raise unless someone serves the new weights in the end."""
        for outcome in outcomes:
            self._on_outcome(outcome)
            if not outcome.ok:
                self._quarantine(outcome)
        with self._lock:
            self._served = announcement
        if any(outcome.ok for outcome in outcomes):
            return
        if all(outcome.may_recover for outcome in outcomes) and self._one_recovers():
            return
        reasons = "; ".join(f"replica {outcome.replica}: {outcome.error}" for outcome in outcomes)
        step = announcement.version.step
        raise RuntimeError(f"no inference replica took version {step}: {reasons or 'all are late'}")

    def _all(self, pending: Sequence[Future[T]]) -> list[T]:
        """Results of what the pool does, unless the run is stopped first."""
        while wait(pending, timeout=_POLL_S).not_done:
            stopping.check(self._stop)
        return [future.result() for future in pending]

    def set_joined(self, addresses: Collection[str]) -> None:
        """These replicas have joined, and no others. A new one is brought the newest weights from a thread of its own.

        Weights that went directly from GPU to GPU are kept nowhere: then it gets the next ones, as a stream.
        """
        joined = set(addresses).difference(self._config.replica_addresses)
        with self._lock:
            left = [self._joined.pop(address) for address in self._joined.keys() - joined]
            for replica in left:
                del self._replicas[replica.index]
                self._catching_up.discard(replica.index)
            self._left += left
            first = len(self._replicas) + len(self._left)
            new = list(map(self._connect, count(first), sorted(joined - self._joined.keys())))
            self._joined |= {replica.address: replica for replica in new}
            self._replicas |= {replica.index: replica for replica in new}
            self._catching_up |= {replica.index for replica in new}
        for replica in left:
            _log.info("replica %d at %s has left", replica.index, replica.address)
        for replica in new:
            _log.info("replica %d at %s has joined", replica.index, replica.address)
            self._start_catching_up(replica)

    def look_again(self) -> None:
        """Ask who should have the newest weights whether they do; one that was started again is brought them anew."""
        with self._lock:
            expected = self._served
            current = [replica for index, replica in self._replicas.items() if index not in self._catching_up]
        if expected is None:
            return
        for replica in current:
            version = replica.served_version()
            with self._lock:
                if self._served is not expected:
                    return  # an update began meanwhile
                if version in (None, expected.version) or replica.index not in self._replicas:
                    continue
                self._catching_up.add(replica.index)
            _log.warning(
                "replica %d was started again: it does not serve version %d", replica.index, expected.version.step
            )
            self._start_catching_up(replica)

    def _connect(self, index: int, address: str) -> Replica:
        return Replica(index, address, self._config.weight_transfer, self._tolerance, self._sender)

    def _known(self) -> list[Replica]:
        """All that there are now: threads add and remove some."""
        with self._lock:
            return list(self._replicas.values())

    def num_quarantined(self) -> int:
        """Replicas that do not serve the newest weights."""
        with self._lock:
            return len(self._catching_up)

    def close(self) -> None:
        """End all connections; streams under way break off, and the replicas keep what they have."""
        for replica in (*self._known(), *self._left):
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

    def _quarantine(self, outcome: Outcome) -> None:
        _log.error("replica %d is quarantined: %s", outcome.replica, outcome.error)
        with self._lock:
            replica = self._replicas.get(outcome.replica)
            if replica is None:
                return  # it has left
            self._catching_up.add(replica.index)
        self._start_catching_up(replica)

    def _start_catching_up(self, replica: Replica) -> None:
        name = f"catch-up-{replica.index}"
        threading.Thread(target=self._catch_up, args=(replica,), name=name, daemon=True).start()

    def _catch_up(self, replica: Replica) -> None:
        """Bring the newest weights until it has them and none newer have come meanwhile, or it has left."""
        while replica.index in self._replicas and not self._stop.wait(RETRY_S):
            snapshot = self._newest
            if snapshot is None or not rpc.is_healthy(replica.address):
                continue
            outcome = replica.stream(snapshot, late=True)
            self._on_outcome(outcome)
            with self._lock:
                if outcome.ok and snapshot is self._newest:
                    self._catching_up.discard(replica.index)
                    _log.info(
                        "replica %d has caught up at version %d", replica.index, snapshot.announcement.version.step
                    )
                    return
