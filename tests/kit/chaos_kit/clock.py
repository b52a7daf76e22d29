"""Wall clocks of single processes that can be shifted, by a preloaded library (clock_shift.c).

The system clock is shared by all processes and only root may set it. The library is therefore loaded before the C
library and adds an offset to the time of day that the kernel returns.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock_shift.c")


def clock_unavailable_reason() -> str:
    """Return why clocks cannot be shifted on this machine; empty if they can."""
    return "gcc is not installed" if shutil.which("gcc") is None else ""


class Clock:
    """Wall clock of the processes that are started with `environment`.

    Args:
        folder: folder for the files of the clock.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._library, self._shift = folder / "shift.so", folder / "shift_s"
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", self._library, _SOURCE], check=True)
        self._shift.write_bytes(struct.pack("=q", 0))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process uses this clock."""
        return {"LD_PRELOAD": str(self._library), "CLOCK_SHIFT": str(self._shift)}

    def shift(self, shift_s: int) -> None:
        """Set the offset from the system clock in seconds."""
        with open(self._shift, "r+b") as file:
            file.write(struct.pack("=q", shift_s))
