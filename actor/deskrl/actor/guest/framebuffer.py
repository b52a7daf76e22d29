"""Screen contents, read directly from the X server's framebuffer file.

Xvfb keeps its framebuffer, including the pointer, in a memory-mapped XWD file. A screenshot is therefore one memory
copy without a request to the X server and without an encoder.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

from deskrl.actor.guest.process_activity import is_any_process_active

_HEADER = struct.Struct(">25I")  # XWDFileHeader, big-endian as Xvfb writes it
_COLOUR_BYTES = 12
_MIN_POLL_S = 0.005


class Framebuffer:
    """Framebuffer of screen 0: 32 bits per pixel, bytes in the order blue, green, red, unused.

    Args:
        path: XWD file of the X server.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header = _HEADER.unpack_from(content)
        header_bytes, num_colours = header[0], header[19]
        self.width, self.height = header[4], header[5]
        bits_per_pixel, bytes_per_line = header[11], header[12]
        if (bits_per_pixel, bytes_per_line) != (32, 4 * self.width):
            raise RuntimeError(
                f"unsupported framebuffer: {bits_per_pixel} bits per pixel, {bytes_per_line} bytes per line"
            )
        start = header_bytes + num_colours * _COLOUR_BYTES
        self._pixels = content[start : start + bytes_per_line * self.height]

    def grab(self) -> bytes:
        """Return the current pixels as BGRX, row by row from the top."""
        return self._pixels.tobytes()

    def settle(self, quiet_s: float, limit_s: float) -> bytes:
        """Wait until the screen has settled and return its pixels.

        Args:
            quiet_s: time in seconds during which no pixel changes and no process is active.
            limit_s: maximum time to wait in seconds.
        """
        poll_s = max(_MIN_POLL_S, quiet_s / 4)
        started = quiet_since = time.monotonic()
        last: bytes | None = self.grab()
        while True:
            now = time.monotonic()
            if last is not None and now - quiet_since >= quiet_s:
                return last
            if now - started >= limit_s:
                return self.grab()
            time.sleep(min(poll_s, limit_s - (now - started)))
            if is_any_process_active():
                last = None  # pixels are copied and compared only when nothing draws: that costs more than this check
            elif last is None or not last.startswith(self._pixels):  # which compares without a copy
                last, quiet_since = self.grab(), time.monotonic()
