"""A whole run on this machine, every part real: whatever is killed, it goes on, and nothing of it remains."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ports_kit import free_port

from deskrl.core.rpc import VERSION
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.supervisor import describe_leftovers

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"
DEADLINE_S = 300.0
NUM_UPDATES = 7


class Run:
    """`deskrl up` of a small run, as a person at a shell has it."""

    def __init__(self, runs: Path) -> None:
        self.folder = RunFolder(runs / "drill")
        settings = {
            "runs": str(runs),
            "name": "drill",
            "tasks.tasks": '["write-a-word", "make-a-folder"]',
            "tasks.rollouts": "4",
            "desktop.num_envs": "2",
            "replay.address": f"127.0.0.1:{free_port()}",
            **{f"{role}.metrics_port": str(free_port()) for role in ("replay", "inference", "learner", "actor")},
            "inference.address": f"127.0.0.1:{free_port()}",
            "learner.warm_start.demos_per_task": "2",
            "learner.warm_start.stop_likelihood": "0.2",
            "learner.grpo.num_updates": str(NUM_UPDATES),
            "learner.grpo.groups_per_batch": "1",
            "learner.eval.episodes": "0",
        }
        self._arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """The command; the same for a first start and for a resumption."""
        command = [sys.executable, "-m", "deskrl.core.cli", "up", str(SMOKE), *self._arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def signal(self, number: int) -> None:
        """To the supervisor."""
        assert self.process is not None
        self.process.send_signal(number)

    def finish(self) -> tuple[int, str]:
        """Wait for the command's own end: its status and what it printed."""
        assert self.process is not None
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, output

    def role(self, *words: str) -> psutil.Process:
        """The process of a role."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            arguments = child.cmdline()
            if all(word in arguments for word in words):
                return child
        raise AssertionError(f"no process of {words}")

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """Lines of this kind so far."""
        return list(self.folder.read_metrics(kind))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until something has come to be; a run that ended without it fails the test."""
        assert self.process is not None
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.finish()[1][-3000:]
            assert time.monotonic() < deadline, "it did not come to be"
            time.sleep(0.1)

    def wait_for_update(self, number: int) -> None:
        """Until so many updates are done."""
        self.wait_for(lambda: bool(self.metrics("update")) and self.metrics("update")[-1]["update"] >= number)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What replay has on disk."""
        database = sqlite3.connect(f"file:{self.folder.root}/replay/replay.sqlite?mode=ro", uri=True, timeout=10)
        try:
            return database.execute(sql).fetchall()
        finally:
            database.close()

    def finished_episodes(self) -> dict[str, tuple[float, int]]:
        """Reward and number of steps of every episode that replay acknowledged."""
        rows = self.query("SELECT episode_id, reward, num_steps FROM rollouts WHERE state = 'finished'")
        return {episode: (reward, num_steps) for episode, reward, num_steps in rows}

    def close(self) -> None:
        """End what a failed test leaves."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=60)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    drill = Run(tmp_path)
    yield drill
    drill.close()


def test_whatever_is_killed_the_run_goes_on_and_nothing_is_lost_or_learnt_twice(run: Run) -> None:
    run.start()
    run.wait_for_update(1)
    check_every_role_is_seen(run)
    kept: dict[str, tuple[float, int]] = {}
    victims = [("actor", "--index"), ("replay",), ("inference", "--index"), ("learner",)]
    for number, victim in enumerate(victims, start=1):
        run.wait_for_update(number)
        kept |= run.finished_episodes()
        run.role(*victim).kill()
        run.wait_for(lambda number=number: len(run.metrics("restart")) >= number)

    run.wait_for_update(5)
    run.signal(signal.SIGTERM)
    status, output = run.finish()
    assert status == 130, output[-2000:]
    assert "the same command resumes" in output
    assert describe_leftovers(run.folder) == []
    kept |= run.finished_episodes()

    run.start()
    run.wait_for_update(6)
    run.signal(signal.SIGKILL)
    run.finish()

    run.start()
    status, output = run.finish()
    assert "resuming" in output
    assert status == 1, "its own table says that it was restarted"
    check_nothing_lost_or_learnt_twice(run, kept)
    verdicts = {row["criterion"]: row["ok"] for row in json.loads((run.folder.results / "acceptance.json").read_text())}
    assert verdicts["nothing is left"]
    assert verdicts["the checkpoint is valid"]
    assert not verdicts["it finishes"]
    assert describe_leftovers(run.folder) == []


def check_every_role_is_seen(run: Run) -> None:
    """`deskrl status` and `deskrl top` beside the run, while all is well."""

    def deskrl(*command: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "deskrl.core.cli", *command, str(run.folder.root)]
        return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})

    status = deskrl("status")
    told = status.stdout
    assert status.returncode == 0, told + status.stderr
    for role in ("replay", "inference-0", "learner", "actor-0"):
        assert re.search(rf"{role} +│ well +│ {re.escape(VERSION)}", told), told
    top = deskrl("top", "--interval", "1")
    assert top.returncode == 0, top.stderr
    assert "4 of 4 answer" in top.stdout
    assert re.search(r"updates +[1-7] ", top.stdout), top.stdout


def check_nothing_lost_or_learnt_twice(run: Run, kept: dict[str, tuple[float, int]]) -> None:
    finished = run.finished_episodes()
    assert {episode: finished.get(episode) for episode in kept} == kept, "an acknowledged episode changed"
    batches = run.query("SELECT batch_id, committed FROM batches WHERE queue = 'train' ORDER BY batch_id")
    assert batches == [(f"train/{number:06d}", 1) for number in range(1, NUM_UPDATES + 1)]
    # A group belongs to one batch by its very row; none may have been learnt from and be offered again.
    assert run.query("SELECT count(*) FROM groups WHERE batch_id IS NOT NULL AND state <> 'consumed'") == [(0,)]
    newest = {update["update"]: update for update in run.metrics("update")}
    assert sorted(newest) == list(range(1, NUM_UPDATES + 1)), "the counter goes on where it was"
    assert run.query("SELECT coalesce(sum(num_used), 0) FROM success_uses") == [
        (sum(update["replayed"] for update in newest.values()),)
    ]


def test_ctrl_c_ends_it_at_any_time_and_nothing_is_left(run: Run) -> None:
    for moment in ("demonstrations", "imitation"):
        run.start()
        run.wait_for(lambda moment=moment: any(line["phase"] == moment for line in run.metrics("phase")))
        started_s = time.monotonic()
        run.signal(signal.SIGINT)
        status, output = run.finish()
        assert status == 130, output[-2000:]
        assert time.monotonic() - started_s < DEADLINE_S
        assert describe_leftovers(run.folder) == []
        assert not run.metrics("stop_timeout"), "every role ended by itself"


def test_a_second_start_of_the_same_run_is_refused(run: Run) -> None:
    run.start()
    run.wait_for(lambda: bool(run.metrics("phase")))
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "deskrl.core.cli", "up", str(SMOKE), *run._arguments]
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1, again.stderr
    run.signal(signal.SIGINT)
    assert run.finish()[0] == 130
