"""Section `learner`: warm start, GRPO, evaluation, and the learner's processes, GPUs and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from deskrl.core.config.value_types import (
    Device,
    Fraction,
    Host,
    LearningRate,
    NonNegativeBytes,
    NonNegativeFactor,
    NonNegativeInt,
    Port,
    PositiveFactor,
    PositiveInt,
    PositiveSeconds,
    Section,
)
from deskrl.core.group_outcome import FailureRule


def _check_dual_clip(value: float) -> float:
    if value != 0 and value <= 1:
        raise ValueError(f"must be 0 (disabled) or above 1, not {value}")
    return value


DualClip = Annotated[float, Field(ge=0, le=1e6), AfterValidator(_check_dual_clip)]
LayerName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]

KlEstimator = Literal["k1", "k2", "k3", "abs"]
"""Estimator of the KL divergence from one token; `losses.kl_divergence` of the learner has the formulas."""


class WarmStartConfig(Section):
    """Warm start: imitation of demonstrations before GRPO."""

    demonstrations: Path | None = None
    """Folder of demonstrations that are imitated (`deskrl data import`, `deskrl record`): those whose reward is above
    `replay.success_threshold`. Unset: the tasks' scripted solutions."""
    num_epochs: PositiveInt = 1
    """Passes over `demonstrations`, unless `max_updates` ends the warm start before."""
    demos_per_task: PositiveInt = 16
    """Number of episodes in which each task's scripted solution is recorded; not used with `demonstrations`."""
    learning_rate: LearningRate = 1e-3
    """Learning rate of AdamW during the warm start."""
    episodes_per_batch: PositiveInt = 8
    """Number of demonstrations per optimizer step."""
    max_updates: PositiveInt = 400
    """Maximum number of optimizer steps."""
    stop_likelihood: Fraction = 0.3
    """Training on a task stops once the policy, with the temperature of the rollouts, reproduces the task's
    demonstrations with this probability. The warm start ends when that holds for all tasks. Not used with
    `demonstrations`."""

    @field_validator("demonstrations")
    @classmethod
    def _make_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()


