"""Confidence intervals compared with Newcombe (Statistics in Medicine 17, 1998) and tables of Student's t."""

import math

import pytest

from deskrl.launch.confidence_intervals import (
    mean_interval,
    newcombe_difference,
    student_t_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_equal_the_published_ones(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [
        ((48, 80), (56, 70), 0.0524, 0.3339),
        ((3, 10), (9, 10), 0.1705, 0.8090),
        ((2, 7), (6, 7), 0.0582, 0.8062),
        ((0, 29), (5, 56), -0.0381, 0.1926),
        ((0, 20), (0, 10), -0.1611, 0.2775),
        ((0, 10), (10, 10), 0.6075, 1.0),
    ],
)
def test_newcombe_intervals_equal_the_published_ones(
    a: tuple[int, int], b: tuple[int, int], low: float, high: float
) -> None:
    difference, got_low, got_high = newcombe_difference(*a, *b)
    assert difference == pytest.approx(b[0] / b[1] - a[0] / a[1])
    assert (got_low, got_high) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_no_or_only_successes_ends_exactly_at_the_rate() -> None:
    assert wilson_interval(0, 96)[0] == 0.0
    assert wilson_interval(96, 96)[1] == 1.0


def test_the_interval_of_no_trials_is_zero_to_one() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    difference, low, high = newcombe_difference(0, 0, 5, 10)
    assert low < difference < high


@pytest.mark.parametrize(("successes", "n"), [(-1, 4), (5, 4)])
def test_impossible_counts_are_rejected(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes in"):
        wilson_interval(successes, n)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423), (100, 1.9840)],
)
def test_quantiles_of_students_t_equal_the_tables(freedom: int, quantile: float) -> None:
    assert student_t_quantile(freedom) == pytest.approx(quantile, abs=5e-5)


def test_the_interval_of_a_mean_is_students_t_interval() -> None:
    # s = 1, n = 3: the half width is 4.3027 / sqrt(3).
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert mean_interval([0.5]) == (0.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="mean of no values"):
        mean_interval([])
