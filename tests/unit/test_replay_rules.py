"""The pure rules of replay, by numbers worked out by hand: pacing, leases' time, the choice of a success."""

from __future__ import annotations

import urllib.request
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ports_kit import free_port

from deskrl.core.exposition import expose
from deskrl.replay import images
from deskrl.replay.leases import LeaseClock
from deskrl.replay.metrics import Metrics
from deskrl.replay.pacing import Pacing
from deskrl.replay.refusals import Malformed
from deskrl.replay.successes import choose, threshold
from deskrl.replay.writer import Commit


@pytest.mark.parametrize(
    ("staleness", "num_updates", "num_consumed_groups", "num_outstanding", "allowed"),
    [
        (0, 0, 0, 0, 32),  # lock-step: one batch of 4 groups of 8
        (0, 0, 0, 31, 1),
        (0, 0, 0, 32, 0),
        (0, 0, 4, 0, 0),  # the batch is being learnt from
        (0, 0, 3, 0, 8),  # one of its groups was dropped
        (0, 1, 4, 0, 32),  # learnt from
        (4, 0, 0, 0, 160),  # (4 + 1 + 0) * 32
        (4, 7, 28, 100, 60),  # (4 + 1 + 7) * 32 - 28 * 8 - 100
        (1, 2, 12, 0, 32),  # (1 + 1 + 2) * 32 - 12 * 8
        (0, 3, 20, 0, 0),  # a learner restored from update 5 to 3 learns from what it took before
    ],
)
def test_acting_may_run_ahead_of_learning_by_so_much(
    staleness: int, num_updates: int, num_consumed_groups: int, num_outstanding: int, allowed: int
) -> None:
    pacing = Pacing(max_staleness=staleness, groups_per_batch=4, rollouts=8)
    assert pacing.allowance(num_updates, num_consumed_groups, num_outstanding) == allowed


@given(
    staleness=st.integers(0, 8),
    groups_per_batch=st.integers(1, 8),
    rollouts=st.integers(2, 16),
    num_updates=st.integers(0, 1000),
    num_in_batch=st.integers(0, 7),
)
def test_a_learner_in_the_middle_of_a_batch_can_always_be_served(
    staleness: int, groups_per_batch: int, rollouts: int, num_updates: int, num_in_batch: int
) -> None:
    """Every batch so far kept `groups_per_batch` groups; the current one lacks some: whole groups fit in."""
    num_lacking = groups_per_batch - min(num_in_batch, groups_per_batch)
    num_consumed = (num_updates + 1) * groups_per_batch - num_lacking
    limit = Pacing(staleness, groups_per_batch, rollouts).limit(num_updates, num_consumed)
    assert limit >= num_lacking * rollouts


def test_a_lease_lives_for_its_time_and_as_long_again_with_each_heartbeat() -> None:
    clock = LeaseClock(ttl_s=10)
    clock.start("a", 0)
    clock.start("b", 1)
    assert clock.next_deadline_s() == 10
    assert clock.extend(["a", "unknown"], 9) == ["a"]
    assert clock.next_deadline_s() == 11
    assert clock.take_expired(10.9) == []
    assert clock.take_expired(11) == ["b"]
    assert clock.extend(["a", "b"], 12) == ["a"]
    clock.end("a")
    assert clock.next_deadline_s() is None
    assert clock.take_expired(1000) == []


def test_a_heartbeat_that_comes_too_late_does_not_revive_a_lease() -> None:
    clock = LeaseClock(ttl_s=10)
    clock.start("a", 0)
    assert clock.extend(["a"], 10) == []
    assert clock.take_expired(10) == ["a"]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["start", "extend", "end", "wait"])), max_size=60))
def test_leases_expire_exactly_at_their_deadlines(events: list[tuple[str, str]]) -> None:
    clock, deadlines, now_s = LeaseClock(ttl_s=3), dict[str, float](), 0.0
    for lease, event in events:
        if event == "start":
            clock.start(lease, now_s)
            deadlines[lease] = now_s + 3
        elif event == "end":
            clock.end(lease)
            deadlines.pop(lease, None)
        elif event == "extend":
            alive = clock.extend([lease], now_s)
            assert alive == ([lease] if lease in deadlines else [])
            deadlines.update(dict.fromkeys(alive, now_s + 3))
        else:
            now_s += 1
            expired = clock.take_expired(now_s)
            assert sorted(expired) == sorted(name for name, deadline_s in deadlines.items() if deadline_s <= now_s)
            for name in expired:
                del deadlines[name]
        assert clock.next_deadline_s() == min(deadlines.values(), default=None)


def test_the_choice_among_successes_is_uniform_and_always_the_same() -> None:
    choices = [choose(4, seed=0, group_id=f"train/{ordinal:06d}") for ordinal in range(4000)]
    assert choices == [choose(4, seed=0, group_id=f"train/{ordinal:06d}") for ordinal in range(4000)]
    assert choices != [choose(4, seed=1, group_id=f"train/{ordinal:06d}") for ordinal in range(4000)]
    assert all(900 < num < 1100 for num in Counter(choices).values())
    assert choose(1, seed=0, group_id="any") == 0
    assert choose(4, seed=0, group_id="any", rule="newest") == 3


def test_metrics_are_served() -> None:
    port = free_port()
    metrics = Metrics()
    metrics.committed(Commit(num_operations=3, duration_s=0.002))
    metrics.faults.labels(kind="FAULT_KIND_EVALUATOR").inc()
    expose("127.0.0.1", port, "replay.metrics_port", metrics.registry)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    assert "deskrl_replay_commit_seconds_count 1.0" in lines
    assert "deskrl_replay_operations_total 3.0" in lines
    assert 'deskrl_replay_faults_total{kind="FAULT_KIND_EVALUATOR"} 1.0' in lines


def test_a_reward_of_exactly_the_threshold_is_not_above_it() -> None:
    """Rewards travel as 32-bit floats, in which 0.1 is a little more than 0.1."""
    assert threshold(0.1) > 0.1
    assert threshold(0.5) == 0.5


@pytest.mark.parametrize("name", ["", "ab", "g" * 64, "AB" * 32, "ab" * 33, "ab " * 32])
def test_a_name_that_is_no_hash_is_refused(name: str) -> None:
    with pytest.raises(Malformed):
        images.parse_hash(name)


@given(st.binary(min_size=32, max_size=32))
def test_a_hash_is_read_as_written(value: bytes) -> None:
    assert images.parse_hash(value.hex()) == value
