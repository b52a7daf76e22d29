"""Wall clock of an update: what acting takes, what learning takes, and what pacing lets happen at once. Pure.

The times of a desktop and of the policy are assumptions, and told as such; each can be given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deskrl.core.config import RunConfig, Section
from deskrl.core.explain.batches import Batches, Rows
from deskrl.core.explain.memory import bytes_per_number
from deskrl.core.explain.shape import ModelShape

_PROVIDER_TIMES_S: Mapping[str, tuple[float, float, float]] = {
    # reset, action with its screenshot, evaluation
    "embedded": (0.6, 0.15, 0.1),
    "docker": (2.0, 0.2, 0.2),
    "osworld": (45.0, 3.0, 15.0),
    "vmware": (45.0, 3.0, 15.0),
    "remote": (45.0, 3.0, 15.0),
}
_BFLOAT16_TFLOPS = 770.0
_FLOAT32_TFLOPS = 0.1


class Assumptions(Section):
    """What a prediction rests on; None: a value that fits the provider or the device."""

    env_reset_s: float | None = None
    """A reset with the task's setup."""
    env_step_s: float | None = None
    """An action with the screenshot after it."""
    evaluate_s: float | None = None
    """The evaluator."""
    act_s: float | None = None
    """The policy, asked for one action."""
    steps: float | None = None
    """Of an episode, on the average."""
    spread: float = 0.4
    """How much desktops' times vary: standard deviation of their logarithm. In lock-step all wait for the slowest."""
    learn_s: float | None = None
    """The learner, for one update."""
    action_tokens: int = 60
    """Of an answer."""
    gpu_memory_gib: float = 139.0
    """Of one GPU; an H200's."""
    gpu_tflops: float | None = None
    """What one rank's device multiplies, measured and not promised; unset: 770 in bfloat16 (an H200's), 0.1 in
    float32 (a few CPU cores')."""
    utilisation: float = 0.52
    """The share of that which the learner turns into progress."""
    gather_gb_per_s: float = 95.0
    """What reaches a GPU from the others while weights are gathered and gradients parted (ZeRO 3): measured on two
    H200s that NVLink joins."""
    gpu_hour_price: float | None = None
    """Price of a GPU for an hour, in whatever currency."""
    desktop_hour_price: float | None = None
    """Price of a desktop for an hour, in the same currency."""


@dataclass(frozen=True)
class Timing:
    """An update in seconds."""

    env_reset_s: float
    env_step_s: float
    evaluate_s: float
    act_s: float
    steps: float
    slowest: float
    """How many times as long as the mean all wait for each other."""
    episode_s: float
    desktops: int
    desktops_allowed: int
    """How many pacing can keep busy at once."""
    acting_s: float
    """All episodes of an update on the desktops that may act."""
    learning_s: float
    gathering_s: float
    """Of that, what goes into moving sharded weights and their gradients."""
    overlap: bool
    """Whether acting goes on while the learner learns."""
    update_s: float


