"""Replica pool: replicas that failed, joined or restarted are quarantined until they serve the newest weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from deskrl.core import rpc
from deskrl.core.process_lifecycle import StopEvent
from deskrl.learner.weights import replica_pool
from deskrl.learner.weights.manifest import PublishOutcome, WeightManifest, WeightSnapshot
from deskrl.learner.weights.replica_pool import ReplicaPool
from deskrl.proto.v1 import common_pb2, weights_pb2


class FakeReplica:
    """Client of a replica that accepts every update."""

    def __init__(self, index: int, address: str) -> None:
        self.index, self.address = index, address
        self.version = common_pb2.PolicyVersion(lineage="initial")

    def served_version(self) -> common_pb2.PolicyVersion:
        return self.version

    def stream(self, snapshot: WeightSnapshot, late: bool) -> PublishOutcome:
        self.version = snapshot.manifest.version
        return PublishOutcome(self.index, self.version, True, "stream", late=late)


def manifest(step: int) -> WeightManifest:
    version = common_pb2.PolicyVersion(lineage="test", step=step)
    return WeightManifest(version, (), weights_pb2.Canary(), (), "")


@pytest.fixture
def outcomes() -> list[PublishOutcome]:
    return []


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, outcomes: list[PublishOutcome]) -> Iterator[ReplicaPool]:
    """Pool of two replicas that serve version 1."""
    monkeypatch.setattr(replica_pool, "RETRY_S", 0.01)
    monkeypatch.setattr(rpc, "is_healthy", lambda address: True)
    stop = StopEvent()
    pool = ReplicaPool(["a:1", "a:2"], FakeReplica, stop, outcomes.append)  # type: ignore[arg-type]
    publish(pool, 1)
    yield pool
    stop.set()


def publish(pool: ReplicaPool, step: int) -> None:
    """Update all replicas that are not quarantined."""
    snapshot = WeightSnapshot(manifest(step), {})
    available = pool.begin_update()
    pool.set_snapshot(snapshot)
    for replica in available:
        replica.stream(snapshot, late=False)
    pool.end_update(snapshot.manifest)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_replica_that_joins_is_streamed_the_newest_weights(pool: ReplicaPool, outcomes: list[PublishOutcome]) -> None:
    pool.set_joined(["a:1", "b:1"])
    wait_until(lambda: pool.num_quarantined() == 0)
    assert [(outcome.replica, outcome.version.step, outcome.late) for outcome in outcomes] == [(2, 1, True)]
    assert [replica.address for replica in pool.members()] == ["a:1", "a:2", "b:1"]


def test_a_replica_that_leaves_is_removed_and_its_index_is_not_reused(pool: ReplicaPool) -> None:
    pool.set_joined(["b:1"])
    pool.set_joined(["b:2"])
    assert [(replica.index, replica.address) for replica in pool.members()] == [(0, "a:1"), (1, "a:2"), (3, "b:2")]


def test_a_replica_that_serves_another_version_has_restarted_and_catches_up(
    pool: ReplicaPool, outcomes: list[PublishOutcome]
) -> None:
    pool.check_for_restarts()
    assert pool.num_quarantined() == 0, "all replicas serve the newest version"
    restarted: FakeReplica = pool.members()[1]  # type: ignore[assignment]
    restarted.version = common_pb2.PolicyVersion(lineage="initial")
    pool.check_for_restarts()
    wait_until(lambda: pool.num_quarantined() == 0)
    assert restarted.version.step == 1
    assert [outcome.replica for outcome in outcomes] == [1]


def test_a_quarantined_replica_is_excluded_from_an_update_and_receives_its_weights_afterwards(
    pool: ReplicaPool, outcomes: list[PublishOutcome]
) -> None:
    newest = WeightSnapshot(manifest(2), {})
    pool.begin_update()
    pool.quarantine(PublishOutcome(0, newest.manifest.version, False, "stream", "UNAVAILABLE"))
    assert [replica.index for replica in pool.begin_update()] == [1]
    assert pool.num_quarantined() == 1, "no snapshot is available during an update"
    pool.set_snapshot(newest)
    assert pool.wait_for_recovery(timeout_s=5)
    wait_until(lambda: pool.num_quarantined() == 0)
    assert [(outcome.replica, outcome.version.step) for outcome in outcomes] == [(0, 2)]
