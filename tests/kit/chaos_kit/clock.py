"""Wall clocks of single processes, that jump when they are told to. Knows the library that shifts them (clock_shift.c).

Every process of a machine has the same clock, and setting that takes its administrator; so the processes of a job are
started with a library before the C library's own, which adds to what the kernel says of the time of day.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock_shift.c")


def why_no_clock() -> str:
    """Why no clock can jump on this machine; empty if it can."""
    return "gcc is not installed" if shutil.which("gcc") is None else ""


class Clock:
    """The clock of the processes that are started with `environment`.

    Args:
        folder: of this clock's files.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._library, self._shift = folder / "shift.so", folder / "shift_s"
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", self._library, _SOURCE], check=True)
        self._shift.write_bytes(struct.pack("=q", 0))

    @property
    def environment(self) -> dict[str, str]:
        """What a process sees to be under this clock."""
        return {"LD_PRELOAD": str(self._library), "CLOCK_SHIFT": str(self._shift)}

    def shift(self, shift_s: int) -> None:
        """Be so many seconds ahead of the machine's clock from now on."""
        with open(self._shift, "r+b") as file:
            file.write(struct.pack("=q", shift_s))
