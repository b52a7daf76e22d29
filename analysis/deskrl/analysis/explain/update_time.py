"""Wall-clock time of an update: time of acting and of learning, and how far the rate limiter lets them overlap.

Times of desktops and policy are assumptions, which command line options replace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deskrl.core.config import RunConfig, Section
from deskrl.core.config.value_types import (
    NonNegativeFactor,
    NonNegativeSeconds,
    PositiveFactor,
    PositiveFraction,
    PositiveInt,
    Sigma,
)
from deskrl.launch.sizing.batch_sizes import BatchSizes, TrajectorySize
from deskrl.launch.sizing.footprint import bytes_per_element, num_trained_parameters
from deskrl.launch.sizing.model_shape import ModelShape

_BFLOAT16_TFLOPS = 770.0  # of an H200, measured
_FLOAT32_TFLOPS = 0.1  # of a few CPU cores


class Assumptions(Section):
    """Assumptions of the prediction. None: the default of the desktop provider or device."""

    env_reset_s: NonNegativeSeconds | None = None
    """Seconds of a desktop reset, including the task's setup."""
    env_step_s: NonNegativeSeconds | None = None
    """Seconds of an action, including the screenshot after it."""
    evaluate_s: NonNegativeSeconds | None = None
    """Seconds of the evaluator."""
    act_s: NonNegativeSeconds | None = None
    """Seconds in which the policy samples one action."""
    steps: PositiveFactor | None = None
    """Mean number of steps of an episode."""
    spread: Sigma = 0.4
    """Variation of desktop times: standard deviation of their logarithm. In lock-step all wait for the slowest."""
    learn_s: NonNegativeSeconds | None = None
    """Seconds in which the learner computes one update."""
    action_tokens: PositiveInt = 60
    """Tokens of one answer."""
    gpu_memory_gib: PositiveFactor = 139.0
    """Memory of one GPU in GiB; default: an H200."""
    gpu_tflops: PositiveFactor | None = None
    """Measured matrix throughput of one rank's device in TFLOPS; unset: 770 for bfloat16 (an H200), 0.1 for float32
    (a few CPU cores)."""
    utilisation: PositiveFraction = 0.52
    """Share of gpu_tflops that the learner reaches (model FLOPs utilisation)."""
    gather_gb_per_s: PositiveFactor = 95.0
    """Bandwidth in GB/s at which a GPU gathers weights and scatters gradients (ZeRO 3); default: measured on two H200s
    with NVLink."""
    gpu_hour_price: NonNegativeFactor | None = None
    """Price of a GPU hour, in any currency."""
    desktop_hour_price: NonNegativeFactor | None = None
    """Price of a desktop hour, in the same currency."""


@dataclass(frozen=True)
class UpdateTiming:
    """Wall-clock time of one update and its parts, in seconds."""

    env_reset_s: NonNegativeSeconds
    env_step_s: NonNegativeSeconds
    evaluate_s: NonNegativeSeconds
    act_s: NonNegativeSeconds
    steps: PositiveFactor
    slowest: float
    """Time of the slowest desktop relative to the mean, which all wait for in lock-step; 1 otherwise."""
    episode_s: float
    desktops: int
    desktops_allowed: int
    """Number of desktops that the rate limiter allows to run at the same time."""
    acting_s: float
    """Time in which the allowed desktops run all episodes of an update."""
    learning_s: float
    gathering_s: float
    """Part of learning_s spent on moving sharded weights and gradients between GPUs."""
    overlap: bool
    """Whether desktops run episodes while the learner trains."""
    update_s: float