def predict(
    config: RunConfig,
    batches: Batches,
    usual: Sequence[tuple[float, Rows]],
    shape: ModelShape | None,
    assumed: Assumptions,
) -> Timing | None:
    """Wall clock; None where the model's shape, and so its work, is not known and no time is given for it.

    Args:
        config: of the run.
        batches: of it.
        usual: what trajectories are like, each kind with its share of them.
        shape: of the model.
        assumed: whatever else it rests on.
    """
    learning_s, gathering_s = assumed.learn_s, 0.0
    if learning_s is None:
        if shape is None:
            return None
        gathering_s = sharding_bytes(config, batches, usual, shape) / (assumed.gather_gb_per_s * 1e9)
        learning_s = computing_seconds(config, batches, usual, shape, assumed) + gathering_s
    reset_s, step_s, evaluate_s = _desktop_times(config)
    reset_s = reset_s if assumed.env_reset_s is None else assumed.env_reset_s
    step_s = step_s if assumed.env_step_s is None else assumed.env_step_s
    evaluate_s = evaluate_s if assumed.evaluate_s is None else assumed.evaluate_s
    act_s = (0.1 if config.model.build == "tiny" else 5.0) if assumed.act_s is None else assumed.act_s
    steps = float(config.tasks.max_steps) if assumed.steps is None else assumed.steps
    staleness = config.learner.grpo.max_staleness
    allowed = _allowed_at_once(config.desktop.num_envs, staleness, batches)
    slowest = _slowest(allowed, assumed.spread) if config.replay.schedule == "lock_step" else 1.0
    episode_s = slowest * reset_s + steps * (act_s + slowest * step_s) + slowest * evaluate_s
    rounds = batches.episodes_per_update / allowed
    # In lock-step a batch is played in whole rounds; otherwise desktops go on with the next batch.
    acting_s = episode_s * (-(-batches.episodes_per_update // allowed) if staleness == 0 else rounds)
    update_s = acting_s + learning_s if staleness == 0 else max(acting_s, learning_s)
    return Timing(
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


def least_staleness(batches: Batches, timing: Timing) -> float:
    """The least `max_staleness` at which the learner waits for no desktop; infinite where it waits at any.

    Beyond it episodes wait, and are older when they are learnt from.
    """
    for staleness in range(1, timing.desktops // batches.episodes_per_update + 2):
        allowed = _allowed_at_once(timing.desktops, staleness, batches)
        if timing.episode_s * batches.episodes_per_update / allowed < timing.learning_s:
            return staleness
    return math.inf


def _allowed_at_once(desktops: int, staleness: int, batches: Batches) -> int:
    """Desktops that pacing can keep busy."""
    return min(desktops, (staleness + 1) * batches.episodes_per_update)


def computing_seconds(
    config: RunConfig, batches: Batches, usual: Sequence[tuple[float, Rows]], shape: ModelShape, assumed: Assumptions
) -> float:
    """One update of the learner at the assumed share of its GPUs' rate."""
    device = _FLOAT32_TFLOPS if config.learner.dtype == "float32" else _BFLOAT16_TFLOPS
    tflops = device if assumed.gpu_tflops is None else assumed.gpu_tflops
    rate = tflops * 1e12 * assumed.utilisation * config.learner.num_processes
    return sum(share * update_flops(config, batches, rows, shape) for share, rows in usual) / rate


def sharding_bytes(
    config: RunConfig, batches: Batches, usual: Sequence[tuple[float, Rows]], shape: ModelShape
) -> float:
    """What a rank receives from the others in an update under ZeRO 3, which no other stage moves.

    With each micro-batch, weights come for the forward and for the backward pass, and once more where layers are
    computed anew; gradients go in float32. So larger micro-batches move less.
    """
    learner, ranks = config.learner, config.learner.num_processes
    if learner.zero_stage < 3 or ranks == 1:
        return 0.0
    rows_each = sum(share * rows.rows_per_trajectory for share, rows in usual)
    mean_tokens = sum(share * rows.tokens_per_trajectory for share, rows in usual) / rows_each
    rows_at_once = max(1, int(learner.micro_batch_tokens / mean_tokens))
    num_micro_batches = sum(
        math.ceil(trajectories * rows_each / ranks / rows_at_once)
        for trajectories in batches.trajectories_per_optimizer_step
    )
    later = 1 - 1 / batches.optimizer_steps_per_update
    passes = (2 if learner.activations == "all" else 3) + later
    trained = shape.num_language_parameters if learner.freeze_vision else shape.num_parameters
    moved = bytes_per_number(learner.dtype) * passes * shape.num_parameters + 4 * trained
    return num_micro_batches * moved * (ranks - 1) / ranks


def update_flops(config: RunConfig, batches: Batches, rows: Rows, shape: ModelShape) -> float:
    """Forward and backward of every row, and the forward pass that scores the later optimizer steps' rows before.

    What is computed anew in the backward pass is not counted; it lowers the share of the rate that is progress.
    """
    learner = config.learner
    targets = rows.steps * rows.action_tokens / rows.rows_per_trajectory
    mean_tokens = rows.tokens_per_trajectory / rows.rows_per_trajectory
    language = shape.language_flops(round(mean_tokens), round(targets)) * rows.rows_per_trajectory
    later = 1 - 1 / batches.optimizer_steps_per_update
    num_images, vision_passes = rows.images_per_trajectory, 3 + later
    if learner.freeze_vision:
        keeps_features = learner.feature_cache_bytes > 0 and learner.zero_stage < 3
        num_images, vision_passes = (rows.steps, 1.0) if keeps_features else (num_images, 1 + later)
    vision = shape.vision_flops(rows.patches_per_image) * num_images
    return batches.episodes_per_update * ((3 + later) * language + vision_passes * vision)


def _slowest(num: int, spread: float) -> float:
    """The slowest of `num` lognormal times, by their mean: about the quantile that one in `num` is beyond."""
    return math.exp(spread * math.sqrt(2 * math.log(num)) - spread**2 / 2) if num > 1 else 1.0


def _desktop_times(config: RunConfig) -> tuple[float, float, float]:
    if config.desktop.provider == "simulated":
        times = config.desktop.simulated
        evaluation = (times.evaluation_min_s + times.evaluation_max_s) / 2
        scale = times.time_scale
        return times.reset_median_s * scale, times.action_median_s * scale, evaluation * scale
    reset_s, action_s, evaluation_s = _PROVIDER_TIMES_S[config.desktop.provider]
    if config.desktop.provider == "embedded":
        added = config.desktop.embedded
        reset_s += added.added_reset_median_s * math.exp(added.added_reset_sigma**2 / 2)  # a lognormal's mean
        action_s += added.added_action_median_s * math.exp(added.added_action_sigma**2 / 2)
    return reset_s, action_s, evaluation_s
