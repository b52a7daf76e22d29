"""One GRPO update: from selected groups to an optimizer step and what is worth knowing of it.

Knows advantages, rows and losses; knows nothing of where groups come from or where weights go.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deskrl.core import ids
from deskrl.core.config import GrpoConfig
from deskrl.core.scores import BatchScores
from deskrl.core.trajectory import Span
from deskrl.learner.advantages import group_advantages, learnt_reward
from deskrl.learner.batches.batch import MicroBatch
from deskrl.learner.batches.feed import Feed
from deskrl.learner.batches.packing import Row, pack, token_lags
from deskrl.learner.batches.token_scores import TokenScores
from deskrl.learner.losses import policy_loss, token_denominators
from deskrl.learner.policy.engine import Engine
from deskrl.learner.policy.model import Scores
from deskrl.learner.select import Selection
from deskrl.learner.trajectories import Trajectory

_log = logging.getLogger("deskrl.learner")


@dataclass(frozen=True)
class Learnable:
    """Rows of a batch with what each trajectory is worth (suffix T: trajectories)."""

    rows: tuple[Row, ...]
    advantages_T: Tensor
    replayed_T: Tensor
    names_T: tuple[tuple[str, str], ...]
    """The group and the episode."""

    @property
    def num_tokens_T(self) -> Tensor:
        """Action tokens of each trajectory."""
        num_tokens = [0] * self.num_trajectories
        for row in self.rows:
            num_tokens[row.trajectory] += len(row.targets)
        return torch.tensor(num_tokens)

    @property
    def num_trajectories(self) -> int:
        """Replayed ones counted."""
        return len(self.advantages_T)


@dataclass(frozen=True)
class UpdateReport:
    """What a batch did, over all ranks; None where nothing was there to measure."""

    loss: float
    gradient_norm: float
    applied: bool
    clip_fraction: float
    importance_mean: float
    entropy: float
    staleness_mean: float
    staleness_max: int
    mismatch_mean: float | None
    """Of |behaviour logprob - the learner's| over tokens sampled by the very version that learns."""
    mismatch_max: float | None
    lagged_difference_mean: float | None
    """The same over tokens of older versions: how far the policy has moved, no error."""
    num_trajectories: int
    num_rows: int
    num_tokens: int
    token_scores: BatchScores
    """By group and episode; empty on ranks other than the first."""


def prepare(
    selections: Sequence[Selection],
    distance: Callable[[Span], int | None],
    config: GrpoConfig,
    shuffle_seed: int | None = None,
) -> Learnable:
    """Rows and advantages of the groups that are learnt from.

    Args:
        selections: not dropped.
        distance: versions between a span's policy and the one that learns; None for one that is not comparable.
        config: what rewards and advantages are made of.
        shuffle_seed: deal each group's rewards out at random, for a control experiment.
    """
    trajectories: list[Trajectory] = []
    advantages: list[float] = []
    for selection in selections:
        rewards = [learnt_reward(t.reward, t.format_ok, config.format_penalty) for t in selection.trajectories]
        if shuffle_seed is not None:
            random.Random(ids.derive_seed(shuffle_seed, selection.group_id)).shuffle(rewards)
        trajectories += selection.trajectories
        advantages += group_advantages(rewards, config.negative_scale, config.advantage)
    rows: list[Row] = []
    for index, trajectory in enumerate(trajectories):
        spans = {(span.lineage, span.step): distance(span) for step in trajectory.steps for span in step.spans}
        # Only a replayed success can be of a lineage that is not known any more; its lag is told nowhere.
        lag_of = {version: lag if lag is not None else 0 for version, lag in spans.items()}
        rows += pack(index, trajectory.steps, [token_lags(step, lag_of) for step in trajectory.steps])
    return Learnable(
        rows=tuple(rows),
        advantages_T=torch.tensor(advantages, dtype=torch.float32),
        replayed_T=torch.tensor([trajectory.replayed for trajectory in trajectories], dtype=torch.bool),
        names_T=tuple((it.group_id, trajectory.episode_id) for it in selections for trajectory in it.trajectories),
    )


