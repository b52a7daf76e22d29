"""Replicas that join, leave or start again while the learner learns. Knows when to ask, not what is done about it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import grpc

POLL_S = 1.0


@contextmanager
def following_replicas(
    list_joined: Callable[[], Collection[str]],
    set_joined: Callable[[Collection[str]], None],
    look_again: Callable[[], None],
) -> Iterator[None]:
    """Within it, keep telling who has joined, and have those that are there looked at again, from a thread of its own.

    Args:
        list_joined: addresses of all who have joined and not left; where it raises grpc.RpcError, nothing changes.
        set_joined: takes them over.
        look_again: finds out who was started again.
    """
    over = threading.Event()

    def follow() -> None:
        while not over.wait(POLL_S):
            with contextlib.suppress(grpc.RpcError):  # the learner's own calls tell of it
                set_joined(list_joined())
            look_again()

    thread = threading.Thread(target=follow, name="follow-replicas", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()  # its channels are closed next
