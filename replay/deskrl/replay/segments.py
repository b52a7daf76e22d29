"""Files that hold the screenshots' bytes: appended to, forced to disk before the commit that names them, never changed.

A screenshot is written once here; inside SQLite it would be written twice, into the log and then into the database.
Knows files and positions. What lies where, and what of it is still wanted, are rows (`images`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deskrl.core.errors import UserError

SCREENSHOTS = "screenshots"
"""The folder of the segments, in the store's."""

RESTORE = "restore the replay folder from a copy, or move it away"
"""What helps against bytes that are lost."""

_MAX_SEGMENT_BYTES = 64 * 1024**2
_SEGMENTS_OF_A_STORE = 32


@dataclass(frozen=True)
class Place:
    """Where bytes lie: the number of a segment, and the position of the first byte in it."""

    segment: int
    position: int


class SegmentReader:
    """The segment files of one store, to be read only, by any thread of any process.

    Args:
        folder: the store's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / SCREENSHOTS

    def read(self, place: Place, num_bytes: int) -> bytes:
        """The bytes at a place.

        Raises:
            FileNotFoundError: the segment was removed; what was still wanted of it lies elsewhere by now.
        """
        descriptor = os.open(self._path(place.segment), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, num_bytes, place.position)
        finally:
            os.close(descriptor)

    def check(self, number: int, num_bytes: int) -> None:
        """Raise UserError if a segment is not there, or has fewer bytes than rows speak of."""
        path = self._path(number)
        held_bytes = -1
        with contextlib.suppress(FileNotFoundError):
            held_bytes = path.stat().st_size
        if held_bytes < num_bytes:
            state = "is missing" if held_bytes < 0 else f"was cut short at {held_bytes} of {num_bytes} bytes"
            raise UserError(f"{path} {state}", RESTORE)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.bin"


class Segments(SegmentReader):
    """The same for the one process that holds the store. Writing is for one thread of it."""

    def __init__(self, folder: Path, extents: Mapping[int, int], max_bytes: int) -> None:
        """Take up what the database knows of, and remove files that no commit ever named.

        Args:
            folder: the store's.
            extents: for each segment that rows speak of, the bytes that it must have.
            max_bytes: size of the whole store; a segment is a small part of it, so that space comes back in time.

        Raises:
            UserError: a segment is missing or cut short. All files are left as they are.
        """
        super().__init__(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._segment_bytes = min(_MAX_SEGMENT_BYTES, max_bytes // _SEGMENTS_OF_A_STORE)
        for number, num_bytes in extents.items():
            self.check(number, num_bytes)
        for path in self._folder.iterdir():
            if not (path.stem.isdecimal() and int(path.stem) in extents):
                path.unlink()
        self._number = max(extents, default=0)
        self._descriptor: int | None = None  # of the segment that is written: each process starts one of its own
        self._end = self._committed_end = 0

    def append(self, data: bytes) -> Place:
        """Write bytes after the last ones; they are on disk after `sync`, and theirs for good after `commit`."""
        if self._descriptor is None or self._end >= self._segment_bytes:
            self._begin_segment()
        assert self._descriptor is not None
        place = Place(self._number, self._end)
        view = memoryview(data)
        while view:
            num_written = os.pwrite(self._descriptor, view, self._end + len(data) - len(view))
            view = view[num_written:]
        self._end += len(data)
        return place

    def sync(self) -> None:
        """Force to disk what was appended since the last commit."""
        if self._descriptor is not None and self._end != self._committed_end:
            os.fdatasync(self._descriptor)

    def commit(self) -> None:
        """What was appended is named by committed rows now."""
        self._committed_end = self._end

    def roll_back(self) -> None:
        """No row names what was appended since the last commit: write over it."""
        if self._descriptor is not None:
            self._end = self._committed_end
            os.ftruncate(self._descriptor, self._end)

    def is_written(self, number: int) -> bool:
        """Whether the segment still grows."""
        return self._descriptor is not None and number == self._number

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove segments that no committed row speaks of any more. Whoever reads one keeps it until done."""
        for number in numbers:
            self._path(number).unlink()

    def close(self) -> None:
        """Let go of the file that is written."""
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _begin_segment(self) -> None:
        """Go on in a new file, whose name is on disk before any row names it."""
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = None
        self._number += 1
        self._descriptor = os.open(self._path(self._number), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._end = self._committed_end = 0
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
