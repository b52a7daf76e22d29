"""GRPO: turns groups of trajectories into a training batch and updates the policy with it."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deskrl.core import ids
from deskrl.core.config import GrpoConfig
from deskrl.learner.advantages import group_advantages, select_advantage, shaped_reward
from deskrl.learner.batch_agreement import check_agreement
from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.batches.micro_batch_loader import MicroBatchLoader
from deskrl.learner.batches.packing import Row, pack, token_staleness
from deskrl.learner.batches.token_stats_collector import TokenStatsCollector
from deskrl.learner.episode_types import Trajectory
from deskrl.learner.group_filter import FilteredGroup
from deskrl.learner.loss_interface import LossInputs
from deskrl.learner.loss_registry import compute_loss, needs_entropy_gradient, select_loss
from deskrl.learner.losses import kl_divergence, regularised, token_denominators
from deskrl.learner.metrics.update_stats import UpdateReport, UpdateStats
from deskrl.learner.policy.deepspeed_engine import DeepSpeedEngine
from deskrl.learner.policy.reference_policy import ReferencePolicy
from deskrl.learner.policy_versions import StalenessOf

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingBatch:
    """Rows of a batch with the advantage of each trajectory (suffix T: trajectories)."""

    rows: tuple[Row, ...]
    rewards: tuple[tuple[float, ...], ...]
    """Shaped rewards of the trajectories of each group."""
    advantages_T: Tensor
    from_buffer_T: Tensor
    """Whether a trajectory is a success from the success buffer."""
    names_T: tuple[tuple[str, str], ...]
    """Group id and episode id of each trajectory."""

    @property
    def num_tokens_T(self) -> Tensor:
        """Number of action tokens of each trajectory."""
        num_tokens = [0] * self.num_trajectories
        for row in self.rows:
            num_tokens[row.trajectory] += len(row.targets)
        return torch.tensor(num_tokens)

    @property
    def num_trajectories(self) -> int:
        """Number of trajectories, those from the success buffer included."""
        return len(self.advantages_T)


def train_on_groups(
    engine: DeepSpeedEngine,
    loader: MicroBatchLoader,
    groups: Sequence[FilteredGroup],
    staleness: StalenessOf,
    config: GrpoConfig,
    seed: int,
    num_updates: int,
    reference: ReferencePolicy | None = None,
) -> UpdateReport | None:
    """Update the policy with the groups of a batch; return None, without an update, if there is nothing to train on.

    Args:
        engine: engine of this rank.
        loader: micro-batch loader of this rank.
        groups: kept groups; the same on every rank.
        staleness: staleness of a span's policy.
        config: configuration of GRPO.
        seed: seed of the run; shuffles rewards if `config.shuffle_rewards` is set.
        num_updates: number of updates so far.
        reference: reference policy of the KL penalty; None without one.

    Raises:
        BatchDamagedError: episodes of the batch are damaged; nothing was computed.
    """
    batch = build_training_batch(groups, staleness, config, seed if config.shuffle_rewards else None)
    parts = _split_minibatches(batch, loader, config) if batch.rows else []
    check_agreement(engine, loader, batch.rows, [part.shard for part in parts])
    return update(engine, loader, batch, config, num_updates, reference) if batch.rows else None


def build_training_batch(
    groups: Sequence[FilteredGroup],
    staleness: StalenessOf,
    config: GrpoConfig,
    shuffle_seed: int | None = None,
) -> TrainingBatch:
    """Return the rows and advantages of kept groups.

    Args:
        groups: kept groups.
        staleness: staleness of a span's policy.
        config: format penalty and formula of the advantages.
        shuffle_seed: seed with which the rewards of each group are permuted, as a control experiment; None keeps them.
    """
    trajectories: list[Trajectory] = []
    rewards_by_group: list[tuple[float, ...]] = []
    for group in groups:
        rewards = [shaped_reward(t.reward, t.format_ok, config.format_penalty) for t in group.trajectories]
        if shuffle_seed is not None:
            random.Random(ids.derive_seed(shuffle_seed, group.group_id)).shuffle(rewards)
        trajectories += group.trajectories
        rewards_by_group.append(tuple(rewards))
    rows: list[Row] = []
    for index, trajectory in enumerate(trajectories):
        spans = {(span.lineage, span.step): staleness(span) for step in trajectory.steps for span in step.spans}
        # Only a stored success can have an unknown lineage, and its staleness enters no statistic.
        known = {version: value if value is not None else 0 for version, value in spans.items()}
        rows += pack(index, trajectory.steps, [token_staleness(step, known) for step in trajectory.steps])
    return TrainingBatch(
        rows=tuple(rows),
        rewards=tuple(rewards_by_group),
        advantages_T=advantages_of(rewards_by_group, config),
        from_buffer_T=torch.tensor([trajectory.from_success_buffer for trajectory in trajectories], dtype=torch.bool),
        names_T=tuple((group.group_id, trajectory.episode_id) for group in groups for trajectory in group.trajectories),
    )


def advantages_of(rewards: Sequence[Sequence[float]], config: GrpoConfig) -> Tensor:
    """Return the advantage of each trajectory (T,), given the shaped rewards of each group."""
    advantage = select_advantage(config)
    by_group = [group_advantages(group, advantage, config.negative_advantage_scale) for group in rewards]
    return torch.tensor([value for group in by_group for value in group], dtype=torch.float32)


def penalised(batch: TrainingBatch, penalties_T: Sequence[float], config: GrpoConfig) -> TrainingBatch:
    """Return a batch with a penalty subtracted from the reward of each trajectory, and its advantages."""
    left = iter(penalties_T)
    rewards = tuple(tuple(reward - next(left) for reward in group) for group in batch.rewards)
    return replace(batch, rewards=rewards, advantages_T=advantages_of(rewards, config))


def learning_rate(config: GrpoConfig, num_updates: int) -> float:
    """Return the learning rate of the update that follows `num_updates` updates.

    It rises linearly from 0 over the W = `config.warmup_updates` first updates. Afterwards, with U =
    `config.num_updates`, M = `config.min_learning_rate_ratio` and x = (num_updates - W) / (U - W), at most 1, it is
    `config.learning_rate` times

        constant  1                                      ARPO's code
        linear    M + (1 - M) (1 - x)
        cosine    M + (1 - M) (1 + cos(pi x)) / 2        SGDR (arXiv:1608.03983), without restarts
    """
    warmup_updates = config.warmup_updates
    if num_updates < warmup_updates:
        return config.learning_rate * num_updates / warmup_updates
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (num_updates - warmup_updates) / max(1, config.num_updates - warmup_updates))
    left = 1 - progress if config.learning_rate_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.min_learning_rate_ratio + (1 - config.min_learning_rate_ratio) * left)


def update(
    engine: DeepSpeedEngine,
    loader: MicroBatchLoader,
    batch: TrainingBatch,
    config: GrpoConfig,
    num_updates: int,
    reference: ReferencePolicy | None = None,
) -> UpdateReport:
    """Update the policy with a batch in `config.num_minibatches` optimizer steps; a collective call.

    The proximal policy is the policy before the first optimizer step.

    Args:
        engine: engine of this rank.
        loader: micro-batch loader of this rank.
        batch: training batch with at least one row; the same on every rank.
        config: configuration of GRPO.
        num_updates: number of updates so far.
        reference: reference policy of the KL penalty; None without one.
    """
    loss = select_loss(config)
    stats, token_stats = UpdateStats(), TokenStatsCollector()
    minibatches = _split_minibatches(batch, loader, config)
    if reference is not None:
        minibatches = _with_reference(minibatches, loader, reference, config)
    # The first optimizer step reads the proximal logprobs from its own forward pass.
    minibatches = [minibatches[0], *(_with_proximal(it, engine, loader, config) for it in minibatches[1:])]
    if reference is not None and config.kl_applied_to == "reward":
        scored = [_with_proximal(minibatches[0], engine, loader, config), *minibatches[1:]]
        batch = penalised(batch, _kl_penalties(engine, scored, batch.num_trajectories, config), config)
    engine.set_optimizer(learning_rate(config, num_updates), config.weight_decay)
    for minibatch in minibatches:
        tokens = _TokenValues(batch, minibatch, engine.device)
        with engine.accumulate_gradients(len(minibatch.shard)):
            for index, micro in enumerate(loader.load(minibatch.shard)):
                micro = micro.to(engine.device)
                scores = engine.forward(micro, config.temperature, needs_entropy_gradient(loss, config))
                inputs = tokens.loss_inputs(micro, index, *scores)
                result = compute_loss(loss, inputs, config)
                kl_N = tokens.kl_divergence(inputs.logprobs_N, index, config)
                total = regularised_loss(result.loss, kl_N, inputs, config)
                # Before the backward pass: reading values from a GPU would wait for that pass too.
                stats.add_micro_batch(micro, inputs, result, total, kl_N)
                token_stats.add(minibatch.shard[index], inputs.prox_logprobs_N, inputs.entropy_N.detach())
                engine.backward(total)
        outcome = engine.step()
        if not outcome.applied:
            _log.error("skipped an optimizer step because the gradient is not finite; the weights are unchanged")
        stats.add_optimizer_step(outcome.applied, outcome.gradient_norm)
    return stats.report(
        engine.sum_over_ranks,
        engine.max_over_ranks,
        engine.gather,
        num_trajectories=batch.num_trajectories,
        num_rows=len(batch.rows),
        token_stats=token_stats.gather(engine.gather, batch.names_T, batch.advantages_T, batch.from_buffer_T),
    )


def regularised_loss(loss: Tensor, kl_N: Tensor | None, inputs: LossInputs, config: GrpoConfig) -> Tensor:
    """Return the loss of a micro-batch with the configured KL penalty and entropy bonus.

    Args:
        loss: policy loss of the micro-batch.
        kl_N: estimated KL divergence of each token; None without a KL penalty.
        inputs: tokens of the micro-batch.
        config: configuration of GRPO.
    """
    kl_coefficient = config.kl_coefficient if config.kl_applied_to == "loss" else 0.0
    return regularised(loss, kl_N, inputs.entropy_N, inputs.denominators_N, kl_coefficient, config.entropy_coefficient)


def measure_mismatch(
    engine: DeepSpeedEngine, loader: MicroBatchLoader, rows: Sequence[Row], temperature: float
) -> tuple[float | None, float | None]:
    """Return mean and maximum of |behaviour logprob - learner's logprob| over rows that the current weights sampled.

    A collective call; (None, None) if the rows have no action tokens.
    """
    total, largest, num_tokens = 0.0, 0.0, 0
    for micro in loader.load(loader.shard(rows)) if rows else ():
        logprobs_N = engine.score(micro, temperature).logprobs_N.cpu()
        difference_N = (micro.behaviour_logprobs_N - logprobs_N).abs()
        total += float(difference_N.sum())
        largest = max(largest, float(difference_N.max())) if len(difference_N) else largest
        num_tokens += len(difference_N)
    total, tokens = engine.sum_over_ranks([total, num_tokens])
    (largest,) = engine.max_over_ranks([largest])
    return (total / tokens, largest) if tokens else (None, None)


@dataclass(frozen=True)
class _Minibatch:
    """Part of a batch that one optimizer step is taken on."""

    shard: list[list[Row]]
    """Micro-batches of this rank, as rows."""
    denominators_T: Tensor
    """Denominator of the token losses of each trajectory of the batch."""
    prox_logprobs: Sequence[Tensor] | None = None
    """Logprobs of each micro-batch under the proximal policy; None: those of the policy at the optimizer step."""
    reference_logprobs: Sequence[Tensor] | None = None
    """Logprobs of each micro-batch under the reference policy; None without a KL penalty."""


class _TokenValues:
    """Values of the tokens of an optimizer step, on the device of the learner.

    Args:
        batch: training batch.
        minibatch: part of the batch that the optimizer step is taken on.
        device: device of the learner.
    """

    def __init__(self, batch: TrainingBatch, minibatch: _Minibatch, device: torch.device) -> None:
        self._minibatch = minibatch
        self._advantages_T = batch.advantages_T.to(device)
        self._from_buffer_T = batch.from_buffer_T.to(device)
        self._denominators_T = minibatch.denominators_T.to(device)

    def loss_inputs(self, micro: MicroBatch, index: int, logprobs_N: Tensor, entropy_N: Tensor) -> LossInputs:
        """Return the inputs of the loss for the micro-batch of this index, given its scores under the policy."""
        scored = self._minibatch.prox_logprobs
        return LossInputs(
            logprobs_N=logprobs_N,
            prox_logprobs_N=logprobs_N.detach() if scored is None else scored[index],
            behaviour_logprobs_N=micro.behaviour_logprobs_N,
            advantages_N=self._advantages_T[micro.trajectory_N],
            entropy_N=entropy_N,
            from_buffer_N=self._from_buffer_T[micro.trajectory_N],
            turn_N=micro.turn_N,
            denominators_N=self._denominators_T[micro.trajectory_N],
        )

    def kl_divergence(self, logprobs_N: Tensor, index: int, config: GrpoConfig) -> Tensor | None:
        """Return the estimated KL divergence of each token of a micro-batch; None without a KL penalty."""
        reference_logprobs = self._minibatch.reference_logprobs
        if reference_logprobs is None:
            return None
        return kl_divergence(logprobs_N, reference_logprobs[index], config.kl_estimator)


def _split_minibatches(batch: TrainingBatch, loader: MicroBatchLoader, config: GrpoConfig) -> list[_Minibatch]:
    """Split a batch into at most `config.num_minibatches` parts; trajectories take turns, which spreads groups."""
    num_parts = min(config.num_minibatches, batch.num_trajectories)
    parts: list[list[Row]] = [[] for _ in range(num_parts)]
    for row in batch.rows:
        parts[row.trajectory % num_parts].append(row)
    minibatches = []
    for part, rows in enumerate(parts):
        num_trajectories = len(range(part, batch.num_trajectories, num_parts))
        denominators_T = token_denominators(
            batch.num_tokens_T, num_trajectories, config.loss_denominator, config.loss_denominator_tokens
        )
        if rows:
            minibatches.append(_Minibatch(loader.shard(rows), denominators_T))
    return minibatches


def _with_proximal(
    minibatch: _Minibatch, engine: DeepSpeedEngine, loader: MicroBatchLoader, config: GrpoConfig
) -> _Minibatch:
    """Return a part of a batch with its logprobs under the current weights as those of the proximal policy."""
    scores = [engine.score(micro, config.temperature).logprobs_N for micro in loader.load(minibatch.shard)]
    return replace(minibatch, prox_logprobs=scores)


def _with_reference(
    minibatches: Sequence[_Minibatch], loader: MicroBatchLoader, reference: ReferencePolicy, config: GrpoConfig
) -> list[_Minibatch]:
    """Return the parts of a batch with their logprobs under the reference policy."""
    return [
        replace(it, reference_logprobs=reference.logprobs(loader.load(it.shard), config.temperature))
        for it in minibatches
    ]


def _kl_penalties(
    engine: DeepSpeedEngine, minibatches: Sequence[_Minibatch], num_trajectories: int, config: GrpoConfig
) -> list[float]:
    """Return the KL penalty of each trajectory of a batch: the weighted sum over its tokens, under the proximal policy.

    A collective call.

    Args:
        engine: engine of this rank.
        minibatches: all parts of the batch, with their proximal and reference logprobs on this rank.
        num_trajectories: number of trajectories of the batch.
        config: weight and estimator of the KL penalty.
    """
    sums_T = torch.zeros(num_trajectories, dtype=torch.float64)
    for minibatch in minibatches:
        assert minibatch.prox_logprobs is not None and minibatch.reference_logprobs is not None
        scored = zip(minibatch.shard, minibatch.prox_logprobs, minibatch.reference_logprobs, strict=True)
        for rows, logprobs_N, reference_N in scored:
            trajectory_N = torch.tensor([row.trajectory for row in rows for _ in row.targets], dtype=torch.long)
            kl_N = kl_divergence(logprobs_N, reference_N, config.kl_estimator)
            sums_T.index_add_(0, trajectory_N, kl_N.double().cpu())
    return [config.kl_coefficient * value for value in engine.sum_over_ranks(sums_T.tolist())]
