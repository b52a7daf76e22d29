"""What the viewer asks of the store: pages of episodes by what they are looked up by, one episode whole, its group.

Knows tables; every function takes a reader's connection, reads what is committed and changes nothing. Nothing is read
but what a page shows: steps only of the episodes on it, screenshots one at a time.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from deskrl.core.trajectory import Step, decode_step
from deskrl.proto.v1 import rollout_pb2

OUTCOMES = ("solved", "failed", "faulted", "running")
_COLUMNS = (
    "r.id, r.episode_id, g.group_id, g.queue, g.task_id, r.member, r.state, r.reward, r.termination, r.fault_kind,"
    " r.num_faults, r.num_steps, r.lineage, r.oldest_version, r.newest_version, r.ending, r.ended_unix_s, r.removed,"
    " r.result, r.last_fault"
)
# Walks endings from the newest on and looks each one's group up, whatever the planner thinks of the filters.
_SOURCE = "rollouts r CROSS JOIN groups g ON g.position = r.group_position"


@dataclass(frozen=True)
class Filters:
    """What is asked for; what is empty or None is not asked for."""

    task: str = ""
    queue: str = ""
    outcome: str = ""
    """One of OUTCOMES."""
    termination: int | None = None
    fault: int | None = None
    """Kind of the last fault, of episodes that were granted again too."""
    version: int | None = None
    """Some token of the episode was sampled under this version."""


@dataclass(frozen=True)
class EpisodeRecord:
    """An episode without its steps."""

    rollout: int
    episode_id: str
    group_id: str
    queue: str
    task_id: str
    member: int
    state: str
    reward: float | None
    termination: int | None
    fault_kind: int | None
    num_faults: int
    num_steps: int
    lineage: str | None
    oldest_version: int | None
    newest_version: int | None
    ending: int | None
    ended_unix_s: float | None
    removed: bool
    result: rollout_pb2.EpisodeResult | None
    last_fault: rollout_pb2.EpisodeFault | None


@dataclass(frozen=True)
class Listing:
    """One page of episodes, newest first, and where the next one starts."""

    episodes: list[EpisodeRecord]
    num_matching: int
    next_before: int | None


@dataclass(frozen=True)
class Choices:
    """What there is to filter by."""

    tasks: list[str]
    queues: list[str]
    newest_version: int


@dataclass(frozen=True)
class GroupRecord:
    """A group with its members and the stored success that it was offered."""

    group_id: str
    queue: str
    task_id: str
    instruction: str
    state: str
    temperature: float
    batch_id: str | None
    dropped_because: str
    used_candidate: bool
    members: list[EpisodeRecord]
    candidate: EpisodeRecord | None


def find(
    connection: sqlite3.Connection, filters: Filters, success_above: float, before: int | None, limit: int
) -> Listing:
    """Episodes that match, newest first.

    Args:
        connection: a reader's.
        filters: what is asked for.
        success_above: a reward above this is a success.
        before: continue after this place, a `next_before`; None: from the newest on.
        limit: episodes on a page.
    """
    place = "r.id" if filters.outcome == "running" else "r.ending"
    conditions, values = _conditions(filters, success_above)
    source = _SOURCE if filters.task or filters.queue else "rollouts r"
    (num_matching,) = connection.execute(f"SELECT count(*) FROM {source} WHERE {conditions}", values).fetchone()
    if before is not None:
        conditions, values = f"{conditions} AND {place} < ?", [*values, before]
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM {_SOURCE} WHERE {conditions} ORDER BY {place} DESC LIMIT ?", [*values, limit + 1]
    ).fetchall()
    episodes = [_record(row) for row in rows]
    last = episodes[limit - 1] if len(episodes) > limit else None
    next_before = None if last is None else last.rollout if filters.outcome == "running" else last.ending
    return Listing(episodes[:limit], num_matching, next_before)


def choices(connection: sqlite3.Connection) -> Choices:
    """Everything that occurs, in order."""
    tasks = connection.execute("SELECT DISTINCT task_id FROM groups ORDER BY task_id")
    queues = connection.execute("SELECT DISTINCT queue FROM groups ORDER BY queue")
    (newest,) = connection.execute("SELECT ifnull(max(step), 0) FROM policy").fetchone()
    return Choices([row[0] for row in tasks], [row[0] for row in queues], newest)


def newest_ending(connection: sqlite3.Connection) -> int:
    """Number of the ending that came last; 0 before the first."""
    (ending,) = connection.execute("SELECT max(ending) FROM rollouts WHERE ending IS NOT NULL").fetchone()
    return int(ending or 0)


def episode(connection: sqlite3.Connection, episode_id: str) -> EpisodeRecord | None:
    """One episode, ended or not; None if there is none of this name."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM {_SOURCE} WHERE r.episode_id = ?", (episode_id,)).fetchone()
    return None if row is None else _record(row)


