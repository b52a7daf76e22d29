"""Comparison of the arms of a sweep: mean of each arm over its seeds, and difference of each two arms.

A seed is one trial. A difference is taken between the runs of one seed, which start alike and draw the same tasks in
the same order. Intervals are Student's over seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from deskrl.analysis.sweep.success_curves import TrainingProgress, training_progress
from deskrl.launch.confidence_intervals import mean_interval

LAST_SHARE = 0.25
"""Share of the budget at its end for which success is reported separately."""


@dataclass(frozen=True)
class RunResult:
    """Result of a complete run up to the budget of environment steps."""

    learning: TrainingProgress
    success: float
    """Mean success over the whole budget, the area under the learning curve."""
    last_success: float
    """Mean success over the last quarter of the budget."""
    minutes: float
    """Minutes of training until the budget was reached."""
    facts: Mapping[str, float]
    """Other statistics of the run by name."""


@dataclass(frozen=True)
class MeanInterval:
    """Mean over seeds with its 95 % interval, which is infinite for a single seed."""

    mean: float
    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        """Whether the interval is finite: there are two or more seeds."""
        return math.isfinite(self.low)


@dataclass(frozen=True)
class ArmResult:
    """Means of an arm over its seeds."""

    arm: str
    num_seeds: int
    success: MeanInterval
    last_success: MeanInterval
    minutes: MeanInterval
    facts: Mapping[str, float]


@dataclass(frozen=True)
class ArmDifference:
    """Difference of an arm from an earlier one, over the seeds that both have."""

    arm: str
    against: str
    num_seeds: int
    success: MeanInterval
    last_success: MeanInterval
    minutes_ratio: MeanInterval
    """Ratio of training times; geometric mean."""


def summarise_run(updates: Sequence[Mapping[str, Any]], budget: int) -> RunResult:
    """Summarise a run from its records of updates, up to a budget of environment steps."""
    learning = training_progress(updates)
    return RunResult(
        learning=learning,
        success=learning.success_between(0, budget),
        last_success=learning.success_between((1 - LAST_SHARE) * budget, budget),
        minutes=learning.seconds_at(budget) / 60,
        facts=_facts(updates),
    )


def compare_arms(results: Mapping[str, Mapping[int, RunResult]]) -> tuple[list[ArmResult], list[ArmDifference]]:
    """Return the result of each arm that has a run, and its differences from all earlier arms.

    Args:
        results: results by arm, in the order of the sweep, and by seed.
    """
    arms = [_arm(arm, list(by_seed.values())) for arm, by_seed in results.items() if by_seed]
    differences = []
    for against, arm in itertools.combinations(results, 2):
        pairs = [(base, results[arm][seed]) for seed, base in results[against].items() if seed in results[arm]]
        if pairs:
            differences.append(_difference(arm, against, pairs))
    return arms, differences


def _arm(arm: str, results: Sequence[RunResult]) -> ArmResult:
    def over_seeds(value: Callable[[RunResult], float]) -> MeanInterval:
        return MeanInterval(*mean_interval([value(result) for result in results]))

    facts = {name: fmean(result.facts[name] for result in results) for name in results[0].facts}
    return ArmResult(
        arm,
        len(results),
        over_seeds(lambda result: result.success),
        over_seeds(lambda result: result.last_success),
        over_seeds(lambda result: result.minutes),
        facts,
    )


def _difference(arm: str, against: str, pairs: Sequence[tuple[RunResult, RunResult]]) -> ArmDifference:
    logs = mean_interval([math.log(other.minutes / base.minutes) for base, other in pairs])
    return ArmDifference(
        arm,
        against,
        len(pairs),
        MeanInterval(*mean_interval([other.success - base.success for base, other in pairs])),
        MeanInterval(*mean_interval([other.last_success - base.last_success for base, other in pairs])),
        MeanInterval(*(math.exp(min(log, 700.0)) for log in logs)),
    )


def _facts(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    def mean_of(key: str) -> float:
        values = [update[key] for update in updates if update.get(key) is not None]
        return fmean(values) if values else 0.0

    return {
        "updates": len(updates),
        "episodes": sum(update["num_episodes"] for update in updates),
        "staleness, mean": mean_of("staleness_mean"),
        "staleness, largest": max((update["staleness_max"] or 0 for update in updates), default=0),
        "groups dropped as stale": sum(update["dropped"].get("stale", 0) for update in updates),
        "groups without spread": sum(update["without_spread"] for update in updates),
        "stored successes used": sum(update["replayed"] for update in updates),
    }
