"""ZeRO 3: parameters are gathered between forward passes at any time, and whatever activations are kept."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from deepspeed_kit import load, make_rows, run_in_ranks, sharding_as_of_a_large_model, take_step
from learner_kit import ToyPolicy, build_model, run_episode
from torch import Tensor

from deskrl.core.config import LearnerConfig
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy import activation_checkpointing
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.state_dict_names import unsharded_shape


def load_sharded(folder: Path, **settings: Any) -> tuple[DeepSpeedEngine, MicroBatchLoader]:
    """Return an engine that releases every parameter after use, and its loader."""
    policy, collator = load(folder)
    config = LearnerConfig.model_validate({"dtype": "float32", "zero_stage": 3, **settings})
    if config.has_lora:
        policy.add_adapter(config.lora, seed=0)
    for part in (policy.architecture.language_model, policy.architecture.vision_tower):
        activation_checkpointing.enable(part(policy.model), config.activation_checkpointing)
    with sharding_as_of_a_large_model():
        engine = DeepSpeedEngine(policy, config)
    return engine, MicroBatchLoader(collator, engine.rank, engine.world_size, 64, lambda: None)


@cache
def sample_rows(folder: Path) -> list[Row]:
    return make_rows([run_episode(ToyPolicy(folder), "red", 0), run_episode(ToyPolicy(folder), "blue", 1)])


def gather_after_scoring(folder: Path) -> None:
    """In each rank: train, score a canary and gather all parameters, in the order of the learner."""
    engine, loader = load_sharded(folder)
    rows = sample_rows(folder)
    shard = loader.shard(rows)
    canary = next(iter(loader.load([rows[:1]])))
    for _ in range(2):
        take_step(engine, loader, shard)
        for batch in loader.load(shard):
            engine.score(batch, 1.0)
        engine.score(canary, 1.0)
        for name, tensor in engine.checkpoint_parameters().items():
            with engine.gathered([tensor]):
                assert tensor.shape == unsharded_shape(tensor), name
    engine.close()


def loss_and_gradients(folder: Path, settings: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Return this rank's loss, and the gradients of all ranks, after an optimizer step."""
    engine, loader = load_sharded(folder, **settings)
    shard = loader.shard(sample_rows(folder))
    take_step(engine, loader, shard)
    total = 0.0
    with engine.accumulate_gradients(len(shard)):
        for micro in loader.load(shard):
            loss = imitation_loss(engine.forward(micro, temperature=1.0).logprobs_N, 10.0)
            engine.backward(loss)
            total += float(loss.detach())
    trained = {name: it for name, it in engine.policy.named_parameters() if it.requires_grad}
    return total, {name: safe_get_full_grad(it) for name, it in trained.items()}


def compare_kept_activations(folder: Path) -> None:
    """In each rank, with and without LoRA: compare the modes of activation checkpointing."""
    for lora in ({"rank": 0}, {"rank": 4, "vision_targets": ["qkv", "proj"]}):
        expected_loss, expected = loss_and_gradients(folder, {"lora": lora})
        for mode in ("selective", "full"):
            loss, gradients = loss_and_gradients(folder, {"lora": lora, "activation_checkpointing": mode})
            assert loss == pytest.approx(expected_loss, rel=1e-6), (lora, mode)
            torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    torch.distributed.destroy_process_group()


def test_parameters_are_gathered_although_the_last_forward_pass_has_prefetched_some(tmp_path: Path) -> None:
    run_in_ranks(gather_after_scoring, 2, build_model(tmp_path / "model"))


def test_activation_checkpointing_of_sharded_parameters_changes_neither_losses_nor_gradients(tmp_path: Path) -> None:
    run_in_ranks(compare_kept_activations, 2, build_model(tmp_path / "model"))
