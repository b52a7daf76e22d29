"""The store under any order of events: the counts agree with the rows, pacing holds, and nothing leaks or is lost."""

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

from deskrl.core.trajectory import Span, Step, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, rollout_pb2
from deskrl.replay import batches, images, planning, reading, retention, rollouts, schema, successes
from deskrl.replay.leases import MAX_EXPIRIES
from deskrl.replay.pacing import Pacing
from deskrl.replay.planning import Ask
from deskrl.replay.refusals import LeaseLost, Refused, StoreFull
from deskrl.replay.segments import Segments
from deskrl.replay.writer import Commit, Operation, T, Writer

PACING = Pacing(max_staleness=1, groups_per_batch=2, rollouts=2)
RULES = successes.SuccessRules(above=0.5, capacity=2, seed=0)
MAX_FAULTS = 1
SHOT_BYTES = 10
SEGMENT_BYTES = 25
"""Three screenshots fill a segment."""


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = schema.open_database(tmp_path / schema.FILE_NAME)
    yield connection
    connection.close()


def plan_group(connection: sqlite3.Connection, group_id: str, num: int = PACING.rollouts) -> None:
    group = replay_pb2.GroupPlan(
        group_id=group_id,
        queue=group_id.partition("/")[0],
        task_id="task",
        task_json=b"{}",
        seeds=range(num),
        max_steps=5,
        acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
    )
    planning.plan(connection, [group])


def send_step(connection: sqlite3.Connection, segments: Segments, lease_id: str, index: int, shot: bytes) -> int:
    image = images.Received(hashlib.sha256(shot).digest(), shot)
    payload = encode_step(Step(index=index, screenshot=image.hash.hex(), images=(), text=""))
    step = rollout_pb2.EpisodeStep(index=index, payload=payload)
    return rollouts.add_step(connection, segments, lease_id, step, (), [image], [image.hash])


