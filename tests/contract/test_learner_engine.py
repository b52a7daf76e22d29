"""DeepSpeed engine: loss and gradients do not depend on packing, micro-batches, ZeRO stage or number of ranks."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_kit import SHOTS, Episode, load, make_rows, run_in_ranks, take_step
from learner_kit import SIZE, ToyPolicy, build_model, demonstrate, run_conversation, run_episode
from torch import Tensor

from deskrl.core.config import AgentConfig, GrpoConfig, LearnerConfig
from deskrl.core.ids import image_hash
from deskrl.core.prompt_rendering import read_image_sizing
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row, micro_batches, pack
from deskrl.learner.episode_types import Trajectory
from deskrl.learner.loss_interface import LossInputs
from deskrl.learner.losses import gspo_loss, imitation_loss
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.warm_start import demonstration, image_sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def toy(folder: Path) -> ToyPolicy:
    return ToyPolicy(folder)


@pytest.fixture(scope="module")
def episodes(toy: ToyPolicy) -> list[Episode]:
    """Episodes of three steps, sampled from the untrained model with transformers' own forward pass."""
    return [run_episode(toy, task_id, seed) for seed, task_id in enumerate(["red", "green", "blue", "grey", "red"])]


def gradients(folder: Path, rows: Sequence[Row], max_tokens: int) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one pass over rows, without an engine."""
    policy, collator = load(folder)
    total = 0.0
    for batch in micro_batches([len(row.token_ids) for row in rows], max_tokens):
        micro = collator.collate([rows[index] for index in batch])
        loss = imitation_loss(policy(micro, 0.7).logprobs_N, 10.0)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_packed_and_unpacked_rows_give_the_same_loss_and_gradients(folder: Path, episodes: list[Episode]) -> None:
    packed, unpacked = make_rows(episodes), make_rows(episodes, share=False)
    assert len(packed) == 5
    assert len(unpacked) == 15
    loss, gradient = gradients(folder, packed, max_tokens=4096)
    other_loss, other_gradient = gradients(folder, unpacked, max_tokens=4096)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert gradient.keys() == other_gradient.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(value, other_gradient[name], rtol=1e-4, atol=1e-6)


def test_the_micro_batch_size_does_not_change_loss_and_gradients(folder: Path, episodes: list[Episode]) -> None:
    rows = make_rows(episodes)
    loss, gradient = gradients(folder, rows, max_tokens=4096)
    other_loss, other_gradient = gradients(folder, rows, max_tokens=1)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for name, value in gradient.items():
        torch.testing.assert_close(value, other_gradient[name], rtol=1e-4, atol=1e-6)


def test_turns_and_their_loss_do_not_depend_on_packing_and_micro_batches(folder: Path, episodes: list[Episode]) -> None:
    """GSPO's ratios are those of whole turns; the proximal policy is one that differs from token to token."""

    def losses(rows: Sequence[Row], max_tokens: int) -> tuple[float, list[int]]:
        policy, collator = load(folder)
        total, lengths = 0.0, []
        for batch in micro_batches([len(row.token_ids) for row in rows], max_tokens):
            micro = collator.collate([rows[index] for index in batch])
            with torch.no_grad():
                logprobs_N = policy(micro, 0.7).logprobs_N
            inputs = LossInputs(
                logprobs_N=logprobs_N,
                prox_logprobs_N=logprobs_N - 0.1 * micro.target_N.sin(),
                behaviour_logprobs_N=micro.behaviour_logprobs_N,
                advantages_N=torch.ones_like(logprobs_N),
                entropy_N=torch.zeros_like(logprobs_N),
                from_buffer_N=micro.trajectory_N > 2,
                turn_N=micro.turn_N,
                denominators_N=torch.full_like(logprobs_N, 8.0),
            )
            result = gspo_loss(inputs, GrpoConfig(), clip_low=0.02, clip_high=0.02)
            total += float(result.loss)
            lengths += micro.turn_N.bincount().tolist()
        return total, sorted(lengths)

    packed, unpacked = make_rows(episodes), make_rows(episodes, share=False)
    expected, lengths = losses(unpacked, 4096)
    assert lengths == sorted(len(step.action_ids) for steps, _, _ in episodes for step in steps)
    for rows, max_tokens in ((packed, 4096), (packed, 1), (unpacked, 1)):
        loss, same_lengths = losses(rows, max_tokens)
        assert loss == pytest.approx(expected, rel=1e-5) and same_lengths == lengths


