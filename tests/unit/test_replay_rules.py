"""Pure rules of replay, checked against numbers calculated by hand: rate limiter, lease deadlines, success buffer."""

from __future__ import annotations

import urllib.request
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ports_kit import free_port

from deskrl.core.metrics_server import serve_metrics
from deskrl.proto.v1 import replay_pb2
from deskrl.replay import image_index
from deskrl.replay.leases import LeaseDeadlines
from deskrl.replay.metrics import ReplayMetrics
from deskrl.replay.rate_limiter import RateLimiter
from deskrl.replay.status_errors import InvalidRequestError
from deskrl.replay.success_buffer import choose_index
from deskrl.replay.writer import Commit


@pytest.mark.parametrize(
    ("staleness", "num_updates", "num_consumed_groups", "num_outstanding", "allowed"),
    [
        (0, 0, 0, 0, 32),  # synchronous: one batch of 4 groups of 8
        (0, 0, 0, 31, 1),
        (0, 0, 0, 32, 0),
        (0, 0, 4, 0, 0),  # the batch is being trained on
        (0, 0, 3, 0, 8),  # one of its groups was dropped
        (0, 1, 4, 0, 32),  # it was trained on
        (4, 0, 0, 0, 160),  # (4 + 1 + 0) * 32
        (4, 7, 28, 100, 60),  # (4 + 1 + 7) * 32 - 28 * 8 - 100
        (1, 2, 12, 0, 32),  # (1 + 1 + 2) * 32 - 12 * 8
        (0, 3, 20, 0, 0),  # a learner restored from update 5 to 3 trains on what it took before
    ],
)
def test_the_rate_limiter_bounds_how_far_rollouts_run_ahead_of_training(
    staleness: int, num_updates: int, num_consumed_groups: int, num_outstanding: int, allowed: int
) -> None:
    rate_limiter = RateLimiter(max_staleness=staleness, groups_per_batch=4, rollouts_per_group=8)
    assert rate_limiter.allowance(num_updates, num_consumed_groups, num_outstanding) == allowed


@given(
    staleness=st.integers(0, 8),
    groups_per_batch=st.integers(1, 8),
    rollouts=st.integers(2, 16),
    num_updates=st.integers(0, 1000),
    num_in_batch=st.integers(0, 7),
)
def test_the_rate_limit_always_admits_the_groups_that_the_current_batch_lacks(
    staleness: int, groups_per_batch: int, rollouts: int, num_updates: int, num_in_batch: int
) -> None:
    """Every earlier batch kept `groups_per_batch` groups and the current one lacks some."""
    num_lacking = groups_per_batch - min(num_in_batch, groups_per_batch)
    num_consumed = (num_updates + 1) * groups_per_batch - num_lacking
    limit = RateLimiter(staleness, groups_per_batch, rollouts).limit(num_updates, num_consumed)
    assert limit >= num_lacking * rollouts


def test_each_heartbeat_extends_a_lease_by_its_full_time_to_live() -> None:
    clock = LeaseDeadlines(ttl_s=10)
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


def test_a_heartbeat_after_the_deadline_does_not_extend_a_lease() -> None:
    clock = LeaseDeadlines(ttl_s=10)
    clock.start("a", 0)
    assert clock.extend(["a"], 10) == []
    assert clock.take_expired(10) == ["a"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["start", "extend", "end", "wait"])), max_size=60))
def test_leases_expire_exactly_at_their_deadlines(events: list[tuple[str, str]]) -> None:
    clock, deadlines, now_s = LeaseDeadlines(ttl_s=3), dict[str, float](), 0.0
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


def test_the_choice_among_successes_is_uniform_and_deterministic() -> None:
    choices = [choose_index(4, seed=0, group_id=f"train/{ordinal:06d}") for ordinal in range(4000)]
    assert choices == [choose_index(4, seed=0, group_id=f"train/{ordinal:06d}") for ordinal in range(4000)]
    assert choices != [choose_index(4, seed=1, group_id=f"train/{ordinal:06d}") for ordinal in range(4000)]
    assert all(900 < num < 1100 for num in Counter(choices).values())
    assert choose_index(1, seed=0, group_id="any") == 0
    assert choose_index(4, seed=0, group_id="any", sampling="newest") == 3


def test_the_lost_connection_ratio_is_that_of_the_most_affected_task_with_enough_attempts() -> None:
    metrics = ReplayMetrics()

    def observe(**tasks: tuple[int, int]) -> float | None:
        metrics.observe_lost_connections(
            [
                replay_pb2.LostConnections(task_id=name, num_lost=lost, num_finished=finished)
                for name, (lost, finished) in tasks.items()
            ]
        )
        return metrics.registry.get_sample_value("deskrl_replay_lost_connection_ratio")

    assert observe() == 0.0
    assert observe(few=(3, 3)) == 0.0
    assert observe(few=(3, 3), rare=(1, 99), many=(4, 12)) == 0.25


def test_metrics_are_served_over_http() -> None:
    port = free_port()
    metrics = ReplayMetrics()
    metrics.observe_commit(Commit(num_operations=3, duration_s=0.002))
    metrics.faults.labels(kind="FAULT_KIND_EVALUATOR").inc()
    serve_metrics("127.0.0.1", port, "replay.metrics_port", metrics.registry)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    assert "deskrl_replay_commit_seconds_count 1.0" in lines
    assert "deskrl_replay_operations_total 3.0" in lines
    assert 'deskrl_replay_faults_total{kind="FAULT_KIND_EVALUATOR"} 1.0' in lines


@pytest.mark.parametrize("name", ["", "ab", "g" * 64, "AB" * 32, "ab" * 33, "ab " * 32])
def test_a_screenshot_name_that_is_not_a_hash_is_rejected(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        image_index.parse_hash(name)


@given(st.binary(min_size=32, max_size=32))
def test_a_hash_is_parsed_to_the_bytes_that_it_was_written_from(value: bytes) -> None:
    assert image_index.parse_hash(value.hex()) == value
