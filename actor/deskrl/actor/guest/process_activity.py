"""Activity of the desktop's processes, used to decide whether the screen has settled.

On a busy machine an application may not have been scheduled yet when the screen already looks quiet. Such an
application is in the run queue, which its process state shows.
"""

from __future__ import annotations

import os

_ACTIVE_STATES = b"RD"  # running or waiting for a processor; waiting for a disk


def is_any_process_active() -> bool:
    """Return whether the main thread of any process in this process namespace is running or waiting for a disk."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb", buffering=0) as file:
                    stat = file.read(512)
            except OSError:  # the process has ended
                continue
            state = stat.rpartition(b") ")[2][:1]
            if state and state in _ACTIVE_STATES:
                return True
    return False
