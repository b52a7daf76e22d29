"""Watchdog: ends the guest server when a part of the desktop has ended that no program of the session can end.

The host decides by the exit status whose doing the end of a desktop is. The guest server therefore ends by SIGKILL if a
part was killed: programs of the session cannot send that signal to it, so the sender was the kernel or the host. Any
other end of a part, such as a crash of the X server, may be the doing of a program, and the exit status is 1.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

_CONSEQUENCE_S = 0.3
"""Time in which the end of one part ends those that depend on it."""
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)


class Part(NamedTuple):
    """Part of the desktop that must not end."""

    pidfd: int
    """Descriptor of the process whose end is the end of the part."""
    status: Callable[[], int]
    """Returns the exit status after the end: negative for a signal."""


def watch(parts: Mapping[str, Part], is_expected: Callable[[str], bool]) -> None:
    """Start a thread that ends this process when a part has ended.

    Args:
        parts: parts by name, each before those that end with it.
        is_expected: whether the end of a part is intended.
    """
    threading.Thread(target=_watch, args=(parts, is_expected), daemon=True).start()


def _watch(parts: Mapping[str, Part], is_expected: Callable[[str], bool]) -> None:
    remaining = dict(parts)
    while remaining:
        _ended(remaining, None)
        # The end of one part may end another one immediately: the first one in the order of `parts` is the cause.
        time.sleep(_CONSEQUENCE_S)
        for name in _ended(remaining, 0):
            part = remaining.pop(name)
            if not is_expected(name):
                _end(name, part.status())


def _ended(parts: Mapping[str, Part], timeout_ms: int | None) -> list[str]:
    """Wait until a part has ended, and return all parts that have."""
    poll = select.poll()
    for part in parts.values():
        poll.register(part.pidfd, select.POLLIN)
    ended = {pidfd for pidfd, _ in poll.poll(timeout_ms)}
    return [name for name, part in parts.items() if part.pidfd in ended]


def _end(name: str, status: int) -> None:
    print(f"{name} ended with status {status}", file=sys.stderr, flush=True)
    if -status in _FROM_OUTSIDE:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)
