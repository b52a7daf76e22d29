"""Replay store under any order of events: counts match the rows, the rate limit holds, and nothing leaks or is lost."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deskrl.core.step_codec import Step, VersionSpan, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, rollout_pb2
from deskrl.replay import (
    batch_delivery,
    image_index,
    queries,
    retention,
    rollout_scheduler,
    rollouts,
    schema,
    success_buffer,
)
from deskrl.replay.blob_log import BlobLog
from deskrl.replay.leases import MAX_EXPIRATIONS
from deskrl.replay.rate_limiter import RateLimiter
from deskrl.replay.rollout_scheduler import LeaseRequest
from deskrl.replay.status_errors import LeaseNotFoundError, StatusError, StoreFullError
from deskrl.replay.writer import Commit, Operation, T, Writer

RATE_LIMITER = RateLimiter(max_staleness=1, groups_per_batch=2, rollouts_per_group=2)
SUCCESS_BUFFER = success_buffer.SuccessBufferConfig(threshold=0.5, capacity=2, seed=0)
MAX_FAULTS = 1
SHOT_BYTES = 10
SEGMENT_BYTES = 25
"""Size of three screenshots."""


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = schema.open_database(tmp_path / schema.FILE_NAME)
    yield connection
    connection.close()


def plan_group(connection: sqlite3.Connection, group_id: str, num: int = RATE_LIMITER.rollouts_per_group) -> None:
    group = replay_pb2.GroupPlan(
        group_id=group_id,
        queue=group_id.partition("/")[0],
        task_id="task",
        task_json=b"{}",
        seeds=range(num),
        max_steps=5,
        acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
    )
    rollout_scheduler.plan_groups(connection, [group])


def send_step(connection: sqlite3.Connection, blob_log: BlobLog, lease_id: str, index: int, shot: bytes) -> int:
    image = image_index.ReceivedImage(hashlib.sha256(shot).digest(), shot)
    payload = encode_step(Step(index=index, screenshot=image.hash.hex(), images=(), text=""))
    step = rollout_pb2.EpisodeStep(index=index, payload=payload)
    return rollouts.add_step(connection, blob_log, lease_id, step, (), [image], [image.hash])


def send_result(
    connection: sqlite3.Connection, blob_log: BlobLog, lease_id: str, reward: float, num_steps: int
) -> None:
    result = rollout_pb2.EpisodeResult(reward=reward, num_steps=num_steps, termination=rollout_pb2.TERMINATION_FINISHED)
    rollouts.finish(connection, blob_log, lease_id, result, [], [], SUCCESS_BUFFER.threshold)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Actors and a learner act in any order; a small model holds the expected state."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        schema.create(self.connection)
        self.folder = tempfile.TemporaryDirectory()
        self.blob_log = BlobLog(Path(self.folder.name), {}, max_bytes=SEGMENT_BYTES * 32)
        self.leases: dict[str, int] = {}
        """Number of steps sent under each active lease, in the order of granting (names are random)."""
        self.dead_leases: list[str] = []
        self.num_planned_groups = 0
        self.num_updates = 0
        self.num_requests = 0
        self.batch: list[str] = []  # groups of the batch being formed
        self.dropped: list[str] = []
        self.taken: dict[tuple[int, int], replay_pb2.Group] = {}

    def teardown(self) -> None:
        self.connection.close()
        self.blob_log.close()
        self.folder.cleanup()

    @rule()
    def plan(self) -> None:
        plan_group(self.connection, f"train/{self.num_planned_groups}")
        self.num_planned_groups += 1

    @rule(num=st.integers(1, 4))
    def acquire(self, num: int) -> None:
        self.num_requests += num
        requests = [LeaseRequest(f"request-{self.num_requests - one}", "actor") for one in range(num)]
        allowed = rollout_scheduler.allowance(self.connection, RATE_LIMITER)
        granted = [
            grant
            for grant in rollout_scheduler.grant_leases(self.connection, RATE_LIMITER, requests)
            if grant is not None
        ]
        assert len(granted) <= allowed
        self.leases.update({grant.lease_id: 0 for grant in granted})

    @rule(wins=st.lists(st.booleans(), min_size=4, max_size=8))
    def plan_and_finish(self, wins: list[bool]) -> None:
        """Finish whole groups, so that batches can form."""
        self.plan()
        self.plan()
        self.acquire(len(wins))
        for lease_id, win in zip(list(self.leases), wins, strict=False):
            send_result(self.connection, self.blob_log, lease_id, float(win), self.leases.pop(lease_id))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), shot=st.integers(0, 5))
    def step(self, data: st.DataObject, shot: int) -> None:
        lease_id = data.draw(st.sampled_from(list(self.leases)))
        index = self.leases[lease_id]
        assert send_step(self.connection, self.blob_log, lease_id, index, bytes([shot]) * SHOT_BYTES) == index + 1
        self.leases[lease_id] = index + 1

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), how=st.sampled_from(["win", "lose", "lose", "fault", "release", "expire"]))
    def end(self, data: st.DataObject, how: str) -> None:
        lease_id = data.draw(st.sampled_from(list(self.leases)))
        num_steps = self.leases.pop(lease_id)
        if how == "fault":
            cause = rollout_pb2.EpisodeFault(kind=rollout_pb2.FAULT_KIND_ACTOR)
            rollouts.fault(self.connection, lease_id, cause, MAX_FAULTS)
        elif how == "release":
            rollouts.release(self.connection, [lease_id])
            self.dead_leases.append(lease_id)
        elif how == "expire":
            assert rollouts.expire(self.connection, [lease_id]) == 1
            self.dead_leases.append(lease_id)
        else:
            send_result(self.connection, self.blob_log, lease_id, float(how == "win"), num_steps)

    @precondition(lambda self: self.dead_leases)
    @rule(data=st.data())
    def former_holder_sends_again(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(self.dead_leases))
        with pytest.raises(LeaseNotFoundError):
            send_step(self.connection, self.blob_log, lease_id, 0, b"late")
        with pytest.raises(LeaseNotFoundError):
            send_result(self.connection, self.blob_log, lease_id, 1, 0)

    @precondition(lambda self: len(self.batch) - len(self.dropped) < RATE_LIMITER.groups_per_batch)
    @rule(drop=st.booleans())
    def take(self, drop: bool) -> None:
        slot = batch_delivery.BatchSlot("train", f"batch-{self.num_updates}", len(self.batch))
        position = batch_delivery.bind(self.connection, slot, self.dropped, SUCCESS_BUFFER)
        if position is None:
            return
        group = queries.group(self.connection, position)
        self.taken[self.num_updates, slot.ordinal] = group
        rewards = [episode.result.reward for episode in group.episodes]
        assert len(rewards) >= 2
        if group.HasField("candidate"):
            assert not any(rewards) and group.candidate.result.reward > SUCCESS_BUFFER.threshold
        self.batch.append(group.group_id)
        if drop:
            self.dropped.append(group.group_id)

    @precondition(lambda self: len(self.batch) - len(self.dropped) == RATE_LIMITER.groups_per_batch)
    @rule(max_bytes=st.sampled_from([0, 10**9]))
    def train(self, max_bytes: int) -> None:
        verdicts = [replay_pb2.GroupVerdict(group_id=name, dropped_because="stale") for name in self.dropped]
        version = common_pb2.PolicyVersion(lineage="test", step=self.num_updates + 1)
        batch_delivery.set_policy(self.connection, version, self.num_updates + 1)
        assert batch_delivery.commit(self.connection, "train", f"batch-{self.num_updates}", verdicts, version)
        assert not batch_delivery.commit(self.connection, "train", f"batch-{self.num_updates}", verdicts, version)
        self.num_updates += 1
        self.batch, self.dropped = [], []
        retention.remove_oldest_episodes(self.connection, max_bytes)

    @rule()
    def commit(self) -> None:
        """End a transaction as the store does."""
        unused = retention.compact_segments(self.connection, self.blob_log)
        self.blob_log.commit()
        self.blob_log.remove(unused)

    @rule()
    def redeliver(self) -> None:
        for (batch, ordinal), group in self.taken.items():
            position = batch_delivery.bind(
                self.connection, batch_delivery.BatchSlot("train", f"batch-{batch}", ordinal), [], SUCCESS_BUFFER
            )
            assert position is not None
            if batch == self.num_updates:
                assert queries.group(self.connection, position) == group

    @invariant()
    def counts_match_the_rows(self) -> None:
        counted = self.connection.execute(
            "SELECT position, num_planned, num_leased, num_finished, num_faulted FROM groups ORDER BY position"
        ).fetchall()
        rows = self.connection.execute(
            "SELECT group_position, sum(state = 'planned'), sum(state = 'leased'), sum(state = 'finished'),"
            " sum(state = 'faulted') FROM rollouts GROUP BY 1 ORDER BY 1"
        ).fetchall()
        assert counted == rows
        active = rollout_scheduler.list_active_leases(self.connection)
        assert sorted(active) == sorted(self.leases)

    @invariant()
    def rollouts_never_exceed_the_rate_limit(self) -> None:
        """Every episode that may still be trained on was started at most S versions ago."""
        (num_unused,) = self.connection.execute(
            "SELECT count(*) FROM rollouts r JOIN groups g ON g.position = r.group_position"
            " WHERE g.state IN ('open', 'complete') AND r.state IN ('leased', 'finished', 'faulted')"
        ).fetchone()
        assert (
            num_unused
            <= (RATE_LIMITER.max_staleness + 1) * RATE_LIMITER.groups_per_batch * RATE_LIMITER.rollouts_per_group
        )

    @invariant()
    def screenshots_are_stored_exactly_while_used(self) -> None:
        statement = "SELECT count(*) FROM images i WHERE NOT EXISTS (SELECT 1 FROM image_uses WHERE image = i.id)"
        assert self.connection.execute(statement).fetchone() == (0,)
        statement = "SELECT count(*) FROM image_uses u WHERE NOT EXISTS (SELECT 1 FROM images WHERE id = u.image)"
        assert self.connection.execute(statement).fetchone() == (0,)
        status = queries.status(self.connection)
        rows = self.connection.execute("SELECT hash, num_bytes FROM images").fetchall()
        assert (len(rows), sum(num_bytes for _, num_bytes in rows)) == (status.num_images, status.image_bytes)
        shots = image_index.read(self.connection, self.blob_log, [row[0] for row in rows], max_bytes=10**9)
        assert [hashlib.sha256(shot).digest() for shot in shots] == [row[0] for row in rows]

    @invariant()
    def live_bytes_of_segments_match_the_stored_screenshots(self) -> None:
        counted = dict(self.connection.execute("SELECT number, live_bytes FROM segments WHERE live_bytes > 0"))
        rows = self.connection.execute("SELECT segment, sum(num_bytes) FROM images GROUP BY segment")
        assert counted == dict(rows.fetchall())

    @invariant()
    def successes_are_complete_and_within_the_capacity(self) -> None:
        (num_stored,) = self.connection.execute("SELECT count(*) FROM successes").fetchone()
        assert num_stored <= SUCCESS_BUFFER.capacity
        removed = "SELECT count(*) FROM successes s JOIN rollouts r ON r.id = s.rollout WHERE r.removed"
        assert self.connection.execute(removed).fetchone() == (0,)


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)


def test_a_rollout_whose_leases_keep_expiring_is_abandoned(connection: sqlite3.Connection) -> None:
    plan_group(connection, "eval/0", num=1)
    for attempt in range(MAX_EXPIRATIONS):
        (grant,) = rollout_scheduler.grant_leases(
            connection, RATE_LIMITER, [LeaseRequest(f"request-{attempt}", "actor")]
        )
        assert grant is not None
        rollouts.expire(connection, [grant.lease_id])
    assert rollout_scheduler.grant_leases(connection, RATE_LIMITER, [LeaseRequest("one more", "actor")]) == [None]
    (episode,) = [
        queries.episode(connection, rollout)
        for rollout in queries.find_episodes(connection, replay_pb2.ListEpisodesRequest())
    ]
    assert (episode.num_faults, episode.last_fault.kind) == (0, rollout_pb2.FAULT_KIND_ACTOR)


def test_a_64_bit_seed_is_stored_exactly(connection: sqlite3.Connection) -> None:
    rollout_scheduler.plan_groups(
        connection,
        [replay_pb2.GroupPlan(group_id="eval/0", queue="eval", task_id="t", seeds=[2**64 - 1], max_steps=1)],
    )
    (grant,) = rollout_scheduler.grant_leases(connection, RATE_LIMITER, [LeaseRequest("request", "actor")])
    assert grant is not None and grant.rollout.seed == 2**64 - 1


class PausableWriter:
    """Writer whose thread can be paused, so that operations queued in the meantime share one commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.commits: list[Commit] = []
        self.writer = Writer(connection, lambda connection: None, self.commits.append, lambda: None)

    def together(self, *operations: Operation[T]) -> list[Future[T]]:
        entered, gate = threading.Event(), threading.Event()

        def wait(connection: sqlite3.Connection) -> None:
            entered.set()
            gate.wait()

        self.writer.submit(wait)
        entered.wait()
        futures = [self.writer.submit(operation) for operation in operations]
        gate.set()
        return futures


