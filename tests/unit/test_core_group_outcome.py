"""Success and failure: rewards and thresholds are compared in 32-bit precision, wherever the comparison is made."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskrl.core.config import RunConfig
from deskrl.core.group_outcome import as_float32, group_failed, is_success
from deskrl.proto.v1 import rollout_pb2

DEFAULT = RunConfig().replay.success_threshold


def sent(reward: float) -> float:
    """Return a reward as the receiver of a message reads it."""
    message = rollout_pb2.EpisodeResult(reward=reward).SerializeToString()
    return rollout_pb2.EpisodeResult.FromString(message).reward


@pytest.mark.parametrize("threshold", [DEFAULT, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_a_reward_of_exactly_the_threshold_is_a_failure_before_and_after_it_is_sent(threshold: float) -> None:
    assert not is_success(threshold, threshold)
    assert not is_success(sent(threshold), threshold)
    assert not is_success(0.1 + 0.2, 0.3), "in 32 bits the sum is 0.3"


@given(reward=st.floats(-2, 2), threshold=st.floats(-2, 2))
def test_sending_a_reward_does_not_change_whether_it_is_a_success(reward: float, threshold: float) -> None:
    assert is_success(reward, threshold) == is_success(sent(reward), threshold)


@given(st.floats(allow_nan=False))
def test_rounding_equals_the_rounding_of_the_wire_for_every_number(value: float) -> None:
    assert as_float32(value) == sent(value)


def test_a_reward_above_the_threshold_is_a_success() -> None:
    assert is_success(math.nextafter(as_float32(DEFAULT), 1) + 1e-8, DEFAULT)
    assert is_success(0.11, DEFAULT)
    assert is_success(1.0, DEFAULT)


def test_a_group_whose_rewards_equal_the_threshold_failed() -> None:
    assert group_failed([0.0, sent(0.1)], "all_failed", 0.1)
    assert not group_failed([0.0, sent(0.2)], "all_failed", 0.1)
    assert group_failed([0.12, 0.15], "low_mean_low_std", 0.1), "ARPO's rule looks at the mean and the deviation only"
