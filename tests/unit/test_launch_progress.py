"""Progress of a run as `deskrl up` shows it."""

import time
from typing import Any

from deskrl.core.config import RunConfig
from deskrl.launch.progress import Progress, ProgressMeter
from deskrl.proto.v1 import replay_pb2

STATUS = replay_pb2.GetReplayStatusResponse(
    queues=[
        replay_pb2.QueueStatus(queue="eval/after", num_finished=10, num_succeeded=9),
        replay_pb2.QueueStatus(queue="eval/before", num_finished=20, num_succeeded=4),
        replay_pb2.QueueStatus(queue="train", num_finished=100, num_succeeded=50, num_leased=3),
    ]
)


def read(*metrics: dict[str, Any]) -> Progress:
    return ProgressMeter(RunConfig(), time.time()).read(metrics, STATUS)


def test_during_an_evaluation_the_success_rate_is_that_of_the_evaluation() -> None:
    update = {"kind": "update", "update": 1, "unix_s": 0.0, "success_rate": 0.5, "version": 1}
    assert read({"kind": "phase", "phase": "eval/before"}).success_rate == 0.2
    assert read(update, {"kind": "phase", "phase": "eval/after"}).success_rate == 0.9


def test_during_training_the_success_rate_is_that_of_the_newest_update() -> None:
    updates = [
        {"kind": "update", "update": number, "unix_s": 0.0, "success_rate": number / 10, "version": number}
        for number in (1, 2)
    ]
    progress = read({"kind": "phase", "phase": "training"}, *updates)
    assert (progress.success_rate, progress.num_updates, progress.version) == (0.2, 2, "2")
    assert (progress.num_episodes, progress.num_running) == (130, 3)


def test_without_records_rates_and_estimates_are_unknown() -> None:
    progress = ProgressMeter(RunConfig(), time.time()).read([], None)
    assert (progress.phase, progress.success_rate, progress.left_s, progress.num_episodes) == (
        "starting",
        None,
        None,
        0,
    )
