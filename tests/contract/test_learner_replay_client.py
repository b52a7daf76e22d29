"""The learner's client of the replay service, tested against a real service."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_kit.disk import Disk, disk_unavailable_reason
from relay_kit import Relay
from replay_kit import ReplayProcess, StartReplay, begin, replay_config, result, screenshot, steps

from deskrl.core import rpc
from deskrl.core.ids import image_hash
from deskrl.core.process_lifecycle import StopEvent
from deskrl.core.step_codec import decode_step
from deskrl.launch.certificates import make_certificates
from deskrl.learner import replay_client, retrying_calls
from deskrl.learner.replay_client import EpisodesDamagedError, ReplayClient
from deskrl.proto.v1 import replay_pb2, rollout_pb2


def test_a_screenshot_in_the_cache_is_not_requested_again(
    start_replay: StartReplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = start_replay()
    actor = replay.client()
    actor.plan("train/0")
    lease = actor.acquire()
    actor.stream([begin(lease), *steps(lease, range(3)), result(1.0, 3)])
    shots = {image_hash(data): data for data in (screenshot(lease, index) for index in range(3))}
    first, second, third = shots
    monkeypatch.setattr(replay_client, "IMAGE_CACHE_BYTES", 2 * len(shots[first]))
    learner = ReplayClient(replay.config.replay.address, "test", StopEvent())
    try:
        assert learner.fetch_images([first, second, first]) == {name: shots[name] for name in (first, second)}
        assert learner.fetch_images([first, third]) == {name: shots[name] for name in (first, third)}
        replay.kill()
        monkeypatch.setattr(retrying_calls, "RESTART_TIMEOUT_S", 0.5)
        assert learner.fetch_images([third, first]) == {name: shots[name] for name in (first, third)}
        with pytest.raises(RuntimeError, match="replay does not serve screenshots: DEADLINE_EXCEEDED"):
            learner.fetch_images([second])
    finally:
        learner.close()


def test_a_damaged_screenshot_is_named_in_one_line_by_every_rank(start_replay: StartReplay) -> None:
    replay = start_replay()
    actor = replay.client()
    actor.run_group("train/0", [0.0, 1.0])
    name = image_hash(actor.fetch([decode_step(actor.episodes()[0].steps[0]).screenshot])[0])
    for path in (replay.folder / "screenshots").iterdir():
        path.unlink()
    for rank in range(2):
        learner = ReplayClient(replay.config.replay.address, f"rank-{rank}", StopEvent())
        try:
            with pytest.raises(EpisodesDamagedError, match=name) as error:
                learner.fetch_images([name])
            assert "\n" not in str(error.value)
        finally:
            learner.close()


def test_groups_arrive_in_order_and_requests_report_the_groups_dropped_so_far(
    start_replay: StartReplay,
) -> None:
    replay = start_replay(staleness=0, groups_per_batch=2)
    actor = replay.client()
    for number in range(8):
        actor.plan(f"train/{number}")
    # Two groups of two are all that the rate limiter admits until a batch is committed or a group is dropped.
    for _ in range(4):
        actor.run_episode(actor.acquire(), reward=0.0)
    assert not actor.acquire().lease_id
    learner = ReplayClient(replay.config.replay.address, "test", StopEvent())
    taken: list[str] = []

    def run_admitted_rollouts() -> None:
        """Run the rollouts that the rate limiter admits in place of dropped groups."""
        while (lease := actor.acquire()).lease_id:
            actor.run_episode(lease, reward=1.0)

    try:
        for group in learner.take_groups("train", "train/1", range(6), lambda: taken, run_admitted_rollouts):
            assert group.group_id not in taken
            taken.append(group.group_id)
        assert [actor.take("train", "train/1", place).group_id for place in range(6)] == taken  # type: ignore[union-attr]
        assert len(taken) == 6
    finally:
        learner.close()


class BreaksOnce(Relay):
    """Resets its first connection after a number of bytes."""

    def __init__(self, target: str, after_bytes: int) -> None:
        self._after_bytes = after_bytes
        self.has_broken = False
        super().__init__(target)

    async def _transform(self, data: bytes) -> bytes:
        if self.num_bytes > self._after_bytes and not self.has_broken:
            self.has_broken = True
            raise ConnectionResetError
        return data


def test_screenshots_missing_after_a_broken_connection_are_requested_again(
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
    """Flips a bit of the first chunk that is large enough to contain a group."""

    def __init__(self, target: str) -> None:
        self.has_corrupted = False
        super().__init__(target)

    async def _transform(self, data: bytes) -> bytes:
        if self.has_corrupted or len(data) < 4000:
            return data
        self.has_corrupted = True
        return data[:-1] + bytes([data[-1] ^ 1])


@pytest.fixture
def certificates(tmp_path: Path) -> Iterator[Path]:
    """A folder with certificates; afterwards this process has no identity again."""
    make_certificates(tmp_path / "certificates", [], 1)
    yield tmp_path / "certificates"
    rpc.set_identity(None)


def test_a_call_whose_response_is_corrupted_in_transit_is_repeated(
    start_replay: StartReplay, certificates: Path
) -> None:
    rpc.load_own_identity("actor", certificates)
    replay = start_replay(security=certificates)
    actor = replay.client()
    rpc.load_own_identity("learner", certificates)
    replay.client().plan("train/0")
    for _ in range(2):
        actor.run_episode(actor.acquire(), reward=1.0, num_steps=40)
    relay = CorruptsOnce(replay.config.replay.address)
    learner = ReplayClient(relay.address, "test", StopEvent())
    try:
        (group,) = learner.take_groups("train", "train/1", [0], list, lambda: None)
        assert group.group_id == "train/0"
        assert relay.has_corrupted
    finally:
        learner.close()
        relay.close()


@pytest.mark.skipif(bool(disk_unavailable_reason()), reason=f"no disk to fill: {disk_unavailable_reason()}")
def test_a_call_waits_while_the_disk_of_replay_is_full(tmp_path: Path) -> None:
    config = replay_config(tmp_path)
    disk = Disk(config.run_dir / "replay")
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
