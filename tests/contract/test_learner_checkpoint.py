"""Checkpoints written in the background contain the state at which they began, and appear atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed_kit import load, make_rows, run_in_ranks, take_step
from learner_kit import ToyPolicy, build_model, run_episode
from torch import Tensor

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
        if config.has_lora:
            policy.add_adapter(config.lora, seed=0)
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


SHARDED = [
    {"zero_stage": 1},
    {"zero_stage": 2, "dtype": "bfloat16"},
    {"zero_stage": 3},
    {"zero_stage": 3, "lora": {"rank": 2}},
]


def master_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Return the master weights of each trained parameter, which DeepSpeed gathers from all ranks."""
    parameters = engine.policy.named_parameters()
    return {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters if parameter.requires_grad}


def checkpoint_each(folder: Path) -> None:
    """In each rank: take a step in each case and write a checkpoint, the master weights, and the next two norms."""
    for number, settings in enumerate(SHARDED):
        training = Training(folder, settings, f"checkpoints-{number}")
        training.step()
        training.writer.begin("epoch_1", 1, {})
        assert training.writer.finish()
        weights = master_weights(training.engine)
        norms = [training.step() for _ in range(2)]  # the second one depends on the moments
        if training.engine.rank == 0:
            torch.save((weights, norms), folder.parent / f"expected-{number}")
        training.writer.close()
    training.engine.close()


def resume_each(folder: Path) -> None:
    """In each rank: resume in each case, and compare the master weights and the next two norms."""
    for number, settings in enumerate(SHARDED):
        training = Training(folder, settings, f"checkpoints-{number}")
        checkpoint = training.store.newest()
        assert checkpoint is not None
        training.store.load(checkpoint, training.engine)
        weights, norms = torch.load(folder.parent / f"expected-{number}")
        for name, found in master_weights(training.engine).items():
            assert found.equal(weights[name]), (settings, name)
        tolerance = 5e-2 if settings.get("dtype") == "bfloat16" else 1e-4
        assert [training.step() for _ in range(2)] == pytest.approx(norms, rel=tolerance), settings
        training.engine.barrier()
        assert [path.name for path in training.store.folder.glob(".*")] == []
        training.writer.close()
    training.engine.close()


def test_another_number_of_ranks_resumes_from_a_checkpoint_with_zero_1_to_3_and_lora(folder: Path) -> None:
    run_in_ranks(checkpoint_each, 2, folder)
    run_in_ranks(resume_each, 1, folder)
