"""Reads of the replay service, returned as the messages of its RPCs."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from deskrl.proto.v1 import common_pb2, replay_pb2
from deskrl.replay import counters, image_index, retention, stored_episodes
from deskrl.replay.status_errors import ConflictError
from deskrl.replay.stored_episodes import EpisodeFilter


def episode(connection: sqlite3.Connection, rollout: int, *, with_steps: bool = True) -> replay_pb2.Episode:
    """Return an ended rollout with everything that is still stored of it."""
    record = stored_episodes.get_rollout(connection, rollout)
    message = replay_pb2.Episode(
        episode_id=record.episode_id,
        group_id=record.group_id,
        queue=record.queue,
        task_id=record.task_id,
        seed=record.seed,
        acting_policy=record.acting_policy,
        steps=stored_episodes.step_payloads(connection, rollout) if with_steps else (),
        num_faults=record.num_faults,
        finished_unix_s=record.ended_unix_s,
    )
    if record.result is not None:
        message.result.CopyFrom(record.result)
    elif record.last_fault is not None:
        message.last_fault.CopyFrom(record.last_fault)
    return message


def group(connection: sqlite3.Connection, position: int) -> replay_pb2.Group:
    """Return a bound group with its finished members and its candidate.

    Raises:
        ConflictError: retention has removed members since the group's batch was committed.
    """
    # One transaction, so that retention cannot remove a member between two of these reads.
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
        raise ConflictError(f"{group_id}: episodes were removed by retention after its batch was committed")
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
    """Return the row ids of ended rollouts that a request selects, newest first.

    Episodes whose steps were removed are left out unless the request is for envelopes only.
    """
    wanted = EpisodeFilter(
        task=request.task_id,
        queue=request.queue,
        episode_ids=tuple(request.episode_ids),
        min_reward=request.min_reward if request.HasField("min_reward") else None,
        max_reward=request.max_reward if request.HasField("max_reward") else None,
        is_stored=not request.envelope_only,
    )
    return stored_episodes.find_rollouts(connection, wanted, request.limit)


def leases_ended_by_holder(connection: sqlite3.Connection, lease_ids: Sequence[str]) -> list[str]:
    """Return those leases that ended with a result or a fault reported by their holder."""
    statement = "SELECT lease_id FROM leases WHERE lease_id = ? AND state IN ('finished', 'faulted')"
    rows = [connection.execute(statement, (lease_id,)).fetchone() for lease_id in lease_ids]
    return [row[0] for row in rows if row is not None]


def status(connection: sqlite3.Connection) -> replay_pb2.GetReplayStatusResponse:
    """Return the counters of the whole store; the service adds peers and its own status."""
    num_images, image_bytes = image_index.totals(connection)
    return replay_pb2.GetReplayStatusResponse(
        queues=_queues(connection),
        successes=_successes(connection),
        faults=counters.read_all(connection, counters.FAULT),
        dropped=counters.read_all(connection, counters.DROPPED),
        num_leases_expired=counters.read(connection, counters.EXPIRED_LEASES),
        num_images=num_images,
        image_bytes=image_bytes,
        database_bytes=retention.num_used_bytes(connection),
        lost_connections=lost_connections(connection),
    )


def lost_connections(connection: sqlite3.Connection) -> list[replay_pb2.LostConnections]:
    """Return one entry for each task whose episodes lost connections after the policy's first action."""
    lost = counters.read_all(connection, counters.LOST_CONNECTION)
    if not lost:
        return []
    finished = dict(connection.execute("SELECT task_id, sum(num_finished) FROM groups GROUP BY task_id"))
    return [
        replay_pb2.LostConnections(task_id=task_id, num_lost=num_lost, num_finished=finished.get(task_id, 0))
        for task_id, num_lost in lost.items()
    ]


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
    """Return one entry for each task that has or had an episode in the success buffer."""
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
