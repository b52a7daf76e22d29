"""`deskrl up` end to end on real desktops: a run that is stopped or killed resumes, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_kit import DEADLINE_S, Run, check_no_episode_is_lost_or_repeated, check_status_and_top

from deskrl.launch.supervisor import describe_leftovers


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    small_run = Run(tmp_path, num_updates=3)
    yield small_run
    small_run.close()


def test_a_killed_run_resumes_without_losing_or_repeating_an_episode(run: Run) -> None:
    run.start()
    run.wait_for_update(1)
    check_status_and_top(run)
    run.check_second_start_is_rejected()
    kept = run.finished_episodes()
    run.signal(signal.SIGKILL)
    run.finish()

    run.start()
    status, output = run.finish()
    assert "resuming" in output
    assert status in (0, 1), "the criterion that success has risen is not for three updates"
    check_no_episode_is_lost_or_repeated(run, kept)
    verdicts = {row["criterion"]: row["ok"] for row in json.loads((run.folder.results / "acceptance.json").read_text())}
    assert verdicts["nothing is left behind"] and verdicts["the checkpoint is valid"]
    assert describe_leftovers(run.folder) == []


def test_ctrl_c_stops_a_run_in_any_phase_without_leftovers(run: Run) -> None:
    for moment in ("demonstrations", "imitation"):
        run.start()
        run.wait_for(lambda moment=moment: any(line["phase"] == moment for line in run.metrics("phase")))
        started_s = time.monotonic()
        run.signal(signal.SIGINT)
        status, output = run.finish()
        assert status == 130, output[-2000:]
        assert time.monotonic() - started_s < DEADLINE_S
        assert describe_leftovers(run.folder) == []
        assert not run.metrics("stop_timeout"), "every role exited within its time limit"
