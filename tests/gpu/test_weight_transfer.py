"""Weight transfer between GPU processes: updates are verified, and a dead process is detected within a time limit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from inference_kit import IMAGE_SIZE, Replica, replica_config, running_replica
from ports_kit import free_port
from weight_update_kit import ChangingModel, load_changing_model

from deskrl.core.errors import UserError
from deskrl.learner.weights import bucket_sender, replica_client
from deskrl.learner.weights.bucket_sender import BucketSender, SendResult
from deskrl.learner.weights.manifest import PublishOutcome
from deskrl.learner.weights.replica_client import DirectUpdate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU available"),
]

TOLERANCE = 5e-3


@dataclass
class TransferPair:
    """Replica on a GPU, and the learner's side of updates in this process."""

    transfer: str
    served: Replica
    model: ChangingModel
    sender: BucketSender
    replica: replica_client.ReplicaClient

    def open(self) -> DirectUpdate:
        manifest = self.model.next_manifest()
        self.sender.prepare(manifest.specs)
        opened = self.replica.open(manifest)
        assert isinstance(opened, DirectUpdate), opened
        return opened

    def send(self, update: DirectUpdate) -> SendResult:
        update.start()
        source = self.model.source
        tensors = list(source.checkpoint_parameters().values())
        return self.sender.send(tensors, source.gathered, {0: update.transport})

    def update(self) -> PublishOutcome:
        opened = self.open()
        return opened.conclude(self.send(opened))


@contextmanager
def running(transfer: str, folder: Path) -> Iterator[TransferPair]:
    """Run a replica that shares this process's GPU (`ipc`) or has another one (`nccl`)."""
    if transfer == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs two GPUs")
    # The tiny model needs little memory, so that it fits on a GPU that is in use.
    config = replica_config(folder, free_port(), weight_transfer="auto", gpu_memory_utilization=0.2)
    quick = {"mm_encoder_attn_backend": "TORCH_SDPA", "enforce_eager": True}
    arguments = quick | json.loads(os.environ.get("DESKRL_TEST_ENGINE_ARGS", "{}"))
    inference = config.inference.model_copy(update={"engine_args": arguments})
    config = config.model_copy(update={"inference": inference})
    gpu = {"CUDA_VISIBLE_DEVICES": "1" if transfer == "nccl" else "0"}
    with running_replica(config, folder / "replica.log", gpu) as served:
        device = torch.device("cuda:0")
        model, sender = load_changing_model(config, device, IMAGE_SIZE), BucketSender(device)
        replica = replica_client.ReplicaClient(0, served.address, "auto", TOLERANCE, sender)
        yield TransferPair(transfer, served, model, sender, replica)
        replica.close()


@pytest.fixture(scope="module", autouse=True)
def _small_buckets() -> Iterator[None]:
    """Reduce the bucket size, as the tiny model would fit into one bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_client, "BUCKET_BYTES", 1024**2)
        patch.setattr(bucket_sender, "BUCKET_BYTES", 1024**2)
        yield


@pytest.fixture(scope="module", params=["ipc", "nccl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransferPair]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as created:
        yield created


@pytest.fixture(params=["ipc", "nccl"])
def disposable_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TransferPair]:
    """TransferPair whose replica may be killed by the test."""
    with running(request.param, tmp_path) as created:
        yield created


def test_consecutive_updates_are_all_verified(pair: TransferPair) -> None:
    outcomes = [pair.update() for _ in range(3)]
    assert [outcome.error for outcome in outcomes] == ["", "", ""]
    assert {outcome.transfer for outcome in outcomes} == {pair.transfer}
    assert {"begin", "transfer", "pause", "load", "verify", "clear_caches", "resume", "canary"} == set(
        outcomes[0].phases_ms
    )


def test_a_transfer_that_this_machine_does_not_support_is_an_error(pair: TransferPair) -> None:
    other = {"ipc": "nccl", "nccl": "ipc"}[pair.transfer]
    client = replica_client.ReplicaClient(0, pair.served.address, other, TOLERANCE, pair.sender)
    with pytest.raises(UserError, match=other):
        client.negotiate()
    client.close()


def test_an_update_without_weights_fails_and_keeps_the_old_weights(pair: TransferPair) -> None:
    assert pair.update().ok
    empty = pair.open()
    empty.start()
    outcome = empty.conclude(SendResult([], {}, 0.0, 0))
    empty.transport.abort()
    assert not outcome.ok
    assert "the weights were not received completely" in outcome.error
    assert pair.update().ok, "the next update must succeed"


def test_a_replica_with_differing_checksums_exits(disposable_pair: TransferPair) -> None:
    opened = disposable_pair.open()
    sent = disposable_pair.send(opened)
    outcome = opened.conclude(replace(sent, checksums=[1, *sent.checksums[1:]]))
    assert not outcome.ok
    assert "checksums of" in outcome.error
    assert disposable_pair.served.process.wait(timeout=60) == 1


def test_a_replica_that_dies_during_an_update_is_abandoned_within_a_time_limit(disposable_pair: TransferPair) -> None:
    opened = disposable_pair.open()
    for process in disposable_pair.served.descendants():
        process.kill()
    disposable_pair.served.process.kill()
    outcome = opened.conclude(disposable_pair.send(opened))
    assert not outcome.ok
    assert outcome.may_recover
