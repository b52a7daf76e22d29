"""Difference of a frame from an earlier one, as ranges of rows, so that only changed rows are sent to the actor.

Most actions change a small part of the screen: sending 3.7 MB of unchanged pixels costs more than finding that out.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from itertools import count, pairwise
from typing import NamedTuple

Rows = Sequence[tuple[int, int]]
"""Ranges of rows from the top, each with the first row and the one after the last."""

_MAX_RANGES = 64
"""Bounds the length of the header; further ranges are merged with their neighbours."""


class FrameReply(NamedTuple):
    """What is sent of a frame."""

    frame_id: str
    rows: Rows | None
    """Rows of `data`, which replace those of the frame that the client has; None: `data` is the whole frame."""
    data: bytes


class FrameSender:
    """Remembers the last frame that was sent, and reduces the next one to its changed rows. Thread-safe.

    Args:
        row_bytes: bytes of a row of pixels.
    """

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._prefix = secrets.token_hex(8)  # frames of another guest process are never taken for frames of this one
        self._numbers = count()
        self._lock = threading.Lock()
        self._frame_id, self._pixels = "", b""

    def reply(self, pixels: bytes, known_frame_id: str) -> FrameReply:
        """Return what to send of a frame to a client that has the frame `known_frame_id`."""
        with self._lock:
            before = self._pixels if known_frame_id and known_frame_id == self._frame_id else None
            self._frame_id, self._pixels = f"{self._prefix}-{next(self._numbers)}", pixels
            frame_id = self._frame_id
        if before is None:
            return FrameReply(frame_id, None, pixels)
        rows = changed_rows(before, pixels, self._row_bytes)
        data = b"".join(pixels[first * self._row_bytes : end * self._row_bytes] for first, end in rows)
        return FrameReply(frame_id, rows, data)


def changed_rows(before: bytes, after: bytes, row_bytes: int) -> Rows:
    """Return the ranges of rows in which two frames of the same size differ."""
    ranges: list[tuple[int, int]] = []
    pixels = memoryview(after)
    for row, start in enumerate(range(0, len(after), row_bytes)):
        if before.startswith(pixels[start : start + row_bytes], start):  # which compares without a copy
            continue
        if ranges and (ranges[-1][1] == row or len(ranges) == _MAX_RANGES):
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return ranges


def replace_rows(frame: bytearray, rows: Rows, data: bytes, row_bytes: int) -> None:
    """Write changed rows into a frame.

    Raises:
        ValueError: the ranges are not ascending, are not rows of the frame, or do not have the size of `data`.
    """
    limits = [0, *(row for pair in rows for row in pair), len(frame) // row_bytes]
    if any(first > second for first, second in pairwise(limits)):
        raise ValueError("the ranges of rows are not ascending rows of the frame")
    if len(data) != sum(end - first for first, end in rows) * row_bytes:
        raise ValueError("the data does not have the size of its rows")
    start = 0
    for first, end in rows:
        length = (end - first) * row_bytes
        frame[first * row_bytes : end * row_bytes] = data[start : start + length]
        start += length


def format_rows(rows: Rows) -> str:
    """Return ranges as text, such as `0-5,7-8`."""
    return ",".join(f"{first}-{end}" for first, end in rows)


def parse_rows(text: str) -> Rows:
    """Return the ranges of `format_rows`; raises ValueError for other text."""
    if len(text) > 20 * _MAX_RANGES:
        raise ValueError("too many ranges of rows")
    pairs = [part.split("-") for part in text.split(",")] if text else []
    if not all(len(pair) == 2 and all(number.isascii() and number.isdigit() for number in pair) for pair in pairs):
        raise ValueError(f"not ranges of rows: {text[:40]!r}")
    return [(int(first), int(end)) for first, end in pairs]
