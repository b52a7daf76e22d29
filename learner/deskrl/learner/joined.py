"""Replicas that join and leave while the learner learns. Knows a list of addresses, and what is to be done about it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import grpc

from deskrl.core.lifetime import StopEvent

POLL_S = 1.0


def follow_joined(
    list_joined: Callable[[], Collection[str]], set_joined: Callable[[Collection[str]], None], stop: StopEvent
) -> None:
    """Keep telling `set_joined` who has joined, from a thread of its own.

    Args:
        list_joined: addresses of all who have joined and not left; where it raises grpc.RpcError, nothing changes.
        set_joined: takes them over.
        stop: ends it.
    """

    def follow() -> None:
        while not stop.wait(POLL_S):
            try:
                addresses = list_joined()
            except grpc.RpcError:
                continue  # the learner's own calls tell of it
            set_joined(addresses)

    threading.Thread(target=follow, name="follow-joined", daemon=True).start()
