"""ZeRO 3: sharded parameters can be gathered at any time between forward passes."""

from __future__ import annotations

from pathlib import Path

from deepspeed_kit import load, make_rows, run_in_ranks, sharding_as_of_a_large_model, take_step
from learner_kit import ToyPolicy, build_model, run_episode

from deskrl.core.config import LearnerConfig
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.state_dict_names import unsharded_shape


def gather_after_scoring(folder: Path) -> None:
    """In each rank: train, score a canary and gather all parameters, in the order of the learner."""
    policy, collator = load(folder)
    with sharding_as_of_a_large_model():
        engine = DeepSpeedEngine(policy, LearnerConfig.model_validate({"dtype": "float32", "zero_stage": 3}))
    loader = MicroBatchLoader(collator, engine.rank, engine.world_size, 64, lambda: None)
    episode = run_episode(ToyPolicy(folder), "red", 0)
    shard = loader.shard(make_rows([episode, run_episode(ToyPolicy(folder), "blue", 1)]))

    canary = collator.collate(make_rows([episode])[:1])
    for _ in range(2):
        take_step(engine, loader, shard)
        for batch in loader.load(shard):
            engine.score(batch, 1.0)
        engine.score(canary, 1.0)
        for name, tensor in engine.checkpoint_parameters().items():
            with engine.gathered([tensor]):
                assert tensor.shape == unsharded_shape(tensor), name
    engine.close()


def test_parameters_are_gathered_although_the_last_forward_pass_has_prefetched_some(tmp_path: Path) -> None:
    run_in_ranks(gather_after_scoring, 2, build_model(tmp_path / "model"))
