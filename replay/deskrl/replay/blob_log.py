"""Blob log: append-only segment files with the bytes of screenshots, synced to disk before the commit that names them.

Each screenshot is written once. Inside SQLite it would be written twice: to the write-ahead log and to the database.
The locations of screenshots, and which are still in use, are recorded in the database (`image_index`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deskrl.core.errors import UserError

BLOB_DIR = "screenshots"
"""Directory of the segments inside the directory of the store."""

RESTORE_HINT = "restore the replay directory from a copy, or move it away to start with an empty store"
"""Hint for damaged or missing bytes."""

_MAX_SEGMENT_BYTES = 64 * 1024**2
_MIN_SEGMENTS_PER_STORE = 32


@dataclass(frozen=True)
class BlobLocation:
    """Number of a segment, and position of the first byte in it."""

    segment: int
    position: int


class BlobLogReader:
    """Read access to the segments of a store, from any thread of any process.

    Args:
        store_dir: directory of the store.
    """

    def __init__(self, store_dir: Path) -> None:
        self._dir = store_dir / BLOB_DIR

    def read(self, location: BlobLocation, num_bytes: int) -> bytes:
        """Return the bytes at a location.

        Raises:
            FileNotFoundError: the segment was removed; its screenshots in use have been moved to another one.
        """
        descriptor = os.open(self._path(location.segment), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, num_bytes, location.position)
        finally:
            os.close(descriptor)

    def holds(self, number: int, num_bytes: int) -> bool:
        """Return whether a segment exists and has at least `num_bytes` bytes."""
        try:
            return self._path(number).stat().st_size >= num_bytes
        except FileNotFoundError:
            return False

    def check(self, number: int, num_bytes: int) -> None:
        """Raise UserError if a segment is missing or has fewer than `num_bytes` bytes."""
        path = self._path(number)
        actual_bytes = -1
        with contextlib.suppress(FileNotFoundError):
            actual_bytes = path.stat().st_size
        if actual_bytes < num_bytes:
            problem = "not found" if actual_bytes < 0 else f"truncated at {actual_bytes} of {num_bytes} bytes"
            raise UserError(f"{path}: {problem}", RESTORE_HINT)

    def _path(self, number: int) -> Path:
        return self._dir / f"{number:08d}.bin"


class BlobLog(BlobLogReader):
    """Read and write access for the process that holds the store. Only one thread may write."""

    def __init__(self, store_dir: Path, segment_sizes: Mapping[int, int], max_bytes: int) -> None:
        """Open the segments that the database names, and remove all others.

        Args:
            store_dir: directory of the store.
            segment_sizes: size in bytes that each segment must at least have, keyed by segment number.
            max_bytes: maximum size of the whole store. A segment is a small part of it, so that space is freed early.

        Raises:
            UserError: a segment is missing or truncated. No file is changed.
        """
        super().__init__(store_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._segment_bytes = min(_MAX_SEGMENT_BYTES, max_bytes // _MIN_SEGMENTS_PER_STORE)
        for number, num_bytes in segment_sizes.items():
            self.check(number, num_bytes)
        for path in self._dir.iterdir():
            if not (path.stem.isdecimal() and int(path.stem) in segment_sizes):
                path.unlink()
        self._number = max(segment_sizes, default=0)
        self._descriptor: int | None = None  # of the open segment; each process starts a new one
        self._open_path = ""
        self._end = self._committed_end = 0

    def append(self, data: bytes) -> BlobLocation:
        """Append bytes. They are on disk after `sync`, and are kept after `commit`."""
        is_first = self._end == self._committed_end  # of a transaction
        if self._descriptor is None or self._end >= self._segment_bytes or (is_first and self._is_removed()):
            self._open_segment()
        assert self._descriptor is not None
        location = BlobLocation(self._number, self._end)
        view = memoryview(data)
        while view:
            num_written = os.pwrite(self._descriptor, view, self._end + len(data) - len(view))
            view = view[num_written:]
        self._end += len(data)
        return location

    def sync(self) -> None:
        """Force to disk everything appended since the last commit."""
        if self._descriptor is not None and self._end != self._committed_end:
            os.fdatasync(self._descriptor)

    def commit(self) -> None:
        """Keep everything appended so far: committed rows name it."""
        self._committed_end = self._end

    def roll_back(self) -> None:
        """Discard everything appended since the last commit."""
        if self._descriptor is not None:
            self._end = self._committed_end
            os.ftruncate(self._descriptor, self._end)

    def is_open_segment(self, number: int) -> bool:
        """Return whether bytes are still appended to this segment."""
        return self._descriptor is not None and number == self._number

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove segments that no committed row names. Readers that have one open can still read it."""
        for number in numbers:
            self._path(number).unlink(missing_ok=True)  # it may have been deleted by someone else

    def close(self) -> None:
        """Close the open segment."""
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _is_removed(self) -> bool:
        """Return whether someone else has removed or replaced the open segment: what is written to it is lost."""
        assert self._descriptor is not None
        try:
            return not os.path.samestat(os.fstat(self._descriptor), os.stat(self._open_path))
        except FileNotFoundError:
            return True

    def _open_segment(self) -> None:
        """Start a new segment, whose directory entry is on disk before any row names it."""
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = None
        self._dir.mkdir(parents=True, exist_ok=True)  # someone else may have deleted it
        self._number += 1
        self._open_path = str(self._path(self._number))
        self._descriptor = os.open(self._open_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._end = self._committed_end = 0
        directory = os.open(self._dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
