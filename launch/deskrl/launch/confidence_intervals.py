"""Confidence intervals for proportions, differences of proportions, and means.

Proportions have Wilson's score interval and Newcombe's hybrid score interval (method 10 in Newcombe, Statistics in
Medicine 17, 1998), whose coverage stays close to the nominal one for small counts and for rates near 0 and 1, unlike
that of rate ± 1.96 standard errors. Means of few values (one per seed) have Student's t interval.
Written here because statsmodels and scipy return the same numbers but would add 380 MB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Z_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""
_MIN_UNITS = 10
"""Number of units from which on their spread determines the interval of a mean rate."""


def wilson_interval(successes: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    Args:
        successes: number of successful trials; fractional if a trial is itself a mean.
        n: number of trials, possibly an effective one; the interval of 0 trials is (0, 1).
        z: normal quantile of the two-sided confidence level; the default is that of 95 %.

    Raises:
        ValueError: `successes` is not between 0 and `n`.
    """
    _check_counts(successes, n)
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    denominator = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / denominator
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / denominator
    # With 0 or n successes one bound is the rate itself, which rounding must not exceed.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def newcombe_difference(
    successes_a: int, n_a: int, successes_b: int, n_b: int, z: float = Z_95
) -> tuple[float, float, float]:
    """Return the difference of two independent proportions, b minus a, with Newcombe's hybrid score interval.

    Returns:
        (difference, low, high). A side without trials has the rate ½ and the interval (0, 1).

    Raises:
        ValueError: a number of successes is not between 0 and the number of trials.
    """
    low_a, high_a = wilson_interval(successes_a, n_a, z)
    low_b, high_b = wilson_interval(successes_b, n_b, z)
    rate_a = successes_a / n_a if n_a else 0.5
    rate_b = successes_b / n_b if n_b else 0.5
    difference = rate_b - rate_a
    low = difference - math.hypot(rate_b - low_b, high_a - rate_a)
    high = difference + math.hypot(high_b - rate_b, rate_a - low_a)
    return difference, max(-1.0, low), min(1.0, high)


def paired_difference(
    rates_a: Sequence[float], rates_b: Sequence[float], num_trials: tuple[int, int]
) -> tuple[float, float, float]:
    """Return the difference of two mean rates over the same units, B minus A, with its 95 % interval.

    Newcombe's hybrid score interval for paired proportions (Statistics in Medicine 17, 1998, page 2635, method 10, with
    its continuity correction of the correlation), from Wilson's intervals over the effective number of units. It is not
    empty if all units agree, unlike a bootstrap interval.

    Args:
        rates_a: rate of each unit under A; a unit is a task, and its rate the mean of its trials.
        rates_b: rates of the same units under B.
        num_trials: number of trials of A and of B.

    Raises:
        ValueError: there are no units.
    """
    n = len(rates_a)
    if n == 0 or n != len(rates_b):
        raise ValueError("a paired difference needs the same units, one or more, on both sides")
    mean_a, mean_b = fmean(rates_a), fmean(rates_b)
    n_a, n_b = (_effective_units(rates, num) for rates, num in zip((rates_a, rates_b), num_trials, strict=True))
    (low_a, high_a), (low_b, high_b) = wilson_interval(mean_a * n_a, n_a), wilson_interval(mean_b * n_b, n_b)
    covariance = fmean((a - mean_a) * (b - mean_b) for a, b in zip(rates_a, rates_b, strict=True))
    spread = math.sqrt(fmean((a - mean_a) ** 2 for a in rates_a) * fmean((b - mean_b) ** 2 for b in rates_b))
    corrected = max(0.0, covariance - 1 / (2 * n)) if covariance > 0 else covariance
    correlation = corrected / spread if spread > 0 else 0.0

    def half(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    difference = mean_b - mean_a
    low = difference - half(mean_b - low_b, high_a - mean_a)
    high = difference + half(high_b - mean_b, mean_a - low_a)
    return difference, max(-1.0, low), min(1.0, high)


def _effective_units(rates: Sequence[float], num_trials: int) -> float:
    """Return the number of independent trials that would give the mean of these rates the same standard error.

    With few units their spread is not a reliable estimate, so that each counts as one trial, which is conservative.
    """
    n = len(rates)
    mean = fmean(rates)
    if n < _MIN_UNITS or not 0 < mean < 1:
        return n
    variance = stdev(rates) ** 2 / n
    return n if variance == 0 else min(max(float(n), mean * (1 - mean) / variance), float(max(n, num_trials)))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of independent values with Student's 95 % interval.

    Returns:
        (mean, low, high). The interval of a single value is infinite.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("the mean of no values is undefined")
    mean = fmean(values)
    if len(values) == 1:
        return mean, -math.inf, math.inf
    half = student_t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def student_t_quantile(degrees_of_freedom: int, probability: float = 0.975) -> float:
    """Return a quantile of Student's t distribution.

    Args:
        degrees_of_freedom: at least 1.
        probability: probability of a lower value, more than 0.5; the default gives the bounds of a 95 % interval.
    """
    low, high = 0.0, 2.0 * NormalDist().inv_cdf(probability)
    while _student_t_cdf(high, degrees_of_freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_cdf(middle, degrees_of_freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_t_cdf(t: float, degrees_of_freedom: int) -> float:
    """Return the cumulative distribution function of Student's t at `t` >= 0.

    Finite sums for integer degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    freedom = degrees_of_freedom
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


def _check_counts(successes: float, n: float) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: must be between 0 and the number of trials")
