"""Durable counters: sequence numbers and totals, one row each."""

from __future__ import annotations

import sqlite3

from deskrl.replay.row_checksums import verified

UPDATES = "updates"
"""Number of batches trained on, as reported by the learner."""
TRAINED_GROUPS = "paced_groups_learnt"
"""Number of groups of the rate-limited queue that committed batches were trained on."""
ENDINGS = "endings"
"""Sequence number of the latest rollout that ended."""
COMPLETIONS = "completions"
"""Sequence number of the latest group that completed."""
EXPIRED_LEASES = "expired_leases"
FAULT = "fault/"
"""Prefix of the numbers of faults by kind."""
LOST_CONNECTION = "lost_connection/"
"""Prefix of the numbers of connections that were lost after the policy's first action, by task."""
DROPPED = "dropped/"
"""Prefix of the numbers of groups that were not trained on, by cause."""
CREATED_BY = "created_by/"
"""Prefix of the deskrl version that created the store; the value is 1."""
_VERIFIED = verified("counters", "c")


def add(connection: sqlite3.Connection, name: str, amount: int = 1) -> int:
    """Add to a counter, which starts at 0, and return its new value."""
    (value,) = connection.execute(
        "INSERT INTO counters (name, value) VALUES (?, ?)"
        " ON CONFLICT (name) DO UPDATE SET value = value + excluded.value RETURNING value",
        (name, amount),
    ).fetchone()
    return int(value)


def put(connection: sqlite3.Connection, name: str, value: int) -> None:
    """Set a counter."""
    connection.execute("INSERT OR REPLACE INTO counters (name, value) VALUES (?, ?)", (name, value))


def read(connection: sqlite3.Connection, name: str) -> int:
    """Return the value of a counter; 0 if it was never set."""
    row = connection.execute(f"SELECT value FROM counters c WHERE name = ? AND {_VERIFIED}", (name,)).fetchone()
    return 0 if row is None else int(row[0])


def read_all(connection: sqlite3.Connection, prefix: str) -> dict[str, int]:
    """Return all counters whose name starts with `prefix`, keyed by the rest of the name."""
    rows = connection.execute(
        f"SELECT substr(name, ?), value FROM counters c WHERE substr(name, 1, ?) = ? AND {_VERIFIED} ORDER BY name",
        (len(prefix) + 1, len(prefix), prefix),
    )
    return dict(rows)
