"""Statistics of policy updates, accumulated over micro-batches and reduced over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.batches.token_stats import BatchTokenStats
from deskrl.learner.loss_interface import LossInputs, LossResult

Reduce = Callable[[Sequence[float]], list[float]]
"""Collective operation that reduces each number over all ranks."""

SumsByName = dict[str, tuple[float, int]]
"""Sum over tokens and number of tokens of each metric of the loss."""

_SUMMED = (
    *("loss", "policy_loss", "clipped", "importance", "entropy", "kl", "tokens"),
    *("staleness", "sampled", "current_gap", "current", "lagged_gap"),
)


@dataclass(frozen=True)
class UpdateReport:
    """Statistics of an update over all ranks; None where there was nothing to measure."""

    loss: float
    """Loss, KL penalty and entropy bonus included; mean over the optimizer steps."""
    policy_loss: float
    """The same without KL penalty and entropy bonus."""
    gradient_norm: float
    """Largest norm over the optimizer steps, before clipping; NaN if a step was skipped."""
    applied: bool
    """Whether all optimizer steps were applied."""
    clip_fraction: float
    """Share of tokens whose gradient was clipped."""
    importance_mean: float
    """Mean truncated importance weight."""
    loss_metrics: Mapping[str, float]
    """Mean over tokens of each metric that the loss defines; empty on ranks other than 0."""
    entropy: float
    """Mean entropy of the tokens' distributions, in nats."""
    kl: float | None
    """Mean estimated KL divergence of the tokens from the reference policy, in nats; None without a KL penalty."""
    staleness_mean: float
    """Mean staleness of the fresh tokens, in policy versions."""
    staleness_max: int
    """Largest staleness of a fresh token, in policy versions."""
    mismatch_mean: float | None
    """Mean of |behaviour logprob - proximal logprob| over tokens that the current version sampled."""
    mismatch_max: float | None
    """Maximum of the same."""
    lagged_difference_mean: float | None
    """Mean of the same over tokens of earlier versions: how far the policy has moved, not an error."""
    num_trajectories: int
    """Trajectories of the batch."""
    num_rows: int
    """Rows of the batch."""
    num_tokens: int
    """Action tokens of the batch."""
    token_stats: BatchTokenStats
    """Statistics of each token by group and episode; empty on ranks other than 0."""


@dataclass(frozen=True)
class WarmStartReport:
    """Statistics of one optimizer step of the warm start over all ranks."""

    update: int
    """Number of the optimizer step, from 1."""
    loss: float
    """Cross-entropy, mean over action tokens."""
    learning_rate: float
    gradient_norm: float
    """Norm before clipping."""
    likelihoods: Mapping[str, float] | None
    """Likelihood of a demonstrated episode by task, after the step; None if it was not measured."""


