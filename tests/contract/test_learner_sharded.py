"""Parameters that are sharded over ranks (ZeRO 3), between the forward passes that gather them for themselves."""

from __future__ import annotations

from pathlib import Path

from engine_kit import in_ranks, learn, load, rows_of
from learner_kit import ToyPolicy, build_model, play

from deskrl.core.config import LearnerConfig
from deskrl.learner.batches.feed import Feed
from deskrl.learner.policy import engine as engine_module
from deskrl.learner.policy.checkpoint_names import whole_shape
from deskrl.learner.policy.engine import Engine


def gather_after_scoring(folder: Path) -> None:
    """In each rank: as a learner does that learns, scores its canary and publishes."""
    policy, collator = load(folder)
    # As with a large model: nothing stays, and what comes next is fetched ahead in small portions.
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0} | {
        "stage3_max_live_parameters": 200_000,
        "stage3_prefetch_bucket_size": 100_000,
    }
    whole = engine_module._deepspeed_config
    engine_module._deepspeed_config = lambda config: {
        **whole(config),
        "zero_optimization": whole(config)["zero_optimization"] | zero,
    }
    engine = Engine(policy, LearnerConfig.model_validate({"dtype": "float32", "zero_stage": 3}))
    feed = Feed(collator, engine.rank, engine.world_size, 64, lambda: None)
    episode = play(ToyPolicy(folder), "red", 0)
    share = feed.share(rows_of([episode, play(ToyPolicy(folder), "blue", 1)]))

    canary = collator.collate(rows_of([episode])[:1])
    for _ in range(2):
        learn(engine, feed, share)
        for batch in feed.batches(share):
            engine.score(batch, 1.0)
        engine.score(canary, 1.0)
        for name, tensor in engine.checkpoint_parameters().items():
            with engine.gathered([tensor]):
                assert tensor.shape == whole_shape(tensor), name
    engine.close()


def test_they_are_gathered_whole_whatever_the_last_forward_pass_fetched_ahead(tmp_path: Path) -> None:
    in_ranks(gather_after_scoring, 2, build_model(tmp_path / "model"))
