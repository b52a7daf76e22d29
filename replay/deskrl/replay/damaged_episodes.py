"""Damaged episodes: found by checksums and hashes, set aside, and planned again while their group can still use them.

The rows of an episode that is set aside are kept: its row in `rollouts` gets the state `damaged` and another member and
episode id, which a new rollout takes over. An episode of a consumed or closed group is only marked. Every function that
writes is one operation of the writer, or part of one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass

from deskrl.core.group_outcome import is_success
from deskrl.replay import counters, image_index, row_checksums

_LIVE = ("open", "complete", "bound")
"""States of groups whose damaged members are played again."""
_ROW = "its row in the database"


@dataclass(frozen=True)
class DamagedEpisode:
    """Episode that was set aside or marked."""

    episode_id: str
    reason: str
    """What is damaged."""
    is_repeated: bool
    """Whether its rollout was planned again; False for an episode of a consumed or closed group."""
    lease_id: str | None
    """Active lease that was ended with it; None without one."""


class EpisodesDamagedError(Exception):
    """Episodes that a read needs are damaged.

    Args:
        reasons: what is damaged, by row id of the rollout.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"rollouts {', '.join(map(str, reasons))} are damaged")
        self.reasons = reasons


def episode_id(connection: sqlite3.Connection, rollout: int) -> str:
    """Return the episode id that a rollout had before it was set aside; its row id if that is damaged too."""
    row = connection.execute(
        f"SELECT episode_id, {row_checksums.intact('rollout_plans', 'p')} FROM rollout_plans p WHERE rollout = ?",
        (rollout,),
    ).fetchone()
    return str(row[0]) if row is not None and row[1] else f"of row {rollout}"


def find_damage(connection: sqlite3.Connection, rollout: int) -> str:
    """Return what is damaged in the rows of an ended rollout whose steps are stored; empty if nothing is."""
    row = connection.execute(
        f"SELECT num_steps, {row_checksums.intact('rollouts', 'r')} FROM rollouts r WHERE id = ?", (rollout,)
    ).fetchone()
    if row is None or not row[1]:
        return _ROW
    steps = connection.execute("SELECT step, payload, checksum FROM steps WHERE rollout = ? ORDER BY step", (rollout,))
    num_intact = 0
    for step, payload, checksum in steps:
        if step != num_intact or not row_checksums.is_step_intact(rollout, step, payload, checksum):
            return f"step {num_intact}"
        num_intact += 1
    return "" if num_intact == row[0] else f"step {min(num_intact, row[0])}"


def set_aside(
    connection: sqlite3.Connection, reasons: dict[int, str], success_threshold: float
) -> list[DamagedEpisode]:
    """Set damaged episodes aside and plan them again, or mark them if their groups are consumed or closed.

    Args:
        connection: connection of the writer.
        reasons: what is damaged, by row id of the rollout; rollouts that are known to be damaged are ignored.
        success_threshold: rewards above this are successes.
    """
    found = [_set_aside(connection, rollout, reason, success_threshold) for rollout, reason in reasons.items()]
    return [episode for episode in found if episode is not None]


def set_aside_users(
    connection: sqlite3.Connection, hashes: Iterable[bytes], success_threshold: float
) -> list[DamagedEpisode]:
    """Set aside all episodes that use these damaged screenshots, which are no longer stored then.

    A screenshot is shared by the episodes that saw it. If it is sent again, it is stored again.
    """
    reasons: dict[int, str] = {}
    for value in hashes:
        users = image_index.delete(connection, value) or _find_live_users(connection, value)
        reasons |= {rollout: f"screenshot {value.hex()}" for rollout in users}
    return set_aside(connection, reasons, success_threshold)


def _find_live_users(connection: sqlite3.Connection, value: bytes) -> list[int]:
    """Return the rollouts of live groups whose rows name a screenshot, by searching their contents."""
    rows = connection.execute(
        "SELECT r.id FROM rollouts r JOIN groups g ON g.position = r.group_position"
        f" WHERE g.state IN {_LIVE} AND r.state != 'damaged' AND (instr(r.result, ?1) OR"
        " EXISTS (SELECT 1 FROM steps WHERE rollout = r.id AND instr(payload, ?1)))",
        (value.hex().encode(),),
    )
    return [rollout for (rollout,) in rows]


def set_aside_damaged_rows(connection: sqlite3.Connection, success_threshold: float) -> list[DamagedEpisode]:
    """Set aside all episodes whose row in `rollouts` is damaged or missing; replace damaged rows of `rollout_plans`.

    Raises:
        StateDamagedError: both rows of an episode are damaged.
    """
    connection.execute(
        "INSERT OR REPLACE INTO rollout_plans (rollout, episode_id, group_position, member, seed)"
        " SELECT r.id, r.episode_id, r.group_position, r.member, r.seed FROM rollouts r"
        f" LEFT JOIN rollout_plans p ON p.rollout = r.id WHERE {row_checksums.intact('rollouts', 'r')}"
        f" AND r.member >= 0 AND (p.rollout IS NULL OR NOT {row_checksums.intact('rollout_plans', 'p')})"
    )
    rows = connection.execute(
        "SELECT p.rollout FROM rollout_plans p LEFT JOIN rollouts r ON r.id = p.rollout"
        f" WHERE (r.id IS NULL OR NOT {row_checksums.intact('rollouts', 'r')})"
        f" AND {row_checksums.intact('rollout_plans', 'p')}"
    ).fetchall()
    # A damaged row id makes one row appear under the id of another, or of none.
    connection.execute(
        "DELETE FROM rollouts AS r WHERE id NOT IN (SELECT rollout FROM rollout_plans)"
        f" AND NOT {row_checksums.intact('rollouts', 'r')}"
    )
    episodes = set_aside(connection, {rollout: _ROW for (rollout,) in rows}, success_threshold)
    if connection.execute(f"SELECT 1 FROM rollouts r WHERE NOT {row_checksums.intact('rollouts', 'r')}").fetchone():
        raise row_checksums.StateDamagedError("both rows of an episode, in rollouts and rollout_plans")
    return episodes