def test_the_learner_reproduces_the_logprobs_of_sampled_tokens(folder: Path, episodes: list[Episode]) -> None:
    policy, collator = load(folder)
    micro = collator.collate(make_rows(episodes))
    with torch.no_grad():
        logprobs_N, entropy_N = policy(micro, 1.0)
    torch.testing.assert_close(logprobs_N, micro.behaviour_logprobs_N, rtol=0, atol=1e-5)
    assert bool((entropy_N > 0).all())


@pytest.mark.parametrize(("context", "num_rows"), [("window", 6), ("segment", 3), ("episode", 1)])
def test_the_learner_reproduces_the_logprobs_of_every_context_from_the_images_of_the_rollout(
    folder: Path, toy: ToyPolicy, context: str, num_rows: int
) -> None:
    agent = {"context": context, "window_images": 3, "segment_images": (2, 4), "prompt": "brief"}
    episode = run_conversation(toy, AgentConfig.model_validate(agent), num_steps=8)
    rows = make_rows([episode])
    assert len(rows) == num_rows
    steps = {step.index: step for step in episode[0]}
    for row in rows:
        last = steps[row.first_step + len(row.turn_lengths) - 1]
        assert row.images == last.images and row.token_ids == (*last.prompt_ids, *last.action_ids)
    policy, collator = load(folder)
    micro = collator.collate(rows)
    with torch.no_grad():
        logprobs_N = policy(micro, 1.0).logprobs_N
    torch.testing.assert_close(logprobs_N, micro.behaviour_logprobs_N, rtol=0, atol=1e-5)


def test_suppressed_tokens_have_zero_probability_and_temperature_divides_the_logits(
    folder: Path, episodes: list[Episode], toy: ToyPolicy
) -> None:
    policy, collator = load(folder)
    row = make_rows(episodes)[0]
    micro = collator.collate([row])
    with torch.no_grad():
        at_half = policy(micro, 0.5).logprobs_N
    images = [SHOTS[name] for name in row.images]
    unscaled = toy.logprobs(row.token_ids, images)[[target - 1 for target in row.targets]]
    expected = (
        (unscaled / 0.5).log_softmax(-1).gather(1, torch.tensor([row.token_ids[t] for t in row.targets])[:, None])
    )
    torch.testing.assert_close(at_half, expected[:, 0], rtol=0, atol=1e-5)


def test_the_entropy_has_a_gradient_if_it_is_asked_for(folder: Path, episodes: list[Episode]) -> None:
    policy, collator = load(folder)
    micro = collator.collate(make_rows(episodes)[:1])
    logprobs_N, entropy_N = policy(micro, 0.7, entropy_gradient=True)
    plain = policy(micro, 0.7)
    assert not plain.entropy_N.requires_grad and logprobs_N.equal(plain.logprobs_N)
    torch.testing.assert_close(entropy_N.detach(), plain.entropy_N, rtol=1e-5, atol=1e-6)
    torch.autograd.backward(entropy_N.sum())
    gradients = {name: it.grad for name, it in policy.named_parameters() if it.grad is not None}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in gradients:
                parameter += 1e-3 * gradients[name] / torch.nn.utils.get_total_norm(gradients.values())
        assert float(policy(micro, 0.7).entropy_N.sum()) > float(plain.entropy_N.sum())


def test_a_number_of_image_tokens_that_does_not_match_the_screenshots_is_an_error(
    folder: Path, episodes: list[Episode]
) -> None:
    _, collator = load(folder)
    row = make_rows(episodes)[0]
    image_token = next(token for token in row.token_ids if row.token_ids.count(token) >= 12)
    at = row.token_ids.index(image_token)
    truncated = Row(0, row.token_ids[:at] + row.token_ids[at + 1 :], row.images, (50,), (0.0,), (0,))
    with pytest.raises(RuntimeError, match="different processors"):
        collator.collate([truncated])


def test_a_demonstration_is_tokenized_as_the_policy_would_have_observed_and_sampled_it(
    folder: Path, toy: ToyPolicy
) -> None:
    steps, shots, reward = demonstrate("blue")
    sizes = image_sizes({image_hash(shot): shot for shot in shots})
    assert set(sizes.values()) == {SIZE}
    demo = demonstration(
        Trajectory("demo", "blue", reward, tuple(steps)), toy.tokenizer, read_image_sizing(folder), sizes
    )
    first, second = demo.steps
    assert toy.tokenizer.decode(first.action_ids) == "press blue<|im_end|>"
    sampled_prompt = list(first.prompt_ids) + list(first.action_ids)
    assert list(second.prompt_ids[: len(sampled_prompt)]) == sampled_prompt
    assert len(pack(0, demo.steps, [[0] * len(step.action_ids) for step in demo.steps])) == 1


