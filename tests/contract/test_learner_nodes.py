"""The rendezvous of a learner's nodes: each joins once, and each gets the reason if they cannot train together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from ports_kit import free_port

from deskrl.core.config import LearnerConfig
from deskrl.core.errors import UserError
from deskrl.learner.nodes.network_interface import set_network_interface
from deskrl.learner.nodes.node_facts import NodeFacts
from deskrl.learner.nodes.node_rendezvous import NodeRendezvous, RendezvousFailed
from deskrl.learner.nodes.node_store import HEARTBEAT_S, Ending, NodeStore

FACTS = NodeFacts("host", {"deskrl": "1"}, {"seed": "0"}, "model", "run", 0, "127.0.0.1")
_DEADLINE_S = 60.0


class Nodes:
    """Nodes that join in threads of this process.

    Args:
        settings: keys of the section `learner`.
    """

    def __init__(self, **settings: Any) -> None:
        place = {"num_nodes": 2, "master_addr": "127.0.0.1", "master_port": free_port()}
        self.learner = LearnerConfig.model_validate({**place, "rendezvous_timeout_s": _DEADLINE_S, **settings})
        self._threads = ThreadPoolExecutor()
        self._joined: list[NodeRendezvous] = []

    def join(self, rank: int, **differences: Any) -> Future[Any]:
        """Start a node whose facts differ from those of the others."""
        facts = replace(FACTS, host=f"host-{rank}", process=f"{rank} {time.monotonic_ns()}", **differences)
        node = NodeRendezvous(self.learner, rank, facts)
        self._joined.append(node)
        return self._threads.submit(node.next_rendezvous)

    def store(self) -> NodeStore:
        """Return the store, once node 0 has opened it."""
        deadline_s = time.monotonic() + _DEADLINE_S
        while time.monotonic() < deadline_s:
            try:
                socket.create_connection(("127.0.0.1", self.learner.master_port)).close()
                return NodeStore("127.0.0.1", self.learner.master_port, _DEADLINE_S)
            except OSError:
                time.sleep(0.05)
        raise AssertionError("node 0 does not listen")

    def close(self) -> None:
        for node in self._joined:
            node.leave(Ending.FINISHED)
        self._threads.shutdown()


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that the rendezvous sets after each test."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


def error_of(joining: Future[Any]) -> str:
    error = joining.exception(_DEADLINE_S)
    assert isinstance(error, UserError | RendezvousFailed), error
    return str(error)


def test_nodes_join_in_any_order_and_get_one_store(nodes: Nodes) -> None:
    second, first = nodes.join(1), nodes.join(0)
    for rank, joining in enumerate((first, second)):
        info = joining.result(_DEADLINE_S)
        assert (info.rank, info.world_size) == (rank, 2)
        assert info.bootstrap_store_info.master_port == nodes.learner.master_port
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    first.result().store.set("key", "value")
    assert second.result().store.get("key") == b"value"


def test_all_nodes_are_told_what_differs(nodes: Nodes) -> None:
    expected = "node 1 of the learner (host-1) has deskrl 2, node 0 (host-0) has 1 (hint: install the same version"
    for joining in (nodes.join(0), nodes.join(1, versions={"deskrl": "2"})):
        assert expected in error_of(joining)


def test_a_node_that_expects_another_number_of_nodes_is_rejected(nodes: Nodes) -> None:
    first, second = nodes.join(0), nodes.join(1)
    assert first.result(_DEADLINE_S) and second.result(_DEADLINE_S)
    nodes.learner = nodes.learner.model_copy(update={"num_nodes": 3})
    assert "learner.num_nodes = 3, but node 0 has 2" in error_of(nodes.join(2))


def test_a_node_that_joins_twice_is_rejected_and_the_first_one_stays(nodes: Nodes) -> None:
    first, second = nodes.join(0), nodes.join(1)
    assert first.result(_DEADLINE_S) and second.result(_DEADLINE_S)
    assert "node 1 of the learner has joined already, from host-1" in error_of(nodes.join(1))
    state = nodes.store().read_state(1)
    assert state is not None and state.startswith("alive")


def test_node_0_is_rejected_where_another_process_has_its_port(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", nodes.learner.master_port)):
        error = error_of(nodes.join(0))
    assert "learner.master_port: cannot listen on 127.0.0.1:" in error
    assert "Address already in use (hint: set learner.master_port to a free port)" in error


def test_node_0_is_rejected_on_a_machine_without_the_address_of_the_rendezvous() -> None:
    nodes = Nodes(master_addr="192.0.2.1")  # reserved for documentation (RFC 5737)
    assert "learner.master_addr = 192.0.2.1 is not an address of this machine (host-0)" in error_of(nodes.join(0))


def test_the_wait_for_other_nodes_is_bounded() -> None:
    nodes = Nodes(rendezvous_timeout_s=1, num_nodes=3)
    unreachable = error_of(nodes.join(1))
    assert "node 1 of the learner: node 0 cannot be reached at 127.0.0.1:" in unreachable
    assert "within learner.rendezvous_timeout_s = 1" in unreachable
    assert "nodes that have not joined: 1, 2 within" in error_of(nodes.join(0))


def test_a_node_that_starts_again_waits_until_the_attempt_has_ended_in_which_it_died(nodes: Nodes) -> None:
    attempt = NodeStore("127.0.0.1", nodes.learner.master_port, _DEADLINE_S, is_server=True)
    attempt.join(1, FACTS)  # it is dead: it gives no heartbeat
    again = nodes.join(1)
    time.sleep(3 * HEARTBEAT_S)
    assert not again.done()
    del attempt
    first = nodes.join(0)
    assert first.result(_DEADLINE_S).world_size == again.result(_DEADLINE_S).world_size == 2


def test_ranks_use_the_interface_that_leads_to_another_node_unless_the_environment_names_one() -> None:
    environment = {"NCCL_SOCKET_IFNAME": "ib0"}
    set_network_interface("127.0.0.1", 29500, environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}
    unknown: dict[str, str] = {}
    set_network_interface("no-such-host.invalid", 29500, unknown)
    assert unknown == {}
