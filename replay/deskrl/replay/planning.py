"""What there is to play, and who plays it: plans become rows, and rows become leases in the order that pacing allows.

Every function is one operation of the writer. Knows queues, order and pacing; what becomes of a lease is `rollouts`'
matter.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deskrl.core import ids
from deskrl.proto.v1 import replay_pb2, rollout_pb2
from deskrl.replay import counters
from deskrl.replay.pacing import PACED_QUEUE, Pacing
from deskrl.replay.rollouts import move

_MEMBERS = "(num_planned + num_leased + num_finished + num_faulted)"


@dataclass(frozen=True)
class Ask:
    """An actor that waits for work."""

    request_id: str
    holder: str


@dataclass(frozen=True)
class Grant:
    """Work for one actor."""

    lease_id: str
    rollout: rollout_pb2.Rollout


def plan(connection: sqlite3.Connection, plans: Iterable[replay_pb2.GroupPlan]) -> int:
    """Add groups that do not exist yet; returns how many those are."""
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
                group.queue == PACED_QUEUE,
                len(group.seeds),
            ),
        ).lastrowid
        connection.executemany(
            "INSERT INTO rollouts (episode_id, group_position, member, seed) VALUES (?, ?, ?, ?)",
            [
                (ids.episode_id(group.group_id, member), position, member, str(seed))
                for member, seed in enumerate(group.seeds)
            ],
        )
        num_added += 1
    return num_added


def allowance(connection: sqlite3.Connection, pacing: Pacing) -> int:
    """Rollouts of the paced queue that may be granted now."""
    (num_outstanding,) = connection.execute(
        f"SELECT coalesce(sum(num_leased + num_finished + num_faulted + max(0, ? - {_MEMBERS})), 0) FROM groups"
        " WHERE state IN ('open', 'complete') AND queue = ? AND begun",
        (pacing.rollouts, PACED_QUEUE),
    ).fetchone()
    (num_bound,) = connection.execute(
        "SELECT count(*) FROM groups WHERE state = 'bound' AND queue = ? AND NOT dropped", (PACED_QUEUE,)
    ).fetchone()
    num_consumed = counters.read(connection, counters.PACED_GROUPS_LEARNT) + num_bound
    return pacing.allowance(counters.read(connection, counters.UPDATES), num_consumed, num_outstanding)


def grant(
    connection: sqlite3.Connection, pacing: Pacing, asks: Sequence[Ask], *, new_too: bool = True
) -> list[Grant | None]:
    """Answer asks in order, as far as there is work: queues that are not paced first, then groups already begun.

    Args:
        connection: the writer's.
        pacing: how far acting may run ahead.
        asks: answered in order.
        new_too: False: only asks that were granted before are answered with their grant, once more.
    """
    num_allowed = allowance(connection, pacing)
    grants: list[Grant | None] = []
    for ask in asks:
        known = connection.execute(
            "SELECT lease_id, rollout FROM leases WHERE request_id = ? AND state = 'active'", (ask.request_id,)
        ).fetchone()
        if known is not None:
            grants.append(Grant(known[0], _rollout(connection, known[1])))
            continue
        work = _next_work(connection, paced_too=num_allowed > 0) if new_too else None
        if work is None:
            grants.append(None)
            continue
        rollout, position, paced = work
        num_allowed -= paced
        lease_id = ids.new_id("lease")
        connection.execute(
            "INSERT INTO leases (lease_id, rollout, request_id, holder) VALUES (?, ?, ?, ?)",
            (lease_id, rollout, ask.request_id, ask.holder),
        )
        begun = connection.execute(
            f"UPDATE groups SET begun = 1 WHERE position = ? AND NOT begun RETURNING {_MEMBERS}", (position,)
        ).fetchone()
        if begun is not None and paced:
            num_allowed -= max(0, pacing.rollouts - begun[0])
        move(connection, rollout, "planned", "leased")
        grants.append(Grant(lease_id, _rollout(connection, rollout)))
    return grants


def active_leases(connection: sqlite3.Connection) -> list[str]:
    """All leases that have not ended."""
    return [row[0] for row in connection.execute("SELECT lease_id FROM leases WHERE state = 'active'")]


def _next_work(connection: sqlite3.Connection, *, paced_too: bool) -> tuple[int, int, bool] | None:
    """The rollout to grant next: (rollout, position of its group, whether it is paced)."""
    row = connection.execute(
        "SELECT position, paced FROM groups WHERE num_planned > 0 AND paced <= ?"
        " ORDER BY paced, begun DESC, position LIMIT 1",
        (paced_too,),
    ).fetchone()
    if row is None:
        return None
    (rollout,) = connection.execute(
        "SELECT id FROM rollouts WHERE group_position = ? AND state = 'planned' ORDER BY member LIMIT 1", (row[0],)
    ).fetchone()
    return rollout, row[0], bool(row[1])


def _rollout(connection: sqlite3.Connection, rollout: int) -> rollout_pb2.Rollout:
    row = connection.execute(
        "SELECT r.episode_id, g.group_id, g.queue, t.task_json, g.task_id, r.seed, g.max_steps, g.temperature,"
        " g.acting_policy FROM rollouts r JOIN groups g ON g.position = r.group_position"
        " JOIN task_files t ON t.hash = g.task_hash WHERE r.id = ?",
        (rollout,),
    ).fetchone()
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
