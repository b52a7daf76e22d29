"""Checks of a node's rank, and of the address at which the nodes of a learner meet."""

from __future__ import annotations

from deskrl.core.config import LearnerConfig
from deskrl.core.errors import UserError


def checked_rank(learner: LearnerConfig, node_rank: int | None) -> int:
    """Return the rank of this node; it may be left out if there is only one.

    Raises:
        UserError: it is missing or too large.
    """
    if node_rank is None and learner.num_nodes == 1:
        return 0
    if node_rank is None or node_rank >= learner.num_nodes:
        given = "is missing" if node_rank is None else f"is {node_rank}"
        raise UserError(f"learner.num_nodes = {learner.num_nodes}, but --node-rank {given}", _rank_hint(learner))
    return node_rank


def check_rendezvous(learner: LearnerConfig) -> None:
    """Check that several nodes have an address at which they meet.

    Raises:
        UserError: they have none.
    """
    if learner.num_nodes > 1 and (learner.master_addr is None or learner.master_port == 0):
        raise UserError(
            f"learner.num_nodes = {learner.num_nodes} needs learner.master_addr and learner.master_port",
            "set them to the address of node 0 and to a free port of it, such as 29500",
        )


def _rank_hint(learner: LearnerConfig) -> str:
    if learner.num_nodes == 1:
        return "set learner.num_nodes to the number of machines"
    return f"give each node a rank of its own, from 0 to {learner.num_nodes - 1}"
