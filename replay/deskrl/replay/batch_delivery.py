"""Batch delivery: binds complete groups to the slots of a batch, and consumes them at its commit (see replay.proto).

Every function is one operation of the writer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from deskrl.proto.v1 import common_pb2, replay_pb2
from deskrl.replay import counters, image_index, success_buffer
from deskrl.replay.rate_limiter import RATE_LIMITED_QUEUE
from deskrl.replay.row_checksums import verified
from deskrl.replay.status_errors import ConflictError, InvalidRequestError, NotFoundError

_VERIFIED = verified("groups", "g")


@dataclass(frozen=True)
class BatchSlot:
    """Slot of a batch, to which one group is bound."""

    queue: str
    batch_id: str
    ordinal: int


def bind(
    connection: sqlite3.Connection,
    slot: BatchSlot,
    dropped_group_ids: Iterable[str],
    buffer_config: success_buffer.SuccessBufferConfig,
) -> int | None:
    """Return the position of the group in a slot: the group bound before, else the oldest complete group, bound now.

    Returns None if no group is complete, or if an earlier slot is empty. Slots are filled in order, because a learner
    that requests several slots in advance also reads them in order: if a later slot were filled while the rate limit
    admits no further group, the learner would wait for the earlier slot for ever.

    The candidate is chosen before the group's own successes are added, so that no success is offered to its own group.

    Args:
        connection: connection of the writer.
        slot: slot of the batch.
        dropped_group_ids: groups of this batch that the learner has dropped.
        buffer_config: configuration of the success buffer.

    Raises:
        ConflictError: the batch is committed and has no such slot.
        InvalidRequestError: a dropped group is not in this batch.
    """
    for group_id in dropped_group_ids:
        _mark_dropped(connection, slot, group_id)
    bound = connection.execute(
        f"SELECT position, state FROM groups g WHERE queue = ? AND batch_id = ? AND ordinal = ? AND {_VERIFIED}",
        (slot.queue, slot.batch_id, slot.ordinal),
    ).fetchone()
    if bound is not None and bound[1] == "open":  # a damaged member is played again
        return None
    if bound is not None and bound[1] != "complete":
        return int(bound[0])
    if _is_committed(connection, slot.queue, slot.batch_id):
        raise ConflictError(f"batch {slot.batch_id} of queue {slot.queue} is committed and accepts no further group")
    (num_filled,) = connection.execute(
        "SELECT count(*) FROM groups WHERE queue = ? AND batch_id = ?", (slot.queue, slot.batch_id)
    ).fetchone()
    if slot.ordinal > num_filled:
        return None
    ready = (
        bound
        or connection.execute(
            f"SELECT position FROM groups g WHERE state = 'complete' AND queue = ? AND batch_id IS NULL AND {_VERIFIED}"
            " ORDER BY completion LIMIT 1",
            (slot.queue,),
        ).fetchone()
    )
    if ready is None:
        return None
    position = int(ready[0])
    candidate = success_buffer.choose_candidate(connection, position, buffer_config)
    success_buffer.add_successes(connection, position, buffer_config)
    connection.execute("INSERT OR IGNORE INTO batches (queue, batch_id) VALUES (?, ?)", (slot.queue, slot.batch_id))
    connection.execute(
        "UPDATE groups SET state = 'bound', batch_id = ?, ordinal = ?, candidate = ? WHERE position = ?",
        (slot.batch_id, slot.ordinal, candidate, position),
    )
    return position


def commit(
    connection: sqlite3.Connection,
    queue: str,
    batch_id: str,
    verdicts: Iterable[replay_pb2.GroupVerdict],
    version: common_pb2.PolicyVersion,
) -> bool:
    """Consume the groups of a batch, and return whether it was committed now rather than before.

    A group without a verdict was trained on.

    Raises:
        NotFoundError: no group was ever bound to this batch.
        InvalidRequestError: a verdict names a group of another batch, or a candidate that was not offered.
    """
    known = connection.execute("SELECT 1 FROM batches WHERE queue = ? AND batch_id = ?", (queue, batch_id)).fetchone()
    if known is None:
        raise NotFoundError(f"batch {batch_id} of queue {queue}: no group was ever bound to it")
    if _is_committed(connection, queue, batch_id):
        return False
    connection.execute(
        "UPDATE groups SET dropped = 0 WHERE queue = ? AND batch_id = ?", (queue, batch_id)
    )  # the verdicts are final and override earlier reports
    for verdict in verdicts:
        _apply_verdict(connection, queue, batch_id, verdict)
    if queue == RATE_LIMITED_QUEUE:
        (num_trained,) = connection.execute(
            "SELECT count(*) FROM groups WHERE queue = ? AND batch_id = ? AND NOT dropped", (queue, batch_id)
        ).fetchone()
        counters.add(connection, counters.TRAINED_GROUPS, num_trained)
    _cancel_repetitions(connection, queue, batch_id)
    members = (
        "(SELECT id FROM rollouts WHERE group_position IN"
        " (SELECT position FROM groups WHERE queue = ? AND batch_id = ?))"
    )
    connection.execute(f"DELETE FROM leases WHERE rollout IN {members}", (queue, batch_id))
    connection.execute(
        f"UPDATE rollouts SET removable = 1 WHERE state = 'finished' AND id IN {members}", (queue, batch_id)
    )
    connection.execute("UPDATE groups SET state = 'consumed' WHERE queue = ? AND batch_id = ?", (queue, batch_id))
    connection.execute(
        "UPDATE batches SET committed = 1, lineage = ?, step = ? WHERE queue = ? AND batch_id = ?",
        (version.lineage, version.step, queue, batch_id),
    )
    return True


def _cancel_repetitions(connection: sqlite3.Connection, queue: str, batch_id: str) -> None:
    """Delete rollouts that damage has made necessary after the learner had read the groups of a batch."""
    deleted = connection.execute(
        "DELETE FROM rollouts WHERE state IN ('planned', 'leased') AND group_position IN"
        " (SELECT position FROM groups WHERE queue = ? AND batch_id = ?) RETURNING id",
        (queue, batch_id),
    ).fetchall()
    for rollout in deleted:
        connection.execute("DELETE FROM rollout_plans WHERE rollout = ?", rollout)
        connection.execute("DELETE FROM leases WHERE rollout = ?", rollout)
        connection.execute("DELETE FROM steps WHERE rollout = ?", rollout)
        image_index.release(connection, rollout[0])
    if deleted:
        connection.execute(
            "UPDATE groups SET num_planned = 0, num_leased = 0 WHERE queue = ? AND batch_id = ?", (queue, batch_id)
        )


def set_policy(connection: sqlite3.Connection, version: common_pb2.PolicyVersion, num_updates: int) -> None:
    """Record the acting policy version, and the number of batches that it was trained on."""
    connection.execute("DELETE FROM policy")
    connection.execute("INSERT INTO policy (lineage, step) VALUES (?, ?)", (version.lineage, version.step))
    counters.put(connection, counters.UPDATES, num_updates)


def _apply_verdict(connection: sqlite3.Connection, queue: str, batch_id: str, verdict: replay_pb2.GroupVerdict) -> None:
    row = connection.execute(
        f"SELECT task_id, candidate FROM groups g WHERE group_id = ? AND queue = ? AND batch_id = ? AND {_VERIFIED}",
        (verdict.group_id, queue, batch_id),
    ).fetchone()
    if row is None:
        raise InvalidRequestError(f"verdict on {verdict.group_id}: not in batch {batch_id} of queue {queue}")
    task_id, candidate = row
    if verdict.used_candidate and candidate is None:
        raise InvalidRequestError(f"verdict on {verdict.group_id}: used_candidate is set, but no candidate was offered")
    connection.execute(
        "UPDATE groups SET dropped = ?, dropped_because = ?, used_candidate = ? WHERE group_id = ?",
        (bool(verdict.dropped_because), verdict.dropped_because, verdict.used_candidate, verdict.group_id),
    )
    if verdict.dropped_because:
        counters.add(connection, counters.DROPPED + verdict.dropped_because)
    if verdict.used_candidate:
        success_buffer.count_use(connection, task_id)


def _mark_dropped(connection: sqlite3.Connection, slot: BatchSlot, group_id: str) -> None:
    """Mark a group that the learner dropped, before the commit of its batch; after the commit its verdict is final."""
    row = connection.execute(
        "SELECT state FROM groups WHERE group_id = ? AND queue = ? AND batch_id = ?",
        (group_id, slot.queue, slot.batch_id),
    ).fetchone()
    if row is None:
        raise InvalidRequestError(f"dropped group {group_id}: not in batch {slot.batch_id} of queue {slot.queue}")
    if row[0] == "bound":
        connection.execute("UPDATE groups SET dropped = 1 WHERE group_id = ?", (group_id,))


def _is_committed(connection: sqlite3.Connection, queue: str, batch_id: str) -> bool:
    row = connection.execute(
        f"SELECT committed FROM batches b WHERE queue = ? AND batch_id = ? AND {verified('batches', 'b')}",
        (queue, batch_id),
    ).fetchone()
    return row is not None and bool(row[0])
