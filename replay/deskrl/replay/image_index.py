"""Index of screenshots: each is stored once by its hash and kept as long as a rollout uses it.

The rows say where in the blob log the bytes of a screenshot are.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.replay.blob_log import BlobLocation, BlobLog, BlobLogReader
from deskrl.replay.status_errors import InvalidRequestError, NotFoundError

HASH_BYTES = 32


@dataclass(frozen=True)
class ReceivedImage:
    """Screenshot as received; `store_images` checks the bytes against the hash."""

    hash: bytes
    data: bytes


def parse_hash(text: str) -> bytes:
    """Return the 32 bytes of a screenshot's hash.

    Raises:
        InvalidRequestError: the text is not a SHA-256 in lower-case hexadecimal.
    """
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != HASH_BYTES or value.hex() != text:
        raise InvalidRequestError(f"{text[:80]!r} must be a SHA-256 in lower-case hexadecimal")
    return value


def store_images(
    connection: sqlite3.Connection,
    blob_log: BlobLog,
    rollout: int,
    received: Sequence[ReceivedImage],
    named: Iterable[bytes],
) -> None:
    """Store the received screenshots, and record that the rollout uses these and the named ones.

    Raises:
        InvalidRequestError: the hash of a screenshot does not match its bytes, or a named screenshot is not stored.
    """
    for image in received:
        if image_hash(image.data) != image.hash.hex():
            raise InvalidRequestError(f"screenshot {image.hash.hex()}: its bytes have another hash")
        _use(connection, rollout, _find(connection, image.hash) or _insert(connection, blob_log, image))
    received_hashes = {image.hash for image in received}
    for value in named:
        if value in received_hashes:
            continue
        stored = _find(connection, value)
        if stored is None:
            raise InvalidRequestError(f"screenshot {value.hex()} is neither sent nor stored: send it first")
        _use(connection, rollout, stored)


def release(connection: sqlite3.Connection, rollout: int) -> None:
    """Delete the rollout's uses of screenshots, and the screenshots that no other rollout uses."""
    used = connection.execute("DELETE FROM image_uses WHERE rollout = ? RETURNING image", (rollout,)).fetchall()
    for (image,) in used:
        if connection.execute("SELECT 1 FROM image_uses WHERE image = ? LIMIT 1", (image,)).fetchone() is None:
            (segment, num_bytes) = connection.execute(
                "DELETE FROM images WHERE id = ? RETURNING segment, num_bytes", (image,)
            ).fetchone()
            connection.execute("UPDATE segments SET live_bytes = live_bytes - ? WHERE number = ?", (num_bytes, segment))


def read(
    connection: sqlite3.Connection, blob_log: BlobLogReader, hashes: Sequence[bytes], max_bytes: int
) -> list[bytes]:
    """Return the bytes of the first screenshots of `hashes`: at least one, then as many as fit into `max_bytes`.

    Must be called outside a transaction, so that a screenshot that is moved in the meantime is found again.

    Raises:
        NotFoundError: a screenshot is not stored.
    """
    found: list[bytes] = []
    num_bytes = 0
    for value in hashes:
        found.append(_read(connection, blob_log, value))
        num_bytes += len(found[-1])
        if num_bytes >= max_bytes:
            break
    return found


def segment_sizes(connection: sqlite3.Connection) -> dict[int, int]:
    """Return the size in bytes that each segment must at least have, keyed by segment number."""
    return dict(connection.execute("SELECT number, num_bytes FROM segments"))


def check_segments(connection: sqlite3.Connection, blob_log: BlobLogReader) -> None:
    """Raise UserError if a segment with stored screenshots is missing or truncated.

    Must be called outside a transaction, so that a segment removed by replay in the meantime is ignored.
    """
    for number, num_bytes in segment_sizes(connection).items():
        try:
            blob_log.check(number, num_bytes)
        except UserError:
            if number in segment_sizes(connection):
                raise


def rewrite_segment(connection: sqlite3.Connection, blob_log: BlobLog, segment: int) -> None:
    """Append all screenshots of a segment to the current one, so that the segment becomes unused."""
    rows = connection.execute("SELECT id, position, num_bytes FROM images WHERE segment = ?", (segment,)).fetchall()
    for image, position, num_bytes in rows:
        location = blob_log.append(blob_log.read(BlobLocation(segment, position), num_bytes))
        connection.execute(
            "UPDATE images SET segment = ?, position = ? WHERE id = ?", (location.segment, location.position, image)
        )
        _add_to_segment(connection, location, num_bytes)
    connection.execute("UPDATE segments SET live_bytes = 0 WHERE number = ?", (segment,))


def totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the number of stored screenshots and their total size in bytes, read from a covering index."""
    num_images, num_bytes = connection.execute(
        "SELECT count(*), coalesce(sum(num_bytes), 0) FROM images INDEXED BY images_by_hash"
    ).fetchone()
    return num_images, num_bytes


def _find(connection: sqlite3.Connection, value: bytes) -> int | None:
    row = connection.execute("SELECT id FROM images WHERE hash = ?", (value,)).fetchone()
    return None if row is None else int(row[0])


def _insert(connection: sqlite3.Connection, blob_log: BlobLog, image: ReceivedImage) -> int:
    location = blob_log.append(image.data)
    _add_to_segment(connection, location, len(image.data))
    row = connection.execute(
        "INSERT INTO images (hash, num_bytes, segment, position) VALUES (?, ?, ?, ?) RETURNING id",
        (image.hash, len(image.data), location.segment, location.position),
    ).fetchone()
    return int(row[0])


def _add_to_segment(connection: sqlite3.Connection, location: BlobLocation, num_bytes: int) -> None:
    """Record that a segment ends after the bytes at `location`, and that these are in use."""
    connection.execute(
        "INSERT INTO segments VALUES (?1, ?2 + ?3, ?3)"
        " ON CONFLICT DO UPDATE SET num_bytes = ?2 + ?3, live_bytes = live_bytes + ?3",
        (location.segment, location.position, num_bytes),
    )


def _read(connection: sqlite3.Connection, blob_log: BlobLogReader, value: bytes) -> bytes:
    statement = "SELECT segment, position, num_bytes FROM images WHERE hash = ?"
    stale = None
    while (row := connection.execute(statement, (value,)).fetchone()) not in (None, stale):
        try:
            return blob_log.read(BlobLocation(row[0], row[1]), row[2])
        except FileNotFoundError:  # moved or deleted since the row was read: read the row again
            stale = row
    raise NotFoundError(f"screenshot {value.hex()} is not stored")


def _use(connection: sqlite3.Connection, rollout: int, image: int) -> None:
    connection.execute("INSERT OR IGNORE INTO image_uses VALUES (?, ?)", (rollout, image))
