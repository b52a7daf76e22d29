"""Publisher: replicas that leave during an update are neither quarantined nor counted as failed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import grpc
import pytest

from deskrl.core.config import InferenceConfig
from deskrl.core.process_lifecycle import StopEvent
from deskrl.learner.weights import publisher as publisher_module
from deskrl.learner.weights.manifest import PublishOutcome, WeightManifest, WeightSnapshot
from deskrl.learner.weights.publisher import Publisher
from deskrl.proto.v1 import common_pb2, weights_pb2

VERSION = common_pb2.PolicyVersion(lineage="test", step=1)
MANIFEST = WeightManifest(VERSION, (), weights_pb2.Canary(), (), "")
JOINED = "127.0.0.1:2"


class FakeReplica:
    """Client of a replica, of which the joined one is unreachable."""

    def __init__(self, index: int, address: str, *_: object) -> None:
        self.index, self.address = index, address

    def open(self, manifest: WeightManifest) -> None:
        """Ask for a stream."""

    def stream(self, snapshot: WeightSnapshot, late: bool = False) -> PublishOutcome:
        error = "connection refused" if self.address == JOINED else ""
        return PublishOutcome(self.index, VERSION, not error, "stream", error, late=late)

    def close(self) -> None:
        """Close nothing."""


class NoWeights:
    """Weights of a model without tensors, on the only rank."""

    rank = 0

    def weights(self) -> dict[str, Any]:
        return {}

    def broadcast_from_rank_0(self, value: str) -> str:
        return value


class _Unavailable(grpc.RpcError):
    pass


@pytest.mark.parametrize(("now_joined", "num_failed"), [((), 0), ((JOINED,), 1), (_Unavailable(), 1)])
def test_the_update_of_a_replica_that_has_left_in_the_meantime_is_no_failure(
    now_joined: Collection[str] | grpc.RpcError, num_failed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_joined() -> Collection[str]:
        if isinstance(now_joined, grpc.RpcError):
            raise now_joined
        return now_joined

    monkeypatch.setattr(publisher_module, "ReplicaClient", FakeReplica)
    outcomes: list[PublishOutcome] = []
    stop = StopEvent()
    publisher = Publisher(InferenceConfig(), None, 1.0, stop, outcomes.append, list_joined)
    publisher.replicas.set_joined([JOINED])
    publisher.replicas._quarantined.clear()  # as if it had caught up
    publisher.publish(MANIFEST, NoWeights())  # type: ignore[arg-type]
    stop.set()
    assert [outcome.ok for outcome in outcomes] == [True] + [False] * num_failed
    assert publisher.replicas.num_quarantined() == num_failed
    assert len(publisher.replicas.members()) == 1 + num_failed
    publisher.close()