def learning_rate(config: GrpoConfig, num_updates: int) -> float:
    """Of the update that comes after `num_updates`: rises from 0 over the warm-up, then stays."""
    if num_updates >= config.warmup_updates:
        return config.learning_rate
    return config.learning_rate * num_updates / config.warmup_updates


def learn(engine: Engine, feed: Feed, batch: Learnable, config: GrpoConfig, num_updates: int) -> UpdateReport:
    """Learn a batch in `config.minibatches` optimizer steps; `num_updates` batches were learnt before."""
    sums, token_scores = _Sums(batch), TokenScores()
    minibatches = _split(batch, config.minibatches)
    # The policy that the batch starts from; for the first optimizer step it is that step's own forward pass.
    prox = [None, *(_score(engine, feed, rows, config.temperature) for rows, _ in minibatches[1:])]
    engine.set_optimizer(learning_rate(config, num_updates), config.weight_decay)
    applied, norms = True, []
    for (rows, num_trajectories), prox_of_step in zip(minibatches, prox, strict=True):
        denominators_T = token_denominators(
            batch.num_tokens_T, num_trajectories, config.loss_denominator, config.loss_scale_tokens
        )

        share = feed.share(rows)

        def loss_of(
            index: int,
            micro: MicroBatch,
            scores: Scores,
            share: list[list[Row]] = share,
            prox_of_step: list[Tensor] | None = prox_of_step,
            denominators_T: Tensor = denominators_T,
        ) -> Tensor:
            prox_N = scores.logprobs_N.detach() if prox_of_step is None else prox_of_step[index]
            token_scores.note(share[index], prox_N, scores.entropy_N)
            return sums.loss(micro, scores, prox_N, denominators_T, config)

        outcome = engine.update(feed.batches(share), len(share), config.temperature, loss_of)
        if not outcome.applied:
            _log.error("the gradient is not finite: this optimizer step is skipped, the weights stay as they are")
        applied = applied and outcome.applied
        norms.append(outcome.gradient_norm)
    norm = max(norms) if applied else math.nan
    scores_of_tokens = token_scores.gather(engine, batch.names_T, batch.advantages_T, batch.replayed_T)
    return sums.report(engine, len(minibatches), applied, norm, scores_of_tokens)


def measure_mismatch(
    engine: Engine, feed: Feed, rows: Sequence[Row], temperature: float
) -> tuple[float | None, float | None]:
    """Mean and maximum of |behaviour logprob - the learner's| over rows that the present weights have sampled."""
    total, largest, num_tokens = 0.0, 0.0, 0
    for micro in feed.batches(feed.share(rows)) if rows else ():
        logprobs_N = engine.score(micro, temperature).logprobs_N.cpu()
        difference_N = (micro.behaviour_logprobs_N - logprobs_N).abs()
        total += float(difference_N.sum())
        largest = max(largest, float(difference_N.max())) if len(difference_N) else largest
        num_tokens += len(difference_N)
    total, tokens = engine.sum_over_ranks([total, num_tokens])
    (largest,) = engine.max_over_ranks([largest])
    return (total / tokens, largest) if tokens else (None, None)


def _split(batch: Learnable, num_parts: int) -> list[tuple[list[Row], int]]:
    """Rows and number of trajectories of each optimizer step; trajectories take turns, so groups are spread."""
    num_parts = min(num_parts, batch.num_trajectories)
    parts: list[list[Row]] = [[] for _ in range(num_parts)]
    for row in batch.rows:
        parts[row.trajectory % num_parts].append(row)
    sizes = [len(range(part, batch.num_trajectories, num_parts)) for part in range(num_parts)]
    return [(rows, size) for rows, size in zip(parts, sizes, strict=True) if rows]


def _score(engine: Engine, feed: Feed, rows: Sequence[Row], temperature: float) -> list[Tensor]:
    return [engine.score(micro, temperature).logprobs_N for micro in feed.batches(feed.share(rows))]


