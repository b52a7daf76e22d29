"""Registry of the actors and learners that call the replay service, with the time of their last call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from deskrl.proto.v1 import common_pb2, replay_pb2

_FORGET_AFTER_S = 3600.0
_MAX_ERROR_CHARACTERS = 300


@dataclass
class _Entry:
    peer: common_pb2.Peer
    first_call_s: float
    last_call_s: float
    num_desktops_set_aside: int = 0
    start_error: str = ""


class PeerRegistry:
    """Peers that called within the last hour."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def record_call(self, peer: common_pb2.Peer) -> None:
        """Record that a peer called just now."""
        now_s = time.monotonic()
        entry = self._entries.get(peer.name)
        if entry is None:
            kept = common_pb2.Peer()
            kept.CopyFrom(peer)  # a part of a request would keep the whole request in memory
            entry = self._entries[peer.name] = _Entry(kept, now_s, now_s)
        entry.last_call_s = now_s

    def record_desktops(self, peer: common_pb2.Peer, num_set_aside: int, start_error: str) -> None:
        """Record how many of an actor's desktops do not start, and why the last one did not."""
        self.record_call(peer)
        entry = self._entries[peer.name]
        entry.num_desktops_set_aside, entry.start_error = num_set_aside, start_error[:_MAX_ERROR_CHARACTERS]

    @contextlib.contextmanager
    def record_waiting(self, peer: common_pb2.Peer) -> Iterator[None]:
        """Record a call at its start and at its end, for calls that may wait long."""
        self.record_call(peer)
        try:
            yield
        finally:
            self.record_call(peer)

    def list_peers(self) -> list[replay_pb2.PeerStatus]:
        """Return all peers that called within the last hour, and forget the others."""
        now_s = time.monotonic()
        self._entries = {k: entry for k, entry in self._entries.items() if now_s - entry.last_call_s < _FORGET_AFTER_S}
        return [
            replay_pb2.PeerStatus(
                peer=entry.peer,
                known_for_s=now_s - entry.first_call_s,
                silent_s=now_s - entry.last_call_s,
                num_desktops_set_aside=entry.num_desktops_set_aside,
                start_error=entry.start_error,
            )
            for entry in self._entries.values()
        ]

    def num_actors(self, within_s: float) -> int:
        """Return the number of actors that called within the last `within_s` seconds."""
        return sum(it.peer.role == "actor" and it.silent_s < within_s for it in self.list_peers())
