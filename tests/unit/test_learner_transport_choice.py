"""Transport choice: the fastest possible transfer is used, and a requested one that is not possible is an error."""

from __future__ import annotations

import pytest

from deskrl.core.errors import UserError
from deskrl.learner.weights.transport_choice import Endpoint, choose_transfer

LEARNER = Endpoint("here", ["gpu-0"])
SHARING = Endpoint("here", ["gpu-0"])
BESIDE = Endpoint("here", ["gpu-1"])
ELSEWHERE = Endpoint("there", ["gpu-9", "gpu-10"])
NO_GPU = Endpoint("here", [])


@pytest.mark.parametrize(
    ("learner", "replica", "expected"),
    [
        (LEARNER, SHARING, "ipc"),
        (LEARNER, BESIDE, "nccl"),
        (LEARNER, ELSEWHERE, "nccl"),
        (LEARNER, NO_GPU, "stream"),
        (NO_GPU, BESIDE, "stream"),
        (Endpoint("here", ["gpu-0"], has_nccl=False), BESIDE, "stream"),
        (LEARNER, Endpoint("here", ["gpu-0", "gpu-1"]), "stream"),
    ],
)
def test_auto_selects_the_fastest_possible_transfer(learner: Endpoint, replica: Endpoint, expected: str) -> None:
    assert choose_transfer("auto", learner, replica) == expected


def test_a_stream_is_always_possible() -> None:
    assert choose_transfer("stream", LEARNER, SHARING) == "stream"


@pytest.mark.parametrize(
    ("requested", "learner", "replica", "reason"),
    [
        ("ipc", LEARNER, BESIDE, "do not share one GPU"),
        ("ipc", LEARNER, Endpoint("there", ["gpu-0"]), "do not share one GPU"),
        ("nccl", LEARNER, SHARING, "share a GPU"),
        ("nccl", NO_GPU, BESIDE, "the learner has no GPU"),
        ("ipc", LEARNER, NO_GPU, "the replica has no GPU"),
        (
            "nccl",
            Endpoint("here", ["gpu-0"], has_nccl=False),
            BESIDE,
            "vllm, which provides the NCCL binding, is not installed",
        ),
    ],
)
def test_a_requested_transfer_that_is_not_possible_is_an_error(
    requested: str, learner: Endpoint, replica: Endpoint, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        choose_transfer(requested, learner, replica)
