"""Screenshots: stored once by hash, kept as long as some rollout uses them. Knows rows, not what a screenshot shows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deskrl.replay.refusals import Malformed, NotHeld

HASH_BYTES = 32


@dataclass(frozen=True)
class Received:
    """A screenshot whose bytes were checked against its hash."""

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


def keep(connection: sqlite3.Connection, rollout: int, received: Sequence[Received], named: Iterable[bytes]) -> None:
    """Store what was received and note that the rollout uses it, and what it names.

    Raises:
        Malformed: a named screenshot is not held.
    """
    for image in received:
        _use(connection, rollout, _find(connection, image.hash) or _insert(connection, image))
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
            connection.execute("DELETE FROM images WHERE id = ?", (image,))


def read(connection: sqlite3.Connection, hashes: Sequence[bytes], max_bytes: int) -> list[bytes]:
    """Bytes of the first screenshots of `hashes`: at least one, then as many as fit into `max_bytes`.

    Raises:
        NotHeld: the store lacks one of them.
    """
    found: list[bytes] = []
    num_bytes = 0
    for value in hashes:
        row = connection.execute("SELECT data FROM images WHERE hash = ?", (value,)).fetchone()
        if row is None:
            raise NotHeld(f"screenshot {value.hex()} is not held")
        found.append(row[0])
        num_bytes += len(row[0])
        if num_bytes >= max_bytes:
            break
    return found


def totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """Number of screenshots held, and their bytes; read off the index, not the screenshots."""
    num_images, num_bytes = connection.execute(
        "SELECT count(*), coalesce(sum(num_bytes), 0) FROM images INDEXED BY images_by_hash"
    ).fetchone()
    return num_images, num_bytes


def _find(connection: sqlite3.Connection, value: bytes) -> int | None:
    row = connection.execute("SELECT id FROM images WHERE hash = ?", (value,)).fetchone()
    return None if row is None else int(row[0])


def _insert(connection: sqlite3.Connection, image: Received) -> int:
    row = connection.execute(
        "INSERT INTO images (hash, num_bytes, data) VALUES (?, ?, ?) RETURNING id",
        (image.hash, len(image.data), image.data),
    ).fetchone()
    return int(row[0])


def _use(connection: sqlite3.Connection, rollout: int, image: int) -> None:
    connection.execute("INSERT OR IGNORE INTO image_uses VALUES (?, ?)", (rollout, image))
