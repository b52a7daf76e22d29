"""Weights take the fastest way that learner and replica have between them; what is asked for and absent is said."""

from __future__ import annotations

import pytest

from deskrl.core.errors import UserError
from deskrl.learner.weights.negotiation import Side, choose_transfer

LEARNER = Side("here", ["gpu-0"])
SHARING = Side("here", ["gpu-0"])
BESIDE = Side("here", ["gpu-1"])
ELSEWHERE = Side("there", ["gpu-9", "gpu-10"])
NO_GPU = Side("here", [])


@pytest.mark.parametrize(
    ("learner", "replica", "expected"),
    [
        (LEARNER, SHARING, "ipc"),
        (LEARNER, BESIDE, "nccl"),
        (LEARNER, ELSEWHERE, "nccl"),
        (LEARNER, NO_GPU, "stream"),
        (NO_GPU, BESIDE, "stream"),
        (Side("here", ["gpu-0"], has_nccl=False), BESIDE, "stream"),
        (LEARNER, Side("here", ["gpu-0", "gpu-1"]), "stream"),
    ],
)
def test_auto_takes_the_fastest_that_both_have(learner: Side, replica: Side, expected: str) -> None:
    assert choose_transfer("auto", learner, replica) == expected


def test_a_stream_can_always_be_had() -> None:
    assert choose_transfer("stream", LEARNER, SHARING) == "stream"


@pytest.mark.parametrize(
    ("asked", "learner", "replica", "reason"),
    [
        ("ipc", LEARNER, BESIDE, "do not share one GPU"),
        ("ipc", LEARNER, Side("there", ["gpu-0"]), "do not share one GPU"),
        ("nccl", LEARNER, SHARING, "share a GPU"),
        ("nccl", NO_GPU, BESIDE, "the learner has no GPU"),
        ("ipc", LEARNER, NO_GPU, "the replica has no GPU"),
        ("nccl", Side("here", ["gpu-0"], has_nccl=False), BESIDE, "no vllm"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_is_refused(asked: str, learner: Side, replica: Side, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        choose_transfer(asked, learner, replica)