def steps(connection: sqlite3.Connection, rollout: int) -> list[Step]:
    """What is kept of an episode's steps, in order; raises CodecError for one that is damaged."""
    rows = connection.execute("SELECT payload FROM steps WHERE rollout = ? ORDER BY step", (rollout,))
    return [decode_step(payload) for (payload,) in rows]


def group(connection: sqlite3.Connection, group_id: str) -> GroupRecord | None:
    """One group; None if there is none of this name."""
    row = connection.execute(
        "SELECT position, group_id, queue, task_id, task_json, state, temperature, batch_id, dropped_because,"
        " used_candidate, candidate FROM groups g JOIN task_files t ON t.hash = g.task_hash WHERE group_id = ?",
        (group_id,),
    ).fetchone()
    if row is None:
        return None
    members = _records(connection, "r.group_position = ? ORDER BY r.member", row[0])
    candidates = _records(connection, "r.id = ?", row[10]) if row[10] is not None else []
    return GroupRecord(
        group_id=row[1],
        queue=row[2],
        task_id=row[3],
        instruction=_instruction(row[4]),
        state=row[5],
        temperature=row[6],
        batch_id=row[7],
        dropped_because=row[8],
        used_candidate=bool(row[9]),
        members=members,
        candidate=candidates[0] if candidates else None,
    )


def _conditions(filters: Filters, success_above: float) -> tuple[str, list[object]]:
    """SQL for what is asked for, and its values."""
    asked: list[tuple[str, tuple[object, ...]]] = []
    if filters.task:
        asked.append(("g.task_id = ?", (filters.task,)))
    if filters.queue:
        asked.append(("g.queue = ?", (filters.queue,)))
    if filters.termination is not None:
        asked.append(("r.termination = ?", (filters.termination,)))
    if filters.fault is not None:
        asked.append(("r.fault_kind = ?", (filters.fault,)))
    if filters.version is not None:
        asked.append(("r.oldest_version <= ? AND r.newest_version >= ?", (filters.version, filters.version)))
    asked.append(
        {
            "": ("r.ending IS NOT NULL", ()),
            "solved": ("r.ending IS NOT NULL AND r.reward > ?", (success_above,)),
            "failed": ("r.ending IS NOT NULL AND r.reward <= ?", (success_above,)),
            "faulted": ("r.ending IS NOT NULL AND r.state = 'faulted'", ()),
            "running": ("r.state = 'leased'", ()),
        }[filters.outcome]
    )
    return " AND ".join(text for text, _ in asked), [value for _, values in asked for value in values]


def _records(connection: sqlite3.Connection, condition: str, value: object) -> list[EpisodeRecord]:
    rows = connection.execute(f"SELECT {_COLUMNS} FROM {_SOURCE} WHERE {condition}", (value,))
    return [_record(row) for row in rows]


def _record(row: Sequence[Any]) -> EpisodeRecord:
    """A row of _COLUMNS, which stand in the order of the record's fields."""
    values = dict(zip((field.name for field in fields(EpisodeRecord)), row, strict=True))
    values["removed"] = bool(values["removed"])
    for name, kind in (("result", rollout_pb2.EpisodeResult), ("last_fault", rollout_pb2.EpisodeFault)):
        values[name] = None if values[name] is None else kind.FromString(values[name])
    return EpisodeRecord(**values)


def _instruction(task_json: bytes) -> str:
    """What the task asks for, where its file says so: replay takes any bytes for a task."""
    try:
        task = json.loads(task_json)
    except ValueError:
        return ""
    return str(task.get("instruction", "")) if isinstance(task, dict) else ""
