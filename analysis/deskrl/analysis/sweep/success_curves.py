"""Success curves of a sweep over environment steps and over training time, computed from the updates of runs.

Each update covers a range of environment steps (those of its fresh episodes, including dropped groups), with one
success rate and one duration; time between an interruption and the resumption is not included. Success at a point is
the mean over the window of steps before it. A run ends with the update that reaches its budget, and the part beyond the
budget is cut off, so that all runs are compared at equal environment steps.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deskrl.launch.confidence_intervals import mean_interval

WINDOW_SHARE = 0.2
"""Share of the budget over which success is averaged."""
NUM_POINTS = 60
"""Number of points of a curve."""


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of one run. `steps` and `seconds` start with 0, before the first update."""

    steps: tuple[float, ...]
    """Environment steps after each update."""
    seconds: tuple[float, ...]
    """Seconds of training after each update."""
    rates: tuple[float, ...]
    """Success rate in each update (one element less)."""

    def success_between(self, low: float, high: float) -> float:
        """Return the mean success over a range of environment steps."""
        total = 0.0
        for (start, end), rate in zip(itertools.pairwise(self.steps), self.rates, strict=True):
            total += rate * max(0.0, min(end, high) - max(start, low))
        return total / (high - low)

    def success_at(self, steps: float, window: float) -> float:
        """Return the mean success over the window before `steps`, or over all steps if there are fewer."""
        return self.success_between(max(0.0, steps - window), steps)

    def seconds_at(self, steps: float) -> float:
        """Return the seconds of training after this number of environment steps."""
        return _interpolate(self.steps, self.seconds, steps)

    def steps_at(self, seconds: float) -> float:
        """Return the environment steps after these seconds of training."""
        return _interpolate(self.seconds, self.steps, seconds)


@dataclass(frozen=True)
class CurvePoint:
    """Point of an arm's curve: the mean over seeds with its 95 % interval."""

    x: float
    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether there are two or more seeds."""
        return math.isfinite(self.low)


def training_progress(updates: Sequence[Mapping[str, Any]]) -> TrainingProgress:
    """Return the progress of a run from its records of updates, each of them once and in order."""
    kept = [update for update in updates if update["num_env_steps"]]
    steps = itertools.accumulate((float(update["num_env_steps"]) for update in kept), initial=0.0)
    seconds = itertools.accumulate((sum(update["seconds"].values()) for update in kept), initial=0.0)
    return TrainingProgress(tuple(steps), tuple(seconds), tuple(update["success_rate"] for update in kept))


def curve_by_steps(runs: Sequence[TrainingProgress], budget: int) -> list[CurvePoint]:
    """Return success against environment steps, up to the budget, which each run has reached."""
    window = WINDOW_SHARE * budget
    positions = [budget * (index + 1) / NUM_POINTS for index in range(NUM_POINTS)]
    return [_point(x, [run.success_at(x, window) for run in runs]) for x in positions if x >= window / 2]


def curve_by_minutes(runs: Sequence[TrainingProgress], budget: int) -> list[CurvePoint]:
    """Return success against minutes of training, until the fastest run has reached the budget."""
    window = WINDOW_SHARE * budget
    last_s = min(run.seconds_at(budget) for run in runs)
    points = []
    for index in range(NUM_POINTS):
        at_s = last_s * (index + 1) / NUM_POINTS
        steps = [run.steps_at(at_s) for run in runs]
        if min(steps) >= window / 2:
            rates = [run.success_at(x, window) for run, x in zip(runs, steps, strict=True)]
            points.append(_point(at_s / 60, rates))
    return points


def _point(x: float, rates: Sequence[float]) -> CurvePoint:
    mean, low, high = mean_interval(rates)
    return CurvePoint(x, mean, *((low, high) if len(rates) == 1 else (max(0.0, low), min(1.0, high))))


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Interpolate linearly between the points of a curve with increasing xs; clamp beyond them."""
    index = bisect_left(xs, x)
    if index == 0:
        return ys[0]
    if index == len(xs):
        return ys[-1]
    share = (x - xs[index - 1]) / (xs[index] - xs[index - 1])
    return ys[index - 1] + share * (ys[index] - ys[index - 1])
