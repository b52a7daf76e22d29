"""Durability of the store: kill -9 while writing, restarts, a full disk, and files that are rejected at start."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from replay_kit import (
    TEST_PEER,
    OpenStream,
    ReplayClient,
    ReplayProcess,
    StartReplay,
    begin,
    replay_config,
    result,
    screenshot,
    steps,
)

from deskrl.core.rpc import VERSION
from deskrl.core.step_codec import decode_step
from deskrl.proto.v1 import rollout_pb2

NUM_KILLS = 5
NUM_WRITERS = 3
SHOT_BYTES = 100_000


def write_until_killed(
    client: ReplayClient, acked_steps: dict[str, int], closed: set[str], enough: threading.Event
) -> None:
    """Run episodes one after another and record the acknowledgements until the service is killed."""
    try:
        while lease := client.acquire():
            name = lease.rollout.episode_id
            requests = [begin(lease), *steps(lease, range(6), SHOT_BYTES), result(1, 6)]
            for response in client.rollout.StreamEpisode(iter(requests), timeout=60):
                acked_steps[name] = response.acked_steps
                if response.closed:
                    closed.add(name)
                if len(acked_steps) >= 2 * NUM_WRITERS:
                    enough.set()
    except grpc.RpcError:
        enough.set()


def test_nothing_acknowledged_is_lost_to_kill_9_while_writing(start_replay: StartReplay) -> None:
    process = start_replay()
    process.client().plan("eval/0", num=400)
    closed: set[str] = set()
    for _ in range(NUM_KILLS):
        acked_steps: dict[str, int] = {}
        enough = threading.Event()
        writers = [
            threading.Thread(target=write_until_killed, args=(process.client(), acked_steps, closed, enough))
            for _ in range(NUM_WRITERS)
        ]
        for writer in writers:
            writer.start()
        assert enough.wait(20)
        process.kill()
        for writer in writers:
            writer.join()
        with sqlite3.connect(process.folder / "replay.sqlite") as database:
            stored = dict(database.execute("SELECT episode_id, num_steps FROM rollouts WHERE num_steps > 0"))
            num_rows = dict(
                database.execute("SELECT episode_id, count(*) FROM steps JOIN rollouts r ON r.id = rollout GROUP BY 1")
            )
        database.close()
        assert num_rows == stored
        assert {name: num for name, num in acked_steps.items() if stored.get(name, 0) < num} == {}
        process.start()
        client = process.client()
        finished = {episode.episode_id: episode for episode in client.episodes()}
        assert closed <= finished.keys()
    for episode in list(finished.values())[-5:]:
        assert len(episode.steps) == 6
        shots = client.fetch(decode_step(payload).screenshot for payload in episode.steps)
        assert [len(shot) for shot in shots] == [SHOT_BYTES] * 6


def test_a_running_episode_survives_a_restart_of_replay(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    stream = OpenStream(client)
    stream.send(begin(lease), *steps(lease, range(2)))
    stream.read_until(2)
    process.kill()
    stream.break_off()
    process.start()

    client = process.client()
    assert client.extend(lease.lease_id) == [lease.lease_id]
    assert not client.acquire().lease_id, "the rollout is still leased"
    acks = client.stream([begin(lease), *steps(lease, range(2, 4)), result(1, 4)])
    assert (acks[0], acks[-1]) == ((2, False), (4, True))
    (episode,) = client.episodes()
    shots = client.fetch(decode_step(payload).screenshot for payload in episode.steps)
    assert shots == [screenshot(lease, index) for index in range(4)]


def test_a_lease_whose_holder_died_with_replay_expires_after_the_restart(start_replay: StartReplay) -> None:
    process = start_replay(lease_ttl_s=0.5)
    client = process.client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    process.kill()
    process.start()
    assert process.client().acquire(wait_s=20).rollout == lease.rollout


def test_the_rate_limit_survives_a_restart(start_replay: StartReplay) -> None:
    process = start_replay(staleness=0)
    client = process.client()
    client.plan("train/1")
    client.run_group("train/0", [0, 1])
    client.take("train", "batch", 0)
    client.set_updates(1)
    process.kill()
    process.start()
    client = process.client()
    assert client.acquire().lease_id and client.acquire().lease_id
    client.plan("train/2")
    assert not client.acquire().lease_id


def test_sigterm_stops_the_service_gracefully_even_with_waiting_callers(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    request = rollout_pb2.AcquireLeaseRequest(peer=TEST_PEER, request_id="waits for an hour", wait_s=3600)
    waiting = client.rollout.AcquireLease.future(request)
    stream = OpenStream(client)
    stream.send(begin(lease), *steps(lease, [0]))
    stream.read_until(1)
    status, log = process.stop()
    assert status == 0
    assert "Traceback" not in log
    assert not waiting.result(timeout=60).lease_id, "answered that there is no work, not disconnected"
    stream.break_off()


def failed_start(process: ReplayProcess) -> str:
    """Start the service, which must end with status 2, and return the line that it prints."""
    command = [sys.executable, "-m", "deskrl.cli.main", "replay", str(process.config.run_dir / "config.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    return line


def store_an_episode(process: ReplayProcess) -> None:
    """Run one episode and stop the service."""
    client = process.client()
    client.plan("eval/0", num=1)
    lease = client.acquire()
    client.stream([begin(lease), *steps(lease, range(5), SHOT_BYTES), result(1, 5)])
    process.stop()


def test_a_truncated_database_is_rejected_and_not_changed(start_replay: StartReplay) -> None:
    process = start_replay()
    store_an_episode(process)
    path = process.folder / "replay.sqlite"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"not a database at all" * 1000):
        path.write_bytes(damaged)
        Path(f"{path}-wal").unlink(missing_ok=True)
        if not damaged:
            Path(f"{path}-wal").write_bytes(b"a log without its database")
        line = failed_start(process)
        assert str(path) in line and "restore the file" in line
        assert path.read_bytes() == damaged
    Path(f"{path}-wal").unlink(missing_ok=True)
    path.write_bytes(whole)
    process.start()
    assert len(process.client().episodes()) == 1


def test_the_write_ahead_log_of_a_damaged_database_is_not_changed(start_replay: StartReplay) -> None:
    process = start_replay()
    client = process.client()
    client.plan("eval/0", num=1)
    process.stop()  # moves everything into the file; what follows is in the log only
    process.start()
    client = process.client()
    client.run_episode(client.acquire(), reward=1)
    process.kill()
    path = process.folder / "replay.sqlite"
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    before = {file.name: file.read_bytes() for file in (path, Path(f"{path}-wal"))}
    assert str(path) in failed_start(process)
    assert {name: (process.folder / name).read_bytes() for name in before} == before
    path.write_bytes(whole)
    process.start()
    assert len(process.client().episodes()) == 1


def test_truncated_or_missing_screenshots_are_rejected_and_not_changed(start_replay: StartReplay) -> None:
    process = start_replay()
    store_an_episode(process)
    (path,) = (process.folder / "screenshots").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{path}: truncated" in failed_start(process)
    path.unlink()
    assert f"{path}: not found" in failed_start(process)
    path.write_bytes(whole)
    process.start()
    assert len(process.client().episodes()) == 1


def test_screenshots_without_their_database_are_rejected_and_not_changed(start_replay: StartReplay) -> None:
    """A new store would remove screenshots that no row names."""
    process = start_replay()
    store_an_episode(process)
    path, (segment,) = process.folder / "replay.sqlite", (process.folder / "screenshots").iterdir()
    whole, screenshots = path.read_bytes(), segment.read_bytes()
    path.unlink()
    assert f"{path}: not found, but its screenshots exist" in failed_start(process)
    assert segment.read_bytes() == screenshots and not path.exists()
    path.write_bytes(whole)
    process.start()


def test_a_database_of_another_application_is_rejected_and_not_changed(start_replay: StartReplay) -> None:
    process = start_replay()
    process.stop()
    path = process.folder / "replay.sqlite"
    path.unlink()
    with sqlite3.connect(path) as foreign:
        foreign.execute("CREATE TABLE photographs (id INTEGER)")
    foreign.close()
    before = path.read_bytes()
    assert "not a replay database of deskrl" in failed_start(process)
    assert path.read_bytes() == before


def alter_database(path: Path, statements: str, *, keep_log: bool = False) -> None:
    """Execute statements in a process of its own, whose end leaves them in the write-ahead log if `keep_log`."""
    code = (
        "import os, sqlite3, sys; connection = sqlite3.connect(sys.argv[1], isolation_level=None);"
        f"connection.executescript(sys.argv[2]); {'os._exit(0)' if keep_log else 'connection.close()'}"
    )
    subprocess.run([sys.executable, "-c", code, str(path), statements], check=True)


@pytest.mark.parametrize("keep_log", [False, True], ids=["no log", "write-ahead log"])
@pytest.mark.parametrize(("schema", "age"), [(1, "an older"), (1000, "a newer")])
def test_a_store_of_another_version_is_rejected_naming_that_version_and_not_changed(
    start_replay: StartReplay, schema: int, age: str, keep_log: bool
) -> None:
    process = start_replay()
    store_an_episode(process)
    path = process.folder / "replay.sqlite"
    other_version = f"UPDATE counters SET name = 'created_by/0.0.7' WHERE name = 'created_by/{VERSION}'"
    alter_database(
        path, f"DROP TRIGGER counters_updated; {other_version}; PRAGMA user_version = {schema}", keep_log=keep_log
    )
    assert Path(f"{path}-wal").exists() is keep_log
    before = {it: it.read_bytes() for it in process.folder.rglob("*") if it.is_file() and it.suffix != ".sqlite-shm"}
    line = failed_start(process)
    assert (
        f"{path}: created by {age} deskrl 0.0.7 with store schema {schema}; deskrl {VERSION} reads schemas 3 and 4"
        in line
    )
    assert {it: it.read_bytes() for it in before} == before


def test_a_port_in_use_and_a_store_in_use_are_rejected(start_replay: StartReplay) -> None:
    process, other = start_replay(), start_replay()
    assert "is in use by another replay service" in failed_start(process)
    other.stop()
    address = process.config.replay.address
    taken = other.config.model_copy(update={"replay": other.config.replay.model_copy(update={"address": address})})
    (other.config.run_dir / "config.json").write_text(taken.model_dump_json())
    assert f"cannot listen on {address}" in failed_start(other)


def small_disk(folder: Path) -> list[str]:
    """Return a command prefix that mounts a 24 MB disk at `folder`, in a new mount namespace."""
    mount = f'mount -t tmpfs -o size=24m,mode=0777 tmpfs "{folder}" && exec "$@"'
    prefix = [
        "unshare",
        *([] if os.getuid() == 0 else ["--map-root-user", "--user"]),
        "--mount",
        "sh",
        "-c",
        mount,
        "sh",
    ]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted here")
    return prefix


def test_on_a_full_disk_writes_are_rejected_until_there_is_space(tmp_path: Path) -> None:
    config = replay_config(tmp_path)
    (config.run_dir / "replay").mkdir(parents=True)
    process = ReplayProcess(config, prefix=small_disk(config.run_dir / "replay"))
    try:
        client = process.client()
        client.plan("eval/0", num=1)
        lease = client.acquire()
        ballast = Path(f"/proc/{process.process.pid}/root{config.run_dir}/replay/ballast")
        ballast.write_bytes(bytes(16 * 1024**2))
        requests = [begin(lease), *steps(lease, range(15), 1_000_000), result(1, 15)]
        num_acked = 0
        with pytest.raises(grpc.RpcError) as rejected:
            for response in client.rollout.StreamEpisode(iter(requests), timeout=60):
                num_acked = response.acked_steps
        assert rejected.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "free some space" in str(rejected.value.details())
        for _ in range(2):
            with pytest.raises(grpc.RpcError):
                client.stream(requests)
        assert client.extend(lease.lease_id) == [lease.lease_id], "the service keeps running"
        ballast.unlink()
        acks = client.stream([begin(lease), *steps(lease, range(num_acked, 15), 1_000_000), result(1, 15)])
        assert acks[-1] == (15, True)
        status, log = process.stop()
        assert status == 0
        assert log.count("the disk is full") == 1, "logged once"
    finally:
        process.close()