def send_result(
    connection: sqlite3.Connection, segments: Segments, lease_id: str, reward: float, num_steps: int
) -> None:
    result = rollout_pb2.EpisodeResult(reward=reward, num_steps=num_steps, termination=rollout_pb2.TERMINATION_FINISHED)
    rollouts.finish(connection, segments, lease_id, result, [], [], RULES.above)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Actors and a learner that do anything in any order; a little model knows what must have come of it."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        schema._create(self.connection)
        self.folder = tempfile.TemporaryDirectory()
        self.segments = Segments(Path(self.folder.name), {}, max_bytes=SEGMENT_BYTES * 32)
        self.leases: dict[str, int] = {}  # running, in the order of granting (names are random), with the steps sent
        self.dead_leases: list[str] = []
        self.num_planned_groups = 0
        self.num_updates = 0
        self.num_asks = 0
        self.batch: list[str] = []  # groups of the batch being formed
        self.dropped: list[str] = []
        self.taken: dict[tuple[int, int], replay_pb2.Group] = {}

    def teardown(self) -> None:
        self.connection.close()
        self.segments.close()
        self.folder.cleanup()

    @rule()
    def plan(self) -> None:
        plan_group(self.connection, f"train/{self.num_planned_groups}")
        self.num_planned_groups += 1

    @rule(num=st.integers(1, 4))
    def acquire(self, num: int) -> None:
        self.num_asks += num
        asks = [Ask(f"request-{self.num_asks - one}", "actor") for one in range(num)]
        allowed = planning.allowance(self.connection, PACING)
        granted = [grant for grant in planning.grant(self.connection, PACING, asks) if grant is not None]
        assert len(granted) <= allowed
        self.leases.update({grant.lease_id: 0 for grant in granted})

    @rule(wins=st.lists(st.booleans(), min_size=4, max_size=8))
    def plan_and_play(self, wins: list[bool]) -> None:
        """Enough of the ordinary course of things for batches to form."""
        self.plan()
        self.plan()
        self.acquire(len(wins))
        for lease_id, win in zip(list(self.leases), wins, strict=False):
            send_result(self.connection, self.segments, lease_id, float(win), self.leases.pop(lease_id))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), shot=st.integers(0, 5))
    def step(self, data: st.DataObject, shot: int) -> None:
        lease_id = data.draw(st.sampled_from(list(self.leases)))
        index = self.leases[lease_id]
        assert send_step(self.connection, self.segments, lease_id, index, bytes([shot]) * SHOT_BYTES) == index + 1
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
            send_result(self.connection, self.segments, lease_id, float(how == "win"), num_steps)

    @precondition(lambda self: self.dead_leases)
    @rule(data=st.data())
    def old_holder_comes_back(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(self.dead_leases))
        with pytest.raises(LeaseLost):
            send_step(self.connection, self.segments, lease_id, 0, b"late")
        with pytest.raises(LeaseLost):
            send_result(self.connection, self.segments, lease_id, 1, 0)

    @precondition(lambda self: len(self.batch) - len(self.dropped) < PACING.groups_per_batch)
    @rule(drop=st.booleans())
    def take(self, drop: bool) -> None:
        place = batches.Place("train", f"batch-{self.num_updates}", len(self.batch))
        position = batches.bind(self.connection, place, self.dropped, RULES)
        if position is None:
            return
        group = reading.group(self.connection, position)
        self.taken[self.num_updates, place.ordinal] = group
        rewards = [episode.result.reward for episode in group.episodes]
        assert len(rewards) >= 2
        if group.HasField("candidate"):
            assert not any(rewards) and group.candidate.result.reward > RULES.above
        self.batch.append(group.group_id)
        if drop:
            self.dropped.append(group.group_id)

    @precondition(lambda self: len(self.batch) - len(self.dropped) == PACING.groups_per_batch)
    @rule(max_bytes=st.sampled_from([0, 10**9]))
    def learn(self, max_bytes: int) -> None:
        verdicts = [replay_pb2.GroupVerdict(group_id=name, dropped_because="stale") for name in self.dropped]
        version = common_pb2.PolicyVersion(lineage="test", step=self.num_updates + 1)
        batches.set_policy(self.connection, version, self.num_updates + 1)
        assert batches.commit(self.connection, "train", f"batch-{self.num_updates}", verdicts, version)
        assert not batches.commit(self.connection, "train", f"batch-{self.num_updates}", verdicts, version)
        self.num_updates += 1
        self.batch, self.dropped = [], []
        retention.remove_oldest(self.connection, max_bytes)

    @rule()
    def commit(self) -> None:
        """The end of a transaction, as the store does it."""
        given_up = retention.give_up_segments(self.connection, self.segments)
        self.segments.commit()
        self.segments.remove(given_up)

    @rule()
    def redeliver(self) -> None:
        for (batch, ordinal), group in self.taken.items():
            position = batches.bind(self.connection, batches.Place("train", f"batch-{batch}", ordinal), [], RULES)
            assert position is not None
            if batch == self.num_updates:
                assert reading.group(self.connection, position) == group

    @invariant()
    def counts_agree_with_rows(self) -> None:
        counted = self.connection.execute(
            "SELECT position, num_planned, num_leased, num_finished, num_faulted FROM groups ORDER BY position"
        ).fetchall()
        rows = self.connection.execute(
            "SELECT group_position, sum(state = 'planned'), sum(state = 'leased'), sum(state = 'finished'),"
            " sum(state = 'faulted') FROM rollouts GROUP BY 1 ORDER BY 1"
        ).fetchall()
        assert counted == rows
        active = planning.active_leases(self.connection)
        assert sorted(active) == sorted(self.leases)

    @invariant()
    def acting_never_runs_too_far_ahead(self) -> None:
        """As the learner sees it: what it may yet have to learn from was begun at most S versions before."""
        (num_unused,) = self.connection.execute(
            "SELECT count(*) FROM rollouts r JOIN groups g ON g.position = r.group_position"
            " WHERE g.state IN ('open', 'complete') AND r.state IN ('leased', 'finished', 'faulted')"
        ).fetchone()
        assert num_unused <= (PACING.max_staleness + 1) * PACING.groups_per_batch * PACING.rollouts

    @invariant()
    def screenshots_are_held_exactly_while_used(self) -> None:
        statement = "SELECT count(*) FROM images i WHERE NOT EXISTS (SELECT 1 FROM image_uses WHERE image = i.id)"
        assert self.connection.execute(statement).fetchone() == (0,)
        statement = "SELECT count(*) FROM image_uses u WHERE NOT EXISTS (SELECT 1 FROM images WHERE id = u.image)"
        assert self.connection.execute(statement).fetchone() == (0,)
        status = reading.status(self.connection)
        rows = self.connection.execute("SELECT hash, num_bytes FROM images").fetchall()
        assert (len(rows), sum(num_bytes for _, num_bytes in rows)) == (status.num_images, status.image_bytes)
        shots = images.read(self.connection, self.segments, [row[0] for row in rows], max_bytes=10**9)
        assert [hashlib.sha256(shot).digest() for shot in shots] == [row[0] for row in rows]

    @invariant()
    def segments_are_counted_by_what_is_wanted_of_them(self) -> None:
        counted = dict(self.connection.execute("SELECT number, live_bytes FROM segments WHERE live_bytes > 0"))
        rows = self.connection.execute("SELECT segment, sum(num_bytes) FROM images GROUP BY segment")
        assert counted == dict(rows.fetchall())

    @invariant()
    def successes_are_whole_and_few(self) -> None:
        (num_stored,) = self.connection.execute("SELECT count(*) FROM successes").fetchone()
        assert num_stored <= RULES.capacity
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


