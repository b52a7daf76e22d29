"""Warm start: cross-entropy on demonstrated actions, through the same engine as everything else.

A demonstration carries its conversation; it is turned into the very ids that the policy would have seen and have had to
sample. A task is imitated until the policy, as it will be sampled, repeats the task's demonstrations often enough: good
enough to succeed now and then, poor enough to leave something to learn. Tasks differ tenfold in how soon that is.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from deskrl.core import ids
from deskrl.core.config import WarmStartConfig
from deskrl.core.rendering import ImageSizing, encode_action, expand_images, image_token_id, render
from deskrl.core.trajectory import Step
from deskrl.learner.batches.batch import MicroBatch
from deskrl.learner.batches.feed import Feed
from deskrl.learner.batches.packing import Row, pack
from deskrl.learner.losses import imitation_loss
from deskrl.learner.policy.engine import Engine
from deskrl.learner.policy.model import Scores
from deskrl.learner.trajectories import Trajectory
from deskrl.proto.v1 import inference_pb2

CHECK_EVERY = 2
"""Updates between two looks at the likelihoods, which double with each update towards the end."""
PROBES_PER_TASK = 4
"""Demonstrations of each task that its likelihood is measured on."""
RAMP_UPDATES = 10
"""Updates over which the learning rate rises to its value."""
NEAR_LIKELIHOOD = 1e-3
NEAR_SCALE = 0.3
"""Once a task is this likely, steps are this much shorter: likelihoods double with every step by then, and a longer one
towards some tasks undoes others."""


@dataclass(frozen=True)
class ImitationReport:
    """One optimizer step of the warm start."""

    update: int
    loss: float
    """Mean over action tokens."""
    learning_rate: float
    gradient_norm: float
    likelihoods: Mapping[str, float] | None
    """Of a demonstrated episode, by task; measured every few updates, after the step."""


def demonstration(
    trajectory: Trajectory, tokenizer: Any, sizing: ImageSizing, sizes: Mapping[str, tuple[int, int]]
) -> Trajectory:
    """A scripted episode with the prompt and action ids that a sampled one would have.

    Args:
        trajectory: its steps carry conversations, the action's text last.
        tokenizer: of the model.
        sizing: of the model's processor.
        sizes: (width, height) of each screenshot.
    """

    def with_ids(step: Step) -> Step:
        messages = [inference_pb2.ChatMessage.FromString(message) for message in step.messages]
        prompt = render(messages[:-1], tokenizer)
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
    """(width, height) of encoded screenshots."""
    sizes = {}
    for name, data in images.items():
        with Image.open(io.BytesIO(data)) as picture:
            sizes[name] = picture.size
    return sizes


def imitate(
    engine: Engine, feed: Feed, demos: Sequence[Trajectory], config: WarmStartConfig, temperature: float, seed: int
) -> Iterator[ImitationReport]:
    """Train until every task meets the stop criterion; yields after each optimizer step.

    Args:
        engine: of the policy.
        feed: of this rank.
        demos: with ids.
        config: learning rate, batch size, stop criterion.
        temperature: that the policy will be sampled at.
        seed: of the order in which demonstrations come.
    """
    rows_of = [_rows(index, demo) for index, demo in enumerate(demos)]
    probes = _probes(demos)
    order = _endless_order(len(demos), seed)
    unlikely = {demo.task_id for demo in demos}
    scale = 1.0
    for update in range(1, config.max_updates + 1):
        batch = _next_batch(order, demos, unlikely, config.batch_episodes)
        learning_rate = config.learning_rate * min(1.0, update / RAMP_UPDATES) * scale
        engine.set_optimizer(learning_rate, 0.0)
        loss, norm = _step(engine, feed, [row for index in batch for row in rows_of[index]])
        likelihoods = None
        if update % CHECK_EVERY == 0 or update == config.max_updates:
            likelihoods = episode_likelihoods(engine, feed, demos, rows_of, probes, temperature)
            unlikely = {task_id for task_id, value in likelihoods.items() if value < config.stop_likelihood}
            if max(likelihoods.values()) > NEAR_LIKELIHOOD:
                scale = NEAR_SCALE
        yield ImitationReport(update, loss, learning_rate, norm, likelihoods)
        if not unlikely:
            return


def episode_likelihoods(
    engine: Engine,
    feed: Feed,
    demos: Sequence[Trajectory],
    rows_of: Sequence[Sequence[Row]],
    probes: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Probability that the sampled policy repeats a demonstrated episode: each task's mean over its probes."""
    log_likelihoods = [0.0] * len(demos)
    for micro in feed.batches(feed.share([row for index in probes for row in rows_of[index]])):
        logprobs_N = engine.score(micro, temperature).logprobs_N.cpu()
        for index, logprob in zip(micro.trajectory_N.tolist(), logprobs_N.tolist(), strict=True):
            log_likelihoods[index] += logprob
    log_likelihoods = engine.sum_over_ranks(log_likelihoods)
    of_task: dict[str, list[float]] = {}
    for index in probes:
        of_task.setdefault(demos[index].task_id, []).append(math.exp(log_likelihoods[index]))
    return {task_id: sum(values) / len(values) for task_id, values in of_task.items()}


def _step(engine: Engine, feed: Feed, rows: Sequence[Row]) -> tuple[float, float]:
    """One optimizer step; its loss over all ranks, and the gradient's norm."""
    denominator = float(sum(len(row.targets) for row in rows))
    losses: list[float] = []
    share = feed.share(rows)
    noting_loss = _noting_loss(denominator, losses)
    while not (outcome := engine.update(feed.batches(share), len(share), 1.0, noting_loss)).applied:
        if not engine.scales_loss:
            raise RuntimeError("imitation met a gradient that is not finite; lower learner.warm_start.learning_rate")
        losses.clear()  # once more at half the scale; at a scale of 1 DeepSpeed gives up
    (loss,) = engine.sum_over_ranks([sum(losses)])
    return loss, outcome.gradient_norm


def _noting_loss(denominator: float, losses: list[float]) -> Callable[[int, MicroBatch, Scores], Tensor]:
    def loss_of(index: int, micro: MicroBatch, scores: Scores) -> Tensor:
        loss = imitation_loss(scores.logprobs_N, denominator)
        losses.append(float(loss.detach()))
        return loss

    return loss_of


def _rows(index: int, demo: Trajectory) -> list[Row]:
    return pack(index, demo.steps, [[0] * len(step.action_ids) for step in demo.steps])


def _probes(demos: Sequence[Trajectory]) -> list[int]:
    of_task: dict[str, list[int]] = {}
    for index, demo in enumerate(demos):
        of_task.setdefault(demo.task_id, []).append(index)
    return [index for indices in of_task.values() for index in indices[:PROBES_PER_TASK]]


def _next_batch(
    order: Iterator[int], demos: Sequence[Trajectory], task_ids: Collection[str], batch_episodes: int
) -> list[int]:
    """The next demonstrations of these tasks, in the given order; each at most once."""
    num_left = sum(demo.task_id in task_ids for demo in demos)
    batch: list[int] = []
    while len(batch) < min(batch_episodes, num_left):
        index = next(order)
        if demos[index].task_id in task_ids and index not in batch:
            batch.append(index)
    return batch


def _endless_order(num_demos: int, seed: int) -> Iterator[int]:
    """Every demonstration once in a random order, then again in another."""
    generator = random.Random(ids.derive_seed(seed, "imitation"))
    while True:
        order = list(range(num_demos))
        generator.shuffle(order)
        yield from order
