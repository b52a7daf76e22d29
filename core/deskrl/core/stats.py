"""How sure a number is: intervals for proportions and for means, as pure functions.

Knows counts and values only. For proportions Wilson's score interval and Newcombe's hybrid of two of them (his method
10), because both keep near their nominal coverage for the small counts and the rates near 0 and 1 of an evaluation,
where the usual rate ± 1.96 standard errors does not. For the mean of a few values (one a seed) Student's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Z_95 = 1.959963984540054
"""Standard normal quantile that leaves 2.5 % above it."""


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a proportion.

    Args:
        successes: trials that succeeded; a fraction where a trial is itself a mean.
        n: trials in all; 0 says nothing, so the interval is (0, 1).
        z: normal quantile of the confidence level, two-sided; the default means 95 %.

    Raises:
        ValueError: the counts are no counts of trials.
    """
    _check(successes, n)
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    denominator = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / denominator
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / denominator
    # At 0 and n successes one end is the rate itself; rounding must not put it a hair beyond.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def newcombe_difference(
    successes_a: int, n_a: int, successes_b: int, n_b: int, z: float = Z_95
) -> tuple[float, float, float]:
    """The difference of two independent proportions, b minus a, with Newcombe's hybrid score interval.

    Returns:
        (difference, low, high). A side without trials says nothing: its rate counts as ½ and the interval is as wide as
        the other side leaves it.

    Raises:
        ValueError: the counts are no counts of trials.
    """
    low_a, high_a = wilson_interval(successes_a, n_a, z)
    low_b, high_b = wilson_interval(successes_b, n_b, z)
    rate_a = successes_a / n_a if n_a else 0.5
    rate_b = successes_b / n_b if n_b else 0.5
    difference = rate_b - rate_a
    low = difference - math.hypot(rate_b - low_b, high_a - rate_a)
    high = difference + math.hypot(high_b - rate_b, rate_a - low_a)
    return difference, max(-1.0, low), min(1.0, high)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of values that were drawn independently, with Student's 95 % interval.

    Returns:
        (mean, low, high). One value says nothing of how much values differ: its interval is infinite.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values have no mean")
    mean = fmean(values)
    if len(values) == 1:
        return mean, -math.inf, math.inf
    half = student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies, interpolated between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values have no quantile")
    ordered = sorted(values)
    whole, rest = divmod(share * (len(ordered) - 1), 1)
    low, high = ordered[int(whole)], ordered[min(int(whole) + 1, len(ordered) - 1)]
    return low + rest * (high - low)


def student_quantile(freedom: int, share: float = 0.975) -> float:
    """The value below which `share` (more than a half) of Student's distribution lies.

    Args:
        freedom: degrees of it, 1 or more.
        share: below the value; the default leaves 2.5 % above it.
    """
    low, high = 0.0, 2.0 * NormalDist().inv_cdf(share)
    while _student_share(high, freedom) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _student_share(t: float, freedom: int) -> float:
    """Share of Student's distribution below `t` >= 0: the finite sums for whole degrees of freedom (Abramowitz and
    Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(theta)
    term, total = (1.0, 1.0) if freedom % 2 == 0 else (cosine, cosine)
    for index in range(2 if freedom % 2 == 0 else 3, freedom - 1, 2):
        factor = (index - 1) / index
        term *= factor * cosine**2
        total += term
    if freedom % 2 == 0:
        within = math.sin(theta) * total
    else:
        within = 2 / math.pi * (theta + (math.sin(theta) * total if freedom > 1 else 0.0))
    return (1 + within) / 2


def _check(successes: float, n: int) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
