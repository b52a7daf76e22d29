"""Index of screenshots: each is stored once by its hash and kept as long as a rollout uses it.

The rows say where in the blob log the bytes of a screenshot are.
"""

from __future__ import annotations

import errno
import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.replay.blob_log import BlobLocation, BlobLog, BlobLogReader
from deskrl.replay.status_errors import InvalidRequestError, NotFoundError

HASH_BYTES = 32
_LOST = (errno.ENOENT, errno.EIO, errno.EINVAL)
"""Errors of a file that was deleted, of a disk that cannot read it, and of a damaged location."""
_LOCATION = "SELECT segment, position, num_bytes, checksum FROM images WHERE hash = ?"


class ImageNotFoundError(NotFoundError):
    """A screenshot is not stored.

    Args:
        hash_: SHA-256 of the screenshot.
    """

    def __init__(self, hash_: bytes) -> None:
        super().__init__(f"screenshot {hash_.hex()} is not stored")
        self.hash = hash_


class ImagesDamagedError(Exception):
    """Stored screenshots do not match their hashes, or their segment is missing or truncated.

    Args:
        hashes: SHA-256 of the screenshots.
    """

    def __init__(self, hashes: Sequence[bytes]) -> None:
        super().__init__(f"screenshot {hashes[0].hex()} is damaged on disk")
        self.hashes = hashes


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


def find_lost(connection: sqlite3.Connection, blob_log: BlobLogReader, rollouts: Sequence[int]) -> list[bytes]:
    """Return the hashes of the screenshots of some rollouts whose segment is missing or truncated."""
    used = f"id IN (SELECT image FROM image_uses WHERE rollout IN ({','.join('?' * len(rollouts))}))"
    ends = connection.execute(
        f"SELECT segment, max(position + num_bytes) FROM images WHERE {used} GROUP BY segment", tuple(rollouts)
    )
    if all([blob_log.holds(segment, end) for segment, end in ends]):
        return []
    rows = connection.execute(f"SELECT hash, segment, position + num_bytes FROM images WHERE {used}", tuple(rollouts))
    return [value for value, segment, end in rows if not blob_log.holds(segment, end)]


def confirm_damaged(connection: sqlite3.Connection, blob_log: BlobLogReader, hashes: Iterable[bytes]) -> list[bytes]:
    """Return those of these screenshots that are damaged or not stored, and all others of a lost segment.

    Must be called in the writer, where no screenshot is moved in the meantime.
    """
    damaged: set[bytes] = set()
    for value in hashes:
        row = connection.execute(_LOCATION, (value,)).fetchone()
        if row is None:
            damaged.add(value)
        elif _read_intact(blob_log, value, *row) is None:
            damaged.add(value)
            others = connection.execute("SELECT hash, position + num_bytes FROM images WHERE segment = ?", row[:1])
            damaged.update(other for other, end in others if not blob_log.holds(row[0], end))
    return sorted(damaged)


def delete(connection: sqlite3.Connection, value: bytes) -> list[int]:
    """Delete a damaged screenshot, and return the rollouts that used it. If it is sent again, it is stored again."""
    rows = connection.execute("DELETE FROM images WHERE hash = ? RETURNING id, segment, num_bytes", (value,)).fetchall()
    users: list[int] = []
    for image, segment, num_bytes in rows:
        uses = connection.execute("DELETE FROM image_uses WHERE image = ? RETURNING rollout", (image,))
        users += [rollout for (rollout,) in uses.fetchall()]
        connection.execute("UPDATE segments SET live_bytes = live_bytes - ? WHERE number = ?", (num_bytes, segment))
    return users


def release(connection: sqlite3.Connection, rollout: int) -> None:
    """Delete the rollout's uses of screenshots, and the screenshots that no other rollout uses."""
    used = connection.execute("DELETE FROM image_uses WHERE rollout = ? RETURNING image", (rollout,)).fetchall()
    for (image,) in used:
        if connection.execute("SELECT 1 FROM image_uses WHERE image = ? LIMIT 1", (image,)).fetchone() is None:
            deleted = connection.execute(
                "DELETE FROM images WHERE id = ? RETURNING num_bytes, segment", (image,)
            ).fetchone()
            if deleted is not None:  # it is missing if its row was damaged
                connection.execute("UPDATE segments SET live_bytes = live_bytes - ? WHERE number = ?", deleted)