@pytest.fixture
def paused(tmp_path: Path) -> Iterator[PausableWriter]:
    connection = sqlite3.connect(tmp_path / "db", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE numbers (number INTEGER UNIQUE, filling BLOB)")
    paused = PausableWriter(connection)
    yield paused
    paused.writer.close()


def insert(number: int, num_bytes: int = 0) -> Operation[int]:
    def operation(connection: sqlite3.Connection) -> int:
        connection.execute("INSERT INTO numbers VALUES (?, zeroblob(?))", (number, num_bytes))
        return number

    return operation


def insert_then_reject(connection: sqlite3.Connection) -> int:
    insert(99)(connection)
    raise StatusError("no")


def stored(paused: PausableWriter) -> list[int]:
    return paused.writer.submit(
        lambda connection: [row[0] for row in connection.execute("SELECT number FROM numbers ORDER BY number")]
    ).result()


def test_queued_operations_share_a_commit_and_a_rejected_one_does_not_affect_the_others(
    paused: PausableWriter,
) -> None:
    first, rejected, last = paused.together(insert(1), insert_then_reject, insert(2))
    assert (first.result(), last.result()) == (1, 2)
    with pytest.raises(StatusError):
        rejected.result()
    assert stored(paused) == [1, 2]
    assert [commit.num_operations for commit in paused.commits][:2] == [1, 3]


def test_a_full_disk_fails_the_whole_commit_and_the_writer_continues(paused: PausableWriter) -> None:
    paused.writer.submit(lambda connection: connection.execute("PRAGMA max_page_count = 20").fetchone()).result()
    small, big = paused.together(insert(1), insert(2, 10**6))
    for future in (small, big):
        with pytest.raises(StoreFullError):
            future.result()
    assert paused.writer.submit(insert(3)).result() == 3
    assert stored(paused) == [3]


def test_an_unexpected_error_reaches_the_caller_and_the_writer_continues(paused: PausableWriter) -> None:
    (broken,) = paused.together(lambda connection: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken.result()
    assert paused.writer.submit(insert(1)).result() == 1


def test_the_columns_that_are_searched_outlive_the_steps(connection: sqlite3.Connection, tmp_path: Path) -> None:
    blob_log = BlobLog(tmp_path, {}, 1000)
    plan_group(connection, "demo/0", num=1)
    (grant,) = rollout_scheduler.grant_leases(connection, RATE_LIMITER, [LeaseRequest("request", "actor")])
    assert grant is not None
    for index, versions in enumerate(((3, 4), (5, 5))):
        spans = [VersionSpan("line", version, 0, 1) for version in versions]
        payload = encode_step(Step(index=index, screenshot="", images=(), text="", spans=tuple(spans)))
        step = rollout_pb2.EpisodeStep(index=index, payload=payload)
        rollouts.add_step(connection, blob_log, grant.lease_id, step, spans, [], [])
    send_result(connection, blob_log, grant.lease_id, 1.0, 2)
    looked_up = "SELECT termination, lineage, oldest_version, newest_version FROM rollouts"
    expected = (rollout_pb2.TERMINATION_FINISHED, "line", 3, 5)
    assert connection.execute(looked_up).fetchone() == expected
    batch_delivery.bind(connection, batch_delivery.BatchSlot("demo", "demo", 0), [], SUCCESS_BUFFER)
    batch_delivery.commit(connection, "demo", "demo", [], common_pb2.PolicyVersion())
    assert retention.remove_oldest_episodes(connection, 0) == 1
    assert connection.execute(looked_up).fetchone() == expected


def test_a_store_on_a_read_only_disk_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / schema.FILE_NAME
    with closing(schema.open_database(path)) as connection:
        plan_group(connection, "demo/0")
    monkeypatch.setattr(schema.os, "access", lambda folder, mode: False)  # root can write everywhere
    with closing(schema.open_reader(path)) as reader:
        assert reader.execute("SELECT count(*) FROM groups").fetchone() == (1,)
        assert sorted(file.name for file in tmp_path.iterdir()) == [path.name], "no file is created beside it"
