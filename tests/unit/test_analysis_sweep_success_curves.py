"""Success curves and arm differences of a sweep agree with numbers calculated by hand."""

import math
from typing import Any

import pytest

from deskrl.analysis.sweep.arm_comparison import compare_arms, summarise_run
from deskrl.analysis.sweep.success_curves import TrainingProgress, curve_by_minutes, curve_by_steps, training_progress


def update(steps: int, rate: float, seconds: float, **others: Any) -> dict[str, Any]:
    return {
        "num_env_steps": steps,
        "success_rate": rate,
        "seconds": {"wait": seconds / 2, "learn": seconds / 2},
        "num_episodes": 4,
        "staleness_mean": 1.0,
        "staleness_max": 2,
        "dropped": {},
        "without_spread": 1,
        "replayed": 0,
        **others,
    }


UPDATES = [update(40, 0.25, 60), update(60, 0.5, 60), update(50, 1.0, 120)]


def test_each_update_adds_steps_and_seconds() -> None:
    assert training_progress(UPDATES) == TrainingProgress((0, 40, 100, 150), (0, 60, 120, 240), (0.25, 0.5, 1.0))


def test_success_is_averaged_over_a_range_of_steps_that_may_cut_updates() -> None:
    learning = training_progress(UPDATES)
    assert learning.success_between(0, 40) == 0.25
    assert learning.success_between(0, 100) == pytest.approx((40 * 0.25 + 60 * 0.5) / 100)
    assert learning.success_between(80, 120) == pytest.approx((20 * 0.5 + 20 * 1.0) / 40)
    assert learning.success_at(20, window=30) == 0.25, "over all steps if there are fewer than a window"


def test_seconds_and_steps_are_interpolated() -> None:
    learning = training_progress(UPDATES)
    assert learning.seconds_at(70) == 90
    assert learning.steps_at(90) == 70
    assert learning.steps_at(1e6) == 150


def test_the_part_of_a_run_beyond_the_budget_is_cut_off() -> None:
    result = summarise_run(UPDATES, budget=120)
    assert result.success == pytest.approx((40 * 0.25 + 60 * 0.5 + 20 * 1.0) / 120)
    assert result.last_success == pytest.approx((10 * 0.5 + 20 * 1.0) / 30)
    assert result.minutes == pytest.approx((120 + 120 * 20 / 50) / 60)
    assert (result.facts["updates"], result.facts["episodes"], result.facts["groups without spread"]) == (3, 12, 3)


def test_an_update_without_episodes_is_ignored() -> None:
    assert training_progress([*UPDATES, update(0, 0.0, 5, success_rate=None)]) == training_progress(UPDATES)


def test_curves_are_means_over_seeds_with_intervals_by_students_t() -> None:
    runs = [TrainingProgress((0, 100), (0, 60), (rate,)) for rate in (0.4, 0.5, 0.6)]
    point = curve_by_steps(runs, 100)[-1]
    assert (point.x, point.mean) == (100, pytest.approx(0.5))
    # s = 0.1, n = 3, t = 4.30265: half the interval is 0.2484.
    assert (point.low, point.high) == (pytest.approx(0.2516, abs=1e-4), pytest.approx(0.7484, abs=1e-4))


def test_a_curve_over_time_ends_where_the_fastest_run_reaches_the_budget() -> None:
    fast, slow = TrainingProgress((0, 100), (0, 60), (0.5,)), TrainingProgress((0, 50, 100), (0, 60, 120), (0.0, 1.0))
    points = curve_by_minutes([fast, slow], 100)
    assert points[-1].x == 1.0
    assert points[-1].mean == pytest.approx((0.5 + 0.0) / 2), "the slow run has taken 50 steps by then"


def test_differences_are_taken_between_runs_of_the_same_seed() -> None:
    def result_of(rate: float, seconds: float) -> Any:
        return summarise_run([update(100, rate, seconds)], budget=100)

    arms, differences = compare_arms(
        {
            "first": {0: result_of(0.2, 60), 1: result_of(0.6, 60), 2: result_of(0.9, 60)},
            "second": {0: result_of(0.3, 30), 1: result_of(0.8, 30)},
            "third": {},
        }
    )
    assert [(arm.arm, arm.num_seeds) for arm in arms] == [("first", 3), ("second", 2)]
    (difference,) = differences
    assert (difference.arm, difference.against, difference.num_seeds) == ("second", "first", 2)
    # 0.1 and 0.2: mean 0.15, s / sqrt(n) = 0.05, t = 12.7062.
    assert difference.success.mean == pytest.approx(0.15)
    assert difference.success.high == pytest.approx(0.15 + 12.7062 * 0.05, abs=1e-4)
    assert difference.minutes_ratio.mean == pytest.approx(0.5)
    assert (difference.minutes_ratio.low, difference.minutes_ratio.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_single_seed_has_no_finite_interval() -> None:
    arms, _ = compare_arms({"only": {0: summarise_run(UPDATES, 100)}, "other": {}})
    assert not arms[0].success.is_finite and math.isinf(arms[0].success.high)