def take_steps(folder: Path, cases: list[tuple[dict[str, Any], bool]], results_folder: Path) -> None:
    """In a child process: take an optimizer step with a new engine for each case, and write the results.

    Args:
        folder: model folder.
        cases: learner settings, and whether the gradient is to be NaN.
        results_folder: folder for one result file per rank.
    """
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed allows float16 on GPUs only, although it works on CPUs.
    get_accelerator().is_fp16_supported = lambda: True
    toy = ToyPolicy(folder)
    rows = make_rows([run_episode(toy, task_id, seed) for seed, task_id in enumerate(["red", "green", "blue"])])
    results = []
    for settings, has_nan in cases:
        policy, collator = load(folder)
        grpo = {"learning_rate": 1e-2}
        config = LearnerConfig.model_validate({"dtype": "float32", "grpo": grpo} | settings)
        engine = DeepSpeedEngine(policy.half() if config.dtype == "float16" else policy, config)
        loader = MicroBatchLoader(collator, engine.rank, engine.world_size, 64, lambda: None)
        shard = loader.shard(rows)
        denominator = math.nan if has_nan else 10.0
        outcome = take_step(engine, loader, shard, denominator)
        num_skipped = 0
        while engine.scales_loss and not outcome.applied and not has_nan:
            outcome = take_step(engine, loader, shard, denominator)
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
    """Return the results of all cases for each rank."""
    with tempfile.TemporaryDirectory() as results:
        run_in_ranks(take_steps, num_ranks, folder, cases, Path(results))
        return [json.loads(path.read_text()) for path in sorted(Path(results).glob("rank-*.json"))]


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> list[dict[str, Any]]:
    """Results of one rank: a normal step, then steps with a NaN gradient under ZeRO 0 and 1."""
    return run_steps(folder, 1, [({}, False), ({"zero_stage": 0}, True), ({}, True)])[0]


def test_two_ranks_take_the_same_step_as_one_under_every_zero_stage(
    folder: Path, one_rank: list[dict[str, Any]]
) -> None:
    offloaded = [{"zero_stage": stage, "offload_optimizer": True} for stage in (1, 2)]
    ranks = run_steps(
        folder, 2, [(settings, False) for settings in [*({"zero_stage": n} for n in range(4)), *offloaded]]
    )
    assert len(ranks) == 2
    for result in (result for rank in ranks for result in rank):
        assert result["applied"]
        assert result["norm"] == pytest.approx(one_rank[0]["norm"], rel=1e-4)
        assert result["probe"] == pytest.approx(one_rank[0]["probe"], rel=1e-3, abs=1e-5)


def test_the_gradient_in_bfloat16_is_nearly_the_same(folder: Path, one_rank: list[dict[str, Any]]) -> None:
    settings = [{"dtype": "bfloat16", "zero_stage": stage} for stage in (1, 2, 3)]
    for result in run_steps(folder, 1, [(setting, False) for setting in settings])[0]:
        assert result["applied"]
        assert result["norm"] == pytest.approx(one_rank[0]["norm"], rel=0.05)


def test_float16_lowers_the_loss_scale_until_the_gradient_fits_and_takes_the_same_step(
    folder: Path, one_rank: list[dict[str, Any]]
) -> None:
    cases: list[tuple[dict[str, Any], bool]] = [({"dtype": "float16", "zero_stage": stage}, False) for stage in (1, 2)]
    *results, has_nan = run_steps(folder, 1, [*cases, ({"dtype": "float16"}, True)])[0]
    for result in results:
        assert result["applied"] and result["num_skipped"] < 4
        assert result["norm"] == pytest.approx(one_rank[0]["norm"], rel=0.01)
        assert result["probe"] == pytest.approx(one_rank[0]["probe"], rel=0.05, abs=1e-3)
    assert not has_nan["applied"]


def test_tensor_names_are_those_of_the_model_folder(folder: Path, one_rank: list[dict[str, Any]]) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert one_rank[0]["names"] == sorted(file.keys())


def test_a_gradient_that_is_not_finite_leaves_the_weights_unchanged(
    folder: Path, one_rank: list[dict[str, Any]]
) -> None:
    policy, _ = load(folder)
    untouched = policy.model.model.language_model.layers[0].mlp.up_proj.weight.flatten()[:64].tolist()
    for has_nan in one_rank[1:]:
        assert not has_nan["applied"]
        assert has_nan["probe"] == untouched
    assert one_rank[0]["probe"] != untouched
