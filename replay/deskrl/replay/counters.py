"""Numbers that outlive a restart: sequences and totals, one row each. Knows their names, not what moves them."""

from __future__ import annotations

import sqlite3

UPDATES = "updates"
"""Batches learnt from, as the learner tells it."""
PACED_GROUPS_LEARNT = "paced_groups_learnt"
"""Groups of the paced queue that a committed batch learnt from."""
ENDINGS = "endings"
COMPLETIONS = "completions"
EXPIRED_LEASES = "expired_leases"
FAULT = "fault/"
"""Prefix: faults by kind name."""
DROPPED = "dropped/"
"""Prefix: groups not learnt from, by cause."""


def add(connection: sqlite3.Connection, name: str, amount: int = 1) -> int:
    """Add to a counter, which starts at 0; returns its new value."""
    (value,) = connection.execute(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
        " RETURNING value",
        (name, amount),
    ).fetchone()
    return int(value)


def put(connection: sqlite3.Connection, name: str, value: int) -> None:
    """Set a counter."""
    connection.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (name, value))


def read(connection: sqlite3.Connection, name: str) -> int:
    """Value of a counter; 0 if nothing has moved it."""
    row = connection.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
    return 0 if row is None else int(row[0])


def read_all(connection: sqlite3.Connection, prefix: str) -> dict[str, int]:
    """All counters whose name starts with `prefix`, by the rest of their name."""
    rows = connection.execute(
        "SELECT substr(name, ?), value FROM counters WHERE substr(name, 1, ?) = ? ORDER BY name",
        (len(prefix) + 1, len(prefix), prefix),
    )
    return dict(rows)
