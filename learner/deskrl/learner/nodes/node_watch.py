"""Ends this rank when another node of the learner has ended, or is not heard of for `learner.node_timeout_s`.

A rank that waits for a lost node in a collective call would otherwise wait until PyTorch's timeout, which has to be
longer than the longest time that ranks wait for episodes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from deskrl.core.process_lifecycle import StopEvent
from deskrl.core.timeouts import WaitFailed, run_in_background, wait_for_result
from deskrl.learner.nodes.node_store import HEARTBEAT_S, Ending, NodeStore

_FAILED = 1

_log = logging.getLogger(__name__)


@dataclass
class _LastHeartbeat:
    """Last state of a node that was read."""

    state: str
    changed_s: float
    """Monotonic time at which it was first read."""


class NodeHeartbeats:
    """Heartbeats of the other nodes, as this rank has read them.

    Args:
        timeout_s: time after which a node counts as dead, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._last: dict[int, _LastHeartbeat] = {}

    def add(self, states: Mapping[int, str], now_s: float) -> None:
        """Add the states of nodes, read at a monotonic time in seconds."""
        for rank, state in states.items():
            last = self._last.get(rank)
            if last is None or last.state != state:
                self._last[rank] = _LastHeartbeat(state, now_s)

    def find_loss(self, now_s: float, *, is_stopping: bool) -> str | None:
        """Return which node is lost, for the log; None if none is.

        Args:
            now_s: monotonic time in seconds.
            is_stopping: whether this rank was asked to stop too. A node that has stopped before it is then not lost:
                this rank may still write a checkpoint.
        """
        for rank, last in self._last.items():
            silent_s = now_s - last.changed_s
            if last.state == Ending.FAILED:
                return f"node {rank} has failed"
            # This rank may still write the checkpoint that the ranks of the stopped node have completed.
            if last.state == Ending.STOPPED and silent_s > self._timeout_s and not is_stopping:
                return f"node {rank} was stopped {silent_s:.0f} s ago"
            if last.state not in tuple(Ending) and silent_s > self._timeout_s:
                return f"node {rank} was not heard of for {silent_s:.0f} s"
        return None


def watch_nodes(timeout_s: float, stop: StopEvent) -> None:
    """Start the thread that ends this rank when another node is lost; has no effect on a learner of one node.

    Args:
        timeout_s: time after which a node counts as dead, in seconds.
        stop: event that asks this rank to stop.
    """
    num_nodes, own = int(os.environ.get("GROUP_WORLD_SIZE", "1")), int(os.environ.get("GROUP_RANK", "0"))
    if num_nodes == 1:
        return
    others = [rank for rank in range(num_nodes) if rank != own]
    threading.Thread(target=_watch, args=(others, timeout_s, stop), name="node-watch", daemon=True).start()


def _watch(others: list[int], timeout_s: float, stop: StopEvent) -> None:
    loss = _await_loss(others, timeout_s, stop)
    _log.error("%s: this rank ends too, and resumes from the newest checkpoint when it is started again", loss)
    os._exit(_FAILED)  # the main thread may wait for the lost node


def _await_loss(others: list[int], timeout_s: float, stop: StopEvent) -> str:
    """Return which node is lost, once one is."""
    heartbeats = NodeHeartbeats(timeout_s)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = NodeStore(address, port, timeout_s)
        while True:
            states = wait_for_result(run_in_background(lambda: store.read_states(others)), timeout_s, "node 0")
            now_s = time.monotonic()
            heartbeats.add(states, now_s)
            if (loss := heartbeats.find_loss(now_s, is_stopping=stop.is_set())) is not None:
                return loss
            time.sleep(HEARTBEAT_S)
    except WaitFailed:
        return f"node 0 was not heard of for {timeout_s:.0f} s"
    except RuntimeError:  # of the store
        return "node 0 has ended"
