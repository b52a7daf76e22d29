"""Success against environment steps and against wall clock, from the updates of runs. Pure arithmetic.

An update is a stretch of environment steps (those of its fresh episodes, learnt from or not) with one success rate and
one stretch of wall clock (its own phases: what was lost between an interruption and its resumption is not counted).
Success at a place is the mean over the window of steps before it. A run ends with the update that reaches its budget;
whatever lies beyond the budget is cut off, so that all are compared at exactly as many steps.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deskrl.core.stats import mean_interval

WINDOW_SHARE = 0.2
"""Of the budget: the window over which success is averaged."""
NUM_PLACES = 60
"""Of a curve."""


@dataclass(frozen=True)
class Learning:
    """How one run went. Lists start with 0, before the first update."""

    steps: tuple[float, ...]
    """Environment steps after each update."""
    seconds: tuple[float, ...]
    """Wall clock of training after each update."""
    rates: tuple[float, ...]
    """Success rate in each update; one fewer."""

    def success_between(self, low: float, high: float) -> float:
        """Mean success over a stretch of environment steps."""
        total = 0.0
        for (start, end), rate in zip(itertools.pairwise(self.steps), self.rates, strict=True):
            total += rate * max(0.0, min(end, high) - max(start, low))
        return total / (high - low)

    def success_at(self, steps: float, window: float) -> float:
        """Mean success over the window before a place, or over all there was."""
        return self.success_between(max(0.0, steps - window), steps)

    def seconds_at(self, steps: float) -> float:
        """Wall clock at which so many steps were taken."""
        return _between(self.steps, self.seconds, steps)

    def steps_at(self, seconds: float) -> float:
        """Environment steps that were taken by then."""
        return _between(self.seconds, self.steps, seconds)


@dataclass(frozen=True)
class Place:
    """A place of an arm's curve: the mean over seeds, with its 95 % interval."""

    x: float
    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether more than one seed is behind it."""
        return math.isfinite(self.low)


def learning_of(updates: Sequence[Mapping[str, Any]]) -> Learning:
    """How a run went, from its records of updates, each of them once and in order."""
    kept = [update for update in updates if update["num_env_steps"]]
    steps = itertools.accumulate((float(update["num_env_steps"]) for update in kept), initial=0.0)
    seconds = itertools.accumulate((sum(update["seconds"].values()) for update in kept), initial=0.0)
    return Learning(tuple(steps), tuple(seconds), tuple(update["success_rate"] for update in kept))


def by_steps(runs: Sequence[Learning], budget: int) -> list[Place]:
    """Success against environment steps, up to the budget, which each run has reached."""
    window = WINDOW_SHARE * budget
    places = [budget * (index + 1) / NUM_PLACES for index in range(NUM_PLACES)]
    return [_place(x, [run.success_at(x, window) for run in runs]) for x in places if x >= window / 2]


def by_minutes(runs: Sequence[Learning], budget: int) -> list[Place]:
    """Success against minutes of training, as long as no run had reached the budget."""
    window = WINDOW_SHARE * budget
    last_s = min(run.seconds_at(budget) for run in runs)
    places = []
    for index in range(NUM_PLACES):
        at_s = last_s * (index + 1) / NUM_PLACES
        steps = [run.steps_at(at_s) for run in runs]
        if min(steps) >= window / 2:
            rates = [run.success_at(x, window) for run, x in zip(runs, steps, strict=True)]
            places.append(_place(at_s / 60, rates))
    return places


def _place(x: float, rates: Sequence[float]) -> Place:
    mean, low, high = mean_interval(rates)
    return Place(x, mean, *((low, high) if len(rates) == 1 else (max(0.0, low), min(1.0, high))))


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Where a piecewise linear curve through increasing xs is; its end beyond them."""
    index = bisect_left(xs, x)
    if index == 0:
        return ys[0]
    if index == len(xs):
        return ys[-1]
    share = (x - xs[index - 1]) / (xs[index] - xs[index - 1])
    return ys[index - 1] + share * (ys[index] - ys[index - 1])
