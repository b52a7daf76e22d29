"""The network between two hosts of a learner (network namespaces) fails, briefly and for good.

The ranks only add up numbers with gloo.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hosts_kit import connected_hosts, hosts_unavailable_reason
from nodes_kit import DEADLINE_S, Nodes

pytestmark = pytest.mark.skipif(bool(hosts_unavailable_reason()), reason=hosts_unavailable_reason())
_OUTAGE_S = 30.0


def test_ranks_go_on_after_a_short_outage_of_the_network_and_end_in_a_long_one(tmp_path: Path) -> None:
    with connected_hosts(2) as hosts:
        _check_outages(Nodes(tmp_path, hosts, node_timeout_s=75))


def _check_outages(nodes: Nodes) -> None:
    both = nodes.start(0), nodes.start(1)
    nodes.await_sums()
    nodes.hosts[1].unplug()
    time.sleep(_OUTAGE_S)
    nodes.hosts[1].plug()
    nodes.await_sums()
    nodes.hosts[1].unplug()
    assert [node.wait(DEADLINE_S) for node in both] == [1, 1]
    assert "node 1 was not heard of for" in nodes.log(0)
    assert "node 0 was not heard of for" in nodes.log(1)
