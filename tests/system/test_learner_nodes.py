"""A node of a learner on two hosts (network namespaces) dies, and both start again.

The ranks only add up numbers with gloo.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts_kit import connected_hosts, hosts_unavailable_reason
from nodes_kit import DEADLINE_S, Nodes

pytestmark = pytest.mark.skipif(bool(hosts_unavailable_reason()), reason=hosts_unavailable_reason())


def test_a_killed_host_ends_the_other_and_both_start_again(tmp_path: Path) -> None:
    with connected_hosts(2) as hosts:
        _check_deaths(Nodes(tmp_path, hosts))


def _check_deaths(nodes: Nodes) -> None:
    first, second = nodes.start(0), nodes.start(1)
    nodes.await_sums()
    nodes.hosts[1].kill()
    assert first.wait(DEADLINE_S) == 1
    second.wait()
    first, second = nodes.start(0), nodes.start(1)
    nodes.await_sums()
    nodes.hosts[0].kill()
    assert second.wait(DEADLINE_S) == 1
    second = nodes.start(1)  # before node 0 is back
    first = nodes.start(0)
    nodes.await_sums()
    assert nodes.finish(first, second) == [0, 0], nodes.log(0) + nodes.log(1)
    assert set(nodes.sums()) == {"3"}
