"""A small run that is started, stopped and resumed as from a shell, with checks of what it leaves behind."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from ports_kit import free_port

from deskrl.core.rpc import VERSION
from deskrl.core.run_dir import RunDir

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"
DEADLINE_S = 300.0


class Run:
    """`deskrl up` of a small run, started as from a shell."""

    def __init__(self, runs: Path, num_updates: int) -> None:
        self.folder = RunDir(runs / "drill")
        self.num_updates = num_updates
        settings = {
            "runs": str(runs),
            "name": "drill",
            "tasks.ids": '["write-a-word", "make-a-folder"]',
            "tasks.num_rollouts": "4",
            "desktop.num_envs": "2",
            "replay.address": f"127.0.0.1:{free_port()}",
            **{f"{role}.metrics_port": str(free_port()) for role in ("replay", "inference", "learner", "actor")},
            "inference.address": f"127.0.0.1:{free_port()}",
            "learner.warm_start.demos_per_task": "2",
            "learner.warm_start.stop_likelihood": "0.2",
            "learner.grpo.num_updates": str(num_updates),
            "learner.grpo.groups_per_batch": "1",
            "learner.eval.num_episodes": "0",
        }
        arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
        self._command = [sys.executable, "-m", "deskrl.cli.main", "up", str(SMOKE), *arguments]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the command; a resumption is the same command."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def check_second_start_is_rejected(self) -> None:
        """Start the command once more beside the running one."""
        environment = {**os.environ, "COLUMNS": "200"}
        again = subprocess.run(self._command, capture_output=True, text=True, env=environment, timeout=60)
        assert again.returncode == 2
        assert len(again.stderr.strip().splitlines()) == 1, again.stderr

    def signal(self, number: int) -> None:
        """Send a signal to the supervisor."""
        assert self.process is not None
        self.process.send_signal(number)

    def finish(self) -> tuple[int, str]:
        """Wait until the command exits; returns its status and output."""
        assert self.process is not None
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, output

    def role(self, *words: str) -> psutil.Process:
        """Return the process of a role, found by words of its command line."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            arguments = child.cmdline()
            if all(word in arguments for word in words):
                return child
        raise AssertionError(f"no process of {words}")

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """Return the metrics lines of this kind so far."""
        return list(self.folder.read_metrics(kind))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fails if the run ends first."""
        assert self.process is not None
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.finish()[1][-3000:]
            assert time.monotonic() < deadline, "the condition did not become true in time"
            time.sleep(0.1)

    def wait_for_update(self, number: int) -> None:
        """Wait until this many updates are done."""
        self.wait_for(lambda: bool(self.metrics("update")) and self.metrics("update")[-1]["update"] >= number)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Query the replay store on disk."""
        database = sqlite3.connect(f"file:{self.folder.root}/replay/replay.sqlite?mode=ro", uri=True, timeout=10)
        try:
            return database.execute(sql).fetchall()
        finally:
            database.close()

    def finished_episodes(self) -> dict[str, tuple[float, int]]:
        """Return reward and number of steps of every finished episode."""
        rows = self.query("SELECT episode_id, reward, num_steps FROM rollouts WHERE state = 'finished'")
        return {episode: (reward, num_steps) for episode, reward, num_steps in rows}

    def close(self) -> None:
        """Terminate a run that a failed test left running."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=60)


def check_status_and_top(run: Run) -> None:
    """Check `deskrl status` and `deskrl top` beside a healthy run."""

    def deskrl(*command: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "deskrl.cli.main", *command, str(run.folder.root)]
        return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})

    status = deskrl("status")
    output = status.stdout
    assert status.returncode == 0, output + status.stderr
    for role in ("replay", "inference-0", "learner", "actor-0"):
        assert re.search(rf"{role} +│ healthy +│ {re.escape(VERSION)}", output), output
    top = deskrl("top", "--interval", "1")
    assert top.returncode == 0, top.stderr
    assert "4 of 4 reachable" in top.stdout
    assert re.search(r"updates +[1-7] ", top.stdout), top.stdout


def check_no_episode_is_lost_or_repeated(run: Run, kept: dict[str, tuple[float, int]]) -> None:
    """Check the replay store of a finished run against the episodes that were acknowledged before."""
    finished = run.finished_episodes()
    assert {episode: finished.get(episode) for episode in kept} == kept, "an acknowledged episode changed"
    batches = run.query("SELECT batch_id, committed FROM batches WHERE queue = 'train' ORDER BY batch_id")
    assert batches == [(f"train/{number:06d}", 1) for number in range(1, run.num_updates + 1)]
    # The row of a group names its batch; no consumed group may be offered again.
    assert run.query("SELECT count(*) FROM groups WHERE batch_id IS NOT NULL AND state <> 'consumed'") == [(0,)]
    newest = {update["update"]: update for update in run.metrics("update")}
    assert sorted(newest) == list(range(1, run.num_updates + 1)), "the update counter continues"
    assert run.query("SELECT coalesce(sum(num_used), 0) FROM success_uses") == [
        (sum(update["replayed"] for update in newest.values()),)
    ]
