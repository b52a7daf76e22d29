"""Groups on their way to the learner: bound to a batch for good, then consumed by its commit (see replay.proto).

Every function is one operation of the writer. Knows groups and batches; the members' lives are `rollouts`' matter.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from deskrl.proto.v1 import common_pb2, replay_pb2
from deskrl.replay import counters, successes
from deskrl.replay.pacing import PACED_QUEUE
from deskrl.replay.refusals import Conflict, Malformed, NotHeld


@dataclass(frozen=True)
class Place:
    """A place in a batch: what a group is bound to."""

    queue: str
    batch_id: str
    ordinal: int


def bind(
    connection: sqlite3.Connection, place: Place, dropped_group_ids: Iterable[str], rules: successes.SuccessRules
) -> int | None:
    """The group at a place, by its position: the one bound before, else the oldest complete one, bound now.

    Places are filled in order. Whoever asks for several ahead reads them in order too: a later one that were filled
    first, while the pacing allows no further group, would keep the learner waiting for the earlier one for ever.

    The candidate is decided before this group's own successes are stored, so that none serves its own group.

    Raises:
        Conflict: the batch is committed and has no such place.
        Malformed: a group told as dropped is none of this batch.
    """
    for group_id in dropped_group_ids:
        _drop(connection, place, group_id)
    bound = connection.execute(
        "SELECT position FROM groups WHERE queue = ? AND batch_id = ? AND ordinal = ?",
        (place.queue, place.batch_id, place.ordinal),
    ).fetchone()
    if bound is not None:
        return int(bound[0])
    if _is_committed(connection, place.queue, place.batch_id):
        raise Conflict(f"batch {place.batch_id} of queue {place.queue} is committed: it takes no further group")
    (num_filled,) = connection.execute(
        "SELECT count(*) FROM groups WHERE queue = ? AND batch_id = ?", (place.queue, place.batch_id)
    ).fetchone()
    if place.ordinal > num_filled:
        return None
    ready = connection.execute(
        "SELECT position FROM groups WHERE state = 'complete' AND queue = ? ORDER BY completion LIMIT 1", (place.queue,)
    ).fetchone()
    if ready is None:
        return None
    position = int(ready[0])
    candidate = successes.offer(connection, position, rules)
    successes.store(connection, position, rules)
    connection.execute("INSERT OR IGNORE INTO batches (queue, batch_id) VALUES (?, ?)", (place.queue, place.batch_id))
    connection.execute(
        "UPDATE groups SET state = 'bound', batch_id = ?, ordinal = ?, candidate = ? WHERE position = ?",
        (place.batch_id, place.ordinal, candidate, position),
    )
    return position


def commit(
    connection: sqlite3.Connection,
    queue: str,
    batch_id: str,
    verdicts: Iterable[replay_pb2.GroupVerdict],
    version: common_pb2.PolicyVersion,
) -> bool:
    """Consume a batch's groups; a group without a verdict was learnt from. False, and no change, if it is consumed.

    Raises:
        NotHeld: no group was ever bound to this batch.
        Malformed: a verdict names another batch's group, or a candidate that was not offered.
    """
    known = connection.execute("SELECT 1 FROM batches WHERE queue = ? AND batch_id = ?", (queue, batch_id)).fetchone()
    if known is None:
        raise NotHeld(f"no group was ever taken for batch {batch_id} of queue {queue}")
    if _is_committed(connection, queue, batch_id):
        return False
    connection.execute(
        "UPDATE groups SET dropped = 0 WHERE queue = ? AND batch_id = ?", (queue, batch_id)
    )  # the verdicts are final, whatever was told before
    for verdict in verdicts:
        _judge(connection, queue, batch_id, verdict)
    if queue == PACED_QUEUE:
        (num_learnt,) = connection.execute(
            "SELECT count(*) FROM groups WHERE queue = ? AND batch_id = ? AND NOT dropped", (queue, batch_id)
        ).fetchone()
        counters.add(connection, counters.PACED_GROUPS_LEARNT, num_learnt)
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


def set_policy(connection: sqlite3.Connection, version: common_pb2.PolicyVersion, num_updates: int) -> None:
    """The version that acts from now on, and the number of batches behind it."""
    connection.execute("DELETE FROM policy")
    connection.execute("INSERT INTO policy VALUES (?, ?)", (version.lineage, version.step))
    counters.put(connection, counters.UPDATES, num_updates)


def _judge(connection: sqlite3.Connection, queue: str, batch_id: str, verdict: replay_pb2.GroupVerdict) -> None:
    row = connection.execute(
        "SELECT task_id, candidate FROM groups WHERE group_id = ? AND queue = ? AND batch_id = ?",
        (verdict.group_id, queue, batch_id),
    ).fetchone()
    if row is None:
        raise Malformed(f"a verdict on {verdict.group_id}, which is not in batch {batch_id} of queue {queue}")
    task_id, candidate = row
    if verdict.used_candidate and candidate is None:
        raise Malformed(f"{verdict.group_id} was offered no candidate, so none can have been used")
    connection.execute(
        "UPDATE groups SET dropped = ?, dropped_because = ?, used_candidate = ? WHERE group_id = ?",
        (bool(verdict.dropped_because), verdict.dropped_because, verdict.used_candidate, verdict.group_id),
    )
    if verdict.dropped_because:
        counters.add(connection, counters.DROPPED + verdict.dropped_because)
    if verdict.used_candidate:
        successes.count_use(connection, task_id)


def _drop(connection: sqlite3.Connection, place: Place, group_id: str) -> None:
    """Note early that the learner will not learn from a group; after the commit its verdict stands."""
    row = connection.execute(
        "SELECT state FROM groups WHERE group_id = ? AND queue = ? AND batch_id = ?",
        (group_id, place.queue, place.batch_id),
    ).fetchone()
    if row is None:
        raise Malformed(f"{group_id} is told as dropped, but is not in batch {place.batch_id} of queue {place.queue}")
    if row[0] == "bound":
        connection.execute("UPDATE groups SET dropped = 1 WHERE group_id = ?", (group_id,))


def _is_committed(connection: sqlite3.Connection, queue: str, batch_id: str) -> bool:
    row = connection.execute(
        "SELECT committed FROM batches WHERE queue = ? AND batch_id = ?", (queue, batch_id)
    ).fetchone()
    return row is not None and bool(row[0])
