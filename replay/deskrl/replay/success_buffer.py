"""Success buffer: the policy's newest successes of each task, offered to groups that failed (ARPO, arXiv:2505.16282).

The buffer refers to episodes of the store, which retention keeps for as long. The learner decides whether to use the
offered success.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

from deskrl.core import ids
from deskrl.core.group_outcome import FailureRule, group_failed, is_success
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay.rate_limiter import RATE_LIMITED_QUEUE
from deskrl.replay.row_checksums import verified


@dataclass(frozen=True)
class SuccessBufferConfig:
    """Threshold, size and sampling of the success buffer."""

    threshold: float
    """Rewards above this are successes (see `core.group_outcome.is_success`)."""
    capacity: int
    """Number of successes kept per task, first in, first out; 0 disables the buffer."""
    seed: int
    """Seed of the uniform sampling."""
    failure_rule: FailureRule = "all_failed"
    """Groups that are offered a success."""
    sampling: Literal["uniform", "newest"] = "uniform"
    """Choice among the stored successes of a task."""


def choose_index(num_stored: int, seed: int, group_id: str, sampling: Literal["uniform", "newest"] = "uniform") -> int:
    """Return the index of the success to offer to a group, counted from the oldest.

    The choice is uniform over groups and the same in every call for one group.
    """
    if sampling == "newest":
        return num_stored - 1
    return ids.derive_seed(seed, "candidate", group_id) % num_stored


def choose_candidate(connection: sqlite3.Connection, position: int, config: SuccessBufferConfig) -> int | None:
    """Return the stored success to offer to a group; None if there is none or the group did not fail."""
    row = connection.execute(
        "SELECT group_id, task_id FROM groups g WHERE position = ? AND queue = ? AND acting_policy = ?"
        f" AND {verified('groups', 'g')}",
        (position, RATE_LIMITED_QUEUE, rollout_pb2.ACTING_POLICY_SAMPLED),
    ).fetchone()
    rewards = [reward for _, reward in _finished_members(connection, position)]
    if row is None or not rewards or not group_failed(rewards, config.failure_rule, config.threshold):
        return None
    group_id, task_id = row
    stored = connection.execute(
        f"SELECT rollout FROM successes s WHERE task_id = ? AND {verified('successes', 's')} ORDER BY number",
        (task_id,),
    ).fetchall()
    return int(stored[choose_index(len(stored), config.seed, group_id, config.sampling)][0]) if stored else None


def add_successes(connection: sqlite3.Connection, position: int, config: SuccessBufferConfig) -> None:
    """Add a group's successes in member order, and evict the oldest of the task beyond the capacity."""
    (queue, task_id, acting_policy) = connection.execute(
        "SELECT queue, task_id, acting_policy FROM groups WHERE position = ?", (position,)
    ).fetchone()
    is_sampled = queue == RATE_LIMITED_QUEUE and acting_policy == rollout_pb2.ACTING_POLICY_SAMPLED
    if not is_sampled or config.capacity == 0:
        return
    for rollout, reward in _finished_members(connection, position):
        if is_success(reward, config.threshold):
            connection.execute(  # ignored if its group was bound before and a member was played again
                "INSERT OR IGNORE INTO successes (task_id, rollout, lineage, step)"
                " SELECT ?, id, ifnull(lineage, ''), ifnull(newest_version, 0) FROM rollouts WHERE id = ?",
                (task_id, rollout),
            )
    connection.execute(
        "DELETE FROM successes WHERE task_id = ? AND number NOT IN"
        " (SELECT number FROM successes WHERE task_id = ? ORDER BY number DESC LIMIT ?)",
        (task_id, task_id, config.capacity),
    )


def count_use(connection: sqlite3.Connection, task_id: str) -> None:
    """Count that the learner used a stored success of this task."""
    connection.execute(
        "INSERT INTO success_uses (task_id, num_used) VALUES (?, 1)"
        " ON CONFLICT (task_id) DO UPDATE SET num_used = num_used + 1",
        (task_id,),
    )


def _finished_members(connection: sqlite3.Connection, position: int) -> list[tuple[int, float]]:
    """Return rollout and reward of each finished member, in member order."""
    return connection.execute(
        "SELECT id, reward FROM rollouts r WHERE group_position = ? AND state = 'finished'"
        f" AND {verified('rollouts', 'r')} ORDER BY member",
        (position,),
    ).fetchall()
