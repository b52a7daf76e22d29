"""Records that the nodes of a learner keep in the store of their rendezvous: members, verdict and heartbeats."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from deskrl.learner.nodes.node_facts import NodeFacts

HEARTBEAT_S = 2.0
"""Time between two heartbeats of a node, in seconds."""
_MEMBER, _VERDICT, _STATE, _READ = "deskrl/member/{}", "deskrl/verdict", "deskrl/state/{}", "deskrl/read/{}"


class Ending(enum.StrEnum):
    """How the ranks of a node ended."""

    FINISHED = "finished"
    """The training is complete."""
    STOPPED = "stopped"
    """The node was asked to stop."""
    FAILED = "failed"


class NodeStore:
    """Store on node 0. Its methods raise RuntimeError if node 0 cannot be reached.

    Args:
        address: host name or address of node 0.
        port: rendezvous port.
        timeout_s: limit on each call, in seconds.
        is_server: whether this process is node 0's, which holds the records.
    """

    def __init__(self, address: str, port: int, timeout_s: float, *, is_server: bool = False) -> None:
        timeout = timedelta(seconds=timeout_s)
        self.store = TCPStore(address, port, is_master=is_server, timeout=timeout, wait_for_workers=False)

    def join(self, rank: int, facts: NodeFacts) -> NodeFacts:
        """Become the node of this rank, unless there is one; return the facts of the node that has the rank."""
        return NodeFacts.from_json(self.store.compare_set(_MEMBER.format(rank), "", facts.to_json()).decode())

    def member(self, rank: int) -> NodeFacts | None:
        """Return the facts of the node of a rank; None if it has not joined."""
        text = self._read(_MEMBER.format(rank))
        return None if text is None else NodeFacts.from_json(text)

    def write_verdict(self, text: str) -> None:
        """Write what node 0 has decided about the members."""
        self.store.set(_VERDICT, text)

    def read_verdict(self, rank: int) -> str | None:
        """Return the verdict of node 0, and note that this node has read it; None if there is none yet."""
        text = self._read(_VERDICT)
        if text is not None:
            self.store.set(_READ.format(rank), "")
        return text

    def has_read_verdict(self, rank: int) -> bool:
        """Return whether a node has read the verdict."""
        return bool(self.store.check([_READ.format(rank)]))

    def write_state(self, rank: int, state: str) -> None:
        """Write a heartbeat of a node, which differs from the previous one, or its ending."""
        self.store.set(_STATE.format(rank), state)

    def read_state(self, rank: int) -> str | None:
        """Return the last heartbeat of a node or its ending; None before the first."""
        return self._read(_STATE.format(rank))

    def read_states(self, ranks: Sequence[int]) -> Mapping[int, str]:
        """Return the states of several nodes, all of which have written one."""
        values = self.store.multi_get([_STATE.format(rank) for rank in ranks])
        return {rank: value.decode() for rank, value in zip(ranks, values, strict=True)}

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None


def heartbeat_text() -> str:
    """Return a text that differs from that of the previous call, and from those of other processes."""
    return f"alive {os.getpid()} {time.monotonic_ns()}"
