"""Life cycle of leased rollouts in the database: streamed, ended, or planned again (state machine of rollout.proto).

Every function that writes is one operation of the writer: it runs inside a transaction and either completes or raises
`StatusError` and has no effect.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deskrl.core.group_outcome import is_success
from deskrl.core.step_codec import VersionSpan
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay import counters, image_index
from deskrl.replay.blob_log import BlobLog
from deskrl.replay.leases import MAX_EXPIRATIONS
from deskrl.replay.rate_limiter import RATE_LIMITED_QUEUE
from deskrl.replay.row_checksums import step_checksum, verified
from deskrl.replay.status_errors import InvalidRequestError, LeaseNotFoundError


@dataclass(frozen=True)
class HeldLease:
    """Lease that is active, or was ended by its holder."""

    rollout: int
    is_active: bool
    """False: its holder ended it, and repeated messages are acknowledged without effect."""
    num_steps: int
    """Number of steps on disk under this lease."""


def get_lease(connection: sqlite3.Connection, lease_id: str, episode_id: str | None = None) -> HeldLease:
    """Return the present state of a lease.

    Args:
        connection: any connection.
        lease_id: the lease.
        episode_id: episode that the lease must belong to; None accepts any.

    Raises:
        LeaseNotFoundError: there is no such lease, or it ended otherwise than by its holder.
    """
    row = connection.execute(
        "SELECT l.state, l.rollout, r.num_steps, r.episode_id FROM leases l JOIN rollouts r ON r.id = l.rollout"
        f" WHERE lease_id = ? AND {verified('leases', 'l')}",  # the rollout is verified by the write that follows
        (lease_id,),
    ).fetchone()
    if row is None or row[0] not in ("active", "finished", "faulted") or episode_id not in (None, row[3]):
        of_episode = "" if episode_id is None else f" of {episode_id}"
        raise LeaseNotFoundError(
            f"lease {lease_id}{of_episode} expired, was released or is unknown: abandon the episode"
        )
    state, rollout, num_steps, _ = row
    return HeldLease(rollout, state == "active", 0 if state == "faulted" else num_steps)


def add_step(
    connection: sqlite3.Connection,
    blob_log: BlobLog,
    lease_id: str,
    step: rollout_pb2.EpisodeStep,
    spans: Sequence[VersionSpan],
    received: Sequence[image_index.ReceivedImage],
    named: Iterable[bytes],
) -> int:
    """Store the next step with the screenshots received before it, and return the number of steps on disk.

    A step that is stored already is ignored, but the screenshots sent with it are stored: a later step may name them.

    Args:
        connection: connection of the writer.
        blob_log: log of the screenshots.
        lease_id: lease under which the step was sent.
        step: step as received.
        spans: policy versions in the payload of the step.
        received: screenshots received with the step.
        named: hashes of the screenshots that the step refers to.

    Raises:
        LeaseNotFoundError: the lease has been lost.
        InvalidRequestError: the step leaves a gap, or names a screenshot that is not stored.
    """
    lease = get_lease(connection, lease_id)
    if not lease.is_active:
        return lease.num_steps
    if step.index < lease.num_steps:
        image_index.store_images(connection, blob_log, lease.rollout, received, ())
        return lease.num_steps
    if step.index > lease.num_steps:
        raise InvalidRequestError(f"received step {step.index}, expected step {lease.num_steps}")
    image_index.store_images(connection, blob_log, lease.rollout, received, named)
    connection.execute(
        "INSERT INTO steps (rollout, step, payload, checksum) VALUES (?, ?, ?, ?)",
        (lease.rollout, step.index, step.payload, step_checksum(lease.rollout, step.index, step.payload)),
    )
    _count_step(connection, lease.rollout, spans)
    return lease.num_steps + 1


def _count_step(connection: sqlite3.Connection, rollout: int, spans: Sequence[VersionSpan]) -> None:
    """Count a step, and record its policy versions in the columns that are searched."""
    if not spans:
        connection.execute("UPDATE rollouts SET num_steps = num_steps + 1 WHERE id = ?", (rollout,))
        return
    versions = [span.step for span in spans]
    connection.execute(
        "UPDATE rollouts SET num_steps = num_steps + 1, lineage = ?1,"
        " oldest_version = min(ifnull(oldest_version, ?2), ?2),"
        " newest_version = max(ifnull(newest_version, ?3), ?3) WHERE id = ?4",
        (spans[-1].lineage, min(versions), max(versions), rollout),
    )


def finish(
    connection: sqlite3.Connection,
    blob_log: BlobLog,
    lease_id: str,
    result: rollout_pb2.EpisodeResult,
    received: Sequence[image_index.ReceivedImage],
    named: Iterable[bytes],
    success_threshold: float,
) -> int:
    """End a rollout with its result, and return the number of steps on disk. A repeated call has no effect.

    Raises:
        LeaseNotFoundError: the lease has been lost.
        InvalidRequestError: steps are missing, or the final screenshot is not stored.
    """
    lease = get_lease(connection, lease_id)
    if not lease.is_active:
        return lease.num_steps
    if result.num_steps != lease.num_steps:
        raise InvalidRequestError(f"the result counts {result.num_steps} steps, but {lease.num_steps} were received")
    image_index.store_images(connection, blob_log, lease.rollout, received, named)
    connection.execute("UPDATE leases SET state = 'finished' WHERE lease_id = ?", (lease_id,))
    connection.execute(
        "UPDATE rollouts SET reward = ?, termination = ?, result = ? WHERE id = ?",
        (result.reward, result.termination, result.SerializeToString(), lease.rollout),
    )
    connection.execute(
        "UPDATE groups SET num_steps = num_steps + ?, num_succeeded = num_succeeded + ?"
        " WHERE position = (SELECT group_position FROM rollouts WHERE id = ?)",
        (lease.num_steps, is_success(result.reward, success_threshold), lease.rollout),
    )
    set_state(connection, lease.rollout, "leased", "finished")
    _end(connection, lease.rollout)
    return lease.num_steps


def fault(connection: sqlite3.Connection, lease_id: str, cause: rollout_pb2.EpisodeFault, max_faults: int) -> None:
    """End an attempt by a fault and plan its rollout again, at most `max_faults` times. May be repeated.

    Raises:
        LeaseNotFoundError: the lease has been lost.
    """
    lease = get_lease(connection, lease_id)
    if not lease.is_active:
        return
    connection.execute("UPDATE leases SET state = 'faulted' WHERE lease_id = ?", (lease_id,))
    counters.add(connection, counters.FAULT + rollout_pb2.FaultKind.Name(cause.kind))
    if cause.kind == rollout_pb2.FAULT_KIND_CONNECTION_LOST:
        counters.add(connection, counters.LOST_CONNECTION + _task_id(connection, lease.rollout))
    (num_faults,) = connection.execute(
        "UPDATE rollouts SET num_faults = num_faults + 1, fault_kind = ?, last_fault = ? WHERE id = ?"
        " RETURNING num_faults",
        (cause.kind, cause.SerializeToString(), lease.rollout),
    ).fetchone()
    _discard_attempt(connection, lease.rollout)
    _retry_or_abandon(connection, lease.rollout, abandon=num_faults > max_faults)


def _task_id(connection: sqlite3.Connection, rollout: int) -> str:
    (task_id,) = connection.execute(
        "SELECT task_id FROM groups WHERE position = (SELECT group_position FROM rollouts WHERE id = ?)", (rollout,)
    ).fetchone()
    return str(task_id)


def release(connection: sqlite3.Connection, lease_ids: Iterable[str]) -> None:
    """Release the active ones of these leases and plan their rollouts again."""
    for rollout in _end_active(connection, lease_ids, "released"):
        _discard_attempt(connection, rollout)
        _retry_or_abandon(connection, rollout, abandon=False)


def expire(connection: sqlite3.Connection, lease_ids: Iterable[str]) -> int:
    """End the active ones of these leases as expired, and return their number.

    An expired lease does not count as a fault, but a rollout is abandoned after `MAX_EXPIRATIONS` of them.
    """
    num_expired = 0
    for rollout in _end_active(connection, lease_ids, "expired"):
        num_expired += 1
        (num_expirations,) = connection.execute(
            "UPDATE rollouts SET num_expiries = num_expiries + 1 WHERE id = ? RETURNING num_expiries", (rollout,)
        ).fetchone()
        abandon = num_expirations >= MAX_EXPIRATIONS
        if abandon:
            cause = rollout_pb2.EpisodeFault(
                kind=rollout_pb2.FAULT_KIND_ACTOR, message=f"its lease expired {num_expirations} times"
            )
            counters.add(connection, counters.FAULT + rollout_pb2.FaultKind.Name(cause.kind))
            connection.execute(
                "UPDATE rollouts SET fault_kind = ?, last_fault = ? WHERE id = ?",
                (cause.kind, cause.SerializeToString(), rollout),
            )
        _discard_attempt(connection, rollout)
        _retry_or_abandon(connection, rollout, abandon=abandon)
    counters.add(connection, counters.EXPIRED_LEASES, num_expired)
    return num_expired


def _end_active(connection: sqlite3.Connection, lease_ids: Iterable[str], state: str) -> list[int]:
    """Set the active ones of these leases to `state`, and return their rollouts."""
    statement = "UPDATE leases SET state = ? WHERE lease_id = ? AND state = 'active' RETURNING rollout"
    rows = [connection.execute(statement, (state, lease_id)).fetchone() for lease_id in lease_ids]
    return [row[0] for row in rows if row is not None]


def set_state(connection: sqlite3.Connection, rollout: int, source: str, target: str) -> None:
    """Change the state of a rollout and the counts of its group. No other function changes the state."""
    connection.execute("UPDATE rollouts SET state = ? WHERE id = ?", (target, rollout))
    connection.execute(
        f"UPDATE groups SET num_{source} = num_{source} - 1, num_{target} = num_{target} + 1"
        " WHERE position = (SELECT group_position FROM rollouts WHERE id = ?)",
        (rollout,),
    )


def _discard_attempt(connection: sqlite3.Connection, rollout: int) -> None:
    """Delete everything that an attempt without a result has sent."""
    connection.execute("DELETE FROM steps WHERE rollout = ?", (rollout,))
    image_index.release(connection, rollout)
    connection.execute(
        "UPDATE rollouts SET num_steps = 0, lineage = NULL, oldest_version = NULL, newest_version = NULL WHERE id = ?",
        (rollout,),
    )


def _retry_or_abandon(connection: sqlite3.Connection, rollout: int, *, abandon: bool) -> None:
    set_state(connection, rollout, "leased", "faulted" if abandon else "planned")
    if abandon:
        _end(connection, rollout)


def _end(connection: sqlite3.Connection, rollout: int) -> None:
    """Number the ending of a FINISHED or FAULTED rollout, and complete its group if it was the last member."""
    connection.execute(
        "UPDATE rollouts SET ending = ?, ended_unix_s = ? WHERE id = ?",
        (counters.add(connection, counters.ENDINGS), time.time(), rollout),
    )
    position, queue, num_open, num_finished = connection.execute(
        "SELECT position, queue, num_planned + num_leased, num_finished FROM groups g"
        f" WHERE position = (SELECT group_position FROM rollouts WHERE id = ?) AND {verified('groups', 'g')}",
        (rollout,),
    ).fetchone()
    if num_open:
        return
    # A group that a damaged member has opened again keeps its slot in a batch, unless it is closed now.
    is_closed = queue == RATE_LIMITED_QUEUE and num_finished < 2
    connection.execute(
        "UPDATE groups SET state = ?, completion = ?, dropped_because = ? WHERE position = ?",
        (
            "closed" if is_closed else "complete",
            counters.add(connection, counters.COMPLETIONS),
            "faults" if is_closed else "",
            position,
        ),
    )
    if is_closed:
        counters.add(connection, counters.DROPPED + "faults")
        connection.execute(
            "UPDATE rollouts SET removable = 1 WHERE group_position = ? AND state = 'finished'", (position,)
        )
        connection.execute("UPDATE groups SET batch_id = NULL, ordinal = NULL WHERE position = ?", (position,))
