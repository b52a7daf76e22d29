"""What is on the screen, read straight from the X server's framebuffer file. Knows no windows and no input.

Xvfb keeps its framebuffer in a memory-mapped XWD file, pointer sprite included, so a screenshot is one memory copy:
no request to the X server, no extension, no encoder.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

from deskrl.actor.guest.activity import anything_runs

_HEADER = struct.Struct(">25I")  # XWDFileHeader, big-endian as Xvfb writes it
_COLOR_BYTES = 12


class Screen:
    """The framebuffer of screen 0, 32 bits a pixel, in memory order blue, green, red, unused."""

    def __init__(self, framebuffer: Path) -> None:
        with open(framebuffer, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _HEADER.unpack_from(self._map)
        header_bytes, num_colors = header[0], header[19]
        self.width, self.height = header[4], header[5]
        bits_per_pixel, bytes_per_line = header[11], header[12]
        if (bits_per_pixel, bytes_per_line) != (32, 4 * self.width):
            raise RuntimeError(f"framebuffer of {bits_per_pixel} bits a pixel, {bytes_per_line} bytes a line")
        self._start = header_bytes + num_colors * _COLOR_BYTES
        self._end = self._start + bytes_per_line * self.height

    def grab(self) -> bytes:
        """All pixels as they are now, BGRX, row by row from the top."""
        return self._map[self._start : self._end]

    def settle(self, quiet_s: float, limit_s: float) -> bytes:
        """Wait until no pixel has changed and no program was at work for `quiet_s`, at most `limit_s`; the pixels."""
        poll_s = max(0.005, quiet_s / 8)
        started = quiet_since = time.monotonic()
        last = self.grab()
        while True:
            now = time.monotonic()
            if now - quiet_since >= quiet_s or now - started >= limit_s:
                return last
            time.sleep(min(poll_s, limit_s - (now - started), quiet_s - (now - quiet_since)))
            current = self.grab()
            if current != last or anything_runs():
                last, quiet_since = current, time.monotonic()