class UpdateStats:
    """Accumulator of one update's statistics on one rank."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(_SUMMED, 0.0)
        self._has_kl = False
        self._loss_metrics: SumsByName = {}
        self._max_staleness = 0.0
        self._max_current_gap = 0.0
        self._gradient_norms: list[float] = []
        self._applied = True

    def add_micro_batch(
        self, micro: MicroBatch, inputs: LossInputs, result: LossResult, loss: Tensor, kl_N: Tensor | None = None
    ) -> None:
        """Add the statistics of one micro-batch.

        Args:
            micro: the micro-batch.
            inputs: its tokens.
            result: its policy loss.
            loss: the policy loss with KL penalty and entropy bonus.
            kl_N: estimated KL divergence of each token from the reference policy; None without a KL penalty.
        """
        sums = self._sums
        sums["loss"] += float(loss.detach())
        sums["policy_loss"] += float(result.loss.detach())
        sums["clipped"] += float(result.clipped_N.sum())
        sums["importance"] += float(result.importance_N.sum())
        sums["entropy"] += float(inputs.entropy_N.detach().sum())
        sums["tokens"] += len(micro.target_N)
        if kl_N is not None:
            self._has_kl = True
            sums["kl"] += float(kl_N.detach().sum())
        for name, values_N in result.metrics.items():
            total, num_tokens = self._loss_metrics.get(name, (0.0, 0))
            self._loss_metrics[name] = total + float(values_N.detach().sum()), num_tokens + len(values_N)
        self._add_staleness(micro, inputs.prox_logprobs_N, ~inputs.from_buffer_N)

    def add_optimizer_step(self, applied: bool, gradient_norm: float) -> None:
        """Add the outcome of one optimizer step."""
        self._applied = self._applied and applied
        self._gradient_norms.append(gradient_norm)

    def report(
        self,
        sum_over_ranks: Reduce,
        max_over_ranks: Reduce,
        gather: Callable[[SumsByName], list[SumsByName]],
        num_trajectories: int,
        num_rows: int,
        token_stats: BatchTokenStats,
    ) -> UpdateReport:
        """Return the statistics over all ranks; a collective call.

        Args:
            sum_over_ranks: sums numbers over ranks.
            max_over_ranks: takes the maximum of numbers over ranks.
            gather: returns each rank's argument on rank 0, and an empty list on the others.
            num_trajectories: trajectories of the batch.
            num_rows: rows of the batch.
            token_stats: statistics of each token.
        """
        total = dict(zip(self._sums, sum_over_ranks(list(self._sums.values())), strict=True))
        max_staleness, max_current_gap = max_over_ranks([self._max_staleness, self._max_current_gap])
        tokens, sampled, current = total["tokens"], total["sampled"], total["current"]
        return UpdateReport(
            loss=total["loss"] / len(self._gradient_norms),
            policy_loss=total["policy_loss"] / len(self._gradient_norms),
            gradient_norm=max(self._gradient_norms) if self._applied else math.nan,
            applied=self._applied,
            clip_fraction=total["clipped"] / tokens,
            importance_mean=total["importance"] / tokens,
            loss_metrics=_means(gather(self._loss_metrics)),
            entropy=total["entropy"] / tokens,
            kl=total["kl"] / tokens if self._has_kl else None,
            staleness_mean=total["staleness"] / sampled if sampled else 0.0,
            staleness_max=int(max_staleness),
            mismatch_mean=total["current_gap"] / current if current else None,
            mismatch_max=max_current_gap if current else None,
            lagged_difference_mean=total["lagged_gap"] / (sampled - current) if sampled > current else None,
            num_trajectories=num_trajectories,
            num_rows=num_rows,
            num_tokens=int(tokens),
            token_stats=token_stats,
        )

    def _add_staleness(self, micro: MicroBatch, prox_logprobs_N: Tensor, sampled_N: Tensor) -> None:
        """Add staleness and logprob gaps to the behaviour policy; tokens from the success buffer do not count."""
        gap_N = (micro.behaviour_logprobs_N - prox_logprobs_N).abs()
        current_N = sampled_N & (micro.staleness_N == 0)
        sums = self._sums
        sums["sampled"] += float(sampled_N.sum())
        sums["staleness"] += float(micro.staleness_N[sampled_N].sum())
        sums["current"] += float(current_N.sum())
        sums["current_gap"] += float(gap_N[current_N].sum())
        sums["lagged_gap"] += float(gap_N[sampled_N & ~current_N].sum())
        if bool(sampled_N.any()):
            self._max_staleness = max(self._max_staleness, float(micro.staleness_N[sampled_N].max()))
        if bool(current_N.any()):
            self._max_current_gap = max(self._max_current_gap, float(gap_N[current_N].max()))


def _means(parts: Sequence[SumsByName]) -> dict[str, float]:
    """Return the mean of each metric over the tokens of all ranks."""
    means = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        sums = [part[name] for part in parts if name in part]
        if num_tokens := sum(num for _, num in sums):
            means[name] = sum(total for total, _ in sums) / num_tokens
    return means
