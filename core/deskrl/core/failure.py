"""When a group counts as failed, so that a stored success may take a member's place. Pure.

One definition for two roles: replay offers a success to such a group, and the learner decides about the offer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

FailureRule = Literal["all_failed", "low_and_alike"]

_LOW_MEAN = 0.2
_ALIKE_STD = 0.05


def group_failed(rewards: Sequence[float], rule: FailureRule, success_above: float) -> bool:
    """Whether a group failed.

    Args:
        rewards: of its members, as the evaluators gave them; at least one.
        rule: `all_failed`: none is a success. `low_and_alike`, ARPO's: the mean is below 0.2 and the population
            standard deviation below 0.05, so members that all have a little (0.15) failed too, and a group of many
            with one small success (0.12) did.
        success_above: rewards above this are successes.
    """
    if rule == "all_failed":
        return max(rewards) <= success_above
    return statistics.fmean(rewards) < _LOW_MEAN and statistics.pstdev(rewards) < _ALIKE_STD
