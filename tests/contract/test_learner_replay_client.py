"""The learner's side of the replay contract, against a real service."""

from __future__ import annotations

import grpc
import pytest
from replay_kit import StartReplay, begin, result, screenshot, steps

from deskrl.core.ids import image_hash
from deskrl.core.lifetime import StopEvent
from deskrl.learner import replay_client
from deskrl.learner.replay_client import ReplayClient


def test_a_screenshot_is_asked_for_once_while_there_is_room(
    start_replay: StartReplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = start_replay()
    actor = replay.client()
    actor.plan("train/0")
    lease = actor.acquire()
    actor.stream([begin(lease), *steps(lease, range(3)), result(1.0, 3)])
    shots = {image_hash(data): data for data in (screenshot(lease, index) for index in range(3))}
    first, second, third = shots
    monkeypatch.setattr(replay_client, "KEPT_IMAGE_BYTES", 2 * len(shots[first]))
    learner = ReplayClient(replay.config.replay.address, "test", StopEvent())
    try:
        assert learner.fetch_images([first, second, first]) == {name: shots[name] for name in (first, second)}
        assert learner.fetch_images([first, third]) == {name: shots[name] for name in (first, third)}
        replay.kill()
        monkeypatch.setattr(replay_client, "RESTART_S", 0.5)
        assert learner.fetch_images([third, first]) == {name: shots[name] for name in (first, third)}
        with pytest.raises(grpc.RpcError):
            learner.fetch_images([second])
    finally:
        learner.close()


def test_groups_come_in_the_order_of_their_places_and_what_is_dropped_is_told_with_the_next(
    start_replay: StartReplay,
) -> None:
    replay = start_replay(staleness=0, groups_per_batch=2)
    actor = replay.client()
    for number in range(8):
        actor.plan(f"train/{number}")
    for _ in range(4):  # two groups of two: as many as may be played before something is learnt or dropped
        actor.play(actor.acquire(), reward=0.0)
    assert not actor.acquire().lease_id
    learner = ReplayClient(replay.config.replay.address, "test", StopEvent())
    taken: list[str] = []

    def play_on() -> None:
        """What is told as dropped makes room for other work."""
        while (lease := actor.acquire()).lease_id:
            actor.play(lease, reward=1.0)

    try:
        for group in learner.take_groups("train", "train/1", range(6), lambda: taken, play_on):
            assert group.group_id not in taken
            taken.append(group.group_id)
        assert [actor.take("train", "train/1", place).group_id for place in range(6)] == taken  # type: ignore[union-attr]
        assert len(taken) == 6
    finally:
        learner.close()
