"""Screenshots: stored once by hash, kept as long as some rollout uses them.

Knows the rows that say where in the segments a screenshot's bytes lie; not what a screenshot shows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.replay.refusals import Malformed, NotHeld
from deskrl.replay.segments import Place, SegmentReader, Segments

HASH_BYTES = 32


@dataclass(frozen=True)
class Received:
    """A screenshot as it came: `keep` checks its bytes against its hash."""

    hash: bytes
    data: bytes


def parse_hash(text: str) -> bytes:
    """The 32 bytes behind a screenshot's name.

    Raises:
        Malformed: it is no lower-case hex SHA-256.
    """
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != HASH_BYTES or value.hex() != text:
        raise Malformed(f"{text[:80]!r} is no lower-case hex SHA-256")
    return value


def keep(
    connection: sqlite3.Connection,
    segments: Segments,
    rollout: int,
    received: Sequence[Received],
    named: Iterable[bytes],
) -> None:
    """Store what was received and note that the rollout uses it, and what it names.

    Raises:
        Malformed: the bytes of one do not have its hash, or a named screenshot is not held.
    """
    for image in received:
        if image_hash(image.data) != image.hash.hex():
            raise Malformed(f"a screenshot's bytes do not have the hash {image.hash.hex()}")
        _use(connection, rollout, _find(connection, image.hash) or _insert(connection, segments, image))
    arrived = {image.hash for image in received}
    for value in named:
        if value in arrived:
            continue
        held = _find(connection, value)
        if held is None:
            raise Malformed(f"screenshot {value.hex()} is named, but neither sent nor held: send it first")
        _use(connection, rollout, held)


def let_go(connection: sqlite3.Connection, rollout: int) -> None:
    """The rollout uses no screenshot any more; those that no other one uses are removed."""
    used = connection.execute("DELETE FROM image_uses WHERE rollout = ? RETURNING image", (rollout,)).fetchall()
    for (image,) in used:
        if connection.execute("SELECT 1 FROM image_uses WHERE image = ? LIMIT 1", (image,)).fetchone() is None:
            (segment, num_bytes) = connection.execute(
                "DELETE FROM images WHERE id = ? RETURNING segment, num_bytes", (image,)
            ).fetchone()
            connection.execute("UPDATE segments SET live_bytes = live_bytes - ? WHERE number = ?", (num_bytes, segment))


def read(
    connection: sqlite3.Connection, segments: SegmentReader, hashes: Sequence[bytes], max_bytes: int
) -> list[bytes]:
    """Bytes of the first screenshots of `hashes`: at least one, then as many as fit into `max_bytes`.

    Outside a transaction, so that what is moved meanwhile is found again.

    Raises:
        NotHeld: the store lacks one of them.
    """
    found: list[bytes] = []
    num_bytes = 0
    for value in hashes:
        found.append(_read(connection, segments, value))
        num_bytes += len(found[-1])
        if num_bytes >= max_bytes:
            break
    return found


def extents(connection: sqlite3.Connection) -> dict[int, int]:
    """For each segment that holds screenshots, how far they reach."""
    return dict(connection.execute("SELECT number, num_bytes FROM segments"))


def refuse_lost(connection: sqlite3.Connection, segments: SegmentReader) -> None:
    """Raise UserError if bytes of screenshots that the store speaks of are not on disk.

    Outside a transaction: a segment that replay has removed meanwhile is spoken of no more.
    """
    for number, num_bytes in extents(connection).items():
        try:
            segments.check(number, num_bytes)
        except UserError:
            if number in extents(connection):
                raise


def move(connection: sqlite3.Connection, segments: Segments, segment: int) -> None:
    """Write all screenshots of a segment again, at the end of what is written now."""
    rows = connection.execute("SELECT id, position, num_bytes FROM images WHERE segment = ?", (segment,)).fetchall()
    for image, position, num_bytes in rows:
        place = segments.append(segments.read(Place(segment, position), num_bytes))
        connection.execute(
            "UPDATE images SET segment = ?, position = ? WHERE id = ?", (place.segment, place.position, image)
        )
        _reach(connection, place, num_bytes)
    connection.execute("UPDATE segments SET live_bytes = 0 WHERE number = ?", (segment,))


def totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """Number of screenshots held, and their bytes; read off the index."""
    num_images, num_bytes = connection.execute(
        "SELECT count(*), coalesce(sum(num_bytes), 0) FROM images INDEXED BY images_by_hash"
    ).fetchone()
    return num_images, num_bytes


def _find(connection: sqlite3.Connection, value: bytes) -> int | None:
    row = connection.execute("SELECT id FROM images WHERE hash = ?", (value,)).fetchone()
    return None if row is None else int(row[0])


def _insert(connection: sqlite3.Connection, segments: Segments, image: Received) -> int:
    place = segments.append(image.data)
    _reach(connection, place, len(image.data))
    row = connection.execute(
        "INSERT INTO images (hash, num_bytes, segment, position) VALUES (?, ?, ?, ?) RETURNING id",
        (image.hash, len(image.data), place.segment, place.position),
    ).fetchone()
    return int(row[0])


def _reach(connection: sqlite3.Connection, place: Place, num_bytes: int) -> None:
    """Note that a segment reaches as far as the bytes at `place`, and holds so many more that are wanted."""
    connection.execute(
        "INSERT INTO segments VALUES (?1, ?2 + ?3, ?3)"
        " ON CONFLICT DO UPDATE SET num_bytes = ?2 + ?3, live_bytes = live_bytes + ?3",
        (place.segment, place.position, num_bytes),
    )


def _read(connection: sqlite3.Connection, segments: SegmentReader, value: bytes) -> bytes:
    statement = "SELECT segment, position, num_bytes FROM images WHERE hash = ?"
    gone = None
    while (row := connection.execute(statement, (value,)).fetchone()) not in (None, gone):
        try:
            return segments.read(Place(row[0], row[1]), row[2])
        except FileNotFoundError:  # moved since that row was read: the next look finds it, unless it has gone
            gone = row
    raise NotHeld(f"screenshot {value.hex()} is not held")


def _use(connection: sqlite3.Connection, rollout: int, image: int) -> None:
    connection.execute("INSERT OR IGNORE INTO image_uses VALUES (?, ?)", (rollout, image))