def _set_aside(
    connection: sqlite3.Connection, rollout: int, reason: str, success_threshold: float
) -> DamagedEpisode | None:
    plan = connection.execute(
        "SELECT episode_id, group_position, member, seed FROM rollout_plans p"
        f" WHERE rollout = ? AND {row_checksums.verified('rollout_plans', 'p')}",
        (rollout,),
    ).fetchone()
    episode_id, position, member, seed = row_checksums.existing(plan, "rollout_plans")
    if _is_superseded(connection, rollout, position, member):
        return None
    if not _mark(connection, rollout, (episode_id, position, member, seed), reason):
        return None
    group = connection.execute(
        f"SELECT state FROM groups g WHERE position = ? AND {row_checksums.verified('groups', 'g')}", (position,)
    ).fetchone()
    (state,) = row_checksums.existing(group, "groups")
    ended = connection.execute(
        "UPDATE leases SET state = 'released' WHERE rollout = ? AND state = 'active' RETURNING lease_id", (rollout,)
    ).fetchone()
    connection.execute("DELETE FROM successes WHERE rollout = ?", (rollout,))
    connection.execute("UPDATE groups SET candidate = NULL WHERE candidate = ? AND state != 'consumed'", (rollout,))
    is_repeated = state in _LIVE
    if is_repeated:
        # Its number makes the former member unique; no other code selects negative members.
        connection.execute(
            "UPDATE rollouts SET state = 'damaged', member = -id, episode_id = episode_id || ' (damaged ' || id || ')',"
            " reward = NULL, result = NULL, termination = NULL WHERE id = ?",
            (rollout,),
        )
        plan_rollout(connection, episode_id, position, member, seed)
        _reopen(connection, position, success_threshold)
    return DamagedEpisode(episode_id, reason, is_repeated, None if ended is None else str(ended[0]))


def plan_rollout(connection: sqlite3.Connection, episode_id: str, position: int, member: int, seed: str) -> None:
    """Add a planned rollout to a group; the caller adapts the counts of the group."""
    rollout = connection.execute(
        "INSERT INTO rollouts (episode_id, group_position, member, seed) VALUES (?, ?, ?, ?)",
        (episode_id, position, member, seed),
    ).lastrowid
    connection.execute(
        "INSERT INTO rollout_plans (rollout, episode_id, group_position, member, seed) VALUES (?, ?, ?, ?, ?)",
        (rollout, episode_id, position, member, seed),
    )


def _is_superseded(connection: sqlite3.Connection, rollout: int, position: int, member: int) -> bool:
    """Return whether a rollout was set aside before, and a new one planned; then delete its row if that is damaged."""
    statement = "SELECT 1 FROM rollout_plans WHERE group_position = ? AND member = ? AND rollout > ?"
    if connection.execute(statement, (position, member, rollout)).fetchone() is None:
        return False
    connection.execute(
        f"DELETE FROM rollouts AS r WHERE id = ? AND NOT {row_checksums.intact('rollouts', 'r')}", (rollout,)
    )
    return True


def _mark(connection: sqlite3.Connection, rollout: int, plan: tuple[str, int, int, str], reason: str) -> bool:
    """Record what is damaged; return False if the episode was marked before. A damaged row is replaced by a new one."""
    row = connection.execute(
        f"SELECT damage FROM rollouts r WHERE id = ? AND {row_checksums.intact('rollouts', 'r')}", (rollout,)
    ).fetchone()
    if row is not None:
        statement = "UPDATE rollouts SET damage = ?, removable = 0 WHERE id = ? AND damage = ''"
        return connection.execute(statement, (reason, rollout)).rowcount > 0
    connection.execute("DELETE FROM rollouts WHERE id = ?", (rollout,))
    connection.execute(
        "INSERT INTO rollouts (episode_id, group_position, member, seed, id, state, damage, ending, ended_unix_s)"
        " VALUES (?, ?, ?, ?, ?, 'damaged', ?, ?, ?)",
        (*plan, rollout, reason, counters.add(connection, counters.ENDINGS), time.time()),
    )
    return True


def _reopen(connection: sqlite3.Connection, position: int, success_threshold: float) -> None:
    """Open a group again and count its members anew. A group that was bound keeps its slot."""
    members = connection.execute(
        "SELECT state, num_steps, reward FROM rollouts r WHERE group_position = ? AND member >= 0"
        f" AND {row_checksums.intact('rollouts', 'r')}",
        (position,),
    ).fetchall()
    states = [state for state, _, _ in members]
    finished = [(num_steps, reward) for state, num_steps, reward in members if state == "finished"]
    connection.execute(
        "UPDATE groups SET state = 'open', completion = NULL, candidate = NULL, dropped = 0, dropped_because = '',"
        " num_planned = ?, num_leased = ?, num_finished = ?, num_faulted = ?, num_succeeded = ?, num_steps = ?"
        " WHERE position = ?",
        (
            *(states.count(state) for state in ("planned", "leased", "finished", "faulted")),
            sum(is_success(reward, success_threshold) for _, reward in finished),
            sum(num_steps for num_steps, _ in finished),
            position,
        ),
    )
