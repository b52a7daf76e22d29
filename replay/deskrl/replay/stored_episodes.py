"""SELECT statements for episodes and groups, returned as typed records.

Every function takes an open connection and reads committed rows only; `store_reader` opens a store by path.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from deskrl.core.group_outcome import as_float32
from deskrl.core.step_codec import CodecError
from deskrl.proto.v1 import rollout_pb2
from deskrl.replay.row_checksums import intact, is_step_intact

DAMAGED = "damaged"
"""State of an episode that is set aside; see `damaged_episodes`."""
OUTCOMES = ("solved", "failed", "faulted", "running")
_COLUMNS = (
    "r.id, r.episode_id, g.group_id, g.queue, g.task_id, r.member, r.seed, g.acting_policy, r.state, r.reward,"
    " r.termination, r.fault_kind, r.num_faults, r.num_steps, r.lineage, r.oldest_version, r.newest_version, r.ending,"
    " r.ended_unix_s, r.removed, r.damage, r.result, r.last_fault,"
    f" {intact('rollouts', 'r')} AND {intact('groups', 'g')}"
)
# CROSS JOIN fixes the join order: SQLite walks the index on `ending`, newest first, and looks up each row's group. Left
# to itself, the planner sorts all matching rows for some filters.
_SOURCE = "rollouts r CROSS JOIN groups g ON g.position = r.group_position"


@dataclass(frozen=True)
class EpisodeFilter:
    """Conditions that an episode must all satisfy; an empty or None field is not a condition."""

    task: str = ""
    queue: str = ""
    outcome: str = ""
    """One of OUTCOMES."""
    termination: int | None = None
    fault: int | None = None
    """Kind of the last fault, including that of a rollout that was granted again afterwards."""
    version: int | None = None
    """Policy step that sampled at least one token of the episode."""
    episode_ids: Sequence[str] = ()
    min_reward: float | None = None
    max_reward: float | None = None
    is_stored: bool = False
    """Whether to leave out episodes whose steps retention has removed."""


@dataclass(frozen=True)
class EpisodeRecord:
    """A rollout and, once it has ended, its episode; without the steps."""

    rollout: int
    episode_id: str
    group_id: str
    queue: str
    task_id: str
    member: int
    """Index in the group."""
    seed: int
    acting_policy: rollout_pb2.ActingPolicy
    state: str
    """planned, leased, finished, faulted, or DAMAGED."""
    reward: float | None
    termination: rollout_pb2.Termination | None
    fault_kind: rollout_pb2.FaultKind | None
    num_faults: int
    num_steps: int
    lineage: str | None
    oldest_version: int | None
    newest_version: int | None
    ending: int | None
    """Sequence number over all ended rollouts of the store; None while the rollout has not ended."""
    ended_unix_s: float | None
    removed: bool
    """Whether retention has removed steps and screenshots."""
    damage: str
    """What is damaged: steps or screenshots cannot be read; empty if nothing is known to be damaged."""
    result: rollout_pb2.EpisodeResult | None
    last_fault: rollout_pb2.EpisodeFault | None

    @property
    def is_set_aside(self) -> bool:
        """Whether the episode is damaged and its rollout was planned again, or its values are lost."""
        return self.state == DAMAGED


@dataclass(frozen=True)
class EpisodePage:
    """One page of a listing, newest episode first."""

    episodes: list[EpisodeRecord]
    num_matching: int
    """Number of episodes on all pages."""
    next_before: int | None
    """Value of `before` that selects the next page; None on the last page."""


@dataclass(frozen=True)
class FilterOptions:
    """Values that occur in the store and can be filtered by."""

    tasks: list[str]
    queues: list[str]
    newest_version: int


@dataclass(frozen=True)
class GroupRecord:
    """A group with its members and its candidate, the stored success that replay offered to it."""

    group_id: str
    queue: str
    task_id: str
    instruction: str
    state: str
    """open, complete, bound, consumed or closed."""
    temperature: float
    batch_id: str | None
    dropped_because: str
    used_candidate: bool
    members: list[EpisodeRecord]
    candidate: EpisodeRecord | None


def find_rollouts(connection: sqlite3.Connection, wanted: EpisodeFilter, limit: int = 0) -> list[int]:
    """Return the row ids of ended rollouts that match, newest first.

    Args:
        connection: connection to the store.
        wanted: conditions.
        limit: maximum number of ids; 0: no limit.
    """
    conditions, values = _conditions(wanted, success_threshold=0.0)
    rows = connection.execute(
        f"SELECT r.id FROM {_SOURCE} WHERE {conditions} AND r.state != '{DAMAGED}' ORDER BY r.ending DESC LIMIT ?",
        [*values, limit or -1],
    )
    return [row[0] for row in rows]


def list_episodes(connection: sqlite3.Connection, wanted: EpisodeFilter) -> list[EpisodeRecord]:
    """Return all ended episodes that match, newest first, without those that are set aside."""
    conditions, values = _conditions(wanted, success_threshold=0.0)
    rows = connection.execute(f"SELECT {_COLUMNS} FROM {_SOURCE} WHERE {conditions} ORDER BY r.ending DESC", values)
    return [record for record in map(_record, rows) if not record.is_set_aside]


def num_damaged(connection: sqlite3.Connection) -> int:
    """Return the number of episodes that are marked as damaged or have a damaged row."""
    statement = f"SELECT count(*) FROM rollouts r WHERE damage != '' OR NOT {intact('rollouts', 'r')}"
    (num,) = connection.execute(statement).fetchone()
    return int(num)


def find_page(
    connection: sqlite3.Connection, wanted: EpisodeFilter, success_threshold: float, before: int | None, limit: int
) -> EpisodePage:
    """Return one page of the episodes that match, newest first.

    Args:
        connection: connection to the store.
        wanted: conditions.
        success_threshold: an episode with a reward above this counts as solved.
        before: `next_before` of the preceding page; None: first page.
        limit: number of episodes on a page.
    """
    order = "r.id" if wanted.outcome == "running" else "r.ending"
    conditions, values = _conditions(wanted, success_threshold)
    source = _SOURCE if wanted.task or wanted.queue else "rollouts r"
    (num_matching,) = connection.execute(f"SELECT count(*) FROM {source} WHERE {conditions}", values).fetchone()
    if before is not None:
        conditions, values = f"{conditions} AND {order} < ?", [*values, before]
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM {_SOURCE} WHERE {conditions} ORDER BY {order} DESC LIMIT ?", [*values, limit + 1]
    ).fetchall()
    episodes = [_record(row) for row in rows]
    last = episodes[limit - 1] if len(episodes) > limit else None
    next_before = None if last is None else last.rollout if wanted.outcome == "running" else last.ending
    return EpisodePage(episodes[:limit], num_matching, next_before)


def filter_options(connection: sqlite3.Connection) -> FilterOptions:
    """Return all task ids and queues in alphabetical order, and the newest policy version."""
    tasks = connection.execute("SELECT DISTINCT task_id FROM groups ORDER BY task_id")
    queues = connection.execute("SELECT DISTINCT queue FROM groups ORDER BY queue")
    (newest,) = connection.execute("SELECT ifnull(max(step), 0) FROM policy").fetchone()
    return FilterOptions([row[0] for row in tasks], [row[0] for row in queues], newest)


def newest_ending(connection: sqlite3.Connection) -> int:
    """Return the sequence number of the rollout that ended last; 0 if none has ended."""
    (ending,) = connection.execute("SELECT max(ending) FROM rollouts WHERE ending IS NOT NULL").fetchone()
    return int(ending or 0)


def get_rollout(connection: sqlite3.Connection, rollout: int) -> EpisodeRecord:
    """Return the episode of a rollout that exists."""
    records = _records(connection, "r.id = ?", rollout)
    return records[0] if records else _damaged_record({"rollout": rollout, "ending": None})


def get_episode(connection: sqlite3.Connection, episode_id: str) -> EpisodeRecord | None:
    """Return one episode, whether it has ended or not; None if the id is unknown."""
    records = _records(connection, "r.episode_id = ?", episode_id)
    return records[0] if records else None


def step_payloads(connection: sqlite3.Connection, record: EpisodeRecord) -> list[bytes]:
    """Return the stored steps of an episode in order, encoded by `deskrl.core.step_codec`.

    Raises:
        CodecError: a step is damaged or missing.
    """
    statement = "SELECT step, payload, checksum FROM steps WHERE rollout = ? ORDER BY step"
    rows = connection.execute(statement, (record.rollout,))
    payloads: list[bytes] = []
    for step, payload, checksum in rows:
        if step != len(payloads) or not is_step_intact(record.rollout, step, payload, checksum):
            raise CodecError(f"step {len(payloads)} is damaged")
        payloads.append(payload)
    if len(payloads) < record.num_steps and not record.removed:
        raise CodecError(f"step {len(payloads)} is missing")
    return payloads


def get_group(connection: sqlite3.Connection, group_id: str) -> GroupRecord | None:
    """Return one group; None if the id is unknown or its row is damaged."""
    row = connection.execute(
        "SELECT position, group_id, queue, task_id, task_json, state, temperature, batch_id, dropped_because,"
        " used_candidate, candidate, t.hash FROM groups g JOIN task_files t ON t.hash = g.task_hash"
        f" WHERE group_id = ? AND {intact('groups', 'g')}",
        (group_id,),
    ).fetchone()
    if row is None:
        return None
    return GroupRecord(
        group_id=row[1],
        queue=row[2],
        task_id=row[3],
        instruction=_instruction(row[4], row[11]),
        state=row[5],
        temperature=row[6],
        batch_id=row[7],
        dropped_because=row[8],
        used_candidate=bool(row[9]),
        members=_records(connection, "r.group_position = ? ORDER BY r.member", row[0]),
        candidate=None if row[10] is None else get_rollout(connection, row[10]),
    )


def _conditions(wanted: EpisodeFilter, success_threshold: float) -> tuple[str, list[object]]:
    """Return the WHERE clause of a filter and its values."""
    threshold = as_float32(success_threshold)
    optional: list[tuple[object, str, tuple[object, ...]]] = [
        (wanted.task or None, "g.task_id = ?", (wanted.task,)),
        (wanted.queue or None, "g.queue = ?", (wanted.queue,)),
        (wanted.termination, "r.termination = ?", (wanted.termination,)),
        (wanted.fault, "r.fault_kind = ?", (wanted.fault,)),
        (wanted.version, "r.oldest_version <= ? AND r.newest_version >= ?", (wanted.version, wanted.version)),
        (wanted.min_reward, "r.reward >= ?", (wanted.min_reward,)),
        (wanted.max_reward, "r.reward <= ?", (wanted.max_reward,)),
        (wanted.is_stored or None, "NOT r.removed AND r.damage = ''", ()),
        (
            wanted.episode_ids or None,
            f"r.episode_id IN ({','.join('?' * len(wanted.episode_ids))})",
            tuple(wanted.episode_ids),
        ),
    ]
    outcomes: dict[str, tuple[str, tuple[object, ...]]] = {
        "": ("r.ending IS NOT NULL", ()),
        "solved": ("r.ending IS NOT NULL AND r.reward > ?", (threshold,)),
        "failed": ("r.ending IS NOT NULL AND r.reward <= ?", (threshold,)),
        "faulted": ("r.ending IS NOT NULL AND r.state = 'faulted'", ()),
        "running": ("r.state = 'leased'", ()),
    }
    chosen = [(text, values) for value, text, values in optional if value is not None] + [outcomes[wanted.outcome]]
    return " AND ".join(text for text, _ in chosen), [value for _, values in chosen for value in values]


def _records(connection: sqlite3.Connection, condition: str, value: object) -> list[EpisodeRecord]:
    rows = connection.execute(f"SELECT {_COLUMNS} FROM {_SOURCE} WHERE {condition}", (value,))
    return [_record(row) for row in rows]


def _record(row: Sequence[Any]) -> EpisodeRecord:
    """Convert a row of _COLUMNS, which are in the order of the record's fields."""
    *values_, is_intact = row
    values = dict(zip((field.name for field in fields(EpisodeRecord)), values_, strict=True))
    if not is_intact:
        return _damaged_record(values)
    values["seed"] = int(values["seed"])  # 64 bits unsigned do not fit an SQLite integer, so the column is text
    values["removed"] = bool(values["removed"])
    for name, kind in (("result", rollout_pb2.EpisodeResult), ("last_fault", rollout_pb2.EpisodeFault)):
        values[name] = None if values[name] is None else kind.FromString(values[name])
    return EpisodeRecord(**values)


def _damaged_record(values: dict[str, Any]) -> EpisodeRecord:
    """Return a record that says that its row is damaged; of the values, it has only the row id and the order."""
    empty: dict[str, Any] = dict.fromkeys(field.name for field in fields(EpisodeRecord))
    rollout = values["rollout"]
    empty |= dict.fromkeys(("group_id", "queue", "task_id"), "") | dict.fromkeys(("seed", "member"), 0)
    empty |= {"rollout": rollout, "episode_id": f"damaged row {rollout}", "state": DAMAGED, "removed": False}
    empty |= {"acting_policy": rollout_pb2.ACTING_POLICY_UNSPECIFIED, "num_faults": 0, "num_steps": 0}
    return EpisodeRecord(**empty | {"damage": "its row in the database", "ending": values["ending"]})


def _instruction(task_json: bytes, task_hash: bytes) -> str:
    """Return the task's instruction; empty if the task file is damaged or has none: replay accepts any bytes as one."""
    if not isinstance(task_json, bytes) or hashlib.sha256(task_json).digest() != task_hash:
        return ""
    try:
        task = json.loads(task_json)
    except ValueError:
        return ""
    return str(task.get("instruction", "")) if isinstance(task, dict) else ""
