"""Helpers for tests of LoRA: a model with padded layers, and training in ranks with checkpoints of the adapter."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed_kit import load, make_rows, sharding_as_of_a_large_model, take_step
from learner_kit import ToyPolicy, build_model, run_episode
from safetensors.torch import load_file, save_file
from torch import Tensor

from deskrl.core.config import LearnerConfig, LoraConfig
from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row
from deskrl.learner.checkpoint.checkpoint_files import CheckpointStore
from deskrl.learner.checkpoint.checkpoint_writer import CheckpointWriter
from deskrl.learner.checkpoint.merge_adapter import merge_adapter
from deskrl.learner.policy import activation_checkpointing, lora
from deskrl.learner.policy.architectures.qwen2_vl import Qwen25VLLearner
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.state_dict_names import checkpoint_tensors
from deskrl.models.model_checks import check_complete

BOTH = LoraConfig(rank=4, alpha=6.0, vision_targets=("qkv", "proj", "gate_proj", "down_proj", "mlp.0"))
"""Adapters in both parts of the model, also in layers that are padded."""
NUM_LAYERS = 4 * 7 + 2 * 4 + 1
"""Number of layers with an adapter."""


def build_padded_model(folder: Path) -> Path:
    """Build a model whose vision tower has MLPs that are padded; return its folder."""
    vision = {**Qwen25VLLearner._tiny_vision, "intermediate_size": 240}
    with patch.object(Qwen25VLLearner, "_tiny_vision", vision):
        return build_model(folder)


@cache
def sample_rows(folder: Path) -> list[Row]:
    return make_rows([run_episode(ToyPolicy(folder), "red", 0), run_episode(ToyPolicy(folder), "blue", 1)])


class Training:
    """Engine that trains an adapter on the imitation loss; under ZeRO 3 it releases every parameter after use."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        policy, collator = load(folder)
        grpo = {"learning_rate": 1e-2, "weight_decay": 0.0}
        config = LearnerConfig.model_validate({"dtype": "float32", "grpo": grpo, "lora": BOTH.model_dump()} | settings)
        policy = policy.to(getattr(torch, config.dtype))
        policy.add_adapter(config.lora, seed=0)
        part = policy.architecture
        for model in (part.language_model(policy.model), part.vision_tower(policy.model)):
            activation_checkpointing.enable(model, config.activation_checkpointing)
        with sharding_as_of_a_large_model():
            self.engine = DeepSpeedEngine(policy, config)
        self.loader = MicroBatchLoader(collator, self.engine.rank, self.engine.world_size, 64, lambda: None)
        self.probe = collator.collate(sample_rows(folder))
        self.shard = self.loader.shard(sample_rows(folder))

    def step(self) -> float:
        return take_step(self.engine, self.loader, self.shard).gradient_norm

    def score(self) -> Tensor:
        return self.engine.score(self.probe, 1.0).logprobs_N.cpu()


def train_and_resume(folder: Path, cases: list[dict[str, Any]], results: Path) -> None:
    """In each rank and case: train, checkpoint, train on, and repeat from the checkpoint with a new engine.

    The learner's logprobs are compared with those of the weights that it publishes.
    """
    for number, settings in enumerate(cases):
        store = CheckpointStore(results / f"checkpoints-{number}", folder, {"learner.lora.rank": 4})
        store.folder.mkdir(exist_ok=True)
        training = Training(folder, settings)
        engine = training.engine
        norms = [training.step() for _ in range(2)]
        writer = CheckpointWriter(store, engine, keep=1)
        writer.begin("epoch_1", 1, {})
        weights = engine.weights()
        assert engine.policy.adapter is not None
        with engine.policy.adapter.disabled():
            initial = training.score()
        at_checkpoint = training.score()
        if engine.rank == 0:
            assert torch.equal(at_checkpoint, served_logprobs(folder, weights, training.probe)), settings
        after = [training.step() for _ in range(2)]
        assert writer.finish()
        engine.barrier()
        resumed = Training(folder, settings)
        assert torch.equal(resumed.score(), initial), settings
        checkpoint = store.newest()
        assert checkpoint is not None
        store.load(checkpoint, resumed.engine)
        assert torch.equal(resumed.score(), at_checkpoint), settings
        assert [resumed.step() for _ in range(2)] == after, settings
        if engine.rank == 0:
            save_file(weights, results / f"weights-{number}.safetensors")
            (results / f"norms-{number}.json").write_text(json.dumps([*norms, *after]))
        writer.close()
    engine.close()


def served_logprobs(folder: Path, weights: dict[str, Tensor], probe: MicroBatch) -> Tensor:
    """Return logprobs of a model without adapters that has the published weights."""
    policy, _ = load(folder)
    policy.to(next(iter(weights.values())).dtype)
    for name, tensor in checkpoint_tensors(policy.model).items():
        tensor.data.copy_(weights[name])
    with torch.no_grad():
        logprobs_N: Tensor = policy(probe, 1.0).logprobs_N
    return logprobs_N


def check_results(folder: Path, results: Path, num_cases: int) -> list[list[float]]:
    """Check the checkpoints of `train_and_resume`; return the gradient norms of each case."""
    for number in range(num_cases):
        checkpoint = next((results / f"checkpoints-{number}").glob("epoch_*"))
        names = {path.name for path in checkpoint.iterdir()}
        assert {lora.WEIGHTS, lora.CONFIG, "tokenizer.json"} < names and "model.safetensors" not in names
        adapter_bytes = (checkpoint / lora.WEIGHTS).stat().st_size
        engine_bytes = sum(path.stat().st_size for path in (checkpoint / "engine").rglob("*") if path.is_file())
        assert engine_bytes < 1.25 * 2 * adapter_bytes, "two moments for each master weight of the adapter"
        served = load_file(results / f"weights-{number}.safetensors")
        merge_adapter(checkpoint, results / f"merged-{number}")
        if next(iter(served.values())).dtype == torch.float32:
            check_complete(results / f"merged-{number}")
            merged = load_file(results / f"merged-{number}" / "model.safetensors")
            initial = load_file(folder / "model.safetensors")
            assert merged.keys() == served.keys() == initial.keys()
            assert all(torch.equal(merged[name], served[name]) for name in merged)
            changed = {name for name in initial if not torch.equal(initial[name], served[name])}
            assert len(changed) == NUM_LAYERS, changed
    return [json.loads((results / f"norms-{number}.json").read_text()) for number in range(num_cases)]
