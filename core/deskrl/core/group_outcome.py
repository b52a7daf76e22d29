"""Success of an episode and failure of a group: the rules that replay, the learner and the analysis share."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Sequence
from typing import Literal

FailureRule = Literal["all_failed", "low_mean_low_std"]

_LOW_MEAN = 0.2
_LOW_STD = 0.05


def as_float32(value: float) -> float:
    """Round to 32 bits, the precision in which rewards are sent (rollout.proto) and stored.

    ctypes suffices for one number, and unlike `struct` it does not fail on values beyond the range.
    """
    return ctypes.c_float(value).value


def is_success(reward: float, success_threshold: float) -> bool:
    """Return whether a reward is above the threshold, both rounded to 32 bits.

    Without rounding, a reward of exactly 0.1 would be above a threshold of 0.1 once it has been sent as a 32-bit float.
    """
    return as_float32(reward) > as_float32(success_threshold)


def group_failed(rewards: Sequence[float], rule: FailureRule, success_threshold: float) -> bool:
    """Return whether a group failed, so that a stored success may replace one of its members.

    Replay offers a success to such a group, and the learner decides whether to use it.

    Args:
        rewards: evaluators' rewards of the members; at least one.
        rule: `all_failed`: no member is a success. `low_mean_low_std` (as in the code of ARPO,
            github.com/dvlab-research/ARPO): the mean is below 0.2 and the population standard deviation below 0.05.
            A group whose members all have a small reward (0.15) failed too, and so did a large group with one small
            success (0.12).
        success_threshold: rewards above this are successes.
    """
    if rule == "all_failed":
        return not any(is_success(reward, success_threshold) for reward in rewards)
    return statistics.fmean(rewards) < _LOW_MEAN and statistics.pstdev(rewards) < _LOW_STD
