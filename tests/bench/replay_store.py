"""Benchmark of the replay service against dm-reverb and bare SQLite: episodes of 15 screenshots, written and read back.

dm-reverb keeps the same bytes in memory, in a server of its own that is reached over gRPC (`reverb_peer.py`). Bare
SQLite stores them durably like the service, with the same number of commits: in each turn the service runs first, and
its commits are counted by its own metric; as many are then spread over the bare inserts, which use the page size that
is best for screenshots. The time of the service includes everything that a caller waits for: gRPC, the checks of hashes
and steps, leases and groups.
Prints one JSON line; `ratio` is the time of dm-reverb over that of the service, for writing and reading together, and
`sqlite_ratio` that of bare SQLite, each as the median of the turns. `…_server_s_per_gb` are processor seconds of the
service, and of dm-reverb's server.

    python tests/bench/replay_store.py [--turns 5] [--episodes 32] [--actors 4] [--reverb PYTHON]

PYTHON is the interpreter of an environment with dm-reverb 0.14 and TensorFlow 2.14, which need Python 3.11 and NumPy 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kit"))

import grpc
import psutil
from ports_kit import free_ports

from deskrl.core import ids, malloc_tuning, rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.step_codec import Step, VersionSpan, decode_step, encode_step
from deskrl.proto.v1 import common_pb2, replay_pb2, replay_pb2_grpc, rollout_pb2, rollout_pb2_grpc

STEPS = 15
SHOT_BYTES = 200_000
PROMPT_TOKENS = 1500
ACTION_TOKENS = 40
GROUP = 8
BENCH_PEER = rpc.peer("actor", "bench")


@dataclass(frozen=True)
class Turn:
    """Duration of writing and reading of one side in one turn."""

    write_s: float
    read_s: float
    write_server_s: float = 0.0
    """Processor seconds of the server; 0 without one."""
    read_server_s: float = 0.0


Episode = list[tuple[bytes, str, bytes]]
"""Screenshot, its hash and the encoded step, for each step."""


def make_episode() -> Episode:
    """Return an episode with incompressible screenshots."""
    episode = []
    for index in range(STEPS):
        shot = os.urandom(SHOT_BYTES)
        name = ids.image_hash(shot)
        step = Step(
            index=index,
            screenshot=name,
            images=(name,),
            text="click(start_box='(10,10)')",
            prompt_ids=tuple(range(PROMPT_TOKENS)),
            action_ids=tuple(range(ACTION_TOKENS)),
            logprobs=(-0.5,) * ACTION_TOKENS,
            spans=(VersionSpan("bench", 1, 0, ACTION_TOKENS),),
        )
        episode.append((shot, name, encode_step(step)))
    return episode


class Service:
    """Replay process with a new run directory, and its clients."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(2)
        config = RunConfig.model_validate(
            {"runs": folder, "replay": {"address": f"127.0.0.1:{ports[0]}", "metrics_port": ports[1]}}
        )
        config.run_dir.mkdir(parents=True)
        dump_config(config, config.run_dir / "config.json")
        command = [sys.executable, "-m", "deskrl.cli.main", "replay", str(config.run_dir / "config.json")]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._address = config.replay.address
        self._metrics = f"http://127.0.0.1:{ports[1]}/metrics"
        with rpc.connect_sync(self._address) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)

    def close(self) -> None:
        """Stop the process."""
        self._process.terminate()
        self._process.wait()

    def processor_s(self) -> float:
        """Return the processor seconds that the process has used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def num_commits(self) -> int:
        """Return the number of transactions so far, from the metrics of the service."""
        with urllib.request.urlopen(self._metrics) as page:
            lines = page.read().decode().splitlines()
        return int(
            float(next(line for line in lines if line.startswith("deskrl_replay_commit_seconds_count")).split()[1])
        )

    def turn(self, episodes: list[Episode], queue: str, num_actors: int) -> tuple[Turn, int]:
        """Write and read the episodes, and return the durations and the number of commits of the writing."""
        return asyncio.run(self._turn(episodes, queue, num_actors))

    async def _turn(self, episodes: list[Episode], queue: str, num_actors: int) -> tuple[Turn, int]:
        async with rpc.connect(self._address) as channel:
            rollout = rollout_pb2_grpc.RolloutServiceStub(channel)
            replay = replay_pb2_grpc.ReplayServiceStub(channel)
            num_groups = len(episodes) // GROUP
            await replay.PlanGroups(plan(queue, num_groups))
            num_before = self.num_commits()

            waiting = [requests_of(episode) for episode in episodes]
            before_s, start_s = self.processor_s(), time.perf_counter()
            async with asyncio.TaskGroup() as actors:
                for _ in range(num_actors):
                    actors.create_task(act(rollout, waiting))
            write_s, written_s = time.perf_counter() - start_s, self.processor_s()
            num_commits = self.num_commits() - num_before

            start_s = time.perf_counter()
            num_bytes = sum(
                await asyncio.gather(*(fetch_group(replay, queue, ordinal) for ordinal in range(num_groups)))
            )
            read_s = time.perf_counter() - start_s
            assert num_bytes == len(episodes) * STEPS * SHOT_BYTES
            return Turn(write_s, read_s, written_s - before_s, self.processor_s() - written_s), num_commits


class Reverb:
    """dm-reverb and its clients, in processes of its own environment.

    Args:
        python: interpreter of the environment.
        num_episodes: episodes per turn.
        num_actors: number of episodes written concurrently.
    """

    def __init__(self, python: Path, num_episodes: int, num_actors: int) -> None:
        _, _, payload = make_episode()[0]
        sizes = {"episodes": num_episodes, "actors": num_actors, "steps": STEPS, "shot-bytes": SHOT_BYTES}
        options = [f"--{name}={value}" for name, value in sizes.items()] + [f"--payload-bytes={len(payload)}"]
        command = [str(python), str(Path(__file__).with_name("reverb_peer.py")), *options]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def turn(self) -> Turn:
        """Write and read episodes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Turn(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the processes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def open_reverb(python: Path | None, num_episodes: int, num_actors: int) -> Reverb | None:
    """Return dm-reverb; None, after a line that says so, where it is absent."""
    if python is None or not python.is_file():
        problem = f"no environment at {python}" if python else "no environment given (hint: --reverb PYTHON)"
    else:
        trial = subprocess.run([python, "-c", "import reverb"], capture_output=True, text=True, check=False)
        problem = (trial.stderr.splitlines() or ["it cannot be imported"])[-1] if trial.returncode else ""
    if python is None or problem:
        print(f"dm-reverb: skipped: {problem}", file=sys.stderr)
        return None
    return Reverb(python, num_episodes, num_actors)


def plan(queue: str, num_groups: int) -> replay_pb2.PlanGroupsRequest:
    """Return the plan of a turn."""
    groups = [
        replay_pb2.GroupPlan(
            group_id=ids.group_id(queue, ordinal),
            queue=queue,
            task_id="task",
            task_json=b"{}",
            seeds=range(GROUP),
            max_steps=STEPS,
            acting_policy=rollout_pb2.ACTING_POLICY_SAMPLED,
        )
        for ordinal in range(num_groups)
    ]
    return replay_pb2.PlanGroupsRequest(peer=BENCH_PEER, groups=groups)


def requests_of(episode: Episode) -> list[rollout_pb2.StreamEpisodeRequest]:
    """Return the messages of an actor after `begin`, prepared before the measurement like the rows of the bare side."""
    requests = []
    for index, (shot, name, payload) in enumerate(episode):
        step = rollout_pb2.EpisodeStep(index=index, image_hashes=[name], payload=payload)
        image = common_pb2.Image(hash=name, data=shot)
        requests.append(rollout_pb2.StreamEpisodeRequest(step=step, images=[image]))
    result = rollout_pb2.EpisodeResult(reward=1, num_steps=STEPS, termination=rollout_pb2.TERMINATION_FINISHED)
    return [*requests, rollout_pb2.StreamEpisodeRequest(result=result)]


async def act(stub: Any, waiting: list[list[rollout_pb2.StreamEpisodeRequest]]) -> None:
    """Lease and stream episodes until none is left, as an actor does."""
    while waiting:
        requests = waiting.pop()
        lease = await stub.AcquireLease(
            rollout_pb2.AcquireLeaseRequest(peer=BENCH_PEER, request_id=ids.new_id("request"))
        )
        call = stub.StreamEpisode()
        begin = rollout_pb2.EpisodeBegin(peer=BENCH_PEER, lease_id=lease.lease_id, episode_id=lease.rollout.episode_id)
        await call.write(rollout_pb2.StreamEpisodeRequest(begin=begin))
        for request in requests:
            await call.write(request)
        await call.done_writing()
        closed = [response.closed async for response in call]
        assert closed[-1]


async def fetch_group(stub: Any, queue: str, ordinal: int) -> int:
    """Take a group and fetch its screenshots, as the learner does, and return their size in bytes."""
    request = replay_pb2.TakeGroupRequest(peer=BENCH_PEER, queue=queue, batch_id=queue, ordinal=ordinal)
    group = (await stub.TakeGroup(request)).group
    names = [decode_step(payload).screenshot for episode in group.episodes for payload in episode.steps]
    num_bytes = 0
    async for response in stub.FetchImages(replay_pb2.FetchImagesRequest(hashes=names)):
        num_bytes += len(response.image.data)
    return num_bytes


def bare_turn(path: Path, episodes: list[Episode], num_commits: int) -> Turn:
    """Write the same bytes to SQLite and read them back, with one row per screenshot and one per step."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA page_size = 65536")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE images (hash TEXT PRIMARY KEY, data BLOB)")
    database.execute("CREATE TABLE steps (episode INTEGER, step INTEGER, payload BLOB, PRIMARY KEY (episode, step))")
    num_rows = len(episodes) * STEPS
    start_s = time.perf_counter()
    database.execute("BEGIN IMMEDIATE")
    row = 0
    for number, episode in enumerate(episodes):
        for index, (shot, name, payload) in enumerate(episode):
            database.execute("INSERT INTO images VALUES (?, ?)", (name, shot))
            database.execute("INSERT INTO steps VALUES (?, ?, ?)", (number, index, payload))
            row += 1
            if row * num_commits // num_rows > (row - 1) * num_commits // num_rows and row < num_rows:
                database.execute("COMMIT")
                database.execute("BEGIN IMMEDIATE")
    database.execute("COMMIT")
    write_s = time.perf_counter() - start_s

    start_s = time.perf_counter()
    num_bytes = 0
    for number in range(len(episodes)):
        steps = database.execute("SELECT payload FROM steps WHERE episode = ? ORDER BY step", (number,))
        for (payload,) in steps.fetchall():
            name = decode_step(payload).screenshot
            num_bytes += len(database.execute("SELECT data FROM images WHERE hash = ?", (name,)).fetchone()[0])
    read_s = time.perf_counter() - start_s
    assert num_bytes == num_rows * SHOT_BYTES
    database.close()
    return Turn(write_s, read_s)


def summary(name: str, turns: list[Turn], services: list[Turn], gigabytes: float) -> dict[str, float | None]:
    """Return throughput and processor time of a side, and the ratios of its times to those of the service.

    Args:
        name: prefix of the keys.
        turns: turns of the side; empty if it was skipped.
        services: turns of the service.
        gigabytes: size of the screenshots of a turn.
    """

    def median(values: list[float]) -> float | None:
        return round(statistics.median(values), 3) if values else None

    pairs = list(zip(turns, services, strict=True)) if turns else []
    report = {
        f"{name}_write_mb_per_s": median([1e3 * gigabytes / turn.write_s for turn in turns]),
        f"{name}_read_mb_per_s": median([1e3 * gigabytes / turn.read_s for turn in turns]),
    }
    if name != "sqlite":
        report[f"{name}_write_server_s_per_gb"] = median([turn.write_server_s / gigabytes for turn in turns])
        report[f"{name}_read_server_s_per_gb"] = median([turn.read_server_s / gigabytes for turn in turns])
    if name != "service":
        prefix = "" if name == "reverb" else f"{name}_"
        times = [(turn.write_s + turn.read_s) / (ours.write_s + ours.read_s) for turn, ours in pairs]
        report[f"{prefix}ratio"] = median(times)
        report[f"{prefix}write_ratio"] = median([turn.write_s / ours.write_s for turn, ours in pairs])
        report[f"{prefix}read_ratio"] = median([turn.read_s / ours.read_s for turn, ours in pairs])
    return report


def main() -> None:
    """Measure in turns and print one line."""
    parser = argparse.ArgumentParser(description="Benchmark the replay service against dm-reverb and bare SQLite.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=32, help=f"episodes per turn, a multiple of {GROUP}")
    parser.add_argument("--actors", type=int, default=4, help="number of episodes streamed concurrently")
    parser.add_argument("--reverb", type=Path, help="interpreter of an environment with dm-reverb", metavar="PYTHON")
    options = parser.parse_args()
    malloc_tuning.keep_freed_memory()  # as actors do

    sides: dict[str, list[Turn]] = {"reverb": [], "service": [], "sqlite": []}
    commits = []
    reverb = open_reverb(options.reverb, options.episodes, options.actors)
    with tempfile.TemporaryDirectory(prefix="deskrl-bench-") as folder:
        service = Service(Path(folder))
        try:
            for turn in range(options.turns + 1):
                episodes = [make_episode() for _ in range(options.episodes)]
                through_service, num_commits = service.turn(episodes, f"bench{turn}", options.actors)
                sides["service"].append(through_service)
                sides["sqlite"].append(bare_turn(Path(folder, f"bare{turn}.sqlite"), episodes, num_commits))
                sides["reverb"] += [reverb.turn()] if reverb is not None else []
                commits.append(num_commits)
        finally:
            service.close()
            if reverb is not None:
                reverb.close()

    gigabytes = options.episodes * STEPS * SHOT_BYTES / 1e9
    services = sides["service"][1:]  # the first turn warms up
    report: dict[str, Any] = {"bench": "replay_store"}
    for name, turns in sides.items():
        report |= summary(name, turns[1:], services, gigabytes)
    print(json.dumps(report | {"commits": commits[1:], "turns": options.turns, "episodes": options.episodes}))


if __name__ == "__main__":
    main()
