"""Damage of the store's files: every read gives what was written, or says what is damaged, and all else goes on."""

from __future__ import annotations

import hashlib
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deskrl.core.errors import UserError
from deskrl.core.step_codec import CodecError, Step, VersionSpan, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, rollout_pb2
from deskrl.replay import batch_delivery, image_index, queries, rollout_scheduler, rollouts, schema
from deskrl.replay.damaged_episodes import DamagedEpisode, EpisodesDamagedError
from deskrl.replay.rate_limiter import RateLimiter
from deskrl.replay.rollout_scheduler import LeaseRequest
from deskrl.replay.status_errors import NotFoundError, StoreDamagedError
from deskrl.replay.store import Store
from deskrl.replay.store_reader import ImageDamaged, ImageUnavailable, StoreReader
from deskrl.replay.stored_episodes import EpisodeFilter
from deskrl.replay.success_buffer import SuccessBufferConfig

RATE_LIMITER = RateLimiter(max_staleness=4, groups_per_batch=2, rollouts_per_group=3)
SUCCESS_BUFFER = SuccessBufferConfig(threshold=0.5, capacity=2, seed=0)
NUM_STEPS = 3
DAMAGED = "damaged"
NUM_DAMAGED_STORES = 150
NUM_DAMAGED_LOGS = 40


class DamagedStore:
    """Store of a directory, and the episodes that were set aside since it was opened."""

    def __init__(self, folder: Path, max_bytes: int = 10**9) -> None:
        self.set_aside: list[DamagedEpisode] = []
        self.store = Store(folder, max_bytes, after_set_aside=self.set_aside.extend, success_threshold=0.5)

    def write(self, operation: Any) -> Any:
        return self.store.submit(operation).result()

    def plan(self, group_id: str, num: int = 3) -> None:
        plan = replay_pb2.GroupPlan(
            group_id=group_id,
            queue=group_id.partition("/")[0],
            task_id="task",
            task_json=b'{"instruction": "Save."}',
            seeds=[2**63 + index for index in range(num)],
            max_steps=5,
            temperature=1.0,
            acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
        )
        self.write(lambda connection: rollout_scheduler.plan_groups(connection, [plan]))

    def acquire(self) -> rollout_scheduler.LeaseGrant:
        requests = [LeaseRequest(f"request {random.random()}", "actor")]
        (grant,) = self.write(lambda connection: rollout_scheduler.grant_leases(connection, RATE_LIMITER, requests))
        assert grant is not None
        return grant

    def add_steps(self, grant: rollout_scheduler.LeaseGrant, attempt: str = "") -> None:
        spans = (VersionSpan("main", 1, 0, 1),)
        for index in range(NUM_STEPS):
            shot = f"{grant.rollout.episode_id} {index} {attempt}".encode() * 50
            image = image_index.ReceivedImage(hashlib.sha256(shot).digest(), shot)
            content = Step(
                index=index, screenshot=image.hash.hex(), images=(), text="x" * 300, action_ids=(1,), logprobs=(-0.5,),
                spans=spans, prompt_ids=tuple(range(400)),
            )  # fmt: skip
            step = rollout_pb2.EpisodeStep(index=index, payload=encode_step(content))
            self.write(
                lambda connection, step=step, image=image: rollouts.add_step(
                    connection, self.store.blob_log, grant.lease_id, step, spans, [image], [image.hash]
                )
            )

    def finish(self, grant: rollout_scheduler.LeaseGrant, reward: float, attempt: str = "") -> None:
        self.add_steps(grant, attempt)
        result = rollout_pb2.EpisodeResult(
            reward=reward, num_steps=NUM_STEPS, termination=rollout_pb2.TERMINATION_FINISHED
        )
        self.write(
            lambda connection: rollouts.finish(
                connection, self.store.blob_log, grant.lease_id, result, [], [], SUCCESS_BUFFER.threshold
            )
        )

    def run_group(self, group_id: str, rewards: tuple[float, ...] = (0.0, 1.0, 0.0)) -> None:
        self.plan(group_id, len(rewards))
        for reward in rewards:
            self.finish(self.acquire(), reward)

    def bind(self, batch: str, ordinal: int) -> int | None:
        slot = batch_delivery.BatchSlot("train", batch, ordinal)
        position: int | None = self.write(lambda connection: batch_delivery.bind(connection, slot, [], SUCCESS_BUFFER))
        return position

    def commit(self, batch: str) -> None:
        version = common_pb2.PolicyVersion(lineage="main", step=1)
        self.write(lambda connection: batch_delivery.set_policy(connection, version, 1))
        self.write(lambda connection: batch_delivery.commit(connection, "train", batch, [], version))

    def read(self, operation: Any) -> Any:
        return self.store._read(operation)

    def group(self, position: int) -> replay_pb2.Group:
        group: replay_pb2.Group = self.read(lambda connection: queries.group(connection, position))
        return group


