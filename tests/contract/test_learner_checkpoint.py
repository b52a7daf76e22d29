"""Checkpoints written in the background contain the state at which they began, and appear atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed_kit import load, make_rows, run_in_ranks, take_step
from learner_kit import ToyPolicy, build_model, run_episode

from deskrl.core.config import LearnerConfig
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.checkpoint import checkpoint_writer
from deskrl.learner.checkpoint.checkpoint_files import CheckpointStore
from deskrl.learner.checkpoint.checkpoint_writer import CheckpointWriter
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_model(tmp_path / "model")


class Training:
    """Engine trained on the imitation loss, with a checkpoint writer."""

    def __init__(self, folder: Path, settings: dict[str, Any], checkpoints: str = "checkpoints") -> None:
        policy, collator = load(folder)
        config = LearnerConfig.model_validate({"dtype": "float32", "grpo": {"learning_rate": 1e-2}} | settings)
        self.engine = DeepSpeedEngine(policy, config)
        self.loader = MicroBatchLoader(collator, self.engine.rank, self.engine.world_size, 64, lambda: None)
        self.shard = self.loader.shard(
            make_rows([run_episode(ToyPolicy(folder), "red", 0), run_episode(ToyPolicy(folder), "blue", 1)])
        )
        self.store = CheckpointStore(folder.parent / checkpoints, folder, {})
        self.store.folder.mkdir(exist_ok=True)
        self.writer = CheckpointWriter(self.store, self.engine, keep=2)

    def step(self) -> float:
        """Take one optimizer step; return the gradient norm, which depends on the state before the step."""
        return take_step(self.engine, self.loader, self.shard).gradient_norm


def checkpoint_while_training(folder: Path, cases: list[dict[str, Any]]) -> None:
    """In each rank: checkpoint between two steps, then compare the following steps with those after restoring it."""
    for number, settings in enumerate(cases):
        training = Training(folder, settings, f"checkpoints-{number}")
        training.step()
        training.writer.begin("epoch_1", 1, {"at": "one"})
        after_one = [training.step() for _ in range(3)]
        assert training.writer.finish()
        training.engine.barrier()  # rank 0 has renamed the folder
        checkpoint = training.store.newest()
        assert checkpoint is not None and checkpoint.state == {"at": "one"}
        training.store.load(checkpoint, training.engine)
        assert [training.step() for _ in range(3)] == after_one, settings
        training.writer.close()
    training.engine.close()


def test_a_checkpoint_contains_the_state_at_which_it_began_although_training_continues(folder: Path) -> None:
    run_in_ranks(checkpoint_while_training, 1, folder, [{"zero_stage": 0}, {}, {"dtype": "bfloat16"}])


def test_ranks_write_their_parts_of_the_same_state(folder: Path) -> None:
    run_in_ranks(
        checkpoint_while_training, 2, folder, [{"zero_stage": 2, "offload_optimizer": True}, {"zero_stage": 3}]
    )


def checkpoint_without_memory(folder: Path) -> None:
    """Write a checkpoint on a machine without memory for a copy."""
    checkpoint_writer.available_bytes = lambda: 1000
    training = Training(folder, {})
    training.writer.begin("epoch_1", 1, {})
    assert (training.store.folder / "latest" / "learner.json").exists(), (
        "the checkpoint must be written before begin returns"
    )
    assert training.writer.finish(wait=False)
    training.engine.close()


def test_training_waits_for_a_checkpoint_whose_copy_does_not_fit_into_memory(folder: Path) -> None:
    log = run_in_ranks(checkpoint_without_memory, 1, folder)
    assert "training waits until checkpoint epoch_1 is written: its copy needs" in log
