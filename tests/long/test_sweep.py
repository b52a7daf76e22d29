"""`deskrl sweep` with real runs on simulated desktops: a killed and a stopped sweep are resumed and finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from ports_kit import free_port

from deskrl.core.run_dir import RunDir
from deskrl.launch.supervisor import describe_leftovers

RUN = Path(__file__).parents[2] / "deploy" / "runs" / "simulated.toml"
ENV_STEPS = 60
DEADLINE_S = 600.0
FILE = f"""
name = "swept"
title = "Does importance weighting matter?"
run = "{RUN}"
seeds = [0]
[start]
[every]
learner.verify_checkpoint = false
learner.grpo = {{ num_updates = 50, max_env_steps = {ENV_STEPS}, groups_per_batch = 2 }}
replay.address = "127.0.0.1:REPLAY_PORT"
inference.address = "127.0.0.1:INFERENCE_PORT"
[arms.corrected]
[arms.uncorrected]
learner.grpo.importance_weighting = "off"
"""


class Command:
    """The `deskrl sweep` command with this file."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "sweep.toml"
        text = FILE.replace("REPLAY_PORT", str(free_port())).replace("INFERENCE_PORT", str(free_port()))
        self._file.write_text(text)
        self._runs = folder / "runs"
        self.root = self._runs / "swept"
        self.process: subprocess.Popen[str] | None = None

    def run_dir(self, name: str) -> RunDir:
        return RunDir(self.root / name)

    def start(self) -> None:
        command = [sys.executable, "-m", "deskrl.cli.main", "sweep", str(self._file), "--runs", str(self._runs)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self) -> tuple[int, str]:
        assert self.process is not None
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, output

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, "timed out"
            time.sleep(0.1)


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    yield command
    if command.process is not None and command.process.poll() is None:
        command.process.terminate()
        command.process.communicate(timeout=DEADLINE_S)


def test_a_killed_and_stopped_sweep_is_resumed_by_the_same_command(sweep: Command) -> None:
    start, corrected = sweep.run_dir("start-s0"), sweep.run_dir("corrected-s0")
    sweep.start()
    sweep.wait_for(lambda: any(True for _ in start.read_metrics("phase")))
    assert sweep.process is not None
    sweep.process.kill()
    sweep.finish()
    sweep.wait_for(lambda: describe_leftovers(start) == [])

    sweep.start()
    sweep.wait_for(lambda: any(True for _ in corrected.read_metrics("update")))
    sweep.process.send_signal(signal.SIGTERM)
    status, output = sweep.finish()
    assert status == 130 and "stopped; repeat the command to resume" in output, output
    assert "[2/3] corrected-s0: stopped after" in output and describe_leftovers(corrected) == []

    sweep.start()
    status, output = sweep.finish()
    assert status == 0, output
    assert "[1/3] start-s0: complete\n" in output and "[2/3] corrected-s0: resuming" in output
    check_results(sweep)

    reported_s = (sweep.root / "corrected-s0" / "report.html").stat().st_mtime
    sweep.start()
    status, output = sweep.finish()
    assert status == 0 and output.count(": complete\n") == 3, output
    assert (sweep.root / "corrected-s0" / "report.html").stat().st_mtime == reported_s, "complete runs are not touched"


def check_results(sweep: Command) -> None:
    document = json.loads((sweep.root / "sweep.json").read_text())
    assert [(arm["arm"], arm["num_seeds"]) for arm in document["arms"]] == [("corrected", 1), ("uncorrected", 1)]
    for name in ("corrected-s0", "uncorrected-s0"):
        learning = document["runs"][name]["result"]["learning"]
        assert learning["steps"][-2] < ENV_STEPS <= learning["steps"][-1], "the last update reaches the limit"
        assert all(later > earlier for earlier, later in pairwise(learning["seconds"]))
        assert document["curves"]["env_steps"][document["runs"][name]["arm"]][-1]["x"] == ENV_STEPS
        # It started from the policy of the start run, without a warm start of its own.
        phases = [line["phase"] for line in sweep.run_dir(name).read_metrics("phase")]
        assert "imitation" not in phases and phases[-1] == "finished"
    assert "imitation" in [line["phase"] for line in sweep.run_dir("start-s0").read_metrics("phase")]
    assert (sweep.root / "sweep.html").read_text().count("<svg") == 2
