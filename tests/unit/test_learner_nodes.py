"""Nodes of a learner: the comparison of what they run, the detection of lost nodes, and the checks of their rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deskrl.core.config import LearnerConfig
from deskrl.core.errors import UserError
from deskrl.learner.nodes.node_facts import NodeFacts, find_disagreement
from deskrl.learner.nodes.node_rank import check_rendezvous, checked_rank
from deskrl.learner.nodes.node_watch import NodeHeartbeats

FIRST = NodeFacts(
    host="alpha",
    versions={"deskrl": "1.0", "torch": "2.13"},
    config={"seed": "0", "learner.zero_stage": "3"},
    model="abc",
    run_id="7",
    num_gpus=4,
)
TWO_NODES = LearnerConfig(num_nodes=2, master_addr="10.0.0.1", master_port=29500)


def test_nodes_that_run_the_same_agree() -> None:
    assert find_disagreement(FIRST, replace(FIRST, host="beta", process="other"), 1) is None


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        ({"versions": {"deskrl": "0.9", "torch": "2.13"}}, "has deskrl 0.9, node 0 (alpha) has 1.0"),
        ({"config": {**FIRST.config, "seed": "1"}}, "has seed = 1, node 0 (alpha) has 0"),
        ({"config": {"seed": "0"}}, "has learner.zero_stage = None, node 0 (alpha) has 3"),
        ({"model": "def"}, "has model def, node 0 (alpha) has abc"),
        ({"run_id": ""}, "has run directory none, node 0 (alpha) has 7"),
        ({"num_gpus": 2}, "has number of GPUs 2, node 0 (alpha) has 4"),
    ],
)
def test_a_difference_is_named_with_both_nodes_and_values(difference: dict[str, Any], expected: str) -> None:
    found = find_disagreement(FIRST, replace(FIRST, host="beta", **difference), 1)
    assert found is not None
    assert found.message == f"node 1 of the learner (beta) {expected}"


def test_a_node_is_lost_when_its_heartbeats_stop_for_the_timeout() -> None:
    heartbeats = NodeHeartbeats(timeout_s=60)
    heartbeats.add({1: "alive 1", 2: "alive 1"}, now_s=0)
    heartbeats.add({1: "alive 2", 2: "alive 1"}, now_s=50)
    assert heartbeats.find_loss(60, is_stopping=False) is None
    assert heartbeats.find_loss(61, is_stopping=False) == "node 2 was not heard of for 61 s"


def test_a_node_that_failed_is_lost_at_once_and_one_that_finished_never() -> None:
    heartbeats = NodeHeartbeats(timeout_s=60)
    heartbeats.add({1: "finished"}, now_s=0)
    assert heartbeats.find_loss(1000, is_stopping=False) is None
    heartbeats.add({2: "failed"}, now_s=1000)
    assert heartbeats.find_loss(1000, is_stopping=True) == "node 2 has failed"


def test_a_stopped_node_leaves_the_others_time_for_their_checkpoint() -> None:
    heartbeats = NodeHeartbeats(timeout_s=60)
    heartbeats.add({1: "stopped"}, now_s=0)
    assert heartbeats.find_loss(60, is_stopping=False) is None
    assert heartbeats.find_loss(61, is_stopping=False) == "node 1 was stopped 61 s ago"
    assert heartbeats.find_loss(61, is_stopping=True) is None, "all nodes are stopped together"


def test_the_only_node_needs_no_rank() -> None:
    assert checked_rank(LearnerConfig(), None) == 0
    assert checked_rank(TWO_NODES, 1) == 1


@pytest.mark.parametrize(
    ("learner", "rank", "expected"),
    [
        (TWO_NODES, None, "--node-rank is missing"),
        (TWO_NODES, 2, "--node-rank is 2 (hint: give each node a rank of its own, from 0 to 1)"),
        (LearnerConfig(), 1, "learner.num_nodes = 1, but --node-rank is 1"),
    ],
)
def test_a_rank_that_no_node_has_is_rejected(learner: LearnerConfig, rank: int | None, expected: str) -> None:
    with pytest.raises(UserError) as error:
        checked_rank(learner, rank)
    assert expected in str(error.value)


@pytest.mark.parametrize("missing", ["master_addr", "master_port"])
def test_several_nodes_need_a_place_to_meet(missing: str) -> None:
    check_rendezvous(TWO_NODES)
    incomplete = TWO_NODES.model_copy(update={missing: LearnerConfig.model_fields[missing].default})
    with pytest.raises(UserError, match=r"needs learner\.master_addr and learner\.master_port"):
        check_rendezvous(incomplete)
