"""Replay service whose files are damaged: it names the damaged episodes and grants them again; all else goes on."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from ports_kit import free_ports
from replay_damage_kit import damage_row, make_schema_3
from replay_kit import ReplayClient, ReplayProcess, StartReplay, begin, steps

from deskrl.core.errors import UserError
from deskrl.core.step_codec import decode_step
from deskrl.launch.supervisor import USER_ERROR_STATUS
from deskrl.proto.v1 import replay_pb2
from deskrl.replay.store_reader import StoreReader
from deskrl.replay.stored_episodes import EpisodeFilter

_DEADLINE_S = 60.0


def screenshots(client: ReplayClient, group: replay_pb2.Group) -> list[bytes]:
    """Fetch all screenshots of a group, as the learner does."""
    return client.fetch(decode_step(payload).screenshot for episode in group.episodes for payload in episode.steps)


def play_again(client: ReplayClient, num: int, *, num_steps: int = 2) -> list[str]:
    """Run the rollouts that are granted, which must be `num`, and return their episode ids."""
    names = []
    for _ in range(num):
        lease = client.acquire(wait_s=_DEADLINE_S)
        client.run_episode(lease, reward=1.0, num_steps=num_steps)
        names.append(lease.rollout.episode_id)
    assert not client.acquire().lease_id
    return names


def segments(process: ReplayProcess) -> list[Path]:
    return sorted((process.folder / "screenshots").iterdir())


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE steps SET payload = zeroblob(length(payload)) WHERE rollout = 2 AND step = 1", "step 1"),
        ("DELETE FROM steps WHERE rollout = 2 AND step = 1", "step 1"),
        ("UPDATE rollouts SET reward = 0.75 WHERE id = 2", "its row in the database"),
        ("DELETE FROM rollouts WHERE id = 2", "its row in the database"),
    ],
)
def test_an_episode_that_is_damaged_before_the_learner_takes_its_group_is_played_again(
    start_replay: StartReplay, statement: str, what: str
) -> None:
    process = start_replay()
    process.client().run_group("train/0", [0.0, 1.0])
    process.stop()
    damage_row(process.folder, statement)
    process.start()
    client = process.client()
    assert client.take("train", "batch", 0) is None
    process.wait_for_log("episode train/0.1 is damaged")
    assert play_again(client, 1) == ["train/0.1"]
    group = client.take("train", "batch", 0, wait_s=_DEADLINE_S)
    assert group is not None
    assert [episode.episode_id for episode in group.episodes] == ["train/0.0", "train/0.1"]
    assert len(screenshots(client, group)) == 4
    assert (client.queue_status("train").num_finished, client.queue_status("train").num_succeeded) == (2, 1)
    log = process.stop()[1]
    assert log.count("is damaged") == 1 and what in log and "Traceback" not in log


def test_a_group_that_the_learner_has_taken_is_taken_again_after_a_damaged_member_was_played_again(
    start_replay: StartReplay,
) -> None:
    process = start_replay()
    client = process.client()
    for number in range(2):
        client.run_group(f"train/{number}", [0.0, 1.0])
    groups = [client.take("train", "batch", ordinal) for ordinal in range(2)]
    process.kill()
    damage_row(process.folder, "UPDATE steps SET payload = zeroblob(length(payload)) WHERE rollout = 1")
    process.start()
    client = process.client()
    assert client.take("train", "batch", 0) is None
    assert client.take("train", "batch", 1) == groups[1], "other groups of the batch do not change"
    play_again(client, 1)
    again = client.take("train", "batch", 0, wait_s=_DEADLINE_S)
    assert again is not None and groups[0] is not None and again.group_id == groups[0].group_id
    client.commit("train", "batch")
    assert client.queue_status("train").num_consumed == 4


def test_a_segment_that_is_deleted_while_replay_runs_costs_only_the_episodes_in_it(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.run_group("train/0", [0.0, 1.0])
    process.stop()  # each process writes to a segment of its own
    process.start()
    client = process.client()
    client.run_group("train/1", [0.0, 1.0])
    segments(process)[0].unlink()
    assert client.take("train", "batch", 0) is None
    assert play_again(client, 2) == ["train/0.0", "train/0.1"]
    for ordinal in range(2):
        group = client.take("train", "batch", ordinal, wait_s=_DEADLINE_S)
        assert group is not None and len(screenshots(client, group)) == 4
    client.commit("train", "batch")
    assert process.stop()[0] == 0
    process.start()  # nothing refers to the deleted segment any more
    assert len(process.client().episodes()) == 4


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_segment_that_is_removed_while_replay_writes_to_it_is_replaced_by_another_one(
    start_replay: StartReplay, is_renamed: bool
) -> None:
    process = start_replay()
    client = process.client()
    client.run_group("train/0", [0.0, 1.0])
    (segment,) = segments(process)
    if is_renamed:
        segment.rename(process.folder / "renamed")
    else:
        segment.unlink()
    assert client.take("train", "batch", 0) is None
    assert play_again(client, 2) == ["train/0.0", "train/0.1"]
    group = client.take("train", "batch", 0, wait_s=_DEADLINE_S)
    assert group is not None and len(screenshots(client, group)) == 4


@pytest.mark.parametrize("file", ["replay.sqlite", "replay.sqlite-wal"])
def test_bytes_that_change_while_replay_runs_are_found_although_it_has_them_in_memory(
    start_replay: StartReplay, file: str
) -> None:
    process = start_replay()
    client = process.client()
    client.run_group("train/0", [0.0, 1.0])
    if not file.endswith("-wal"):
        with closing(sqlite3.connect(process.folder / file)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = (process.folder / file).read_bytes()
    with open(process.folder / file, "r+b") as opened:
        for found in re.finditer(b"action 1", content):
            opened.seek(found.start())
            opened.write(b"actiom")
    assert client.take("train", "batch", 0) is None
    assert play_again(client, 2) == ["train/0.0", "train/0.1"]
    assert client.take("train", "batch", 0, wait_s=_DEADLINE_S) is not None


@pytest.mark.parametrize("file", ["replay.sqlite", "replay.sqlite-wal"])
def test_a_database_that_is_deleted_while_replay_runs_ends_it_and_nothing_more_is_acknowledged(
    start_replay: StartReplay, file: str
) -> None:
    process = start_replay()
    client = process.client()
    client.run_group("train/0", [0.0, 1.0])
    (process.folder / file).unlink()
    with pytest.raises(grpc.RpcError):
        client.plan("train/1")
    assert process.process.wait(_DEADLINE_S) == USER_ERROR_STATUS
    log = (process.config.run_dir / "replay.log").read_text()
    assert log.count("deskrl: ") == 1 and "Traceback" not in log
    assert f"{file} was removed or replaced while replay ran (hint: restore the file from a copy" in log


def test_a_folder_of_the_store_that_is_deleted_while_replay_runs_ends_it_in_one_line(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.plan("eval/0", num=2)
    client.run_episode(client.acquire(), reward=1.0)
    lease = client.acquire()
    shutil.rmtree(process.folder)
    with pytest.raises(grpc.RpcError):
        client.run_episode(lease, reward=1.0)
    assert process.process.wait(_DEADLINE_S) == USER_ERROR_STATUS
    log = (process.config.run_dir / "replay.log").read_text()
    assert log.count("deskrl: ") == 1 and "Traceback" not in log


def test_the_index_of_the_log_may_be_deleted_while_replay_runs(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    (process.folder / "replay.sqlite-shm").unlink()
    client.run_group("train/0", [0.0, 1.0])
    process.stop()
    process.start()
    assert len(process.client().episodes()) == 2


@pytest.mark.parametrize("place", ["header", "frame"])
def test_a_damaged_log_that_hides_acknowledged_episodes_is_refused(start_replay: StartReplay, place: str) -> None:
    process = start_replay()
    process.client().run_group("train/0", [0.0, 1.0])
    process.kill()
    path = process.folder / "replay.sqlite-wal"
    content = bytearray(path.read_bytes())
    content[10 if place == "header" else len(content) // 2] ^= 1
    path.write_bytes(content)
    line = failed_start(process)
    assert line.startswith(f"deskrl: {path}: damaged: ") and "restore the file from a copy" in line
    assert path.read_bytes() == content


def test_a_log_whose_last_transaction_was_interrupted_is_accepted(start_replay: StartReplay) -> None:
    process = start_replay()
    process.client().run_group("train/0", [0.0, 1.0])
    process.kill()
    path = process.folder / "replay.sqlite-wal"
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    process.start()
    assert process.client().episodes()


def test_a_batch_is_committed_while_damaged_members_that_the_learner_has_read_are_played_again(
    start_replay: StartReplay,
) -> None:
    process = start_replay(staleness=0)
    client = process.client()
    client.run_group("train/0", [0.0, 1.0])
    assert client.take("train", "batch", 0) is not None
    process.kill()
    damage_row(process.folder, "UPDATE steps SET payload = zeroblob(length(payload)) WHERE rollout = 1")
    process.start()
    client = process.client()
    with pytest.raises(grpc.RpcError, match="is damaged"):
        client.episodes()
    lease = client.acquire()
    assert lease.rollout.episode_id == "train/0.0"
    client.commit("train", "batch")
    client.set_updates(1)
    with pytest.raises(grpc.RpcError) as error:
        client.run_episode(lease, reward=1.0)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert not client.acquire().lease_id
    status = client.queue_status("train")
    assert (status.num_planned, status.num_leased, status.num_unused) == (1, 0, 0)
    client.run_group("train/1", [0.0, 1.0])  # the rate limit has room for it
    assert client.take("train", "batch 1", 0) is not None


def test_a_damaged_screenshot_is_refused_and_its_episodes_are_played_again(start_replay: StartReplay) -> None:
    metrics_port = free_ports(1)[0]
    process = start_replay(metrics_port=metrics_port)
    client = process.client()
    client.run_group("train/0", [0.0, 1.0])
    flip_last_byte(segments(process)[0])
    group = client.take("train", "batch", 0)
    assert group is not None
    with pytest.raises(grpc.RpcError, match="damaged on disk") as error:
        screenshots(client, group)
    assert error.value.code() is grpc.StatusCode.DATA_LOSS
    assert client.take("train", "batch", 0) is None
    assert play_again(client, 1) == ["train/0.1"]
    group = client.take("train", "batch", 0, wait_s=_DEADLINE_S)
    assert group is not None and len(screenshots(client, group)) == 4
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as page:
        assert "deskrl_replay_damaged_episodes_total 1.0" in page.read().decode()


def test_a_running_episode_that_is_damaged_loses_its_lease_and_is_granted_again(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    client.stream([begin(lease), *steps(lease, range(2))])
    process.kill()
    damage_row(process.folder, "UPDATE rollouts SET num_steps = 1")
    process.start()
    client = process.client()
    assert client.extend(lease.lease_id) == []
    assert play_again(client, 1) == [lease.rollout.episode_id]


def test_a_damaged_success_is_no_longer_offered(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.run_group("train/0", [0.0, 1.0])
    client.take("train", "batch 0", 0)
    client.commit("train", "batch 0")
    client.run_group("train/1", [0.0, 0.0])
    group = client.take("train", "batch 1", 0)
    assert group is not None and group.candidate.episode_id == "train/0.1"
    process.kill()
    damage_row(process.folder, "UPDATE steps SET payload = zeroblob(length(payload)) WHERE rollout = 2")
    process.start()
    client = process.client()
    group = client.take("train", "batch 1", 0, wait_s=_DEADLINE_S)
    assert group is not None and not group.HasField("candidate") and len(group.episodes) == 2
    assert not client.acquire().lease_id, "an episode of a consumed group is not played again"
    assert not client.status().successes
    with pytest.raises(grpc.RpcError, match="damaged after its batch was committed"):
        client.take("train", "batch 0", 0)


def test_a_damaged_episode_of_an_evaluation_is_refused_and_played_again(start_replay: StartReplay) -> None:
    process = start_replay()
    process.client().run_group("eval/0", [0.0, 1.0])
    process.stop()
    damage_row(process.folder, "UPDATE steps SET payload = zeroblob(length(payload)) WHERE rollout = 1")
    process.start()
    client = process.client()
    with pytest.raises(grpc.RpcError, match=r"episode eval/0\.0 is damaged \(step 0") as error:
        client.episodes()
    assert error.value.code() is grpc.StatusCode.DATA_LOSS
    assert play_again(client, 1) == ["eval/0.0"]
    assert {episode.episode_id for episode in client.episodes()} == {"eval/0.0", "eval/0.1"}


def failed_start(process: ReplayProcess, *prefix: str) -> str:
    command = [*prefix, sys.executable, "-m", "deskrl.cli.main", "replay", str(process.config.run_dir / "config.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == USER_ERROR_STATUS, ended.stderr
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("UPDATE groups SET num_planned = num_planned + 1", "groups"),
        ("UPDATE counters SET value = value + 1", "counters"),
        ("UPDATE leases SET holder = 'another'", "leases"),
    ],
)
def test_damage_beyond_episodes_is_refused_in_one_line_that_says_what_to_restore(
    start_replay: StartReplay, statement: str, table: str
) -> None:
    process = start_replay()
    process.client().run_group("train/0", [0.0, 1.0])
    process.stop()
    damage_row(process.folder, statement)
    before = (process.folder / "replay.sqlite").read_bytes()
    line = failed_start(process)
    assert line.startswith(f"deskrl: {process.folder / 'replay.sqlite'}: damaged: ") and table in line
    assert "restore the file from a copy" in line
    assert (process.folder / "replay.sqlite").read_bytes() == before


def test_a_database_that_is_damaged_while_replay_runs_ends_it_in_one_line_that_says_what_to_restore(
    start_replay: StartReplay,
) -> None:
    process = start_replay()
    client = process.client()
    client.plan("eval/0", num=40)
    for _ in range(40):
        client.run_episode(client.acquire(), reward=1.0, num_steps=15)
    process.stop()
    process.start()
    path = process.folder / "replay.sqlite"
    content = bytearray(path.read_bytes())
    for page in range(1, len(content) // 4096):
        content[page * 4096 : page * 4096 + 8] = b"\xff" * 8
    with open(path, "r+b") as file:
        file.write(content)
    with pytest.raises(grpc.RpcError):
        process.client().episodes()
    assert process.process.wait(_DEADLINE_S) == USER_ERROR_STATUS
    process.wait_for_log("deskrl: ")
    (line,) = [line for line in (process.config.run_dir / "replay.log").read_text().splitlines() if "deskrl: " in line]
    assert str(path) in line and "restore the file from a copy" in line


def test_a_store_without_checksums_is_migrated_and_keeps_everything(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.run_group("train/0", [0.0, 1.0])
    client.take("train", "batch", 0)
    client.run_group("train/1", [0.0, 0.0])
    client.plan("train/2")
    lease = client.acquire()
    before = client.episodes()
    process.kill()
    make_schema_3(process.folder)
    with StoreReader(process.folder).snapshot() as snapshot:
        assert {it.episode_id for it in snapshot.list_episodes(EpisodeFilter())} == {it.episode_id for it in before}
        assert all(len(snapshot.read_steps(it)) == 2 for it in snapshot.list_episodes(EpisodeFilter()))
    process.start()
    client = process.client()
    assert client.episodes() == before
    assert client.extend(lease.lease_id) == [lease.lease_id]
    for ordinal in range(2):
        group = client.take("train", "batch", ordinal)
        assert group is not None and len(screenshots(client, group)) == 4
    client.run_episode(lease, reward=1.0)
    process.stop()
    damage_row(process.folder, "UPDATE rollouts SET reward = 0.75 WHERE id = 3")
    process.start()
    assert play_again(process.client(), 2)[0] == "train/1.0", "what was migrated has checksums"


def test_a_store_without_checksums_that_a_viewer_reads_is_not_migrated(start_replay: StartReplay) -> None:
    process = start_replay()
    process.client().run_group("train/0", [0.0, 1.0])
    process.stop()
    make_schema_3(process.folder)
    with StoreReader(process.folder).snapshot() as snapshot:
        assert snapshot.newest_ending() == 2
        assert "cannot be migrated while another process reads it (hint: close viewers" in failed_start(process)
    process.start()
    assert len(process.client().episodes()) == 2


def test_a_migration_on_a_full_disk_loses_nothing(start_replay: StartReplay) -> None:
    process = start_replay()
    process.client().run_group("train/0", [0.0, 1.0])
    process.stop()
    make_schema_3(process.folder)
    assert "the disk is full (hint: free some space" in failed_start(process, "prlimit", "--fsize=50000")
    assert not (process.folder / "replay.sqlite.migrated").exists()
    process.start()
    assert len(process.client().episodes()) == 2


def test_a_damaged_definition_of_a_table_is_refused(start_replay: StartReplay) -> None:
    process = start_replay()
    process.stop()
    path = process.folder / "replay.sqlite"
    content = path.read_bytes()
    assert content.count(b"DEFAULT 'open'") == 1
    path.write_bytes(content.replace(b"DEFAULT 'open'", b"DEFAULT 'oxen'"))
    assert "definition of a table" in failed_start(process)
    with pytest.raises(UserError, match="definition of a table"):
        StoreReader(process.folder)


def test_a_damaged_index_is_rebuilt(start_replay: StartReplay) -> None:
    process = start_replay()
    process.client().run_group("train/0", [0.0, 1.0])
    process.stop()
    path = process.folder / "replay.sqlite"
    content = path.read_bytes()
    name = b"train/0.1"  # in rollouts, rollout_plans and the index on the episode id
    positions = [index for index in range(len(content)) if content.startswith(name, index)]
    for position in positions:
        path.write_bytes(content[:position] + b"trajn" + content[position + 5 :])
        process.start()
        client = process.client()
        names = {episode.episode_id for episode in client.episodes()} | {client.acquire().rollout.episode_id}
        assert names - {""} == {"train/0.0", "train/0.1"}
        process.stop()
