"""Reads of the replay service, returned as the messages of its RPCs."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from deskrl.core.step_codec import CodecError
from deskrl.proto.v1 import common_pb2, replay_pb2
from deskrl.replay import counters, image_index, retention, stored_episodes
from deskrl.replay.damaged_episodes import EpisodesDamagedError
from deskrl.replay.row_checksums import StateDamagedError, existing, intact, verified
from deskrl.replay.status_errors import ConflictError
from deskrl.replay.stored_episodes import EpisodeFilter


def episode(connection: sqlite3.Connection, rollout: int, *, with_steps: bool = True) -> replay_pb2.Episode:
    """Return an ended rollout with everything that is still stored of it.

    Raises:
        EpisodesDamagedError: its rows are damaged.
    """
    record = stored_episodes.get_rollout(connection, rollout)
    if record.is_set_aside:
        raise EpisodesDamagedError({rollout: record.damage})
    try:
        steps = stored_episodes.step_payloads(connection, record) if with_steps else []
    except CodecError as error:
        raise EpisodesDamagedError({rollout: str(error)}) from error
    message = replay_pb2.Episode(
        episode_id=record.episode_id,
        group_id=record.group_id,
        queue=record.queue,
        task_id=record.task_id,
        seed=record.seed,
        acting_policy=record.acting_policy,
        steps=steps,
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
        ConflictError: retention has removed members since the group's batch was committed, or they were damaged since.
        EpisodesDamagedError: the rows of members are damaged or missing; it does not name a missing one.
    """
    # One transaction, so that retention cannot remove a member between two of these reads.
    connection.execute("BEGIN")
    try:
        return _group(connection, position)
    finally:
        connection.execute("COMMIT")


def _group(connection: sqlite3.Connection, position: int) -> replay_pb2.Group:
    row = connection.execute(
        "SELECT group_id, queue, task_id, num_faulted, candidate, state, num_finished FROM groups g"
        f" WHERE position = ? AND {verified('groups', 'g')}",
        (position,),
    ).fetchone()
    group_id, queue, task_id, num_faulted, candidate, state, num_finished = existing(row, "groups")
    columns = f"id, removed, damage, {intact('rollouts', 'r')}"
    members = connection.execute(
        f"SELECT {columns} FROM rollouts r WHERE group_position = ? AND state = 'finished' ORDER BY member", (position,)
    ).fetchall()
    offered = connection.execute(f"SELECT {columns} FROM rollouts r WHERE id = ?", (candidate,)).fetchall()
    for _, removed, damage, is_intact in members + offered:
        if is_intact and (removed or damage):
            how = "were damaged" if damage else "were removed by retention"
            raise ConflictError(f"{group_id}: episodes {how} after its batch was committed")
    episodes, reasons = _episodes(connection, [row[0] for row in members + offered])
    is_complete = state in ("bound", "consumed") and len(members) == num_finished
    if reasons or not is_complete:
        raise EpisodesDamagedError(reasons)
    message = replay_pb2.Group(
        group_id=group_id,
        queue=queue,
        task_id=task_id,
        episodes=episodes[: len(members)],
        num_faulted=num_faulted,
    )
    if candidate is not None:
        message.candidate.CopyFrom(episodes[-1])
    return message


def _episodes(
    connection: sqlite3.Connection, rollouts: Sequence[int]
) -> tuple[list[replay_pb2.Episode], dict[int, str]]:
    """Return the intact ones of these episodes, and what is damaged of the others, by row id of the rollout."""
    episodes: list[replay_pb2.Episode] = []
    reasons: dict[int, str] = {}
    for rollout in rollouts:
        try:
            episodes.append(episode(connection, rollout))
        except EpisodesDamagedError as error:
            reasons |= error.reasons
    return episodes, reasons


def group_members(connection: sqlite3.Connection, position: int) -> list[int]:
    """Return the row ids of a bound group's members and of its candidate."""
    rows = connection.execute(
        "SELECT r.id FROM rollouts r WHERE group_position = ?1 AND member >= 0"
        " UNION SELECT candidate FROM groups WHERE position = ?1 AND candidate IS NOT NULL",
        (position,),
    )
    return [row[0] for row in rows]


def check_num_members(connection: sqlite3.Connection, position: int) -> None:
    """Check that a bound group has as many members as it should have.

    Raises:
        StateDamagedError: it has not.
    """
    row = connection.execute(
        "SELECT group_id, num_finished, (SELECT count(*) FROM rollouts WHERE group_position = position AND"
        f" state = 'finished') FROM groups g WHERE position = ? AND state = 'bound' AND {verified('groups', 'g')}",
        (position,),
    ).fetchone()
    if row is not None and row[1] != row[2]:
        raise StateDamagedError(f"group {row[0]} has {row[2]} of its {row[1]} members")


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
