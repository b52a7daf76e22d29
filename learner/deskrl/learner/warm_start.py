"""Warm start: imitates demonstrations (behaviour cloning) before reinforcement learning.

A demonstration carries its conversation, which is converted to the token ids that the policy would have seen and
sampled. Training on a task stops once the policy, sampled as in training, repeats the task's demonstrations with a
given probability: high enough to succeed now and then, low enough to leave room for reinforcement learning. Tasks
differ tenfold in the number of optimizer steps that this takes.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deskrl.core import ids
from deskrl.core.config import RunConfig, WarmStartConfig
from deskrl.core.group_outcome import is_success
from deskrl.core.prompt_rendering import ImageSizing, encode_action, expand_images, image_token_id, render_prompt
from deskrl.core.screenshot_png import open_screenshot
from deskrl.core.step_codec import Step
from deskrl.learner.batch_builder import collect_groups
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.components import Components
from deskrl.learner.curriculum import DEMO
from deskrl.learner.episode_types import Trajectory
from deskrl.learner.losses import imitation_loss
from deskrl.learner.metrics.update_stats import WarmStartReport
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine, StepOutcome
from deskrl.proto.v1 import inference_pb2

MEASURE_EVERY = 2
"""Optimizer steps between measurements of the likelihoods, which double with each step towards the end."""
PROBES_PER_TASK = 4
"""Demonstrations of each task that its likelihood is measured on."""
WARMUP_UPDATES = 10
"""Optimizer steps over which the learning rate rises linearly."""
NEAR_LIKELIHOOD = 1e-3
NEAR_SCALE = 0.3
"""Once a task reaches NEAR_LIKELIHOOD, the learning rate is multiplied by this: likelihoods double with every step by
then, and large steps towards some tasks undo others."""

_log = logging.getLogger(__name__)


def run_warm_start(components: Components, config: RunConfig, warm_start: WarmStartConfig) -> None:
    """Collect demonstrations of all tasks and train on them.

    Args:
        components: components of this rank.
        config: run configuration.
        warm_start: configuration of the warm start.
    """
    components.metrics.write_phase("demonstrations")
    demos = _collect_demonstrations(components, config.replay.success_threshold)
    components.metrics.write_phase("imitation")
    likelihood = 0.0
    temperature = config.learner.grpo.temperature
    for report in imitate(components.engine, components.loader, demos, warm_start, temperature, config.seed):
        if report.likelihoods is not None:
            likelihood = min(report.likelihoods.values())
            components.metrics.write_warm_start(report, likelihood)
    if likelihood < warm_start.stop_likelihood:
        _log.warning("the warm start ended at likelihood %.3f, below %.3f", likelihood, warm_start.stop_likelihood)


def demonstration(
    trajectory: Trajectory, tokenizer: Any, sizing: ImageSizing, sizes: Mapping[str, tuple[int, int]]
) -> Trajectory:
    """Return a scripted episode with the prompt and action ids that a sampled episode would have.

    Args:
        trajectory: scripted episode; its steps carry conversations that end with the text of the action.
        tokenizer: tokenizer of the model.
        sizing: image sizing of the model's processor.
        sizes: (width, height) of each screenshot in pixels, by hash.
    """

    def with_ids(step: Step) -> Step:
        messages = [inference_pb2.ChatMessage.FromString(message) for message in step.messages]
        prompt = render_prompt(messages[:-1], tokenizer)
        tokens_per_image = [sizing.num_tokens(*sizes[name]) for name in prompt.image_hashes]
        action_ids = encode_action("".join(content.text for content in messages[-1].contents), tokenizer)
        return replace(
            step,
            images=prompt.image_hashes,
            prompt_ids=tuple(expand_images(prompt.ids, image_token_id(tokenizer), tokens_per_image)),
            action_ids=tuple(action_ids),
            logprobs=(0.0,) * len(action_ids),
        )

    return replace(trajectory, steps=tuple(with_ids(step) for step in trajectory.steps))


def image_sizes(images: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
    """Return (width, height) in pixels of encoded screenshots."""
    sizes = {}
    for name, data in images.items():
        with open_screenshot(data) as picture:
            sizes[name] = picture.size
    return sizes


def imitate(
    engine: DeepSpeedEngine,
    loader: MicroBatchLoader,
    demos: Sequence[Trajectory],
    config: WarmStartConfig,
    temperature: float,
    seed: int,
) -> Iterator[WarmStartReport]:
    """Train until every task reaches the stop likelihood; yields after each optimizer step.

    Args:
        engine: engine of this rank.
        loader: micro-batch loader of this rank.
        demos: demonstrations with token ids.
        config: learning rate, batch size and stop likelihood.
        temperature: temperature at which the policy will be sampled.
        seed: seed of the order of the demonstrations.
    """
    rows_by_demo = [imitated_rows(index, demo) for index, demo in enumerate(demos)]
    probes = _probes(demos)
    order = _endless_order(len(demos), seed)
    unlikely = {demo.task_id for demo in demos}
    scale = 1.0
    for number in range(1, config.max_updates + 1):
        batch = _next_batch(order, demos, unlikely, config.episodes_per_batch)
        learning_rate = config.learning_rate * min(1.0, number / WARMUP_UPDATES) * scale
        engine.set_optimizer(learning_rate, 0.0)
        loss, norm = imitation_update(engine, loader, [row for index in batch for row in rows_by_demo[index]])
        likelihoods = None
        if number % MEASURE_EVERY == 0 or number == config.max_updates:
            likelihoods = episode_likelihoods(engine, loader, demos, rows_by_demo, probes, temperature)
            unlikely = {task_id for task_id, value in likelihoods.items() if value < config.stop_likelihood}
            if max(likelihoods.values()) > NEAR_LIKELIHOOD:
                scale = NEAR_SCALE
        yield WarmStartReport(number, loss, learning_rate, norm, likelihoods)
        if not unlikely:
            return


def episode_likelihoods(
    engine: DeepSpeedEngine,
    loader: MicroBatchLoader,
    demos: Sequence[Trajectory],
    rows_by_demo: Sequence[Sequence[Row]],
    probes: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Return the probability that the sampled policy repeats a demonstration: each task's mean over its probes.

    Args:
        engine: engine of this rank.
        loader: micro-batch loader of this rank.
        demos: demonstrations with token ids.
        rows_by_demo: rows of each demonstration.
        probes: indices of the demonstrations to measure.
        temperature: sampling temperature.
    """
    log_likelihoods = [0.0] * len(demos)
    for micro in loader.load(loader.shard([row for index in probes for row in rows_by_demo[index]])):
        logprobs_N = engine.score(micro, temperature).logprobs_N.cpu()
        for index, logprob in zip(micro.trajectory_N.tolist(), logprobs_N.tolist(), strict=True):
            log_likelihoods[index] += logprob
    log_likelihoods = engine.sum_over_ranks(log_likelihoods)
    by_task: dict[str, list[float]] = {}
    for index in probes:
        by_task.setdefault(demos[index].task_id, []).append(math.exp(log_likelihoods[index]))
    return {task_id: sum(values) / len(values) for task_id, values in by_task.items()}


