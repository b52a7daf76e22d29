"""Weights move from one GPU process to another, proven; and whoever dies on the way is noticed in bounded time."""

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
from weights_kit import Changing, load_changing

from deskrl.core.errors import UserError
from deskrl.learner.weights import replicas, sending
from deskrl.learner.weights.announcements import Outcome
from deskrl.learner.weights.replicas import DirectUpdate
from deskrl.learner.weights.sending import Sender, Sent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]

TOLERANCE = 5e-3


@dataclass
class World:
    """A replica on a GPU, and the learner's half of updates in this process."""

    transfer: str
    served: Replica
    changing: Changing
    sender: Sender
    replica: replicas.Replica

    def open(self) -> DirectUpdate:
        announcement = self.changing.announce()
        self.sender.prepare(announcement.specs)
        opened = self.replica.open(announcement)
        assert isinstance(opened, DirectUpdate), opened
        return opened

    def send(self, update: DirectUpdate) -> Sent:
        update.start()
        held = self.changing.held
        tensors = list(held.checkpoint_parameters().values())
        return self.sender.send(tensors, held.gathered, {0: update.channel})

    def update(self) -> Outcome:
        opened = self.open()
        return opened.conclude(self.send(opened))


@contextmanager
def running(transfer: str, folder: Path) -> Iterator[World]:
    """A world whose replica shares this process's GPU (`ipc`) or has another (`nccl`)."""
    if transfer == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs two GPUs")
    # The tiny model is small enough to share whatever is left of a GPU.
    config = replica_config(folder, free_port(), weight_transfer="auto", gpu_memory_fraction=0.2)
    quick = {"mm_encoder_attn_backend": "TORCH_SDPA", "enforce_eager": True}
    arguments = quick | json.loads(os.environ.get("DESKRL_TEST_ENGINE_ARGS", "{}"))
    inference = config.inference.model_copy(update={"engine_args": arguments})
    config = config.model_copy(update={"inference": inference})
    gpu = {"CUDA_VISIBLE_DEVICES": "1" if transfer == "nccl" else "0"}
    with running_replica(config, folder / "replica.log", gpu) as served:
        device = torch.device("cuda:0")
        changing, sender = load_changing(config, device, IMAGE_SIZE), Sender(device)
        replica = replicas.Replica(0, served.address, "auto", TOLERANCE, sender)
        yield World(transfer, served, changing, sender, replica)
        replica.close()


@pytest.fixture(scope="module", autouse=True)
def _many_buckets() -> Iterator[None]:
    """The tiny model would fit into one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "BUCKET_BYTES", 1024**2)
        patch.setattr(sending, "BUCKET_BYTES", 1024**2)
        yield


@pytest.fixture(scope="module", params=["ipc", "nccl"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture(params=["ipc", "nccl"])
def doomed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A world whose replica does not outlive the test."""
    with running(request.param, tmp_path) as made:
        yield made


def test_updates_follow_one_another_and_each_is_proven(world: World) -> None:
    outcomes = [world.update() for _ in range(3)]
    assert [outcome.error for outcome in outcomes] == ["", "", ""]
    assert {outcome.transfer for outcome in outcomes} == {world.transfer}
    assert {"begin", "transfer", "pause", "load", "verify", "clear_caches", "resume", "canary"} == set(
        outcomes[0].phases_ms
    )


def test_what_this_machine_has_not_is_refused(world: World) -> None:
    other = {"ipc": "nccl", "nccl": "ipc"}[world.transfer]
    asking = replicas.Replica(0, world.served.address, other, TOLERANCE, world.sender)
    with pytest.raises(UserError, match=other):
        asking.negotiate()
    asking.close()


def test_a_learner_that_sends_nothing_leaves_the_old_weights(world: World) -> None:
    assert world.update().ok
    silent = world.open()
    silent.start()
    outcome = silent.conclude(Sent([], {}, 0.0, 0))
    silent.channel.abort()
    assert not outcome.ok
    assert "the weights did not all come" in outcome.error
    assert world.update().ok, "the next update finds the replica as it was"


def test_other_checksums_than_were_sent_end_the_replica(doomed: World) -> None:
    opened = doomed.open()
    sent = doomed.send(opened)
    outcome = opened.conclude(replace(sent, checksums=[1, *sent.checksums[1:]]))
    assert not outcome.ok
    assert "checksums differ" in outcome.error
    assert doomed.served.process.wait(timeout=60) == 1


def test_a_replica_that_dies_on_the_way_is_given_up_in_bounded_time(doomed: World) -> None:
    opened = doomed.open()
    for process in doomed.served.descendants():
        process.kill()
    doomed.served.process.kill()
    outcome = opened.conclude(doomed.send(opened))
    assert not outcome.ok
    assert outcome.may_recover
