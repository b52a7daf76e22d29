"""Replica pool: membership and quarantine of the inference replicas, and background catch-up to the newest weights."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from itertools import count

from deskrl.core import rpc
from deskrl.core.process_lifecycle import StopEvent
from deskrl.learner import cancellation
from deskrl.learner.weights.manifest import PublishOutcome, WeightManifest, WeightSnapshot
from deskrl.learner.weights.replica_client import ReplicaClient

RETRY_S = 2.0
"""Interval between attempts to bring a quarantined replica up to date."""
_POLL_S = 0.2

_log = logging.getLogger(__name__)


class ReplicaPool:
    """Replicas of a run; those that failed, joined or restarted are quarantined until they serve the newest weights.

    All methods are thread-safe. Each quarantined replica has a background thread that streams it the newest snapshot.

    Args:
        addresses: addresses of the configured replicas.
        connect: creates the client of a replica, given its index and address.
        stop: event that ends all background threads.
        on_outcome: called with the outcome of each background update, from its thread.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        connect: Callable[[int, str], ReplicaClient],
        stop: StopEvent,
        on_outcome: Callable[[PublishOutcome], None],
    ) -> None:
        self._configured = addresses
        self._connect = connect
        self._stop = stop
        self._on_outcome = on_outcome
        self._lock = threading.Lock()
        self._replicas = {index: connect(index, address) for index, address in enumerate(addresses)}
        self._joined: dict[str, ReplicaClient] = {}
        self._left: list[ReplicaClient] = []
        self._quarantined: set[int] = set()
        self._newest: WeightSnapshot | None = None
        self._served: WeightManifest | None = None  # by all replicas that are not quarantined; None during an update

    def members(self) -> list[ReplicaClient]:
        """Return all current replicas."""
        with self._lock:
            return list(self._replicas.values())

    def num_quarantined(self) -> int:
        """Return the number of replicas that do not serve the newest weights."""
        with self._lock:
            return len(self._quarantined)

    def begin_update(self) -> list[ReplicaClient]:
        """Invalidate the previous weights and return the replicas that are not quarantined."""
        with self._lock:
            # The previous snapshot is outdated from here on: no replica leaves quarantine with it.
            self._newest = self._served = None
            return self._available()

    def set_snapshot(self, snapshot: WeightSnapshot) -> None:
        """Set the snapshot that background threads stream to quarantined replicas."""
        with self._lock:
            self._newest = snapshot

    def end_update(self, manifest: WeightManifest) -> None:
        """Record the weights that all replicas outside quarantine now serve."""
        with self._lock:
            self._served = manifest

    def set_joined(self, addresses: Collection[str]) -> None:
        """Set the addresses of all joined replicas; new ones are streamed the newest snapshot in the background.

        Weights transferred directly between GPUs leave no snapshot. A replica that joins after such an update receives
        the next version as a stream.
        """
        joined = set(addresses).difference(self._configured)
        with self._lock:
            left = [self._joined.pop(address) for address in self._joined.keys() - joined]
            for replica in left:
                del self._replicas[replica.index]
                self._quarantined.discard(replica.index)
            self._left += left
            first = len(self._replicas) + len(self._left)
            new = list(map(self._connect, count(first), sorted(joined - self._joined.keys())))
            self._joined |= {replica.address: replica for replica in new}
            self._replicas |= {replica.index: replica for replica in new}
            self._quarantined |= {replica.index for replica in new}
        for replica in left:
            _log.info("replica %d at %s has left", replica.index, replica.address)
        for replica in new:
            _log.info("replica %d at %s has joined", replica.index, replica.address)
            self._start_catch_up(replica)

    def check_for_restarts(self) -> None:
        """Quarantine replicas that no longer serve the newest weights because they have restarted."""
        with self._lock:
            expected = self._served
            available = self._available()
        if expected is None:
            return
        for replica in available:
            version = replica.served_version()
            with self._lock:
                if self._served is not expected:
                    return  # an update has begun in the meantime
                if version in (None, expected.version) or replica.index not in self._replicas:
                    continue
                self._quarantined.add(replica.index)
            _log.warning("replica %d has restarted: it does not serve version %d", replica.index, expected.version.step)
            self._start_catch_up(replica)

    def quarantine(self, outcome: PublishOutcome) -> None:
        """Quarantine the replica of a failed update, unless it has left."""
        _log.error("replica %d is quarantined: %s", outcome.replica, outcome.error)
        with self._lock:
            replica = self._replicas.get(outcome.replica)
            if replica is None:
                return
            self._quarantined.add(replica.index)
        self._start_catch_up(replica)

    def wait_for_recovery(self, timeout_s: float) -> bool:
        """Wait until a replica has left quarantine; return whether one has within the timeout."""
        deadline = time.monotonic() + timeout_s
        while self.num_quarantined() == len(self._replicas):
            cancellation.check(self._stop)
            if time.monotonic() > deadline:
                return False
            self._stop.wait(_POLL_S)
        return True

    def close(self) -> None:
        """Close all connections; streams in progress are aborted, and the replicas keep their weights."""
        for replica in (*self.members(), *self._left):
            replica.close()

    def _available(self) -> list[ReplicaClient]:
        """Return the replicas that are not quarantined; the caller holds the lock."""
        return [replica for index, replica in self._replicas.items() if index not in self._quarantined]

    def _start_catch_up(self, replica: ReplicaClient) -> None:
        name = f"catch-up-{replica.index}"
        threading.Thread(target=self._catch_up, args=(replica,), name=name, daemon=True).start()

    def _catch_up(self, replica: ReplicaClient) -> None:
        """Stream the newest snapshot until the replica serves it and it is still the newest, or the replica left."""
        while replica.index in self._replicas and not self._stop.wait(RETRY_S):
            snapshot = self._newest
            if snapshot is None or not rpc.is_healthy(replica.address):
                continue
            outcome = replica.stream(snapshot, late=True)
            self._on_outcome(outcome)
            with self._lock:
                if outcome.ok and snapshot is self._newest:
                    self._quarantined.discard(replica.index)
                    _log.info("replica %d has caught up to version %d", replica.index, snapshot.manifest.version.step)
                    return
