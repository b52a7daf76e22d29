"""An evaluation in numbers, from its records. Pure; knows nothing of how episodes were played.

A success is a reward above a threshold. Intervals are Wilson's over tasks: episodes of one task are alike, so repeats
make a task's own rate surer and add no trial. Faults are counted and stand in no rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from deskrl.core.evaluation.record import TaskRecord
from deskrl.core.stats import wilson_interval
from deskrl.core.timings import spread_by_part


@dataclass(frozen=True)
class Rate:
    """Successes among episodes, with a 95 % interval."""

    num_tasks: int
    num_episodes: int
    num_successes: int
    rate: float | None
    low: float
    high: float
    average_reward: float | None
    num_faulted: int


def success_rate(records: Sequence[TaskRecord], success_above: float) -> Rate:
    """The success rate over all episodes of these tasks."""
    rewards = [[e.reward for e in record.episodes if e.reward is not None] for record in records]
    outcomes = [[reward > success_above for reward in of_task] for of_task in rewards]
    num_episodes = sum(map(len, outcomes))
    num_successes = sum(map(sum, outcomes))
    means = [fmean(of_task) for of_task in outcomes if of_task]
    low, high = wilson_interval(sum(means), len(means))
    return Rate(
        num_tasks=len(records),
        num_episodes=num_episodes,
        num_successes=num_successes,
        rate=num_successes / num_episodes if num_episodes else None,
        low=low,
        high=high,
        average_reward=fmean(reward for of_task in rewards for reward in of_task) if num_episodes else None,
        num_faulted=sum(episode.reward is None for record in records for episode in record.episodes),
    )


def summarise(records: Sequence[TaskRecord], success_above: float) -> dict[str, Any]:
    """All that is told of an evaluation, as a JSON document."""
    by_application = {
        name: [record for record in records if record.application == name]
        for name in sorted({record.application for record in records})
    }
    ended = [episode for record in records for episode in record.episodes if episode.reward is not None]
    feasible = [record for record in records if not record.infeasible]
    return {
        "success_above": success_above,
        "all": vars(success_rate(records, success_above)),
        "feasible": vars(success_rate(feasible, success_above)),
        "infeasible": vars(success_rate([r for r in records if r.infeasible], success_above)),
        "applications": {name: vars(success_rate(of, success_above)) for name, of in by_application.items()},
        "tasks": {record.task_id: vars(success_rate([record], success_above)) | _pace(record) for record in records},
        "terminations": dict(Counter(episode.termination for record in records for episode in record.episodes)),
        "uncounted": dict(Counter(e.termination for record in records for e in record.episodes if e.reward is None)),
        "steps_per_episode": fmean(episode.num_steps for episode in ended) if ended else None,
        "seconds_per_episode": fmean(episode.duration_s for episode in ended) if ended else None,
        "timings_ms": spread_by_part(turn for episode in ended for turn in episode.timings_ms),
        "versions": sorted({version for episode in ended for version in episode.versions}),
    }


def _pace(record: TaskRecord) -> dict[str, Any]:
    ended = [episode for episode in record.episodes if episode.reward is not None]
    return {
        "application": record.application,
        "infeasible": record.infeasible,
        "steps": fmean(episode.num_steps for episode in ended) if ended else None,
        "seconds": fmean(episode.duration_s for episode in ended) if ended else None,
    }
