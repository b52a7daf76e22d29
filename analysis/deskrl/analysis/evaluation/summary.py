"""Summary of an evaluation: success rates and pass@k with intervals, terminations and latencies.

Intervals are Wilson's over tasks: repeats make the rate of their task more precise, but episodes of one task are not
independent trials. Unlike a bootstrap over tasks, Wilson's interval is not empty if all of few tasks have the same
outcome. Faults are counted, but are part of no rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean
from typing import Any

from deskrl.analysis.evaluation.episode_records import EvaluatedTask
from deskrl.core.group_outcome import is_success
from deskrl.core.latency_breakdown import percentiles_by_part
from deskrl.launch.confidence_intervals import wilson_interval


@dataclass(frozen=True)
class SuccessRate:
    """Success rate over episodes, with its 95 % interval over tasks."""

    num_tasks: int
    num_episodes: int
    num_successes: int
    rate: float | None
    low: float
    high: float
    average_reward: float | None
    num_faulted: int


@dataclass(frozen=True)
class PassRate:
    """Probability that at least one of k episodes of a task succeeds, with its 95 % interval over tasks."""

    num_tasks: int
    """Number of tasks with k or more episodes that count; the others are left out."""
    rate: float
    low: float
    high: float


def pass_at_k(records: Sequence[EvaluatedTask], success_threshold: float) -> dict[int, PassRate]:
    """Return pass@k for k = 1, 2, 4, … and for the largest number of episodes of a task.

    The estimate of a task is unbiased: 1 - C(n - c, k) / C(n, k) for c successes in n episodes (Chen et al., Evaluating
    Large Language Models Trained on Code, 2021, equation 1).
    """
    counts = []
    for record in records:
        outcomes = [is_success(e.reward, success_threshold) for e in record.episodes if e.reward is not None]
        counts.append((sum(outcomes), len(outcomes)))
    largest = max((n for _, n in counts), default=0)
    rates = {}
    for k in sorted({*(2**power for power in range(largest.bit_length())), largest} - {0}):
        passed = [1 - comb(n - successes, k) / comb(n, k) for successes, n in counts if n >= k]
        low, high = wilson_interval(sum(passed), len(passed))
        rates[k] = PassRate(len(passed), fmean(passed), low, high)
    return rates


def success_rate(records: Sequence[EvaluatedTask], success_threshold: float) -> SuccessRate:
    """Return the success rate over all episodes of these tasks."""
    rewards = [[e.reward for e in record.episodes if e.reward is not None] for record in records]
    outcomes = [[is_success(reward, success_threshold) for reward in task_rewards] for task_rewards in rewards]
    num_episodes = sum(map(len, outcomes))
    num_successes = sum(map(sum, outcomes))
    means = [fmean(task_rewards) for task_rewards in outcomes if task_rewards]
    low, high = wilson_interval(sum(means), len(means))
    return SuccessRate(
        num_tasks=len(records),
        num_episodes=num_episodes,
        num_successes=num_successes,
        rate=num_successes / num_episodes if num_episodes else None,
        low=low,
        high=high,
        average_reward=fmean(reward for task_rewards in rewards for reward in task_rewards) if num_episodes else None,
        num_faulted=sum(episode.reward is None for record in records for episode in record.episodes),
    )


def summarise(records: Sequence[EvaluatedTask], success_threshold: float) -> dict[str, Any]:
    """Return the summary of an evaluation as a JSON document."""
    by_application = {
        name: [record for record in records if record.application == name]
        for name in sorted({record.application for record in records})
    }
    ended = [episode for record in records for episode in record.episodes if episode.reward is not None]
    feasible = [record for record in records if not record.infeasible]
    return {
        "success_above": success_threshold,
        "all": vars(success_rate(records, success_threshold)),
        "feasible": vars(success_rate(feasible, success_threshold)),
        "infeasible": vars(success_rate([r for r in records if r.infeasible], success_threshold)),
        "pass_at_k": {str(k): vars(rate) for k, rate in pass_at_k(records, success_threshold).items()},
        "applications": {name: vars(success_rate(tasks, success_threshold)) for name, tasks in by_application.items()},
        "tasks": {
            record.task_id: vars(success_rate([record], success_threshold)) | _lengths(record) for record in records
        },
        "terminations": dict(Counter(episode.termination for record in records for episode in record.episodes)),
        "uncounted": dict(Counter(e.termination for record in records for e in record.episodes if e.reward is None)),
        "steps_per_episode": fmean(episode.num_steps for episode in ended) if ended else None,
        "seconds_per_episode": fmean(episode.duration_s for episode in ended) if ended else None,
        "timings_ms": percentiles_by_part(step for episode in ended for step in episode.timings_ms),
        "versions": sorted({version for episode in ended for version in episode.versions}),
    }


def _lengths(record: EvaluatedTask) -> dict[str, Any]:
    """Return application, mean steps and mean seconds of a task."""
    ended = [episode for episode in record.episodes if episode.reward is not None]
    return {
        "application": record.application,
        "infeasible": record.infeasible,
        "steps": fmean(episode.num_steps for episode in ended) if ended else None,
        "seconds": fmean(episode.duration_s for episode in ended) if ended else None,
    }
