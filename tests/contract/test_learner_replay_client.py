"""The learner's side of the replay contract, against a real service."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from chaos_kit.disk import Disk, why_no_disk
from relay import Relay
from replay_kit import ReplayProcess, StartReplay, begin, replay_config, result, screenshot, steps

from deskrl.core import rpc
from deskrl.core.ids import image_hash
from deskrl.core.lifetime import StopEvent
from deskrl.core.security.certificates import make_certificates
from deskrl.learner import replay_client
from deskrl.learner.replay_client import ReplayClient
from deskrl.proto.v1 import replay_pb2, rollout_pb2


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


class BreaksOnce(Relay):
    """Loses its first connection once so many bytes have passed."""

    def __init__(self, target: str, after_bytes: int) -> None:
        self._after_bytes = after_bytes
        self.has_broken = False
        super().__init__(target)

    async def _treat(self, data: bytes) -> bytes:
        if self.num_bytes > self._after_bytes and not self.has_broken:
            self.has_broken = True
            raise ConnectionResetError
        return data


def test_screenshots_that_were_on_their_way_when_the_connection_broke_are_asked_for_again(
    start_replay: StartReplay,
) -> None:
    replay = start_replay()
    actor = replay.client()
    actor.plan("train/0")
    lease = actor.acquire()
    actor.stream([begin(lease), *steps(lease, range(8), 500_000), result(1.0, 8)])
    shots = {image_hash(data): data for data in (screenshot(lease, index, 500_000) for index in range(8))}
    relay = BreaksOnce(replay.config.replay.address, 1_200_000)
    learner = ReplayClient(relay.address, "test", StopEvent())
    try:
        assert learner.fetch_images(shots) == shots
        assert relay.has_broken
    finally:
        learner.close()
        relay.close()


class CorruptsOnce(Relay):
    """Changes a bit of the first chunk that is as large as an answer with a group in it."""

    def __init__(self, target: str) -> None:
        self.has_corrupted = False
        super().__init__(target)

    async def _treat(self, data: bytes) -> bytes:
        if self.has_corrupted or len(data) < 4000:
            return data
        self.has_corrupted = True
        return data[:-1] + bytes([data[-1] ^ 1])


@pytest.fixture
def certificates(tmp_path: Path) -> Iterator[Path]:
    """A folder of them; this process is nobody again afterwards."""
    make_certificates(tmp_path / "certificates", [], 1)
    yield tmp_path / "certificates"
    rpc.identify(None)


def test_an_answer_that_is_corrupted_on_its_way_is_asked_for_again(
    start_replay: StartReplay, certificates: Path
) -> None:
    rpc.identify_as("actor", certificates)
    replay = start_replay(security=certificates)
    actor = replay.client()
    rpc.identify_as("learner", certificates)
    replay.client().plan("train/0")
    for _ in range(2):
        actor.play(actor.acquire(), reward=1.0, num_steps=40)
    relay = CorruptsOnce(replay.config.replay.address)
    learner = ReplayClient(relay.address, "test", StopEvent())
    try:
        (group,) = learner.take_groups("train", "train/1", [0], list, lambda: None)
        assert group.group_id == "train/0"
        assert relay.has_corrupted
    finally:
        learner.close()
        relay.close()


@pytest.mark.skipif(bool(why_no_disk()), reason=f"there is no disk to fill: {why_no_disk()}")
def test_a_full_disk_of_replay_is_waited_for(tmp_path: Path) -> None:
    config = replay_config(tmp_path)
    disk = Disk(config.folder / "replay")
    replay = ReplayProcess(config, prefix=disk.prefix)
    learner = ReplayClient(config.replay.address, "test", StopEvent())
    group = replay_pb2.GroupPlan(
        group_id="train/0",
        queue="train",
        task_id="task",
        task_json=bytes(10**7),
        seeds=[1],
        max_steps=1,
        acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
    )
    try:
        disk.fill()
        planning = threading.Thread(target=learner.plan, args=([group],))
        planning.start()
        replay.wait_for_log("the disk is full")
        disk.free()
        planning.join(timeout=60)
        assert learner.status().queues[0].num_planned == 1
    finally:
        learner.close()
        replay.close()
        disk.close()
