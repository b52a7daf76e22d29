"""A checkpoint that is written while learning goes on holds one moment, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_kit import in_ranks, learn, load, rows_of
from learner_kit import ToyPolicy, build_model, play

from deskrl.core.config import LearnerConfig
from deskrl.learner.batches.feed import Feed
from deskrl.learner.policy import checkpoint_writer
from deskrl.learner.policy.checkpoint import CheckpointStore
from deskrl.learner.policy.checkpoint_writer import CheckpointWriter
from deskrl.learner.policy.engine import Engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_model(tmp_path / "model")


class Learning:
    """An engine that learns to imitate, and where its checkpoints go."""

    def __init__(self, folder: Path, settings: dict[str, Any], checkpoints: str = "checkpoints") -> None:
        policy, collator = load(folder)
        config = LearnerConfig.model_validate({"dtype": "float32", "grpo": {"learning_rate": 1e-2}} | settings)
        self.engine = Engine(policy, config)
        self.feed = Feed(collator, self.engine.rank, self.engine.world_size, 64, lambda: None)
        self.share = self.feed.share(rows_of([play(ToyPolicy(folder), "red", 0), play(ToyPolicy(folder), "blue", 1)]))
        self.store = CheckpointStore(folder.parent / checkpoints, folder, {})
        self.store.folder.mkdir(exist_ok=True)
        self.writer = CheckpointWriter(self.store, self.engine, keep=2)

    def step(self) -> float:
        """One optimizer step; what it found is told by its gradient."""
        return learn(self.engine, self.feed, self.share).gradient_norm


def learn_beside_writing(folder: Path, cases: list[dict[str, Any]]) -> None:
    """In each rank: a checkpoint between two steps, then the steps after it again from what is on disk."""
    for number, settings in enumerate(cases):
        learning = Learning(folder, settings, f"checkpoints-{number}")
        learning.step()
        learning.writer.begin("epoch_1", 1, {"at": "one"})
        after_one = [learning.step() for _ in range(3)]
        assert learning.writer.finish()
        learning.engine.barrier()  # rank 0 has published it
        checkpoint = learning.store.newest()
        assert checkpoint is not None and checkpoint.state == {"at": "one"}
        learning.store.load(checkpoint, learning.engine)
        assert [learning.step() for _ in range(3)] == after_one, settings
        learning.writer.close()
    learning.engine.close()


def test_it_holds_the_moment_it_was_begun_at_though_learning_goes_on(folder: Path) -> None:
    in_ranks(learn_beside_writing, 1, folder, [{"zero_stage": 0}, {}, {"dtype": "bfloat16"}])


def test_ranks_write_their_parts_of_the_same_moment(folder: Path) -> None:
    in_ranks(learn_beside_writing, 2, folder, [{"zero_stage": 2, "offload_optimizer": True}, {"zero_stage": 3}])


def write_without_room(folder: Path) -> None:
    """On a machine without memory for a copy."""
    checkpoint_writer.available_bytes = lambda: 1000
    learning = Learning(folder, {})
    learning.writer.begin("epoch_1", 1, {})
    assert (learning.store.folder / "latest" / "learner.json").exists(), "it was written before begin returned"
    assert learning.writer.finish(wait=False)
    learning.engine.close()


def test_where_a_copy_has_no_room_learning_waits_and_says_so(folder: Path) -> None:
    log = in_ranks(write_without_room, 1, folder)
    assert "nothing is learnt while checkpoint epoch_1 is written: its copy takes" in log