@contextmanager
def opened(folder: Path) -> Iterator[DamagedStore]:
    store = DamagedStore(folder)
    try:
        yield store
    finally:
        store.store.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store with groups in all states, a success buffer, a fault and a running episode."""
    folder = tmp_path_factory.mktemp("whole")
    with opened(folder) as store:
        store.run_group("train/0")
        store.run_group("train/1", (0.0, 0.0, 0.0))
        for ordinal in range(2):
            store.bind("batch 0", ordinal)
        store.commit("batch 0")
        store.run_group("train/2")
        store.bind("batch 1", 0)
        store.run_group("train/3")
        store.plan("train/4")
        store.finish(store.acquire(), 1.0)
        fault = rollout_pb2.EpisodeFault(kind=rollout_pb2.FAULT_KIND_ACTOR, message="lost")
        faulted = store.acquire()
        store.write(lambda connection: rollouts.fault(connection, faulted.lease_id, fault, 0))
        store.add_steps(store.acquire())
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def flip(path: Path, offsets: list[int], generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= generator.randrange(1, 256)
    path.write_bytes(content)


def execute(folder: Path, statement: str, *values: object) -> list[Any]:
    """Execute a statement on a closed store as damage would: without the triggers that keep the checksums."""
    connection = sqlite3.connect(folder / schema.FILE_NAME, isolation_level=None)
    definitions = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in definitions:
        connection.execute(f"DROP TRIGGER {name}")
    rows = connection.execute(statement, values).fetchall()
    for _, sql in definitions:
        connection.execute(sql)
    connection.close()
    return rows


def test_a_segment_in_use_is_kept_although_the_size_of_another_screenshot_in_it_is_damaged(folder: Path) -> None:
    execute(
        folder,
        "UPDATE images SET num_bytes = num_bytes + (SELECT sum(num_bytes) FROM images WHERE id NOT IN"
        " (SELECT image FROM image_uses WHERE rollout IN (SELECT id FROM rollouts WHERE removable))) WHERE id = 1",
    )
    store = DamagedStore(folder, max_bytes=1)  # removes all episodes that were trained on
    for _ in range(3):
        store.write(lambda connection: None)
    hashes = store.read(lambda connection: connection.execute("SELECT hash FROM images").fetchall())
    assert len(hashes) > 10
    for (value,) in hashes:
        assert store.read(
            lambda connection, value=value: image_index.read(connection, store.store.blob_log, [value], 1)
        )
    store.store.close()


def read_or(error: tuple[type[Exception], ...], read: Any) -> Any:
    try:
        return read()
    except error:
        return DAMAGED


def contents_of_service(folder: Path) -> dict[str, Any]:
    """Return everything that the service reads, by name; DAMAGED for what it finds damaged."""
    errors = (EpisodesDamagedError, image_index.ImagesDamagedError, NotFoundError, StoreDamagedError)
    found: dict[str, Any] = {}
    with opened(folder) as store:
        ended = store.read(lambda connection: queries.find_episodes(connection, replay_pb2.ListEpisodesRequest()))
        names = {it.episode_id for it in store.set_aside}
        for rollout in ended:
            episode = read_or(errors, lambda rollout=rollout: store.read(lambda c: queries.episode(c, rollout)))
            if episode != DAMAGED:
                found[f"episode {episode.episode_id}"] = episode
        for (value,) in store.read(lambda connection: connection.execute("SELECT hash FROM images").fetchall()):
            read = lambda c, value=value: image_index.read(c, store.store.blob_log, [value], 1)  # noqa: E731
            image = read_or(errors, lambda read=read: store.read(read))
            if image != DAMAGED:
                found[f"image {hashlib.sha256(image[0]).hexdigest()}"] = image
                assert hashlib.sha256(image[0]).digest() == value
        read_state = {
            "leases": rollout_scheduler.list_active_leases,
            "allowance": lambda connection: rollout_scheduler.allowance(connection, RATE_LIMITER),
            "policy": lambda connection: connection.execute("SELECT * FROM policy").fetchall(),
            "groups": lambda connection: connection.execute("SELECT * FROM groups").fetchall(),
            "batches": lambda connection: connection.execute("SELECT * FROM batches").fetchall(),
            "successes": lambda connection: connection.execute("SELECT * FROM successes").fetchall(),
        }
        for name, operation in read_state.items():
            found[name] = read_or(errors, lambda operation=operation: store.read(operation))
        found["set aside"] = names
    return found


def contents_of_reader(folder: Path) -> dict[str, Any]:
    """Return everything that viewer and report read, by name; DAMAGED for what they find damaged."""
    found: dict[str, Any] = {}
    reader = StoreReader(folder)
    with reader.snapshot() as snapshot:
        for record in snapshot.list_episodes(EpisodeFilter()):
            if not record.damage:
                found[f"record {record.episode_id}"] = record
                steps = read_or((CodecError,), lambda record=record: snapshot.read_steps(record))
                found[f"steps {record.episode_id}"] = steps
                for step in () if steps == DAMAGED else steps:
                    errors = (ImageDamaged, ImageUnavailable)
                    image = read_or(errors, lambda step=step: reader.read_image(step.screenshot))
                    found[f"image {step.screenshot}"] = image
        for name in ("train/0", "train/1", "train/2", "train/3", "train/4"):
            group = snapshot.get_group(name)
            records = [] if group is None else [*group.members, *filter(None, [group.candidate])]
            found[f"group {name}"] = DAMAGED if group is None or any(it.damage for it in records) else group
    return found


def test_whatever_bytes_of_the_files_change_the_service_reads_what_was_written_or_finds_the_damage(
    whole: Path, tmp_path: Path
) -> None:
    original = contents_of_service(Path(shutil.copytree(whole, tmp_path / "original")))
    num_rejected = num_set_aside = num_repaired = 0
    for seed in range(NUM_DAMAGED_STORES):
        generator = random.Random(seed)
        folder = Path(shutil.copytree(whole, tmp_path / str(seed)))
        path = generator.choice([folder / schema.FILE_NAME] * 9 + list((folder / "screenshots").iterdir()))
        flip(path, [generator.randrange(path.stat().st_size) for _ in range(3)], generator)
        try:
            found = contents_of_service(folder)
        except UserError as error:
            num_rejected += 1
            assert str(folder) in error.message and "restore" in error.hint
            continue
        finally:
            shutil.rmtree(folder)
        set_aside = found.pop("set aside")
        num_set_aside += bool(set_aside)
        num_repaired += found == {key: original[key] for key in found}
        for key, value in found.items():
            if set_aside and key in ("leases", "allowance", "groups", "successes"):
                continue  # the episodes that were set aside are planned again
            assert value in (original.get(key), DAMAGED), (seed, key)
        names = {key.partition(" ")[2] for key in original if key.startswith("episode ")}
        missing = {name for name in names if f"episode {name}" not in found}
        # An episode with a damaged step is found when it is read; one with a damaged row, at the start.
        assert set_aside <= {*names, *(f"train/{group}.{member}" for group in range(5) for member in range(3))}, seed
        assert len(missing) <= len(names) // 2, seed
    assert min(num_rejected, num_set_aside, num_repaired) > 0


def test_whatever_byte_of_the_log_changes_after_a_crash_no_acknowledged_episode_is_dropped_silently(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "running") as store:
        store.run_group("train/0")
        store.run_group("train/1")
        crashed = Path(shutil.copytree(tmp_path / "running", tmp_path / "crashed"))
    original = contents_of_service(tmp_path / "running")
    num_accepted = num_rejected = 0
    for seed in range(NUM_DAMAGED_LOGS):
        folder = Path(shutil.copytree(crashed, tmp_path / str(seed)))
        log = folder / (schema.FILE_NAME + "-wal")
        size = log.stat().st_size
        offset = size - 1 - seed * 1000 if seed < NUM_DAMAGED_LOGS // 2 else random.Random(seed).randrange(size)
        flip(log, [offset], random.Random(seed))
        try:
            found = contents_of_service(folder)
        except UserError as error:
            num_rejected += 1
            assert str(log) in error.message and "restore" in error.hint
            continue
        num_accepted += 1
        episodes = {key: value for key, value in found.items() if key.startswith("episode ")}
        assert len(episodes) >= 5, "at most the last transaction is missing: it looks like an interrupted one"
        assert all(original[key] == value for key, value in episodes.items())
    assert min(num_accepted, num_rejected) > 0


def test_whatever_bytes_of_the_files_change_the_viewer_reads_what_was_written_or_finds_the_damage(
    whole: Path, tmp_path: Path
) -> None:
    original = contents_of_reader(whole)
    num_rejected = num_damaged = 0
    for seed in range(NUM_DAMAGED_STORES):
        generator = random.Random(seed)
        folder = Path(shutil.copytree(whole, tmp_path / str(seed)))
        path = generator.choice([folder / schema.FILE_NAME] * 9 + list((folder / "screenshots").iterdir()))
        flip(path, [generator.randrange(path.stat().st_size) for _ in range(3)], generator)
        try:
            found = contents_of_reader(folder)
        except (UserError, sqlite3.Error):  # the viewer shows a page that says which file cannot be read
            num_rejected += 1
            continue
        finally:
            shutil.rmtree(folder)
        num_damaged += found != original
        for key, value in found.items():
            assert value in (original.get(key), DAMAGED), (seed, key)
    assert min(num_rejected, num_damaged) > 0
