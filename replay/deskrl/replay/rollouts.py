"""Life of a leased rollout as rows: streamed, ended, or planned again (the state machine of rollout.proto).

Every function is one operation of the writer: it runs inside a transaction and either does all of its work or raises
`Refused`. Knows no clock but the wall clock of an ending, and nothing of order, pacing or batches.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deskrl.core.trajectory import Span
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay import counters, images
from deskrl.replay.leases import MAX_EXPIRIES
from deskrl.replay.pacing import PACED_QUEUE
from deskrl.replay.refusals import LeaseLost, Malformed
from deskrl.replay.segments import Segments


@dataclass(frozen=True)
class Held:
    """A lease that its actor has not lost."""

    rollout: int
    is_active: bool
    """False: its holder ended it, and repetitions are acknowledged without effect."""
    num_steps: int
    """Steps on disk under this lease."""


def held(connection: sqlite3.Connection, lease_id: str, episode_id: str | None = None) -> Held:
    """The lease as it stands.

    Args:
        connection: any connection.
        lease_id: the lease.
        episode_id: the episode that it must be of, where the caller has named one.

    Raises:
        LeaseLost: there is no such lease, or it ended otherwise than by its holder.
    """
    row = connection.execute(
        "SELECT l.state, l.rollout, r.num_steps, r.episode_id FROM leases l JOIN rollouts r ON r.id = l.rollout"
        " WHERE lease_id = ?",
        (lease_id,),
    ).fetchone()
    if row is None or row[0] not in ("active", "finished", "faulted") or episode_id not in (None, row[3]):
        raise LeaseLost(f"{lease_id} of {episode_id or 'its episode'} is not held any more: abandon the episode")
    state, rollout, num_steps, _ = row
    return Held(rollout, state == "active", 0 if state == "faulted" else num_steps)


def add_step(
    connection: sqlite3.Connection,
    segments: Segments,
    lease_id: str,
    step: rollout_pb2.EpisodeStep,
    spans: Sequence[Span],
    received: Sequence[images.Received],
    named: Iterable[bytes],
) -> int:
    """Store the next step with the screenshots received before it; returns the number of steps on disk.

    A step that is there already is ignored, the screenshots that came with it are not: a later step may name them.

    Args:
        connection: the writer's.
        lease_id: under which it was sent.
        step: as it came.
        spans: the policy versions in its payload.
        received: screenshots that came before it.
        named: screenshots that it shows.

    Raises:
        LeaseLost: the lease has been lost.
        Malformed: the step leaves a gap, or names a screenshot that is not held.
    """
    lease = held(connection, lease_id)
    if not lease.is_active:
        return lease.num_steps
    if step.index < lease.num_steps:
        images.keep(connection, segments, lease.rollout, received, ())
        return lease.num_steps
    if step.index > lease.num_steps:
        raise Malformed(f"step {step.index} came where step {lease.num_steps} was expected")
    images.keep(connection, segments, lease.rollout, received, named)
    connection.execute(
        "INSERT INTO steps (rollout, step, payload) VALUES (?, ?, ?)", (lease.rollout, step.index, step.payload)
    )
    connection.execute("UPDATE rollouts SET num_steps = num_steps + 1 WHERE id = ?", (lease.rollout,))
    if spans:
        note_versions(connection, lease.rollout, spans)
    return lease.num_steps + 1


def note_versions(connection: sqlite3.Connection, rollout: int, spans: Sequence[Span]) -> None:
    """Keep what is looked up of the policy versions that acted in an episode; `spans` are of its latest step."""
    versions = [span.step for span in spans]
    connection.execute(
        "UPDATE rollouts SET lineage = ?1, oldest_version = min(ifnull(oldest_version, ?2), ?2),"
        " newest_version = max(ifnull(newest_version, ?3), ?3) WHERE id = ?4",
        (spans[-1].lineage, min(versions), max(versions), rollout),
    )


def finish(
    connection: sqlite3.Connection,
    segments: Segments,
    lease_id: str,
    result: rollout_pb2.EpisodeResult,
    received: Sequence[images.Received],
    named: Iterable[bytes],
    success_above: float,
) -> int:
    """End a rollout with its result; returns the number of steps on disk. Repeated, it changes nothing.

    Raises:
        LeaseLost: the lease has been lost.
        Malformed: steps are missing, or the final screenshot is not held.
    """
    lease = held(connection, lease_id)
    if not lease.is_active:
        return lease.num_steps
    if result.num_steps != lease.num_steps:
        raise Malformed(f"a result after {result.num_steps} steps, of which {lease.num_steps} were sent")
    images.keep(connection, segments, lease.rollout, received, named)
    connection.execute("UPDATE leases SET state = 'finished' WHERE lease_id = ?", (lease_id,))
    connection.execute(
        "UPDATE rollouts SET reward = ?, termination = ?, result = ? WHERE id = ?",
        (result.reward, result.termination, result.SerializeToString(), lease.rollout),
    )
    connection.execute(
        "UPDATE groups SET num_steps = num_steps + ?, num_succeeded = num_succeeded + ?"
        " WHERE position = (SELECT group_position FROM rollouts WHERE id = ?)",
        (lease.num_steps, result.reward > success_above, lease.rollout),
    )
    move(connection, lease.rollout, "leased", "finished")
    _end(connection, lease.rollout)
    return lease.num_steps


def fault(connection: sqlite3.Connection, lease_id: str, cause: rollout_pb2.EpisodeFault, max_faults: int) -> None:
    """End an attempt by a fault: the rollout is planned again, at most `max_faults` times. Repeatable.

    Raises:
        LeaseLost: the lease has been lost.
    """
    lease = held(connection, lease_id)
    if not lease.is_active:
        return
    connection.execute("UPDATE leases SET state = 'faulted' WHERE lease_id = ?", (lease_id,))
    counters.add(connection, counters.FAULT + rollout_pb2.FaultKind.Name(cause.kind))
    (num_faults,) = connection.execute(
        "UPDATE rollouts SET num_faults = num_faults + 1, fault_kind = ?, last_fault = ? WHERE id = ?"
        " RETURNING num_faults",
        (cause.kind, cause.SerializeToString(), lease.rollout),
    ).fetchone()
    _discard_attempt(connection, lease.rollout)
    _plan_again(connection, lease.rollout, give_up=num_faults > max_faults)


def release(connection: sqlite3.Connection, lease_ids: Iterable[str]) -> None:
    """Give leases back; those that ended otherwise are left as they are."""
    for rollout in _end_active(connection, lease_ids, "released"):
        _discard_attempt(connection, rollout)
        _plan_again(connection, rollout, give_up=False)


def expire(connection: sqlite3.Connection, lease_ids: Iterable[str]) -> int:
    """End leases that ran out; returns how many. Counts as no fault, yet a rollout that keeps doing so is given up."""
    num_expired = 0
    for rollout in _end_active(connection, lease_ids, "expired"):
        num_expired += 1
        (num_expiries,) = connection.execute(
            "UPDATE rollouts SET num_expiries = num_expiries + 1 WHERE id = ? RETURNING num_expiries", (rollout,)
        ).fetchone()
        give_up = num_expiries >= MAX_EXPIRIES
        if give_up:
            cause = rollout_pb2.EpisodeFault(
                kind=rollout_pb2.FAULT_KIND_ACTOR, message=f"its lease ran out {num_expiries} times"
            )
            counters.add(connection, counters.FAULT + rollout_pb2.FaultKind.Name(cause.kind))
            connection.execute(
                "UPDATE rollouts SET fault_kind = ?, last_fault = ? WHERE id = ?",
                (cause.kind, cause.SerializeToString(), rollout),
            )
        _discard_attempt(connection, rollout)
        _plan_again(connection, rollout, give_up=give_up)
    counters.add(connection, counters.EXPIRED_LEASES, num_expired)
    return num_expired


def _end_active(connection: sqlite3.Connection, lease_ids: Iterable[str], state: str) -> list[int]:
    """Move active leases to `state`; returns their rollouts."""
    statement = "UPDATE leases SET state = ? WHERE lease_id = ? AND state = 'active' RETURNING rollout"
    rows = [connection.execute(statement, (state, lease_id)).fetchone() for lease_id in lease_ids]
    return [row[0] for row in rows if row is not None]


def move(connection: sqlite3.Connection, rollout: int, source: str, target: str) -> None:
    """Change a rollout's state, and its group's counts with it: every change of state goes through here."""
    connection.execute("UPDATE rollouts SET state = ? WHERE id = ?", (target, rollout))
    connection.execute(
        f"UPDATE groups SET num_{source} = num_{source} - 1, num_{target} = num_{target} + 1"
        " WHERE position = (SELECT group_position FROM rollouts WHERE id = ?)",
        (rollout,),
    )


def _discard_attempt(connection: sqlite3.Connection, rollout: int) -> None:
    """What an attempt that came to nothing has sent leaves no trace."""
    connection.execute("DELETE FROM steps WHERE rollout = ?", (rollout,))
    images.let_go(connection, rollout)
    connection.execute(
        "UPDATE rollouts SET num_steps = 0, lineage = NULL, oldest_version = NULL, newest_version = NULL WHERE id = ?",
        (rollout,),
    )


def _plan_again(connection: sqlite3.Connection, rollout: int, *, give_up: bool) -> None:
    move(connection, rollout, "leased", "faulted" if give_up else "planned")
    if give_up:
        _end(connection, rollout)


def _end(connection: sqlite3.Connection, rollout: int) -> None:
    """A rollout is FINISHED or FAULTED for good: number its ending, and complete its group if it was the last."""
    connection.execute(
        "UPDATE rollouts SET ending = ?, ended_unix_s = ? WHERE id = ?",
        (counters.add(connection, counters.ENDINGS), time.time(), rollout),
    )
    position, queue, num_open, num_finished = connection.execute(
        "SELECT position, queue, num_planned + num_leased, num_finished FROM groups"
        " WHERE position = (SELECT group_position FROM rollouts WHERE id = ?)",
        (rollout,),
    ).fetchone()
    if num_open:
        return
    is_closed = queue == PACED_QUEUE and num_finished < 2
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
