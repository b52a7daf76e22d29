"""The engine and the forward pass: the same loss and gradients however the work is packed, cut or shared out."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import SHOTS, Episode, in_ranks, learn, load, rows_of
from learner_kit import SIZE, ToyPolicy, build_model, demonstrate, play
from torch import Tensor

from deskrl.core.config import LearnerConfig
from deskrl.core.ids import image_hash
from deskrl.core.rendering import image_sizing_of
from deskrl.learner.batches.feed import Feed
from deskrl.learner.batches.packing import Row, micro_batches, pack
from deskrl.learner.imitation import demonstration, image_sizes
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy.engine import Engine
from deskrl.learner.trajectories import Trajectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def toy(folder: Path) -> ToyPolicy:
    return ToyPolicy(folder)


@pytest.fixture(scope="module")
def episodes(toy: ToyPolicy) -> list[Episode]:
    """Sampled by transformers' own forward pass from the untrained model; three steps, three screenshots each."""
    return [play(toy, task_id, seed) for seed, task_id in enumerate(["red", "green", "blue", "grey", "red"])]


def gradients(folder: Path, rows: Sequence[Row], max_tokens: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one pass over rows, without any engine."""
    policy, collator = load(folder)
    total = 0.0
    for batch in micro_batches([len(row.token_ids) for row in rows], max_tokens):
        micro = collator.collate([rows[index] for index in batch])
        loss = imitation_loss(policy(micro, 0.7).logprobs_N, 10.0)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_packed_and_unpacked_give_the_same_loss_and_gradients(folder: Path, episodes: list[Episode]) -> None:
    packed, unpacked = rows_of(episodes), rows_of(episodes, share=False)
    assert len(packed) == 5
    assert len(unpacked) == 15
    loss, gradient = gradients(folder, packed, max_tokens=4096)
    other_loss, other_gradient = gradients(folder, unpacked, max_tokens=4096)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert gradient.keys() == other_gradient.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(value, other_gradient[name], rtol=1e-4, atol=1e-6)


def test_the_token_budget_changes_nothing_but_the_work(folder: Path, episodes: list[Episode]) -> None:
    rows = rows_of(episodes)
    loss, gradient = gradients(folder, rows, max_tokens=4096)
    other_loss, other_gradient = gradients(folder, rows, max_tokens=1)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for name, value in gradient.items():
        torch.testing.assert_close(value, other_gradient[name], rtol=1e-4, atol=1e-6)


def test_the_learner_gives_sampled_tokens_the_logprobs_that_they_were_sampled_with(
    folder: Path, episodes: list[Episode]
) -> None:
    policy, collator = load(folder)
    micro = collator.collate(rows_of(episodes))
    with torch.no_grad():
        logprobs_N, entropy_N = policy(micro, 1.0)
    torch.testing.assert_close(logprobs_N, micro.behaviour_logprobs_N, rtol=0, atol=1e-5)
    assert bool((entropy_N > 0).all())


def test_suppressed_tokens_have_no_probability_and_temperature_divides_the_logits(
    folder: Path, episodes: list[Episode], toy: ToyPolicy
) -> None:
    policy, collator = load(folder)
    row = rows_of(episodes)[0]
    micro = collator.collate([row])
    with torch.no_grad():
        at_half = policy(micro, 0.5).logprobs_N
    images = [SHOTS[name] for name in row.images]
    unscaled = toy.logprobs(row.token_ids, images)[[target - 1 for target in row.targets]]
    expected = (
        (unscaled / 0.5).log_softmax(-1).gather(1, torch.tensor([row.token_ids[t] for t in row.targets])[:, None])
    )
    torch.testing.assert_close(at_half, expected[:, 0], rtol=0, atol=1e-5)


def test_another_number_of_image_tokens_than_the_screenshots_make_is_a_loud_error(
    folder: Path, episodes: list[Episode]
) -> None:
    _, collator = load(folder)
    row = rows_of(episodes)[0]
    image_token = next(token for token in row.token_ids if row.token_ids.count(token) >= 12)
    at = row.token_ids.index(image_token)
    torn = Row(0, row.token_ids[:at] + row.token_ids[at + 1 :], row.images, (50,), (0.0,), (0,))
    with pytest.raises(RuntimeError, match="different processors"):
        collator.collate([torn])


def test_a_demonstration_becomes_the_ids_that_the_policy_would_have_seen_and_sampled(
    folder: Path, toy: ToyPolicy
) -> None:
    steps, shots, reward = demonstrate("blue")
    sizes = image_sizes({image_hash(shot): shot for shot in shots})
    assert set(sizes.values()) == {SIZE}
    demo = demonstration(
        Trajectory("demo", "blue", reward, tuple(steps)), toy.tokenizer, image_sizing_of(folder), sizes
    )
    first, second = demo.steps
    assert toy.tokenizer.decode(first.action_ids) == "press blue<|im_end|>"
    sampled_prompt = list(first.prompt_ids) + list(first.action_ids)
    assert list(second.prompt_ids[: len(sampled_prompt)]) == sampled_prompt
    assert len(pack(0, demo.steps, [[0] * len(step.action_ids) for step in demo.steps])) == 1


def take_steps(folder: Path, cases: list[tuple[dict[str, Any], bool]], results_folder: Path) -> None:
    """In a child process: for each (settings, spoilt), a fresh engine's optimizer step; writes what came of it."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed has float16 on GPUs only; what it does there is the same arithmetic.
    get_accelerator().is_fp16_supported = lambda: True
    toy = ToyPolicy(folder)
    rows = rows_of([play(toy, task_id, seed) for seed, task_id in enumerate(["red", "green", "blue"])])
    results = []
    for settings, spoilt in cases:
        policy, collator = load(folder)
        grpo = {"learning_rate": 1e-2}
        config = LearnerConfig.model_validate({"dtype": "float32", "grpo": grpo} | settings)
        engine = Engine(policy.half() if config.dtype == "float16" else policy, config)
        feed = Feed(collator, engine.rank, engine.world_size, 64, lambda: None)
        share = feed.share(rows)
        denominator = math.nan if spoilt else 10.0
        outcome = learn(engine, feed, share, denominator)
        num_skipped = 0
        while engine.scales_loss and not outcome.applied and not spoilt:
            outcome = learn(engine, feed, share, denominator)
            num_skipped += 1
        weights = engine.checkpoint_parameters()
        probed = weights["model.layers.0.mlp.up_proj.weight"]
        with engine.gathered([probed]):
            probe = probed.flatten()[:64].tolist()
        results.append(
            {
                "applied": outcome.applied,
                "num_skipped": num_skipped,
                "norm": outcome.gradient_norm,
                "probe": probe,
                "names": sorted(weights),
            }
        )
    (results_folder / f"rank-{engine.rank}.json").write_text(json.dumps(results))
    engine.close()


def run_steps(folder: Path, num_ranks: int, cases: list[tuple[dict[str, Any], bool]]) -> list[list[dict[str, Any]]]:
    """For each rank, the result of each case."""
    with tempfile.TemporaryDirectory() as results:
        in_ranks(take_steps, num_ranks, folder, cases, Path(results))
        return [json.loads(path.read_text()) for path in sorted(Path(results).glob("rank-*.json"))]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """One rank: a good step, then steps from a gradient that is not a number, under ZeRO 0 and 1."""
    return run_steps(folder, 1, [({}, False), ({"zero_stage": 0}, True), ({}, True)])[0]


def test_two_ranks_take_the_same_step_as_one_under_every_zero_stage(folder: Path, alone: list[dict[str, Any]]) -> None:
    offloaded = [{"zero_stage": stage, "offload_optimizer": True} for stage in (1, 2)]
    ranks = run_steps(
        folder, 2, [(settings, False) for settings in [*({"zero_stage": n} for n in range(4)), *offloaded]]
    )
    assert len(ranks) == 2
    for result in (result for rank in ranks for result in rank):
        assert result["applied"]
        assert result["norm"] == pytest.approx(alone[0]["norm"], rel=1e-4)
        assert result["probe"] == pytest.approx(alone[0]["probe"], rel=1e-3, abs=1e-5)


def test_bfloat16_learns_from_nearly_the_same_gradient(folder: Path, alone: list[dict[str, Any]]) -> None:
    settings = [{"dtype": "bfloat16", "zero_stage": stage} for stage in (1, 2, 3)]
    for result in run_steps(folder, 1, [(setting, False) for setting in settings])[0]:
        assert result["applied"]
        assert result["norm"] == pytest.approx(alone[0]["norm"], rel=0.05)


def test_float16_scales_the_loss_until_the_gradient_fits_and_learns_the_same(
    folder: Path, alone: list[dict[str, Any]]
) -> None:
    cases: list[tuple[dict[str, Any], bool]] = [({"dtype": "float16", "zero_stage": stage}, False) for stage in (1, 2)]
    *results, spoilt = run_steps(folder, 1, [*cases, ({"dtype": "float16"}, True)])[0]
    for result in results:
        assert result["applied"] and result["num_skipped"] < 4
        assert result["norm"] == pytest.approx(alone[0]["norm"], rel=0.01)
        assert result["probe"] == pytest.approx(alone[0]["probe"], rel=0.05, abs=1e-3)
    assert not spoilt["applied"]


def test_published_names_are_those_of_the_model_folder(folder: Path, alone: list[dict[str, Any]]) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert alone[0]["names"] == sorted(file.keys())


def test_a_gradient_that_is_not_finite_changes_nothing(folder: Path, alone: list[dict[str, Any]]) -> None:
    policy, _ = load(folder)
    untouched = policy.model.model.language_model.layers[0].mlp.up_proj.weight.flatten()[:64].tolist()
    for spoilt in alone[1:]:
        assert not spoilt["applied"]
        assert spoilt["probe"] == untouched
    assert alone[0]["probe"] != untouched
