"""Success over environment steps and wall clock, and differences between arms, worked out by hand."""

import math
from typing import Any

import pytest

from deskrl.core.sweep.curves import Learning, by_minutes, by_steps, learning_of
from deskrl.core.sweep.verdict import judge_arms, judge_run


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


def test_an_update_is_a_stretch_of_steps_and_of_wall_clock() -> None:
    assert learning_of(UPDATES) == Learning((0, 40, 100, 150), (0, 60, 120, 240), (0.25, 0.5, 1.0))


def test_success_is_the_mean_over_a_stretch_wherever_it_is_cut() -> None:
    learning = learning_of(UPDATES)
    assert learning.success_between(0, 40) == 0.25
    assert learning.success_between(0, 100) == pytest.approx((40 * 0.25 + 60 * 0.5) / 100)
    assert learning.success_between(80, 120) == pytest.approx((20 * 0.5 + 20 * 1.0) / 40)
    assert learning.success_at(20, window=30) == 0.25, "before there is a whole window, over what there is"


def test_wall_clock_and_steps_are_read_off_each_other() -> None:
    learning = learning_of(UPDATES)
    assert learning.seconds_at(70) == 90
    assert learning.steps_at(90) == 70
    assert learning.steps_at(1e6) == 150


def test_what_lies_beyond_the_budget_is_cut_off() -> None:
    trial = judge_run(UPDATES, budget=120)
    assert trial.success == pytest.approx((40 * 0.25 + 60 * 0.5 + 20 * 1.0) / 120)
    assert trial.last_success == pytest.approx((10 * 0.5 + 20 * 1.0) / 30)
    assert trial.minutes == pytest.approx((120 + 120 * 20 / 50) / 60)
    assert (trial.facts["updates"], trial.facts["episodes"], trial.facts["groups without spread"]) == (3, 12, 3)


def test_a_batch_of_no_episode_moves_nothing() -> None:
    assert learning_of([*UPDATES, update(0, 0.0, 5, success_rate=None)]) == learning_of(UPDATES)


def test_curves_are_means_over_seeds_with_students_interval() -> None:
    runs = [Learning((0, 100), (0, 60), (rate,)) for rate in (0.4, 0.5, 0.6)]
    place = by_steps(runs, 100)[-1]
    assert (place.x, place.mean) == (100, pytest.approx(0.5))
    # s = 0.1, n = 3, t = 4.30265: half the interval is 0.2484.
    assert (place.low, place.high) == (pytest.approx(0.2516, abs=1e-4), pytest.approx(0.7484, abs=1e-4))


def test_a_curve_over_wall_clock_ends_with_its_fastest_run() -> None:
    fast, slow = Learning((0, 100), (0, 60), (0.5,)), Learning((0, 50, 100), (0, 60, 120), (0.0, 1.0))
    places = by_minutes([fast, slow], 100)
    assert places[-1].x == 1.0
    assert places[-1].mean == pytest.approx((0.5 + 0.0) / 2), "the slow one has taken 50 steps by then"


def test_differences_are_between_runs_of_one_seed() -> None:
    def trial(rate: float, seconds: float) -> Any:
        return judge_run([update(100, rate, seconds)], budget=100)

    arms, differences = judge_arms(
        {
            "first": {0: trial(0.2, 60), 1: trial(0.6, 60), 2: trial(0.9, 60)},
            "second": {0: trial(0.3, 30), 1: trial(0.8, 30)},
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


def test_one_seed_has_no_interval() -> None:
    arms, _ = judge_arms({"only": {0: judge_run(UPDATES, 100)}, "other": {}})
    assert not arms[0].success.tells and math.isinf(arms[0].success.high)
