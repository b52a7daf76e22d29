"""Whether programs of the desktop are at work. Knows process states, no screen.

On a busy machine an application may not have been given the processor yet when the screen looks quiet: it has not
answered the last input, it has not even begun. Then it waits in the run queue, and that can be seen.
"""

from __future__ import annotations

import os

_AT_WORK = b"RD"  # running or waiting for a processor; waiting for a disk


def anything_runs() -> bool:
    """Whether the main thread of any process of this namespace is at work."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb", buffering=0) as file:
                    stat = file.read(512)
            except OSError:  # it ended meanwhile
                continue
            state = stat.rpartition(b") ")[2][:1]
            if state and state in _AT_WORK:
                return True
    return False
