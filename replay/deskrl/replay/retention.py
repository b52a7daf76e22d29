"""Retention: keeps the store within its size by removing steps and screenshots of consumed episodes, oldest first.

An episode may be removed if its batch is committed (or its group was closed) and if it is neither in the success buffer
nor the candidate of a batch that is not committed. Its envelope (times, reward, evidence) stays for reports. Episodes
are removed roughly in the order in which they were stored, so segments of the blob log become unused as a whole. The
few screenshots that keep an otherwise unused segment alive (those of the success buffer) are rewritten elsewhere.
"""

from __future__ import annotations

import sqlite3

from deskrl.replay import image_index
from deskrl.replay.blob_log import BlobLog
from deskrl.replay.row_checksums import verified

MAX_EPISODES_PER_COMMIT = 8
"""Maximum number of episodes removed in one transaction, which bounds the delay of acknowledgements."""


def num_used_bytes(connection: sqlite3.Connection) -> int:
    """Return the number of bytes in use.

    SQLite reuses free pages before the file grows, and a segment that is less than half in use is compacted, so the
    store takes hardly more than twice this on the disk.
    """
    (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
    (num_free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    (live_bytes,) = connection.execute("SELECT coalesce(sum(live_bytes), 0) FROM segments").fetchone()
    return int((num_pages - num_free) * page_bytes + live_bytes)


def remove_oldest_episodes(connection: sqlite3.Connection, max_bytes: int) -> int:
    """Remove the oldest removable episodes while the store exceeds `max_bytes`; return the number removed."""
    num_removed = 0
    while num_removed < MAX_EPISODES_PER_COMMIT and num_used_bytes(connection) > max_bytes:
        row = connection.execute(
            "SELECT id FROM rollouts r WHERE removable"
            " AND NOT EXISTS (SELECT 1 FROM successes WHERE rollout = r.id)"
            " AND NOT EXISTS (SELECT 1 FROM groups WHERE candidate = r.id AND state = 'bound')"
            " ORDER BY ending LIMIT 1"
        ).fetchone()
        if row is None:
            break
        connection.execute("DELETE FROM steps WHERE rollout = ?", row)
        image_index.release(connection, row[0])
        connection.execute("UPDATE rollouts SET removable = 0, removed = 1 WHERE id = ?", row)
        num_removed += 1
    return num_removed


def compact_segments(connection: sqlite3.Connection, blob_log: BlobLog) -> list[int]:
    """Delete the rows of unused segments, after rewriting the contents of at most one sparsely used segment.

    Returns:
        The numbers of these segments, whose files may be removed after the commit.
    """
    statement = f"SELECT number FROM segments s WHERE live_bytes * 2 < num_bytes AND {verified('segments', 's')}"
    closed = [number for (number,) in connection.execute(statement) if not blob_log.is_open_segment(number)]
    # A damaged row of `images` may have made `live_bytes` wrong, so that it does not tell whether a segment is unused.
    unused = [number for number in closed if not image_index.is_in_use(connection, number)]
    sparse = [number for number in closed if number not in unused][:1]
    for number in sparse:
        image_index.rewrite_segment(connection, blob_log, number)
    connection.executemany("DELETE FROM segments WHERE number = ?", [(number,) for number in unused + sparse])
    return unused + sparse
