"""Keeps the store within its size: removes steps and screenshots of consumed episodes, oldest first.

Knows what may go: an episode whose batch is committed (or whose group was closed), that is neither in the success
cache nor a candidate of a batch not yet committed. Its envelope (who, when, reward, evidence) stays for reports.
Episodes go roughly in the order in which they came, so segments empty as a whole; of one that a few keep alive (in
the success cache) the few are written again elsewhere.
"""

from __future__ import annotations

import sqlite3

from deskrl.replay import images
from deskrl.replay.segments import Segments

EPISODES_AT_ONCE = 8
"""Removed in one transaction, so that an acknowledgement never waits for long."""


def used_bytes(connection: sqlite3.Connection) -> int:
    """Bytes that hold something. Freed pages are written over before the database grows, and a segment of which less
    than half is wanted is given up: what lies on the disk is never much more than twice this."""
    (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
    (num_free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    (live_bytes,) = connection.execute("SELECT coalesce(sum(live_bytes), 0) FROM segments").fetchone()
    return int((num_pages - num_free) * page_bytes + live_bytes)


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


def give_up_segments(connection: sqlite3.Connection, segments: Segments) -> list[int]:
    """Take the segments that nothing wants any more out of the rows, after moving what is left of one that is mostly
    unwanted; returns their numbers, whose files may go once this is committed."""
    closed = [
        (number, live_bytes)
        for number, num_bytes, live_bytes in connection.execute("SELECT number, num_bytes, live_bytes FROM segments")
        if live_bytes * 2 < num_bytes and not segments.is_written(number)
    ]
    unwanted = [number for number, live_bytes in closed if live_bytes == 0]
    sparse = [number for number, live_bytes in closed if live_bytes > 0][:1]
    for number in sparse:
        images.move(connection, segments, number)
    connection.executemany("DELETE FROM segments WHERE number = ?", [(number,) for number in unwanted + sparse])
    return unwanted + sparse
