"""Rollout scheduler: stores plans of groups, and chooses the rollouts to lease within the rate limit.

Every function that writes is one operation of the writer.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deskrl.core import ids
from deskrl.proto.v1 import replay_pb2, rollout_pb2
from deskrl.replay import counters
from deskrl.replay.damaged_episodes import plan_rollout
from deskrl.replay.rate_limiter import RATE_LIMITED_QUEUE, RateLimiter
from deskrl.replay.rollouts import set_state
from deskrl.replay.row_checksums import StateDamagedError, existing, verified

_NUM_MEMBERS = "(num_planned + num_leased + num_finished + num_faulted)"


@dataclass(frozen=True)
class LeaseRequest:
    """Request of an actor that waits for work."""

    request_id: str
    holder: str


@dataclass(frozen=True)
class LeaseGrant:
    """Lease of one rollout, granted to one actor."""

    lease_id: str
    rollout: rollout_pb2.Rollout


def plan_groups(connection: sqlite3.Connection, plans: Iterable[replay_pb2.GroupPlan]) -> int:
    """Add the groups that do not exist yet, and return their number."""
    num_added = 0
    for group in plans:
        if connection.execute("SELECT 1 FROM groups WHERE group_id = ?", (group.group_id,)).fetchone():
            continue
        task_hash = hashlib.sha256(group.task_json).digest()
        connection.execute("INSERT OR IGNORE INTO task_files VALUES (?, ?)", (task_hash, group.task_json))
        position = connection.execute(
            "INSERT INTO groups (group_id, queue, task_id, task_hash, max_steps, temperature, acting_policy, paced,"
            " num_planned) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                group.group_id,
                group.queue,
                group.task_id,
                task_hash,
                group.max_steps,
                group.temperature,
                group.acting_policy,
                group.queue == RATE_LIMITED_QUEUE,
                len(group.seeds),
            ),
        ).lastrowid
        assert position is not None
        for member, seed in enumerate(group.seeds):
            plan_rollout(connection, ids.episode_id(group.group_id, member), position, member, str(seed))
        num_added += 1
    return num_added


def allowance(connection: sqlite3.Connection, rate_limiter: RateLimiter) -> int:
    """Return the number of rollouts of the rate-limited queue that may be granted now."""
    (num_outstanding,) = connection.execute(
        f"SELECT coalesce(sum(num_leased + num_finished + num_faulted + max(0, ? - {_NUM_MEMBERS})), 0) FROM groups"
        f" g WHERE state IN ('open', 'complete') AND queue = ? AND begun AND {verified('groups', 'g')}",
        (rate_limiter.rollouts_per_group, RATE_LIMITED_QUEUE),
    ).fetchone()
    (num_bound,) = connection.execute(
        "SELECT count(*) FROM groups g WHERE state = 'bound' AND queue = ? AND NOT dropped"
        f" AND {verified('groups', 'g')}",
        (RATE_LIMITED_QUEUE,),
    ).fetchone()
    num_consumed = counters.read(connection, counters.TRAINED_GROUPS) + num_bound
    return rate_limiter.allowance(counters.read(connection, counters.UPDATES), num_consumed, num_outstanding)


def grant_leases(
    connection: sqlite3.Connection,
    rate_limiter: RateLimiter,
    requests: Sequence[LeaseRequest],
    *,
    grant_new: bool = True,
) -> list[LeaseGrant | None]:
    """Answer lease requests in order; None where there is no work.

    Rollouts of queues without a rate limit come first, then those of groups that have started, then plan order. A
    request that was granted before receives the same lease.

    Args:
        connection: connection of the writer.
        rate_limiter: limit on rollouts that run ahead of training.
        requests: requests of waiting actors.
        grant_new: False grants no new lease, and only repeats the leases granted before.
    """
    num_allowed = allowance(connection, rate_limiter)
    grants: list[LeaseGrant | None] = []
    for request in requests:
        known = connection.execute(
            "SELECT lease_id, rollout FROM leases l WHERE request_id = ? AND state = 'active'"
            f" AND {verified('leases', 'l')}",
            (request.request_id,),
        ).fetchone()
        if known is not None:
            grants.append(LeaseGrant(known[0], _rollout(connection, known[1])))
            continue
        work = _next_work(connection, is_limited_allowed=num_allowed > 0) if grant_new else None
        if work is None:
            grants.append(None)
            continue
        rollout, position, is_limited = work
        num_allowed -= is_limited
        lease_id = ids.new_id("lease")
        connection.execute(
            "INSERT INTO leases (lease_id, rollout, request_id, holder) VALUES (?, ?, ?, ?)",
            (lease_id, rollout, request.request_id, request.holder),
        )
        started = connection.execute(
            f"UPDATE groups SET begun = 1 WHERE position = ? AND NOT begun RETURNING {_NUM_MEMBERS}", (position,)
        ).fetchone()
        if started is not None and is_limited:
            num_allowed -= max(0, rate_limiter.rollouts_per_group - started[0])
        set_state(connection, rollout, "planned", "leased")
        grants.append(LeaseGrant(lease_id, _rollout(connection, rollout)))
    return grants


def list_active_leases(connection: sqlite3.Connection) -> list[str]:
    """Return the ids of all active leases."""
    statement = f"SELECT lease_id FROM leases l WHERE state = 'active' AND {verified('leases', 'l')}"
    return [row[0] for row in connection.execute(statement)]


def _next_work(connection: sqlite3.Connection, *, is_limited_allowed: bool) -> tuple[int, int, bool] | None:
    """Return the rollout to grant next, the position of its group, and whether its queue is rate limited."""
    row = connection.execute(
        f"SELECT position, paced FROM groups g WHERE num_planned > 0 AND paced <= ? AND {verified('groups', 'g')}"
        " ORDER BY paced, begun DESC, position LIMIT 1",
        (is_limited_allowed,),
    ).fetchone()
    if row is None:
        return None
    planned = connection.execute(
        "SELECT id FROM rollouts r WHERE group_position = ? AND state = 'planned'"
        f" AND {verified('rollouts', 'r')} ORDER BY member LIMIT 1",
        (row[0],),
    ).fetchone()
    return existing(planned, "rollouts")[0], row[0], bool(row[1])


def _rollout(connection: sqlite3.Connection, rollout: int) -> rollout_pb2.Rollout:
    row = connection.execute(
        "SELECT r.episode_id, g.group_id, g.queue, t.task_json, g.task_id, r.seed, g.max_steps, g.temperature,"
        " g.acting_policy, t.hash FROM rollouts r JOIN groups g ON g.position = r.group_position"
        f" JOIN task_files t ON t.hash = g.task_hash WHERE r.id = ? AND {verified('rollouts', 'r')}"
        f" AND {verified('groups', 'g')}",
        (rollout,),
    ).fetchone()
    *row, task_hash = existing(row, "task_files")
    if hashlib.sha256(row[3]).digest() != task_hash:
        raise StateDamagedError(f"the task file of {row[1]} is damaged")
    return rollout_pb2.Rollout(
        episode_id=row[0],
        group_id=row[1],
        queue=row[2],
        task_json=row[3],
        task_id=row[4],
        seed=int(row[5]),
        max_steps=row[6],
        temperature=row[7],
        acting_policy=row[8],
    )