def test_a_task_that_kills_its_actors_is_given_up(connection: sqlite3.Connection) -> None:
    plan_group(connection, "eval/0", num=1)
    for attempt in range(MAX_EXPIRIES):
        (grant,) = planning.grant(connection, PACING, [Ask(f"request-{attempt}", "actor")])
        assert grant is not None
        rollouts.expire(connection, [grant.lease_id])
    assert planning.grant(connection, PACING, [Ask("one more", "actor")]) == [None]
    (episode,) = [
        reading.episode(connection, rollout)
        for rollout in reading.find_episodes(connection, replay_pb2.ListEpisodesRequest())
    ]
    assert (episode.num_faults, episode.last_fault.kind) == (0, rollout_pb2.FAULT_KIND_ACTOR)


def test_seeds_of_64_bits_are_kept(connection: sqlite3.Connection) -> None:
    planning.plan(
        connection,
        [replay_pb2.GroupPlan(group_id="eval/0", queue="eval", task_id="t", seeds=[2**64 - 1], max_steps=1)],
    )
    (grant,) = planning.grant(connection, PACING, [Ask("request", "actor")])
    assert grant is not None and grant.rollout.seed == 2**64 - 1


class Held:
    """A writer whose thread can be held up, so that what is queued meanwhile shares one commit."""

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
def held(tmp_path: Path) -> Iterator[Held]:
    connection = sqlite3.connect(tmp_path / "db", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE numbers (number INTEGER UNIQUE, filling BLOB)")
    held = Held(connection)
    yield held
    held.writer.close()


def insert(number: int, num_bytes: int = 0) -> Operation[int]:
    def operation(connection: sqlite3.Connection) -> int:
        connection.execute("INSERT INTO numbers VALUES (?, zeroblob(?))", (number, num_bytes))
        return number

    return operation


def insert_then_refuse(connection: sqlite3.Connection) -> int:
    insert(99)(connection)
    raise Refused("no")


def stored(held: Held) -> list[int]:
    return held.writer.submit(
        lambda connection: [row[0] for row in connection.execute("SELECT number FROM numbers ORDER BY number")]
    ).result()


def test_one_commit_covers_what_was_queued_meanwhile_and_a_refusal_only_itself(held: Held) -> None:
    first, refused, last = held.together(insert(1), insert_then_refuse, insert(2))
    assert (first.result(), last.result()) == (1, 2)
    with pytest.raises(Refused):
        refused.result()
    assert stored(held) == [1, 2]
    assert [commit.num_operations for commit in held.commits][:2] == [1, 3]


def test_a_full_disk_refuses_the_whole_commit_and_the_writer_goes_on(held: Held) -> None:
    held.writer.submit(lambda connection: connection.execute("PRAGMA max_page_count = 20").fetchone()).result()
    small, big = held.together(insert(1), insert(2, 10**6))
    for future in (small, big):
        with pytest.raises(StoreFull):
            future.result()
    assert held.writer.submit(insert(3)).result() == 3
    assert stored(held) == [3]


def test_an_error_of_our_own_reaches_who_asked_and_the_writer_goes_on(held: Held) -> None:
    (broken,) = held.together(lambda connection: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken.result()
    assert held.writer.submit(insert(1)).result() == 1


def test_what_episodes_are_looked_up_by_outlives_their_steps(connection: sqlite3.Connection, tmp_path: Path) -> None:
    segments = Segments(tmp_path, {}, 1000)
    plan_group(connection, "demo/0", num=1)
    (grant,) = planning.grant(connection, PACING, [Ask("request", "actor")])
    assert grant is not None
    for index, versions in enumerate(((3, 4), (5, 5))):
        spans = [Span("line", version, 0, 1) for version in versions]
        payload = encode_step(Step(index=index, screenshot="", images=(), text="", spans=tuple(spans)))
        step = rollout_pb2.EpisodeStep(index=index, payload=payload)
        rollouts.add_step(connection, segments, grant.lease_id, step, spans, [], [])
    send_result(connection, segments, grant.lease_id, 1.0, 2)
    looked_up = "SELECT termination, lineage, oldest_version, newest_version FROM rollouts"
    expected = (rollout_pb2.TERMINATION_FINISHED, "line", 3, 5)
    assert connection.execute(looked_up).fetchone() == expected
    batches.bind(connection, batches.Place("demo", "demo", 0), [], RULES)
    batches.commit(connection, "demo", "demo", [], common_pb2.PolicyVersion())
    assert retention.remove_oldest(connection, 0) == 1
    assert connection.execute(looked_up).fetchone() == expected


def test_a_store_on_a_read_only_disk_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / schema.FILE_NAME
    with closing(schema.open_database(path)) as connection:
        plan_group(connection, "demo/0")
    monkeypatch.setattr(schema.os, "access", lambda folder, mode: False)  # a test that runs as root may write anywhere
    with closing(schema.open_reader(path)) as reader:
        assert reader.execute("SELECT count(*) FROM groups").fetchone() == (1,)
        assert sorted(file.name for file in tmp_path.iterdir()) == [path.name], "nothing was made beside it"
