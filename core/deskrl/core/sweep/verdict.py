"""What a sweep found: each arm in numbers, and how each two of them differ. Pure arithmetic.

A seed is one trial: what is told of an arm is the mean over its seeds, and a difference is that between the runs of one
seed, which start alike and meet the same tasks in the same order. Intervals are Student's over seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from deskrl.core.stats import mean_interval
from deskrl.core.sweep.curves import Learning, learning_of

LAST_SHARE = 0.25
"""Of the budget: its end, of which success is told apart."""


@dataclass(frozen=True)
class Trial:
    """A complete run, cut at the budget."""

    learning: Learning
    success: float
    """Over all of the budget: the area below the learning curve."""
    last_success: float
    """Over the end of it."""
    minutes: float
    """Of training until the budget was used up."""
    facts: Mapping[str, float]
    """How it went otherwise."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval; infinite where one seed is all there is."""

    mean: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.low)


@dataclass(frozen=True)
class ArmResult:
    """An arm over its seeds."""

    arm: str
    num_seeds: int
    success: Interval
    last_success: Interval
    minutes: Interval
    facts: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """An arm against one before it, over the seeds that both have."""

    arm: str
    against: str
    num_seeds: int
    success: Interval
    last_success: Interval
    minutes_ratio: Interval
    """Of wall clock; geometric."""


def judge_run(updates: Sequence[Mapping[str, Any]], budget: int) -> Trial:
    """One run, from its records of updates."""
    learning = learning_of(updates)
    return Trial(
        learning=learning,
        success=learning.success_between(0, budget),
        last_success=learning.success_between((1 - LAST_SHARE) * budget, budget),
        minutes=learning.seconds_at(budget) / 60,
        facts=_facts(updates),
    )


def judge_arms(trials: Mapping[str, Mapping[int, Trial]]) -> tuple[list[ArmResult], list[Difference]]:
    """All arms that have a trial, and each against those before it.

    Args:
        trials: by arm, in the sweep's order, and by seed.
    """
    arms = [_arm(arm, list(by_seed.values())) for arm, by_seed in trials.items() if by_seed]
    differences = []
    for against, arm in itertools.combinations(trials, 2):
        pairs = [(one, trials[arm][seed]) for seed, one in trials[against].items() if seed in trials[arm]]
        if pairs:
            differences.append(_difference(arm, against, pairs))
    return arms, differences


def _arm(arm: str, trials: Sequence[Trial]) -> ArmResult:
    def over_seeds(value: Callable[[Trial], float]) -> Interval:
        return Interval(*mean_interval([value(trial) for trial in trials]))

    facts = {name: fmean(trial.facts[name] for trial in trials) for name in trials[0].facts}
    return ArmResult(
        arm,
        len(trials),
        over_seeds(lambda trial: trial.success),
        over_seeds(lambda trial: trial.last_success),
        over_seeds(lambda trial: trial.minutes),
        facts,
    )


def _difference(arm: str, against: str, pairs: Sequence[tuple[Trial, Trial]]) -> Difference:
    logs = mean_interval([math.log(other.minutes / one.minutes) for one, other in pairs])
    return Difference(
        arm,
        against,
        len(pairs),
        Interval(*mean_interval([other.success - one.success for one, other in pairs])),
        Interval(*mean_interval([other.last_success - one.last_success for one, other in pairs])),
        Interval(*(math.exp(min(log, 700.0)) for log in logs)),
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