def imitation_step(
    engine: DeepSpeedEngine, loader: MicroBatchLoader, shard: Sequence[Sequence[Row]], denominator: float
) -> tuple[float, StepOutcome]:
    """Take one optimizer step on the cross-entropy of action tokens, at temperature 1.

    Args:
        engine: engine of this rank.
        loader: micro-batch loader of this rank.
        shard: micro-batches of this rank, as rows.
        denominator: divides the loss of every token.

    Returns:
        This rank's part of the loss, and the outcome of the step.
    """
    losses: list[float] = []
    with engine.accumulate_gradients(len(shard)):
        for micro in loader.load(shard):
            logprobs_N = engine.forward(micro.to(engine.device), temperature=1.0).logprobs_N
            loss = imitation_loss(logprobs_N, denominator)
            losses.append(float(loss.detach()))
            engine.backward(loss)
    return sum(losses), engine.step()


def imitation_update(engine: DeepSpeedEngine, loader: MicroBatchLoader, rows: Sequence[Row]) -> tuple[float, float]:
    """Take one optimizer step; return its loss over all ranks and the norm of its gradient.

    Raises:
        RuntimeError: the gradient is not finite.
    """
    denominator = float(sum(len(row.targets) for row in rows))
    shard = loader.shard(rows)
    loss, outcome = imitation_step(engine, loader, shard, denominator)
    while not outcome.applied:
        if not engine.scales_loss:
            raise RuntimeError(
                "a gradient of the warm start is not finite; possibly learner.warm_start.learning_rate is too high"
            )
        # DeepSpeed has halved the loss scale; it raises an error once the scale reaches its minimum.
        loss, outcome = imitation_step(engine, loader, shard, denominator)
    (loss,) = engine.sum_over_ranks([loss])
    return loss, outcome.gradient_norm


def _collect_demonstrations(components: Components, success_threshold: float) -> list[Trajectory]:
    """Return the scripted episodes that succeeded, with the token ids that the policy has to sample.

    Raises:
        RuntimeError: no demonstration of a task succeeded.
    """
    groups = collect_groups(components.replay, DEMO, components.curriculum.demo_groups(), components.is_rank_0)
    demos = []
    for group in groups:
        solved = [member for member in group.members if is_success(member.reward, success_threshold)]
        if not solved:
            raise RuntimeError(f"no demonstration of task {group.task_id} succeeded; correct the task or its script")
        if len(solved) < len(group.members) or group.num_faulted:
            _log.warning("task %s: only %d demonstrations succeeded", group.task_id, len(solved))
        demos += solved
    sizes = image_sizes(
        components.replay.fetch_images({name for demo in demos for step in demo.steps for name in step.images})
    )
    return [demonstration(demo, components.tokenizer, components.sizing, sizes) for demo in demos]


def imitated_rows(index: int, demo: Trajectory) -> list[Row]:
    """Return the rows of a demonstration with token ids; `index` is its index in the batch."""
    return pack(index, demo.steps, [[0] * len(step.action_ids) for step in demo.steps])


def _probes(demos: Sequence[Trajectory]) -> list[int]:
    """Return the indices of the first demonstrations of each task."""
    by_task: dict[str, list[int]] = {}
    for index, demo in enumerate(demos):
        by_task.setdefault(demo.task_id, []).append(index)
    return [index for indices in by_task.values() for index in indices[:PROBES_PER_TASK]]


def _next_batch(
    order: Iterator[int], demos: Sequence[Trajectory], task_ids: Collection[str], batch_episodes: int
) -> list[int]:
    """Return the next demonstrations of these tasks, in the given order and each at most once."""
    num_left = sum(demo.task_id in task_ids for demo in demos)
    batch: list[int] = []
    while len(batch) < min(batch_episodes, num_left):
        index = next(order)
        if demos[index].task_id in task_ids and index not in batch:
            batch.append(index)
    return batch


def _endless_order(num_demos: int, seed: int) -> Iterator[int]:
    """Yield the indices of all demonstrations in a random order, then in another one, and so on."""
    generator = random.Random(ids.derive_seed(seed, "imitation"))
    while True:
        order = list(range(num_demos))
        generator.shuffle(order)
        yield from order
