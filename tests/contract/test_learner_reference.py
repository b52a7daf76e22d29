"""Reference policy: it stays what the policy was at first, and a KL penalty pulls the policy back to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_kit import load, make_rows, run_in_ranks, take_step
from learner_kit import ToyPolicy, build_model, run_episode

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.prompt_rendering import read_vocab_size, suppressed_ids
from deskrl.core.run_dir import RunDir
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.checkpoint.reference_record import check_reference, record_reference
from deskrl.learner.episode_types import Trajectory
from deskrl.learner.group_filter import FilteredGroup
from deskrl.learner.grpo import build_training_batch, update
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.policy_model import load_processor
from deskrl.learner.policy.reference_policy import build_reference

GRPO = {"learning_rate": 1e-3, "weight_decay": 0.0, "loss_denominator_tokens": 4, "kl_coefficient": 1.0}


def config_of(folder: Path, **learner: Any) -> RunConfig:
    """Return the configuration of a run with a KL penalty, and create its run directory."""
    tables = {"name": "kl", "runs": folder.parent, "model": {"path": folder}}
    config = RunConfig.model_validate({**tables, "learner": {"dtype": "float32", "grpo": GRPO, **learner}})
    RunDir(config.run_dir).create()
    return config


def measure(folder: Path, settings: list[dict[str, Any]], results: Path) -> None:
    """In each rank, with each of some settings: leave the reference, and train with nothing but a KL penalty."""
    toy = ToyPolicy(folder)
    episodes = [run_episode(toy, task_id, seed) for seed, task_id in enumerate(["red", "green"])]
    rows = make_rows(episodes)
    # Equal rewards: all advantages are 0.
    group = FilteredGroup("train/0", "task", tuple(Trajectory("e", "task", 1.0, tuple(it[0])) for it in episodes))
    suppressed = suppressed_ids(load_processor(folder).tokenizer, read_vocab_size(folder))
    measured = []
    for learner in settings:
        config = config_of(folder, **learner)
        batch = build_training_batch([group], lambda span: 0, config.learner.grpo)
        policy, collator = load(folder)
        if config.learner.has_lora:
            policy.add_adapter(config.learner.lora, seed=0)
        engine = DeepSpeedEngine(policy, config.learner)
        reference = build_reference(config, engine, suppressed)
        assert reference is not None
        loader = MicroBatchLoader(collator, engine.rank, engine.world_size, 64, lambda: None)
        shard = loader.shard(rows)
        first = torch.cat(reference.logprobs(loader.load(shard), 1.0))
        at_first = torch.cat([engine.score(micro, 1.0).logprobs_N for micro in loader.load(shard)])
        engine.set_optimizer(1e-3, 0.0)
        for _ in range(2):
            take_step(engine, loader, shard)
        kls = [update(engine, loader, batch, config.learner.grpo, 0, reference).kl for _ in range(3)]
        last = torch.cat(reference.logprobs(loader.load(shard), 1.0))
        measured.append({"starts": first.equal(at_first), "stays": first.equal(last), "kl": kls})
    if engine.rank == 0:
        results.write_text(json.dumps(measured))
    engine.close()


def test_the_reference_stays_and_the_penalty_pulls_the_policy_towards_it(tmp_path: Path) -> None:
    """With a copy of the reference, with shards of it in host memory, and with LoRA without a copy."""
    folder = build_model(tmp_path / "model")
    sharded = {"zero_stage": 3, "offload_reference": True}
    settings = [{"zero_stage": 1}, sharded, {"zero_stage": 2, "lora": {"rank": 2}}]
    run_in_ranks(measure, 1, folder, settings, tmp_path / "results.json")
    outcomes = json.loads((tmp_path / "results.json").read_text())
    assert len(outcomes) == len(settings)
    for outcome in outcomes:
        assert outcome["starts"] and outcome["stays"], outcomes
        first, second, third = outcome["kl"]
        assert first > second > third > 0, outcomes


def test_a_changed_reference_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model")
    config = config_of(folder)
    check_reference(config)
    record_reference(config)
    record_reference(config)
    build_model(folder, seed=1)
    for check in (check_reference, record_reference):
        with pytest.raises(UserError) as error:
            check(config)
        assert str(error.value).startswith(f"learner.grpo.kl_coefficient: the weights in {folder} are not those of")
    check_reference(config_of(folder, grpo={**GRPO, "kl_coefficient": 0.0}))


def test_a_reference_that_cannot_be_loaded_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    class Engine:
        rank = 1
        policy = type("Policy", (), {"adapter": None})()

    folder = build_model(tmp_path / "model")
    engine: Any = Engine()
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        build_reference(config_of(folder), engine, ())
    assert str(error.value).startswith("learner.grpo.kl_coefficient: the reference policy cannot be loaded: ")
    assert "model.safetensors" in str(error.value)