def estimate_update_time(
    config: RunConfig,
    batches: BatchSizes,
    mix: Sequence[tuple[float, TrajectorySize]],
    shape: ModelShape | None,
    assumed: Assumptions,
) -> UpdateTiming | None:
    """Estimate the wall-clock time of an update; None if neither the model's shape nor `learn_s` is known.

    Args:
        config: run configuration.
        batches: batch sizes of the run.
        mix: sizes of the trajectories, each with its share.
        shape: shape of the model; None if unknown.
        assumed: assumptions of the prediction.
    """
    learning_s, gathering_s = assumed.learn_s, 0.0
    if learning_s is None:
        if shape is None:
            return None
        gathering_s = zero3_traffic_bytes(config, batches, mix, shape) / (assumed.gather_gb_per_s * 1e9)
        learning_s = compute_seconds(config, batches, mix, shape, assumed) + gathering_s
    reset_s, step_s, evaluate_s = _desktop_times(config, assumed)
    act_s = (0.1 if config.model.build == "tiny" else 5.0) if assumed.act_s is None else assumed.act_s
    steps = float(config.tasks.max_steps) if assumed.steps is None else assumed.steps
    staleness = config.learner.grpo.max_staleness
    allowed = _allowed_desktops(config.desktop.num_envs, staleness, batches)
    slowest = _slowest(allowed, assumed.spread) if config.replay.schedule == "lock_step" else 1.0
    episode_s = slowest * reset_s + steps * (act_s + slowest * step_s) + slowest * evaluate_s
    rounds = batches.episodes_per_update / allowed
    # Without staleness a batch takes whole rounds; otherwise desktops continue with the next batch.
    acting_s = episode_s * (-(-batches.episodes_per_update // allowed) if staleness == 0 else rounds)
    update_s = acting_s + learning_s if staleness == 0 else max(acting_s, learning_s)
    return UpdateTiming(
        env_reset_s=reset_s,
        env_step_s=step_s,
        evaluate_s=evaluate_s,
        act_s=act_s,
        steps=steps,
        slowest=slowest,
        episode_s=episode_s,
        desktops=config.desktop.num_envs,
        desktops_allowed=allowed,
        acting_s=acting_s,
        learning_s=learning_s,
        gathering_s=gathering_s,
        overlap=staleness > 0,
        update_s=update_s,
    )


def min_useful_staleness(batches: BatchSizes, timing: UpdateTiming) -> float:
    """Return the smallest `max_staleness` at which the learner does not wait for desktops; infinite if it always waits.

    With a larger one episodes only get older before the learner trains on them.
    """
    for staleness in range(1, timing.desktops // batches.episodes_per_update + 2):
        allowed = _allowed_desktops(timing.desktops, staleness, batches)
        if timing.episode_s * batches.episodes_per_update / allowed < timing.learning_s:
            return staleness
    return math.inf


def _allowed_desktops(desktops: int, staleness: int, batches: BatchSizes) -> int:
    """Return the number of desktops that the rate limiter allows to run at the same time."""
    return min(desktops, (staleness + 1) * batches.episodes_per_update)


def compute_seconds(
    config: RunConfig,
    batches: BatchSizes,
    mix: Sequence[tuple[float, TrajectorySize]],
    shape: ModelShape,
    assumed: Assumptions,
) -> float:
    """Estimate the compute time of one update at the assumed utilisation of the learner's devices."""
    device = _FLOAT32_TFLOPS if config.learner.dtype == "float32" else _BFLOAT16_TFLOPS
    tflops = device if assumed.gpu_tflops is None else assumed.gpu_tflops
    rate = tflops * 1e12 * assumed.utilisation * config.learner.num_ranks
    return sum(share * update_flops(config, batches, rows, shape) for share, rows in mix) / rate


def zero3_traffic_bytes(
    config: RunConfig, batches: BatchSizes, mix: Sequence[tuple[float, TrajectorySize]], shape: ModelShape
) -> float:
    """Return the bytes that a rank receives from the others in one update under ZeRO 3; 0 for other stages.

    Each micro-batch gathers the weights for its forward and backward pass, and once more if activations are
    recomputed, and scatters gradients in float32. Larger micro-batches therefore move less.
    """
    learner, ranks = config.learner, config.learner.num_ranks
    if learner.zero_stage < 3 or ranks == 1:
        return 0.0
    rows_each = sum(share * rows.rows_per_trajectory for share, rows in mix)
    mean_tokens = sum(share * rows.tokens_per_trajectory for share, rows in mix) / rows_each
    rows_at_once = max(1, int(learner.micro_batch_tokens / mean_tokens))
    num_micro_batches = sum(
        math.ceil(trajectories * rows_each / ranks / rows_at_once)
        for trajectories in batches.trajectories_per_optimizer_step
    )
    num_scoring = _scoring_passes(config, batches)
    passes = (2 if learner.activation_checkpointing == "off" else 3) + num_scoring
    trained = num_trained_parameters(learner, shape)
    moved = bytes_per_element(learner.dtype) * passes * shape.num_parameters + 4 * trained
    return num_micro_batches * moved * (ranks - 1) / ranks


def update_flops(config: RunConfig, batches: BatchSizes, rows: TrajectorySize, shape: ModelShape) -> float:
    """Return the FLOPs of one update.

    Counted are forward and backward pass of every row, the forward pass that scores the rows of all optimizer steps but
    the first under the policy before the update, and those of a KL penalty. Recomputed activations lower the
    utilisation instead. With LoRA, layers compute with merged weights, and the backward pass computes gradients of the
    adapters' matrices (twice the FLOPs of a forward pass of the adapters) instead of those of the model.
    """
    learner = config.learner
    targets = rows.steps * rows.action_tokens / rows.rows_per_trajectory
    mean_tokens = rows.tokens_per_trajectory / rows.rows_per_trajectory
    language = shape.language_flops(round(mean_tokens), round(targets)) * rows.rows_per_trajectory
    num_scoring = _scoring_passes(config, batches)
    language_passes = 3 + num_scoring
    training = language_passes * language
    num_images, vision_passes = rows.images_per_trajectory, 3 + num_scoring
    if learner.has_lora:
        attention = shape.attention_flops(round(mean_tokens)) * rows.rows_per_trajectory
        adapters = 2.0 * num_trained_parameters(learner, shape) * rows.tokens_per_trajectory
        training += 2 * adapters - (language - attention)
        vision_passes -= 1
    if learner.has_frozen_vision:
        keeps_features = learner.feature_cache_bytes > 0 and learner.zero_stage < 3
        num_images, vision_passes = (rows.steps, 1.0) if keeps_features else (num_images, 1 + num_scoring)
    vision = shape.vision_flops(rows.patches_per_image) * num_images
    return batches.episodes_per_update * (training + vision_passes * vision)


def _scoring_passes(config: RunConfig, batches: BatchSizes) -> float:
    """Return the forward passes over a row that only score it: under the policy before the update, and the reference.

    The first optimizer step needs the former only for a KL penalty in the reward.
    """
    grpo = config.learner.grpo
    later_steps = 1 - 1 / batches.optimizer_steps_per_update
    if not grpo.kl_coefficient:
        return later_steps
    return 1 + (1 if grpo.kl_applied_to == "reward" else later_steps)


def _slowest(num: int, spread: float) -> float:
    """Return the slowest of `num` lognormal times relative to their mean: about the quantile 1 - 1 / `num`."""
    return math.exp(spread * math.sqrt(2 * math.log(num)) - spread**2 / 2) if num > 1 else 1.0


def _desktop_times(config: RunConfig, assumed: Assumptions) -> tuple[float, float, float]:
    """Return the seconds of a reset, an action and an evaluation: those assumed, else the provider's defaults."""
    from deskrl.actor.desktops.provider_registry import select_provider  # slow to import, and not needed for --help

    selected = select_provider(config.desktop)
    defaults = selected.provider.durations(config.desktop, selected.options)
    return (
        defaults.reset_s if assumed.env_reset_s is None else assumed.env_reset_s,
        defaults.action_s if assumed.env_step_s is None else assumed.env_step_s,
        defaults.evaluation_s if assumed.evaluate_s is None else assumed.evaluate_s,
    )
