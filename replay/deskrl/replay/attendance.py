"""Who calls the service, and when each was last heard of. Knows names and the clock; nothing of what they want."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from deskrl.proto.v1 import common_pb2, replay_pb2

_FORGOTTEN_AFTER_S = 3600.0


@dataclass
class _Caller:
    peer: common_pb2.Peer
    first_s: float
    last_s: float


class Attendance:
    """Actors and learners as they were heard of."""

    def __init__(self) -> None:
        self._callers: dict[str, _Caller] = {}

    def note(self, peer: common_pb2.Peer) -> None:
        """It was heard of just now."""
        now_s = time.monotonic()
        self._callers.setdefault(peer.name, _Caller(peer, now_s, now_s)).last_s = now_s

    @contextlib.contextmanager
    def present(self, peer: common_pb2.Peer) -> Iterator[None]:
        """It is heard of as long as it waits for an answer."""
        self.note(peer)
        try:
            yield
        finally:
            self.note(peer)

    def peers(self) -> list[replay_pb2.PeerStatus]:
        """Whoever was heard of within the last hour."""
        now_s = time.monotonic()
        self._callers = {k: caller for k, caller in self._callers.items() if now_s - caller.last_s < _FORGOTTEN_AFTER_S}
        return [
            replay_pb2.PeerStatus(peer=it.peer, known_for_s=now_s - it.first_s, silent_s=now_s - it.last_s)
            for it in self._callers.values()
        ]

    def num_actors(self, within_s: float) -> int:
        """Actors heard of within so many seconds."""
        return sum(it.peer.role == "actor" and it.silent_s < within_s for it in self.peers())
