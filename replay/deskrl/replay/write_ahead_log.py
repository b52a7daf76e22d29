"""Check of SQLite's write-ahead log for commits that SQLite drops because a frame before them is damaged.

SQLite reads the log up to the first frame whose checksum does not match: after a crash, that is in the transaction that
was being written. All transactions before it were synced to disk and acknowledged. The format is that of
https://sqlite.org/walformat.html.
"""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER = struct.Struct(">8I")
"""Magic number, version, page size, checkpoint number, two salts, two checksums."""
_FRAME_HEADER = struct.Struct(">6I")
"""Page number, size of the database (0 except in the last frame of a commit), two salts, two checksums."""
_NUM_FRAMES_POSITION = 16
"""Position of the number of readable frames in the index of the log, in the byte order of the machine."""


def has_lost_commit(path: Path, page_bytes: int) -> bool:
    """Return whether a damaged frame hides a commit that is followed by a further frame, so that it was acknowledged.

    The last commit of a log is not found: if it is damaged, it looks like one that a crash has interrupted.

    Args:
        path: the log; a connection to its database must have read something, so that SQLite has indexed it, and this
            process must have closed it.
        page_bytes: page size of the database.
    """
    index = path.with_name(path.name.removesuffix("-wal") + "-shm").read_bytes()
    (num_readable,) = struct.unpack_from("=I", index, _NUM_FRAMES_POSITION)
    log = path.read_bytes()
    num_frames = (len(log) - _HEADER.size) // (_FRAME_HEADER.size + page_bytes)
    if num_frames <= num_readable:
        return False
    frames = [
        _FRAME_HEADER.unpack_from(log, _HEADER.size + number * (_FRAME_HEADER.size + page_bytes))
        for number in range(num_frames)
    ]
    # Frames of an earlier use of the file have other salts.
    salts = _HEADER.unpack_from(log)[4:6] if _is_header_intact(log) else frames[0][2:4]
    unread = [size for _, size, *rest in frames[num_readable:] if tuple(rest[:2]) == salts]
    return any(unread[:-1])


def _is_header_intact(log: bytes) -> bool:
    """Return whether the checksum of the log's header matches."""
    magic, *_, sum_0, sum_1 = _HEADER.unpack_from(log)
    words = struct.unpack_from((">" if magic & 1 else "<") + "6I", log)
    checksum_0 = checksum_1 = 0
    for first, second in zip(words[::2], words[1::2], strict=True):
        checksum_0 = (checksum_0 + first + checksum_1) & 0xFFFFFFFF
        checksum_1 = (checksum_1 + second + checksum_0) & 0xFFFFFFFF
    return (checksum_0, checksum_1) == (sum_0, sum_1)