class _Sums:
    """Adds up over micro-batches what the report needs."""

    def __init__(self, batch: Learnable) -> None:
        self._batch = batch
        self._sums = dict.fromkeys(
            ("loss", "clipped", "importance", "entropy", "tokens", "lag", "own", "fresh_gap", "fresh", "lagged_gap"),
            0.0,
        )
        self._max_lag = 0.0
        self._max_fresh_gap = 0.0

    def loss(
        self, micro: MicroBatch, scores: Scores, prox_N: Tensor, denominators_T: Tensor, config: GrpoConfig
    ) -> Tensor:
        """The loss of a micro-batch, noted on the way."""
        device = scores.logprobs_N.device
        replayed_N = self._batch.replayed_T.to(device)[micro.trajectory_N]
        result = policy_loss(
            scores.logprobs_N,
            prox_N,
            micro.behaviour_logprobs_N,
            self._batch.advantages_T.to(device)[micro.trajectory_N],
            self._uncorrected(replayed_N, config),
            denominators_T.to(device)[micro.trajectory_N],
            config.clip_low,
            config.clip_high,
            config.importance_cap,
            config.dual_clip,
        )
        sums = self._sums
        sums["loss"] += float(result.loss.detach())
        sums["clipped"] += float(result.clipped_N.sum())
        sums["importance"] += float(result.importance_N.sum())
        sums["entropy"] += float(scores.entropy_N.sum())
        sums["tokens"] += len(micro.target_N)
        self._note_lags(micro, prox_N, ~replayed_N)
        return result.loss

    @staticmethod
    def _uncorrected(replayed_N: Tensor, config: GrpoConfig) -> Tensor:
        """Tokens that weigh as if the policy that the update starts from had sampled them."""
        if config.importance == "off":
            return torch.ones_like(replayed_N)
        return replayed_N if config.success_ratio == "one" else torch.zeros_like(replayed_N)

    def _note_lags(self, micro: MicroBatch, prox_N: Tensor, own_N: Tensor) -> None:
        """Staleness and the gap to the behaviour policy, of tokens that are no replayed ones."""
        gap_N = (micro.behaviour_logprobs_N - prox_N).abs()
        fresh_N = own_N & (micro.lag_N == 0)
        sums = self._sums
        sums["own"] += float(own_N.sum())
        sums["lag"] += float(micro.lag_N[own_N].sum())
        sums["fresh"] += float(fresh_N.sum())
        sums["fresh_gap"] += float(gap_N[fresh_N].sum())
        sums["lagged_gap"] += float(gap_N[own_N & ~fresh_N].sum())
        if bool(own_N.any()):
            self._max_lag = max(self._max_lag, float(micro.lag_N[own_N].max()))
        if bool(fresh_N.any()):
            self._max_fresh_gap = max(self._max_fresh_gap, float(gap_N[fresh_N].max()))

    def report(
        self,
        engine: Engine,
        num_steps: int,
        applied: bool,
        gradient_norm: float,
        token_scores: BatchScores,
    ) -> UpdateReport:
        """The sums of all ranks as means."""
        total = dict(zip(self._sums, engine.sum_over_ranks(list(self._sums.values())), strict=True))
        max_lag, max_fresh_gap = engine.max_over_ranks([self._max_lag, self._max_fresh_gap])
        tokens, own, fresh = total["tokens"], total["own"], total["fresh"]
        return UpdateReport(
            loss=total["loss"] / num_steps,
            gradient_norm=gradient_norm,
            applied=applied,
            clip_fraction=total["clipped"] / tokens,
            importance_mean=total["importance"] / tokens,
            entropy=total["entropy"] / tokens,
            staleness_mean=total["lag"] / own if own else 0.0,
            staleness_max=int(max_lag),
            mismatch_mean=total["fresh_gap"] / fresh if fresh else None,
            mismatch_max=max_fresh_gap if fresh else None,
            lagged_difference_mean=total["lagged_gap"] / (own - fresh) if own > fresh else None,
            num_trajectories=self._batch.num_trajectories,
            num_rows=len(self._batch.rows),
            num_tokens=int(tokens),
            token_scores=token_scores,
        )