class GrpoConfig(Section):
    """Reinforcement learning by GRPO. The defaults are those of the preset `deskrl`, corrected asynchronous ARPO.

    Every difference from ARPO as published is one key here or in `agent`; the preset `arpo` sets ARPO's values.
    """

    num_updates: NonNegativeInt = 100
    """Number of updates; an update trains on one batch."""
    max_env_steps: NonNegativeInt = 0
    """Stop after the update at which the number of fresh environment steps, including those of dropped groups, reaches
    this; 0 disables it."""
    groups_per_batch: PositiveInt = 4
    """Number of groups in a batch. Zero-variance groups do not count unless `zero_variance_groups` is `keep`."""
    max_staleness: NonNegativeInt = 4
    """Maximum staleness: number of policy versions between the policy that sampled an episode's oldest token and the
    policy trained on it. 0: synchronous training."""
    learning_rate: LearningRate = 1e-6
    """Learning rate of AdamW."""
    warmup_updates: NonNegativeInt = 0
    """Number of updates over which the learning rate rises linearly: update n, counted from 0, uses n / warmup_updates
    of it. Afterwards it follows `learning_rate_schedule`. 0: no warm-up."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up. `constant`: `learning_rate`; `linear`, `cosine`: it decreases, in a straight
    line or as half a cosine, until update `num_updates`."""
    min_learning_rate_ratio: Fraction = 0.0
    """Learning rate that `linear` and `cosine` end at, as a fraction of `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFactor = 1.0
    """Norm to which gradients are clipped."""
    loss: str = "grpo"
    """Policy loss. `grpo`: the token-level clipped policy gradient that the following keys describe; `gspo`: ratio and
    clipping of whole turns; `cispo`: the ratio of a token is bounded, but its gradient is kept; or your own, as
    `package.module:object` or by the name of an installed package's entry point."""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the policy loss. `grpo` has none. `gspo`: `clip_low` (0.0003) and `clip_high` (0.0004), the clipping
    range of a turn's ratio. `cispo`: `clip_high` (3.0); the ratio of a token is at most 1 + clip_high."""
    clip_low: Fraction = 0.2
    """Lower clipping range: the policy ratio is clipped below 1 - clip_low."""
    clip_high: NonNegativeFactor = 0.3
    """Upper clipping range: the policy ratio is clipped above 1 + clip_high."""
    dual_clip: DualClip = 0.0
    """Dual clipping: upper bound, above 1, of the policy ratio of tokens with a negative advantage; 0 disables it."""
    importance_weighting: Literal["truncated", "off"] = "truncated"
    """Correction for tokens sampled by an older policy. `truncated`: tokens are weighted by
    pi_proximal / pi_behaviour, at most `importance_cap`; `off`: all weights are 1."""
    importance_cap: PositiveFactor = 2.0
    """Upper bound of the importance weight pi_proximal / pi_behaviour."""
    kl_coefficient: NonNegativeFactor = 0.0
    """Weight of the KL divergence from the reference policy, which is the initial model. 0: no KL penalty and no
    reference policy."""
    kl_estimator: KlEstimator = "k3"
    """Estimate of the KL divergence from one token, with x = log pi_reference - log pi. `k1`: -x; `k2`: x^2 / 2; `k3`:
    exp(x) - 1 - x, at most 10; `abs`: the absolute value of x. In the loss, `k1` does not pull the policy towards the
    reference: its gradient does not depend on it."""
    kl_applied_to: Literal["loss", "reward"] = "loss"
    """Where the KL penalty is applied. `loss`: each token's estimate is added to its loss; `reward`: the sum over the
    tokens of an episode, under the policy before the update, is subtracted from its reward before advantages are
    computed."""
    entropy_coefficient: NonNegativeFactor = 0.0
    """Weight of the entropy bonus: the entropy of each token's sampling distribution, subtracted from its loss. 0: no
    bonus."""
    advantage: str = "centred"
    """Advantage of an episode. `centred`: reward minus the group's mean reward; `standardised`: this divided by the
    group's sample standard deviation; or your own, as `package.module:object` or by the name of an installed package's
    entry point."""
    advantage_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the advantage; `centred` and `standardised` have none."""
    format_penalty: NonNegativeFactor = 0.0
    """Penalty subtracted from the reward of an episode that ended with an action that cannot be parsed. Success rates
    and the success buffer use the reward without the penalty."""
    zero_variance_groups: Literal["drop", "keep"] = "drop"
    """Groups whose rewards are all equal. `drop`: they are dropped and other groups fill the batch; `keep`: they are
    part of the batch, with advantage 0."""
    negative_advantage_scale: NonNegativeFactor = 1.0
    """Factor applied to negative advantages. Values below 1 prevent small policies from collapsing."""
    num_minibatches: PositiveInt = 1
    """Number of optimizer steps per batch, each on an equal part of it."""
    temperature: PositiveFactor = 1.0
    """Sampling temperature of rollouts, also used by the learner to compute logprobs."""
    loss_denominator: Literal["constant", "trajectory_tokens"] = "constant"
    """What the loss of a token is divided by, in addition to the number of trajectories. `constant`:
    `loss_denominator_tokens`; `trajectory_tokens`: the number of tokens of its own trajectory, so that the loss is the
    mean over trajectories of their means."""
    loss_denominator_tokens: PositiveInt = 64
    """Denominator used if `loss_denominator` is `constant`: the number of tokens of a typical episode."""
    use_success_buffer: bool = True
    """Replace one member of a failed group with a stored success of the same task (ARPO's success buffer). If false, no
    successes are stored either."""
    replace_when: FailureRule = "all_failed"
    """When a group counts as failed. `all_failed`: no reward is above `replay.success_threshold`; `low_mean_low_std`:
    the mean reward is below 0.2 and its population standard deviation below 0.05."""
    replace_slot: Literal["first", "random", "oldest"] = "first"
    """Member of a failed group that a stored success replaces: the first, a random one, or the one sampled by the
    oldest policy."""
    success_weighting: Literal["one", "truncated"] = "one"
    """Importance weight of the tokens of a stored success. `one`: 1; `truncated`: the same truncated weight as other
    tokens have."""
    dynamic_rollouts: bool = False
    """Reduce the number of rollouts of tasks that often succeed: from a success rate of 0.6 in the task's previous
    group on, 9 / rate - 7 rollouts, at least two."""
    shuffle_rewards: bool = False
    """Control experiment: permute the rewards within each group at random. An improvement that remains is not due to
    the rewards."""


class LoraConfig(Section):
    """LoRA: low-rank adapters are trained and the model stays as it is (arXiv:2106.09685). It requires ZeRO 1, 2 or 3.

    Replicas serve the merged weights; checkpoints contain the adapter only.
    """

    rank: Annotated[int, Field(ge=0, le=1024)] = 0
    """Rank of the adapters; 0 disables LoRA, so that the whole model is trained."""
    alpha: PositiveFactor = 32.0
    """Scale: the product of an adapter's two matrices is multiplied by alpha / rank and added to the layer's matrix."""
    targets: tuple[LayerName, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the language model that get an adapter, by the last parts of their names."""
    vision_targets: tuple[LayerName, ...] = ()
    """Linear layers of the vision tower that get an adapter, such as `qkv` and `proj`; empty: the vision tower is
    frozen, and its features are cached."""

    @model_validator(mode="after")
    def _check_targets(self) -> LoraConfig:
        if self.rank and not self.targets and not self.vision_targets:
            raise ValueError("targets and vision_targets are both empty, so that nothing would be trained")
        return self


class EvalConfig(Section):
    """Evaluation before and after training."""

    num_episodes: NonNegativeInt = 0
    """Number of episodes sampled before and again after GRPO; 0 disables evaluation."""
    min_gain: Fraction | None = None
    """Increase of the success rate (0.1: 10 percentage points) that `deskrl up` requires to end with status 0. The 95 %
    interval of the measured gain must lie above it, and that of no task below 0, so that the verdict does not depend on
    which episodes were sampled. Unset: the gain is reported, but not judged."""


class LearnerConfig(Section):
    """The learner."""

    num_nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of machines on which the learner runs. A launcher starts `deskrl learner CONFIG --node-rank N` on each."""
    num_processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of ranks on each node, started by torchrun."""
    master_addr: Host | None = None
    """Host name or address of node 0, at which the nodes meet; required with several nodes. Ranks communicate over the
    network interfaces that lead to it."""
    master_port: Port = 0
    """Rendezvous port on node 0; required with several nodes. 0: a free port, with one node."""
    rendezvous_timeout_s: PositiveSeconds = 900.0
    """Longest time that a node waits for all others to join, in seconds."""
    node_timeout_s: Annotated[float, Field(ge=10, le=86400)] = 120.0
    """Time after which a node that is not heard of counts as dead, in seconds; the ranks on all other nodes then end. A
    network that is interrupted for a shorter time ends nothing. TCP may take as long again as the interruption took."""
    devices: tuple[Device, ...] = ()
    """Numbers of the GPUs of a node's ranks, one per rank. Empty: those that `CUDA_VISIBLE_DEVICES` allows."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage. Stages 0 and 1 accumulate whole gradients in `dtype` on each rank; stages 2 and 3
    accumulate sharded gradients in float32."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer states in host memory; requires ZeRO stage 1 or higher."""
    offload_reference: bool = False
    """Keep the reference policy of a KL penalty (`grpo.kl_coefficient`) in host memory while it does not score tokens,
    once per update. With ZeRO stage 3, its shards move to the GPU layer by layer. Without effect on a CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Numeric type of the forward and backward pass. `float16` is for GPUs without bfloat16 and uses dynamic loss
    scaling."""
    micro_batch_tokens: PositiveInt = 16384
    """Maximum number of tokens per micro-batch (forward pass), including image tokens. A longer row is a micro-batch of
    its own."""
    activation_checkpointing: Literal["off", "selective", "full"] = "off"
    """Activations kept for the backward pass; the others are recomputed. `off`: all; `selective`: the inputs and the
    attention outputs of layers; `full`: only the inputs of layers."""
    freeze_vision: bool = False
    """Do not train the vision tower. Each screenshot is then encoded once, while its features are cached."""
    lora: LoraConfig = LoraConfig()
    """LoRA, which trains adapters instead of the whole model."""
    feature_cache_bytes: NonNegativeBytes = 8 * 1024**3
    """Size of the cache of image features in host memory, used if the vision tower is frozen; with ZeRO stage 3, no
    features are cached."""
    checkpoint_every: PositiveInt = 1
    """Number of updates between checkpoints. A batch is consumed once a checkpoint that includes its update is
    committed."""
    keep_checkpoints: PositiveInt = 3
    """Number of newest checkpoints to keep."""
    verify_checkpoint: bool = True
    """At the end of the run, load the last checkpoint into a new vLLM engine and compare it with transformers."""
    keep_token_stats: NonNegativeInt = 100
    """Number of newest updates whose per-token logprobs and entropies are kept for `deskrl view`."""
    warm_start: WarmStartConfig | None = None
    """Warm start; unset: none."""
    grpo: GrpoConfig = GrpoConfig()
    """Reinforcement learning."""
    eval: EvalConfig = EvalConfig()
    """Evaluation before and after training."""
    metrics_port: Port = 0
    """Port of the Prometheus metrics; 0 disables them. Unset: `deskrl up` chooses a free port."""

    @property
    def num_ranks(self) -> int:
        """Number of ranks on all nodes."""
        return self.num_nodes * self.num_processes

    @property
    def has_lora(self) -> bool:
        """Whether adapters are trained instead of the whole model."""
        return self.lora.rank > 0

    @property
    def has_frozen_vision(self) -> bool:
        """Whether the output of the vision tower never changes."""
        return self.freeze_vision or (self.has_lora and not self.lora.vision_targets)

    @model_validator(mode="after")
    def _check_lora(self) -> LearnerConfig:
        if self.has_lora and self.zero_stage == 0:
            raise ValueError("lora.rank requires zero_stage 1, 2 or 3")
        if self.has_lora and self.lora.vision_targets and self.freeze_vision:
            raise ValueError("lora.vision_targets and freeze_vision contradict each other")
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> LearnerConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer requires zero_stage 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _check_loss_scaling(self) -> LearnerConfig:
        if self.dtype == "float16" and self.zero_stage == 0:
            raise ValueError("dtype float16 requires zero_stage 1, 2 or 3, which scale the loss")
        return self
