"""Replica watcher: polls for replicas that joined, left or restarted while the learner trains.

The actor polls the same directory service from its event loop; the learner is synchronous and polls from a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_S = 1.0


@contextmanager
def watch_replicas(refresh_members: Callable[[], None], check_for_restarts: Callable[[], None]) -> Iterator[None]:
    """Poll for membership changes and restarted replicas in a background thread while the context is open.

    Args:
        refresh_members: follows replicas that joined or left; called once per poll.
        check_for_restarts: called after it.
    """
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(POLL_S):
            refresh_members()
            check_for_restarts()

    thread = threading.Thread(target=poll, name="watch-replicas", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()  # its channels are closed next
