"""What the store holds, as messages: episodes, groups, counters. Every function takes a reader's connection.

Knows how rows become messages; decides and changes nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from deskrl.proto.v1 import common_pb2, replay_pb2
from deskrl.replay import counters, images, retention
from deskrl.replay.refusals import Conflict

_EPISODE_COLUMNS = (
    "r.id, r.episode_id, g.group_id, g.queue, g.task_id, r.seed, g.acting_policy, r.result, r.num_faults,"
    " r.last_fault, r.ended_unix_s, r.state"
)


def episode(connection: sqlite3.Connection, rollout: int, *, with_steps: bool = True) -> replay_pb2.Episode:
    """An ended rollout with all that is kept of it."""
    row = connection.execute(
        f"SELECT {_EPISODE_COLUMNS} FROM rollouts r JOIN groups g ON g.position = r.group_position WHERE r.id = ?",
        (rollout,),
    ).fetchone()
    steps: list[bytes] = []
    if with_steps:
        rows = connection.execute("SELECT payload FROM steps WHERE rollout = ? ORDER BY step", (rollout,))
        steps = [payload for (payload,) in rows]
    message = replay_pb2.Episode(
        episode_id=row[1],
        group_id=row[2],
        queue=row[3],
        task_id=row[4],
        seed=int(row[5]),
        acting_policy=row[6],
        steps=steps,
        num_faults=row[8],
        finished_unix_s=row[10],
    )
    if row[7] is not None:
        message.result.ParseFromString(row[7])
    elif row[9] is not None:
        message.last_fault.ParseFromString(row[9])
    return message


def group(connection: sqlite3.Connection, position: int) -> replay_pb2.Group:
    """A bound group with its finished members and its candidate.

    Raises:
        Conflict: retention has removed members since its batch was committed.
    """
    # One snapshot, so that no member goes between two of these reads.
    connection.execute("BEGIN")
    try:
        return _group(connection, position)
    finally:
        connection.execute("COMMIT")


def _group(connection: sqlite3.Connection, position: int) -> replay_pb2.Group:
    group_id, queue, task_id, num_faulted, candidate = connection.execute(
        "SELECT group_id, queue, task_id, num_faulted, candidate FROM groups WHERE position = ?", (position,)
    ).fetchone()
    members = connection.execute(
        "SELECT id, removed FROM rollouts WHERE group_position = ? AND state = 'finished' ORDER BY member", (position,)
    ).fetchall()
    offered = connection.execute("SELECT id, removed FROM rollouts WHERE id = ?", (candidate,)).fetchall()
    if any(removed for _, removed in members + offered):
        raise Conflict(f"{group_id} was learnt from, committed, and has been removed to make room")
    message = replay_pb2.Group(
        group_id=group_id,
        queue=queue,
        task_id=task_id,
        episodes=[episode(connection, rollout) for rollout, _ in members],
        num_faulted=num_faulted,
    )
    if candidate is not None:
        message.candidate.CopyFrom(episode(connection, candidate))
    return message


def find_episodes(connection: sqlite3.Connection, request: replay_pb2.ListEpisodesRequest) -> list[int]:
    """Ended rollouts that a query asks for, newest first. Where steps are asked for, removed ones are left out."""
    conditions = ["r.ending IS NOT NULL"]
    values: list[object] = []
    if not request.envelope_only:
        conditions.append("NOT r.removed")
    if request.episode_ids:
        conditions.append(f"r.episode_id IN ({','.join('?' * len(request.episode_ids))})")
        values += request.episode_ids
    if request.queue:
        conditions.append("g.queue = ?")
        values.append(request.queue)
    if request.task_id:
        conditions.append("g.task_id = ?")
        values.append(request.task_id)
    if request.HasField("min_reward"):
        conditions.append("r.reward >= ?")
        values.append(request.min_reward)
    if request.HasField("max_reward"):
        conditions.append("r.reward <= ?")
        values.append(request.max_reward)
    rows = connection.execute(
        "SELECT r.id FROM rollouts r JOIN groups g ON g.position = r.group_position"
        f" WHERE {' AND '.join(conditions)} ORDER BY r.ending DESC LIMIT ?",
        [*values, request.limit or -1],
    )
    return [row[0] for row in rows]


def own_endings(connection: sqlite3.Connection, lease_ids: Sequence[str]) -> list[str]:
    """Those leases that ended by their holder's own result or fault."""
    statement = "SELECT lease_id FROM leases WHERE lease_id = ? AND state IN ('finished', 'faulted')"
    rows = [connection.execute(statement, (lease_id,)).fetchone() for lease_id in lease_ids]
    return [row[0] for row in rows if row is not None]


def status(connection: sqlite3.Connection) -> replay_pb2.GetReplayStatusResponse:
    """Counters of the whole store."""
    num_images, image_bytes = images.totals(connection)
    return replay_pb2.GetReplayStatusResponse(
        queues=_queues(connection),
        successes=_successes(connection),
        faults=counters.read_all(connection, counters.FAULT),
        dropped=counters.read_all(connection, counters.DROPPED),
        num_leases_expired=counters.read(connection, counters.EXPIRED_LEASES),
        num_images=num_images,
        image_bytes=image_bytes,
        database_bytes=retention.used_bytes(connection),
    )


def _queues(connection: sqlite3.Connection) -> list[replay_pb2.QueueStatus]:
    rows = connection.execute(
        "SELECT queue, sum(num_planned + num_leased + num_finished + num_faulted), sum(num_leased), sum(num_finished),"
        " sum(num_succeeded), sum(num_faulted),"
        " sum(CASE WHEN state IN ('open', 'complete') THEN num_finished ELSE 0 END),"
        " sum(CASE WHEN state = 'consumed' THEN num_finished ELSE 0 END), sum(num_steps)"
        " FROM groups GROUP BY queue ORDER BY queue"
    )
    return [
        replay_pb2.QueueStatus(
            queue=row[0],
            num_planned=row[1],
            num_leased=row[2],
            num_finished=row[3],
            num_succeeded=row[4],
            num_faulted=row[5],
            num_unused=row[6],
            num_consumed=row[7],
            num_steps=row[8],
        )
        for row in rows
    ]


def _successes(connection: sqlite3.Connection) -> list[replay_pb2.SuccessStatus]:
    """One entry for each task that has or had a stored success."""
    rows = connection.execute(
        "SELECT task_id, count(*), coalesce((SELECT num_used FROM success_uses u WHERE u.task_id = s.task_id), 0),"
        " lineage, step, max(number) FROM successes s GROUP BY task_id ORDER BY task_id"
    )
    return [
        replay_pb2.SuccessStatus(
            task_id=row[0],
            num_stored=row[1],
            num_used=row[2],
            newest_version=common_pb2.PolicyVersion(lineage=row[3], step=row[4]),
        )
        for row in rows
    ]
