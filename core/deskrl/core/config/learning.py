"""The learner: section `learner`, with imitation, GRPO and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from deskrl.core.config.values import Device, Fraction, PositiveInt, Section
from deskrl.core.failure import FailureRule


def _off_or_above_1(value: float) -> float:
    if value != 0 and value <= 1:
        raise ValueError(f"{value} is neither 0 (off) nor above 1")
    return value


DualClip = Annotated[float, AfterValidator(_off_or_above_1)]


class WarmStartConfig(Section):
    """Imitation of scripted solutions before GRPO."""

    demos_per_task: PositiveInt = 16
    """Demonstrations recorded for each task."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """AdamW learning rate of the imitation phase."""
    batch_episodes: PositiveInt = 8
    """Demonstrations in one optimizer step."""
    max_updates: PositiveInt = 400
    """Optimizer steps at most."""
    stop_likelihood: Fraction = 0.3
    """A task is imitated until the policy, sampled as in training, repeats its demonstrations with this probability."""


class GrpoConfig(Section):
    """The reinforcement-learning phase; the defaults are the preset `deskrl`, corrected and asynchronous ARPO.

    Every difference to ARPO as published is one key here or in `agent`; `presets.py` has its values.
    """

    num_updates: Annotated[int, Field(ge=0)] = 100
    """Optimizer updates in all."""
    env_steps: Annotated[int, Field(ge=0)] = 0
    """The phase ends earlier, with the update by which so many steps of fresh episodes were taken, those of dropped
    groups too; 0: `num_updates` alone ends it."""
    groups_per_batch: PositiveInt = 4
    """Groups with spread that make a batch."""
    max_staleness: Annotated[int, Field(ge=0)] = 4
    """Versions between the oldest token's policy and the one that learns from it."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW learning rate."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Update n of these (n from 0) learns at n / warmup_updates of the learning rate, the first one at 0; then it is
    constant. 0: constant from the start."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    clip_low: Fraction = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0)] = 0.3
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: DualClip = 0.0
    """Largest ratio with which a token of negative advantage is pushed down; above 1, or 0: none."""
    importance: Literal["truncated", "off"] = "truncated"
    """`truncated`: tokens weigh by pi_prox / pi_behaviour up to `importance_cap`; `off`: as if the policy that the
    update starts from had sampled them."""
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    """Truncation of the weight pi_prox / pi_behaviour."""
    advantage: Literal["centred", "standardised"] = "centred"
    """`centred`: reward minus the group's mean; `standardised`: that by the group's sample standard deviation."""
    format_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the reward of an episode that ended with an action that cannot be parsed. Neither success rates nor
    the replay of successes see it."""
    groups_without_spread: Literal["drop", "keep"] = "drop"
    """`drop`: other work takes their place in the batch; `keep`: they fill it with advantage 0."""
    negative_scale: Annotated[float, Field(ge=0)] = 1.0
    """Multiplies negative advantages; below 1 it keeps a small policy from collapsing."""
    minibatches: PositiveInt = 1
    """Optimizer steps in which a batch is learnt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of rollouts, applied by the learner too."""
    loss_denominator: Literal["constant", "trajectory_tokens"] = "constant"
    """By what a token's loss is divided, besides the number of trajectories: `constant`: `loss_scale_tokens`;
    `trajectory_tokens`: the tokens of its own trajectory, so the loss is the mean of the trajectories' means."""
    loss_scale_tokens: PositiveInt = 64
    """The constant denominator of the loss: tokens of a typical episode."""
    replay_successes: bool = True
    """When a group fails, one stored success of the task takes the place of one member. Off: none is stored either."""
    replay_when: FailureRule = "all_failed"
    """`all_failed`: no reward is above `replay.success_above`; `low_and_alike`: their mean is below 0.2 and their
    population standard deviation below 0.05."""
    replay_place: Literal["first", "random", "oldest"] = "first"
    """Whose place a stored success takes: the first member's, one's at random, or that which was acted longest ago."""
    success_ratio: Literal["one", "truncated"] = "one"
    """How a stored success is weighted: from ratio 1, or by its truncated importance weight."""
    dynamic_rollouts: bool = False
    """Fewer rollouts for tasks that are solved often: 9 / rate - 7 of them, two at the least, from a rate of 0.6 on
    when they were last played."""
    shuffle_rewards: bool = False
    """Control experiment: deal each group's rewards out at random; what still rises is not learnt from them."""


class EvalConfig(Section):
    """Evaluation before and after."""

    episodes: Annotated[int, Field(ge=0)] = 0
    """Fresh sampled episodes before and after the GRPO phase; 0: none."""
    min_gain: Annotated[float, Field(ge=0, le=1)] | None = None
    """By how much success must rise (0.3: 30 points), and no task fall, for `deskrl up` to end with status 0. Unset:
    the gain is told, and not judged."""


class LearnerConfig(Section):
    """The learner."""

    num_processes: PositiveInt = 1
    """Ranks of the torchrun world."""
    master_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Rendezvous port of the ranks; 0: a free one."""
    devices: tuple[Device, ...] = ()
    """GPUs of the ranks, by number, one each. Empty: what the environment says (`CUDA_VISIBLE_DEVICES`)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage. 1 adds gradients up in `dtype`, whole on each rank; 2 and 3 in float32, parted."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer states in the host's memory; needs a ZeRO stage above 0."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Numeric type of forward and backward. `float16`, for GPUs that have no bfloat16, scales the loss by itself."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens of one forward pass, screenshots counted; a longer row goes alone."""
    activations: Literal["all", "attention", "layers"] = "all"
    """What is kept for the backward pass: everything; layers' inputs and attention's results; layers' inputs only. What
    is not kept is computed anew."""
    freeze_vision: bool = False
    """Leave the vision tower as it is; a screenshot then goes through it once, as long as its features are kept."""
    feature_cache_bytes: Annotated[int, Field(ge=0)] = 8 * 1024**3
    """Features of screenshots kept in the host's memory while the vision tower is frozen (under ZeRO 3, none are)."""
    checkpoint_every: PositiveInt = 1
    """Updates between checkpoints; a batch is consumed when the checkpoint that learnt from it is committed."""
    keep_checkpoints: PositiveInt = 3
    """Checkpoints kept, newest first."""
    prove_checkpoint: bool = True
    """At the end, serve the last checkpoint from a fresh engine and compare it with transformers."""
    keep_scores: Annotated[int, Field(ge=0)] = 100
    """Updates of which each token's logprob and entropy are kept for `deskrl view`, newest first."""
    warm_start: WarmStartConfig | None = None
    """Imitation phase; unset: none."""
    grpo: GrpoConfig = GrpoConfig()
    """The reinforcement-learning phase."""
    eval: EvalConfig = EvalConfig()
    """Evaluation before and after."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus port; 0: none."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> LearnerConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _something_to_scale_the_loss(self) -> LearnerConfig:
        if self.dtype == "float16" and self.zero_stage == 0:
            raise ValueError("the dtype float16 needs zero_stage 1, 2 or 3, which scale the loss")
        return self