def read(
    connection: sqlite3.Connection, blob_log: BlobLogReader, hashes: Sequence[bytes], max_bytes: int
) -> list[bytes]:
    """Return the bytes of the first screenshots of `hashes`: at least one, then as many as fit into `max_bytes`.

    Must be called outside a transaction, so that a screenshot that is moved in the meantime is found again.

    Raises:
        ImageNotFoundError: a screenshot is not stored.
        ImagesDamagedError: the stored bytes of a screenshot do not match its hash, or are missing.
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
    """Append all screenshots of a segment to the current one, so that the segment becomes unused.

    Damaged ones stay behind, and are found when they are read.
    """
    statement = "SELECT id, hash, position, num_bytes, checksum FROM images WHERE segment = ?"
    for image, value, position, num_bytes, checksum in connection.execute(statement, (segment,)).fetchall():
        data = _read_intact(blob_log, value, segment, position, num_bytes, checksum)
        if data is None:
            continue
        location = blob_log.append(data)
        connection.execute(
            "UPDATE images SET segment = ?, position = ? WHERE id = ?", (location.segment, location.position, image)
        )
        _add_to_segment(connection, location, num_bytes)
    connection.execute("UPDATE segments SET live_bytes = 0 WHERE number = ?", (segment,))


def is_in_use(connection: sqlite3.Connection, segment: int) -> bool:
    """Return whether a segment has a screenshot."""
    return connection.execute("SELECT 1 FROM images WHERE segment = ? LIMIT 1", (segment,)).fetchone() is not None


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
        "INSERT INTO images (hash, num_bytes, segment, position, checksum) VALUES (?, ?, ?, ?, ?) RETURNING id",
        (image.hash, len(image.data), location.segment, location.position, _checksum(image.hash, image.data)),
    ).fetchone()
    return int(row[0])


def _add_to_segment(connection: sqlite3.Connection, location: BlobLocation, num_bytes: int) -> None:
    """Record that a segment ends after the bytes at `location`, and that these are in use."""
    connection.execute(
        "INSERT INTO segments (number, num_bytes, live_bytes) VALUES (?1, ?2 + ?3, ?3)"
        " ON CONFLICT DO UPDATE SET num_bytes = ?2 + ?3, live_bytes = live_bytes + ?3",
        (location.segment, location.position, num_bytes),
    )


def _read(connection: sqlite3.Connection, blob_log: BlobLogReader, value: bytes) -> bytes:
    stale = None
    while (row := connection.execute(_LOCATION, (value,)).fetchone()) not in (None, stale):
        data = _read_intact(blob_log, value, *row)
        if data is not None:
            return data
        stale = row  # possibly moved or deleted since the row was read: read the row again
    if row is not None:
        raise ImagesDamagedError([value])
    raise ImageNotFoundError(value)


def _read_intact(
    blob_log: BlobLogReader, value: bytes, segment: int, position: int, num_bytes: int, checksum: int | None
) -> bytes | None:
    """Return the bytes at a location; None if they are missing or have another hash than `value`."""
    try:
        data = blob_log.read(BlobLocation(segment, position), num_bytes)
    except OSError as error:
        if error.errno in _LOST:
            return None
        raise
    except (TypeError, ValueError, OverflowError, MemoryError):  # the row is damaged
        return None
    # The hash takes thirty times as long. It decides if the row has no checksum, or a damaged one.
    is_intact = checksum == _checksum(value, data) or hashlib.sha256(data).digest() == value
    return data if is_intact and len(data) == num_bytes else None


def _checksum(value: bytes, data: bytes) -> int:
    """Return the checksum of a screenshot with hash `value`."""
    return xxh3_64_intdigest(data, seed=xxh3_64_intdigest(value)) >> 1


def _use(connection: sqlite3.Connection, rollout: int, image: int) -> None:
    connection.execute("INSERT OR IGNORE INTO image_uses VALUES (?, ?)", (rollout, image))
