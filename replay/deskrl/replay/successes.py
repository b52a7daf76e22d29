"""The success cache: for each task the newest successes of the policy, and the one offered to a group that has none.

Knows rewards and tasks; the learner decides what becomes of an offer. What is cached is a reference to an episode of
the store, which retention leaves alone for as long.
"""

from __future__ import annotations

import sqlite3
import struct
from dataclasses import dataclass
from typing import Literal

from deskrl.core import ids
from deskrl.core.failure import FailureRule, group_failed
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay.pacing import PACED_QUEUE


@dataclass(frozen=True)
class SuccessRules:
    """What counts as a success, how many are kept, who is offered one, and which."""

    above: float
    capacity: int
    seed: int
    """Where a choice among them starts from."""
    when: FailureRule = "all_failed"
    choice: Literal["uniform", "newest"] = "uniform"


def threshold(success_above: float) -> float:
    """The configured threshold as rewards are: 32-bit, so that a reward of exactly that much is not above it."""
    value: float = struct.unpack("<f", struct.pack("<f", success_above))[0]
    return value


def choose(num_stored: int, seed: int, group_id: str, rule: Literal["uniform", "newest"] = "uniform") -> int:
    """Which of the stored successes, oldest first, a group is offered; uniform over groups, the same for each call."""
    if rule == "newest":
        return num_stored - 1
    return ids.derive_seed(seed, "candidate", group_id) % num_stored


def offer(connection: sqlite3.Connection, position: int, rules: SuccessRules) -> int | None:
    """The rollout to offer to a group: a stored success of its task if the policy acted and the group failed."""
    row = connection.execute(
        "SELECT group_id, task_id FROM groups WHERE position = ? AND queue = ? AND acting_policy = ?",
        (position, PACED_QUEUE, rollout_pb2.ACTING_POLICY_SAMPLED),
    ).fetchone()
    rewards = [
        reward
        for (reward,) in connection.execute(
            "SELECT reward FROM rollouts WHERE group_position = ? AND state = 'finished'", (position,)
        )
    ]
    if row is None or not rewards or not group_failed(rewards, rules.when, rules.above):
        return None
    stored = connection.execute("SELECT rollout FROM successes WHERE task_id = ? ORDER BY number", (row[1],)).fetchall()
    return int(stored[choose(len(stored), rules.seed, row[0], rules.choice)][0]) if stored else None


def store(connection: sqlite3.Connection, position: int, rules: SuccessRules) -> None:
    """Put a group's successes into the cache in member order, and the oldest beyond its capacity out of it."""
    (queue, task_id, acting_policy) = connection.execute(
        "SELECT queue, task_id, acting_policy FROM groups WHERE position = ?", (position,)
    ).fetchone()
    if queue != PACED_QUEUE or acting_policy != rollout_pb2.ACTING_POLICY_SAMPLED or rules.capacity == 0:
        return
    for rollout in _successes_of(connection, position, rules.above):
        connection.execute(
            "INSERT INTO successes (task_id, rollout, lineage, step)"
            " SELECT ?, id, ifnull(lineage, ''), ifnull(newest_version, 0) FROM rollouts WHERE id = ?",
            (task_id, rollout),
        )
    connection.execute(
        "DELETE FROM successes WHERE task_id = ? AND number NOT IN"
        " (SELECT number FROM successes WHERE task_id = ? ORDER BY number DESC LIMIT ?)",
        (task_id, task_id, rules.capacity),
    )


def count_use(connection: sqlite3.Connection, task_id: str) -> None:
    """The learner put a stored success of this task into a group."""
    connection.execute(
        "INSERT INTO success_uses VALUES (?, 1) ON CONFLICT (task_id) DO UPDATE SET num_used = num_used + 1", (task_id,)
    )


def _successes_of(connection: sqlite3.Connection, position: int, success_above: float) -> list[int]:
    rows = connection.execute(
        "SELECT id FROM rollouts WHERE group_position = ? AND state = 'finished' AND reward > ? ORDER BY member",
        (position, success_above),
    )
    return [row[0] for row in rows]
