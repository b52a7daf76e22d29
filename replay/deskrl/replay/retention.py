"""Keeps the store within its size: removes steps and screenshots of consumed episodes, oldest first.

Knows what may go: an episode whose batch is committed (or whose group was closed), that is neither in the success
cache nor a candidate of a batch not yet committed. Its envelope (who, when, reward, evidence) stays for reports.
"""

from __future__ import annotations

import sqlite3

from deskrl.replay import images

EPISODES_AT_ONCE = 8
"""Removed in one transaction, so that an acknowledgement never waits for long."""


def used_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of the database that hold something: freed pages are written over before the file grows."""
    (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
    (num_free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    return int((num_pages - num_free) * page_bytes)


def remove_oldest(connection: sqlite3.Connection, max_bytes: int) -> int:
    """Remove the oldest removable episodes while the store is over `max_bytes`; returns how many went."""
    num_removed = 0
    while num_removed < EPISODES_AT_ONCE and used_bytes(connection) > max_bytes:
        row = connection.execute(
            "SELECT id FROM rollouts r WHERE removable"
            " AND NOT EXISTS (SELECT 1 FROM successes WHERE rollout = r.id)"
            " AND NOT EXISTS (SELECT 1 FROM groups WHERE candidate = r.id AND state = 'bound')"
            " ORDER BY ending LIMIT 1"
        ).fetchone()
        if row is None:
            break
        connection.execute("DELETE FROM steps WHERE rollout = ?", row)
        images.let_go(connection, row[0])
        connection.execute("UPDATE rollouts SET removable = 0, removed = 1 WHERE id = ?", row)
        num_removed += 1
    return num_removed
