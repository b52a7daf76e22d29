"""Rendezvous of the nodes of a learner, for torchrun: each joins once, and all run the same.

Node 0 holds the store at `learner.master_addr` and `learner.master_port`. A node that joins while a previous attempt is
ending, because another node has died, joins the next one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import threading
import time
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public, but not in __all__
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from deskrl.core.addresses import format_address
from deskrl.core.config import LearnerConfig
from deskrl.core.errors import UserError
from deskrl.core.listening import bind_error, listen_error
from deskrl.core.timeouts import WaitFailed, run_in_background, wait_for_result
from deskrl.learner.nodes.network_interface import set_network_interface
from deskrl.learner.nodes.node_facts import Disagreement, NodeFacts, find_disagreement
from deskrl.learner.nodes.node_store import HEARTBEAT_S, Ending, NodeStore, heartbeat_text

_POLL_S = 0.2
_CONNECT_S = 5.0
"""Limit on one attempt to connect to node 0, in seconds."""
_CALL_S = 30.0
"""Limit on one call of the store, in seconds."""
_READ_S = 10.0
"""Time that node 0 leaves others to read why they may not train together, in seconds."""

_log = logging.getLogger(__name__)


class RendezvousFailed(Exception):
    """The nodes have not come together in time; the same command may be started again."""


class NodeRendezvous(RendezvousHandler):
    """Rendezvous of one node.

    Args:
        learner: learner configuration, with `master_addr` and `master_port`.
        rank: rank of this node.
        facts: what this node runs.
    """

    def __init__(self, learner: LearnerConfig, rank: int, facts: NodeFacts) -> None:
        assert learner.master_addr is not None
        self._address, self._port = learner.master_addr, learner.master_port
        self._num_nodes = learner.num_nodes
        self._timeout_s = learner.rendezvous_timeout_s
        self._rank = rank
        self._facts = facts
        self._store: NodeStore | None = None
        self._heartbeat_store: NodeStore | None = None
        self._has_left = threading.Event()

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the other nodes and return the store that the ranks meet at.

        Raises:
            UserError: the port is taken, this node has joined already, or the nodes run different things.
            RendezvousFailed: node 0 is unreachable, or a node has not joined in time.
        """
        deadline_s = time.monotonic() + self._timeout_s
        where = format_address(self._address, self._port)
        _log.info("node %d of %d joins at %s", self._rank, self._num_nodes, where)
        while True:
            try:
                self._store = self._open_store(deadline_s)
                if self._join(self._store, deadline_s):
                    break
            except RuntimeError as error:  # of the store: node 0 has ended
                _log.info("node 0 has ended while this node joined: %s", error)
            self._check_time(deadline_s, f"the previous attempt at {where} has not ended")
            time.sleep(1)
        _log.info("all %d nodes have joined", self._num_nodes)
        set_network_interface(self._address_of_another(self._store), self._port)
        store: Store = PrefixStore("torchrun", self._store.store)
        return RendezvousInfo(store, self._rank, self._num_nodes, RendezvousStoreInfo(self._address, self._port))

    def _address_of_another(self, store: NodeStore) -> str:
        """Return an address of another node; the name of node 0 may stand for a loopback address on node 0 itself."""
        second = store.member(1) if self._rank == 0 else None
        return self._address if second is None or second.address is None else second.address

    def leave(self, ending: Ending) -> None:
        """Report to the other nodes that the ranks of this node have ended."""
        self._has_left.set()
        store = self._heartbeat_store
        if store is not None:
            with contextlib.suppress(RuntimeError, WaitFailed):  # node 0 has ended, or is unreachable
                write = run_in_background(lambda: store.write_state(self._rank, ending.value))
                wait_for_result(write, _CONNECT_S, "telling the other nodes")

    def _open_store(self, deadline_s: float) -> NodeStore:
        """Return the store; node 0 creates it, the others wait until it can be reached."""
        if self._rank == 0:
            self._check_own_address()
            return NodeStore(self._address, self._port, self._timeout_s, is_server=True)
        while True:
            try:
                socket.create_connection((self._address, self._port), _CONNECT_S).close()
                return NodeStore(self._address, self._port, _CALL_S)
            except (OSError, RuntimeError) as error:  # includes socket.gaierror for a name that is unknown yet
                where = format_address(self._address, self._port)
                self._check_time(deadline_s, f"node 0 cannot be reached at {where} ({error})")
            time.sleep(1)

    def _check_own_address(self) -> None:
        """Raise UserError if node 0 cannot listen on the address at which the others expect it."""
        error = bind_error(self._address, self._port)
        if error is None or isinstance(error, socket.gaierror):  # the name of a pod may be published later
            return
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"learner.master_addr = {self._address} is not an address of this machine ({self._facts.host})",
                "give --node-rank 0 to the machine that learner.master_addr names",
            )
        raise listen_error("learner.master_port", self._address, self._port, error)

    def _join(self, store: NodeStore, deadline_s: float) -> bool:
        """Join and wait for the verdict of node 0; return False if the store belongs to an attempt that is ending."""
        member = store.join(self._rank, self._facts)
        if member != self._facts:
            self._check_not_alive(store, member)
            return False
        # A connection of its own: one store answers one call at a time, and torchrun's may take minutes.
        self._heartbeat_store = NodeStore(self._address, self._port, _CALL_S)
        threading.Thread(
            target=self._send_heartbeats, args=(self._heartbeat_store,), name="node-heartbeat", daemon=True
        ).start()
        if self._rank == 0:
            self._judge(store, deadline_s)
        else:
            self._await_verdict(store, deadline_s)
        return True

    def _check_not_alive(self, store: NodeStore, member: NodeFacts) -> None:
        """Raise UserError if another process is the node of this rank, and alive."""
        before = store.read_state(self._rank)
        time.sleep(2 * HEARTBEAT_S)
        if store.read_state(self._rank) != before:
            raise UserError(
                f"node {self._rank} of the learner has joined already, from {member.host}",
                "give each node a --node-rank of its own, from 0 on",
            )

    def _send_heartbeats(self, store: NodeStore) -> None:
        """Write heartbeats until this node leaves or node 0 ends."""
        with contextlib.suppress(RuntimeError):
            while not self._has_left.is_set():
                store.write_state(self._rank, heartbeat_text())
                self._has_left.wait(HEARTBEAT_S)

    def _judge(self, store: NodeStore, deadline_s: float) -> None:
        """Wait for the other nodes and compare each with this one."""
        missing = set(range(1, self._num_nodes))
        joined: list[int] = []
        while missing:
            for rank in sorted(missing):
                facts = store.member(rank)
                if facts is None:
                    continue
                missing.remove(rank)
                joined.append(rank)
                if (disagreement := find_disagreement(self._facts, facts, rank)) is not None:
                    self._refuse(store, joined, disagreement)
            names = ", ".join(map(str, sorted(missing)))
            self._check_time(deadline_s, f"nodes that have not joined: {names}")
            time.sleep(_POLL_S)
        store.write_verdict(self._verdict(None))

    def _refuse(self, store: NodeStore, joined: list[int], disagreement: Disagreement) -> None:
        """Send the disagreement to the nodes that have joined, then raise it as UserError."""
        store.write_verdict(self._verdict(disagreement))
        until_s = time.monotonic() + _READ_S
        while time.monotonic() < until_s and not all(map(store.has_read_verdict, joined)):
            time.sleep(_POLL_S)
        raise UserError(*disagreement)

    def _verdict(self, disagreement: Disagreement | None) -> str:
        return json.dumps({"num_nodes": self._num_nodes, "disagreement": disagreement})

    def _await_verdict(self, store: NodeStore, deadline_s: float) -> None:
        """Wait until node 0 has compared all nodes."""
        while (text := store.read_verdict(self._rank)) is None:
            self._check_time(deadline_s, f"node 0 at {self._address} still waits for other nodes")
            time.sleep(_POLL_S)
        verdict: dict[str, Any] = json.loads(text)
        if verdict["disagreement"] is not None:
            raise UserError(*verdict["disagreement"])
        if verdict["num_nodes"] != self._num_nodes:
            raise UserError(
                f"learner.num_nodes = {self._num_nodes}, but node 0 has {verdict['num_nodes']}",
                "start all nodes with the same configuration",
            )

    def _check_time(self, deadline_s: float, problem: str) -> None:
        if time.monotonic() > deadline_s:
            timeout = f"learner.rendezvous_timeout_s = {self._timeout_s:g}"
            raise RendezvousFailed(f"node {self._rank} of the learner: {problem} within {timeout}")

    # The rest of torchrun's interface: the nodes of an attempt do not change.

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks use this store for their process group."""
        return True

    def get_backend(self) -> str:
        """Return the name of this rendezvous."""
        return "deskrl"

    def is_closed(self) -> bool:
        """Return whether no further node may join."""
        return False

    def set_closed(self) -> None:
        """Have no effect: an attempt ends with the process of node 0."""

    def num_nodes_waiting(self) -> int:
        """Return the number of nodes that wait for the next attempt."""
        return 0

    def get_run_id(self) -> str:
        """Return the name of the rendezvous."""
        return "learner"

    def shutdown(self) -> bool:
        """Have no effect: see `leave`."""
        return True
