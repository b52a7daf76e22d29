"""Read-only access to a replay store while another connection writes to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deskrl.core.errors import UserError
from deskrl.core.step_codec import Step, VersionSpan, encode_step
from deskrl.proto.v1 import replay_pb2, rollout_pb2
from deskrl.replay import image_index, rollout_scheduler, rollouts
from deskrl.replay.rate_limiter import RateLimiter
from deskrl.replay.rollout_scheduler import LeaseRequest
from deskrl.replay.store import Store
from deskrl.replay.store_reader import ImageDamaged, ImageUnavailable, StoreReader
from deskrl.replay.stored_episodes import EpisodeFilter

RATE_LIMITER = RateLimiter(max_staleness=1, groups_per_batch=4, rollouts_per_group=1)
SHOT = b"screenshot"
SHOT_NAME = hashlib.sha256(SHOT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path, max_bytes=10**9)
    yield store
    store.close()


def add_episode(store: Store, number: int, reward: float) -> None:
    """Write an episode of one step with policy version `number`."""
    plan = replay_pb2.GroupPlan(
        group_id=f"train/{number}",
        queue="train",
        task_id="note",
        task_json=b'{"instruction": "Save the note."}',
        seeds=[2**64 - 1],
        max_steps=5,
        acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
    )
    store.submit(lambda connection: rollout_scheduler.plan_groups(connection, [plan])).result()
    request = LeaseRequest(f"request-{number}", "actor")
    (grant,) = store.submit(
        lambda connection: rollout_scheduler.grant_leases(connection, RATE_LIMITER, [request])
    ).result()
    assert grant is not None
    spans = (VersionSpan("main", number, 0, 1),)
    content = Step(index=0, screenshot=SHOT_NAME, images=(), text="", spans=spans, action_ids=(1,), logprobs=(-0.5,))
    step = rollout_pb2.EpisodeStep(index=0, payload=encode_step(content))
    image = image_index.ReceivedImage(bytes.fromhex(SHOT_NAME), SHOT)
    store.submit(
        lambda connection: rollouts.add_step(connection, store.blob_log, grant.lease_id, step, spans, [image], [])
    ).result()
    result = rollout_pb2.EpisodeResult(reward=reward, num_steps=1, termination=rollout_pb2.TERMINATION_FINISHED)
    store.submit(
        lambda connection: rollouts.finish(connection, store.blob_log, grant.lease_id, result, [], [], 0.5)
    ).result()


def ids_of(reader: StoreReader, wanted: EpisodeFilter, success_threshold: float = 0.5) -> list[str]:
    with reader.snapshot() as snapshot:
        return [it.episode_id for it in snapshot.find_page(wanted, success_threshold, None, 10).episodes]


def test_a_snapshot_does_not_change_while_the_service_writes(store: Store, tmp_path: Path) -> None:
    add_episode(store, 0, reward=1.0)
    reader = StoreReader(tmp_path)
    with reader.snapshot() as snapshot:
        assert snapshot.newest_ending() == 1
        add_episode(store, 1, reward=0.0)
        assert snapshot.newest_ending() == 1
        assert len(snapshot.list_episodes(EpisodeFilter())) == 1
    with reader.snapshot() as snapshot:
        assert snapshot.newest_ending() == 2


def test_a_record_has_all_fields_of_the_episode(store: Store, tmp_path: Path) -> None:
    add_episode(store, 3, reward=1.0)
    with StoreReader(tmp_path).snapshot() as snapshot:
        (record,) = snapshot.list_episodes(EpisodeFilter())
        group = snapshot.get_group(record.group_id)
        steps = snapshot.read_steps(record)
        assert snapshot.get_episode(record.episode_id) == record
    assert (record.queue, record.task_id, record.seed, record.state) == ("train", "note", 2**64 - 1, "finished")
    assert (record.lineage, record.oldest_version, record.newest_version) == ("main", 3, 3)
    assert record.result is not None and record.result.reward == record.reward == 1.0
    assert [step.screenshot for step in steps] == [SHOT_NAME]
    assert group is not None and group.instruction == "Save the note." and group.members == [record]


def test_every_condition_of_a_filter_must_hold(store: Store, tmp_path: Path) -> None:
    for number, reward in enumerate((0.0, 0.5, 1.0)):
        add_episode(store, number, reward)
    reader = StoreReader(tmp_path)
    assert ids_of(reader, EpisodeFilter(outcome="solved")) == ["train/2.0"]
    assert ids_of(reader, EpisodeFilter(outcome="failed", version=1)) == ["train/1.0"]
    assert ids_of(reader, EpisodeFilter(min_reward=0.5, max_reward=0.9, queue="train")) == ["train/1.0"]
    assert ids_of(reader, EpisodeFilter(episode_ids=("train/0.0", "train/2.0"))) == ["train/2.0", "train/0.0"]
    assert ids_of(reader, EpisodeFilter(task="paint")) == []


def test_a_reward_equal_to_the_threshold_is_a_failure_in_32_bits(store: Store, tmp_path: Path) -> None:
    add_episode(store, 0, reward=0.1)
    assert ids_of(StoreReader(tmp_path), EpisodeFilter(outcome="failed"), success_threshold=0.1) == ["train/0.0"]


def test_a_screenshot_is_returned_or_named_as_missing_or_damaged(store: Store, tmp_path: Path) -> None:
    add_episode(store, 0, reward=1.0)
    reader = StoreReader(tmp_path)
    assert reader.read_image(SHOT_NAME) == SHOT
    for name in ("0" * 64, "../lock"):
        with pytest.raises(ImageUnavailable):
            reader.read_image(name)
    (path,) = (tmp_path / "screenshots").iterdir()
    path.write_bytes(bytes(len(SHOT)))
    with pytest.raises(ImageDamaged, match=SHOT_NAME):
        reader.read_image(SHOT_NAME)


def test_a_folder_without_a_store_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"replay\.sqlite: not found"):
        StoreReader(tmp_path)
    assert not any(tmp_path.iterdir())
